"""The page of a run: curves that keep what matters, samples that are whole, strengths that are true; made
anew of a run's files alone, however they were left.
"""

import html
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_script
from PIL import Image
from test_fused import adapted
from test_onednn import run_once
from torch import Tensor, nn

import generate_megaman
import megaman_lora
from megaman.common.console import UserError
from megaman.common.files import path_from
from megaman.common.html import is_page, is_page_of_run
from megaman.common.kinds import UNET
from megaman.common.output_folder import OutputLock, RunFolder, move_aside, read_rows
from megaman.config.record import recorded
from megaman.config.train import TrainConfig
from megaman.kernels import onednn
from megaman.lora.injection import adapter_of, inject, lora_modules
from megaman.lora.strength import strengths_of
from megaman.model.int8 import store_in_int8
from megaman.model.stable_diffusion import StableDiffusion
from megaman.training import run_page
from megaman.training.curves import (
    BUCKETS,
    HEIGHT,
    WIDTH,
    Line,
    chart_of,
    number_of,
    scale_of,
    shown,
    smoothed,
    thinned,
)
from megaman.training.run_page import RunStory, render_run
from megaman.training.sampler import generator_of
from megaman.training.tracker import Tracker

# ---------------------------------------------------------------- curves


def test_thousands_of_steps_become_a_short_curve_that_keeps_extremes_and_gaps() -> None:
    rng = random.Random(0)
    points: dict[int, float | None] = {step: rng.random() for step in range(1, 20_001)}
    points |= {777: 99.0, 12_345: -99.0, 15_000: None}
    kept = dict(thinned(points))
    assert len(kept) <= 3 * BUCKETS + 2
    assert {1, 777, 12_345, 15_000, 20_000} <= kept.keys()
    assert all(kept[step] == points[step] for step in kept)
    assert list(kept) == sorted(kept)
    few = {1: 1.0, 2: None, 3: 2.0}
    assert thinned(few) == [*few.items()]


def test_a_missing_norm_leaves_a_gap_and_a_point_between_gaps_stays_visible() -> None:
    points = {10: 1.0, 20: 2.0, 30: None, 40: 1.5, 50: None, 60: 1.0, 70: 2.0}
    chart = chart_of("x", [Line("x", "raw", points)], 70, [])
    assert chart is not None
    path = chart.curves[0].path
    assert path.count("M") == path.count("h0") == 3
    assert path.count("L") == 2
    assert chart.curves[0].last == "2"
    assert chart_of("x", [Line("x", "raw", {10: None})], 70, []) is None
    assert chart_of("x", [Line("x", "raw", {})], 70, []) is None


@pytest.mark.parametrize(
    "values",
    [
        *([0.1], [0.0], [1.0, 1.0], [0.1, 0.3], [1e-9, 1e-4], [1e-90, 1e90], [-5.0, 5.0]),
        *([3.0, 3.0 + 1e-15], [0.05, 5000.0], [1e99, 1e99], [0.0, 1e-99], [0.131, 0.134]),
    ],
    ids=str,
)
def test_every_curve_lies_within_its_scale_and_has_ticks_that_differ(values: list[float]) -> None:
    for is_even in (True, False):
        scale = scale_of(values, is_even=is_even)
        assert all(-1e-9 <= scale.place(value) <= 1 + 1e-9 for value in values)
        labels = [shown(tick) for tick in scale.ticks]
        assert 2 <= len(labels) == len(set(labels)) <= 8
        assert all(-1e-9 <= scale.place(tick) <= 1 + 1e-9 for tick in scale.ticks)


def test_what_spans_decades_is_drawn_on_a_logarithmic_scale() -> None:
    assert scale_of([0.01, 10.0], is_even=False).is_log
    assert not scale_of([0.01, 10.0], is_even=True).is_log
    assert not scale_of([0.1, 0.3], is_even=False).is_log
    assert not scale_of([0.0, 10.0], is_even=False).is_log
    assert scale_of([0.02, 3.0], is_even=False).place(10 ** (-0.5)) == pytest.approx(0.5)


def test_a_smoothed_curve_lies_at_the_mean_and_is_calmer() -> None:
    rng = random.Random(1)
    noisy = {step: 1 + rng.uniform(-0.5, 0.5) for step in range(300)}
    calm = smoothed(noisy)
    assert list(calm) == list(noisy)
    assert max(abs(value - 1) for value in calm.values() if value is not None) < 0.3
    assert smoothed({1: 1.0, 2: None, 3: 3.0, 4: 5.0})[2] == pytest.approx(2)
    assert smoothed({1: None, 2: None}) == {1: None, 2: None}


def test_checkpoints_are_marked_once_a_place() -> None:
    line = Line("x", "raw", {1: 1.0, 4000: 2.0})
    chart = chart_of("x", [line], 4000, range(1, 4001))
    assert chart is not None
    assert chart.marks.count("M") <= WIDTH + 1
    few = chart_of("x", [line], 4000, [1000, 9999])
    assert few is not None
    assert few.marks == f"M{WIDTH // 4} 0V{HEIGHT}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, "1", None, True, [1], 1e101])
def test_what_is_no_number_to_draw_is_a_gap(value: object) -> None:
    assert number_of(value) is None


# ---------------------------------------------------------------- strengths


def expected_strength(before: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> dict[str, float]:
    """The same from whole matrices, in float64. before: the frozen weights by their module's path."""
    squares: dict[str, list[float]] = {}
    for (_, name), layer in adapter_of(parts, None).layers.items():
        weight = before[name].float()
        change = layer.change(weight).double()
        block = re.match(r"\w+_blocks\.\d|\w+", name)
        assert block is not None
        for key in (f"unet.{block[0]}", ""):
            known = squares.setdefault(key, [0.0, 0.0])
            known[0] += change.square().sum().item()
            known[1] += weight.double().square().sum().item()
    return {name: math.sqrt(change / size) for name, (change, size) in squares.items()}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"lora_targets": "conv"},
        {"use_dora": True},
        {"use_dora": True, "lora_targets": "conv"},
        {"use_rslora": True},
    ],
    ids=str,
)
def test_a_blocks_strength_is_that_of_the_whole_matrices(flags: dict, tiny_base: StableDiffusion) -> None:
    before = {name.removesuffix(".weight"): each.clone() for name, each in tiny_base.unet.named_parameters()}
    unet = adapted(tiny_base.unet, TrainConfig(lora_rank=4, **flags))
    whole, blocks = strengths_of({UNET: unet})
    expected = expected_strength(before, {UNET: unet})
    assert {"unet.mid_block", "unet.down_blocks.0", "unet.up_blocks.1"} <= blocks.keys()
    assert {"": whole} | blocks == pytest.approx(expected, rel=1e-4)
    assert list(blocks) == sorted(blocks)


@pytest.mark.parametrize("how", ["int8", "laid out", "bfloat16"])
def test_strengths_are_alike_however_the_base_is_kept(
    how: str, tiny_base: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = TrainConfig(lora_rank=4, lora_targets="conv")
    plain = strengths_of({UNET: adapted(tiny_base.unet, cfg)})
    if how == "int8":
        store_in_int8(tiny_base.unet)
    unet = adapted(tiny_base.unet.to(torch.bfloat16) if how == "bfloat16" else tiny_base.unet, cfg)
    if how == "laid out":
        monkeypatch.setattr(onednn, "LEAST_GAIN", -1e9)
        monkeypatch.setattr(onednn, "LEAST_WORTH", -1e9)
        assert onednn.lay_out(unet, run_once(unet)) > 10
    found = strengths_of({UNET: unet})
    assert {"": found[0]} | found[1] == pytest.approx({"": plain[0]} | plain[1], rel=1e-2)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_untrained_adapter_changes_nothing_and_text_encoders_have_their_own(
    use_dora: bool, tiny_base: StableDiffusion
) -> None:
    parts = {UNET: tiny_base.unet, **tiny_base.encoders}
    cfg = TrainConfig(lora_rank=2, text_encoder_lr=1e-4, use_dora=use_dora)
    inject(parts, cfg, tiny_base.kind, partial(generator_of, 0))
    whole, blocks = strengths_of(parts)
    assert whole == pytest.approx(0, abs=1e-6)
    module = next(iter(lora_modules(tiny_base.encoders["text_encoder"]).values()))
    torch.nn.init.ones_(module.lora_B["default"].weight)
    stronger, changed = strengths_of(parts)
    assert {name for name in blocks if changed[name] > 1e-6} == {"text_encoder"}
    assert 0 < stronger < changed["text_encoder"]
    assert strengths_of({UNET: nn.Linear(2, 2)}) == (0.0, {})


# ---------------------------------------------------------------- a run's page


def text_of(page: str) -> str:
    """What of a page is read."""
    body = html.unescape(re.sub(r"<[^>]*>", "", page.split("<body>")[1].replace("<dd>", " ")))
    return re.sub(r"\s+", " ", body)


def test_a_runs_page_tells_all_of_it(finished: Path) -> None:
    page = (finished / "index.html").read_text(encoding="utf-8")
    assert is_page_of_run(finished / "index.html")
    assert "finished, 4 steps" in text_of(page)
    assert "28x36 (6)" in text_of(page)
    assert "captions made from names 2" in text_of(page)
    for title in ("Loss", "Learning rate", "Gradient norm"):
        assert f'aria-label="{title}"' in page
    assert page.count('class="mark"') == 3
    for file in ("step-000000/01.png", "step-000004/01.png"):
        assert f'src="samples/{file}"' in page
    assert 'href="dataset.html"' in page
    assert "unet.mid_block" in page
    assert "--resume_from_checkpoint" not in page
    place = path_from(Path(), finished)  # no folder above us is told
    assert f"generate_megaman.py --lora_path {place}/lora_weights --compare_checkpoints" in text_of(page)
    assert not is_page_of_run(finished / "dataset.html")


def test_the_page_of_a_run_is_made_anew_alike(finished: Path) -> None:
    page = (finished / "index.html").read_bytes()
    (finished / "index.html").unlink()
    assert run_page.report(RunFolder(finished)) == finished / "index.html"
    assert (finished / "index.html").read_bytes() == page


def killed(finished: Path, folder: Path) -> Path:
    """A copy of a run as one leaves it that is killed behind its first checkpoint."""
    output = shutil.copytree(finished, folder)
    shutil.rmtree(output / "lora_weights")
    shutil.rmtree(output / "checkpoints" / "step-000004")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    kept = [{"step": 2, "loss": 0.5, "lr": 1e-3, "grad_norm": None}]
    kept += [row for row in rows if row["step"] <= 2]
    lines = "".join(f"{json.dumps(row)}\n" for row in kept)
    (output / "metrics.jsonl").write_text(f'{lines}{{"step": 4, "loss": 0.2', encoding="utf-8")
    return output


def test_a_killed_runs_page_tells_how_far_it_came_and_how_to_go_on(finished: Path, tmp_path: Path) -> None:
    output = killed(finished, tmp_path / "out")
    page = run_page.report(RunFolder(output)).read_text(encoding="utf-8")
    assert "step 2 of 4 when this page was written" in text_of(page)
    assert (
        f"--config {path_from(Path(), output)}/training_config.json --resume_from_checkpoint latest"
        in text_of(page)
    )
    assert "step-000004/01.png" not in page  # perhaps half of them: nothing tells of them
    assert "step-000000/01.png" in page


def test_a_finished_run_that_is_to_go_on_is_not_called_finished(finished: Path, tmp_path: Path) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    record = json.loads((output / "training_config.json").read_text())
    (output / "training_config.json").write_text(json.dumps(record | {"max_train_steps": 6}))
    told = text_of(run_page.report(RunFolder(output)).read_text(encoding="utf-8"))
    assert "step 4 of 6 when this page was written" in told
    assert "--resume_from_checkpoint latest" in told


def as_of_before(output: Path) -> None:
    """Leaves of a run what one of before had: losses alone, and a page of its samples."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if "loss" in row or "validation_loss" in row]
    (output / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
    shown = "".join(f'<img src="step-{step}/01.png">' for step in ("000000", "000004"))
    page = f'<meta name="generator" content="megaman_lora">{shown}'
    (output / "samples" / "index.html").write_text(page, encoding="utf-8")
    (output / "index.html").unlink(missing_ok=True)


def test_a_run_of_before_has_a_page_with_its_samples_and_without_strengths(
    finished: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    as_of_before(output)
    page = run_page.report(RunFolder(output)).read_text(encoding="utf-8")
    assert "samples/step-000004/01.png" in page
    assert "No checkpoint tells of it" in text_of(page)
    assert "finished, 4 steps" in text_of(page)
    assert 'aria-label="Loss"' in page


def test_a_run_of_before_goes_on_and_its_samples_are_known(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    as_of_before(output)
    usual = TrainConfig().validation_prompt
    for prompts, steps in ((usual, {0, 4}), ([*usual, "another"], set())):
        tracker = Tracker(RunFolder(output), range(4, 6), [], 1, logging_dir=None, prompts=prompts)
        assert {step for step in range(6) if tracker.has_samples(step)} == steps
        tracker.close()
    earlier = Tracker(RunFolder(output), range(2, 6), [], 1, logging_dir=None, prompts=usual)
    assert [earlier.has_samples(step) for step in (0, 4)] == [True, False]
    assert earlier.latest_sample() == output / "samples" / "step-000000" / "01.png"
    earlier.close()


def test_samples_count_once_all_of_a_step_are_filed(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "samples" / "step-000002").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / "step-000002" / "01.png")
    tracker = Tracker(RunFolder(tmp_path), range(2, 4), [], 1, logging_dir=None, prompts=["a", "b"])
    assert not tracker.has_samples(2)
    tracker.show_samples(2, ["a", "b"], [Image.new("RGB", (8, 8))] * 2)
    assert tracker.has_samples(2)
    assert list(RunStory.of(RunFolder(tmp_path)).previews) == ["a", "b"]
    tracker.close()


def test_previews_stand_beside_their_own_prompt_when_prompts_have_changed(tmp_path: Path) -> None:
    tracker = Tracker(RunFolder(tmp_path), range(4), [], 1, logging_dir=None)
    for step, prompts in ((0, ["a", "b"]), (2, ["b", "c"])):
        tracker.show_samples(step, prompts, [Image.new("RGB", (8, 8))] * 2)
    tracker.close()
    previews = RunStory.of(RunFolder(tmp_path)).previews
    assert {prompt: [each.file for each in found] for prompt, found in previews.items()} == {
        "b": ["samples/step-000000/02.png", "samples/step-000002/01.png"],
        "c": ["samples/step-000002/02.png"],
        "a": ["samples/step-000000/01.png"],
    }


RUBBISH = [
    "",
    "null\n3\n[]\n{}\n",
    '{"step": "4", "loss": 1}\n{"step": true, "loss": 1}\n',
    '{"step": -1, "loss": 1}\n{"step": 1e99, "loss": 2}\n',
    '{"step": 99999999999999999999999, "loss": 1}\n',
    '{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n{"step": 3, "loss": "<b>"}\n',
    '{"step": 1, "loss": ' + "9" * 5000 + "}\n",
    "[" * 100_000 + "\n",
    '{"step": 1, "samples": 3}\n{"step": 1, "samples": [1, null]}\n{"step": 1, "samples": ["x", "y", "z"]}\n',
    '{"step": 1, "strength": 1, "block_strengths": []}\n{"step": 1, "strength": 0, "block_strengths": {}}\n',
    '{"step": 1, "strength": 1e50, "block_strengths": {"<script>": "a", "b": 0, "c": -1}}\n',
    '{"step": 1, "dataset": 7}\n',
    '{"step": 1, "dataset": {"sizes": {"<i>": []}, "pictures": null, "<b>": "<u>"}}\n',
    "\x00\ufffd\u2028 <script>\n",
]


@pytest.mark.parametrize("text", RUBBISH, ids=range(len(RUBBISH)))
def test_no_rubbish_in_the_log_keeps_the_page_from_being_made(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "training_config.json").write_text(json.dumps(recorded(TrainConfig())), encoding="utf-8")
    page = run_page.report(RunFolder(tmp_path)).read_text(encoding="utf-8")
    assert page.count("<script>") == 1
    assert "<u>" not in page


@pytest.mark.parametrize("value", [None, 7, "x", [1], {"a": 1}, "<b>bold</b>", True, 10**30])
def test_no_rubbish_in_the_record_keeps_the_page_from_being_made(value: object, tmp_path: Path) -> None:
    record = dict.fromkeys([*recorded(TrainConfig()), "<b>"], value)
    (tmp_path / "training_config.json").write_text(json.dumps(record), encoding="utf-8")
    page = run_page.report(RunFolder(tmp_path)).read_text(encoding="utf-8")
    assert "<b>bold" not in page
    assert "No step is told of yet." in page


def test_a_long_runs_page_is_small_and_quickly_made(tmp_path: Path) -> None:
    rng = random.Random(2)
    rows = [
        {"step": step, "loss": rng.random(), "lr": 1e-4, "grad_norm": rng.random(), "images_per_s": 1.0}
        for step in range(10, 100_001, 10)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    for step in range(250, 100_001, 250):
        (tmp_path / "checkpoints" / f"step-{step:06}").mkdir(parents=True)
    started = time.process_time()
    page = render_run(RunFolder(tmp_path))
    assert time.process_time() - started < 5  # 0.3 s of an idle core
    assert len(page) < 120_000


# ---------------------------------------------------------------- --report


def test_the_page_is_made_anew_before_torch_is_loaded(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = killed(finished, tmp_path / "out")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise SystemExit('torch was loaded')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(hidden))
    result = run_script("megaman_lora.py", "--report", str(output))
    assert result.returncode == 0, result.stderr
    assert result.stderr == f"done: open {output / 'index.html'} in a browser\n"
    assert is_page_of_run(output / "index.html")


def refused(path: Path, *more: str) -> UserError:
    """What --report says of a folder."""
    with pytest.raises(UserError) as caught:
        megaman_lora.main(*megaman_lora.read_config(["--report", str(path), *more]))
    return caught.value


def test_what_is_no_run_is_refused_in_one_line(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "training_config.json").write_text('{"mine": 1}')
    for name in ("empty", "file", "named", "missing"):
        error = refused(tmp_path / name)
        assert error.exit_code == 7
        assert "holds no training run of ours" in str(error)
        assert "did you mean" not in str(error)
    assert str(refused(finished / "lora_weights")).endswith(f"did you mean {finished}?")
    assert str(refused(finished / "checkpoints" / "step-000002")).endswith(f"did you mean {finished}?")
    assert sorted(path.name for path in (tmp_path / "named").iterdir()) == ["training_config.json"]


def test_a_users_own_index_stays(finished: Path, tmp_path: Path, train: Callable[..., Path]) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    (output / "index.html").write_text("<h1>mine</h1>")
    error = refused(output)
    assert error.exit_code == 7
    assert "is no page of ours" in str(error)
    with pytest.raises(UserError, match="is no page of ours"):
        train()
    run_page.renew_page(RunFolder(output))
    assert (output / "index.html").read_text() == "<h1>mine</h1>"


def test_a_page_is_asked_for_alone(finished: Path) -> None:
    error = refused(finished, "--max_train_steps", "7")
    assert error.exit_code == 2
    assert "leave --max_train_steps out" in str(error)


def test_a_page_is_made_beside_a_run_that_goes_on(finished: Path, tmp_path: Path) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != "index.html"}
    lock = OutputLock(output).sign()
    before[output / ".lock"] = (output / ".lock").stat().st_mtime_ns
    with pytest.raises(SystemExit) as ended:
        megaman_lora.main(*megaman_lora.read_config(["--report", str(output)]))
    assert ended.value.code == 0
    lock.close()
    after = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != "index.html"}
    assert {path: after[path] for path in before if path.is_file()} == {
        path: stamp for path, stamp in before.items() if path.is_file()
    }
    assert after.keys() == before.keys()


# ---------------------------------------------------------------- a run's folder is no gallery


@pytest.mark.parametrize("further", [[], ["--gallery_only"]], ids=["drawing", "gallery_only"])
@pytest.mark.parametrize("lost", [[], [".lock"], [".lock", "training_config.json"]], ids=" ".join)
def test_a_runs_folder_is_not_taken_for_a_gallery(
    finished: Path, tmp_path: Path, further: list[str], lost: list[str]
) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    for name in lost:
        (output / name).unlink(missing_ok=True)
    page = (output / "index.html").read_bytes()
    drawing = [] if further else [f"--lora_path={finished / 'lora_weights'}"]
    cfg = generate_megaman.read_config([f"--output_dir={output}", *drawing, *further])
    with pytest.raises(UserError, match="holds a training run") as caught:
        generate_megaman.generate(cfg)
    assert caught.value.exit_code == 7
    assert (output / "index.html").read_bytes() == page


def test_the_page_moves_aside_with_its_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    (output / "notes.txt").write_text("mine")
    monkeypatch.chdir(output)  # so that the folder itself stays
    aside = move_aside(output)
    assert aside is not None
    assert is_page(aside / "index.html")
    assert sorted(path.name for path in output.iterdir() if path.name != ".lock") == ["notes.txt"]


def test_rows_of_a_log_are_read_up_to_half_a_line(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b'{"step": 1, "loss": 1}\n\xff\xfe\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    assert [row["step"] for row in read_rows(tmp_path / "m")] == [1, 2]
    assert read_rows(tmp_path / "none") == []


def test_the_page_grows_with_each_checkpoint(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[Any] = []
    whole = run_page.render_run

    def seen(run: RunFolder) -> str:
        pages.append((RunStory.of(run).step, len(RunStory.of(run).checkpoints)))
        return whole(run)

    monkeypatch.setattr(run_page, "render_run", seen)
    train("--validation_steps", "4")
    assert pages == [
        (0, 0),
        (2, 1),
        (4, 2),
        (4, 2),
        (4, 2),
    ]  # samples, checkpoint, checkpoint, samples, the end


def test_the_empty_class_is_seen_among_the_settings(finished: Path, tmp_path: Path) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    record = json.loads((output / "training_config.json").read_text())
    (output / "training_config.json").write_text(json.dumps(record | {"preserve_class": ["robot", ""]}))
    assert 'robot | ""' in text_of(run_page.report(RunFolder(output)).read_text(encoding="utf-8"))
