"""Faster ways through the UNet, taken only when asked for: other attention kernels, compiled blocks."""

from typing import TYPE_CHECKING, Literal

import torch

from megaman.errors import USAGE, UserError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

Attention = Literal["auto", "sdpa", "xformers"]


def choose_attention(unet: "UNet2DConditionModel", wanted: Attention) -> None:
    """auto and sdpa: torch's own kernels, which diffusers takes by itself. xformers: its kernels; UserError
    (exit 2) where they don't run, which its import alone does not tell.
    """
    if wanted != "xformers":
        return
    try:
        unet.enable_xformers_memory_efficient_attention()  # tries a kernel, and needs an NVIDIA card
    except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"--attention xformers: does not work here ({_in_short(error)}); leave it out",
            USAGE,
        ) from error


def compile_blocks(unet: "UNet2DConditionModel", device: torch.device) -> None:
    """Compiles the transformer blocks, one kind once for all. UserError (exit 2) where torch can't compile;
    it is tried first on a line of its own, since a failure in the first step would look like a bug.
    """
    try:
        torch.compile(lambda x: (x * 2 + 1).relu())(torch.ones(64, device=device))
    except Exception as error:  # inductor raises whatever its compilers and their wrappers raise
        reason = f"--compile: torch can't compile here ({_in_short(error)}); leave it out"
        raise UserError(reason, USAGE) from error
    unet.compile_repeated_blocks()


def _in_short(error: Exception) -> str:
    """The first line of what may be a page of a compiler's complaints."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
