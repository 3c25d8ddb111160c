"""The training script as a whole: what a user sees, and what must hold of every run."""

import errno
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import commands
import pytest
import torch
from adapted import steps_told, weights_in
from conftest import EVERY_KIND, ROOT, run_script
from PIL import Image

import megaman_lora
from megaman.common.console import UserError, quiet_libraries
from megaman.common.output_folder import RunFolder
from megaman.data.first_start import GUIDE
from megaman.model import stable_diffusion
from megaman.model.compute import new_accelerator, pick_device, pick_dtype
from megaman.model.stable_diffusion import load_base
from megaman.training import objective
from megaman.training.sampler import Position
from megaman.training.tracker import StepResult, Tracker


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of every weight, as a share of the largest weight of B."""
    scale = max(value.abs().max() for key, value in a.items() if "lora_B" in key)
    return torch.cat([(a[key] - b[key]).abs().flatten() / scale for key in a])


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between two adapters."""
    return differences(a, b).max().item()


@EVERY_KIND
def test_a_run_writes_every_file_it_should(train: Callable[..., Path]) -> None:
    output = train("--report_to", "tensorboard").parent
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert {
        "training_config.json",
        "metrics.jsonl",
        "lora_weights/adapter_config.json",
        "lora_weights/adapter_model.safetensors",
        "lora_weights/megaman_lora.safetensors",
        "lora_weights/pytorch_lora_weights.safetensors",
        "index.html",
        "samples/step-000000/01.png",
        "samples/step-000004/01.png",
        "checkpoints/step-000002/adapter.safetensors",
        "checkpoints/step-000004/state.safetensors",
    } <= files
    assert any(name.startswith("logs/events") for name in files)
    assert not any("partial" in name for name in files)
    last = steps_told(output)[-1]
    assert last["step"] == 4
    assert {"loss", "lr", "grad_norm", "images_per_s"} <= last.keys()


@pytest.mark.parametrize("until", [3, 21], ids=["soon", "the last of 22"])
def test_a_tensorboard_that_cannot_write_is_told_once_and_the_run_goes_on(
    until: int,
    train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = []

    def full(writer: object, data: bytes) -> None:
        written.append(data)
        if len(written) > until:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    quiet_libraries()  # as the scripts do
    output = train("--report_to", "tensorboard", "--max_train_steps", "30").parent
    told = capsys.readouterr().err
    assert told.count("note: TensorBoard's log can't be written (No space left on device) and ends here") == 1
    assert "Traceback" not in told
    assert steps_told(output)[-1]["step"] == 30


@pytest.mark.usefixtures("all_threads")
def test_the_same_run_twice_gives_the_same_bytes_and_another_seed_does_not(
    train: Callable[..., Path],
) -> None:
    first = weights_in(train())
    again = weights_in(train())
    other = weights_in(train("--seed", "0"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert distance(first, other) > 0.01


def test_a_run_can_be_repeated_from_its_own_configuration(train_flags: list[str]) -> None:
    at = train_flags.index("--max_train_steps")
    flags = [*train_flags[:at], *train_flags[at + 2 :], "--num_train_epochs", "2", "--lr_scheduler", "linear"]
    first = megaman_lora.train(megaman_lora.read_config(flags)[0])
    config = first.parent / "training_config.json"
    assert json.loads(config.read_text())["max_train_steps"] == 6  # 6 pictures twice, 2 a step
    again = megaman_lora.train(megaman_lora.read_config(["--config", str(config)])[0])
    moved = first.parent.with_name("out.001") / "lora_weights"
    names = [folder / "adapter_model.safetensors" for folder in (moved, again)]
    assert names[0].read_bytes() == names[1].read_bytes()


@EVERY_KIND
def test_accumulating_two_batches_is_one_batch_of_twice_the_size(
    train: Callable[..., Path], more_flags: list[str]
) -> None:
    slowly = ["--learning_rate", "1e-3", *["--text_encoder_lr", "1e-3"][: len(more_flags)]]
    one = weights_in(train("--train_batch_size", "4", *slowly))
    two = weights_in(train("--train_batch_size", "2", "--gradient_accumulation_steps", "2", *slowly))
    assert distance(one, two) < 3e-3  # 2.1e-3 seen; 1.8 from half of the pictures


@EVERY_KIND
def test_gradient_checkpointing_changes_the_memory_and_not_the_result(
    train: Callable[..., Path], plain_run: Path
) -> None:
    plain, lean = weights_in(plain_run / "lora_weights"), weights_in(train("--gradient_checkpointing"))
    assert distance(plain, lean) < 1e-4


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora_alpha", "4"],
        ["--lora_rank", "2"],
        ["--learning_rate", "3e-3"],
        ["--lr_scheduler", "constant"],
        ["--lr_warmup_steps", "4"],
        ["--train_batch_size", "1"],
        ["--caption_dropout", "1"],
        ["--snr_gamma", "0"],
        ["--weight_decay", "10"],
        ["--max_grad_norm", "1e-9"],
        ["--resolution", "48"],
        ["--mixed_precision", "bf16"],
        ["--trigger", "mgmn"],
        ["--crop", "center"],
        ["--crop", "random"],
        ["--shuffle_tags", "--keep_tags", "0"],
        ["--preserve_weight", "1"],
        ["--preserve_weight", "1", "--preserve_class", "wizard"],
        ["--noise_offset", "0.1"],
        ["--ema_decay", "0.9"],
        ["--optimizer", "adafactor"],
    ],
    ids=" ".join,
)
def test_every_setting_changes_the_result(
    train: Callable[..., Path], finished: Path, flags: list[str]
) -> None:
    unchanged, changed = weights_in(finished / "lora_weights"), weights_in(train(*flags))
    pairs = [(unchanged[key], changed[key]) for key in unchanged]
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


def test_gradients_are_really_clipped(train: Callable[..., Path]) -> None:
    """AdamW divides by the gradient's size, so a clip to almost nothing shows only against its epsilon of
    1e-8.
    """
    untouched = weights_in(train("--max_grad_norm", "1e-12", "--weight_decay", "0"))
    moved = weights_in(train("--weight_decay", "0"))
    size = {
        name: max(v.abs().max() for k, v in w.items() if "lora_B" in k)
        for name, w in (("c", untouched), ("m", moved))
    }
    assert size["c"] < 0.02 * size["m"]


def test_a_non_finite_loss_stops_the_run_and_keeps_what_was_saved(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = objective.denoising_losses
    calls = iter(range(100))

    def poisoned(*args: object) -> torch.Tensor:
        return honest(*args) * (float("nan") if next(calls) >= 3 else 1.0)

    monkeypatch.setattr(objective, "denoising_losses", poisoned)
    with pytest.raises(UserError, match="not finite at step") as error:
        train()
    assert error.value.exit_code == 5
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-000002"]
    assert not (tmp_path / "out" / "lora_weights").exists()


def test_twenty_overflowed_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    watcher = Tracker(RunFolder(tmp_path), range(60), ["a.png"], 1, logging_dir=None)

    def record(number: int, was_skipped: bool) -> None:
        norm = torch.tensor(float("inf") if was_skipped else 1.0)
        examples = [([Position(number, 0)], torch.tensor([0.5]))]
        watcher.record(
            StepResult(number, torch.tensor(0.5), norm, [1e-4], torch.tensor(was_skipped), examples)
        )

    for number, was_skipped in enumerate([True] * 19 + [False] + [True] * 19):
        record(number, was_skipped)
    with pytest.raises(UserError, match=r"20 steps in a row .* up to step 40 \(pictures a.png\)"):
        record(39, True)


# ---------------------------------------------------------------- first contact and mistakes


def copy_of_the_program(folder: Path) -> Path:
    """The scripts and rooms in a folder of their own, without pictures, as after an unpacked download."""
    shutil.copytree(ROOT / "megaman", folder / "megaman", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("megaman_lora.py", "generate_megaman.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_first_start_makes_the_folder_with_its_guide_and_says_what_to_do(tmp_path: Path) -> None:
    program = copy_of_the_program(tmp_path)
    for _ in range(2):  # also when the folder is there and empty
        result = run_script("megaman_lora.py", cwd=program)
        assert result.returncode == 0
        assert result.stderr.count("\n") == 2
        assert "--preset demo" in result.stderr
        assert [path.name for path in (program / "megaman_images").iterdir()] == ["README.md"]


def test_the_guide_in_the_repository_is_the_one_that_is_written() -> None:
    assert (ROOT / "megaman_images" / "README.md").read_bytes() == GUIDE.read_bytes()


@pytest.mark.parametrize(
    ("flags", "code", "complaint"),
    [
        (["--data_dir", "nowhere"], 3, "nowhere: no such folder"),
        (["--data_dir", "EMPTY"], 3, "no usable pictures"),
        (["--resolution", "33"], 2, "multiples of 4; 32 is the nearest"),
        (["--pretrained_model_name", "./nowhere"], 4, "Check --pretrained_model_name, or try --preset demo."),
        (["--pretrained_model_name", "EMPTY"], 4, "no model_index.json"),
        (["--pretrained_model_name", "no-such/model"], 4, "--preset demo"),
        (["--pretrained_model_name", "model.ckpt"], 4, "no such base model"),
        (["--output_dir", "DATA"], 2, "holds the pictures"),
        (["--output_dir", "USERS"], 7, "no run of ours made"),
        (["--seed", "99999999999999999999"], 2, "below 2^63"),
        (["--data_dir", "x" * 300], 6, "File name too long"),
    ],
)
def test_a_mistake_is_one_line_with_its_code_and_leaves_nothing(
    train_flags: list[str],
    tmp_path: Path,
    flags: list[str],
    code: int,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("EMPTY", "USERS"):
        (tmp_path / name).mkdir()
    (tmp_path / "USERS" / "diary.txt").touch()
    places = {
        "DATA": str(tmp_path / "pictures"),
        "EMPTY": str(tmp_path / "EMPTY"),
        "USERS": str(tmp_path / "USERS"),
    }
    flags = [places.get(flag, flag) for flag in flags]
    monkeypatch.setattr(sys, "argv", ["megaman_lora.py", *train_flags, *flags])
    with pytest.raises(SystemExit) as left:
        commands.run(commands.training)
    told = capsys.readouterr().err
    assert left.value.code == code, told
    assert complaint in told
    assert len([line for line in told.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["EMPTY", "USERS", "pictures"]
    assert not Path("nowhere").exists()


def test_bad_pictures_are_reported_and_the_good_ones_train(
    train: Callable[..., Path], folder_of_pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder_of_pictures / "broken.png").write_bytes(b"no picture")
    before = {path: path.read_bytes() for path in folder_of_pictures.iterdir()}
    train()
    shown = capsys.readouterr().err
    assert "pictures: 6 in" in shown
    assert "4 captions from files, 2 from names" in shown
    assert "skipped: broken.png: not a picture; save it as PNG" in shown
    assert {path: path.read_bytes() for path in folder_of_pictures.iterdir()} == before


def test_captions_without_the_trigger_are_reported(
    train: Callable[..., Path], folder_of_pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder_of_pictures / "megaman_0.txt").write_text("a boss")
    train()
    told = capsys.readouterr().err
    assert "1 caption without the trigger 'mega man', which learns nothing from there (megaman_0.png)" in told


def test_an_unwritable_output_is_said_before_the_model_loads(
    train_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_late(*_: object, **__: object) -> NoReturn:
        raise AssertionError("the model loads")

    (tmp_path / "file").touch()
    command = ["megaman_lora.py", *train_flags, "--output_dir", str(tmp_path / "file" / "out")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(stable_diffusion, "load_base", too_late)
    with pytest.raises(SystemExit) as left:
        commands.run(commands.training)
    assert left.value.code == 6
    assert "can't write there" in capsys.readouterr().err


def test_a_run_prints_our_lines_only(train_flags: list[str]) -> None:
    result = run_script("megaman_lora.py", *train_flags)
    ours = r"(pictures|sizes|captions|plan|cache|training|step|done|next): ?|step \d+/\d+ · "
    assert result.returncode == 0
    assert all(re.match(ours, line) for line in result.stderr.splitlines()), result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "cut"),
        ("text_encoder/model.safetensors", "cut"),
        ("tokenizer/tokenizer.json", "rubbish"),
        ("vae/config.json", "rubbish"),
        ("scheduler/scheduler_config.json", "gone"),
    ],
)
def test_a_damaged_base_is_exit_4(tiny_folder: Path, tmp_path: Path, file: str, damage: str) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder, folder)
    whole = (folder / file).read_bytes()
    if damage == "gone":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"rubbish")
    with pytest.raises(UserError) as error:
        load_base(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    assert error.value.exit_code == 4
    assert str(folder) in str(error.value)


def test_a_base_of_another_kind_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    shutil.copytree(tiny_folder, tmp_path / "inpainting")
    config = UNet2DConditionModel.load_config(tiny_folder / "unet")
    UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(
        tmp_path / "inpainting" / "unet"
    )
    with pytest.raises(UserError, match="takes 9 channels, not 4"):
        load_base(str(tmp_path / "inpainting"), device=torch.device("cpu"), dtype=torch.float32)


def test_a_disk_that_fills_up_is_exit_6_and_leaves_no_half_file(tmp_path: Path) -> None:
    code = (
        "import resource, signal, torch\nfrom pathlib import Path\n"
        "from megaman.common import console, files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, "
        "(20000, 20000))\n"
        f"path = Path({str(tmp_path)!r}) / 'a.safetensors'\n"
        "with console.reported(): files.save_tensors({'a': torch.zeros(10000)}, path, {})\n"
    )
    result = run_script("-c", code)
    assert result.returncode == 6, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_is_exit_6(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        commands.run(lambda: torch.empty(2**50))
    told = capsys.readouterr().err
    assert (left.value.code, told.count("\n")) == (6, 1), told


# ---------------------------------------------------------------- base, device, precision


def test_one_process_may_train_in_one_precision_after_another(train: Callable[..., Path]) -> None:
    train()
    accelerator = new_accelerator(
        torch.device("cpu"), torch.float16
    )  # accelerate keeps the precision of a process, unless it is told to forget
    assert accelerator.mixed_precision == "fp16"
    train()


def test_a_skipped_steps_gradient_is_no_number_in_the_metrics(tmp_path: Path) -> None:
    watcher = Tracker(RunFolder(tmp_path), range(1), ["a.png"], 1, logging_dir=tmp_path / "logs")
    watcher.record(
        StepResult(0, torch.tensor(0.5), torch.tensor(float("inf")), [1e-4], torch.tensor(True), [])
    )
    watcher.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["grad_norm"] is None


def test_the_deleted_hub_id_is_mapped_to_its_successor(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="stable-diffusion-v1-5/stable-diffusion-v1-5"):
        load_base("runwayml/stable-diffusion-v1-5", device=torch.device("cpu"), dtype=torch.float32)
    assert capsys.readouterr().err.count("was deleted from the hub") == 1


def test_what_the_device_cannot_do_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("fp16", cpu) == torch.float32
    assert "fp16 needs an NVIDIA card" in capsys.readouterr().err
    assert pick_dtype("bf16", cpu) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cuda")) == torch.float16
    assert capsys.readouterr().err == ""


def test_an_idle_nvidia_card_is_one_warning_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr("megaman.model.compute._has_nvidia_card", lambda: True)
    assert pick_device().type == "cpu"
    assert "built without CUDA" in capsys.readouterr().err


def test_the_runs_page_shows_every_steps_samples(train: Callable[..., Path]) -> None:
    samples = (
        train("--validation_steps", "2", "--validation_prompt", "mega man", "<b>bold</b>").parent / "samples"
    )
    page = (samples.parent / "index.html").read_text()
    for step in ("000000", "000002", "000004"):
        for number in ("01", "02"):
            assert f'"samples/step-{step}/{number}.png"' in page
            with Image.open(samples / f"step-{step}" / f"{number}.png") as picture:
                assert picture.size == (32, 32)
    assert "<b>bold" not in page
