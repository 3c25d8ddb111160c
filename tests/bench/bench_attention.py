"""Where few products are faster than torch's attention in bfloat16: milliseconds forward and backward.

    python tests/bench/bench_attention.py

Of one layer at the sizes of Stable Diffusion 1.5 at 256 and 512 px, in turn. Prints a line a size, then one
JSON line.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from bench.setting import machine  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from megaman.kernels import heap  # noqa: E402
from megaman.kernels.attention import attend  # noqa: E402

ROUNDS, WARM_UP = 15, 3
SIZES = [
    (1, 8, 1024, 1024, 40), (1, 8, 1024, 77, 40), (1, 8, 256, 256, 80), (1, 8, 256, 77, 80),
    (1, 8, 64, 64, 160), (1, 8, 64, 77, 160), (1, 8, 16, 16, 160), (1, 8, 16, 77, 160),
    (1, 8, 4096, 4096, 40), (1, 8, 4096, 77, 40), (2, 8, 1024, 1024, 40), (2, 8, 1024, 77, 40),
]  # pictures, heads, tokens, tokens attended to, width of a head  # fmt: skip
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def seconds(way: Way, inputs: list[Tensor], heads: int) -> float:
    """Of one pass there and back, as diffusers calls it."""
    started = time.perf_counter()
    made = way(*(each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in inputs))
    made = made.transpose(1, 2).flatten(2)
    torch.autograd.grad(made, inputs, torch.ones_like(made))
    return time.perf_counter() - started


def main() -> None:
    """Both ways in turn, size by size."""
    heap.keep_freed_memory()
    ways: dict[str, Way] = {"torch": scaled_dot_product_attention, "ours": attend}
    found = []
    for size in SIZES:
        pictures, heads, tokens, others, width = size
        shapes = [(pictures, count, heads * width) for count in (tokens, others, others)]
        inputs = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                times[name].append(seconds(way, inputs, heads))
        row = {name: round(1e3 * statistics.median(each[WARM_UP:]), 3) for name, each in times.items()}
        found.append({"size": size, **row})
        print(f"{size}: {row} ms", flush=True)
    print(json.dumps({"bench": "attention", **machine("cpu"), "ms": found}))


if __name__ == "__main__":
    main()
