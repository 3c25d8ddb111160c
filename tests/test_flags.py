"""The command line: spellings, precedence, and a line for every mistake."""

import json
from pathlib import Path

import pytest
from conftest import run_script

from megaman.common.console import UserError
from megaman.config import generate
from megaman.config.record import decisive, published, recorded
from megaman.config.train import PRESETS, TrainConfig, read_config
from megaman.training.sampler import Sampler
from megaman.training.schedule import plan


def test_defaults_are_the_recommended_configuration_of_the_users_readme() -> None:
    cfg = TrainConfig()
    assert (cfg.side_px, cfg.train_batch_size, cfg.gradient_accumulation_steps) == (512, 1, 4)
    assert (cfg.learning_rate, cfg.lora_rank, cfg.lora_alpha) == (1e-4, 8, 32)
    assert (cfg.max_train_steps, cfg.save_steps, cfg.validation_steps) == (1500, 250, 100)
    assert cfg.mixed_precision == "fp16"


@pytest.mark.parametrize("flag", ["--lora_rank", "--lora-rank"])
def test_both_spellings_of_a_flag_work(flag: str) -> None:
    assert read_config([flag, "5"])[0].lora_rank == 5


@pytest.mark.parametrize("suffix", ["json", "toml", "yaml"])
def test_command_line_beats_file_beats_preset_beats_default(tmp_path: Path, suffix: str) -> None:
    text = {
        "json": json.dumps({"lora_rank": 6, "learning_rate": 1e-4, "lr_warmup_steps": None}),
        "toml": "lora-rank = 6\nlearning_rate = 1e-4\n",
        "yaml": "lora_rank: 6\nlearning_rate: 1e-4\n",  # PyYAML takes 1e-4 for a string
    }
    path = tmp_path / f"run.{suffix}"
    path.write_text(text[suffix], encoding="utf-8")
    cfg, _ = read_config(["--preset", "pro", "--config", str(path), "--lora_alpha", "7"])
    assert (cfg.lora_alpha, cfg.lora_rank, cfg.learning_rate) == (7, 6, 1e-4)
    assert cfg.max_train_steps == PRESETS["pro"]["max_train_steps"]
    assert cfg.train_batch_size == TrainConfig.train_batch_size


def test_steps_and_epochs_replace_each_other_across_sources(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"max_train_steps": 77}', encoding="utf-8")
    cfg, _ = read_config(["--config", str(path), "--num_train_epochs", "3", "--train_batch_size", "2"])
    sampler = Sampler(((0, 1, 2), (3, 4)), step_size=2, seed=0)
    assert plan(cfg, sampler).max_train_steps == 8  # 15 pictures, two a step
    path.write_text('{"num_train_epochs": 9}', encoding="utf-8")
    cfg, _ = read_config(["--config", str(path), "--max_train_steps", "12"])
    assert plan(cfg, sampler).max_train_steps == 12
    with pytest.raises(UserError, match="give one"):
        read_config(["--max_train_steps", "5", "--num_train_epochs", "3"])


@pytest.mark.parametrize(
    "text",
    [
        '{"max_train_steps": 5, "num_train_epochs": 3}',
        '{"validation_prompt": []}',
        '{"learning_rate": null}',
        '{"preset": "pro"}',
        '{"config": "other.json"}',
        '{"trigger": "\\ud800"}',
        "[1]",
        "{",
    ],
)
def test_a_contradictory_or_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_config(["--config", str(path)])
    assert error.value.exit_code == 2


def test_an_unknown_key_in_a_file_is_an_error_with_a_suggestion(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"lora_rnk": 6}', encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown key 'lora_rnk' \(did you mean lora_rank\?\)"):
        read_config(["--config", str(path)])


@pytest.mark.parametrize("number", ["0", "-75", "74", "100"])
def test_texts_are_as_long_as_whole_chunks(number: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(f'{{"max_tokens": {number}}}', encoding="utf-8")
    complaint = f"--max_tokens {number}: must be a multiple of 75 and at least 75"
    for arguments in (["--max_tokens", number], ["--config", str(path)]):
        with pytest.raises(UserError, match=complaint):
            read_config(arguments)
    with pytest.raises(UserError, match=complaint):
        generate.read_config(["--max_tokens", number])
    assert read_config(["--max_tokens", "150"])[0].max_tokens == 150
    assert generate.read_config(["--max-tokens", "75"]).max_tokens == 75


def test_a_captions_length_may_change_in_a_resume_and_stands_in_no_file_that_is_shared() -> None:
    cfg = TrainConfig(max_tokens=75)
    assert recorded(cfg)["max_tokens"] == 75
    assert "--max_tokens" not in decisive(recorded(cfg))
    assert "max_tokens" not in published(cfg)


@pytest.mark.parametrize("word", ["off", "no", "false", "0"])
def test_prompt_weights_are_read_unless_they_are_switched_off(word: str) -> None:
    assert generate.read_config([]).prompt_weights is True
    assert generate.read_config(["--prompt_weights", word]).prompt_weights is False


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--lora_rnk", "3"], "did you mean --lora_rank"),
        (["--lora_ran", "3"], "unknown flag"),  # no abbreviations
        (["--lora_rank", "many"], "'many' must be a whole number"),
        (["--mixed_precision", "fp8"], "invalid choice"),
        (["--lora_rank", "0"], "must be at least 1"),
        (["--learning_rate", "nan"], "must be a finite number, above 0"),
        (["--learning_rate", "inf"], "must be a finite number"),
        (["--learning_rate", "0"], "must be above 0"),
        (["--caption_dropout", "1.5"], "between 0 and 1"),
        (["--config", "nowhere.json"], "can't be read"),
    ],
)
def test_a_mistyped_flag_is_one_line_and_exit_code_2(arguments: list[str], complaint: str) -> None:
    result = run_script("megaman_lora.py", *arguments)
    assert result.returncode == 2
    assert complaint in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_wrong_value_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"lora_rank": "many"}', encoding="utf-8")
    result = run_script("megaman_lora.py", "--config", str(path))
    assert result.returncode == 2
    assert "run.json" in result.stderr
    assert "many" in result.stderr


@pytest.mark.parametrize("script", ["megaman_lora.py", "generate_megaman.py"])
def test_help_needs_no_torch_and_names_both_spellings(script: str) -> None:
    code = (
        f"import sys, runpy; sys.argv = ['{script}', '--help']\ntry: runpy.run_path('{script}', "
        "run_name='__main__')\n"
    )
    result = run_script("-c", code + "finally: print('torch' in sys.modules)")
    assert result.stdout.strip().endswith("False")
    assert "--output_dir OUTPUT_DIR, --output-dir OUTPUT_DIR" in result.stdout


def test_importing_the_scripts_has_no_side_effects(tmp_path: Path) -> None:
    from conftest import ROOT

    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import megaman_lora, generate_megaman"
    result = run_script("-c", code, cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []
