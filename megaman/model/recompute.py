"""What of a step is computed a second time, when its gradients are, instead of being kept until then."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaman.common.kinds import Level

# of how many of the largest sizes the blocks are recomputed, and whether the other feed-forwards are
WHAT: dict[Level, tuple[int, bool]] = {
    "nothing": (0, False),
    "feed-forwards": (0, True),
    "largest": (1, False),
    "largest and feed-forwards": (1, True),
    "two largest": (2, False),
    "two largest and feed-forwards": (2, True),
}  # and "all": every block


def recompute(unet: nn.Module, level: Level, encoders: Iterable[nn.Module] = ()) -> None:
    """Puts a level into force, in the place of the one before. Changes no bit of a result.

    unet: of diffusers' classes, with whatever its layers were replaced by. encoders: text encoders in
    training, which are recomputed when everything is.
    """
    models = [unet, *encoders]
    sizes, has_feed_forwards = WHAT.get(level, (0, False))
    whole = models if level == "all" else _largest(unet, sizes)
    inside = {id(module) for each in whole for module in each.modules()}
    # a generator's state costs a wait for the device, and asks nobody but dropout
    drops = any(isinstance(each, nn.Dropout) and each.p > 0 for model in models for each in model.modules())
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=drops)
    for module in (each for model in models for each in model.modules()):
        is_inside = id(module) in inside
        if hasattr(module, "gradient_checkpointing"):  # diffusers' and transformers' own switch
            switch: Any = module
            switch.gradient_checkpointing = is_inside
            switch._gradient_checkpointing_func = again
        if isinstance(module, BasicTransformerBlock):
            _set_feed_forward(module, again if has_feed_forwards and not is_inside else None)


def _largest(unet: Any, sizes: int) -> list[nn.Module]:
    """The blocks, down and up, of so many of the largest sizes."""
    return [*unet.down_blocks[:sizes], *unet.up_blocks[len(unet.up_blocks) - sizes :]]


def _set_feed_forward(block: BasicTransformerBlock, again: Any) -> None:
    """Lets a block compute its feed-forward and the norm before it through `again`; None: as ever.

    The block calls the one on the other's result, so what the norm would do is done by the feed-forward.
    """
    norm, feed_forward = block.norm3, block.ff
    for module in (norm, feed_forward):
        vars(module).pop("forward", None)
    if again is None:
        return
    normed, forward = norm.forward, feed_forward.forward

    def both(states: Tensor) -> Tensor:
        return forward(normed(states))

    norm.forward = lambda states: states
    feed_forward.forward = lambda states: again(both, states) if torch.is_grad_enabled() else both(states)
