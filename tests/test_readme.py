"""README says what the code does, in both languages: its commands parse, its tables are the flags."""

import re
import shlex
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from conftest import ROOT

import generate_megaman
import megaman_lora

README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-TW.md"))
CONFIGS = {
    "megaman_lora.py": megaman_lora.TrainConfig,
    "generate_megaman.py": generate_megaman.GenerateConfig,
}
USERS_COMMANDS = """
python megaman_lora.py
python megaman_lora.py --data_dir ./megaman_images --output_dir ./megaman_lora_output --max_train_steps 1000
python megaman_lora.py --data_dir ./megaman_images --output_dir ./megaman_lora_output --resolution 512 --train_batch_size 1 --gradient_accumulation_steps 4 --learning_rate 1e-4 --lora_rank 8 --lora_alpha 32 --max_train_steps 1500 --save_steps 250 --validation_steps 100 --mixed_precision fp16
python megaman_lora.py --lora_rank 4 --lora_alpha 16 --learning_rate 1e-4 --max_train_steps 1000
python megaman_lora.py --lora_rank 8 --lora_alpha 32 --learning_rate 5e-5 --max_train_steps 2000
python megaman_lora.py --lora_rank 16 --lora_alpha 64 --learning_rate 2e-5 --max_train_steps 3000
python megaman_lora.py --train_batch_size 1 --gradient_accumulation_steps 8 --mixed_precision fp16 --resolution 512
python megaman_lora.py --train_batch_size 2 --validation_steps 200 --gradient_checkpointing --pretrained_model_name runwayml/stable-diffusion-v1-5
python generate_megaman.py --lora_path ./megaman_lora_output/lora_weights --output_dir ./generated_megaman
python generate_megaman.py --prompts_file prompts.txt
python generate_megaman.py --num_images_per_prompt 4 --num_inference_steps 50 --guidance_scale 10.0
python generate_megaman.py --height 768 --width 768 --num_inference_steps 50
python generate_megaman.py --negative_prompt blurry --seed 7
"""  # noqa: E501


def commands(text: str) -> list[list[str]]:
    """Every call of our scripts in a text, as words; pipes of commands are cut at &&."""
    joined = text.replace("\\\n", " ")
    calls = [part for line in joined.splitlines() for part in line.split("&&")]
    words = [shlex.split(call, comments=True) for call in calls if re.match(r"\s*python \w+\.py", call)]
    return [call[1:] for call in words if call[0] == "python" and call[1] in CONFIGS]


@pytest.mark.parametrize("call", commands(README) + commands(USERS_COMMANDS), ids=" ".join)
def test_every_command_parses(call: list[str]) -> None:
    script, *arguments = call
    if script == "megaman_lora.py":
        cfg, _ = megaman_lora.read_config(arguments)
        assert cfg.max_train_steps > 0
    else:
        assert generate_megaman.read_config(arguments)


def test_both_languages_tell_the_same_commands_and_measurements() -> None:
    assert commands(CHINESE) == commands(README)
    rows, translated = (
        [re.findall(r"[-+]?\d[\d.]*", line) for line in text.splitlines() if re.match(runs, line)]
        for text, runs in ((README, r"\| (demo|control|XL|1\.5), "), (CHINESE, r"\| (示範|對照組|XL|1\.5)，"))
    )
    assert len(rows) == 6 + 14  # what it learns, what memory it takes
    assert rows == translated


def table(text: str, heading: str) -> dict[str, str]:
    """The flags and defaults of a README table."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`--.*?) \| (.*?) ?\|", section, flags=re.M)
    return {flag: default for names, default in rows for flag in re.findall(r"--(\w+)", names)}


@pytest.mark.parametrize(
    ("text", "heading", "config"),
    [
        (README, "Training flags", megaman_lora.TrainConfig),
        (README, "Generation flags", generate_megaman.GenerateConfig),
        (CHINESE, "訓練參數", megaman_lora.TrainConfig),
        (CHINESE, "生成參數", generate_megaman.GenerateConfig),
    ],
    ids=["training", "generation", "training, Chinese", "generation, Chinese"],
)
def test_the_flag_tables_are_the_flags(text: str, heading: str, config: type) -> None:
    rows = table(text, heading)
    assert rows.keys() == {field.name for field in fields(config)}
    for field in fields(config):
        default = field.default if field.default is not MISSING else field.default_factory()
        default = default[0] if isinstance(default, list) else default
        if default is not None:
            shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)
            assert rows[field.name] == shown, field.name


@pytest.mark.parametrize(("text", "heading"), [(README, "What is where"), (CHINESE, "檔案說明")])
def test_the_file_tree_names_every_room(text: str, heading: str) -> None:
    tree = text.split(f"## {heading}")[1].split("```")[1]
    modules = {path.name for path in (ROOT / "megaman").glob("*/*.py") if "tiny_sd" not in path.parts}
    listed = set(re.findall(r"^    (\w+\.py) ", tree, re.MULTILINE))
    assert listed == modules - {"__init__.py"}
    for name in ("tiny_sd/", "starter_images/", "templates/", "megaman_images/", "tests/"):
        assert name in tree


def test_the_pictures_of_readme_exist() -> None:
    for link in re.findall(r"!\[.*?\]\((.*?)\)", README + CHINESE):
        assert (ROOT / link).is_file(), link


def test_no_document_names_a_machine_path() -> None:
    for path in (*ROOT.glob("*.md"), *ROOT.glob("megaman/**/*.md"), *ROOT.glob("megaman_images/*.md")):
        assert not re.search(r"(?<![\w.])/(work|tmp|home|root)/", Path(path).read_text(encoding="utf-8")), (
            path
        )
