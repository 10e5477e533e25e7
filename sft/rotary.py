"""Rotary positions: each pair of a head's coordinates is turned by an angle that grows with the token's position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Shapes: B rows, T tokens, C head size.
Rotary = tuple[Tensor, Tensor]  # cosines and sines, each (B, T, 1, C / 2) in fp32


def rotary_tables(positions: Tensor, *, head_size: int, theta: float) -> Rotary:
    """Cosines and sines of each position's angles, in fp32 whatever the model's dtype: half precision would misplace
    far tokens. They are computed anew for each forward, so there is no buffer to save, to move or to outgrow."""
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    angles = positions[..., None, None].float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary, *, interleaved: bool) -> Tensor:
    """x (B, T, heads, C) with each pair of coordinates turned by its position's angle.

    Pairs are (i, i + C/2), or (2i, 2i + 1) where they are interleaved.
    """
    cos, sin = rotary
    if x.dtype == cos.dtype and not torch.compiler.is_compiling():
        return _Turn.apply(x, cos, sin, interleaved)
    a, b = _pairs(x, interleaved)
    turned = a * cos - b * sin, b * cos + a * sin
    return (torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x.dtype)


class _Turn(torch.autograd.Function):
    """The same with half as many passes over memory, and nothing kept but the tables: what is turned forward by an
    angle is turned back by it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turned(x, cos, sin, interleaved, direction=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, ctx.interleaved, direction=-1), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, direction: int) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (a, b), (to_a, to_b) = _pairs(x, interleaved), _pairs(out, interleaved)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin, value=direction)
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second coordinates of all pairs, each (B, T, heads, C / 2)."""
    return x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)  # type: ignore[return-value]
