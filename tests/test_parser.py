"""Flags and configuration files as people of other trainers write them, and files that were moved."""

import ast
import json
import os
import re
from pathlib import Path

import commands
import pytest
from conftest import ROOT, bound_by_modes, run_script

from megaman.common import output_folder
from megaman.common.console import UserError
from megaman.config import generate, record, train


def error_of(read: object, *argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a mistake on the command line gets."""
    with pytest.raises(SystemExit) as left:
        commands.run(lambda: read(list(argv)))
    assert left.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--lr", "--learning_rate"),
        ("--unet_lr", "--learning_rate"),
        ("--network_dim", "--lora_rank"),
        ("--network-alpha", "--lora_alpha"),
        ("--checkpointing_steps", "--save_steps"),
        ("--max_train_epochs", "--num_train_epochs"),
        ("--train_data_dir", "--data_dir"),
        ("--instance_data_dir", "--data_dir"),
        ("--output_name", "--output_dir"),
        ("--xformers", "--attention xformers"),
        ("--fp16", "--mixed_precision fp16"),
        ("--rank", "--lora_rank"),
        ("--dim", "--lora_rank"),
        ("--alpha", "--lora_alpha"),
        ("--model", "--pretrained_model_name"),
        ("--reg_data_dir", "--preserve_weight, which keeps the class without pictures"),
        ("--class_prompt", "--preserve_class"),
        ("--save_every_n_epochs", "--save_steps"),
        ("--use_8bit_adam", "--optimizer adamw8bit"),
        ("--resume", "--resume_from_checkpoint"),
        ("--steps", "--max_train_steps"),
        ("--network_args", "--lora_targets, --use_dora or --use_rslora"),
        ("--enable_bucket", "--crop bucket"),
        ("--max_token_length", "--max_tokens"),
    ],
)
def test_a_flag_of_another_trainer_gets_its_true_name(
    theirs: str, ours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = error_of(train.read_config, f"{theirs}=1", capsys=capsys)
    assert f"{theirs}: unknown flag (here it is {ours}" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ("--cache_latents", "leave it out: latents"),
        ("--cache_latents_to_disk", "leave it out: latents"),
        ("--color_aug", "leave it out: colours"),
        ("--lowram", "leave it out; --gradient_checkpointing"),
        ("--weighted_captions", "leave it out: "),
        ("--caption_column", "captions are .txt files"),
        ("--in_json", "captions are .txt files"),
        ("--network_module", "leave it out: "),
        ("--clip_skip", "leave it out: it isn't trained with"),
        ("--network_train_unet_only", "leave it out: only the UNet is trained"),
        ("--local_rank", "leave it out: accelerate"),
        ("--max_train_samples", "leave it out: all pictures"),
        ("--huber_schedule", "leave it out: "),
        ("--network_train_text_encoder_only", "leave it out: the UNet is always"),
    ],
)
def test_a_flag_of_another_trainer_that_nothing_here_answers_to_gets_the_reason(
    theirs: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{theirs}: unknown flag ({told}" in error_of(train.read_config, theirs, capsys=capsys)


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ("--n_iter", "here it is --num_images_per_prompt"),
        ("--n_samples", "here it is --num_images_per_prompt"),
        ("--lora_weights", "here it is --lora_path"),
        ("--strength", "here it is --lora_scale"),
        ("--weight", "here it is --lora_scale"),
        ("--xformers", "leave it out: "),
        ("--n_prompt", "here it is --negative_prompt"),
        ("--max_embeddings_multiples", "here it is --max_tokens"),
        ("--max_token_length", "here it is --max_tokens"),
        ("--no_prompt_weights", "here it is --prompt_weights off"),
        ("-W", "here it is --width"),
    ],
)
def test_a_flag_of_another_drawing_program_gets_its_true_name(
    theirs: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{theirs}: unknown flag ({told}" in error_of(generate.read_config, theirs, capsys=capsys)


@pytest.mark.parametrize("word", ["--max_text_size", "--dataset", "--save_images", "--train"])
def test_letters_alone_make_no_hint(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{word}: unknown flag; --help" in error_of(train.read_config, word, capsys=capsys)


def test_a_key_of_another_trainers_file_gets_its_true_name(tmp_path: Path) -> None:
    for key, told in (("network_dim", "here it is lora_rank"), ("clip-skip", "leave it out: ")):
        (tmp_path / "a.json").write_text(json.dumps({key: 8}))
        with pytest.raises(UserError, match=rf"unknown key '{key.replace('-', '_')}' \({told}"):
            train.read_config(["--config", str(tmp_path / "a.json")])


@pytest.mark.parametrize(
    ("argv", "name", "meant"),
    [
        (["--resolution", "512,512"], "resolution", 512),
        (["--resolution=768x768"], "resolution", 768),
        (["--lr_scheduler", "constant_with_warmup"], "lr_scheduler", "constant"),
        (["--optimizer", "AdamW8bit"], "optimizer", "adamw8bit"),
        (["--mixed_precision", "float32"], "mixed_precision", "no"),
    ],
)
def test_a_value_is_understood_in_every_spelling_that_is_plainly_meant(
    argv: list[str], name: str, meant: object
) -> None:
    assert getattr(train.read_config(argv)[0], name) == meant


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("euler_ancestral", "euler_a"),
        ("Euler a", "euler_a"),
        ("dpmpp_2m", "dpm++"),
        ("DPM++ 2M", "dpm++"),
        ("DDIM", "ddim"),
    ],
)
def test_a_sampler_is_known_by_the_names_that_other_programs_give_it(word: str, meant: str) -> None:
    assert generate.read_config(["--scheduler", word]).scheduler == meant


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--resolution", "512,768"], "'512,768': give one side"),
        (["--resolution", "512,"], "'512,': give one side"),
        (["--lr_warmup_steps", "0.05"], "steps, no share of them; left out, it is 5 % of the run"),
        (["--learning_rate", "fast"], "'fast' must be a number"),
        (["--lora_rank", "4.5"], "'4.5' must be a whole number"),
        (["--output_dir", "~nobody-here/x"], "'~nobody-here/x': no such user's home"),
        (["--data_dir="], "is empty"),
        (["--output_dir="], "is empty"),
        (["--pretrained_model_name="], "is empty"),
        (["--init_lora", ""], "is empty"),
    ],
)
def test_a_value_that_means_nothing_is_refused_in_plain_words(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(train.read_config, *argv, capsys=capsys)
    assert told in error
    assert error.count("\n") == 1


def test_an_empty_path_in_a_file_or_of_an_adapter_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is empty" in error_of(generate.read_config, "--lora_path=", capsys=capsys)
    (tmp_path / "a.json").write_text('{"data_dir": ""}')
    with pytest.raises(UserError, match="data_dir: is empty"):
        train.read_config(["--config", str(tmp_path / "a.json")])


@pytest.mark.parametrize("module", [train, generate])
def test_every_hint_names_a_flag_that_there_is(module: object) -> None:
    config = train.TrainConfig if module is train else generate.GenerateConfig
    for hint in module.ELSEWHERE.values():
        assert set(re.findall(r"--(\w+)", hint)) <= set(config.__dataclass_fields__), hint
    assert not set(module.ELSEWHERE) & set(config.__dataclass_fields__)


def test_numbers_in_files_mean_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"seed": 42.0, "resolution": [64, 64], "lora_alpha": 8}')
    cfg, _ = train.read_config(["--config", str(tmp_path / "a.json")])
    assert (cfg.seed, cfg.resolution, cfg.lora_alpha) == (42, 64, 8.0)
    for text in ('{"seed": 42.5}', '{"resolution": [64, 32]}', '{"trigger": {"a": 1}}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=r"a\.json: (seed|resolution|trigger): "):
            train.read_config(["--config", str(tmp_path / "a.json")])


def test_a_prompt_in_a_file_may_begin_with_dashes(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"validation_prompt": ["--seed 7", "-x"]}')
    cfg, _ = train.read_config(["--config", str(tmp_path / "a.json")])
    assert cfg.validation_prompt == ["--seed 7", "-x"]


def test_a_resume_goes_on_in_the_folder_where_the_record_lies(tmp_path: Path) -> None:
    moved = tmp_path / "out.001" / "training_config.json"
    moved.parent.mkdir()
    moved.write_text(json.dumps(record.recorded(train.TrainConfig(output_dir=str(tmp_path / "out")))))
    assert moved.name == train.RECORD == output_folder.RECORD
    resume = ["--config", str(moved), "--resume_from_checkpoint", "latest"]
    assert train.read_config(resume)[0].output_dir == str(moved.parent)
    assert train.read_config(resume[:2])[0].output_dir == str(
        tmp_path / "out"
    )  # a repetition begins anew there
    moved.write_text(json.dumps(record.recorded(train.TrainConfig(output_dir=f"{moved.parent}/."))))
    assert (
        train.read_config(resume)[0].output_dir == f"{moved.parent}/."
    )  # in the user's words where they hold
    named = train.read_config([*resume, "--output_dir", "elsewhere"])[0]
    assert named.output_dir == "elsewhere"
    copy = moved.rename(tmp_path / "my_settings.json")
    assert train.read_config(["--config", str(copy), *resume[2:]])[0].output_dir == f"{moved.parent}/."


@pytest.mark.parametrize("script", ["megaman_lora.py", "generate_megaman.py"])
def test_an_old_python_is_told_which_one_is_needed_before_anything_is_imported(script: str) -> None:
    source = (ROOT / script).read_text(encoding="utf-8")
    head = source[: source.index("\nfrom megaman")]
    for line in ("import sys", "sys.version_info < (3, 11)", "Python 3.11 or newer"):
        assert line in head
    compile(source, script, "exec", dont_inherit=True)
    ast.parse(source, feature_version=(3, 6))  # the whole file must parse, or the line is never reached


MISSING = "{} is not installed; run: pip install -r requirements_megaman_lora.txt\n"


@pytest.mark.parametrize("script", ["megaman_lora.py", "generate_megaman.py"])
@pytest.mark.parametrize("flags", [["--help"], []])
def test_without_its_libraries_a_script_says_in_one_line_how_to_get_them(
    script: str, flags: list[str]
) -> None:
    result = run_script("-S", script, *flags)  # -S: as in a fresh virtual environment
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: \w+ " + MISSING.removeprefix("{} "), result.stderr), result.stderr


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("megaman_lora.py", ["--preset", "demo", "--dry_run"]),
        ("generate_megaman.py", ["--prompts", "a"]),
    ],
)
def test_the_library_that_is_missing_is_named_and_a_bug_keeps_its_traceback(
    script: str, flags: list[str]
) -> None:
    for module, code in (("torch", 2), ("megaman.config.parser", 1)):
        program = f"import sys, runpy; sys.argv = {[script, *flags]}; sys.modules[{module!r}] = None\n"
        result = run_script("-c", f"{program}runpy.run_path({script!r}, run_name='__main__')")
        assert result.returncode == code
        if code == 2:
            assert result.stderr == "error: " + MISSING.format(module)
        else:
            assert "Traceback" in result.stderr


def test_what_stands_in_code_means_what_it_means_in_a_file(tmp_path: Path) -> None:
    for argv in ([], ["--preset", "demo"], ["--preset", "starter"]):
        cfg, _ = train.read_config(argv)
        (tmp_path / "a.json").write_text(json.dumps(record.recorded(cfg)))
        again, _ = train.read_config(["--config", str(tmp_path / "a.json")])
        assert json.dumps(record.recorded(again)) == json.dumps(record.recorded(cfg))  # 32.0 stays 32.0
    cfg.validation_prompt.append("x")
    assert "x" not in train.read_config([])[0].validation_prompt


@pytest.mark.parametrize("word", ["t", "True", "yes", "1", "on"])
def test_a_switch_is_thrown_by_any_usual_word(word: str) -> None:
    assert train.read_config([f"--flip={word}"])[0].flip


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users and modes of POSIX")
def test_a_file_of_settings_that_cannot_be_read_is_told_in_plain_words(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content, mode, told in (
        (b"{}", 0, "can't be read (permission denied)"),
        (b"\xff", 0o600, "not UTF-8"),
    ):
        path.write_bytes(content)
        path.chmod(mode)
        with bound_by_modes(), pytest.raises(UserError, match=re.escape(f"--config {path}: {told}")):
            train.read_config(["--config", str(path)])
        path.chmod(0o600)
