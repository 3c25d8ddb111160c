"""What a UNet makes of a text, computed once for all denoising steps: the keys and values of its
cross-attentions.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

READS_TEXT = re.compile(r"(^|\.)attn2\.to_[kv]$")  # the layers of a UNet that see nothing but the text


@contextmanager
def text_read_once(unet: nn.Module) -> Iterator[None]:
    """Inside the block a UNet computes the keys and values of a text once and takes them in every further
    step, so pictures stay as they are to the bit.

    A text is known by its tensor, so whoever gives another one, equal or not, gets its own. Only one is kept;
    its keys and values take 2·L·B·(sum of the layers' widths) numbers. Where gradients are wanted, or the
    blocks are compiled, which a changed layer would do again, all is computed as ever. The weights must not
    change inside of the block.
    """
    earlier = {} if _is_compiled(unet) else {layer: vars(layer).get("forward") for layer in _readers(unet)}
    try:
        for layer in earlier:
            layer.forward = _once(layer.forward)
        yield
    finally:
        for layer, forward in earlier.items():
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _readers(unet: nn.Module) -> list[nn.Module]:
    return [layer for name, layer in unet.named_modules() if READS_TEXT.search(name)]


def _is_compiled(unet: nn.Module) -> bool:
    """Whether `--compile` has been here: torch notes it in each of the blocks."""
    return any(module._compiled_call_impl is not None for module in unet.modules())


def _once(project: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A layer's forward that keeps what it made of the last text."""
    kept: dict[str, Tensor] = {}

    def forward(states: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return project(states)
        if kept.get("states") is not states:
            kept.clear()  # room first
            kept.update(made=project(states), states=states)
        return kept["made"]

    return forward
