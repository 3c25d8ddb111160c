"""Where a model computes and in which precision. Knows torch's devices and accelerate."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs

from megaman.common.console import USAGE, UserError, say


def pick_device(wanted: str = "auto") -> torch.device:
    """cuda, else mps, else cpu; says so when an NVIDIA card lies idle under a torch without CUDA."""
    cards = torch.cuda.device_count()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if wanted == "auto":
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            return torch.device("cpu")  # `accelerate launch --cpu` says so
        if torch.cuda.is_available():
            return torch.device("cuda", min(local_rank, cards - 1))
        if torch.backends.mps.is_available():
            return torch.device("mps")
        if torch.version.cuda is None and _has_nvidia_card():
            say(
                f"warning: there is an NVIDIA card, but this torch ({torch.__version__}) was built without "
                f"CUDA. {_cuda_remedy()}"
            )
        return torch.device("cpu")
    known = {"cpu": True, "mps": torch.backends.mps.is_available(), "cuda": cards > 0}
    known |= {f"cuda:{number}": True for number in range(cards)}
    if not known.get(wanted, False):
        here = ", ".join(name for name, is_there in known.items() if is_there)
        raise UserError(
            f"--device {wanted}: not here; this torch ({torch.__version__}) finds {here}. {_cuda_remedy()}",
            USAGE,
        )
    return torch.device(wanted)


def _has_nvidia_card() -> bool:
    windows = Path(os.environ.get("SYSTEMROOT", "C:/Windows"), "System32", "nvidia-smi.exe")
    return Path("/proc/driver/nvidia/version").exists() or (os.name == "nt" and windows.exists())


def _cuda_remedy() -> str:
    return "README, «Windows with an NVIDIA card», has the line that installs torch with CUDA."


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The precision of the frozen weights for --mixed_precision fp16, bf16, no or auto; says so when the
    device can't do what was asked.
    """
    if wanted == "auto":
        wanted = "fp16" if device.type == "cuda" else "no"
    if wanted == "fp16" and device.type != "cuda":
        say(f"mixed_precision: fp16 needs an NVIDIA card; float32 is used on this {device.type}.")
        wanted = "no"
    if wanted == "bf16" and device.type == "mps":
        say("mixed_precision: bf16 is not used on mps; float32 is.")
        wanted = "no"
    if (
        wanted == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        say("mixed_precision: this card has no bf16; fp16 is used.")
        wanted = "fp16"
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[wanted]


def new_accelerator(device: torch.device, dtype: torch.dtype) -> Accelerator:
    """accelerate's view of this process.

    Only fp16 asks anything of it: a gradient scaler. The base is in half precision already, so no
    autocast.
    """
    AcceleratorState._reset_state()  # a program may train twice, in another precision
    return Accelerator(
        mixed_precision="fp16" if dtype == torch.float16 else "no",
        cpu=device.type == "cpu",
        kwargs_handlers=[AutocastKwargs(enabled=False)],
    )


def is_agreed(asked: bool, accelerator: Accelerator) -> bool:
    """Whether any process asked: all of them get the same answer. Several wait for each other for it."""
    if accelerator.num_processes == 1:
        return asked
    return accelerator.reduce(torch.tensor(float(asked), device=accelerator.device), "sum").item() > 0
