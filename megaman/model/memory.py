"""What happens when memory runs out: in training activations are recomputed and batches become smaller, in
drawing batches only; then an honest end. How large a card is.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import dropwhile
from typing import Any, TypeVar

import torch

from megaman.common.console import Exit, UserError, is_out_of_memory, say
from megaman.common.kinds import Level

IN_WORDS: dict[Level, str] = {
    "feed-forwards": "feed-forwards are",
    "largest": "the largest blocks are",
    "largest and feed-forwards": "the largest blocks and all feed-forwards are",
    "two largest": "the blocks of the two largest sizes are",
    "two largest and feed-forwards": "the blocks of the two largest sizes and all feed-forwards are",
    "all": "all blocks are",
}
GIB = 2**30
LARGEST_SHARE = 0.9  # of a card: beyond, Windows moves memory to and fro, twenty times slower
S = TypeVar("S")
T = TypeVar("T")


def card_gib(device: torch.device) -> float | None:
    """The memory of a card; None of anything else."""
    return torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None


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


# ---------------------------------------------------------------- drawing
SMALLER_PICTURES = (
    "take smaller ones (--height and --width) or half precision (--mixed_precision fp16). What was drawn is "
    "kept."
)


class BatchLimit:
    """How many pictures are drawn, or encoded, at a time: as many as wanted, until memory runs out."""

    def __init__(self, remedy: str = SMALLER_PICTURES, gives_way: Callable[[], bool] = lambda: False) -> None:
        """remedy: what to tell the user when there is no room for a single one. gives_way: called when memory
        runs out; whether there is more of it now, so that as many are tried again.
        """
        self.remedy = remedy
        self.gives_way = gives_way
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
        if self.gives_way():
            return
        if count == 1:
            raise UserError(f"out of memory with one picture at a time; {self.remedy}", Exit.RESOURCES)
        self.pixels = count // 2 * pixels
        say(f"memory ran out with {count} pictures at a time: {count // 2} now; they come out the same")
