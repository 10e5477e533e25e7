"""The loss of a batch: gather the trained tokens, run the head on them alone, sum their cross-entropies."""

from __future__ import annotations

from torch import Tensor

from sft.batches import Batch
from sft.kernels.reference import masked_linear_cross_entropy


def masked_loss_sum(hidden: Tensor, head_weight: Tensor, batch: Batch) -> Tensor:
    """The weighted sum of the token losses of a batch, a scalar in fp32 or wider; to be divided once, by the step.

    hidden (B, T, D) after the final norm, head_weight (V, D). A batch without trained tokens gives zero and zero
    gradients.
    """
    rows, labels, weights = batch.trained, batch.targets, batch.weights
    return masked_linear_cross_entropy(hidden.flatten(0, 1), head_weight, labels, weights, rows=rows).loss_sum
