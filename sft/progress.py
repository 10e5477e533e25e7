"""What happened since the last log record: losses stay on the device until a record asks for them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sft.batches import Batch
from sft.experts import RouterLoad
from sft.speed import compiled_graphs
from sft.world import World


@dataclass
class Totals:
    """Sums over all ranks and over the steps since the last record."""

    steps: int = 0
    loss_sum: float = 0.0
    target_weight: float = 0.0
    trained_tokens: int = 0
    tokens: int = 0
    attended_pairs: int = 0
    skipped: int = 0  # steps after which the optimizer did not move; loss_sum and target_weight are of the others
    router_sums: list[float] = field(default_factory=list)  # RouterLoad's, of a model with experts
    recompiled: int = 0  # graphs that torch.compile has made after the warm-up
    seconds: float = 0.0  # of this process, in steps alone
    stall_seconds: float = 0.0  # the part of them in which it waited for a batch, or told of earlier steps

    @property
    def loss(self) -> float:
        """The weighted token mean: divided once, here, where sum and weight are complete."""
        return self.loss_sum / self.target_weight if self.target_weight else math.nan


class Progress:
    """Sums of the steps since the last record, and the time that they took (evaluation and saving not counted)."""

    def __init__(self, world: World, router_load: RouterLoad | None = None):
        self.world, self.router_load = world, router_load
        self.totals = Totals()
        # this rank's loss sum; the target weights of all ranks, and the steps left out
        self._loss_sum, self._target_weight, self._skipped = torch.zeros(3, dtype=torch.float64, device=world.device)
        self._counts = [0, 0, 0]  # this rank's trained tokens, tokens and attended pairs
        self._graphs: int | None = None  # that torch.compile had made until the last flush; None = not counted yet
        self._clock: float | None = None  # when the time not yet in totals began; None while it stands still

    def counting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, each counted as it passes."""
        for batch in batches:
            for place, count in enumerate((batch.trained_tokens, batch.tokens, batch.attended_pairs)):
                self._counts[place] += count
            yield batch

    def add_step(self, loss_sum: Tensor, target_weight: float, skips: Tensor) -> None:
        """Count one step by this rank's loss sum and the whole step's target weight. Does not read the device."""
        self._loss_sum += torch.where(skips, 0.0, loss_sum)
        self._target_weight += (~skips).double() * target_weight
        self._skipped += skips
        self.totals.steps += 1

    def flush(self) -> Totals:
        """Join all ranks' sums into the totals: one all-reduce and one device read. Every rank must call it."""
        graphs = compiled_graphs()
        recompiled = 0 if self._graphs is None else graphs - self._graphs
        counts = torch.tensor([*self._counts, recompiled], dtype=torch.float64, device=self.world.device)
        routers = [] if self.router_load is None else [self.router_load.take()]
        of_all = self.world.sum(torch.cat([self._loss_sum.reshape(1), counts, *routers]))
        numbers = torch.cat([of_all, torch.stack([self._target_weight, self._skipped])]).tolist()
        joined, router_sums = [*numbers[:5], *numbers[-2:]], numbers[5:-2]
        self._read_clock()  # after the device read: the queued work has been done
        self.totals.loss_sum += joined[0]
        self.totals.trained_tokens += int(joined[1])
        self.totals.tokens += int(joined[2])
        self.totals.attended_pairs += int(joined[3])
        self.totals.recompiled += int(joined[4])
        self.totals.target_weight += joined[5]
        self.totals.skipped += int(joined[6])
        earlier = self.totals.router_sums or [0.0] * len(router_sums)
        self.totals.router_sums = [a + b for a, b in zip(earlier, router_sums, strict=True)]
        for each in (self._loss_sum, self._target_weight, self._skipped):
            each.zero_()
        self._counts = [0, 0, 0]
        if self._graphs is not None:
            self._graphs = graphs
        return self.totals

    def take(self) -> Totals:
        """The totals since the last record; begins the next one. Every rank must call it."""
        totals = self.flush()
        self.totals = Totals()
        return totals

    def start_clock(self) -> None:
        """Steps are timed from here on; work that the device has yet to finish is not theirs."""
        self._wait()
        self._clock = time.perf_counter()

    def begin(self) -> None:
        """What torch.compile makes on any rank from here on counts as recompiled, and the warm-up's routes are gone."""
        self._graphs = compiled_graphs()
        if self.router_load is not None:
            self.router_load.take()

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Time inside is not step time; work that the device has yet to finish beforehand is."""
        self._wait()
        self._read_clock()
        self._clock = None
        yield
        self.start_clock()

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Time inside is step time in which no step gets on."""
        started = time.perf_counter()
        yield
        self.totals.stall_seconds += time.perf_counter() - started

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to log the same means; call flush() on every rank first."""
        return asdict(self.totals)

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.totals = Totals(**state)

    def _wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def _read_clock(self) -> None:
        if self._clock is not None:
            now = time.perf_counter()
            self.totals.seconds += now - self._clock
            self._clock = now
