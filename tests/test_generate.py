"""The generation script: prompts to jobs to pictures, and what a picture is decided by."""

import hashlib
import html
import json
import os
import shlex
import shutil
import signal
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import commands
import numpy as np
import pytest
from commands import exit_code_of
from conftest import ROOT, run_script
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import generate_megaman
from generate_megaman import GenerateConfig, group_into_batches, read_prompts_file, resolve
from megaman.common.console import UserError
from megaman.config.train import EMBEDDED
from megaman.generation.candidates import adapter_name
from megaman.generation.gallery import command, rebuild, render_gallery
from megaman.generation.records import PATHS, Job, file_name, read_records
from megaman.lora.adapter import Adapter
from megaman.lora.load import read_adapter
from megaman.model.decoding import Decoded
from megaman.model.hub import canonical_name, hub_id_of, is_local


@pytest.fixture
def generate(adapter_folder: Path, tiny_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Draws with the tiny adapter in two steps and returns the output folder."""

    def run(**settings: object) -> Path:
        values = {
            "lora_path": str(adapter_folder),
            "output_dir": str(tmp_path / "gen"),
            "num_inference_steps": 2,
        }
        return generate_megaman.generate(GenerateConfig(**{**values, **settings})).parent

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def records(folder: Path) -> list[dict]:
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


# ---------------------------------------------------------------- jobs


SD15 = SimpleNamespace(name="stable-diffusion-v1-5/stable-diffusion-v1-5", native_resolution=512, cell_px=64)
TINY_SD = SimpleNamespace(name=EMBEDDED, native_resolution=64, cell_px=8)


def make_jobs(cfg: GenerateConfig, trigger: str, side_px: int) -> list[Job]:
    """The jobs of a configuration, for an adapter that was trained at side_px."""
    cfg = resolve(cfg, Adapter({}, {"resolution": side_px}), SD15)
    return generate_megaman.make_jobs(cfg, generate_megaman.read_prompts(cfg, trigger))


def test_size_and_guidance_are_the_users_else_the_adapters_else_the_bases() -> None:
    trained = Adapter({}, {"resolution": 64, "guidance_scale": 4.0})
    cfg = resolve(GenerateConfig(height=128), trained, SD15)
    assert (cfg.width, cfg.height, cfg.guidance_scale) == (64, 128, 4.0)
    cfg = resolve(GenerateConfig(guidance_scale=0.0), trained, SD15)
    assert cfg.guidance_scale == 0
    cfg = resolve(GenerateConfig(), Adapter({}), SD15)
    assert (cfg.width, cfg.height, cfg.guidance_scale) == (512, 512, 7.5)
    cfg = resolve(GenerateConfig(), Adapter({}, {"resolution": 500}), SD15)
    assert (cfg.width, cfg.height) == (512, 512)  # the base draws no 500


def test_the_negative_prompt_is_the_users_else_ours_and_none_for_the_embedded_base() -> None:
    assert resolve(GenerateConfig(), Adapter({}), SD15).negative_prompt.startswith("blurry")
    assert resolve(GenerateConfig(), Adapter({}), TINY_SD).negative_prompt == ""
    assert resolve(GenerateConfig(negative_prompt="red"), Adapter({}), TINY_SD).negative_prompt == "red"
    assert resolve(GenerateConfig(negative_prompt=""), Adapter({}), SD15).negative_prompt == ""


@pytest.mark.parametrize(
    ("argv", "base", "is_compared"),
    [
        ([], TINY_SD, True),
        ([], SD15, False),
        (["--compare_base"], SD15, True),
        (["--compare_base", "off"], TINY_SD, False),
        (["--prompts", "a fox"], TINY_SD, False),
        (["--prompts_file", "prompts.txt"], TINY_SD, False),
        (["--lora_scale", "0.5"], TINY_SD, False),
        (["--lora_scale", "0"], TINY_SD, False),
        (["--compare_checkpoints"], TINY_SD, False),
        (["--compare_checkpoints", "--compare_base"], TINY_SD, True),
    ],
)
def test_the_base_is_drawn_beside_where_asked_and_by_itself_in_the_demo(
    argv: list[str], base: SimpleNamespace, is_compared: bool
) -> None:
    assert resolve(generate_megaman.read_config(argv), Adapter({}), base).compare_base is is_compared


def test_prompts_come_from_flags_then_file_else_from_us(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# ours\n\nfrom file\n", encoding="utf-8-sig")
    both = make_jobs(GenerateConfig(prompts=["from flag"], prompts_file=str(path)), "mega man", 64)
    assert [job.prompt for job in both] == ["from flag", "from file"]
    built_in = make_jobs(GenerateConfig(), "mgmn", 64)
    assert len(built_in) == 10
    *of_him, friend = (job.prompt for job in built_in)
    assert all(prompt.startswith("mgmn, ") for prompt in of_him)
    assert friend.startswith("a red wizard")  # who should stay what he was


def test_a_prompts_file_line_may_carry_kohyas_options(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("mega man, 8-bit --n blurry, bad --w 128 --h 192 --d 0 --s 30 --l 7.5\nplain\n")
    first, second = read_prompts_file(path)
    assert (first.text, second.text, second.settings) == ("mega man, 8-bit", "plain", {})
    assert first.settings == {
        "negative_prompt": "blurry, bad",
        "width": 128,
        "height": 192,
        "seed": 0,
        "num_inference_steps": 30,
        "guidance_scale": 7.5,
    }
    (job, _) = make_jobs(GenerateConfig(prompts_file=str(path), seed=5), "mega man", 64)
    assert (job.seed, job.width) == (0, 128)  # 0 is a seed


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a\nb --x 3", "line 2: unknown option --x"),
        ("a --w wide", "line 1: --w 'wide' is not a number"),
        ("a --s -3", "must be at least 1"),
        ("a --w 0", "--w 0 must be at least 1"),
        ("a --n --w 64 --s 0", "--s 0 must be at least 1"),
        ("--w 3", "line 1: options without a prompt"),
        ("# only\n\n", "holds no prompts"),
    ],
)
def test_a_bad_prompts_file_names_the_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint) as error:
        read_prompts_file(path)
    assert error.value.exit_code == 3


def test_seeds_count_up_and_strengths_make_a_strip() -> None:
    jobs = make_jobs(
        GenerateConfig(prompts=["a"], num_images_per_prompt=2, lora_scale=[0.0, 1.0], seed=7), "", 64
    )
    assert [(job.seed, job.lora_scale) for job in jobs] == [(7, 0.0), (7, 1.0), (8, 0.0), (8, 1.0)]


def test_a_batch_shares_size_and_strength_and_fits_the_device() -> None:
    jobs = make_jobs(
        GenerateConfig(prompts=["a", "b"], num_images_per_prompt=20, lora_scale=[1.0, 0.5]), "", 64
    )
    made = list(group_into_batches(jobs, None, "cpu"))
    assert sorted(map(hash, jobs)) == sorted(hash(job) for batch in made for job in batch)
    assert all(len({job.batch_key for job in batch}) == 1 for batch in made)
    assert max(map(len, made)) == 16
    large = make_jobs(GenerateConfig(prompts=["a"], num_images_per_prompt=4), "", 512)
    assert [len(batch) for batch in group_into_batches(large, None, "cpu")] == [1, 1, 1, 1]
    assert [len(batch) for batch in group_into_batches(large, 3, "cpu")] == [3, 1]


@pytest.mark.parametrize(
    "prompt", ["../../etc/passwd", "CON", "a/b\\c", "洛克人", "x" * 5000, "<script>", "\u202egnp"]
)
def test_a_prompt_never_decides_more_than_a_safe_name(prompt: str) -> None:
    job = Job(prompt, "", 1, 64, 64, 2, 7.5, "dpm++", 1.0)
    name = file_name(job, "0123456789abcdef")
    assert Path(name).name == name
    assert len(name) < 80
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")


# ---------------------------------------------------------------- pictures


def test_the_default_run_draws_the_ten_prompts_and_a_gallery(generate: Callable[..., Path]) -> None:
    folder = generate()
    made = records(folder)
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert len(made) == 10
    for record in made:
        with Image.open(folder / record["file"]) as picture:
            assert picture.size == (32, 32)  # the training resolution
            assert picture.text["parameters"].startswith(record["prompt"] + " <lora:")
            assert "\nNegative prompt: blurry" in picture.text["parameters"]
            assert (
                f"\nSteps: 2, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: {record['seed']}"
                in picture.text["parameters"]
            )
            told = json.loads(picture.text["megaman"])
            assert told == {name: value for name, value in record.items() if name not in PATHS}
        assert record["file"] in page
    assert [path.name for path in folder.glob(".*")] == [".lock"]


def test_a_picture_is_decided_by_its_job_and_not_by_its_neighbours(
    generate: Callable[..., Path], tmp_path: Path
) -> None:
    together = generate(prompts=["a", "b", "c"], batch_size=3)
    alone = generate(prompts=["b"], output_dir=str(tmp_path / "alone"))
    again = generate(prompts=["b"], output_dir=str(tmp_path / "again"))
    name = records(alone)[0]["file"]
    assert (alone / name).stat().st_size > 0
    assert np.array_equal(pixels(alone / name), pixels(again / name))
    assert np.abs(pixels(together / name) - pixels(alone / name)).max() <= 1


def test_finished_pictures_are_kept_and_missing_ones_drawn(
    generate: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = generate(prompts=["a", "b"])
    first, second = (folder / record["file"] for record in records(folder))
    second.unlink()
    before = first.stat().st_mtime_ns
    generate(prompts=["a", "b"])
    assert "1 to draw, 1 already there" in capsys.readouterr().err
    assert second.exists()
    assert first.stat().st_mtime_ns == before


def test_an_interrupted_run_keeps_its_batches(
    generate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = generate_megaman.render, iter(range(9))

    def dying(*args: object) -> list[Decoded]:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(generate_megaman, "render", dying)
    with pytest.raises(KeyboardInterrupt):
        generate(prompts=["a", "b", "c", "d"], batch_size=1)
    folder = generate(prompts=["a", "b", "c", "d"], batch_size=1)
    assert len(records(folder)) == 4
    assert next(calls) == 5  # two, the death, and the two that were missing


def test_earlier_pictures_stay_in_the_gallery_behind_the_new(generate: Callable[..., Path]) -> None:
    generate(prompts=["old"])
    folder = generate(prompts=["new"])
    assert [record["prompt"] for record in records(folder)] == ["new", "old"]


def test_a_damaged_metadata_line_does_not_stop_the_run(
    generate: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = generate(prompts=["a", "b"])
    path = folder / "metadata.jsonl"
    path.write_bytes(path.read_bytes()[:-40] + b'\xff\n{"file": 5}\n[1]\n')
    generate(prompts=["a", "b"])
    shown = capsys.readouterr().err
    assert all(f"line {number} is damaged" in shown for number in (2, 3, 4))
    assert [record["prompt"] for record in records(folder)] == ["a", "b"]


@pytest.fixture(scope="module")
def plain_drawing(adapter_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The pixels of one prompt in four steps, without further settings."""
    folder = tmp_path_factory.mktemp("plain")
    cfg = GenerateConfig(
        lora_path=str(adapter_folder), output_dir=str(folder), prompts=["a"], num_inference_steps=4
    )
    generate_megaman.generate(cfg)
    return pixels(folder / records(folder)[0]["file"])


@pytest.mark.parametrize(
    "setting",
    [
        {"seed": 0},
        {"guidance_scale": 2.0},
        {"num_inference_steps": 3},
        {"negative_prompt": "helmet"},
        {"scheduler": "euler"},
        {"scheduler": "euler_a"},
        {"scheduler": "ddim"},
        {"scheduler": "unipc"},
        {"lora_scale": [0.0]},
        {"lora_scale": [0.5]},
        {"height": 48},
        {"width": 48},
        {"mixed_precision": "bf16"},
    ],
    ids=str,
)
def test_every_setting_changes_the_picture(
    generate: Callable[..., Path], plain_drawing: np.ndarray, setting: dict[str, object]
) -> None:
    folder = generate(**{"prompts": ["a"], "num_inference_steps": 4, **setting})
    changed = pixels(folder / records(folder)[0]["file"])
    assert plain_drawing.shape != changed.shape or not np.array_equal(plain_drawing, changed)


@pytest.mark.parametrize(("width", "height"), [(34, 38), (2, 46), (50, 32), (32, 48)])
def test_every_multiple_of_the_stride_is_drawn(
    generate: Callable[..., Path], tmp_path: Path, width: int, height: int
) -> None:
    size = {"width": width, "height": height}
    together = generate(prompts=["a", "b", "c"], batch_size=3, **size)
    alone, again = (generate(prompts=["b"], output_dir=str(tmp_path / name), **size) for name in ("1", "2"))
    name = records(alone)[0]["file"]
    with Image.open(alone / name) as picture:
        assert picture.size == (width, height)
    assert (alone / name).stat().st_size > 100
    assert np.array_equal(pixels(alone / name), pixels(again / name))
    assert np.abs(pixels(together / name) - pixels(alone / name)).max() <= 1


def test_a_picture_is_drawn_as_by_diffusers_pipeline_itself(tiny_base: object, tiny_folder: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    from megaman.model.drawing import SAMPLERS, draw, pipeline_of, words

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "width": 48, "height": 32}
    texts = words(tiny_base, ["a", "b"], ["", "c"])
    for sampler, scheduler in SAMPLERS.items():
        pipeline.scheduler = scheduler.from_config(tiny_base.scheduler.config)
        seeded = [[torch.Generator().manual_seed(i) for i in range(2)] for _ in range(2)]
        theirs = pipeline(["a", "b"], negative_prompt=["", "c"], generator=seeded[0], **settings).images
        ours = draw(tiny_base, pipeline_of(tiny_base, sampler), generators=seeded[1], **texts, **settings)
        for mine, other in zip(ours, theirs, strict=True):
            difference = np.asarray(mine).astype(int) - np.asarray(other)
            assert np.abs(difference).max() <= 1, sampler  # latents are decoded one at a time


@pytest.mark.parametrize(
    ("size", "nearest"), [((601, 800), "600 x 800"), ((3, 1), "8 x 8"), ((720, 1283), "720 x 1280")]
)
def test_a_size_that_can_t_be_drawn_is_told_the_nearest_that_can(
    tiny_base: object, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], nearest: str
) -> None:
    monkeypatch.setattr(type(tiny_base), "stride", 8)  # Stable Diffusion 1.5's
    jobs = [Job("a", "", 1, *size, 2, 7.5, "dpm++", 1.0)]
    with pytest.raises(UserError, match=f"^{size[0]} x {size[1]}: .* {nearest} is the nearest$") as error:
        generate_megaman.check_jobs(jobs, tiny_base)
    assert error.value.exit_code == 2
    width, height = map(int, nearest.split(" x "))
    generate_megaman.check_jobs([Job("a", "", 1, width, height, 2, 7.5, "dpm++", 1.0)], tiny_base)


def test_strength_zero_is_the_base_alone(generate: Callable[..., Path], tiny_base: object) -> None:
    import torch

    from megaman.model.drawing import draw, pipeline_of, words

    folder = generate(prompts=["a"], lora_scale=[1.0, 0.0])
    (record,) = [record for record in records(folder) if record["lora_scale"] == 0]
    settings = {"num_inference_steps": 2, "guidance_scale": 7.5}
    texts = words(tiny_base, ["a"], [record["negative_prompt"]])
    generators = [torch.Generator().manual_seed(record["seed"])]
    (plain,) = draw(
        tiny_base, pipeline_of(tiny_base), generators=generators, height=32, width=32, **texts, **settings
    )
    assert np.array_equal(np.asarray(plain), pixels(folder / record["file"]))


@pytest.mark.parametrize("drawn_before", [False, True])
def test_no_metadata_leaves_none_in_new_and_in_kept_pictures(
    generate: Callable[..., Path], drawn_before: bool
) -> None:
    if drawn_before:
        folder = generate(prompts=["a"])
        before = pixels(folder / records(folder)[0]["file"])
    folder = generate(prompts=["a"], no_metadata=True)
    if drawn_before:
        assert np.array_equal(pixels(folder / records(folder)[0]["file"]), before)
    with Image.open(folder / records(folder)[0]["file"]) as picture:
        assert picture.text == {}


def test_a_long_prompt_is_said_to_be_cut(
    generate: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    generate(prompts=["robot " * 90])
    assert "is cut" not in capsys.readouterr().err
    generate(prompts=["robot " * 90], max_tokens=75)
    assert "a prompt of 90 tokens is cut after 75" in capsys.readouterr().err
    generate(prompts=["robot " * 300])
    assert "a prompt of 300 tokens is cut after 225" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--lora_path", "nowhere"], 4, "--preset demo"),
        (["--lora_path", "WEIGHTS", "--base_model", "megaman/tiny_sd"], 4, "made for another base"),
        (["--lora_path", "WEIGHTS", "--base_model", "./nowhere"], 4, "folder or file. Check --base_model.\n"),
        (
            ["--lora_path", "WEIGHTS", "--width", "33"],
            2,
            "multiples of 2; 32 x 32 is the nearest",
        ),
        (["--lora_path", "WEIGHTS", "--prompts_file", "nowhere.txt"], 3, "can't be read"),
        (["--num_images_per_prompt", "0"], 2, "must be at least 1"),
        (["--seed", "99999999999999999999"], 2, "must be 0 or more and below 2^63"),
        (
            ["--lora_path", "WEIGHTS", "--num_inference_steps", "1001", "--scheduler", "ddim"],
            2,
            "at most 500",
        ),
        (["--lora_path", "WEIGHTS", "--device", "gpu"], 2, "--device gpu: not here"),
        (["--prompts", "mega\udcff"], 2, "type it as UTF-8"),
        (["--lora_path", "WEIGHTS", "--prompts_file", "tests"], 3, "can't be read"),
        (["--lora_path", "WEIGHTS", "--device", "cuda"], 2, "not here; this torch"),
    ],
)
def test_a_mistake_is_one_line_with_its_code(
    adapter_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    complaint: str,
) -> None:
    arguments = [argument.replace("WEIGHTS", str(adapter_folder)) for argument in arguments]
    command = ["generate_megaman.py", "--output_dir", str(tmp_path / "gen"), *arguments]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as left:
        commands.run(commands.drawing)
    told = capsys.readouterr().err
    assert left.value.code == code, told
    assert complaint in told
    assert len([line for line in told.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in told
    assert not list(tmp_path.glob("gen/*.png"))


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--lora_path", "nowhere"], 4, "--preset demo"),  # told when torch is loaded
        (["--seed", "99999999999999999999"], 2, "must be 0 or more and below 2^63"),  # and before
    ],
)
def test_the_script_itself_ends_a_mistake_with_one_line_and_its_code(
    tmp_path: Path, arguments: list[str], code: int, complaint: str
) -> None:
    result = run_script("generate_megaman.py", "--output_dir", str(tmp_path / "gen"), *arguments)
    assert result.returncode == code, result.stderr
    assert complaint in result.stderr
    assert (result.stderr.startswith("error: "), result.stderr.count("\n")) == (True, 1), result.stderr


def test_prompts_with_unusual_line_ends_are_kept_with_their_pictures(generate: Callable[..., Path]) -> None:
    prompts = ["a\u2028b", "c\u0085d", "洛克人 \u202e", "<b>&"]
    generate(prompts=prompts)
    assert [record["prompt"] for record in records(generate(prompts=prompts))] == prompts


def test_a_checkpoint_draws_like_any_adapter(generate: Callable[..., Path], adapter_folder: Path) -> None:
    (step,) = (adapter_folder.parent / "checkpoints").iterdir()
    for path in (step, step / "adapter.safetensors"):
        assert (
            len(records(generate(prompts=["a"], lora_path=str(path)))) == 1
        )  # the same weights: one picture


def test_a_picture_names_its_lora_as_the_web_uis_know_it(
    generate: Callable[..., Path], adapter_folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    base = str(tiny_folder)

    def told_of(lora: Path) -> str:
        output = tmp_path / f"of {lora.stem}"
        folder = generate(lora_path=str(lora), base_model=base, prompts=["a"], output_dir=str(output))
        with Image.open(folder / records(folder)[0]["file"]) as picture:
            return picture.text["parameters"]

    def known_as(file: Path) -> str:  # as A1111 and Civitai reckon it: AutoV3
        content = file.read_bytes()
        return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()[:12]

    kohya = adapter_folder / "megaman_lora.safetensors"
    with safe_open(kohya, framework="pt") as file:
        assert file.metadata()["sshs_model_hash"].startswith(known_as(kohya))
    assert "a <lora:megaman_lora:1>\n" in told_of(adapter_folder)
    assert f', Lora hashes: "megaman_lora: {known_as(kohya)}"' in told_of(adapter_folder)
    renamed = Path(shutil.copy(kohya, tmp_path / "mega man, v2.0.safetensors"))
    assert "a <lora:mega man_ v2.0:1>\n" in told_of(renamed)  # a comma would end the name
    peft = Path(shutil.copytree(adapter_folder, tmp_path / "peft", ignore=shutil.ignore_patterns("*lora*")))
    assert told_of(peft).startswith("a\nNegative prompt:")  # no web UI reads PEFT's files


def test_a_copied_command_draws_with_the_very_adapter_and_base_or_not_at_all(
    generate: Callable[..., Path],
    adapter_folder: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lora = Path(shutil.copytree(adapter_folder, tmp_path / "other run" / "lora_weights"))
    base = Path(shutil.copytree(tiny_folder, tmp_path / "bases" / "my base"))
    monkeypatch.chdir(tmp_path)
    folder = generate(lora_path=str(lora), base_model=str(base), prompts=["a"])
    (record,) = read_records(folder)
    assert (record.adapter_path, record.base_path) == ("../other run/lora_weights", "../bases/my base")
    script, *flags = shlex.split(command(record, folder))[1:]
    assert "--lora_path=other run/lora_weights" in flags
    assert "--base_model=bases/my base" in flags
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert json.dumps(command(record, folder)) in html.unescape(page)
    flags.append("--output_dir=again")
    assert exit_code_of(commands.drawing, [script, *flags], monkeypatch) == 0
    again = tmp_path / "again" / record.file
    assert (pixels(again) == pixels(folder / record.file)).all()

    weights = load_file(lora / "adapter_model.safetensors")
    save_file({key: tensor * 1.5 for key, tensor in weights.items()}, lora / "adapter_model.safetensors")
    again.unlink()
    assert exit_code_of(commands.drawing, [script, *flags], monkeypatch) == 4
    assert f"not {record.adapter_hash}" in capsys.readouterr().err
    assert not again.exists()


def test_a_folder_whose_list_is_blank_is_no_gallery(generate: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text("\n\n")
    (folder / "thesis.doc").write_text("mine")
    with pytest.raises(UserError, match="holds files that no run of ours made"):
        generate(prompts=["a"], output_dir=str(folder))


@pytest.mark.parametrize("kind", ["text", "folder", "link"])
def test_what_lies_in_a_pictures_place_and_is_none_is_left_alone(
    generate: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    folder = generate(prompts=["a"])
    (record,) = records(folder)
    place = folder / record["file"]
    (folder / "metadata.jsonl").write_text("")
    place.rename(tmp_path / "mine.png")
    if kind == "text":
        place.write_text("mine")
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(tmp_path / "mine.png")
    with pytest.raises(UserError, match="is no picture of ours") as error:
        generate(prompts=["a"])
    assert error.value.exit_code == 7
    assert kind != "text" or place.read_text() == "mine"
    assert kind != "link" or place.is_symlink()


def test_links_to_the_lists_are_followed_and_what_the_user_added_stays(
    generate: Callable[..., Path], tmp_path: Path
) -> None:
    folder = generate(prompts=["a"])
    for name in ("metadata.jsonl", "index.html"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    (record,) = records(folder)
    rated = json.dumps(record | {"rating": 5})
    (tmp_path / "metadata.jsonl").write_text(f"\ufeff{rated}\n", encoding="utf-8")  # as Notepad saves it
    generate(prompts=["b"])
    assert (folder / "metadata.jsonl").is_symlink()
    assert (folder / "index.html").is_symlink()
    by_prompt = {each["prompt"]: each for each in records(folder)}
    assert by_prompt["a"] == record | {"rating": 5}
    assert "rating" not in by_prompt["b"]
    assert b"rating" not in (folder / record["file"]).read_bytes()


def test_a_picture_tells_no_path(generate: Callable[..., Path], tmp_path: Path) -> None:
    folder = generate(prompts=["a"])
    (record,) = records(folder)
    assert record["adapter_path"].startswith("../")
    assert b"adapter_path" not in (folder / record["file"]).read_bytes()
    assert str(tmp_path).encode() not in (folder / record["file"]).read_bytes()
    (folder / "metadata.jsonl").unlink()
    rebuild(folder)
    forged = folder / record["file"]  # somebody else's picture may name any place
    with Image.open(forged) as image:
        texts = json.loads(image.text["megaman"]) | {"adapter_path": "//evil.example/share"}
        info = PngInfo()
        info.add_text("megaman", json.dumps(texts))
        image.load()
    image.save(forged, pnginfo=info)
    rebuild(folder)
    (found,) = read_records(folder)
    assert (found.adapter_path, found.adapter_hash) == ("", record["adapter_hash"])
    assert f"--adapter_hash={found.adapter_hash}" in command(found, folder)


@pytest.mark.parametrize("text", ["0", "xyz", "0123456789abc", "0x123456"])
def test_a_hash_that_can_be_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(UserError, match="hexadecimal") as error:
        generate_megaman.read_config(["--adapter_hash", text])
    assert error.value.exit_code == 2


def test_a_local_base_that_was_moved_is_asked_for(adapter_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter_folder, tmp_path / "run" / "lora_weights")
    adapter = read_adapter(tmp_path / "run" / "lora_weights")
    with pytest.raises(UserError, match="name it with --base_model"):
        generate_megaman.base_of(adapter, tmp_path / "run" / "lora_weights", None)


# ---------------------------------------------------------------- comparisons


@pytest.fixture(scope="session")
def run_folder(adapter_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two checkpoints, 3 and 5; the last holds the adapter's own weights, the first other ones."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("runs") / "out"
    shutil.copytree(adapter_folder.parent, root)
    (last,) = (root / "checkpoints").iterdir()
    first = root / "checkpoints" / "step-000003"
    first.mkdir()
    with safe_open(last / "adapter.safetensors", "pt") as file:
        weaker = {key: file.get_tensor(key) / (2 if ".lora_up" in key else 1) for key in file.keys()}  # noqa: SIM118
        save_file(weaker, first / "adapter.safetensors", file.metadata())
    (root / "checkpoints" / "step-000004").mkdir()  # its adapter is gone
    (root / "checkpoints.001" / "step-000009").mkdir(parents=True)  # of another way that the run went
    shutil.copy(first / "adapter.safetensors", root / "checkpoints.001" / "step-000009")
    return root


def drawn_with(folder: Path) -> list[tuple[str, float]]:
    """Adapter and strength of every picture."""
    return [(record["adapter"], record["lora_scale"]) for record in records(folder)]


def test_a_job_keeps_its_name_from_version_to_version() -> None:
    job = Job("mega man, running", "blurry", 7, 64, 96, 25, 7.5, "dpm++", 0.5)
    digest = generate_megaman.job_hash(job, "0123456789ab", "ba9876543210", "float32")
    assert digest == "65001f2630a920fb"  # as commit 4efd3cd made it; finished pictures are found by it
    assert file_name(job, digest) == "mega-man-running-7-65001f2630a9.png"


def test_the_base_is_drawn_beside_every_picture_and_found_again(
    generate: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"prompts": ["a", "b"], "num_images_per_prompt": 2}
    folder = generate(**settings)
    before = {record["file"]: (folder / record["file"]).stat().st_mtime_ns for record in records(folder)}
    generate(**settings, compare_base=True)
    assert "4 to draw, 4 already there" in capsys.readouterr().err
    assert [(record["prompt"], record["seed"], record["lora_scale"]) for record in records(folder)] == [
        (prompt, seed, scale) for prompt in "ab" for seed in (42, 43) for scale in (0.0, 1.0)
    ]
    assert before == {name: (folder / name).stat().st_mtime_ns for name in before}
    generate(**settings, lora_scale=[0.0, 1.0])  # the same jobs in other words
    assert "0 to draw, 8 already there" in capsys.readouterr().err


def test_checkpoints_and_strengths_make_a_grid_with_one_base(
    generate: Callable[..., Path], run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"prompts": ["a"], "lora_path": str(run_folder / "lora_weights"), "lora_scale": [0.5, 1.0]}
    folder = generate(**settings, compare_base=True, compare_checkpoints=True)
    grid = [(name, scale) for scale in (0.5, 1.0) for name in ("step-000003", "megaman_lora")]
    assert drawn_with(folder) == [("megaman_lora", 0.0), *grid]
    assert len({(folder / record["file"]).read_bytes() for record in records(folder)}) == 5
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.count('<th scope="row">') == 2
    capsys.readouterr()
    for path, name in ((run_folder / "lora_weights", "megaman_lora"),
                       (run_folder / "checkpoints" / "step-000003", "step-000003")):  # fmt: skip
        alone = generate(**settings | {"lora_path": str(path), "output_dir": str(tmp_path / name)})
        for record in records(alone):  # each as if it had been drawn alone, after no other adapter
            assert np.abs(pixels(folder / record["file"]) - pixels(alone / record["file"])).max() <= 1
            assert record["adapter"] == name
    generate(**settings, compare_checkpoints=True)
    assert "0 to draw, 4 already there" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["checkpoints/step-000003", "checkpoints/step-000005/adapter.safetensors"])
def test_the_checkpoints_of_a_checkpoint_s_own_run_are_drawn(run_folder: Path, place: str) -> None:
    from megaman.generation.candidates import candidates_of

    found = candidates_of(str(run_folder / place), run_folder / place, with_checkpoints=True)
    chosen = Path(place).parts[1]
    assert [(source.name, source.is_chosen) for source in found] == [
        (name, name == chosen) for name in ("step-000003", "step-000005")
    ]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("https://huggingface.co/owner/model", "owner/model"),
        ("https://huggingface.co/owner/model/tree/main", "owner/model"),
        ("http://www.hf.co/owner/my.model-v1.git?library=diffusers#files", "owner/my.model-v1"),
        ("huggingface.co/owner/model", "owner/model"),
        ("owner/model", "owner/model"),
        (
            "https://huggingface.co/runwayml/stable-diffusion-v1-5",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
    ],
)
def test_the_address_of_a_models_page_is_its_id(name: str, meant: str) -> None:
    assert hub_id_of(name) == canonical_name(name) == adapter_name(name) == meant


def test_a_name_that_can_be_no_hub_id_is_a_path() -> None:
    assert [is_local(name) for name in ("run B é/lora_weights", "a\\b", "owner/model", "gpt2")] == [
        *(True, True, False, False),
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("https://civitai.com/models/4384/dreamshaper", "another site"),
        ("https://huggingface.co/o/m/resolve/main/x.safetensors", "a single file; download it"),
        ("https://huggingface.co/o/m/blob/main/x.safetensors", "a single file; download it"),
        ("https://huggingface.co/datasets/o/m", "the hub's datasets, not of a model"),
    ],
)
def test_other_addresses_are_refused_by_what_they_are(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        hub_id_of(name)
    assert error.value.exit_code == 4


def test_a_hub_s_adapter_is_named_by_its_id_and_a_file_by_no_path() -> None:
    from megaman.generation.candidates import adapter_name

    assert adapter_name("owner/model-1.5") == "owner/model-1.5"
    assert adapter_name("/home/somebody/out/lora_weights") == "megaman_lora"
    assert adapter_name("~/loras/hero.safetensors") == "hero"
    assert adapter_name("./out/checkpoints/step-000250/adapter.safetensors") == "step-000250"


def test_no_checkpoints_is_said_before_anything_is_drawn(
    generate: Callable[..., Path], adapter_folder: Path, tmp_path: Path
) -> None:
    lonely = tmp_path / "loras" / "lora_weights"
    shutil.copytree(adapter_folder, lonely)
    with pytest.raises(
        UserError, match=r"no checkpoints beside it .* leave --compare_checkpoints out"
    ) as error:
        generate(lora_path=str(lonely), compare_checkpoints=True)
    assert error.value.exit_code == 7
    assert not (tmp_path / "gen").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--compare_base", "--lora_scale", "0"], "--compare_base: --lora_scale 0 draws the base alone"),
        (["--compare_checkpoints", "--lora_scale", "0", "0"], "give a strength to compare"),
        (["--gallery_only", "--compare_base"], "--gallery_only draws nothing: leave --compare_base out"),
        (
            ["--gallery-only", "--prompts=a", "--seed", "42", "--output-dir", "x"],
            "leave --prompts, --seed out",
        ),
        (["--no_metadata", "--gallery_only"], "leave --no_metadata out"),
    ],
)
def test_flags_that_contradict_one_another_are_refused(arguments: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        generate_megaman.read_config(arguments)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the gallery alone


def picture(folder: Path, name: str = "a-1.png", **changes: object) -> dict:
    """Saves a picture with its record in the PNG, and no metadata.jsonl."""
    from megaman.generation.records import ImageRecord, save_picture

    facts = {
        "prompt": name,
        "negative_prompt": "",
        "seed": 1,
        "width": 8,
        "height": 8,
        "num_inference_steps": 2,
    }
    facts |= {"guidance_scale": 7.5, "scheduler": "dpm++", "lora_scale": 1.0, "file": name, "adapter": "a"}
    facts |= {
        "adapter_hash": "0" * 12,
        "base_model": "b",
        "trigger": "t",
        "precision": "float32",
        "job": name,
    }
    facts |= {"created": "2026-01-01T00:00:00+00:00", "seconds": 0.1, "versions": {}}
    facts |= {"lora_file": "", "lora_hash": "", "adapter_path": "", "base_path": ""}
    save_picture(Image.new("RGB", (8, 8), "navy"), ImageRecord(**facts | changes), folder, described=True)
    return facts | changes


def gallery_only(folder: Path) -> str:
    """Rebuilds a folder's gallery and returns the page."""
    page = generate_megaman.generate(GenerateConfig(gallery_only=True, output_dir=str(folder)))
    return page.read_text(encoding="utf-8")


def test_the_gallery_is_made_anew_of_metadata_and_of_what_pictures_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = picture(tmp_path, "z-1.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(listed) + "\n")
    later = picture(tmp_path, "b-1.png", created="2026-01-03T00:00:00+00:00")
    early = picture(tmp_path, "c-1.png", created="2026-01-02T00:00:00+00:00")
    picture(tmp_path, "renamed.png", job="z-1.png")  # a copy of the first
    Image.new("RGB", (8, 8)).save(tmp_path / "holiday.png")
    page = gallery_only(tmp_path)
    assert records(tmp_path) == [listed, later, early]
    assert [page.count(f'href="{name}-1.png"') for name in "zcb"] == [1, 1, 1]
    assert "holiday" not in page
    assert capsys.readouterr().err.startswith("note: holiday.png: no settings of ours in it")
    before = (tmp_path / "index.html").read_bytes()
    gallery_only(tmp_path)
    assert (tmp_path / "index.html").read_bytes() == before


def test_a_renamed_picture_is_shown_under_its_new_name(tmp_path: Path) -> None:
    picture(tmp_path, "old-1.png")
    (tmp_path / "old-1.png").rename(tmp_path / "new-1.png")
    gallery_only(tmp_path)
    assert [record["file"] for record in records(tmp_path)] == ["new-1.png"]


def with_an_animation_of_nothing(png: bytes) -> bytes:
    """The PNG with a chunk about which Pillow only warns."""
    body = b"acTL" + struct.pack(">II", 0, 0)
    return png[:33] + struct.pack(">I", 8) + body + struct.pack(">I", zlib.crc32(body)) + png[33:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(path.read_bytes()[:60]),
        lambda path: path.rename(path.with_name("not ours (1).png")),
        lambda path: path.write_bytes(with_an_animation_of_nothing(path.read_bytes())),
        lambda path: picture(path.parent, path.name, lora_scale=float("nan")),
        lambda path: picture(path.parent, path.name, guidance_scale=10**400),
        lambda path: picture(path.parent, path.name, seed="1"),
    ],
    ids=["end", "half", "name", "animation", "nan", "huge", "text"],
)
def test_a_damaged_or_forged_picture_stays_out_and_harms_nothing(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    picture(tmp_path, "good-1.png")
    picture(tmp_path, "bad-1.png")
    damage(tmp_path / "bad-1.png")
    page = gallery_only(tmp_path)
    assert [record["file"] for record in records(tmp_path)] == ["good-1.png"]
    assert page.count('<a class="card"') == 1


def test_no_gallery_is_put_into_a_folder_that_never_held_one(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "holiday.png")
    (tmp_path / "index.html").write_text("mine")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no pictures of ours") as error:
            gallery_only(folder)
        assert error.value.exit_code == 7
    assert {path.name: path.read_bytes()[:4] for path in tmp_path.iterdir()} == {
        "holiday.png": b"\x89PNG",
        "index.html": b"mine",
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metadata.jsonl").write_text("")  # one of ours, whose pictures are gone
    (tmp_path / "empty" / "index.html").write_text(render_gallery([]), encoding="utf-8")
    assert "No pictures yet." in gallery_only(tmp_path / "empty")


def test_the_gallery_alone_needs_no_torch(tmp_path: Path) -> None:
    picture(tmp_path)
    code = (
        "import sys, runpy; sys.argv = ['x', '--gallery_only', '--output_dir', sys.argv[1]]\n"
        "try: runpy.run_path('generate_megaman.py', run_name='__main__')\n"
        "finally: print(sorted({'torch', 'diffusers', 'peft'} & sys.modules.keys()))"
    )
    result = run_script("-c", code, str(tmp_path))
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr
    assert result.stderr == f"pictures: 1\ndone: open {tmp_path / 'index.html'} in a browser\n"


# ---------------------------------------------------------------- what may go wrong while it draws


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[list[Job]], object]) -> list[int]:
    """Makes `render` do what `fails` wants first; the sizes of the batches that are tried."""
    honest, tried = generate_megaman.render, []

    def render(batch: list[Job], *rest: object) -> list[Decoded]:
        tried.append(len(batch))
        spoilt = fails(batch)
        return [
            replace(each, is_whole=each.is_whole & (job.prompt != spoilt))
            for job, each in zip(batch, honest(batch, *rest), strict=True)
        ]

    monkeypatch.setattr(generate_megaman, "render", render)
    return tried


def test_a_prompt_that_overflows_is_named_and_does_not_stop_the_others(
    generate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing(monkeypatch, lambda batch: "bad")
    with pytest.raises(UserError, match=r"^1 not drawn: 'bad' \(seed 42\): .*--lora_scale") as error:
        generate(prompts=["a", "bad", "c"])
    assert error.value.exit_code == 5
    assert [record["prompt"] for record in records(tmp_path / "gen")] == ["a", "c"]


def test_an_overflow_spoils_no_neighbour(tiny_base: object) -> None:
    from megaman.model.drawing import as_settings, draw_or_none, pipeline_of

    noise = [generate_megaman.torch.Generator().manual_seed(i) for i in range(3)]
    base, text = tiny_base, tiny_base.embed(["a", "b", "c"])
    spoilt = replace(text, states=text.states.clone())
    spoilt.states[1, 3] = float("inf")
    pictures = [
        draw_or_none(
            base, pipeline_of(base), **as_settings(words, text), height=32, width=32,
            num_inference_steps=2, generators=[generator.clone_state() for generator in noise],
        )
        for words in (text, spoilt)
    ]  # fmt: skip
    assert pictures[1][1] is None
    assert all(np.array_equal(np.asarray(pictures[0][i]), np.asarray(pictures[1][i])) for i in (0, 2))


def test_fewer_are_drawn_at_a_time_when_memory_runs_out(
    generate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(batch: list[Job]) -> None:
        if len(batch) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    tried = failing(monkeypatch, fails)
    folder = generate(prompts=list("abcdef"), batch_size=4)
    assert tried == [4, 2, 1, 1, 1, 1, 1, 1]  # and the second batch does not try again what was too much
    assert [record["prompt"] for record in records(folder)] == list("abcdef")
    assert "memory ran out with 4 pictures at a time: 2 now" in capsys.readouterr().err


def test_no_memory_for_one_picture_ends_the_run_and_keeps_the_others(
    generate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(batch: list[Job]) -> None:
        if any(job.prompt == "large" for job in batch):
            raise MemoryError

    failing(monkeypatch, fails)
    with pytest.raises(UserError, match="out of memory with one picture") as error:
        generate(prompts=["a", "b", "large"], batch_size=1)
    assert error.value.exit_code == 6
    assert [record["prompt"] for record in records(tmp_path / "gen")] == ["a", "b"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_one_line_and_keeps_what_is_drawn(
    generate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, code: int
) -> None:
    from megaman.common import console

    failing(monkeypatch, lambda batch: batch[0].prompt == "c" and os.kill(os.getpid(), number))
    said = []
    monkeypatch.setattr(console, "say", said.append)
    with pytest.raises(SystemExit) as left:
        commands.run(lambda: generate(prompts=["a", "b", "c", "d"], batch_size=1))
    assert left.value.code == code
    assert said == ["stopped; finished files are kept"]
    assert [record["prompt"] for record in records(tmp_path / "gen")] == ["a", "b"]
    page = (tmp_path / "gen" / "index.html").read_text(encoding="utf-8")
    assert page.count('<a class="card"') == 2
    assert page.endswith("</html>")
    assert {path.suffix for path in (tmp_path / "gen").iterdir() if path.name != ".lock"} == {
        ".png",
        ".html",
        ".jsonl",
    }


def test_a_folder_in_use_is_left_alone(generate: Callable[..., Path], tmp_path: Path) -> None:
    from megaman.common.output_folder import OutputLock

    lock = OutputLock(tmp_path / "gen").sign()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}") as error:
        generate(prompts=["a"])
    assert error.value.exit_code == 7
    lock.close()
    assert len(records(generate(prompts=["a"]))) == 1


def test_a_link_in_the_lock_s_place_is_not_written_through(
    generate: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "gen").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "gen" / ".lock").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(UserError, match="is a link"):
        generate(prompts=["a"])
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", [b"", b"\x89PNG\r\n\x1a\n", None])
def test_a_damaged_picture_is_drawn_again(generate: Callable[..., Path], damage: bytes | None) -> None:
    folder = generate(prompts=["a"])
    path = folder / records(folder)[0]["file"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] if damage is None else damage)
    generate(prompts=["a"])
    with Image.open(path) as picture:
        picture.load()


@pytest.mark.parametrize(
    "change",
    [{"file": "../mine.png"}, {"file": "/etc/a.png"}, {"file": "a\\b.png"}, {"width": "x"}, {"seed": None},
     {"scheduler": "x"}, {"prompt": "\ud800"}, {"versions": []}, {"extra": 1}],
    ids=str,
)  # fmt: skip
def test_a_forged_record_leads_nowhere(
    generate: Callable[..., Path], tmp_path: Path, change: dict[str, object]
) -> None:
    folder = generate(prompts=["a", "b"])
    honest = records(folder)
    (tmp_path / "mine.png").write_bytes((folder / honest[0]["file"]).read_bytes())
    before = (tmp_path / "mine.png").read_bytes()
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in [honest[0] | change, honest[1]])
    )
    generate(prompts=["a", "b"], no_metadata=True)
    assert records(folder)[1] == honest[1]
    assert (tmp_path / "mine.png").read_bytes() == before
