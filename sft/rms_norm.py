"""Root mean square norm: x / sqrt(mean(x^2) + eps) * w, over the last dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """x over its root mean square, in at least fp32, times a trained weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D) over its root mean square, in at least fp32, times weight (D,); in the dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu" and x.dtype == weight.dtype == wide and not torch.compiler.is_compiling():
        return _OnCPU.apply(x, weight, eps)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


class _OnCPU(torch.autograd.Function):
    """The same where PyTorch has no kernel for the whole: with y = x r, r = 1 / sqrt(mean(x^2) + eps), the gradient of
    x is r (g w - y mean(g w y))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return (x * factor).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, factor = ctx.saved_tensors
        y = x * factor
        by_element = (gradient * y).flatten(0, -2)  # g y
        mean = torch.mv(by_element, weight).div_(x.shape[-1]).view(factor.shape)
        of_x = (gradient * weight).addcmul_(y, mean, value=-1).mul_(factor)
        return of_x, by_element.sum(0), None
