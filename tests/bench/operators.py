"""What a step is made of: its operators, its floating-point operations, its peak of memory, and the speed of
the machine's matrix products to hold it against.
"""

import ctypes
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench.setting import synchronize
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from megaman.common.kinds import UNET
from megaman.lora.injection import targets_of
from megaman.model.stable_diffusion import conditions
from megaman.training.objective import PRESERVE_EVERY
from megaman_lora import Run

GIB = 2**30
WIDTHS = {
    "double": 8, "long": 8, "long int": 8, "float": 4, "int": 4, "c10::Half": 2, "c10::BFloat16": 2,
    "unsigned char": 1, "signed char": 1, "bool": 1,
}  # fmt: skip  # bytes of an element, by the profiler's names of types
VIEWS = frozenset(
    (
        "as_strided", "view", "_unsafe_view", "_reshape_alias", "expand", "t", "transpose", "permute",
        "slice", "select", "unsqueeze", "squeeze", "detach", "alias", "empty", "empty_strided", "empty_like",
        "resize_", "item", "_local_scalar_dense", "is_nonzero",
    )
)  # fmt: skip  # of aten: they compute nothing, or make room only
SIDES = {"cpu": 1536, "cuda": 8192}  # of the square matrices whose product is timed


def profiled(step: Callable[[], None], rows: int) -> dict[str, Any]:
    """The operators of one step, those that take longest first, and how many there are of what.

    operators: name, milliseconds of its own, share, calls, MiB of its inputs. casts: copies into another
    type. kernels: what ran on the card, None without one.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    step()
    synchronize()
    with profile(activities=activities, record_shapes=True) as found:
        step()
        synchronize()
    events = found.profiler.kineto_results.events()  # which tell the types of inputs, in torch 2.11 too
    read: Counter[str] = Counter()
    copies = casts = 0
    for event in events:
        types = event.dtypes()
        for shape, kind in zip(event.shapes(), types, strict=False):
            read[event.name()] += WIDTHS.get(kind, 0) * torch.Size(shape).numel()
        if event.name() == "aten::copy_" and event.shapes()[0]:  # a single number costs nothing
            casts += types[0] != types[1]
            copies += types[0] == types[1]
    leaves = [event.name for event in found.events() if not event.cpu_children and "::" in event.name]
    computing = [name for name in leaves if name.removeprefix("aten::") not in VIEWS]
    on_card = [event for event in found.events() if event.device_type == DeviceType.CUDA]
    return {
        "operators": sum(not name.startswith("autograd::") for name in computing),
        "casts": casts,
        "copies": copies,
        "kernels": len(on_card) if torch.cuda.is_available() else None,
        "table": table_of(found, read)[:rows],
    }


def table_of(found: profile, read: Counter[str]) -> list[dict[str, Any]]:
    """Rows of the operators; of the kernels, where the card's time can't be traced back to operators."""
    averages = found.key_averages()
    called = [each for each in averages if each.device_type == DeviceType.CPU]
    ran = [each for each in averages if each.device_type == DeviceType.CUDA]
    times = {each.key: (each.self_cpu_time_total, each.count) for each in called}
    if ran:
        on_card = {each.key: (each.self_device_time_total, each.count) for each in called}
        kernels = {each.key: (each.self_device_time_total, each.count) for each in ran}
        told, whole = (sum(time for time, _ in one.values()) for one in (on_card, kernels))
        times = on_card if told > whole / 2 else kernels
    total = sum(time for time, _ in times.values()) or 1
    return [
        {
            "name": name[:60],
            "ms": round(time / 1000, 2),
            "share": round(time / total, 4),
            "calls": count,
            "mib": round(read[name] / 2**20, 1),
        }
        for name, (time, count) in sorted(times.items(), key=lambda item: -item[1][0])
    ]


# ---------------------------------------------------------------- floating-point operations
def step_flops(run: Run) -> int:
    """Floating-point operations of one step as torch counts them (a product and a sum are two) on a plain
    UNet with PEFT's LoRA on the same modules, on the meta device. The same for every way to compute it:
    nothing recomputed counts, nor the optimizer.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(run.base.unet.config).requires_grad_(False)
        names = targets_of(UNET, unet, run.cfg.lora_targets, run.base.kind)
        unet.add_adapter(LoraConfig(r=run.cfg.lora_rank, target_modules=names))
    latents = torch.empty((1, *run.encoded.shape_of(0)), device="meta")
    text = run.encoded.text[[0]].to("meta", torch.float32)
    added = conditions(text, run.encoded.sizes[[0]].to("meta"))

    def predict() -> Tensor:
        return unet(latents, torch.zeros(1, device="meta"), text.states, **added, return_dict=False)[0]

    with FlopCounterMode(display=False) as forward, torch.no_grad():
        predict()
    with FlopCounterMode(display=False) as both:
        predict().sum().backward()
    cfg = run.cfg
    examples = cfg.train_batch_size * cfg.gradient_accumulation_steps
    asking = examples / PRESERVE_EVERY if cfg.preserve_weight else 0  # are computed with the base alone too
    whole = (examples + asking) * both.get_total_flops() + asking * forward.get_total_flops()
    return round(whole)


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """The most floating-point operations a second that products of square matrices reach."""
    side = SIDES[device]
    one = torch.randn((side, side), device=device).to(dtype)
    fastest = float("inf")
    for _ in range(6):
        synchronize()
        started = time.perf_counter()
        for _ in range(repeats := 10 if device == "cuda" else 1):
            one @ one
        synchronize()
        fastest = min(fastest, (time.perf_counter() - started) / repeats)
    return 2 * side**3 / fastest


# ---------------------------------------------------------------- memory
def peak_memory(step: Callable[[], None]) -> dict[str, float | None]:
    """GiB: what was held before a step, the most during it, and the difference.

    On a card what torch has allocated, and what it has reserved for that; else what of this process is
    resident, read from Linux after it was told to forget the earlier peak. What is free is given back first,
    so that a step pays for all it takes.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / GIB
        step()
        synchronize()
        reserved = round(torch.cuda.max_memory_reserved() / GIB, 3)
        return _memory(before, torch.cuda.max_memory_allocated() / GIB) | {"reserved_gib": reserved}
    if sys.platform != "linux":
        return {"before_gib": None, "peak_gib": None, "growth_gib": None}
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak begins anew
    before = _resident_gib("VmRSS")
    step()
    return _memory(before, _resident_gib("VmHWM"))


def _memory(before: float, peak: float) -> dict[str, float | None]:
    numbers = {"before_gib": before, "peak_gib": peak, "growth_gib": peak - before}
    return {name: round(value, 3) for name, value in numbers.items()}


def _resident_gib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20
