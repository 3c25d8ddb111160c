"""Where whole products are faster than torch's attention on a CPU: milliseconds forward and backward.

    python tests/bench/bench_attention.py

Of one layer at the sizes of Stable Diffusion 1.5 at 256 px (bfloat16) and of the embedded base (float32, ten
examples), in turn. Prints a line a size, then one JSON line.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from megaman.model.attention import MOST_WEIGHTS, attended  # noqa: E402

ROUNDS = 15
SIZES = {
    torch.bfloat16: [
        (1, 8, 1024, 1024, 40), (1, 8, 256, 256, 80), (1, 8, 64, 64, 160), (1, 8, 1024, 77, 40),
        (1, 8, 256, 77, 80), (1, 8, 64, 77, 160),
    ],
    torch.float32: [
        (10, 4, 256, 256, 16), (10, 4, 64, 64, 24), (10, 4, 16, 16, 32), (10, 4, 256, 77, 16),
        (10, 4, 64, 77, 24),
    ],
}  # examples, heads, tokens, tokens attended to, width of a head  # fmt: skip


def fused(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """As diffusers calls torch's kernel."""
    query, key, value = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value))
    return scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def seconds(attend: Callable[..., Tensor], inputs: list[Tensor], heads: int) -> float:
    """Of one pass forward and backward."""
    started = time.perf_counter()
    made = attend(*inputs, heads)
    torch.autograd.grad(made, inputs, torch.ones_like(made))
    return time.perf_counter() - started


def main() -> None:
    """Both ways in turn, size by size."""
    found = []
    for dtype, sizes in SIZES.items():
        for batch, heads, tokens, others, width in sizes:
            shapes = [(batch, count, heads * width) for count in (tokens, others, others)]
            inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
            times: dict[str, list[float]] = {"fused": [], "whole": []}
            for _ in range(ROUNDS):
                times["fused"].append(seconds(fused, inputs, heads))
                times["whole"].append(seconds(attended, inputs, heads))
            row = {name: round(1e3 * statistics.median(each), 3) for name, each in times.items()}
            taken = dtype == torch.bfloat16 and tokens * others <= MOST_WEIGHTS
            found.append({"size": [batch, heads, tokens, others, width], "dtype": str(dtype), **row})
            print(f"{str(dtype)[6:]:9} {found[-1]['size']}: {row} ms{', taken whole' if taken else ''}")
    threads = torch.get_num_threads()
    print(json.dumps({"bench": "attention", "torch": torch.__version__, "threads": threads, "ms": found}))


if __name__ == "__main__":
    main()
