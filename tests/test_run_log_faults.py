"""What becomes of a run log on a disk that fails, between two records, and from one run to the next."""

import builtins
import errno
import json
import os
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import train_sft
from sft import run_log
from sft.checkpoint import newest_checkpoint
from sft.errors import UserError
from sft.run_log import RunLog
from tests.test_run_log import Clock, open_log, read, record


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run_log, "time", clock)
    return clock


class Disk:
    """A disk that refuses one operation of the run log's files while it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, operation: str, number: int = errno.ENOSPC):
        self.is_full, self.tries, self.number = False, 0, number
        owner, name = (builtins, "open") if operation == "open" else (os, operation)
        original = getattr(owner, name)

        def act(first: Any, *others: Any, **options: Any) -> Any:
            if self.is_full and self.is_of_a_log(first):
                self.tries += 1
                raise OSError(self.number, os.strerror(self.number), first)
            return original(first, *others, **options)

        monkeypatch.setattr(owner, name, act)

    @staticmethod
    def is_of_a_log(file: Any) -> bool:
        name = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else str(file)
        return ".run_" in name


def kinds(log: RunLog) -> list[str]:
    return [event["kind"] for event in read(log)["events"]]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("operation", ["open", "fsync", "replace"])
def test_a_disk_that_fails_costs_no_record_and_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, clock: Clock, operation, number
):
    log, disk = open_log(tmp_path), Disk(monkeypatch, operation, number)
    log.event("before")
    disk.is_full = True
    for moment in (10, 20, 30):
        clock.now = moment
        log.event(f"at {moment}")
        assert kinds(log) == ["before"]
        assert list(tmp_path.iterdir()) == [log.path]
    assert disk.tries == 3
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert f"cannot be written ({os.strerror(number)}); the run goes on, and tries again" in printed
    disk.is_full, clock.now = False, 42.5
    log.evaluation(iter=7, val_loss=1.0)
    assert kinds(log) == ["before", "at 10", "at 20", "at 30", "log_unwritten"]
    assert read(log)["eval_steps"] == [{"iter": 7, "val_loss": 1.0}]
    told = read(log)["events"][-1]
    assert (told["seconds"], told["problem"]) == (32.5, os.strerror(number))
    assert capsys.readouterr().out == f"{log.path} is written again, after 32 s\n"
    clock.now = 43
    log.event("after")
    assert kinds(log)[-2:] == ["log_unwritten", "after"]


def test_a_full_disk_is_not_tried_at_each_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock):
    log, disk = open_log(tmp_path, save_seconds=0), Disk(monkeypatch, "fsync")
    disk.is_full = True
    for step in range(100):
        clock.now = step / 20
        log.iteration(**record(step))
    assert disk.tries == 5


def eventually(is_so: Any, seconds: float = 10.0) -> bool:
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if is_so():
            return True
        time.sleep(0.01)
    return False


def test_a_record_that_no_other_follows_is_written_in_time(tmp_path: Path):
    log = open_log(tmp_path, save_seconds=0.3)
    log.iteration(**record(1))
    log.iteration(**record(2))
    assert read(log)["training_iterations"] == []
    assert eventually(lambda: len(read(log)["training_iterations"]) == 2)
    log.iteration(**record(3))
    assert eventually(lambda: len(read(log)["training_iterations"]) == 3)


def test_a_disk_that_works_again_is_noticed_where_nothing_more_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_log, "RETRY_SECONDS", 0.1)
    log, disk = open_log(tmp_path, save_seconds=0), Disk(monkeypatch, "replace")
    disk.is_full = True
    log.event("told")
    assert eventually(lambda: disk.tries >= 3)
    disk.is_full = False
    assert eventually(lambda: kinds(log) == ["told", "log_unwritten"])


def test_the_timer_and_the_run_never_write_into_each_other(tmp_path: Path):
    log = open_log(tmp_path, save_seconds=0.001)
    give_up = time.monotonic() + 1
    step = 0
    while time.monotonic() < give_up:
        step += 1
        log.iteration(**record(step))
        if step % 50 == 0:
            log.event("now")
        if step % 7 == 0:
            time.sleep(0.001)
        json.loads(log.path.read_text())
    log.finish("finished", {})
    assert [one["iter"] for one in read(log)["training_iterations"]] == list(range(1, step + 1))
    assert list(tmp_path.iterdir()) == [log.path]


def test_a_finished_log_has_no_timer_left(tmp_path: Path):
    log = open_log(tmp_path, save_seconds=0.1)
    log.iteration(**record(1))
    log.finish("finished", {})
    log.path.unlink()
    time.sleep(0.3)
    assert not log.path.exists()


def test_a_last_word_that_cannot_be_written_fails_what_was_finished_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(run_log, "RETRY_SECONDS", 0.01)
    disk = Disk(monkeypatch, "fsync")
    finished, preempted = open_log(tmp_path), open_log(tmp_path)
    disk.is_full = True
    with pytest.raises(UserError, match="cannot be written to its end: No space left on device") as caught:
        finished.finish("finished", {})
    assert caught.value.exit_status == 1
    assert disk.tries == run_log.LAST_ATTEMPTS
    preempted.finish("preempted", {})
    assert "warning: " in capsys.readouterr().out.splitlines()[-1]
    assert [read(log)["status"] for log in (finished, preempted)] == ["running"] * 2


def test_a_last_word_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log, disk = open_log(tmp_path), Disk(monkeypatch, "fsync")
    disk.is_full = True

    def freed(seconds: float) -> None:
        disk.is_full = False

    monkeypatch.setattr(run_log.time, "sleep", freed)
    log.finish("finished", {})
    assert read(log)["status"] == "finished"
    assert kinds(log) == ["log_unwritten"]


def the_logs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("run_*.json"))]


def test_a_run_on_a_disk_with_no_room_for_its_log_goes_on_and_says_so(arguments, tmp_path, monkeypatch):
    disk = Disk(monkeypatch, "fsync")
    iteration = RunLog.iteration

    def filling(log: RunLog, **numbers: Any) -> None:
        disk.is_full = 2 <= numbers["iter"] < 6
        iteration(log, **numbers)

    monkeypatch.setattr(RunLog, "iteration", filling)
    monkeypatch.setattr(run_log, "RETRY_SECONDS", 0)
    train_sft.main(arguments(max_iters=8, log_save_seconds=0))
    (log,) = the_logs(tmp_path / "out")
    assert log["status"] == "finished"
    assert [one["iter"] for one in log["training_iterations"]] == list(range(1, 9))
    assert [event["kind"] for event in log["events"]] == ["log_unwritten"]


def test_a_run_whose_log_cannot_be_ended_has_failed_with_all_its_checkpoints(arguments, tmp_path, monkeypatch, capsys):
    disk = Disk(monkeypatch, "replace", errno.EIO)
    iteration = RunLog.iteration

    def filling(log: RunLog, **numbers: Any) -> None:
        disk.is_full = True
        iteration(log, **numbers)

    monkeypatch.setattr(RunLog, "iteration", filling)
    monkeypatch.setattr(run_log, "RETRY_SECONDS", 0.01)
    with pytest.raises(UserError, match="cannot be written to its end: Input/output error") as caught:
        train_sft.main(arguments(max_iters=6))
    assert caught.value.exit_status == 1
    assert newest_checkpoint(tmp_path / "out", warn=print).name == "ckpt_000006.pt"
    assert the_logs(tmp_path / "out")[0]["status"] == "running"
    assert capsys.readouterr().out.count("the run goes on, and tries again") == 1


def test_each_log_names_the_one_before_it_and_how_that_ended(tmp_path: Path):
    first = open_log(tmp_path)
    second = open_log(tmp_path)
    second.finish("failed: the disk", {})
    third = open_log(tmp_path)
    third.path.write_text("torn")
    fourth = open_log(tmp_path)
    assert [read(log)["parent"] for log in (first, second, fourth)] == [None, first.path.name, third.path.name]
    assert read(first)["startup_info"] == {}
    assert read(second)["startup_info"] == {"parent_ended": "running: it was killed"}
    assert read(fourth)["startup_info"] == {"parent_ended": "its log cannot be read"}
    assert read(first)["status"] == "running"
    assert read(open_log(tmp_path))["parent"] == fourth.path.name


def test_the_names_tell_the_order_where_the_clock_was_set_back(tmp_path: Path):
    ahead = tmp_path / f"run_{datetime.now() + timedelta(hours=1):{run_log.STAMP}}.json"
    ahead.write_text('{"status": "finished"}')
    log = open_log(tmp_path)
    assert log.path.name > ahead.name
    assert read(log)["parent"] == ahead.name
    assert read(log)["startup_info"] == {"parent_ended": "finished"}


def test_somebody_elses_names_are_no_run_logs(tmp_path: Path):
    for name in ("run_20200101_999999.json", "run_x.json", "run_20200101_000000.json.bak"):
        (tmp_path / name).write_text("{}")
    assert read(open_log(tmp_path))["parent"] is None


def test_a_resumed_run_names_its_parent_and_its_checkpoint(arguments, tmp_path):
    train_sft.main(arguments(max_iters=4, save_interval=2, lr_decay_iters=8))
    train_sft.main(arguments(max_iters=8, save_interval=2, lr_decay_iters=8, resume="required"))
    first, second = the_logs(tmp_path / "out")
    assert (first["parent"], first["status"]) == (None, "finished")
    assert second["parent"] == min(path.name for path in (tmp_path / "out").glob("run_*.json"))
    assert second["startup_info"]["parent_ended"] == "finished"
    (resumed,) = [event for event in second["events"] if event["kind"] == "resumed"]
    assert Path(resumed["path"]).name == "ckpt_000004.pt"
    assert [one["iter"] for log in (first, second) for one in log["training_iterations"]] == list(range(1, 9))
