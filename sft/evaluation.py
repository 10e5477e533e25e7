"""Validation loss over all ranks: every row counts once, whatever the number of ranks and the batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from sft.arrays import Samples
from sft.batches import Batch, make_batch, read_row
from sft.heartbeat import heart
from sft.packing import Row, RowStream
from sft.step import SummedLoss
from sft.world import World

ROUNDS_UNTIL_ASKED = 8  # batches of an evaluation between two moments at which the ranks agree to go on


class Evaluation(NamedTuple):
    loss: float  # weighted mean over the trained tokens of all rows
    trained_tokens: int
    rows: int


@dataclass(frozen=True)
class Validation:
    """The rows to evaluate on, the same on every rank, and how many of them to compute at once."""

    samples: Samples
    block_size: int
    batch_size: int
    pad_id: int
    seed: int  # decides which rows come first, where there is a limit
    limit: int | None  # at most so many rows; None = all
    one_shape: bool = False  # fill the last batch with empty rows, for which compiled blocks need no new graph

    @cached_property
    def rows(self) -> list[Row]:
        if len(self.samples) == 0:
            return []
        stream = RowStream(self.samples.lengths, block_size=self.block_size, seed=self.seed)
        count = stream.rows_per_epoch if self.limit is None else min(self.limit, stream.rows_per_epoch)
        return [stream.row(place) for place in range(count)]

    @torch.no_grad()
    def evaluate(
        self, loss_module: SummedLoss, world: World, *, asked_to_stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """The mean token loss, by all ranks together: rank r computes rows r, r + size, ..., and one sum joins them.

        None where a rank is asked to stop meanwhile. Touches neither the random generators nor the training mode that
        it found.
        """
        assert self.rows, "there is nothing to evaluate on"
        was_training = loss_module.training
        loss_module.eval()
        mine = self._share(world)
        # loss sum, sum of target weights, trained tokens
        totals = torch.zeros(3, dtype=torch.float64, device=world.device)
        rounds = -(-len(self.rows) // (self.batch_size * world.size))  # the same for every rank
        for number in range(rounds):
            if number % ROUNDS_UNTIL_ASKED == 0 and world.any(asked_to_stop()):
                loss_module.train(was_training)
                return None
            heart.beat()
            if not (rows := mine[number * self.batch_size : (number + 1) * self.batch_size]):
                continue
            batch = self._batch(rows, world.device)
            totals[0] += loss_module(batch)
            totals[1] += sum(float(self.samples.targets[row].sum()) for row in rows)
            totals[2] += batch.trained_tokens
        loss_module.train(was_training)
        loss_sum, target_weight, trained_tokens = world.sum(totals).tolist()
        return Evaluation(loss_sum / target_weight, int(trained_tokens), len(self.rows))

    @torch.no_grad()
    def try_out(self, loss_module: SummedLoss, world: World) -> None:
        """One batch as evaluate() would compute it, for this rank alone, so that what it compiles is ready."""
        if mine := self._share(world):
            was_training = loss_module.training
            loss_module.eval()
            loss_module(self._batch(mine[: self.batch_size], world.device))
            loss_module.train(was_training)

    def _share(self, world: World) -> list[Row]:
        return self.rows[world.rank :: world.size]

    def _batch(self, rows: Sequence[Row], device: torch.device) -> Batch:
        documents = [read_row(self.samples, row) for row in rows]
        empty = self.batch_size - len(rows) if self.one_shape else 0
        return make_batch(
            [*documents, *([] for _ in range(empty))], block_size=self.block_size, pad_id=self.pad_id, device=device
        )
