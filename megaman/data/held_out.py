"""Which pictures of a data set are kept out of the training: a function of content, share and seed."""

from collections.abc import Sequence
from hashlib import sha256

FEWEST = 15  # pictures; of fewer every one is needed


def held_out_of(digests: Sequence[str], share: float, seed: int) -> frozenset[int]:
    """The indices of the pictures to keep out, about `share` of them; never all. Chosen by a hash of content
    and seed, so renaming a picture changes nothing and copies stay together.

    digests: of every picture's content.
    """
    wanted = round(share * len(digests)) if len(digests) >= FEWEST else 0
    chosen: set[int] = set()
    for digest in sorted(set(digests), key=lambda each: sha256(f"{seed}/{each}".encode()).digest()):
        if len(chosen) < wanted:
            chosen |= {index for index, other in enumerate(digests) if other == digest}
    return frozenset() if len(chosen) == len(digests) else frozenset(chosen)
