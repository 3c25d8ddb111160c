"""Hostile input: texts, adapters, models and a hub that mean harm, or are broken. The full counts: bench/."""

import json
import os
import shutil
import socket
import sys
from pathlib import Path

import commands
import pytest
from bench import hostile, hostile_adapters, hostile_models
from conftest import run_script
from PIL import Image

import generate_megaman
import megaman_lora
from megaman.model.stable_diffusion import StableDiffusion


def harmless(counts: dict[str, float], *figures: str) -> bool:
    """Whether all counts but the first, which says how many were tried, and the figures are 0."""
    tried, *others = (count for name, count in counts.items() if name not in figures)
    return tried > 0 and not any(others)


# ---------------------------------------------------------------- texts


def test_nothing_in_a_prompt_becomes_a_path_markup_or_a_setting(tmp_path: Path) -> None:
    counts = hostile.prompts_study(400, 1, tmp_path)
    assert harmless(counts), counts


def test_nothing_in_a_caption_or_a_name_becomes_a_path_or_markup(tmp_path: Path) -> None:
    counts = hostile.captions_study(150, 1, tmp_path)
    assert harmless(counts), counts


def test_any_prompts_file_is_read_or_refused_in_a_line(tmp_path: Path) -> None:
    counts = hostile.prompt_files_study(300, 1, tmp_path)
    assert harmless(counts), counts


def test_a_disarmed_prompt_means_the_same_to_the_text_encoder(tiny_base: StableDiffusion) -> None:
    from megaman.generation.records import _plain

    for text in ("a, Negative prompt: b", "Steps: 1, Sampler: x", "(Negative prompt:1.2)"):
        assert _plain(text) != text
        assert tiny_base.tokenizer(_plain(text)).input_ids == tiny_base.tokenizer(text).input_ids


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such names")
def test_a_picture_s_name_need_not_be_utf8(tmp_path: Path, tiny_folder: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / os.fsdecode(b"\xff\xe9.png"), format="PNG")
    flags = [
        f"--data_dir={folder}",
        f"--output_dir={tmp_path / 'out'}",
        f"--pretrained_model_name={tiny_folder}",
    ]
    megaman_lora.show_dataset(megaman_lora.read_config([*flags, "--resolution=32"])[0])
    assert "\\udcff\\udce9.png" in (tmp_path / "out" / "dataset.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- adapters and bases


def test_any_adapter_file_is_read_or_refused_in_a_line(tiny_base: StableDiffusion, tmp_path: Path) -> None:
    counts = hostile_adapters.mutated_adapters(500, 1, tmp_path, tiny_base)
    assert harmless(counts, "read", "refused", "slowest_ms", "grown_mib"), counts
    assert counts["read"] > 20
    assert counts["grown_mib"] < 200


def test_twelve_wrong_adapters_are_refused(
    tiny_base: StableDiffusion, tiny_folder: Path, tmp_path: Path
) -> None:
    counts = hostile_models.wrong_adapters_study(tmp_path, tiny_base, tiny_folder)
    assert counts["adapters"] == 12
    assert harmless(counts), counts


def test_no_program_in_a_weight_s_place_is_run(
    adapter_folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    counts = hostile_models.payloads(tmp_path, adapter_folder, tiny_folder)
    assert counts["payloads"] >= 12
    assert harmless(counts), counts


def test_an_adapter_never_names_a_path_as_its_base(tmp_path: Path) -> None:
    from megaman.common.console import UserError
    from megaman.lora.adapter import Adapter

    for name in (
        "../base",
        "/etc/base",
        "C:/base",
        "//host/share",
        "\\\\host\\share\\base",
        "a/b/c",
        "~/base",
        "./base",
    ):
        with pytest.raises(UserError, match="name it with --base_model"):
            generate_megaman.base_of(Adapter({}, {"base": name}), tmp_path, None)
    assert (
        generate_megaman.base_of(Adapter({}, {"base": "owner/model-1.5"}), tmp_path, None)
        == "owner/model-1.5"
    )


# ---------------------------------------------------------------- the hub


def test_the_hub_s_refusals_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    result = run_script("tests/bench/hub.py")
    assert result.stderr == ""
    assert "hf_secret" not in result.stdout
    said = json.loads(result.stdout)
    assert said["peek"] == "Stable Diffusion 1.x, 16, 64"  # the embedded base's, and not 1.5's 64 and 512
    for base in ("base thin", "base thin, hub down"):  # its weights are there as the fp16 variant alone
        assert said.pop(base) == "it was had: StableDiffusion"
    for owner in ("gated", "locked"):
        assert "Accept its licence on its page, then log in with `hf auth login`." in said[f"base {owner}"]
        assert "this adapter is gated" in said[f"adapter {owner}"]
    assert "the hub knows no such model, or keeps it private. Check --pretr" in said["base missing"]
    assert "your token has expired or may not read this, or there is no such model" in said["base deleted"]
    for owner in ("missing", "deleted"):
        assert "Check --lora_path" in said[f"adapter {owner}"]
    assert not [name for name, words in said.items() if name.startswith("adapter") and "--preset" in words]
    assert "the hub is too busy" in said["base busy"]
    assert "only there as pickle files" in said["base pickled"]
    assert "not as a diffusers model" in said["base other"]
    for owner in ("half", "torn"):
        only = "only a part of this base model is on this machine (the weights of unet are missing). Connect"
        assert only in said[f"base {owner}, hub down"]
    assert "can't be reached and this base model is not on this machine" in said["base missing, hub down"]
    assert "can't be reached and this adapter is not on this machine" in said["adapter missing, hub down"]
    assert "not wholly downloaded" in said["adapter torn, hub down"]
    assert not any("\n" in message or "had" in message for message in said.values())


# ---------------------------------------------------------------- secrets and sockets


def test_no_secret_is_in_what_is_shared_and_no_socket_is_needed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, token = tmp_path / "home" / "zaphod-b-7f3", "hf_TopSecretToken42"
    for name, value in {"HOME": home, "USERPROFILE": home, "USER": home.name, "LOGNAME": home.name}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, token)

    def refuse(*_: object) -> None:
        raise AssertionError("a socket was opened")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)

    shutil.copytree(tiny_folder, home / "base" / "tiny_base")
    for i in range(2):
        (home / "data" / "10_hero").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i * 99, 0, 0)).save(home / "data" / "10_hero" / f"megaman_{i}.png")
    monkeypatch.chdir(home)
    flags = [
        f"--pretrained_model_name={home / 'base' / 'tiny_base'}",
        f"--data_dir={home / 'data'}",
        f"--output_dir={home / 'out'}",
    ]
    flags += [
        "--resolution=32",
        "--max_train_steps=2",
        "--validation_steps=1",
        "--save_steps=1",
        "--mixed_precision=no",
    ]
    code, said = hostile_models.command(commands.training, *flags, f"--cache_dir={home / 'cache'}")
    assert code == 0, said
    flags = ["--lora_path", str(home / "out" / "lora_weights"), "--output_dir", str(home / "drawn")]
    flags += ["--prompts", "a", "b", "--num_inference_steps", "1", "--lora_scale", "0", "1"]
    code, said = hostile_models.command(commands.drawing, *flags)
    assert code == 0, said

    local = ("training_config.json", "logs", "checkpoints", "metrics.jsonl", ".lock")  # may hold paths
    shared = [
        path for path in (home / "out").rglob("*") if path.relative_to(home / "out").parts[0] not in local
    ]
    shared += [*(home / "out" / "checkpoints").rglob("adapter.safetensors"), *(home / "drawn").rglob("[!.]*")]
    shared = [path for path in shared if path.is_file()]
    assert {path.suffix for path in shared} >= {".safetensors", ".png", ".html", ".jsonl", ".json"}
    for path in shared:
        for secret in (token, home.name, str(tmp_path), str(tiny_folder)):
            assert secret.encode() not in path.read_bytes(), (path.relative_to(home), secret)
