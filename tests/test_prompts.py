"""Prompts with the options and the syntax that people know from other programs."""

from pathlib import Path

import pytest

from megaman.common.console import UserError
from megaman.generation.prompts import Prompt, plain_prompts, read_prompts_file, texts_of
from megaman.model.prompt_syntax import notes_on_syntax


def read(tmp_path: Path, line: str) -> Prompt:
    """The prompt of a file's second line."""
    path = tmp_path / "prompts.txt"
    path.write_text(f"# ours\n{line}\n", encoding="utf-8")
    (prompt,) = read_prompts_file(path)
    return prompt


@pytest.mark.parametrize(
    "option",
    [
        *("--w 128", "-w 128", "--w=128", "--w128", "-w128", "—w 128", "–w=128", "—w128"),
        *("-W 128", "--W 128", "-- w 128", "−w 128", "―w 128", "‐w 128", "－w=128", "--w 128,", "--w 128;"),
    ],
)
def test_an_option_is_understood_in_every_spelling_that_is_plainly_meant(tmp_path: Path, option: str) -> None:
    prompt = read(tmp_path, f"mega man, 8-bit {option} --n blurry -- or not")
    assert (prompt.text, dict(prompt.settings)) == (
        "mega man, 8-bit",
        {"width": 128, "negative_prompt": "blurry -- or not"},
    )


@pytest.mark.parametrize("comma", [",", ";", "，", ", "])
@pytest.mark.parametrize("option", ["--w 128", "-w 128", "—w128"])
def test_an_option_may_stand_close_behind_a_comma(tmp_path: Path, comma: str, option: str) -> None:
    prompt = read(tmp_path, f"mega man{comma}{option}{comma}--h 64")
    assert (prompt.text, prompt.settings) == (f"mega man{comma.strip()}", {"width": 128, "height": 64})


def test_a_negative_prompt_and_a_guidance_take_the_sign_too(tmp_path: Path) -> None:
    assert read(tmp_path, "a --n=blurry, bad --l=7.5").settings == {
        "negative_prompt": "blurry, bad",
        "guidance_scale": 7.5,
    }


@pytest.mark.parametrize(
    "text",
    ["rock-n-roll", "a - s", "x -- y", "8-bit", "t-pose -", "co-op", "a − b", "red,-ish", "{red|blue} man"],
)
def test_a_dash_in_a_prompt_is_a_dash(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == Prompt(text)


@pytest.mark.parametrize(
    "line",
    [
        *("rock -n roll", "a --3d", "a —n blurry", "a -w wide", "a --512", "a -s"),
        *("a -N b", "a -- n b", "a − w 128", "a — w 128", "a ‐n b", "rock,-n roll", "a -S 7", "a,--3d"),
        *('{"prompt": "mega man", "width": 128}', '{"prompt": "mega man"},', "[{", "}"),
    ],
)
def test_what_may_be_an_option_and_is_none_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError, match="line 2: ") as caught:
        read(tmp_path, line)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("suffix", ["toml", "json", "jsonl", "yaml", "yml", "csv", "tsv", "JSON"])
def test_kohyas_and_others_prompt_files_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_text("[prompt]\nwidth = 512\n")
    with pytest.raises(UserError, match=rf"\.{suffix} prompt files are not read"):
        read_prompts_file(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("word", ["nan", "inf", "-inf"])
def test_a_guidance_that_is_no_number_is_said_to_be_none(tmp_path: Path, word: str) -> None:
    with pytest.raises(UserError, match=f"line 2: --l {word} must be a finite number"):
        read(tmp_path, f"a --l {word}")


def test_the_web_uis_syntax_is_said_once_and_their_loras_are_left_out() -> None:
    prompts = [
        Prompt("mega man <lora:hero:0.8>, running"),
        Prompt("(red:1.3) [sky] BREAK x"),
        Prompt("a (b) c"),
    ]
    assert [prompt.text for prompt in plain_prompts(prompts)] == [
        *("mega man, running", "(red:1.3) [sky] BREAK x", "a (b) c"),
    ]
    notes = notes_on_syntax(texts_of(prompts, None))
    assert len(notes) == 2
    assert "<lora:hero:0.8> is left out" in notes[0]
    assert "plain words" in notes[1]
    assert notes_on_syntax(["Anders, a BREAKER (b) c"]) == []


def test_nothing_is_said_of_weights_that_are_read() -> None:
    texts = ["(red:1.3) [sky] BREAK x", "a <lora:me AND you:0.8> b", "Anders (b)"]
    (note,) = notes_on_syntax(texts, weights_are_read=True)
    assert "<lora:me AND you:0.8> is left out" in note
    (note,) = notes_on_syntax(["(red:1.3) sky AND [mint]", "a AND b"], weights_are_read=True)
    assert note == "note: 'AND' is a plain word here: prompts can't be joined by it"


def test_negative_prompts_are_looked_at_too() -> None:
    prompts = [Prompt("mega man", {"negative_prompt": "bad <lora:bad:1>"}), Prompt("x")]
    assert plain_prompts(prompts)[0].settings["negative_prompt"] == "bad"
    notes = notes_on_syntax(texts_of(prompts, "(worst quality:1.4)"))
    assert ["<lora:bad:1>" in notes[0], "(worst quality:1.4)" in notes[1]] == [True, True]


def test_a_prompt_of_lora_tags_alone_is_refused() -> None:
    with pytest.raises(UserError, match="holds nothing but names of LoRAs") as error:
        plain_prompts([Prompt("<lora:x:1>")])
    assert error.value.exit_code == 2
