"""The upstream gradient: the loss is told in advance which it will be, so that backward has nothing left to do."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-30  # and its inverse the largest: products with gradients stay within fp32


def foretold(grad_scale: float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_scale as a scalar beside `like`, rounded as in `loss * grad_scale` for a loss of this dtype.

    A tensor, since an operator that takes a number is compiled anew for each; and this product, since torch.full and
    torch.tensor of a number are, too.
    """
    return like.new_ones((), dtype=dtype) * grad_scale


def rest(upstream: Tensor, told: Tensor) -> Tensor:
    """upstream / told, a scalar; 1 where they are equal, also if a compiler divides less exactly."""
    return torch.where(upstream == told, 1.0, upstream / told)


def is_traced(upstream: Tensor) -> bool:
    """Whether this backward pass is being recorded: what the forward pass saved may then not be changed in place."""
    return torch.compiler.is_compiling() or type(upstream) is not Tensor
