"""Inputs of the Triton cross-entropy, and its comparison with the definition in float64."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import tests.interpreted  # noqa: F401  # before the kernels
from sft.kernels import reference
from sft.kernels.masked_cross_entropy import masked_cross_entropy
from tests.devices import EPSILON

TILE = 2 * 32 * 32 * 8  # columns: of the default configuration in half precision


def problem(
    rows: int,
    columns: int,
    *,
    masked: float = 0.3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits with a few peaks, and labels of which some are on a peak."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = {"generator": generator, "device": device}
    logits = torch.randn(rows, columns, dtype=torch.float32, **draw).mul_(2)
    labels = torch.randint(columns, (rows,), **draw)
    peaked = torch.rand(rows, **draw) < 0.5
    logits[torch.arange(rows, device=device), labels] += 12 * peaked
    labels[torch.rand(rows, **draw) < masked] = -100
    return logits.to(dtype), labels


def compare(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    upstream: float = 1.0,
    overwrite: bool = False,
    **options,
) -> None:
    """Loss, count, details and gradient against the definition in float64."""
    wide = logits.detach().double().requires_grad_()
    expected = reference.masked_cross_entropy(wide, labels, weights, details=True)
    (expected_gradient,) = torch.autograd.grad(expected.loss_sum * upstream, wide)
    mine = (logits.detach().clone() if overwrite else logits.detach()).requires_grad_()
    found = masked_cross_entropy(mine, labels, weights, details=True, overwrite=overwrite, **options)
    (gradient,) = torch.autograd.grad(found.loss_sum * upstream, mine)
    assert (found.loss_sum.dtype, found.token_losses.dtype) == (torch.float32, torch.float32)
    close = partial(torch.testing.assert_close, check_dtype=False, rtol=3e-6, atol=3e-6)
    close(found.loss_sum, expected.loss_sum, atol=3e-6 * max(1, len(labels)))
    close(found.token_losses, expected.token_losses)
    close(found.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    assert found.count == expected.count
    assert found.correct == expected.correct
    close(gradient, expected_gradient, **rounding(logits.dtype, largest=max(1.0, abs(upstream))))
    assert (gradient[labels == -100] == 0).all()


def rounding(dtype: torch.dtype, *, largest: float = 1.0) -> dict[str, float]:
    """The tolerance of a gradient of which no number is above `largest`: rounded as it is written and, where the
    upstream gradient was not foretold, once more as it is scaled, half an epsilon each; and the error of fp32."""
    smallest = 2.0**-24 if dtype == torch.float16 else 0.0  # half precision's smallest number, rounded likewise
    return {"rtol": 1.01 * EPSILON[dtype] + 2e-6, "atol": (3e-7 + smallest) * largest}
