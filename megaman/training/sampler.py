"""The order of the training pictures: what a step trains on is a pure function of (seed, step), so no
generator's state is ever kept.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch


def generator_of(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator that depends on (seed, purpose, number) alone: the same after a resume, on every device."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def seed_dropout(seed: int, position: int) -> None:
    """Makes the dropout masks of the next forward pass functions of where its first example stands: PEFT
    draws them from torch's own generators, module after module. Two examples at once get other masks than
    one after the other.
    """
    torch.manual_seed(generator_of(seed, "dropout", position).initial_seed())


class Position(NamedTuple):
    """One example of the endless stream: its position decides all its randomness."""

    number: int  # in the endless stream of examples
    picture: int  # its index in the dataset


@dataclass(frozen=True)
class Sampler:
    """The endless stream of examples. Every epoch holds each picture as often as it repeats, in an order of
    its own; the examples of one step come from one bucket, so the last step of a bucket may be short.
    """

    buckets: tuple[tuple[int, ...], ...]  # the pictures of each bucket, each as often as it repeats
    step_size: int  # examples a step, all processes together
    seed: int

    def __len__(self) -> int:
        """Examples an epoch."""
        return sum(len(bucket) for bucket in self.buckets)

    @property
    def steps_an_epoch(self) -> int:
        """Optimizer steps an epoch; a short one counts too."""
        return sum(-(-len(bucket) // self.step_size) for bucket in self.buckets)

    def batch(self, step: int) -> list[Position]:
        """The examples of an optimizer step, counted from 0."""
        epoch, number = divmod(step, self.steps_an_epoch)
        return _epoch(self, epoch)[number]


@lru_cache(maxsize=2)  # the epoch that ends and the one that begins
def _epoch(sampler: Sampler, epoch: int) -> list[list[Position]]:
    generator = generator_of(sampler.seed, "epoch", epoch)
    steps = []
    for bucket in sampler.buckets:
        order = [bucket[i] for i in torch.randperm(len(bucket), generator=generator).tolist()]
        steps += [order[i : i + sampler.step_size] for i in range(0, len(order), sampler.step_size)]
    shuffled = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
    numbers = itertools.count(epoch * len(sampler))
    return [[Position(next(numbers), index) for index in step] for step in shuffled]


def micro_batches(
    positions: Sequence[Position], rank: int, processes: int, batch: int
) -> list[Sequence[Position]]:
    """One process's micro-batches of a step: processes cut each between them, so two are one with twice the
    batch. A process may go without in the last one, but all have equally many.
    """
    starts = range(0, len(positions), batch * processes)
    return [
        positions[start + rank * batch : min(start + (rank + 1) * batch, len(positions))] for start in starts
    ]
