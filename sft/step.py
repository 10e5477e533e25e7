"""One optimizer update on the mean loss over the trained tokens of the whole step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sft.batches import Batch
from sft.experts import RouterLoad, Routing, load_balancing_loss
from sft.loss import Loss, choose_loss
from sft.phases import phase
from sft.step_facts import Judge, Judgement
from sft.world import World


class SummedLoss(nn.Module):
    """A model and its loss as one module, so that DDP and autocast see the whole forward: Batch -> loss sum.

    The model is a module with `hidden_states(ids, positions, documents, places=)` and `head_weight`.
    """

    def __init__(
        self,
        model: Any,
        *,
        autocast_dtype: torch.dtype | None = None,
        loss: Loss | None = None,
        balance_weight: float = 0.0,
    ):
        """`loss` None: the fastest that there is for where the model is now. `balance_weight`: of a batch's
        load-balancing loss, where the model has experts; it is in the gradient, not in the sum."""
        super().__init__()
        self.router_load, self.balance_weight = RouterLoad.of(model), balance_weight
        self.model = model
        self.autocast_dtype = autocast_dtype  # None: compute in the dtype of the parameters
        weight = model.head_weight
        self.loss = loss or choose_loss("auto", device=weight.device, dtype=autocast_dtype or weight.dtype)

    def forward(self, batch: Batch, *, grad_scale: float = 1.0) -> Tensor:
        """The summed loss of the batch's trained tokens, a scalar in fp32 or wider.

        `grad_scale`, by which the caller multiplies the loss before its backward pass, saves time there.
        """
        if batch.dropout_seed is not None:
            torch.manual_seed(batch.dropout_seed)
        device = batch.input_ids.device.type
        routings: list[Routing] = []
        more = {"routings": routings} if self.router_load is not None and self.model.training else {}
        with torch.autocast(device, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            inputs = batch.input_ids, batch.positions, batch.documents
            hidden = self.model.hidden_states(*inputs, places=batch.trained, **more)
            loss = self.loss.sum(hidden, self.model.head_weight, batch, grad_scale=grad_scale)
        return self._balanced(loss, routings, grad_scale) if routings else loss

    def _balanced(self, loss: Tensor, routings: list[Routing], grad_scale: float) -> Tensor:
        """The same number, whose gradient is also that of the load-balancing loss."""
        balance = load_balancing_loss(routings)
        assert self.router_load is not None
        self.router_load.add(routings, balance)
        if not self.balance_weight:
            return loss
        weighted = balance * (self.balance_weight / grad_scale)  # by which the caller multiplies
        return loss + (weighted - weighted.detach()).to(loss.dtype)


class StepResult(NamedTuple):
    """What an update leaves to report, still on the device: reading it is a synchronisation."""

    loss_sum: Tensor  # float64 scalar: this rank's summed token losses
    grad_norm: Tensor  # the global norm before clipping
    judgement: Judgement  # whether the optimizer moved, and all else that the ranks have agreed upon


def train_step(
    loss_module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    target_weight: float,
    learning_rate: float,
    grad_clip: float | None,
    world: World,
    judge: Judge | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Update the parameters once with the gradient of (sum of losses of all ranks) / target_weight.

    Unless the loss of any rank, or the gradient, is not finite, or `judge` finds the step out of the ordinary: then
    parameters and moments stay as they are, to the bit. All ranks agree in one all-reduce, in which they also tell
    whether one was `asked_to_stop` until then.

    `loss_module` is a SummedLoss, or one wrapped in DDP; `batches` are this rank's micro-batches, of which every rank
    has equally many; `target_weight` is the sum of target weights over all ranks and micro-batches of the step.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss_sum = accumulate_gradients(loss_module, batches, target_weight=target_weight, world=world)
    with phase("optimizer"):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if grad_clip is None else grad_clip)
        judge = judge or Judge(world)
        judgement = judge.judge(loss_sum, grad_norm.detach(), target_weight=target_weight, stop=asked_to_stop())
        assert getattr(optimizer, "_step_supports_amp_scaling", False), "a fused optimizer, which can leave out a step"
        # read on the device, as where a GradScaler has found an overflow
        optimizer.found_inf = judgement.skips.float()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return StepResult(loss_sum, grad_norm.detach(), judgement)


def accumulate_gradients(
    loss_module: nn.Module, batches: Iterable[Batch], *, target_weight: float, world: World
) -> Tensor:
    """Add the gradient of the step's mean loss to .grad, all-reduced once; returns this rank's loss sum (float64)."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    scale = world.size / target_weight  # DDP averages over ranks; the sum is what we want
    for batch, is_last in _with_last(batches):
        with contextlib.nullcontext() if is_last else _no_sync(loss_module):
            with phase("forward"):
                loss = loss_module(batch, grad_scale=scale)
            with phase("backward"):
                (loss * scale).backward()
        loss_sum += loss.detach()
    return loss_sum


def _with_last(batches: Iterable[Batch]) -> Iterable[tuple[Batch, bool]]:
    """Each batch with whether it is the last one."""
    pending: Batch | None = None
    for batch in batches:
        if pending is not None:
            yield pending, False
        pending = batch
    assert pending is not None, "a step needs at least one batch"
    yield pending, True


def _no_sync(loss_module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Gradients stay local inside: DDP all-reduces with the last micro-batch only."""
    return getattr(loss_module, "no_sync", contextlib.nullcontext)()
