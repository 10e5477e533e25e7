"""An exponential moving average of the trained weights, kept beside them on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sft.errors import UserError

Weights = Literal["model", "ema"]  # those that are trained, or their moving average


class MovingAverage:
    """average <- decay * average + (1 - decay) * weights, after each step that has moved the weights.

    It begins as the weights themselves, of which decay**n is left in it after n steps. There is no warm-up of the
    decay: a base model's weights are no noise to be forgotten at once, and a constant needs no state to go on from.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._places = [
            (name, parameter)
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if parameter.requires_grad
        ]
        self._averages = {parameter: parameter.detach().clone() for _, parameter in self._places}  # what is tied: once
        assert all(p.dtype in (torch.float32, torch.float64) for p in self._averages), "16 bits lose small changes"

    @torch.no_grad()
    def update(self, skips: Tensor) -> None:
        """Take a step into the average, unless it `skips` (a bool on the device, which the host does not wait for)."""
        share = (~skips).double() * (1.0 - self.decay)
        shares = {dtype: share.to(dtype) for dtype in {parameter.dtype for parameter in self._averages}}
        for parameter, average in self._averages.items():
            average.lerp_(parameter, shares[average.dtype])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averages for its weights; not a number is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, Tensor]:
        """The averages under the names of the parameters; those of one tied tensor share theirs."""
        return {name: self._averages[parameter] for name, parameter in self._places}

    def load_state(self, state: Any) -> None:
        """Go on from these averages. Raises UserError where they are not of this model's trained parameters."""
        own = self.state()
        state = state if isinstance(state, dict) else {}
        odd = [name for name in {**own, **state} if name not in own or not isinstance(state.get(name), Tensor)]
        if odd := odd or [name for name, average in own.items() if state[name].shape != average.shape]:
            raise UserError(f"the checkpoint's moving average does not fit the model ({odd[0]}); start afresh")
        for name, average in own.items():
            average.copy_(state[name])

    def _swap(self) -> None:
        for parameter, average in self._averages.items():
            self._averages[parameter], parameter.data = parameter.data, average
