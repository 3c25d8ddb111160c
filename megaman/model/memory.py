"""How memory is used again, and what happens when it runs out: in training activations are recomputed and
batches become smaller, in drawing batches only; then an honest end.
"""

import ctypes
import gc
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import dropwhile
from typing import Any, TypeVar

import torch
from torch import Tensor

from megaman.common.console import Exit, UserError, is_out_of_memory, say
from megaman.common.kinds import Level, StepCost, kind_of_width
from megaman.config.train import TrainConfig
from megaman.model.stable_diffusion import StableDiffusion

IN_WORDS: dict[Level, str] = {
    "feed-forwards": "feed-forwards are",
    "largest": "the largest blocks are",
    "largest and feed-forwards": "the largest blocks and all feed-forwards are",
    "two largest": "the blocks of the two largest sizes are",
    "two largest and feed-forwards": "the blocks of the two largest sizes and all feed-forwards are",
    "all": "all blocks are",
}
S = TypeVar("S")
T = TypeVar("T")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Lets glibc's malloc keep freed blocks for the next tensor; elsewhere it does nothing.

    Left alone it gives each large block back to Linux, and every step on a CPU pays for clearing the pages
    anew. Changes no result. (mallopt(3).)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest it takes: up to 32 MiB blocks come from the heap
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)  # of which it gives nothing back under 1 GiB


@dataclass
class MemoryPlan:
    """How a step is cut to fit memory. Saved in checkpoints: a resumed run starts with what fitted."""

    batch: int  # examples at a time on each device
    recomputed: Level = "nothing"

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "MemoryPlan":
        """The plan that a checkpoint's run had found. Earlier versions knew all or nothing."""
        earlier = "all" if facts.get("checkpointing") else "nothing"
        return cls(facts["batch"], facts.get("recomputed", earlier))

    def facts(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def shrink(self, step: int, levels: Sequence[Level]) -> None:
        """Takes the next smaller setting and says so. UserError (exit 6) when there is none.

        levels: that the base has, from cheap to dear. Most add less to a step than its other half as a batch
        of its own does, and change no bit of it; the last one is the dearest way of all.
        """
        more = list(dropwhile(lambda level: level != self.recomputed, levels))[1:]
        ran_out = f"memory ran out at step {step + 1}"
        if len(more) > 1 or (more and self.batch == 1):
            self.recomputed = more[0]
            say(f"{ran_out}: {IN_WORDS[self.recomputed]} recomputed now; steps take longer")
        elif self.batch > 1:
            self.batch //= 2
            say(f"{ran_out}: {self.batch} at a time now, as many pictures a step")
        else:
            raise UserError(
                f"out of memory at step {step + 1}, with one picture at a time and --gradient_checkpointing; "
                "try --resolution 384, --mixed_precision fp16 or --lora_rank 4",
                Exit.RESOURCES,
                is_of_all=True,
            )


def retry_with_less_memory(
    attempt: Callable[[], T], shrink: Callable[[], object], is_agreed: Callable[[bool], bool] = bool
) -> T:
    """What `attempt` returns, tried again each time that memory runs out.

    shrink: called before each retry, to drop what is half made and ask for less; UserError where that can't
    be. is_agreed: of several processes, whether any ran out, so that all try again; an attempt must not wait
    for the others.
    """
    while True:
        made = _tried(attempt)
        if not is_agreed(not made):
            return made[0]
        made.clear()
        shrink()
        _collect()


def _tried(attempt: Callable[[], T]) -> list[T]:
    """What `attempt` returns, alone in a list; an empty one if memory ran out."""
    try:
        return [attempt()]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    _collect()  # to tell others of it takes memory too
    return []


def _collect() -> None:
    gc.collect()  # the failed attempt's activations hung in its traceback
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- before the first step
RECOMPUTED_TEXT = 0.15  # of what encoders in training keep, where everything is recomputed
BY_PEFT = 1.35  # times what our own LoRA layers keep: those of PEFT, which some forms take
OF_DORA, OF_DORA_CONVOLUTIONS = 1.8, 2.5  # the same of DoRA
IN_FLOAT32 = 1.6  # times what half precision keeps: it keeps some of it twice
BESIDE_GIB = 0.09  # workspaces of the kernels
BYTES_A_PARAMETER = 16  # of the adapter: itself, its gradient, two moments, float32
LARGEST_SHARE = 0.9  # of a card: beyond, Windows moves memory to and fro, twenty times slower
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """What training takes at its peak, in GiB, as torch counts it (the driver takes about 0.5 more)."""

    base: float  # its frozen parts that stay on the device
    adapter: float  # with gradients and the optimizer's moments
    steps: Mapping[Level, float]  # what is kept of the pictures between forward and backward, by level
    added: Mapping[Level, float]  # computing, in percent
    is_checkpointed: bool  # with --gradient_checkpointing
    has_bytes: bool  # whether the base is in int8 already, or can't be

    def total(self, level: Level) -> float:
        """All together, with so much recomputed."""
        return self.base + self.adapter + BESIDE_GIB + self.steps[level]

    def level_for(self, card_gib: float | None) -> Level:
        """The cheapest level with which a card holds it; of an unknown one, and where none does, all."""
        room = 0 if card_gib is None else LARGEST_SHARE * card_gib
        return next((level for level in self.steps if self.total(level) <= room), "all")

    def line(self, card_gib: float | None, level: Level) -> str:
        """What to tell before the first step. card_gib: of the card that it runs on, if there is one."""
        total = self.total(level)
        told = (
            f"memory: about {total:.1f} GiB at the peak (computed: base {self.base:.1f}, adapter "
            f"{self.adapter:.1f}, step {self.steps[level]:.1f}{self._in_words(level)})"
        )
        ways = self._ways_to_less(level)
        if card_gib is not None and total > LARGEST_SHARE * card_gib:
            return f"{told}, which this card of {card_gib:.1f} GiB hardly holds{ways and f'; {ways}'}"
        return f"{told}{ways and f'; for a smaller card: {ways}'}"

    def _in_words(self, level: Level) -> str:
        """What is recomputed, if something is or was asked for."""
        if level == "nothing":
            return "; no activation need be recomputed" if self.is_checkpointed else ""
        return f"; {IN_WORDS[level]} recomputed, {self.added[level]:.0f} % more computing"

    def _ways_to_less(self, level: Level) -> str:
        """The flags that take less, and what then remains."""
        left = self.total(level)
        ways = []
        if level != "all":
            left = self.total("all")
            way = "all blocks recomputed" if self.is_checkpointed else "--gradient_checkpointing"
            ways.append(f"{way} ({left:.1f})")
        if not self.has_bytes:
            left -= self.base / 2
            ways.append(f"--base_weights int8 ({left:.1f})")
        return ", then ".join(ways)


def levels_of(base: StableDiffusion, cfg: TrainConfig) -> list[Level]:
    """What of this base's UNet can be recomputed, from cheap to dear, each with less memory than the one
    before: all or nothing, where nobody has counted what lies between. Compiled blocks are recomputed whole.
    """
    kind = kind_of_width(base.unet.config.cross_attention_dim)
    if kind is None:
        return ["nothing", "all"]
    levels: list[Level] = []
    least = math.inf
    for level, cost in kind.steps.items():
        keeps = cost.gib(cfg.lora_targets)
        if keeps < least and not (cfg.compile and "feed-forwards" in level):
            levels.append(level)
            least = keeps
    return levels


def estimate_of(
    base: StableDiffusion, trained: Iterable[Tensor], cfg: TrainConfig, batch: int, chunks: int = 1
) -> Estimate | None:
    """The memory that a run takes with so many pictures at a time; None for a base of another shape than its
    kind's, which nobody has counted. trained: the adapter's parameters. chunks: of 75 tokens, that
    the longest caption has.
    """
    kind = kind_of_width(base.unet.config.cross_attention_dim)
    if kind is None:
        return None
    parameters = {id(each): each for part in base.parts.values() for each in part.parameters()}
    own = {id(each): each for each in trained}
    frozen = sum(each.numel() * each.element_size() for key, each in parameters.items() if key not in own)
    adapter = sum(each.numel() for each in own.values()) * BYTES_A_PARAMETER
    examples = batch * (1 + bool(cfg.preserve_weight))
    precision = IN_FLOAT32 if base.unet.dtype == torch.float32 else 1.0
    if cfg.use_dora:
        precision *= OF_DORA_CONVOLUTIONS if cfg.lora_targets == "conv" else OF_DORA
    elif cfg.lora_dropout or cfg.compile:
        precision *= BY_PEFT
    size = (cfg.side_px / 1024) ** 2
    text = chunks * kind.text_gib if cfg.text_encoder_lr else 0.0
    costs = {level: kind.steps[level] for level in levels_of(base, cfg)}

    def gib(level: Level, cost: StepCost) -> float:
        kept = RECOMPUTED_TEXT * text if level == "all" else text
        return examples * precision * (size * cost.gib(cfg.lora_targets) + kept)

    return Estimate(
        base=frozen / GIB,
        adapter=adapter / GIB,
        steps={level: gib(level, cost) for level, cost in costs.items()},
        added={level: cost.added for level, cost in costs.items()},
        is_checkpointed=cfg.gradient_checkpointing,
        has_bytes=cfg.base_weights == "int8" or cfg.use_dora,
    )


def card_gib(device: torch.device) -> float | None:
    """The memory of a card; None of anything else."""
    return torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None


# ---------------------------------------------------------------- drawing
DECODING_GIB = 4.9  # that the VAE takes for a picture of 1024 x 1024, float32


def is_crowded(base: StableDiffusion, pixels: int) -> bool:
    """Whether the card is too small for all of the base's parts at once and a picture of so many pixels."""
    card = card_gib(base.device)
    parts = (base.vae, *base.parts.values())
    size = sum(each.numel() * each.element_size() for part in parts for each in part.parameters())
    return card is not None and size / GIB + DECODING_GIB * pixels / 2**20 > LARGEST_SHARE * card


SMALLER_PICTURES = (
    "take smaller ones (--height and --width) or half precision (--mixed_precision fp16). What was drawn is "
    "kept."
)


class BatchLimit:
    """How many pictures are drawn, or encoded, at a time: as many as wanted, until memory runs out."""

    def __init__(self, remedy: str = SMALLER_PICTURES) -> None:
        """remedy: what to tell the user when there is no room for a single one."""
        self.remedy = remedy
        self.pixels: int | None = None  # at a time, once more were known to be too many

    def drawn(self, batch: Sequence[S], draw: Callable[[Sequence[S]], list[T]], pixels: int) -> list[T]:
        """What `draw` makes of the batch, in as many parts as the memory asks for (it is said).

        pixels: of one picture. UserError (exit 6) when there is no room for a single one.
        """
        made: list[T] = []

        def part() -> Sequence[S]:
            most = len(batch) if self.pixels is None else max(1, self.pixels // pixels)
            return batch[len(made) : len(made) + most]

        while len(made) < len(batch):
            made += retry_with_less_memory(lambda: draw(part()), lambda: self._halve(len(part()), pixels))
        return made

    def _halve(self, count: int, pixels: int) -> None:
        if count == 1:
            raise UserError(f"out of memory with one picture at a time; {self.remedy}", Exit.RESOURCES)
        self.pixels = count // 2 * pixels
        say(f"memory ran out with {count} pictures at a time: {count // 2} now; they come out the same")
