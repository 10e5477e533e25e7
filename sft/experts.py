"""A mixture of experts: each token is computed by the few feed-forward parts that a router chooses for it.

The load-balancing loss is that of the Switch Transformer (arXiv:2101.03961, equations 4 to 6), over all layers at once
as in Transformers: E times the sum over experts of (share of tokens that chose it) x (mean probability given to it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sft.attention_backends import is_without_content
from sft.errors import UserError
from sft.linear import Linear

# Shapes: N tokens, n = N * k of them with one expert each, E experts, D width, F inner width of an expert.


class Routing(NamedTuple):
    """How the router of one block has spread the real tokens of a batch over its experts."""

    chosen: Tensor  # (E,) fp32: how often each expert was chosen
    probability: Tensor  # (E,) fp32: the sum over tokens of the probability given to each, which has a gradient
    tokens: Tensor  # () fp32: real tokens


def load_balancing_loss(routings: Sequence[Routing]) -> Tensor:
    """A scalar, k where all experts are chosen equally often; with gradients through the probabilities alone."""
    tokens = torch.stack([each.tokens for each in routings]).sum().clamp(min=1)
    chosen = torch.stack([each.chosen for each in routings]).sum(0) / tokens
    probability = torch.stack([each.probability for each in routings]).sum(0) / tokens
    return len(chosen) * (chosen * probability).sum()


def balance_weight(setting: float | None, model: Any) -> float:
    """The weight of the load-balancing loss: the setting, else what the model says; 0 without experts.

    UserError for a setting that can have no effect.
    """
    if RouterLoad.of(model) is not None:
        return model.config.router_aux_loss_coef if setting is None else setting
    if setting is not None:
        raise UserError("router_aux_loss_coef is for a mixture of experts, and this model is none; leave it out")
    return 0.0


class RouterLoad:
    """What the routers of a model have done since they were last asked: sums on the device, which nothing waits for."""

    def __init__(self, blocks: int, experts: int, device: torch.device):
        self.chosen = torch.zeros(blocks, experts, dtype=torch.float64, device=device)  # how often each expert was
        self.balance = torch.zeros(2, dtype=torch.float64, device=device)  # sum of the losses of batches; batches

    @classmethod
    def of(cls, model: nn.Module) -> RouterLoad | None:
        """None for a model without experts."""
        routers = [module.router for module in model.modules() if isinstance(module, MixtureOfExperts)]
        return cls(len(routers), len(routers[0].weight), routers[0].weight.device) if routers else None

    @torch.no_grad()
    def add(self, routings: Sequence[Routing], loss: Tensor) -> None:
        self.chosen += torch.stack([each.chosen for each in routings])
        self.balance += torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])

    def take(self) -> Tensor:
        """All sums in one row; they begin again at 0."""
        sums = torch.cat([self.chosen.flatten(), self.balance])
        self.chosen.zero_()
        self.balance.zero_()
        return sums

    def record(self, sums: Sequence[float]) -> dict[str, float | int]:
        """What a log record tells of such sums: loads are in shares of an even one, so that 1 is even and 0 is idle."""
        *chosen, loss, batches = sums
        blocks, experts = self.chosen.shape
        rows = [chosen[block * experts : (block + 1) * experts] for block in range(blocks)]
        loads = [count * experts / (sum(row) or 1) for row in rows for count in row]
        return {
            "balance_loss": loss / (batches or 1),
            "least_load": min(loads),
            "largest_load": max(loads),
            "idle_experts": loads.count(0),
        }


class MixtureOfExperts(nn.Module):
    """A router and E SwiGLU experts, whose weights are stacked."""

    def __init__(self, width: int, *, experts: int, chosen: int, inner_width: int, normalized: bool):
        """`normalized`: the weights of a token's `chosen` experts are divided by their sum."""
        super().__init__()
        self.chosen, self.normalized = chosen, normalized
        self.router = Linear(width, experts, bias=False)
        self.w_gate = nn.Parameter(torch.empty(experts, inner_width, width))
        self.w_value = nn.Parameter(torch.empty(experts, inner_width, width))
        self.w_out = nn.Parameter(torch.empty(experts, width, inner_width))

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Routing]:
        """(..., D) for x (..., D); where `real` (...) is False, a token is not routed and comes out as 0."""
        tokens, E = x.flatten(0, -2), len(self.w_gate)
        probabilities = F.softmax(self.router(tokens), dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
        weights, experts = probabilities.topk(self.chosen, dim=-1)  # (N, k)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        if real is not None:
            mask = real.reshape(-1, 1)
            experts = experts.masked_fill(~mask, E)  # after the last one
            weights, probabilities = weights * mask, probabilities * mask
        counts = torch.zeros(E + 1, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add(0, experts.flatten(), torch.ones_like(experts.flatten()))[:E]
        routed = mixed_experts(tokens, experts, weights.to(x.dtype), counts, self.w_gate, self.w_value, self.w_out)
        count = torch.full((), len(tokens), device=x.device) if real is None else real.sum()
        return routed.view_as(x), Routing(counts.float(), probabilities.sum(0), count.float())


def mixed_experts(
    tokens: Tensor, experts: Tensor, weights: Tensor, counts: Tensor, w_gate: Tensor, w_value: Tensor, w_out: Tensor
) -> Tensor:
    """(N, D): for each token the weighted sum of what its experts make of it.

    tokens (N, D), experts and weights (N, k), where expert E stands for none; counts (E,) are those of each expert.
    """
    N, k = experts.shape
    order = experts.flatten().argsort(stable=True)  # (n,): places in (N, k), expert after expert, none at the end
    ends = counts.cumsum(0)
    is_routed = (torch.arange(N * k, device=tokens.device) < ends[-1])[:, None]
    # What lies behind the last expert is not computed: nothing of it may come through, in either direction.
    mine = torch.where(is_routed, tokens[order // k], 0)
    share = grouped_feed_forward if can_group(tokens, w_gate) else feed_forward_one_by_one
    computed = torch.where(is_routed, share(mine, counts, w_gate, w_value, w_out), 0)
    result = torch.zeros(N * k, computed.shape[1], dtype=computed.dtype, device=computed.device)
    result = result.index_copy(0, order, computed).view(N, k, -1)
    return (result * weights[..., None].to(result.dtype)).sum(1).to(tokens.dtype)


def can_group(tokens: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's grouped product can be used: on a GPU, in bf16, where rows begin at multiples of 16 bytes."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else tokens.dtype
    return tokens.is_cuda and dtype == torch.bfloat16 and weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0


def grouped_feed_forward(x: Tensor, counts: Tensor, w_gate: Tensor, w_value: Tensor, w_out: Tensor) -> Tensor:
    """SwiGLU of x (n, D), the first counts[0] rows by the first expert, and so on; rows left over are undefined.

    The host knows no count: one launch serves all experts, and those without tokens cost nothing.
    """
    ends = counts.cumsum(0).to(torch.int32)
    x, w_gate, w_value, w_out = (each.bfloat16() for each in (x, w_gate, w_value, w_out))
    with torch.autocast("cuda", enabled=False):
        gate = F.grouped_mm(x, w_gate.transpose(1, 2), offs=ends)
        value = F.grouped_mm(x, w_value.transpose(1, 2), offs=ends)
        return F.grouped_mm(F.silu(gate) * value, w_out.transpose(1, 2), offs=ends)


def feed_forward_one_by_one(x: Tensor, counts: Tensor, w_gate: Tensor, w_value: Tensor, w_out: Tensor) -> Tensor:
    """The same, expert after expert, those without tokens left out; waits for the counts, and so cuts a graph."""
    n, E = len(x), len(w_gate)
    even = [n // E + (each < n % E) for each in range(E)]  # where nobody knows: on meta, in an estimate
    lengths = even if x.is_meta or is_without_content(x) else counts.tolist()
    lengths.append(n - sum(lengths))
    parts = []
    for expert, rows in enumerate(x.split(lengths)):
        if expert == E:
            parts.append(torch.zeros_like(rows))
        elif len(rows) or (lengths[E] == n and expert == 0):  # one has a gradient, of 0, where no token is routed
            inner = F.silu(F.linear(rows, w_gate[expert])) * F.linear(rows, w_value[expert])
            parts.append(F.linear(inner, w_out[expert]))
    return torch.cat([part.to(parts[0].dtype) for part in parts])
