"""Wrong adapters, and programs in the place of weights, through the real commands: counts of what is let in.
Nothing is printed.
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import commands
import torch
from bench.hostile_adapters import RANK, small_adapter
from PIL import Image
from safetensors.torch import save, save_file

from megaman.common.console import Exit
from megaman.lora.formats import kohya_tensors
from megaman.model.stable_diffusion import StableDiffusion

# ---------------------------------------------------------------- the real commands


def command(main: Callable[[], None], *flags: str) -> tuple[int, list[str]]:
    """The exit code of a command in this process, and its lines on stderr."""
    terminal = io.StringIO()
    with contextlib.redirect_stderr(terminal), mock.patch.object(sys, "argv", ["command", *flags]):
        try:
            commands.run(main)
        except SystemExit as left:
            return int(left.code or 0), terminal.getvalue().removesuffix("\n").split("\n")


def draw_with(lora: Path, base: Path | str, folder: Path) -> tuple[int, list[str]]:
    """generate_megaman.py with this adapter and base."""
    flags = (
        "--prompts",
        "a",
        "--num_inference_steps",
        "1",
        "--output_dir",
        str(folder / "drawn"),
        "--device",
        "cpu",
    )
    return command(commands.drawing, "--lora_path", str(lora), "--base_model", str(base), *flags)


def train_on(base: Path, folder: Path) -> tuple[int, list[str]]:
    """megaman_lora.py on this base, with one picture."""
    (folder / "data").mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), "blue").save(folder / "data" / "megaman.png")
    flags = [
        f"--data_dir={folder / 'data'}",
        f"--output_dir={folder / 'trained'}",
        f"--cache_dir={folder / 'cache'}",
    ]
    flags += ["--resolution=32", "--max_train_steps=1", "--report_to=none", "--mixed_precision=no"]
    return command(commands.training, f"--pretrained_model_name={base}", *flags)


def _refusal(code: int, lines: list[str]) -> bool:
    """Whether a command ended with exit code 4 and one line of error, the last."""
    wrong = [line for line in lines if line.startswith("error: ")]
    return code == Exit.MODEL and wrong == lines[-1:] and not any("Traceback" in line for line in lines)


# ---------------------------------------------------------------- wrong adapters


def wrong_adapters(folder: Path, base: StableDiffusion) -> dict[str, Path]:
    """Twelve adapters that must be refused."""
    good = kohya_tensors(small_adapter(base))
    first = next(key for key in good if key.endswith("lora_up.weight"))
    wide = {key: torch.ones(RANK, 768) if "lora_down" in key else tensor for key, tensor in good.items()}
    tensors = {
        "other width": wide,
        "no lora keys": {"conv_in.weight": torch.ones(3)},
        "half a pair": {key: tensor for key, tensor in good.items() if key != first},
        "nan": good | {first: torch.full_like(good[first], float("nan"))},
        "infinite": good | {first: torch.full_like(good[first], float("inf"))},
        "all zero": {key: torch.zeros_like(tensor) for key, tensor in good.items()},
        "loha and lokr": {
            key.replace("lora_down.weight", "hada_w1_a").replace("lora_up", "lokr_w2"): tensor
            for key, tensor in good.items()
        },
        "sdxl": good
        | {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(RANK, 1280)},
    }
    paths = {
        name: folder / f"{name}.safetensors"
        for name in [*tensors, "truncated", "empty", "huge header", "a text"]
    }
    for name, content in tensors.items():
        save_file(content, paths[name])
    paths["truncated"].write_bytes(save(good)[:-100])
    paths["empty"].write_bytes(b"")
    paths["huge header"].write_bytes(struct.pack("<Q", 10**9) + b"{" * 1000)
    paths["a text"].write_text("<!doctype html><title>Not found</title>", encoding="utf-8")
    return paths


def wrong_adapters_study(folder: Path, base: StableDiffusion, base_folder: Path) -> dict[str, int]:
    """The twelve through the real command."""
    paths = wrong_adapters(folder, base)
    accepted = [name for name, path in paths.items() if not _refusal(*draw_with(path, base_folder, folder))]
    return {"adapters": len(paths), "not_refused": len(accepted)} | dict.fromkeys(
        map("accepted: {}".format, accepted), 1
    )


# ---------------------------------------------------------------- programs in the place of weights


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def payload_files(folder: Path, marker: Path) -> list[Path]:
    """Eight files that would run our code if somebody unpickled them."""
    folder.mkdir()
    paths = [
        folder / f"payload{suffix}" for suffix in (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".safetensors")
    ]
    for path in paths:
        path.write_bytes(pickle.dumps(Payload(marker)))
    for name, zipped in (("zipped", True), ("legacy", False)):
        paths.append(folder / f"{name}.safetensors")
        torch.save({"weight": Payload(marker)}, paths[-1], _use_new_zipfile_serialization=zipped)
    return paths


def payload_bases(folder: Path, good: Path, marker: Path) -> list[Path]:
    """Base model folders that bring pickles or program code along."""
    folder.mkdir()
    program = f"import os\ntry: os.mkdir({str(marker)!r})\nexcept OSError: pass\nclass Evil: pass\n"
    bases = []

    def copy(name: str) -> Path:
        bases.append(folder / name)
        return shutil.copytree(good, bases[-1])

    for part in ("unet", "vae", "text_encoder"):
        weights = next((good / part).glob("*.safetensors")).name
        for renamed in (False, True):
            copied = copy(f"{part} {'renamed' if renamed else 'pickled'}") / part
            (copied / weights).unlink()
            plain = (
                weights.replace("model.safetensors", "model.bin")
                if part != "text_encoder"
                else "pytorch_model.bin"
            )
            torch.save({"x": Payload(marker)}, copied / (weights if renamed else plain))
    for key, value in {
        "_class_name": ["pipeline", "Evil"],
        "unet": ["evil", "Evil"],
        "vae": ["pipeline", "Evil"],
    }.items():
        copied = copy(f"code in {key}")
        for file in ("pipeline.py", "unet/evil.py", "vae/pipeline.py", "evil.py"):
            (copied / file).write_text(program, encoding="utf-8")
        _change_json(copied / "model_index.json", {key: value})
    for file in ("text_encoder/config.json", "unet/config.json", "tokenizer/tokenizer_config.json"):
        copied = copy(f"auto_map in {file.split('/')[0]}")
        (copied / file).with_name("evil.py").write_text(program, encoding="utf-8")
        _change_json(
            copied / file,
            {"auto_map": dict.fromkeys(("AutoModel", "AutoConfig", "AutoTokenizer"), "evil.Evil")},
        )
    return bases


def _change_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def payloads(folder: Path, good_lora: Path, good_base: Path) -> dict[str, int]:
    """Every payload as adapter and as base of both commands; each must be armed, and none may go off."""
    marker = folder / "executed"
    files, counts = payload_files(folder / "files", marker), Counter()
    for file in files[:6]:
        pickle.loads(file.read_bytes())
        counts["not_armed"] += not marker.is_dir()
        marker.rmdir()
    in_folder = folder / "adapter"
    in_folder.mkdir()
    (in_folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 4}', encoding="utf-8"
    )
    (in_folder / "adapter_model.bin").write_bytes(files[0].read_bytes())
    (in_folder / "pytorch_lora_weights.bin").write_bytes(files[0].read_bytes())
    runs = [lambda path=path: draw_with(path, good_base, folder) for path in (*files, in_folder)]
    for path in [*files, *payload_bases(folder / "bases", good_base, marker)]:
        runs += [
            lambda path=path: draw_with(good_lora, path, folder),
            lambda path=path: train_on(path, folder),
        ]
    for run in runs:
        counts["payloads"] += 1
        code, lines = run()
        told = "code" in lines[-1] or "can't be loaded" in lines[-1] or "safetensors" in lines[-1]
        counts["not_refused"] += not _refusal(code, lines)
        counts["unclear"] += not told or (" in " in lines[-1].split(":")[1] and "of its own" not in lines[-1])
        counts["executed"] += marker.exists()
        if marker.exists():
            marker.rmdir()
    return {name: counts[name] for name in ("payloads", "executed", "not_refused", "unclear", "not_armed")}
