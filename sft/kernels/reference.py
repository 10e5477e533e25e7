"""The masked cross-entropy as a definition: plain PyTorch that every faster version is compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.samples import NOT_TRAINED


class CrossEntropy(NamedTuple):
    """The loss of N tokens; `loss_sum` alone is differentiable, the last three are None without details."""

    loss_sum: Tensor  # scalar: the weighted sum of the token losses; fp32, float64 for float64
    count: Tensor  # type: ignore[assignment]  # scalar int64: the labels that are not -100 (hides tuple.count)
    token_losses: Tensor | None = None  # (N,) not weighted, 0 where masked
    entropy: Tensor | None = None  # (N,) of the predicted distribution in nats, 0 where masked
    correct: Tensor | None = None  # scalar int64: trained tokens whose label is the argmax (the first of equals)


def masked_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    details: bool = False,
    overwrite: bool = False,
    grad_scale: float = 1.0,
) -> CrossEntropy:
    """Sum over the labels that are not -100 of weight * (logsumexp(z) - z[label]), in fp32 or wider.

    logits (N, V), labels (N,) int64 below V or -100, weights (N,) or None for all ones. `overwrite` and `grad_scale`
    are for versions that compute the gradient early: they never change the result.
    """
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    token_losses = F.cross_entropy(wide, labels, ignore_index=NOT_TRAINED, reduction="none")  # (N,), 0 where masked
    loss_sum = (token_losses if weights is None else token_losses * weights.to(token_losses.dtype)).sum()
    trained = labels != NOT_TRAINED
    if not details:
        return CrossEntropy(loss_sum, trained.sum())
    entropy = torch.special.entr(wide.detach().softmax(-1)).sum(-1).where(trained, 0.0)
    correct = (trained & (wide.detach().argmax(-1) == labels)).sum()
    return CrossEntropy(loss_sum, trained.sum(), token_losses.detach(), entropy, correct)


def masked_linear_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    details: bool = False,
    grad_scale: float = 1.0,
) -> CrossEntropy:
    """The masked cross-entropy of the logits hidden[rows] @ head_weight.T.

    hidden (M, D), head_weight (V, D), rows (N,) int64 with hidden[rows] belonging to labels, or None for all of hidden
    in order. An entry of `rows` whose label is -100 counts for nothing, whatever row it names.
    """
    chosen = hidden if rows is None else hidden[rows]
    return masked_cross_entropy(F.linear(chosen, head_weight), labels, weights, details=details)
