"""Low-rank adapters of linear layers: W becomes W + s B A, of which only A and B are trained.

LoRA: arXiv:2106.09685. The scale s is alpha / rank, or alpha / sqrt(rank), which keeps large ranks learning (rsLoRA,
arXiv:2312.03732). DoRA (arXiv:2402.09353) trains the length of each row of the result, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sft.linear import Linear, linear

Scaling = Literal["standard", "rank_stabilized"]

# Shapes: K inputs, N rows of the layer, n of them with this adapter, r its rank.


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """What the adapters of a model are like, and where they are."""

    rank: int
    alpha: float
    dropout: float = 0.0  # of what an adapter reads
    scaling: Scaling = "standard"
    dora: bool = False
    targets: tuple[str, ...]  # the adapted parts by Hugging Face's names in full: model.layers.0.self_attn.q_proj

    @property
    def scale(self) -> float:
        """The s of s B A."""
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        return {**asdict(self), "targets": list(self.targets)}


class Adapter(nn.Module):
    """The trained tensors of some rows of a linear layer; B is zero at first, so that nothing has changed yet."""

    def __init__(self, of: nn.Linear, rows: range, lora: LoRA, *, dtype: torch.dtype):
        super().__init__()
        self.rows, self.scale, self.dropout = rows, lora.scale, lora.dropout
        device = of.weight.device
        self.A = nn.Parameter(torch.empty(lora.rank, of.in_features, device=device, dtype=dtype))  # (r, K)
        self.B = nn.Parameter(torch.zeros(len(rows), lora.rank, device=device, dtype=dtype))  # (n, r)
        lengths = _lengths(of.weight[rows.start : rows.stop]).detach().to(dtype) if lora.dora else None
        self.magnitude = None if lengths is None else nn.Parameter(lengths)  # (n,)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """A uniform within 1 / sqrt(K), as PEFT has it; drawn on the CPU in fp32, the same everywhere."""
        bound = 1 / math.sqrt(self.A.shape[1])
        self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))

    def product(self) -> Tensor:
        """s B A (n, K), in at least fp32."""
        wide = torch.promote_types(self.A.dtype, torch.float32)
        return self.scale * (self.B.to(wide) @ self.A.to(wide))


class AdaptedLinear(Linear):
    """A linear layer whose weight and bias keep their names, and the adapters of parts of its rows."""

    def __init__(self, base: nn.Linear):
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.adapters = nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        """As if the weight were merged_weight(), to rounding; the adapters alone have dropout before them."""
        adapters = list(self._adapters())
        if self.training and any(each.dropout > 0 for each in adapters):
            # each has a mask of its own, as if it were a layer of its own
            read = torch.cat([linear(F.dropout(x, each.dropout), each.A) for each in adapters], dim=-1)
        else:
            read = linear(x, torch.cat([each.A for each in adapters]))
        added = linear(read, self._spread(adapters))
        if adapters[0].magnitude is None:
            return super().forward(x) + added
        result = self._row_factors(adapters) * (linear(x, self.weight) + added)
        return result if self.bias is None else result + self.bias

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight (N, K) that does what weight and adapters do: computed in at least fp32, then rounded once."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32), copy=True)
        for each in self._adapters():
            part = weight[each.rows.start : each.rows.stop]
            part += each.product().to(part.dtype)
            if each.magnitude is not None:
                part *= (each.magnitude.to(part.dtype) / _lengths(part))[:, None]
        return weight.to(self.weight.dtype)

    def _adapters(self) -> Iterator[Adapter]:
        for each in self.adapters.values():
            assert isinstance(each, Adapter)
            yield each

    def _spread(self, adapters: list[Adapter]) -> Tensor:
        """All s B in one matrix (N, sum of r), zero where one adapter's rows meet another's columns."""
        width, at, parts = sum(each.A.shape[0] for each in adapters), 0, []
        for each in adapters:
            rank = each.A.shape[0]
            edges = at, width - at - rank, each.rows.start, self.out_features - each.rows.stop
            parts.append(F.pad(each.scale * each.B, edges) if any(edges) else each.scale * each.B)
            at += rank
        return sum(parts[1:], start=parts[0])

    def _row_factors(self, adapters: list[Adapter]) -> Tensor:
        """DoRA's magnitude over the length of each row (N,); the length counts as constant (its section 4.3)."""
        factors, at = [], 0
        for each in adapters:
            assert each.magnitude is not None
            assert each.rows.start >= at, "in order, and apart"
            with torch.no_grad():
                part = self.weight[each.rows.start : each.rows.stop]
                lengths = _lengths(part + each.product().to(torch.promote_types(part.dtype, torch.float32)))
            factors += [each.magnitude.new_ones(each.rows.start - at), each.magnitude / lengths.to(each.magnitude)]
            at = each.rows.stop
        return torch.cat([*factors, factors[-1].new_ones(self.out_features - at)])


def _lengths(rows: Tensor) -> Tensor:
    """The Euclidean length of each row, in at least fp32."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))


def merge(model: nn.Module) -> None:
    """Put plain layers with the merged weights, which are trained, in the place of all adapted ones."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            with torch.device("meta"):
                plain = Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight, plain.bias = nn.Parameter(module.merged_weight()), module.bias
            model.set_submodule(name, plain.train(module.training))
