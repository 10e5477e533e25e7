"""A linear layer that computes on the CPU with oneDNN, where that is faster than BLAS."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEAST_WORK = 2**26  # multiply-adds; below, what surrounds the product takes as long as the product


class Linear(nn.Linear):
    """As nn.Linear: y = x W' + b; its first numbers are drawn by the model."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b for x (..., K), weight (N, K), bias (N,), by whichever library is faster."""
    if takes_onednn(x, weight):
        return _OneDNN.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether the product is a large one of fp32 on a CPU; under torch.compile and autocast PyTorch chooses well."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= LEAST_WORK
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and has_onednn()
    )


@functools.cache
def has_onednn() -> bool:
    """Whether this build of PyTorch has oneDNN's linear layer, the one that torch.compile uses on CPUs."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b for x (..., K), weight (N, K) of any layout, bias (N,)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad
        rows, gradient_rows = x.flatten(0, -2), gradient.flatten(0, -2)
        return (
            onednn(gradient, weight.t()) if by_x else None,
            _weight_gradient(gradient_rows, rows) if by_weight else None,
            gradient_rows.sum(0) if by_bias else None,
        )


def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """(N, K) from (M, N) and (M, K); BLAS loses a third of its speed where rows of the result are no whole vectors."""
    if x.shape[1] % 16 and gradient.shape[1] % 16 == 0:
        return torch.mm(x.t(), gradient).t()
    return torch.mm(gradient.t(), x)
