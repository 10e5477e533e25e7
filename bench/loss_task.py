"""One configuration of bench/loss.py: its inputs, who is right, whose option is best, and who takes how long."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.loss_inputs import (
    Draw,
    Expected,
    Pool,
    logits_gradients,
    relative_error,
)
from bench.loss_measure import (
    Contestant,
    Copy,
    Times,
    check_time,
    device_milliseconds,
    extra_bytes,
    host_syncs,
    product_layouts,
    quickest,
    reason,
    summary,
    take_turns,
)
from bench.loss_providers import EVALUATION, HEAD, LOGITS, Loss, Provider, options_of, providers_of
from sft.errors import UserError

# Of the loss, and of the norm of a gradient's error over its norm. bf16 logits of 20 are off by up to 0.06, which alone
# makes 1.5e-2, and some add up bf16 gradients chunk by chunk; a sum of bf16 losses is off by half a per cent. Whoever
# forgets the mask, a factor or a part is off by far more.
TOLERANCES = {
    torch.bfloat16: {"loss": 1e-2, "hidden gradient": 6e-2, "head gradient": 6e-2, "logits gradient": 1e-2},
    torch.float32: {"loss": 1e-4, "hidden gradient": 1e-3, "head gradient": 1e-3, "logits gradient": 1e-3},
}
COPY, PRODUCT = "floor: copy", "floor: "


@dataclass(frozen=True)
class Task:
    """A workload on the batches of a pool with a share of their tokens trained."""

    workload: str
    pool: Pool
    share: float
    draws: list[Draw]
    copy: Copy
    expected: Expected
    end: float = math.inf  # of all the minutes, on the clock of time.perf_counter

    @property
    def device(self) -> torch.device:
        return self.pool.head.device

    def prepare(self, number: int) -> tuple[list[Tensor], Draw]:
        """The tensors that a loss is given before the draw, as leaves that need gradients or as logits that a head has
        just made; with work in the queue of the GPU, so that what follows can be launched ahead of it."""
        draw = self.draws[number]
        if self.workload == EVALUATION:
            self.copy()
            return [draw.hidden, self.pool.head], draw
        hidden = draw.hidden.detach().requires_grad_()
        if self.workload == LOGITS:
            return [F.linear(hidden, self.pool.head)], draw
        self.copy()
        return [hidden, self.pool.head.detach().requires_grad_()], draw

    def run(self, loss: Loss, option: dict[str, Any], inputs: tuple[list[Tensor], Draw]) -> tuple[Tensor, ...]:
        """The loss and the gradients of the given tensors."""
        tensors, draw = inputs
        if self.workload == EVALUATION:
            with torch.no_grad():
                return (loss(*tensors, draw, **option),)
        value = loss(*tensors, draw, **option)
        return value.detach(), *torch.autograd.grad(value, tensors)

    def contestant(self, loss: Loss, option: dict[str, Any]) -> Contestant:
        return Contestant(self.prepare, partial(self.run, loss, option))

    def errors(self, contestant: Contestant) -> dict[str, float]:
        """How far a call on the first draw is from the definition."""
        value, *gradients = contestant.run(contestant.prepare(0))
        errors = {"loss": abs(value.item() / self.expected.loss - 1)}
        if self.workload == HEAD:
            wanted = (self.expected.hidden_gradient, self.expected.head_gradient)
            for name, got, right in zip(("hidden gradient", "head gradient"), gradients, wanted, strict=True):
                errors[name] = relative_error(got, right)
        elif self.workload == LOGITS:
            loss, errors["logits gradient"] = self.logits_errors(gradients[0])
            errors["loss"] = abs(value.item() / loss - 1)
        return errors

    def logits_errors(self, gradient: Tensor) -> tuple[float, float]:
        """The loss of the first draw's logits as they are, rounded, and the relative error of their gradient."""
        (logits,), draw = self.prepare(0)  # anew: a gradient may have taken their place
        loss = off = norm = torch.zeros((), dtype=torch.float64, device=self.device)
        for rows, part, right in logits_gradients(logits, draw):
            loss = loss + part
            off = off + (gradient[rows].float() - right).square().sum(dtype=torch.float64)
            norm = norm + right.square().sum(dtype=torch.float64)
        return loss.item(), (off / norm).sqrt().item()

    def tolerance(self, name: str) -> float:
        return TOLERANCES[self.pool.head.dtype][name]

    def fault(self, errors: dict[str, float]) -> str | None:
        """What is wrong with a result; None where nothing is."""
        off = [name for name, error in errors.items() if not error <= self.tolerance(name)]  # NaN is off, too
        named = (f"the {name} is off by {errors[name]:.1e}, allowed are {self.tolerance(name):.0e}" for name in off)
        return "; ".join(named) or None


def option_name(option: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in option.items()) or "default"


def entrant(task: Task, provider: Provider) -> tuple[Contestant | None, dict[str, Any]]:
    """The provider with the quickest of its options among the right ones; no contestant where none can run."""
    if provider.cuda_only and task.device.type != "cuda":
        return None, {"status": "missing", "reason": "needs a CUDA GPU"}
    try:
        loss = loaded(provider.load)
    except Exception as error:  # ImportError, and whatever a library does while it is imported
        return None, {"status": "missing", "reason": reason(error)}
    right: dict[str, Contestant] = {}
    wrong: dict[str, Contestant] = {}
    told: dict[str, Any] = {}
    errors: dict[str, dict[str, float]] = {}
    for option in options_of(provider, task.pool.head):
        check_time(task.end)
        name = option_name(option)
        contestant = task.contestant(loss, option)
        try:
            errors[name] = task.errors(contestant)
        except Exception as error:
            told[name] = reason(error)
            release(task.device, provider.name, told[name])
            continue
        told[name] = task.fault(errors[name]) or "right"
        (right if told[name] == "right" else wrong)[name] = contestant
    choices = right or wrong
    if not choices:
        return None, {"status": "failed", "reason": "; ".join(dict.fromkeys(told.values())), "options": told}
    try:
        best = next(iter(choices))
        if len(choices) > 1:
            best = quickest(choices, task.device, pool=len(task.draws))
        row = {"status": "measured" if right else "wrong", "option": best, "options": told, "errors": errors[best]}
        row |= {} if right else {"reason": told[best]}
        row["extra_bytes"] = extra_bytes(choices[best], task.device)
        row["host_syncs"] = host_syncs(choices[best], task.device)
    except Exception as error:
        release(task.device, provider.name, reason(error))
        return None, {"status": "failed", "reason": reason(error), "options": told}
    return choices[best], row


@cache
def loaded(load: Callable[[], Loss]) -> Loss:
    """What a loader gives, once: it may hold what torch.compile made."""
    return load()


def release(device: torch.device, name: str, told: str) -> None:
    """The memory that an exception's frames held is given back; a UserError where the GPU is of no use any more."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise UserError(f"{name} broke the CUDA context ({told}); run again with --leave_out='{name}'") from error
        torch.cuda.empty_cache()


def floor_contestants(task: Task) -> tuple[dict[str, Contestant], dict[str, str]]:
    """A copy, and the bare products of the workload in their quickest forms; and which forms these are."""

    def queued(_: int) -> None:
        task.copy()

    contestants, forms = {COPY: Contestant(queued, task.copy)}, {}
    if task.workload == LOGITS:
        return contestants, forms
    draw, head = task.draws[0], task.pool.head
    rows = draw.rows[: draw.trained]
    states, gradient = draw.hidden[rows], logits_gradient(task, rows)
    layouts = product_layouts(states, head, gradient)
    if task.workload == EVALUATION:
        layouts = {"logits": layouts["logits"]}
    for product, choices in layouts.items():
        tried = {form: Contestant(queued, run) for form, run in choices.items()}
        for contestant in tried.values():
            device_milliseconds(contestant, 0, task.device)  # what only its first call does
        forms[product] = quickest(tried, task.device, pool=1)
        contestants[PRODUCT + product] = tried[forms[product]]
    return contestants, forms


def logits_gradient(task: Task, rows: Tensor) -> Tensor:
    """The logits' gradient (n, V) of some rows of the first draw: products of zeros or noise take another time."""
    draw = task.draws[0]
    logits = F.linear(draw.hidden[rows], task.pool.head)
    part = Draw(draw.hidden[rows], draw.labels[rows], rows, draw.labels[rows], draw.trained)
    for some, _, gradient in logits_gradients(logits, part):
        logits[some] = gradient.to(logits.dtype)
    return logits


def floor_of(task: Task, times: dict[str, Times], forms: dict[str, str]) -> dict[str, Any]:
    """The floor in milliseconds, with its parts."""
    medians = {name: summary(taken)["milliseconds"] for name, taken in times.items() if name.startswith(PRODUCT)}
    speed = task.copy.gigabytes_per_second(medians.pop(COPY))
    head = task.pool.head
    draw = task.draws[0]
    passes = 1 if task.workload == EVALUATION else 2
    numbers = passes * draw.trained * len(head)
    if task.workload == LOGITS:
        numbers += (len(draw.labels) - draw.trained) * len(head)  # zeros
    size = numbers * head.element_size()
    products = {name.removeprefix(PRODUCT): taken for name, taken in medians.items()}
    return {
        "milliseconds": math.fsum(products.values()) + size / speed / 1e6,
        "products": {name: {"form": forms[name], "milliseconds": taken} for name, taken in products.items()},
        "bytes": size,
        "gigabytes_per_second": speed,
    }


def measured_task(task: Task, *, seconds: float, left_out: set[str]) -> dict[str, Any]:
    """Everything that is told of one configuration; options, checks and rounds take about so many seconds.

    OutOfTime where the end of all the minutes comes first.
    """
    check_time(task.end)
    end = time.perf_counter() + seconds
    head, draw = task.pool.head, task.draws[0]
    rows: dict[str, dict[str, Any]] = {}
    contestants, forms = floor_contestants(task)
    for provider in providers_of(task.workload, head):
        if provider.name in left_out:
            rows[provider.name] = {"status": "missing", "reason": "left out on request"}
            continue
        contestant, rows[provider.name] = entrant(task, provider)
        if contestant is not None:
            contestants[provider.name] = contestant
    left = max(0.0, end - time.perf_counter())
    times, failed = take_turns(contestants, task.device, seconds=left, pool=len(task.draws), end=task.end)
    for name, why in failed.items():
        if name in rows:
            rows[name] |= {"status": "failed", "reason": why}
    for name in rows.keys() & times.keys():
        rows[name].update(summary(times[name]))
    return {
        "workload": task.workload,
        "tokens": len(draw.labels),
        "share": task.share,
        "trained": draw.trained,
        "loss": task.expected.loss,
        "entropy": task.pool.entropy,
        "top_probability": task.pool.top_probability,
        "head_gradient_bytes": 4 * head.numel(),  # in fp32, in which it is to be added up
        "tolerances": TOLERANCES[head.dtype],
        "floor": floor_of(task, times, forms),
        "providers": rows,
    }
