"""What becomes of the facts of a step: events that name its rows, the end after too many, the request to stop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sft.batches import TrainLoader
from sft.errors import EXIT_DIVERGED, UserError
from sft.journal import Journal
from sft.step_facts import FactReader, Judge, Judgement, StepFacts


class StepWatch:
    """Reads the facts of every step, the same on every rank, and keeps what a resumed run has to know of them."""

    def __init__(
        self, judge: Judge, loader: TrainLoader, journal: Journal, *, max_skipped_steps: int, sources: Sequence[str]
    ):
        """`sources`: the names of what origins count."""
        self.judge, self.loader, self.journal, self.sources = judge, loader, journal, sources
        self.max_skipped_steps = max_skipped_steps
        self.stops = False  # a rank was asked to stop, and all know it
        self.skipped = 0  # steps of the whole run
        self.skipped_in_a_row = 0
        self._facts = FactReader(judge.world.device)
        self._first_rows: dict[int, int] = {}  # of the steps whose facts are on their way

    def note(self, step: int, judgement: Judgement, *, rows_seen: int) -> None:
        """Take the facts of a step, whose rows begin at `rows_seen`; heed those that have come."""
        self._first_rows[step] = rows_seen
        self._heed(self._facts.send(step, judgement))

    def drain(self) -> None:
        """Heed all facts that there are. On a GPU it waits."""
        self._heed(self._facts.drain())

    def state(self) -> dict[str, Any]:
        """For a checkpoint, after drain()."""
        counts = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return {**counts, "ordinary": self.judge.ordinary.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.judge.ordinary.load_state(state["ordinary"])

    def _heed(self, facts: Iterable[StepFacts]) -> None:
        for each in facts:
            first_row = self._first_rows.pop(each.step)
            self.stops |= each.stop
            self.skipped += each.is_skipped
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if each.is_skipped else 0
            if each.is_skipped or each.loss_spike or each.norm_spike:
                self._tell(each, first_row)
            if self.skipped_in_a_row >= self.max_skipped_steps:
                raise UserError(
                    f"step {each.step}: {self.skipped_in_a_row} steps in a row were skipped (max_skipped_steps), the "
                    f"last since {reason(each)}; the weights are those of step {each.step - self.skipped_in_a_row}. "
                    "Nothing was saved after the last checkpoint. Look at the rows with tools/show_step.py; lower "
                    "learning_rate, or clean the data",
                    exit_status=EXIT_DIVERGED,
                )

    def _tell(self, facts: StepFacts, first_row: int) -> None:
        rows = self.rows_of(facts, first_row)
        details = {"iter": facts.step, "loss": facts.loss, "grad_norm": facts.grad_norm, "rows": rows}
        self.journal.odd_step(
            facts.step,
            f"{'skipped' if facts.is_skipped else 'odd'}: {reason(facts)}",
            samples=self.samples_of(rows),
            **details,
            reason=reason(facts),
            skipped=facts.is_skipped,
        )

    def rows_of(self, facts: StepFacts, first_row: int) -> list[int]:
        """The numbers of the step's rows in the stream; of those ranks alone whose loss is not finite, if any."""
        numbers = range(first_row, first_row + self.loader.rows_per_step)
        if not facts.non_finite_ranks:
            return list(numbers)
        return sorted(
            row for rank in facts.non_finite_ranks for share in self.loader.shares(numbers, rank) for row in share
        )

    def samples_of(self, rows: Sequence[int]) -> list[str]:
        """Where the samples of some rows come from: `source:record`."""
        origins = self.loader.samples.origins
        samples = [sample for row in rows for sample in self.loader.stream.row(row).tolist()]
        return [f"{self.sources[source]}:{record}" for source, record, _ in origins[samples].tolist()]


def reason(facts: StepFacts) -> str:
    """What is odd about a step, in words."""
    if facts.non_finite_ranks:
        return f"the loss on rank {', '.join(map(str, facts.non_finite_ranks))} is {facts.loss}"
    if not facts.is_finite:
        return f"the gradient's norm is {facts.grad_norm}"
    odd = (("loss", facts.loss, facts.loss_spike), ("gradient norm", facts.grad_norm, facts.norm_spike))
    return ", ".join(f"the {name} {value:.4g} is {by:.1f} sigma above its mean" for name, value, by in odd if by)
