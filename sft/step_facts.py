"""What all ranks know of a step before the optimizer moves: one all-reduce, which the host need not wait for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sft.world import World

SHORTEST_STORY = 20  # steps before one can be out of the ordinary
MEMORY = 100  # steps: the weight of a new one in the running mean and variance is at least 1 / MEMORY


class StepFacts(NamedTuple):
    """One step, the same on every rank."""

    step: int
    loss: float  # the mean over its trained tokens
    grad_norm: float  # before clipping
    non_finite_ranks: Sequence[int]  # whose own loss was not finite; none where only the gradient was not
    is_finite: bool
    loss_spike: float  # standard deviations above the running mean; 0 where it is not beyond the limit
    norm_spike: float
    is_skipped: bool  # the optimizer did not move
    stop: bool  # a rank was asked to stop


class Ordinary:
    """Running means and variances of the loss and of the gradient norm, on the device.

    Exponential, and plain averages at first. A value beyond the limit counts as the limit, so that one outlier does not
    hide the next one, and a lasting change becomes ordinary in time.
    """

    def __init__(self, device: torch.device):
        self.steps = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(2, dtype=torch.float64, device=device)
        self.variance = torch.zeros(2, dtype=torch.float64, device=device)

    def spikes(self, values: Tensor, *, sigma: float, is_finite: Tensor) -> Tensor:
        """(2,) standard deviations by which the values are above the mean, 0 up to `sigma`; the values are learnt."""
        deviation = self.variance.sqrt().clamp_min(1e-12)
        above = (values - self.mean) / deviation
        knows = self.steps >= SHORTEST_STORY
        spikes = torch.where(knows & is_finite & (above > sigma), above, 0.0)
        learnt = torch.where(spikes > 0, self.mean + sigma * deviation, values)
        share = torch.clamp_min(1 / (self.steps + 1), 1 / MEMORY)
        change = learnt - self.mean
        variance = (1 - share) * (self.variance + share * change**2)
        self.mean = torch.where(is_finite, self.mean + share * change, self.mean)
        self.variance = torch.where(is_finite, variance, self.variance)
        self.steps = self.steps + is_finite
        return spikes

    def state(self) -> list[float]:
        return torch.cat([self.steps[None], self.mean, self.variance]).tolist()

    def load_state(self, state: Sequence[float]) -> None:
        values = torch.tensor(state, dtype=torch.float64, device=self.mean.device)
        self.steps, self.mean, self.variance = values[0], values[1:3], values[3:5]


class Judgement(NamedTuple):
    """A step's facts while they are on the device."""

    skips: Tensor  # bool scalar
    loss_sum: Tensor  # float64 scalar: of all ranks
    told: Tensor  # float64 (8 + ranks,): what StepFacts is read from


class Judge:
    """Decides on the device whether a step may move the optimizer, the same on every rank."""

    def __init__(self, world: World, *, spike_sigma: float | None = None, skip_spikes: bool = False):
        """`spike_sigma`: beyond so many standard deviations a step is out of the ordinary; None = never."""
        self.world, self.spike_sigma, self.skip_spikes = world, spike_sigma, skip_spikes
        self.ordinary = Ordinary(world.device)

    def judge(self, loss_sum: Tensor, grad_norm: Tensor, *, target_weight: float, stop: bool) -> Judgement:
        """`loss_sum` is this rank's, a float64 scalar; `grad_norm` that of all ranks' gradient, from DDP."""
        world = self.world
        own = torch.zeros(2 + world.size, dtype=torch.float64, device=world.device)
        own[0] = loss_sum
        own[1].fill_(float(stop))
        own[2 + world.rank] = ~torch.isfinite(loss_sum)
        joined = world.sum(own)
        loss, norm = joined[0] / target_weight, grad_norm.double()
        is_finite = torch.isfinite(loss) & torch.isfinite(norm)
        spikes = torch.zeros_like(self.ordinary.mean)
        if self.spike_sigma is not None:
            spikes = self.ordinary.spikes(torch.stack([loss, norm]), sigma=self.spike_sigma, is_finite=is_finite)
        skips = ~is_finite
        if self.skip_spikes:
            skips = skips | (spikes > 0).any()
        facts = torch.stack([loss, norm, is_finite.double(), skips.double(), joined[1]])
        return Judgement(skips, joined[0], torch.cat([facts, spikes, joined[2:]]))


class FactReader:
    """Facts on their way to the host: on a CPU at hand at once, on a GPU one step later, when it has them anyway.

    So all ranks read the facts of the same step at the same time, and obey together.
    """

    def __init__(self, device: torch.device):
        self._late = 1 if device.type == "cuda" else 0
        self._coming: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def send(self, step: int, judgement: Judgement) -> Iterator[StepFacts]:
        """Queue the facts of a step; those that are due."""
        told, event = judgement.told, None
        if told.is_cuda:
            told = torch.empty(told.shape, dtype=told.dtype, pin_memory=True).copy_(told, non_blocking=True)
            event = torch.cuda.current_stream(judgement.told.device).record_event()
        self._coming.append((step, told, event))
        return self._read(keep=self._late)

    def drain(self) -> Iterator[StepFacts]:
        """All that are on their way."""
        return self._read(keep=0)

    def _read(self, *, keep: int) -> Iterator[StepFacts]:
        while len(self._coming) > keep:
            step, told, event = self._coming.popleft()
            if event is not None:
                event.synchronize()
            yield facts_of(step, told.tolist())


def facts_of(step: int, told: Sequence[float]) -> StepFacts:
    loss, norm, is_finite, skips, stop, loss_spike, norm_spike, *non_finite = told
    ranks = [rank for rank, flag in enumerate(non_finite) if flag]
    return StepFacts(step, loss, norm, ranks, bool(is_finite), loss_spike, norm_spike, bool(skips), stop > 0)
