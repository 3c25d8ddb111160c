"""The order of the training pictures: what a step trains on is a pure function of (seed, step), so no
generator's state is ever kept.
"""

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

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


ORDER = "the order of the pictures"  # one of a run's origins


class Position(NamedTuple):
    """One example of the endless stream: its position decides all its randomness."""

    number: int  # in the endless stream of examples
    picture: int  # its index in the dataset


@dataclass(frozen=True)
class Sampler:
    """The endless stream of examples, and the steps that it is cut into.

    A step takes its full number from one bucket. Each bucket is an endless stream of its own: pass after pass
    over its pictures, every pass in another order; a bucket smaller than a step gives its pictures again,
    under other noise. The buckets take turns, so that at any time all pictures have been seen equally often,
    up to one step of their bucket.
    """

    buckets: tuple[tuple[int, ...], ...]  # the pictures of each bucket, each as often as it repeats
    step_size: int  # examples a step, all processes together
    seed: int

    def __len__(self) -> int:
        """Examples of one pass over all pictures."""
        return sum(len(bucket) for bucket in self.buckets)

    @property
    def origins(self) -> dict[str, Any]:
        """What a resume must find unchanged. The order's name is None where it is the one that there always
        was, also in earlier versions.
        """
        is_as_ever = len(self.buckets) == 1 and len(self) % self.step_size == 0
        return {
            "pictures a step": self.step_size,
            ORDER: None if is_as_ever else "whole steps, bucket by bucket in turns",
        }

    def batch(self, step: int) -> list[Position]:
        """The examples of an optimizer step, counted from 0."""
        turns = _turns(tuple(len(bucket) for bucket in self.buckets))
        rounds, at = divmod(step, len(turns))
        bucket, before = turns[at]
        pictures = self.buckets[bucket]
        a_round = len(pictures) * len(turns) // len(self)  # steps that the bucket has in each
        first = (rounds * a_round + before) * self.step_size
        number = step * self.step_size
        return [Position(number + i, pictures[self._place(bucket, first + i)]) for i in range(self.step_size)]

    def _place(self, bucket: int, number: int) -> int:
        """Which of a bucket's pictures stands at this place of its stream."""
        size = len(self.buckets[bucket])
        passes, at = divmod(number, size)
        return _pass(self.seed, passes * len(self.buckets) + bucket, size, self.step_size)[at]


@lru_cache(maxsize=64)  # of every bucket the pass that ends and the one that begins
def _pass(seed: int, number: int, count: int, step_size: int) -> list[int]:
    """The order of one pass over a bucket of so many pictures. number: of the pass, over all buckets."""
    generator = generator_of(seed, "epoch", number)
    order = torch.randperm(count, generator=generator).tolist()
    parts = [order[i : i + step_size] for i in range(0, count, step_size)]
    # Dealt once more in steps, as runs of earlier versions were: theirs go on to the same bytes.
    return [place for i in torch.randperm(len(parts), generator=generator).tolist() for place in parts[i]]


@lru_cache(maxsize=2)
def _turns(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Whose turn each step is, for one round, after which all begins again: the bucket, and how many steps it
    has had in this round before.

    A bucket's k-th step, from 0, may come from step k * total / size on, and must have come by step
    (k + 1) * total / size. Of those that may come, the one that must come first is taken: that keeps to every
    one of these windows. Baruah et al. 1996, "Proportionate progress".
    """
    common = math.gcd(*sizes)
    shares = [size // common for size in sizes]
    total = sum(shares)
    had = [0] * len(shares)
    waiting = [(0, bucket) for bucket in range(len(shares))]  # by the step from which on they may come
    ready: list[tuple[int, int]] = []  # by the step by which they must have come
    turns = []
    for step in range(total):
        while waiting and waiting[0][0] <= step:
            _, bucket = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(had[bucket] + 1) * total // shares[bucket]), bucket))
        _, bucket = heapq.heappop(ready)
        turns.append((bucket, had[bucket]))
        had[bucket] += 1
        heapq.heappush(waiting, (had[bucket] * total // shares[bucket], bucket))
    return turns


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
