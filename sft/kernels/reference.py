"""The masked cross-entropy as a definition: plain PyTorch that every faster version is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None) -> Tensor:
    """Sum over n tokens of w_i * (logsumexp(z_i) - z_i[target_i]) with z = hidden @ weight.T; a scalar, fp32 or wider.

    hidden (n, D), weight (V, D), targets (n,) int64 inside the vocabulary, token_weights (n,) or None for all ones.
    No tokens give a zero that still carries (zero) gradients to hidden and weight.
    """
    logits = F.linear(hidden, weight)  # (n, V), in the compute dtype
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if token_weights is None:
        return F.cross_entropy(logits, targets, reduction="sum")
    losses = F.cross_entropy(logits, targets, reduction="none")  # (n,)
    return (losses * token_weights.to(losses.dtype)).sum()
