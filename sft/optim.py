"""The optimizer, its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

Schedule = Literal["cosine", "linear", "constant"]


def cosine_lr(step: int, *, peak: float, floor: float, warmup: int, total: int) -> float:
    """The learning rate of update `step` (from 0): linear warm-up to peak, half a cosine down to floor, then floor.

    Warm-up gives update s the rate peak * (s + 1) / (warmup + 1), so the first update already learns; the cosine
    starts at peak with update `warmup` and would reach floor with update `total`.
    """
    if step < warmup:
        return warmup_lr(step, peak=peak, warmup=warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * _decayed_share(step, warmup, total)))


def linear_lr(step: int, *, peak: float, floor: float, warmup: int, total: int) -> float:
    """As cosine_lr, with a straight line from peak down to floor."""
    if step < warmup:
        return warmup_lr(step, peak=peak, warmup=warmup)
    return floor + (peak - floor) * (1.0 - _decayed_share(step, warmup, total))


def warmup_lr(step: int, *, peak: float, warmup: int) -> float:
    """peak * (step + 1) / (warmup + 1): above zero from the first update on, below peak until the last of warm-up."""
    return peak * (step + 1) / (warmup + 1)


def learning_rate_at(step: int, *, schedule: Schedule, peak: float, floor: float, warmup: int, total: int) -> float:
    """The learning rate of update `step` under the named schedule; `constant` stays at peak after warm-up."""
    if schedule == "cosine":
        return cosine_lr(step, peak=peak, floor=floor, warmup=warmup, total=total)
    if schedule == "linear":
        return linear_lr(step, peak=peak, floor=floor, warmup=warmup, total=total)
    return min(peak, warmup_lr(step, peak=peak, warmup=warmup))


def make_optimizer(
    model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW, fused where the device has it. Matrices and embeddings decay; norms and biases (one dimension) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=True)


def _decayed_share(step: int, warmup: int, total: int) -> float:
    """How far the decay has come at `step`: 0 at the end of warm-up, 1 from `total` on."""
    return 1.0 if step >= total else (step - warmup) / (total - warmup)
