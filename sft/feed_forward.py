"""The feed-forward part of a block: SwiGLU, or two layers with an activation between them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from sft.linear import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
}


def build_feed_forward(width: int, inner_width: int, *, activation: str | None, bias: bool) -> nn.Module:
    """Two layers with this activation between them; None = SwiGLU."""
    if activation is None:
        return GatedFeedForward(width, inner_width, bias=bias)
    return FeedForward(width, inner_width, activation=ACTIVATIONS[activation], bias=bias)


class GatedFeedForward(nn.Module):
    """SwiGLU: one half decides, through SiLU, how much of the other passes."""

    def __init__(self, width: int, inner_width: int, *, bias: bool):
        super().__init__()
        self.w_gate = Linear(width, inner_width, bias=bias)
        self.w_value = Linear(width, inner_width, bias=bias)
        self.w_out = Linear(inner_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_out(F.silu(self.w_gate(x)) * self.w_value(x))


class FeedForward(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self, width: int, inner_width: int, *, activation: Callable[[Tensor], Tensor], bias: bool):
        super().__init__()
        self.fc1 = Linear(width, inner_width, bias=bias)
        self.fc2 = Linear(inner_width, width, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))
