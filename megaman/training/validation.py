"""Pictures that are kept out of the training: the loss on them tells when the others are learned by heart."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from megaman.common.console import one_line, say

FEWEST = 15  # pictures; of fewer every one is needed
TIMESTEPS = (200, 400, 600, 800)  # of 1000, where the loss is measured: kohya's own
NAMED = 5  # in the line that says so


def held_out(dataset: Any, share: float, seed: int) -> frozenset[int]:
    """The indices of the pictures to keep out, about `share` of them, which is said: those whose contents,
    mixed with the seed, come first in line. So a picture's fate does not hang on its name, and copies of one
    share it.

    dataset: the training script's MegaManDataset.
    """
    digests = [fact.digest for fact in dataset.facts]
    wanted = round(share * len(digests)) if len(digests) >= FEWEST else 0
    chosen: set[int] = set()
    for digest in sorted(set(digests), key=lambda each: sha256(f"{seed}/{each}".encode()).digest()):
        if len(chosen) < wanted:
            chosen |= {index for index, other in enumerate(digests) if other == digest}
    if not chosen or len(chosen) == len(digests):
        return frozenset()
    names = [one_line(dataset.paths[index].name) for index in sorted(chosen)]
    shown = f"{', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''}"
    say(f"validation: {len(names)} kept out of the training (--validation_split): {shown}")
    return frozenset(chosen)


@dataclass
class Best:
    """The checkpoint with the smallest loss on the pictures that are kept out. Part of every checkpoint."""

    step: int | None = None
    loss: float | None = None
    latest: tuple[int, float] | None = None  # step and loss of the last measurement

    def saved(self, step: int) -> "Best":
        """A checkpoint is made after `step` steps; returns itself."""
        measured = self.latest is not None and self.latest[0] == step
        if measured and (self.loss is None or self.latest[1] < self.loss):
            self.step, self.loss = self.latest
        return self

    def tell(self, total: int, checkpoints: Path) -> None:
        """Says where the adapter was better than it is at the end."""
        if self.step is not None and self.step < total:
            folder = checkpoints / f"step-{self.step:06}"
            say(f"note: the smallest validation loss, {self.loss:.4f}, was at step {self.step}; see {folder}")
