"""What a run does when memory runs out: smaller batches, then recomputed activations, then an honest end."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from megaman.errors import RESOURCES, UserError, is_out_of_memory, say

T = TypeVar("T")


@dataclass
class Room:
    """How much of a step is computed at a time. Part of a checkpoint, so a resumed run need not find out
    again.
    """

    batch: int  # examples at a time on each device
    checkpointing: bool  # activations are recomputed

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Room":
        """The room that a checkpoint's run had found."""
        return cls(facts["batch"], facts["checkpointing"])

    def facts(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def shrink(self, step: int) -> None:
        """Takes the next smaller setting and says so. UserError (exit 6) when there is none."""
        if self.batch > 1:
            self.batch //= 2
            say(f"memory ran out at step {step + 1}: {self.batch} at a time now; the result is the same")
        elif not self.checkpointing:
            self.checkpointing = True
            say(f"memory ran out at step {step + 1}: --gradient_checkpointing is on now; steps take longer")
        else:
            raise UserError(
                f"out of memory at step {step + 1}, with one picture at a time and --gradient_checkpointing; "
                "try --resolution 384, --mixed_precision fp16 or --lora_rank 4",
                RESOURCES,
            )


def within(room: Room, attempt: Callable[[], T], adapt: Callable[[], None], step: int) -> T:
    """What `attempt` returns, tried again with less room each time that memory runs out. adapt: undoes a
    half-done attempt and puts the new room into force.
    """
    while True:
        try:
            return attempt()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        room.shrink(step)
        adapt()
        gc.collect()  # the failed attempt's activations hung in its traceback
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
