import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft.batches import order_hash
from sft.errors import UserError
from sft.packing import RowStream
from sft.past_steps import PastSteps, read_logs

STREAM = RowStream(np.arange(3, 40), block_size=64, seed=5)
AT_FIRST = bytes(range(16))


class Logs:
    """The logs of a run over several starts, with the orders that a trainer would tell."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0

    def add(self, first: int, last: int, *, first_row: int, rows_per_step: int, interval: int = 1, **more: Any) -> None:
        """Of the steps from first to last; their orders are those of a run that has seen all rows until then."""
        records = []
        for step in range(first, last + 1):
            if step % interval == 0:
                rows = range(first_row + (step - first + 1) * rows_per_step)
                order = order_hash(AT_FIRST, [STREAM.row(row) for row in rows])
                records.append({"iter": step, "order": order.hex()})
        events = [] if first == 1 else [{"kind": "resumed", "iter": first - 1}]
        log = {"startup_info": {"rows_per_step": rows_per_step}, "events": events, "training_iterations": records}
        log["events"] += more.pop("events", [])
        (self.folder / f"run_20260101_00000{self.count}.json").write_text(json.dumps({**log, **more}))
        self.count += 1

    def past(self, rows_per_step: int = 9) -> PastSteps:
        return PastSteps.of(self.folder, rows_per_step=rows_per_step)


@pytest.fixture
def logs(tmp_path) -> Logs:
    return Logs(tmp_path)


def test_before_the_first_log_steps_have_the_rows_that_the_settings_ask_for(logs):
    past = logs.past(rows_per_step=9)
    assert (past.rows_of(1), past.rows_of(5)) == (range(9), range(36, 45))
    assert past.prove(5, STREAM, at_first=AT_FIRST) is None


def test_the_log_knows_better_than_the_settings_how_many_rows_a_step_has(logs):
    logs.add(1, 4, first_row=0, rows_per_step=2)
    assert [logs.past().rows_of(step) for step in (1, 4, 6)] == [range(2), range(6, 8), range(10, 12)]


def test_a_run_that_goes_on_with_other_rows_per_step_is_followed(logs):
    logs.add(1, 4, first_row=0, rows_per_step=2)
    logs.add(5, 6, first_row=8, rows_per_step=3)
    logs.add(7, 9, first_row=14, rows_per_step=1)
    rows = [row for step in range(1, 12) for row in logs.past().rows_of(step)]
    assert rows == list(range(8 + 6 + 5))
    for step in range(1, 10):
        assert logs.past().prove(step, STREAM, at_first=AT_FIRST) == step


def test_steps_that_were_taken_again_are_told_of_as_they_were_the_last_time(logs):
    """Killed after step 6, resumed from step 3 with other rows: what the first log told of steps 4 to 6 is void."""
    logs.add(1, 6, first_row=0, rows_per_step=2, events=[{"kind": "odd_step", "iter": 5}])
    logs.add(4, 4, first_row=6, rows_per_step=5)
    past = logs.past()
    assert [past.rows_of(step) for step in (3, 4, 5)] == [range(4, 6), range(6, 11), range(11, 16)]
    assert past.odd == {}
    assert past.prove(4, STREAM, at_first=AT_FIRST) == 4
    assert past.prove(5, STREAM, at_first=AT_FIRST) is None


def test_a_start_that_a_later_one_has_gone_back_behind_is_forgotten(logs):
    logs.add(1, 6, first_row=0, rows_per_step=2)
    logs.add(7, 8, first_row=12, rows_per_step=5)
    logs.add(4, 9, first_row=6, rows_per_step=1)
    assert [logs.past().rows_of(step) for step in (3, 4, 8)] == [range(4, 6), range(6, 7), range(10, 11)]
    assert logs.past().prove(8, STREAM, at_first=AT_FIRST) == 8


def test_without_the_first_logs_the_oldest_that_is_there_tells_how_many_rows_a_step_had(logs):
    logs.add(5, 6, first_row=8, rows_per_step=2)
    logs.add(7, 8, first_row=12, rows_per_step=3)
    assert [logs.past().rows_of(step) for step in (2, 5, 7)] == [range(2, 4), range(8, 10), range(12, 15)]
    assert logs.past().prove(7, STREAM, at_first=AT_FIRST) == 7


def test_a_step_between_two_records_is_proven_by_the_later_one(logs):
    logs.add(1, 10, first_row=0, rows_per_step=2, interval=5)
    assert [logs.past().prove(step, STREAM, at_first=AT_FIRST) for step in (1, 5, 6, 10)] == [5, 5, 10, 10]


@pytest.mark.parametrize("step", [1, 7])
def test_rows_of_another_stream_are_refused(logs, step):
    logs.add(1, 10, first_row=0, rows_per_step=2, interval=5)
    other = RowStream(np.arange(3, 40), block_size=64, seed=6)
    first = 1 if step <= 5 else 6
    message = rf"its logs tell that steps {first} to {first + 4} saw other rows than these settings give"
    with pytest.raises(UserError, match=message):
        logs.past().prove(step, other, at_first=AT_FIRST)


def test_other_data_are_refused_at_the_first_steps(logs):
    logs.add(1, 10, first_row=0, rows_per_step=2, interval=5)
    with pytest.raises(UserError, match="saw other rows"):
        logs.past().prove(1, STREAM, at_first=bytes(16))


def test_a_start_that_ended_before_its_first_step_tells_nothing(logs):
    logs.add(1, 4, first_row=0, rows_per_step=2)
    logs.add(3, 3, first_row=4, rows_per_step=2, startup_info={})
    assert logs.past().prove(4, STREAM, at_first=AT_FIRST) == 4


@pytest.mark.parametrize("content", ["{", "[]", '{"status": "running"}', '{"startup_info": 3}'])
def test_what_is_no_run_log_is_named(tmp_path, content):
    (tmp_path / "run_20260101_000000.json").write_text(content)
    with pytest.raises(UserError, match=r"run_20260101_000000\.json: not (valid JSON|a run log).*; move it elsewhere"):
        read_logs(tmp_path)
