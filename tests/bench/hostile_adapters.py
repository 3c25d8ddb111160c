"""Mutated adapters, and counts of what becomes of them. Nothing is printed."""

import json
import random
import resource
import struct
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save

import generate_megaman
from megaman.common.console import Exit, UserError
from megaman.common.kinds import SD1
from megaman.generation.prompts import Prompt
from megaman.lora.adapter import Adapter, LoraLayer
from megaman.lora.formats import kohya_tensors, peft_tensors
from megaman.lora.load import read_adapter
from megaman.lora.merge import MergedAdapter
from megaman.model.stable_diffusion import StableDiffusion

SLOW_S = 1.0
RANK = 2
ODD_NUMBERS = (-1, 0, 1, 2, 3, 64, 2**31, 2**40, 2**63, 2**64, 1.5, "2", None, True, [], 1e300)
ODD_JSON = (
    "[", "[" * 50_000, "{" * 2000, '{"base": 1}', '{"base": "../../etc"}', '{"base": "a\\u0000b/c"}',
    '{"resolution": -64}', "7", '{"resolution": 1e9}', '{"resolution": 123456789012345678901234567890}',
    '{"resolution": 65}', '{"guidance_scale": NaN}', '{"guidance_scale": 1e999}', '{"trigger": ["a"]}',
    '{"trigger": "\\ud800"}', '{"resolution": 0}', '{"guidance_scale": -1.0}', "null",
    '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": NaN, "unet.r": 2}',
    '{"unet.lora_alpha": 2, "unet.alpha_pattern": {"(": 1}}',
    '{"unet.lora_alpha": 2, "unet.alpha_pattern": {"(a+)+$|(.*.*.*.*)*x": 1}}',
    '{"unet.lora_alpha": 2, "unet.alpha_pattern": [1]}',
    '{"unet.lora_alpha": 2, "unet.alpha_pattern": {".*": "x"}}', '{"unet.lora_alpha": [2]}', '{"unet": 1}',
    '{"unet.lora_alpha": 1e400}',
)  # fmt: skip


def small_adapter(base: StableDiffusion) -> Adapter:
    """Rank 2 on the four projections of one attention of the base."""
    layers = {}
    for name, module in base.unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")) and len(layers) < 4:
            out, into = module.weight.shape
            torch.manual_seed(len(layers))
            layers["unet", name] = LoraLayer(torch.randn(RANK, into) / 9, torch.randn(out, RANK) / 9, 2.0)
    return Adapter(
        layers, {"base": "tiny_base", "trigger": "mega man", "resolution": 64, "guidance_scale": 7.5}
    )


def layouts_of(adapter: Adapter) -> dict[str, bytes]:
    """The adapter's file in PEFT's, kohya's and diffusers' layout."""
    ours = {"format": "pt", "megaman": json.dumps(adapter.metadata)}
    settings = {"unet.lora_alpha": 2, "unet.r": RANK}
    peft = peft_tensors(adapter)
    diffusers = {key.replace("base_model.model.", "unet."): tensor for key, tensor in peft.items()}
    return {
        "peft": save(peft, ours),
        "kohya": save(kohya_tensors(adapter), ours),
        "diffusers": save(diffusers, ours | {"lora_adapter_metadata": json.dumps(settings)}),
    }


# ---------------------------------------------------------------- mutations

Header = dict[str, dict]


def mutated(file: bytes, rng: random.Random) -> bytes:
    """The file with one fault, or a few."""
    kinds = (
        _flipped,
        _flipped,
        _cut,
        _with_lying_length,
        _with_header,
        _with_header,
        _with_header,
        _with_numbers,
    )
    file = rng.choice(kinds)(file, rng)
    return _flipped(file, rng) if file and rng.random() < 0.1 else file


def _flipped(file: bytes, rng: random.Random) -> bytes:
    data, end = bytearray(file), rng.choice((8, 2000, len(file)))
    for _ in range(rng.choice((1, 1, 2, 8, 100))):
        data[rng.randrange(min(end, len(data)))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _cut(file: bytes, rng: random.Random) -> bytes:
    at = rng.choice((0, 1, 7, 8, 9, rng.randrange(len(file)), len(file) - 1))
    return rng.choice((file[:at], file[at:], file[:at] + file, file + b"\0" * at, rng.randbytes(at)))


def _with_lying_length(file: bytes, rng: random.Random) -> bytes:
    return (
        struct.pack(
            "<Q", rng.choice((0, 1, 2, len(file), 10**8, 2**31, 2**63, 2**64 - 1, rng.randrange(5000)))
        )
        + file[8:]
    )


def _with_header(file: bytes, rng: random.Random) -> bytes:
    """The file with another header over the same numbers."""
    size = int.from_bytes(file[:8], "little")
    header: Header = json.loads(file[8 : 8 + size])
    for _ in range(rng.choice((1, 1, 3))):
        rng.choice((_odd_entry, _odd_name, _odd_metadata))(header, rng)
    text = json.dumps(header)
    if rng.random() < 0.1 and len(header) > 2:  # the same key twice
        first, second = rng.sample(sorted(header), 2)
        text = text.replace(json.dumps(first), json.dumps(second), 1)
    return len(text.encode()).to_bytes(8, "little") + text.encode() + file[8 + size :]


def _odd_entry(header: Header, rng: random.Random) -> None:
    key = rng.choice([key for key in header if key != "__metadata__"] or ["x"])
    entry = header.setdefault(key, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    if not isinstance(entry, dict):
        return
    what = rng.choice(("dtype", "shape", "shape", "data_offsets", "extra"))
    dtypes = (
        "F64",
        "F16",
        "BF16",
        "I8",
        "U8",
        "I64",
        "BOOL",
        "F8_E4M3",
        "F8_E5M2",
        "C64",
        "U64",
        "F4",
        "x",
        1,
        None,
    )
    if what == "dtype":
        entry["dtype"] = rng.choice(dtypes)
    elif what == "extra":
        header[key] = rng.choice(({}, [], None, entry | {"x": 1}, {"dtype": "F32"}))
    elif isinstance(entry.get(what), list) and entry[what]:
        odd = rng.choice(
            ([], list(reversed(entry[what])), [*entry[what], 1], [0, 2**40], [2**40, 0], entry[what][:1])
        )
        entry[what][rng.randrange(len(entry[what]))] = rng.choice(ODD_NUMBERS)
        entry[what] = odd if rng.random() < 0.4 else entry[what]


def _odd_name(header: Header, rng: random.Random) -> None:
    keys = [key for key in header if key != "__metadata__"]
    if not keys:
        return
    key = rng.choice(keys)
    new = rng.choice((
        "", "x", key.upper(), key.replace("lora", "lokr"), key.replace("unet", "te"), key + ".alpha",
        "../" + key, "\x00" + key, key.replace("lora_A", "lora_B"), key.replace("down", "mid"),
        key[: rng.randrange(len(key) + 1)], key.replace("attn1", "attn9"), "lora_te_" + key,
        "text_encoder." + key, "lora_te2_x.lora_down.weight", "a" * 5000, "é" + key, rng.choice(keys),
    ))  # fmt: skip
    entry = header.pop(key)
    if rng.random() < 0.8:
        header[new] = entry


def _odd_metadata(header: Header, rng: random.Random) -> None:
    metadata = header.get("__metadata__")
    if rng.random() < 0.2 or not isinstance(metadata, dict):
        header["__metadata__"] = rng.choice((None, [], 1, "x", {"a": 1}, {"a": None}, {"megaman": {}}))
    else:
        metadata[rng.choice(("megaman", "lora_adapter_metadata", "format"))] = rng.choice(ODD_JSON)


def _with_numbers(file: bytes, rng: random.Random) -> bytes:
    """The file with other numbers, written by safetensors itself."""
    from safetensors.torch import load

    size = int.from_bytes(file[:8], "little")
    tensors, metadata = load(file), json.loads(file[8 : 8 + size]).get("__metadata__")
    key = rng.choice([name for name in tensors if name.endswith("alpha")] * 4 + sorted(tensors))
    value = rng.choice((float("nan"), float("inf"), 0.0, -1.0, 1e30, 3e38, 1e-45))
    shape = rng.choice(
        (tensors[key].shape, (0,), (2,), (1, 1), (2, 2, 2), (0, 0), (RANK, 0), (0, RANK), (1, 1, 1, 1))
    )
    dtype = rng.choice(
        (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn)
    )
    tensors[key] = torch.full(shape, value, dtype=torch.float32).to(dtype)
    return save(tensors, metadata)


def mutated_adapters(count: int, seed: int, folder: Path, base: StableDiffusion) -> dict[str, float]:
    """Mutated files of all three layouts, read and merged as generation does; slow: over a second each."""
    rng, counts, slowest = random.Random(seed), Counter(adapters=count), 0.0
    files, config = (
        layouts_of(small_adapter(base)),
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 2}),
    )
    before, pristine = _peak_mib(), {name: p.detach().clone() for name, p in base.unet.named_parameters()}
    for _ in range(count):
        layout = rng.choice(sorted(files))
        path = folder / ("adapter_model.safetensors" if layout == "peft" else "lora.safetensors")
        odd_config = layout == "peft" and rng.random() < 0.3
        path.write_bytes(files[layout] if odd_config else mutated(files[layout], rng))
        (folder / "adapter_config.json").write_text(_odd_config(config, rng) if odd_config else config)
        started = time.monotonic()
        counts[_outcome(path, base)] += 1
        slowest = max(slowest, time.monotonic() - started)
        counts["slow"] += time.monotonic() - started > SLOW_S
    changed = any(not torch.equal(p, pristine[name]) for name, p in base.unet.named_parameters())
    known = {name: counts[name] for name in ("adapters", "crashes", "wrong_codes", "long_lines", "slow")}
    others = {name: n for name, n in counts.items() if name.startswith("crash: ")}
    figures = {"slowest_ms": round(1000 * slowest), "grown_mib": round(_peak_mib() - before)}
    return (
        known
        | {"changed_base": int(changed), "read": counts["read"], "refused": counts["refused"]}
        | others
        | figures
    )


def _odd_config(config: str, rng: random.Random) -> str:
    settings = json.loads(config)
    odd = (
        rng.choice(ODD_NUMBERS),
        "x",
        float("nan"),
        {"(": 1},
        {"(a+)+$|(.*.*.*.*)*x": 1},
        {".*": "x"},
        rng.choice(ODD_JSON),
    )
    settings[rng.choice(("lora_alpha", "alpha_pattern", "use_rslora", "r"))] = rng.choice(odd)
    return rng.choice((json.dumps(settings), json.dumps(settings)[: rng.randrange(60)], rng.choice(ODD_JSON)))


def _outcome(path: Path, base: StableDiffusion) -> str:
    """What becomes of an adapter on its way to the first picture."""
    try:
        adapter = read_adapter(path)
        generate_megaman.base_of(adapter, path, "megaman/tiny_sd")
        cfg = generate_megaman.resolve(generate_megaman.GenerateConfig(), adapter, base)
        generate_megaman.check_jobs(generate_megaman.make_jobs(cfg, [Prompt("a")]), base)
        merged = MergedAdapter(adapter, base.parts, SD1)
        merged.set_scale(1.0)
        merged.set_scale(0.0)
        return "read" if len(adapter.digest) == 12 else "crashes"
    except UserError as error:
        if "\n" in str(error) or len(str(error)) > len(str(path)) + 300:
            return "long_lines"
        return "refused" if error.exit_code in (Exit.MODEL, Exit.NUMBERS) else "wrong_codes"
    except Exception as error:
        return f"crash: {type(error).__name__}: {str(error)[:80]}"


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
