"""Nothing is lost: a run that is stopped, starved or killed goes on to the very bits of one that was not."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from adapted import steps_told
from conftest import EVERY_KIND, ROOT, flags_of_a_run, run_script, save_pictures
from PIL import Image

import megaman_lora
from megaman.common.console import UserError
from megaman.common.signals import Stopped
from megaman.config.train import TrainConfig
from megaman.training import objective
from megaman.training.checkpoints import Checkpoint
from megaman.training.resume import PICTURES, check_resume
from megaman.training.sampler import Sampler
from megaman.training.tracker import Tracker

TRICKY = [
    "--gradient_accumulation_steps",
    "2",
    "--caption_dropout",
    "0.4",
    "--shuffle_tags",
    "--crop",
    "random",
    "--flip",
    "--use_dora",
    "--lora_targets",
    "conv",
    "--lora_dropout",
    "0.3",
    "--noise_offset",
    "0.1",
    "--ema_decay",
    "0.9",
]
WEIGHTS = ("adapter_model.safetensors", "megaman_lora.safetensors")


@pytest.fixture
def odd_pictures(folder_of_pictures: Path) -> Path:
    """Six pictures in three shapes: short steps of several buckets."""
    for i in (1, 2, 5):
        path = folder_of_pictures / f"megaman_{i}.png"
        Image.open(path).resize((80, 40) if i == 1 else (40, 80)).save(path)
    return folder_of_pictures


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sends this process a signal in the middle of the given step, once."""
    honest, left = Tracker.record, []

    def record(self: Tracker, step: object) -> None:
        if left and step.number + 1 == left[0][0]:
            os.kill(os.getpid(), left.pop()[1])
        honest(self, step)

    monkeypatch.setattr(Tracker, "record", record)
    return lambda step, number=signal.SIGTERM: left.append((step, number))


def bytes_of(weights: Path) -> list[bytes]:
    files = [path for name in WEIGHTS for path in sorted(weights.rglob(name))]
    assert len(files) >= len(WEIGHTS)
    return [path.read_bytes() for path in files]


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("flags", [TRICKY], ids=["tricky"])
@EVERY_KIND
def test_a_run_stopped_three_times_ends_with_the_bytes_of_an_unbroken_one(
    train: Callable[..., Path],
    odd_pictures: Path,
    stop_after: Callable[..., None],
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    total = ("--max_train_steps", "7", "--save_steps", "50")
    unbroken = bytes_of(train(*flags, *total))
    resume: tuple[str, ...] = ()
    for cut, number in ((1, signal.SIGTERM), (2, signal.SIGINT), (5, signal.SIGTERM)):
        stop_after(cut, number)
        with pytest.raises(Stopped, match=f"at step {cut} of 7, saved. Go on with: python") as stopped:
            train(*flags, *total, *resume)
        assert stopped.value.exit_code == 128 + number
        resume = ("--resume_from_checkpoint", "latest")
    assert bytes_of(train(*flags, *total, *resume)) == unbroken
    assert "resuming: at step 5 of 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("made_with", "expected"),
    [
        (None, None),
        ("torch 2.1, 96 threads", "was made with torch 2.1, 96 threads; this run has torch"),
        ("", "was made with an earlier version of this program, 1 threads; this run has torch"),
    ],
    ids=["the same", "another", "an earlier"],
)
def test_a_checkpoint_of_other_roundings_is_told(
    made_with: str | None,
    expected: str | None,
    train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Checkpoint

    def with_digits(step: int, settings: Any, origins: Any, run: dict[str, Any], *others: Any) -> Checkpoint:
        if made_with is not None:
            del run["digits"]
        return real(step, settings, origins, run | ({"digits": made_with} if made_with else {}), *others)

    monkeypatch.setattr(megaman_lora, "Checkpoint", with_digits)
    train("--max_train_steps", "2", "--save_steps", "1")
    capsys.readouterr()
    train("--max_train_steps", "3", "--resume_from_checkpoint", "latest")
    told = [line for line in capsys.readouterr().err.splitlines() if "up to rounding, not to the bit" in line]
    assert len(told) == (expected is not None)
    assert expected is None or expected in told[0]


def test_the_told_command_goes_on(
    train_flags: list[str], stop_after: Callable[..., None], train: Callable[..., Path]
) -> None:
    stop_after(3)
    with pytest.raises(Stopped, match="Go on with") as stopped:
        train()
    told = str(stopped.value).split("python megaman_lora.py ")[1].split()
    assert megaman_lora.train(megaman_lora.read_config(told)[0]).is_dir()


def test_a_finished_run_can_be_extended_and_its_page_and_metrics_go_on(train: Callable[..., Path]) -> None:
    output = train("--validation_steps", "2").parent
    longer = ("--max_train_steps", "6", "--resume_from_checkpoint", "latest", "--validation_steps", "2")
    train(*longer)
    assert not output.with_name("out.001").exists()
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000004", "step-000006"]
    page = (output / "index.html").read_text()
    assert all(f"step-{step:06}/01.png" in page for step in (0, 2, 4, 6))
    assert [line["step"] for line in steps_told(output)] == [4, 6]
    told = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told if "strength" in line] == [2, 4, 6]
    assert [line["step"] for line in told if "samples" in line] == [0, 2, 4, 6]
    again = train("--max_train_steps", "6", "--resume_from_checkpoint", "latest")  # nothing left to train
    assert again.is_dir()


def test_a_preview_that_a_killed_run_still_owed_is_drawn(
    train: Callable[..., Path], finished: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    unbroken = bytes_of(output / "lora_weights")  # they hold the last preview's thumbnail
    shutil.rmtree(output / "lora_weights")
    (output / "samples" / "step-000004" / "01.png").unlink()
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(line for line in lines if '"samples"' not in line))
    assert bytes_of(train("--resume_from_checkpoint", "latest")) == unbroken
    assert (output / "samples" / "step-000004" / "01.png").exists()


def test_going_on_from_an_older_checkpoint_keeps_the_later_ones_apart(train: Callable[..., Path]) -> None:
    output = train("--save_steps", "1").parent
    older = output / "checkpoints" / "step-000002"
    unbroken = bytes_of(output / "lora_weights")
    assert bytes_of(train("--save_steps", "1", "--resume_from_checkpoint", str(older))) == unbroken
    aside = sorted(path.name for path in (output / "checkpoints.001").iterdir())
    assert aside == ["step-000003", "step-000004"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lora_rank", "2"], "--lora_rank was 4, now 2"),
        (["--lora_alpha", "8"], "--lora_alpha was 32.0, now 8.0"),
        (["--seed", "7"], "--seed was 42, now 7"),
        (["--lr_scheduler", "linear"], "--lr_scheduler was 'cosine', now 'linear'"),
        (["--learning_rate", "1e-3"], "--learning_rate was 0.01, now 0.001"),
        (["--lr_warmup_steps", "3"], "--lr_warmup_steps was 0, now 3"),
        (["--train_batch_size", "1"], "--train_batch_size was 2, now 1"),
        (["--caption_dropout", "0.9"], "--caption_dropout was 0.05, now 0.9"),
        (["--resolution", "48"], "--resolution was 32, now 48"),
        (["--trigger", "mgmn"], "--trigger was 'mega man', now 'mgmn'"),
        (["--pretrained_model_name", "OTHER"], "the base model's weights was"),
        (["NEW PICTURE"], "were changed since (6 pictures then, 7 now)"),
        (["NEW CAPTION"], "pictures, captions, repeats or masks in"),
        (["--max_train_steps", "1"], "--max_train_steps 1 is the total"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_resume_with_anything_else_names_it_and_stops(
    train: Callable[..., Path],
    finished: Path,
    folder_of_pictures: Path,
    tiny_folder: Path,
    tmp_path: Path,
    flags: list[str],
    named: str,
) -> None:
    weights = shutil.copytree(finished, tmp_path / "out") / "lora_weights"
    before = bytes_of(weights)
    if flags == ["NEW PICTURE"]:
        Image.new("RGB", (40, 48), "pink").save(folder_of_pictures / "megaman_9.png")
    elif flags == ["NEW CAPTION"]:
        (folder_of_pictures / "megaman_0.txt").write_text("mega man, another")
    elif flags[-1] == "OTHER":
        flags = ["--pretrained_model_name", str(other_base(tiny_folder, tmp_path / "other"))]
    changed = [] if flags[0].startswith("NEW") else flags
    with pytest.raises(UserError) as error:
        train("--max_train_steps", "5", "--resume_from_checkpoint", "latest", *changed)
    assert named in str(error.value)
    assert ("--init_lora" in str(error.value)) == flags[0].startswith("NEW")
    assert not (flags[0].startswith("NEW") and "with sum" in str(error.value))
    assert error.value.exit_code == 7
    assert bytes_of(weights) == before


def test_a_run_of_many_sizes_from_before_whole_steps_is_not_gone_on_with_in_another_order() -> None:
    cfg = TrainConfig()
    many, one = Sampler(((0, 1), (2, 3)), 2, 42).origins, Sampler(((0, 1, 2, 3),), 2, 42).origins
    then = {PICTURES: "4 with sum 0", "pictures a step": 2}
    checkpoint = Checkpoint(1, asdict(cfg), then, {}, 1, {}, Path("step-000001"))
    check_resume(checkpoint, cfg, {PICTURES: "4 with sum 0"} | one)
    with pytest.raises(UserError, match="the order of the pictures was None, now 'whole steps"):
        check_resume(checkpoint, cfg, {PICTURES: "4 with sum 0"} | many)


@pytest.mark.parametrize(
    "form",
    [
        "--lora_targets attention",
        "--lora_targets attention+ff --use_rslora",
        "--lora_targets linear --lora_rank 8 --lora_alpha 20",
        "--lora_targets conv --use_dora",
    ],
)
def test_with_other_pictures_the_told_command_goes_on_from_what_was_learned(
    train: Callable[..., Path], folder_of_pictures: Path, form: str
) -> None:
    first = train(*form.split(), "--max_train_steps", "2").parent
    Image.new("RGB", (40, 48), "pink").save(folder_of_pictures / "megaman_9.png")
    with pytest.raises(UserError, match="To go on with these pictures") as error:
        train(*form.split(), "--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    told = shlex.split(str(error.value).split("python megaman_lora.py ")[1])
    cfg = megaman_lora.with_init_lora(*megaman_lora.read_config(told))
    assert cfg.init_lora == str(first / "checkpoints" / "step-000002" / "adapter.safetensors")
    assert Path(cfg.data_dir) == folder_of_pictures
    second = megaman_lora.train(cfg)
    assert second.parent != first
    assert (first / "lora_weights").is_dir()


def other_base(tiny_folder: Path, folder: Path) -> Path:
    """The tiny base with other weights."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.unet.conv_in.weight.data.add_(0.1)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def half_a_run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """The output folder `out` of a run of four steps as it was left after two, and the bytes that it ends
    with.
    """
    root = tmp_path_factory.mktemp("half")
    flags = flags_of_a_run(tiny_folder, save_pictures(root / "pictures"), root / "out")
    unbroken = bytes_of(megaman_lora.train(megaman_lora.read_config(flags)[0]))
    shutil.rmtree(root / "out" / "checkpoints" / "step-000004")
    shutil.rmtree(root / "out" / "lora_weights")
    return root / "out", unbroken


@pytest.mark.parametrize(
    "flags",
    [
        "--config elsewhere/out2/training_config.json --resume_from_checkpoint latest",
        "--config elsewhere/out2/training_config.json "
        "--resume_from_checkpoint elsewhere/out2/checkpoints/step-000002",
        "SAME --output_dir elsewhere/out2 --resume_from_checkpoint latest",
        "SAME --output_dir elsewhere/../elsewhere/out2 --resume_from_checkpoint latest",
        "SAME --output_dir link --resume_from_checkpoint latest",
        "--config link/training_config.json --resume_from_checkpoint latest",
        "--config HERE/link/training_config.json --resume_from_checkpoint HERE/link/checkpoints/step-000002",
        "SAME --output_dir elsewhere/out2 --resume_from_checkpoint elsewhere/out2",
        "SAME --output_dir out --resume_from_checkpoint HERE/elsewhere/out2/checkpoints/step-000002",
    ],
)
def test_a_moved_and_renamed_run_resumes_to_the_bytes_of_an_unbroken_one(
    half_a_run: tuple[Path, list[bytes]],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
) -> None:
    output, unbroken = half_a_run
    monkeypatch.chdir(tmp_path)
    shutil.copytree(output, "elsewhere/out2")
    os.symlink("elsewhere/out2", "link", target_is_directory=True)
    same = flags_of_a_run(tiny_folder, output.parent / "pictures", tmp_path / "out")
    words = flags.replace("HERE", str(tmp_path)).split()
    argv = [*same, *words[1:]] if words[0] == "SAME" else words
    weights = megaman_lora.train(megaman_lora.read_config(argv)[0])
    assert bytes_of(weights) == unbroken
    went_on_in = tmp_path / ("out" if "out" in argv else "elsewhere/out2")
    assert weights.resolve() == went_on_in / "lora_weights"
    assert not list(tmp_path.glob("**/out2.*"))  # nothing was moved aside: it is the same run


def test_where_no_checkpoint_is_the_way_to_a_moved_run_is_told(
    train: Callable[..., Path], finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "moved ü")
    (tmp_path / "other").mkdir()
    named = tmp_path / "out" / "checkpoints" / "step-000002"
    for wanted, missing in (
        ("latest", "no checkpoint that can be resumed"),
        (str(named), "no such checkpoint"),
        (str(tmp_path / "ouT"), "no such checkpoint"),  # a run's folder, mistyped
    ):
        with pytest.raises(UserError, match=missing) as error:
            train("--resume_from_checkpoint", wanted)
        assert error.value.exit_code == 7
        told = str(error.value)
        assert "--output_dir, or its training_config.json with --config (beside this one: moved ü)" in told
        assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- memory and numbers


def test_a_run_that_runs_out_of_memory_goes_on_with_less_and_remembers_it(
    train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    stop_after: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    plenty = train("--train_batch_size", "4", "--learning_rate", "1e-3")
    honest = objective.denoising_losses

    def starved(unet: torch.nn.Module, draw: object, *rest: object) -> torch.Tensor:
        if len(draw.latents) > 1 or not unet.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(unet, draw, *rest)

    flags = ("--train_batch_size", "4", "--learning_rate", "1e-3")
    with monkeypatch.context() as patch:
        patch.setattr(objective, "denoising_losses", starved)
        stop_after(2)
        with pytest.raises(Stopped):
            train(*flags)
        told = capsys.readouterr().err
        assert [told.count(f"{batch} at a time now") for batch in (2, 1)] == [1, 1]
        assert told.count("all blocks are recomputed now") == 1
        lean = train(*flags, "--resume_from_checkpoint", "latest")
        assert "ran out" not in capsys.readouterr().err  # it need not find out again
    a, b = (torch.cat([v.flatten() for v in weights_of(folder)]) for folder in (kept(plenty), lean))
    assert (a - b).abs().max() < 1e-3 * a.abs().max()


def kept(weights: Path) -> Path:
    """Where lora_weights/ of a run lies after the next one has moved it aside."""
    return weights.parent.with_name("out.001") / "lora_weights"


def weights_of(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return [value for _, value in sorted(load_file(folder / "adapter_model.safetensors").items())]


def test_memory_that_suffices_for_nothing_is_exit_6_with_three_flags(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(objective, "denoising_losses", starved)
    with pytest.raises(UserError, match=r"--resolution .*--mixed_precision .*--lora_rank") as error:
        train()
    assert error.value.exit_code == 6


def test_a_preview_without_memory_is_left_out_and_training_goes_on(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def starved(*_: object, **__: object) -> list[object]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("megaman.training.validation.draw", starved)
    assert train().is_dir()
    assert "no preview at step 4" in capsys.readouterr().err


@pytest.mark.parametrize("step", [1, 3])
def test_a_loss_that_is_no_number_names_its_step_and_picture_and_touches_no_file(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int
) -> None:
    honest, calls = objective.denoising_losses, iter(range(100))

    def poisoned(*args: object) -> torch.Tensor:
        spoiled = torch.tensor([float("nan"), 1.0]) if next(calls) == step - 1 else 1.0
        return honest(*args) * spoiled

    monkeypatch.setattr(objective, "denoising_losses", poisoned)
    with pytest.raises(UserError) as error:
        train("--save_steps", "1")
    assert error.value.exit_code == 5
    dataset = megaman_lora.MegaManDataset(tmp_path / "pictures", None)
    first = megaman_lora.sampler_of(dataset, 2).batch(step - 1)[0]
    assert f"not finite at step {step} (pictures {dataset.paths[first.picture].name})" in str(error.value)
    saved = sorted(path.name for path in (tmp_path / "out" / "checkpoints").glob("step-*"))
    assert saved == [f"step-{number:06}" for number in range(1, step)]


def test_a_preview_that_is_no_picture_stops_with_its_step(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKL

    honest = AutoencoderKL.decode
    nan = float("nan")
    monkeypatch.setattr(AutoencoderKL, "decode", lambda *args, **kwargs: (honest(*args, **kwargs)[0] * nan,))
    with pytest.raises(UserError, match="the preview at step 0") as error:
        train("--cache_dir", str(tmp_path / "cache"))
    assert error.value.exit_code == 5


# ---------------------------------------------------------------- real processes


def test_a_second_process_on_one_output_is_refused_and_sigterm_saves(
    train_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    endless = ["--max_train_steps", "100000", "--save_steps", "100000", "--validation_steps", "100000"]
    command = [str(ROOT / "megaman_lora.py"), *train_flags, *endless]
    first = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as left:
            commands.run(commands.training)
        assert left.value.code == 7
        assert f"in use by process {first.pid}" in capsys.readouterr().err
        first.send_signal(signal.SIGTERM)
        told = first.communicate(timeout=60)[1]
    finally:
        first.kill()
    assert first.returncode == 143, told
    assert "Traceback" not in told
    assert "saved. Go on with" in told
    assert len(list((tmp_path / "out" / "checkpoints").glob("step-*"))) == 1


def test_a_second_signal_stops_at_once() -> None:
    code = (
        "import os, signal, time; from megaman.common.signals import after_this_step\n"
        "with after_this_step() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); assert stop; print('noted', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
    )
    result = run_script("-c", code, timeout_s=50)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "noted\n")


def test_before_the_first_step_a_signal_stops_at_once_with_its_code() -> None:
    code = (
        "import os, signal; from megaman.common import console\n"
        "with console.reported(): os.kill(os.getpid(), signal.SIG{})\n"
    )
    for name, exit_code in (("INT", 130), ("TERM", 143)):
        result = run_script("-c", code.format(name))
        assert (result.returncode, result.stderr.count("\n")) == (exit_code, 1), result.stderr
