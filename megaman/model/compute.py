"""Where and how a model computes: device, precision, kernels, compiled blocks. Knows torch's devices and
accelerate.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import diffusers
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, gather_object
from diffusers import UNet2DConditionModel
from torch import Tensor

from megaman.common.console import Exit, UserError, is_out_of_memory, say
from megaman.config.train import Attention
from megaman.kernels import products

T = TypeVar("T")
# Where float16 trains, under a scaler of the gradients. On a CPU it works too, but several times slower than
# float32, so no user gets it there; tests add "cpu" and run all of that path without a card.
FP16_DEVICES = frozenset({"cuda"})


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
            Exit.USAGE,
        )
    return torch.device(wanted)


def _has_nvidia_card() -> bool:
    windows = Path(os.environ.get("SYSTEMROOT", "C:/Windows"), "System32", "nvidia-smi.exe")
    return Path("/proc/driver/nvidia/version").exists() or (os.name == "nt" and windows.exists())


def _cuda_remedy() -> str:
    return "README, «Windows with an NVIDIA card», has the line that installs torch with CUDA."


WAY = 3  # raised whenever a step or a picture comes out otherwise in its last digits


def digits_of(device: torch.device) -> str:
    """What decides a computation's last digits beside its numbers, in words: libraries, device, threads and
    the way that this program computes.
    """
    is_card = device.type == "cuda"
    kind = torch.cuda.get_device_name(device) if is_card else torch.backends.cpu.get_cpu_capability()
    libraries = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    way = f"{WAY}{' by oneDNN' if products.prefers_onednn() and not is_card else ''}"
    return f"{libraries}, {device.type} {kind}, {torch.get_num_threads()} threads, kernels {way}"


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The precision of the frozen weights for --mixed_precision fp16, bf16, no or auto; says so when the
    device can't do what was asked.
    """
    if wanted == "auto":
        wanted = "fp16" if device.type == "cuda" else "no"
    if wanted == "fp16" and device.type not in FP16_DEVICES:
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
    """Makes accelerate's Accelerator for this process.

    Only fp16 asks anything of it: a gradient scaler. The base is in half precision already, so no
    autocast.
    """
    AcceleratorState._reset_state()  # a program may train twice, in another precision
    accelerator = Accelerator(
        mixed_precision="fp16" if dtype == torch.float16 else "no",
        cpu=device.type == "cpu",
        kwargs_handlers=[AutocastKwargs(enabled=False)],
    )
    if dtype == torch.float16 and accelerator.scaler is None and device.type in FP16_DEVICES:
        accelerator.scaler = torch.amp.GradScaler(device.type)  # accelerate makes none on a CPU
        accelerator.native_amp = True  # and would not unscale gradients there
    return accelerator


def start(mixed_precision: str) -> tuple[Accelerator, torch.dtype]:
    """Picks device and precision; returns the Accelerator and the precision of the frozen weights."""
    device = pick_device()
    dtype = pick_dtype(mixed_precision, device)
    return new_accelerator(device, dtype), dtype


def end(accelerator: Accelerator) -> None:
    """Waits for all processes, frees what accelerate has wrapped, and then the group of processes."""
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.end_training()


def wait_for(device: torch.device) -> None:
    """Waits until a device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_agreed(asked: bool, accelerator: Accelerator) -> bool:
    """Whether any of the processes asked; all get the same answer. Several wait for each other here."""
    if accelerator.num_processes == 1:
        return asked
    return accelerator.reduce(torch.tensor(float(asked), device=accelerator.device), "sum").item() > 0


def said_by_all(fact: T, accelerator: Accelerator | None) -> list[T]:
    """What each process says, in their order. Several wait for each other here."""
    if accelerator is None or accelerator.num_processes == 1:
        return [fact]
    return gather_object([fact])


@contextmanager
def failing_together(accelerator: Accelerator | None) -> Iterator[None]:
    """Inside the block a process may fail alone, by a UserError or for want of memory: then all of them end,
    with its exit code, and the first one says why. Several wait for each other at its end.
    """
    if accelerator is None or accelerator.num_processes == 1:
        yield
        return
    problem = None
    try:
        yield
    except UserError as error:
        problem = (error.problems, error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        problem = ((f"process {accelerator.process_index} is out of memory",), Exit.RESOURCES)
    problems = [each for each in said_by_all(problem, accelerator) if each is not None]
    if problems:
        if accelerator.is_main_process:
            raise UserError(*problems[0])
        raise SystemExit(problems[0][1])


def smallest(gib: float | None, accelerator: Accelerator) -> float | None:
    """The least of all processes' cards, so that all decide alike; None unless each has one."""
    if accelerator.num_processes == 1:
        return gib
    each = accelerator.gather(torch.tensor([gib or 0.0], device=accelerator.device))
    return each.min().item() or None


def side_by_side(tensors: Sequence[Tensor], accelerator: Accelerator) -> Tensor | None:
    """A copy of the tensors in one row, for `add_up`; None where one process is alone."""
    return torch.cat([each.flatten() for each in tensors]) if accelerator.num_processes > 1 else None


def add_up(tensors: Sequence[Tensor], row: Tensor | None) -> None:
    """Puts into each tensor the sum of all processes' in its place, by one exchange. row: they in one, from
    `side_by_side`; None leaves them as they are.
    """
    if row is not None:
        torch.distributed.all_reduce(row)
        sums = row.split([each.numel() for each in tensors])
        for each, total in zip(tensors, sums, strict=True):
            each.copy_(total.view(each.shape))


# ---------------------------------------------------------------- kernels
RECOMPILATIONS = 256  # one a shape, in training, preview and validation; torch gives up after 8


def try_out(attention: Attention, compiled: bool, device: torch.device) -> None:
    """Tries what is asked for on a line of its own, before anything slow. UserError (exit 2) where it does
    not work, which an import alone does not tell.
    """
    if attention == "xformers":
        _try("--attention xformers: does not work here", lambda: _run_xformers_once(device))
    if compiled:
        _try("--compile: torch can't compile here", lambda: _compile_a_line(device))


def _try(complaint: str, attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except Exception as error:  # kernels and compilers raise whatever they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{complaint} ({reason}); leave it out", Exit.USAGE) from error


def _run_xformers_once(device: torch.device) -> None:
    from xformers.ops import memory_efficient_attention

    half = torch.float16 if device.type == "cuda" else torch.float32
    query = torch.ones((1, 8, 2, 16), device=device, dtype=half, requires_grad=True)
    memory_efficient_attention(query, query, query).sum().backward()


def _compile_a_line(device: torch.device) -> None:
    torch.compile(lambda x: (x * 2 + 1).relu())(torch.ones(64, device=device))


def apply_kernels(unet: UNet2DConditionModel, attention: Attention, compiled: bool) -> None:
    """Puts into force what `try_out` has tried. auto and sdpa: torch's own kernels, which diffusers takes by
    itself (beside which auto has `kernels.attention` on a CPU). Compiled are the transformer blocks.
    """
    if attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    if compiled:
        torch._dynamo.config.recompile_limit = RECOMPILATIONS
        unet.compile_repeated_blocks()
