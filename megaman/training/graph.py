"""A whole training step as CUDA graphs: recorded once, then replayed by one call to the driver.

A step of Stable Diffusion is some thousands of small kernels; a fast card waits for Python to start each.
A graph is recorded for each form of a batch (UNet, loss and backward pass), and one for what follows
(clipping and the optimizer). What is recorded reads and writes the same memory at every replay, so batches
are copied into place first, gradients are zeroed rather than dropped, and nothing waits for the device.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megaman.common.console import say

WARM_UPS = 3  # calls before a recording: kernels are chosen and moments made in them


class Recording(Protocol):
    """Something recorded that can be done again."""

    def replay(self) -> None:
        """Does it again, on the memory that it was recorded with."""


class CudaRecorder:
    """Records what a function does on the card; all its recordings share their memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def warm_up(self, compute: Callable[[], Any]) -> Any:
        """Computes on the stream on which it will be recorded; returns the result."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            made = compute()
        torch.cuda.current_stream().wait_stream(self.stream)
        return made

    def record(self, compute: Callable[[], Any]) -> tuple[Recording, Any]:
        """A recording, not yet replayed, and where its result will lie."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            made = compute()
        return graph, made


class Replayed:
    """A function of tensors, computed a few times and then replayed, for each form of its arguments."""

    def __init__(self, compute: Callable[..., Sequence[Tensor]], recorder: Any) -> None:
        """compute: takes tensors and then plain values; returns tensors. It must not wait for the device."""
        self.compute = compute
        self.recorder = recorder
        self.calls: dict[Any, int] = {}
        self.recorded: dict[Any, tuple[Recording, list[Tensor], Sequence[Tensor]]] = {}
        self.works = True

    def __call__(self, tensors: Sequence[Tensor], *plain: Any) -> list[Tensor]:
        """What `compute` returns for them: copies, that stay as they are at the next call."""
        form = (*((tensor.shape, tensor.dtype) for tensor in tensors), *plain)
        self.calls[form] = self.calls.get(form, 0) + 1
        if self.works and self.calls[form] > WARM_UPS and form not in self.recorded:
            self._record(form, tensors, plain)
        if form not in self.recorded:
            return [*self.recorder.warm_up(lambda: self.compute(*tensors, *plain))]
        recording, places, made = self.recorded[form]
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor)
        recording.replay()
        return [tensor.clone() for tensor in made]

    def _record(self, form: Any, tensors: Sequence[Tensor], plain: Sequence[Any]) -> None:
        """Notes a recording; where that fails, steps go on as before, and it is said."""
        places = [tensor.clone() for tensor in tensors]
        try:
            recording, made = self.recorder.record(lambda: self.compute(*places, *plain))
        except RuntimeError as error:
            self.works = False
            say(f"note: --cuda_graph: this step can't be recorded ({str(error).splitlines()[0][:120]}); "
                "it goes on without")  # fmt: skip
        else:
            self.recorded[form] = (recording, places, made)

    def forget(self) -> None:
        """Drops all recordings: what they were made of has changed."""
        self.calls.clear()
        self.recorded.clear()
