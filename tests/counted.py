"""Counts what a step costs without taking it: bytes at the peak, operators, casts, copies.

On the meta device nothing is computed and nothing is held, so models of true size are counted in seconds.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from single_files import encoder_of_true_shape, unet_of_true_shape
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaman.common.kinds import Kind
from megaman.config.train import TrainConfig
from megaman.lora.fused import fuse
from megaman.lora.injection import inject
from megaman.model.stable_diffusion import StableDiffusion
from megaman.model.text import Text
from megaman.model.tokenizer import clip_tokenizer
from megaman.training.checkpoints import trained
from megaman.training.objective import Batch, training_losses
from megaman.training.sampler import generator_of

META = torch.device("meta")
GIB = 2**30
BLOCK = 512  # bytes: CUDA's allocator gives whole ones


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    """Attention as a card computes it: no matrix of weights is kept. The meta device's own would be."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


@contextmanager
def attention_of_a_card() -> Iterator[None]:
    """Inside the block torch's attention is a card's. Gives no numbers: for tensors on the meta device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", _attention)
        yield


class _Allocations(TorchDispatchMode):
    """Keeps account of the storages that operators make, until nobody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}  # bytes, by storage
        self.now = self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {_key(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and _key(each) not in given and _key(each) not in self.held:
                self._note(each)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.held[_key(tensor)] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, _key(tensor))

    def _free(self, key: int) -> None:
        self.now -= self.held.pop(key)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes at a time that `run` holds of tensors that it makes itself, on any device."""
    with attention_of_a_card(), _Allocations() as account:
        run()
    return account.peak


# ---------------------------------------------------------------- operators


@dataclass
class Cost:
    """What was called, views left out."""

    names: Counter[str] = field(default_factory=Counter)  # of aten's operators, with their overload
    casts: int = 0  # of a whole tensor to another precision
    copies: int = 0  # of a whole tensor as it is

    @property
    def operators(self) -> int:
        """Operators in all."""
        return self.names.total()


class _Operators(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.is_view:
            return made
        self.cost.names[str(func).removeprefix("aten.")] += 1
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_", "clone"):
            given = args[1] if name == "copy_" else args[0]
            self.cost.casts += given.dtype != made.dtype
            self.cost.copies += given.dtype == made.dtype
        return made


def operators_of(run: Callable[[], object]) -> Cost:
    """The operators that `run` calls, forward and backward, on any device."""
    with attention_of_a_card(), _Operators() as counter:
        run()
    return counter.cost


# ---------------------------------------------------------------- steps to count


def _on_meta(part: nn.Module) -> nn.Module:
    return part.to(META, torch.float16).requires_grad_(False).train()


def encoders_on_meta(kind: Kind) -> dict[str, nn.Module]:
    """A kind's text encoders of true size, in half precision on the meta device."""
    with META:  # created there, which is ten times faster
        made = {each.part: encoder_of_true_shape(kind, each) for each in kind.encoders}
    return {part: _on_meta(encoder) for part, encoder in made.items()}


def base_of_true_shape(kind: Kind) -> StableDiffusion:
    """A kind's UNet and text encoders in half precision on the meta device; it has no VAE."""
    with META:
        unet = unet_of_true_shape(kind)
    return base_on_meta(kind, unet, encoders_on_meta(kind))


def base_on_meta(
    kind: Kind, unet: UNet2DConditionModel, encoders: Mapping[str, nn.Module] | None = None
) -> StableDiffusion:
    """A base of this UNet, in half precision on the meta device, and of encoders that lie there."""
    return StableDiffusion(
        name="counted",
        kind=kind,
        unet=_on_meta(unet),
        vae=nn.Identity(),
        encoders=dict(encoders or {}),
        tokenizer=clip_tokenizer(),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        device=META,
    )


def step_of(base: StableDiffusion, cfg: TrainConfig, side: int) -> tuple[Callable[[], None], list[Tensor]]:
    """A step's forward and backward on a base on the meta device, which gets its adapter here, and what is
    trained. side: of the latents, in cells.
    """
    if not cfg.text_encoder_lr:
        base.drop_encoders()
    inject(base.parts, cfg, base.kind, partial(generator_of, cfg.seed))
    for part in base.parts.values():
        fuse(part)
    count, asking = cfg.train_batch_size, 1 if cfg.preserve_weight else 0
    pooled = base.unet.config.projection_class_embeddings_input_dim
    ids = torch.zeros(count, 1, 77, dtype=torch.long, device=META)

    def text(rows: int) -> Text:
        if base.encoders:
            return base.read(ids[:rows])
        states = torch.zeros(rows, 77, base.unet.config.cross_attention_dim, dtype=torch.float16, device=META)
        width = None if pooled is None else pooled - 6 * base.unet.config.addition_time_embed_dim
        return Text(states, None if width is None else states.new_zeros(rows, width))

    def run() -> None:
        latents, noise = torch.zeros(2, count, 4, side, side, device=META)
        timesteps = torch.zeros(count, dtype=torch.long, device=META)
        captions, sizes = text(count), torch.zeros(count, 6, device=META)
        class_text = text(asking) if asking else captions[:0]
        batch = Batch(
            latents, noise, timesteps, captions, sizes, class_text, class_text.detach(),
            torch.zeros(asking, dtype=torch.long, device=META),
        )  # fmt: skip
        losses, strayed = training_losses(base.unet, batch, base.scheduler, 5.0)
        (losses.sum() + strayed.sum()).backward()

    return run, list(trained(base.parts).values())
