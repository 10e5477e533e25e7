"""Inputs of the fused head, and its comparison with the definition."""

from __future__ import annotations

import torch
from torch import nn

from sft.kernels import reference
from sft.kernels.linear_cross_entropy import masked_linear_cross_entropy

CPU_CHUNK, CUDA_CHUNK = 7, 128  # rows, in tests that need several chunks


def small_chunks_of(monkeypatch, V=257):
    """Chunks of 7 rows on the CPU, in blocks of 3, bf16 products of 100 rows, and chunks of 128 on a GPU."""
    changes = {"CPU_CHUNK": CPU_CHUNK * V, "CPU_BLOCK": 3 * V, "CUDA_BYTES": 0, "CUDA_LEAST_ROWS": CUDA_CHUNK}
    for name, value in changes.items():
        monkeypatch.setattr(f"sft.kernels.linear_cross_entropy.{name}", value)
    monkeypatch.setattr("sft.kernels.products.CPU_ROWS", 100)


def problem(*, M=50, n=20, D=16, V=257, dtype=torch.float64, masked=0.3, filled=0, device="cpu", seed=0):
    """hidden, head, labels, weights, rows; some labels masked, some rows named twice; `filled` masked entries more."""
    draw = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(M, D, generator=draw), torch.randn(V, D, generator=draw)
    labels = torch.randint(0, V, (n,), generator=draw)
    labels[torch.rand(n, generator=draw) < masked] = -100
    rows, weights = torch.randint(0, max(M, 1), (n,), generator=draw), 3 * torch.rand(n, generator=draw)
    entries = (
        torch.cat([each, torch.full((filled,), fill, dtype=each.dtype)]).to(device)
        for each, fill in ((labels, -100), (weights, 0), (rows, 0))
    )
    return hidden.to(device, dtype), head.to(device, dtype), *entries


def results(function, hidden, head, labels, weights=None, rows=None, *, upstream=1.0, **options):
    """Everything that comes out, and both gradients."""
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    got = function(hidden, head, labels, weights, rows=rows, details=True, **options)
    (got.loss_sum * upstream).backward()
    return [*got, hidden.grad, head.grad]


def assert_equals_the_definition(arguments, *, rtol, atol, exact=torch.float64, upstream=1.0, ties=0, **options):
    """From the same numbers, the definition in `exact`; rounding may tie logits and so change `ties` correct tokens."""
    hidden, head, *others = arguments
    expected = results(
        reference.masked_linear_cross_entropy, hidden.to(exact), head.to(exact), *others, upstream=upstream
    )
    got = results(masked_linear_cross_entropy, hidden, head, *others, upstream=upstream, **options)
    for mine, right, near in zip(got, expected, (0, 0, 0, 0, ties, 0, 0), strict=True):
        scale = max(1.0, right.abs().max().item()) if right.numel() else 1.0
        torch.testing.assert_close(mine.to(right.dtype), right, rtol=rtol, atol=atol * scale + near)


class Head(nn.Module):
    """A head that is trained through the fused loss."""

    def __init__(self, head):
        super().__init__()
        self.weight = nn.Parameter(head)

    def forward(self, hidden, labels, weights, rows, grad_scale):
        return masked_linear_cross_entropy(
            hidden, self.weight, labels, weights, rows=rows, grad_scale=grad_scale
        ).loss_sum
