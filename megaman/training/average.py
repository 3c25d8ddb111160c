"""The moving average of the adapter: what is shown and written while the training goes on beside it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megaman.common.console import STATE, UserError

PREFIX = "average."  # of its tensors in a checkpoint


class Average:
    """An exponential moving average of parameters; with decay 0 there is none, and nothing is done."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        """It begins where the parameters are."""
        self.parameters, self.decay = dict(parameters if decay else {}), decay
        self.kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes a step's result in; step is counted from 0. The first ones weigh more, so that the beginning
        is forgotten: the decay is (1 + step) / (10 + step) until that exceeds it.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.kept[name].lerp_(parameter, weight)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside it the parameters are the average."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.kept[name] = self.kept[name], parameter.data

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint, on the CPU."""
        return {f"{PREFIX}{name}": value.cpu().contiguous() for name, value in self.kept.items()}

    def restored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes its own out of a checkpoint's tensors and returns the rest. UserError (exit 7) if one is
        missing.
        """
        left = dict(tensors)
        for name, value in self.kept.items():
            if f"{PREFIX}{name}" not in left:
                raise UserError(f"the checkpoint holds no average of {name}", STATE)
            value.copy_(left.pop(f"{PREFIX}{name}"))
        return left
