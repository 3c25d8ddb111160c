"""A card that isn't there: tensors "on cuda" that have shapes, types and a place, but no numbers.

Torch's fake tensors refuse to mix places as a card does. What they can't do, because it would need a card or
numbers, is answered here as a card would allow or refuse it: indexing, `.item()`, `.numpy()` and the like.
Tensors on the CPU are real ones as long as nothing comes into them from the card. There is no backward.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CARD = torch.device("cuda", 0)
CPU = torch.device("cpu")


class _Card(TorchFunctionMode):
    """Whatever meets a tensor on the card, or is asked to go there, is fake."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The answer to one call of torch."""
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(each, FakeTensor) or _names_card(each) for each in leaves):
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and torch.device(kwargs.get("device") or CPU).type != generator.device.type:
            raise RuntimeError(f"Expected a '{kwargs['device']}' device type for generator")
        name = getattr(func, "__name__", "")
        if name == "conv2d" and len({each.device for each in leaves if isinstance(each, Tensor)}) > 1:
            raise RuntimeError("Expected all tensors to be on the same device")  # which torch's fakes forget
        with self.fake:
            answer = ANSWERS.get(name)
            return func(*args, **kwargs) if answer is None else answer(*args, **kwargs)


def _names_card(value: object) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


# ---------------------------------------------------------------- what fake tensors can't do


def _item(tensor: Tensor) -> float:
    """A number on the card: zero."""
    return 0.0 if tensor.is_floating_point() else 0


def _numpy(tensor: Tensor, *_: object, **__: object) -> np.ndarray:
    if tensor.device != CPU:
        raise TypeError(f"can't convert {tensor.device} device type tensor to numpy")
    return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))


def _contiguous(tensor: Tensor, *, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.ops.aten.clone.default(tensor, memory_format=memory_format)


def _indexed(tensor: Tensor, index: Any) -> Tensor:
    """tensor[index]. A card takes indices from the CPU too, a CPU none from a card."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(each is Ellipsis for each in items):
        at = next(i for i, each in enumerate(items) if each is Ellipsis)
        missing = tensor.ndim - sum(each is not None for each in items) + 1
        items[at : at + 1] = [slice(None)] * missing
    indices: list[Tensor | None] = []
    for each in items:
        dim = len(indices)
        if isinstance(each, int):
            tensor = tensor.select(dim, each)
            continue
        indices.append(None)
        if each is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(each, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, each.start, each.stop, each.step or 1)
        else:
            indices[dim] = _placed(each, tensor.device)
    return torch.ops.aten.index.Tensor(tensor, indices) if any(i is not None for i in indices) else tensor


def _placed(index: list[int] | Tensor, device: torch.device) -> Tensor:
    rows = index if isinstance(index, Tensor) else torch.tensor(index, dtype=torch.long)
    if rows.device not in (device, CPU):
        raise RuntimeError(f"indices should be either on cpu or on the same device ({device})")
    return rows.to(device)


def _copied(tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """tensor.copy_(source): from any place, of a shape that fits."""
    if torch.broadcast_shapes(tensor.shape, source.shape) != tensor.shape:
        raise RuntimeError(f"{tuple(source.shape)} does not fit {tuple(tensor.shape)}")
    return tensor


class _Stream:
    """What a card does one after the other. told: what was asked of it beside computing."""

    def __init__(self, device: object = None) -> None:
        self.told: list[str] = []

    def wait_stream(self, _: "_Stream") -> None:
        """Begins when the other is where it is now."""
        self.told.append("waits")


class _Event:
    """A point in what a stream does."""

    def __init__(self, *, blocking: bool) -> None:
        self.stream: _Stream | None = None

    def record(self, stream: _Stream) -> None:
        """Is where the stream is now."""
        self.stream = stream
        stream.told.append("an event")

    def synchronize(self) -> None:
        """Waits until the stream has come by."""
        assert self.stream is not None
        self.stream.told.append("is waited for")


def _kept_for(tensor: Tensor, stream: _Stream) -> None:
    """tensor.record_stream(stream)"""
    stream.told.append(f"keeps {tuple(tensor.shape)}")


ANSWERS: dict[str, Callable[..., Any]] = {
    "item": _item,
    "__int__": lambda tensor: int(_item(tensor)),
    "__float__": lambda tensor: float(_item(tensor)),
    "__bool__": lambda tensor: True,
    "tolist": lambda tensor: np.zeros(tensor.shape).tolist(),
    "numpy": _numpy,
    "__array__": _numpy,
    "nonzero": lambda tensor: torch.zeros((1, tensor.ndim), dtype=torch.long, device=tensor.device),
    "contiguous": _contiguous,
    "__getitem__": _indexed,
    "__setitem__": lambda tensor, index, value: _copied(_indexed(tensor, index), torch.as_tensor(value)),
    "copy_": _copied,
}


def _moved(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What torch's Module._apply does, which trips over fake parameters."""
    for child in module.children():
        child._apply(fn)
    for name, value in module._parameters.items():
        if value is not None:
            module._parameters[name] = nn.Parameter(fn(value.detach()), value.requires_grad)
    for name, value in module._buffers.items():
        if value is not None:
            module._buffers[name] = fn(value)
    return module


class _Streams:
    """The streams of a card, of which one is the current."""

    def __init__(self) -> None:
        self.current = _Stream()

    @contextmanager
    def inside(self, stream: _Stream) -> Iterator[None]:
        """torch.cuda.stream"""
        before, self.current = self.current, stream
        stream.told.append("begins")
        try:
            yield
        finally:
            self.current = before


@contextmanager
def fake_card(gib: float = 24, free_gib: float | None = None) -> Iterator[torch.device]:
    """Inside the block there is a card with so much memory, all of it free unless free_gib says otherwise.
    What is on it has no numbers.
    """
    about = SimpleNamespace(total_memory=gib * 2**30, name="a card")
    streams = _Streams()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), _Card():
        patch.setattr(nn.Module, "_apply", _moved)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: about)
        patch.setattr(
            torch.cuda,
            "mem_get_info",
            lambda _: ((gib if free_gib is None else free_gib) * 2**30, gib * 2**30),
        )
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.cuda, "current_stream", lambda _: streams.current)
        patch.setattr(torch.cuda, "stream", streams.inside)
        patch.setattr(Tensor, "record_stream", _kept_for)
        yield CARD
