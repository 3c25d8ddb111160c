"""Where a frozen convolution gains by being a product of matrices: torch's way, laid out once, as a product.

    python tests/bench/bench_convolutions.py [--precision no|bf16] [--rounds 8]

For sizes of Stable Diffusion 1.5's UNet, a line each: milliseconds forward and back to the input of the three
ways, in turn, each call with another weight, as in a UNet, where none is in the processor's cache. The limits
of megaman/kernels/convolutions.py and onednn.py follow from it. Prints a table, then one JSON line.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from bench.plain_loops import DTYPES  # noqa: E402
from bench.setting import machine  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.grad import conv2d_input  # noqa: E402

from megaman.kernels import convolutions, onednn  # noqa: E402

LAYERS = 5  # of a size, that take turns
SIZES = (
    (1, 1280, 1280, 4, 1),
    (1, 2560, 1280, 4, 1),
    (1, 1280, 1280, 8, 1),
    (1, 1280, 1280, 8, 2),
    (1, 2560, 1280, 8, 1),
    (2, 1280, 1280, 8, 1),
    (1, 640, 640, 16, 1),
    (1, 1280, 1280, 16, 1),
    (2, 1280, 1280, 16, 1),
    (1, 640, 640, 32, 1),
)  # pictures, channels in and out, cells a side, stride


@torch.no_grad()
def timed(size: tuple[int, ...], dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Milliseconds of a convolution of this size, there and back, by way."""
    batch, width_in, width_out, side, stride = size
    layers = [nn.Conv2d(width_in, width_out, 3, stride, 1) for _ in range(LAYERS)]
    for layer in layers:
        layer.requires_grad_(False).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(batch, width_in, side, side).to(dtype, memory_format=torch.channels_last)
    window = convolutions.window_of(layers[0])
    grad = torch.randn_like(functional.conv2d(x, layers[0].weight, None, *window))

    def as_torch(number: int) -> None:
        layer = layers[number]
        functional.conv2d(x, layer.weight, layer.bias, *window)
        conv2d_input(x.shape, layer.weight, grad, *window)

    def as_product(number: int) -> None:
        layer = layers[number]
        convolutions.conv2d(x, layer.weight, layer.bias, window)
        convolutions.conv2d_to_input(x.shape, layer.weight, grad, window)

    ways: dict[str, Callable[[int], None]] = {"torch": as_torch, "product": as_product}
    if stride == 1:
        layouts = [onednn.laid_out(layer, x.shape) for layer in layers]

        def as_laid_out(number: int) -> None:
            onednn._conv(x, layouts[number].onward, layers[number].bias, layers[number])
            onednn._conv(grad, layouts[number].back, None, layers[number])

        ways["laid out"] = as_laid_out
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range((rounds + 1) * LAYERS):
        for name, work in ways.items():
            started = time.perf_counter()
            work(turn % LAYERS)
            if turn >= LAYERS:
                seconds[name].append(time.perf_counter() - started)
    return {name: round(1000 * median(values), 2) for name, values in seconds.items()}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--rounds", type=int, default=8)
    flags = parser.parse_args()
    dtype = DTYPES[flags.precision]
    as_it_is = dict(convolutions.MOST_CELLS)
    convolutions.MOST_CELLS[dtype] = sys.maxsize
    rows = []
    print(
        f"{'batch, in, out, side, stride':30} {'torch':>8} {'product':>8} {'laid out':>8}  s a GiB of layouts"
    )
    for size in SIZES:
        row = timed(size, dtype, flags.rounds)
        gained = (min(row["torch"], row["product"]) - row["laid out"]) / 1000 if "laid out" in row else 0.0
        worth = gained / (size[1] * size[2] * 9 * dtype.itemsize) * 2**30
        rows.append({"size": size, "ms": row, "worth": round(worth, 3)})
        print(f"{size!s:30} {row['torch']:8} {row['product']:8} {row.get('laid out', ''):8}  {worth:.3f}")
    facts = {"bench": "convolutions", "precision": flags.precision, **machine("cpu")}
    limits = {"cells": as_it_is[dtype], "worth": onednn.LEAST_WORTH}
    print(json.dumps(facts | {"limits": limits, "rows": rows}))


if __name__ == "__main__":
    main()
