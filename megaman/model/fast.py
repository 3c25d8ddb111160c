"""Faster ways through the UNet, taken only when asked for: other attention kernels, compiled blocks."""

from collections.abc import Callable
from typing import Literal

import torch
from diffusers import UNet2DConditionModel

from megaman.common.console import USAGE, UserError

Attention = Literal["auto", "sdpa", "xformers"]
RECOMPILATIONS = 256  # one a shape, in training, preview and validation; torch gives up after 8


def check(attention: Attention, compiled: bool, device: torch.device) -> None:
    """Tries what is asked for on a line of its own, before anything slow. UserError (exit 2) where it does
    not work, which an import alone does not tell.
    """
    if attention == "xformers":
        _try("--attention xformers: does not work here", lambda: _attend(device))
    if compiled:
        _try("--compile: torch can't compile here", lambda: _compile_a_line(device))


def _try(complaint: str, attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except Exception as error:  # kernels and compilers raise whatever they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{complaint} ({reason}); leave it out", USAGE) from error


def _attend(device: torch.device) -> None:
    from xformers.ops import memory_efficient_attention

    half = torch.float16 if device.type == "cuda" else torch.float32
    query = torch.ones((1, 8, 2, 16), device=device, dtype=half, requires_grad=True)
    memory_efficient_attention(query, query, query).sum().backward()


def _compile_a_line(device: torch.device) -> None:
    torch.compile(lambda x: (x * 2 + 1).relu())(torch.ones(64, device=device))


def speed_up(unet: UNet2DConditionModel, attention: Attention, compiled: bool) -> None:
    """Puts into force what `check` has tried. auto and sdpa: torch's own kernels, which diffusers takes by
    itself. Compiled are the transformer blocks.
    """
    if attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    if compiled:
        torch._dynamo.config.recompile_limit = RECOMPILATIONS
        unet.compile_repeated_blocks()
