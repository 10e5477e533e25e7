"""Which rows each step of a run has had, and what its logs tell of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.batches import order_hash
from sft.config import LARGEST_RUN_LOG
from sft.errors import UserError
from sft.meta_shape import ANYTHING, COUNT, TEXT, Each, misfits
from sft.packing import RowStream
from sft.run_log import logs_of
from sft.untrusted import read_json

RUN_LOG = {
    "startup_info": Each(dict, ANYTHING),
    "events": Each(list, {"kind": TEXT, "iter?": COUNT}),
    "training_iterations": Each(list, {"iter": COUNT}),
}


def read_logs(out_dir: Path) -> list[dict[str, Any]]:
    """The run logs of a folder, the oldest first; UserError where one cannot be understood."""
    logs = []
    for path, _ in logs_of(out_dir):
        try:
            log = read_json(path, most=LARGEST_RUN_LOG)
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}); move it elsewhere") from error
        if problem := next(misfits(log, RUN_LOG, "it"), None):
            raise UserError(f"{path}: not a run log ({problem}); move it elsewhere")
        logs.append(log)
    return logs


@dataclass
class PastSteps:
    """The story of a run over all its starts: a step that was taken twice is told of as it was the last time."""

    out_dir: Path
    rows_per_step: int  # where there is no log
    starts: list[tuple[int, int]] = field(default_factory=list)  # completed steps, rows of each step from there on
    orders: dict[int, str] = field(default_factory=dict)  # after a step: the order_hash, in hexadecimal digits
    odd: dict[int, Mapping[str, Any]] = field(default_factory=dict)  # what was odd about a step

    @classmethod
    def of(cls, out_dir: Path, *, rows_per_step: int) -> PastSteps:
        """As the logs of a folder tell it; `rows_per_step` is used where there are none."""
        past = cls(out_dir, rows_per_step)
        for log in read_logs(out_dir):
            if (rows := log["startup_info"].get("rows_per_step")) is None:
                continue  # it ended before its first step
            start = max((event.get("iter", 0) for event in log["events"] if event["kind"] == "resumed"), default=0)
            past.starts = [(begun, rows) for begun, rows in past.starts if begun < start] + [(start, rows)]
            past.orders = {step: order for step, order in past.orders.items() if step <= start}
            past.orders |= {
                record["iter"]: record["order"] for record in log["training_iterations"] if "order" in record
            }
            past.odd = {step: event for step, event in past.odd.items() if step <= start}
            past.odd |= {
                event["iter"]: event for event in log["events"] if event["kind"] == "odd_step" and "iter" in event
            }
        return past

    def rows_of(self, step: int) -> range:
        """The rows of a step, which is counted from 1: its number in the log."""
        known = self.starts or [(0, self.rows_per_step)]
        first = (0, known[0][1])  # also where the first logs are gone
        starts = [first, *((start, rows) for start, rows in known if 0 < start < step)]
        ends = [*(start for start, _ in starts[1:]), step - 1]
        before = sum((end - start) * rows for (start, rows), end in zip(starts, ends, strict=True))
        return range(before, before + starts[-1][1])

    def prove(self, step: int, stream: RowStream, *, at_first: bytes) -> int | None:
        """The logged step whose order_hash proves what the rows of `step` were; None where no record is that late.

        `at_first` is the hash before the first step. UserError where the log tells of other rows.
        """
        if (until := min((logged for logged in self.orders if logged >= step), default=None)) is None:
            return None
        known = max((logged for logged in self.orders if logged < step), default=0)
        order = bytes.fromhex(self.orders[known]) if known else at_first
        for each in range(known + 1, until + 1):
            order = order_hash(order, [stream.row(row) for row in self.rows_of(each)])
        if order.hex() != self.orders[until]:
            raise UserError(
                f"{self.out_dir}: its logs tell that steps {known + 1:,} to {until:,} saw other rows than these "
                "settings give; are they the run's, and the data? Its log is a configuration, too: run_*.json. "
                "--row=NUMBER shows any row"
            )
        return until
