"""What savings that are not built would gain of our step on a CPU, each measured alone.

    python tests/bench/bench_left.py [--kind embedded|sd1] [--precision bf16] [--resolution 256]

Follows one pass through the base's UNet to learn what each layer is given, then times there, forward and
backward, the layer as it is beside the other way: query, key and value of one input as one product; GEGLU
as one function that keeps its products; and what would vanish altogether if it cost nothing: SiLU behind a
group norm, the embeddings of the timestep, laying out the weights of convolutions that step over cells.
Adds up over all layers, prints the share of a whole step, then one JSON line. Counts no gradient of the
base, and one pass, where the demo's step also asks the base about a class.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from megaman.common.console import quiet_libraries  # noqa: E402

quiet_libraries()

import torch  # noqa: E402
from bench.bench_step import our_step  # noqa: E402
from bench.setting import add_arguments, machine, parsed, setting_of  # noqa: E402
from diffusers.models.activations import GEGLU  # noqa: E402
from diffusers.models.attention_processor import Attention  # noqa: E402
from diffusers.models.downsampling import Downsample2D  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from megaman_lora import Run, begin, read_config, set_up  # noqa: E402

TURNS = 9
Way = Callable[[], object]


class WholeGEGLU(torch.autograd.Function):
    """hidden * gelu(gate) of both halves of a product, (…,2d) -> (…,d), with one gradient for both."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        """Keeps the product and its gate."""
        hidden, gate = both.chunk(2, dim=-1)
        gated = functional.gelu(gate)
        ctx.save_for_backward(both, gated)
        return hidden * gated

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Written into its place, half by half."""
        both, gated = ctx.saved_tensors
        hidden, gate = both.chunk(2, dim=-1)
        made = torch.empty_like(both)
        to_hidden, to_gate = made.chunk(2, dim=-1)
        torch.mul(grad, gated, out=to_hidden)
        torch.ops.aten.gelu_backward.grad_input(grad * hidden, gate, grad_input=to_gate)
        return made


def seconds(*ways: Way) -> list[float]:
    """Of each, the median of its turns."""
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(TURNS):
        for way, times in zip(ways, taken, strict=True):
            started = time.perf_counter()
            way()
            times.append(time.perf_counter() - started)
    return [statistics.median(times[2:]) for times in taken]


def both_ways(compute: Callable[[Tensor], Tensor], x: Tensor) -> Way:
    """Forward, and the gradient to the input."""
    x = x.detach().requires_grad_()
    grad = torch.ones_like(compute(x))
    return lambda: torch.autograd.grad(compute(x), x, grad)


# ---------------------------------------------------------------- one layer: what it takes, and the other way
def projections(layer: Attention, x: Tensor) -> list[float]:
    """Query, key and value of the same input: three products, or one."""
    weights = [torch.randn(x.shape[-1], x.shape[-1], dtype=x.dtype) for _ in range(3)]
    whole = torch.cat(weights)
    three = both_ways(lambda x: torch.cat([functional.linear(x, each) for each in weights], -1), x)
    joined = seconds(three, both_ways(lambda x: functional.linear(x, whole), x))
    rows = [torch.ones(x.shape, dtype=x.dtype) for _ in range(3)]
    (cat,) = seconds(lambda: torch.cat(rows, -1))  # three products need no joining, one needs it backward
    return [joined[0] - cat, joined[1]]


def gate(layer: GEGLU, x: Tensor) -> list[float]:
    """GEGLU behind its product: torch's way, or one function."""
    both = torch.randn(*x.shape[:-1], layer.proj.out_features, dtype=x.dtype)

    def plain(both: Tensor) -> Tensor:
        hidden, gate = both.chunk(2, dim=-1)
        return hidden * functional.gelu(gate)

    return seconds(both_ways(plain, both), both_ways(WholeGEGLU.apply, both))


def silu(layer: nn.Module, x: Tensor) -> list[float]:
    """SiLU, twice in a block, or for nothing."""
    return [2 * seconds(both_ways(functional.silu, x))[0], 0.0]


def embedding(layer: nn.Linear, x: Tensor) -> list[float]:
    """A layer of the timestep's embedding, forward, or for nothing."""
    return [seconds(lambda: layer(x))[0], 0.0]


def stepping(layer: nn.Conv2d, x: Tensor) -> list[float]:
    """A convolution that steps over cells, or what its weight laid out would leave forward."""
    plain = seconds(both_ways(layer, x))[0]
    window = [*layer.padding], [*layer.stride], [*layer.dilation], layer.groups
    layout = torch._C._nn.mkldnn_reorder_conv2d_weight(layer.weight.to_mkldnn(), *window, [*x.shape])
    fast = torch.ops.mkldnn._convolution_pointwise
    before, after = seconds(
        lambda: functional.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding),
        lambda: fast(x, layout, layer.bias, *window, "none", [], ""),
    )
    return [plain, plain - 2 * (before - after)]  # as much is gained backward, it is assumed


def cases(unet: nn.Module) -> dict[str, list[tuple[nn.Module, Callable[..., list[float]]]]]:
    """Whose input to learn, and how to measure there."""
    found: dict[str, list[tuple[nn.Module, Callable[..., list[float]]]]] = {
        "query, key, value in one": [], "GEGLU in one": [], "no SiLU": [], "no embedding of timesteps": [],
        "strided convolutions laid out": [],
    }  # fmt: skip
    for name, layer in unet.named_modules():
        if isinstance(layer, Attention) and name.endswith("attn1"):
            found["query, key, value in one"].append((layer, projections))
        elif isinstance(layer, GEGLU):
            found["GEGLU in one"].append((layer, gate))
        elif isinstance(layer, ResnetBlock2D):
            found["no SiLU"].append((layer, silu))
            found["no embedding of timesteps"].append((layer.time_emb_proj, embedding))
        elif isinstance(layer, Downsample2D):
            found["strided convolutions laid out"].append((layer.conv, stepping))
    return found


def inputs(run: Run, layers: list[nn.Module], step: Way) -> dict[nn.Module, Tensor]:
    """The largest batch that each is given in a step."""
    seen: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        if layer not in seen or len(given[0]) > len(seen[layer]):
            seen[layer] = given[0].detach()

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    step()
    for hook in hooks:
        hook.remove()
    return seen


def main() -> None:
    """Every saving, and its share of a step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    setting = setting_of(parsed(parser))
    with tempfile.TemporaryDirectory() as folder:
        run = set_up(read_config(setting.flags(folder))[0])
    begin(run)
    numbers = iter(range(sys.maxsize))
    (whole,) = seconds(lambda: our_step(run, next(numbers)))
    chosen = cases(run.base.unet)
    layers = [layer for group in chosen.values() for layer, _ in group]
    given = inputs(run, layers, lambda: our_step(run, next(numbers)))
    gains = {}
    for name, group in chosen.items():
        pairs = [measure(layer, given[layer]) for layer, measure in group]
        now, other = (sum(each) for each in zip(*pairs, strict=True))
        gains[name] = {"ms": round(1e3 * now, 2), "other_ms": round(1e3 * other, 2)}
        gains[name]["of_a_step_%"] = round(100 * (now - other) / whole, 2)
        print(f"{name:30} {1e3 * now:8.2f} -> {1e3 * other:8.2f} ms  {100 * (now - other) / whole:+.2f} %")
    print(
        json.dumps({"bench": "left", **setting.facts, **machine("cpu"), "step_s": round(whole, 4), **gains})
    )


if __name__ == "__main__":
    main()
