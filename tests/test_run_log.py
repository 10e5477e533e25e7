import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft import run_log
from sft.errors import UserError
from sft.run_log import RunLog
from tests.conftest import ROOT


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run_log, "time", clock)
    return clock


def open_log(out_dir: Path, save_seconds: float = 30.0, **options: Any) -> RunLog:
    options = {"run_name": "test", "config": {"seed": 1}, "origin": {"seed": "default"}, **options}
    return RunLog(out_dir, save_seconds=save_seconds, **options)


def record(iter: int, **changes: Any) -> dict[str, Any]:
    numbers = {"loss": 1.5, "lr": 1e-5, "grad_norm": 0.7, "trained_tokens": 90, "tokens": 128, "time_ms": 41.5}
    return {"iter": iter, **numbers, "tokens_per_second": 3084.3, "mfu": None, "memory_gib": 1.25, **changes}


def read(log: RunLog) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(log.path.read_text(), parse_constant=refuse)


def test_the_log_has_the_promised_shape(tmp_path: Path):
    log = open_log(tmp_path / "new" / "folder", config={"seed": 1, "model": {"n_layer": 2}})
    log.startup(parameters=123)
    log.startup(devices=["cpu"])
    log.iteration(**record(10), data_wait_ms=0.5)
    log.evaluation(iter=10, val_loss=np.float32(0.5), rows=np.int64(3))
    log.checkpoint(iter=10, path=tmp_path / "ckpt_000010.pt", seconds=0.1)
    log.event("resumed", iter=10)
    log.finish("finished", {"best_val_loss": 0.5})
    shown = read(log)
    assert list(shown) == [
        *("run_name", "start_time", "parent", "status", "config", "origin", "startup_info"),
        *("training_iterations", "eval_steps", "checkpoints", "events", "summary"),
    ]
    assert shown["config"] == {"seed": 1, "model": {"n_layer": 2}}
    assert shown["startup_info"] == {"parameters": 123, "devices": ["cpu"]}
    assert shown["training_iterations"] == [record(10, data_wait_ms=0.5)]
    assert shown["eval_steps"] == [{"iter": 10, "val_loss": 0.5, "rows": 3}]
    assert shown["checkpoints"] == [{"iter": 10, "path": str(tmp_path / "ckpt_000010.pt"), "seconds": 0.1}]
    assert shown["events"][0].pop("time") >= shown["start_time"]
    assert shown["events"] == [{"kind": "resumed", "iter": 10}]
    assert (shown["status"], shown["summary"]) == ("finished", {"best_val_loss": 0.5})


def test_each_record_is_one_line(tmp_path: Path):
    log = open_log(tmp_path, config={"seed": 1, "dtype": "bfloat16"})
    for step in range(3):
        log.iteration(**record(step))
    log.finish("interrupted", {})
    lines = log.path.read_text().splitlines()
    assert '"dtype": "bfloat16"' in lines
    assert [json.loads(line.rstrip(","))["iter"] for line in lines if line.startswith('{"iter"')] == [0, 1, 2]


def test_iterations_wait_for_the_interval_and_everything_else_is_saved_at_once(tmp_path: Path, clock: Clock):
    log = open_log(tmp_path, save_seconds=30)
    log.iteration(**record(1))
    clock.now = 29.0
    log.iteration(**record(2))
    assert read(log)["training_iterations"] == []
    clock.now = 30.0
    log.iteration(**record(3))
    assert len(read(log)["training_iterations"]) == 3
    log.iteration(**record(4))
    assert len(read(log)["training_iterations"]) == 3
    rare = [
        lambda: log.evaluation(iter=4, val_loss=1.0),
        lambda: log.checkpoint(iter=4, path="ckpt.pt"),
        lambda: log.event("signal"),
        lambda: log.startup(size=1),
        lambda: log.finish("failed: out of memory", {}),
    ]
    for count, act in enumerate(rare, start=4):
        act()
        assert len(read(log)["training_iterations"]) == count
        log.iteration(**record(count + 1))
    assert read(log)["status"] == "failed: out of memory"


def test_a_number_that_is_not_finite_becomes_null_and_an_event_names_it(tmp_path: Path, clock: Clock):
    log = open_log(tmp_path)
    log.iteration(**record(7, loss=float("nan"), grad_norm=np.float32("inf")))
    log.evaluation(iter=8, by_kind={"recall": [1.0, float("-inf")]})
    log.finish("failed: the loss is not finite", {"best_val_loss": float("inf")})
    shown = read(log)
    assert shown["training_iterations"] == [record(7, loss=None, grad_norm=None)]
    assert shown["eval_steps"] == [{"iter": 8, "by_kind": {"recall": [1.0, None]}}]
    assert shown["summary"] == {"best_val_loss": None}
    assert shown["events"] == [
        {"kind": "non_finite", "field": "loss", "value": "nan", "iter": 7},
        {"kind": "non_finite", "field": "grad_norm", "value": "inf", "iter": 7},
        {"kind": "non_finite", "field": "by_kind.recall[1]", "value": "-inf", "iter": 8},
        {"kind": "non_finite", "field": "best_val_loss", "value": "inf"},
    ]


def test_a_number_that_is_not_finite_is_on_disk_at_once(tmp_path: Path, clock: Clock):
    log = open_log(tmp_path)
    log.iteration(**record(7, loss=float("nan")))
    assert read(log)["training_iterations"] == [record(7, loss=None)]


def test_each_record_is_serialised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = open_log(tmp_path, save_seconds=0)  # replaced at every record
    dumps, dumped = json.dumps, []
    monkeypatch.setattr(json, "dumps", lambda value, **options: dumped.append(value) or dumps(value, **options))
    for step in range(20):
        log.iteration(**record(step))
    assert len([value for value in dumped if isinstance(value, dict) and "iter" in value]) == 20


def test_logs_that_start_within_one_second_get_files_of_their_own(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        logs = list(pool.map(lambda number: open_log(tmp_path, run_name=str(number)), range(8)))
    assert len({log.path for log in logs}) == 8
    assert [read(log)["run_name"] for log in logs] == [str(number) for number in range(8)]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(log.path.name for log in logs)  # no partial file is left
    assert all(len(name) == len("run_20260101_120000.json") for name in names)


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_may_be_writing_is_not(tmp_path: Path):
    abandoned, fresh = (tmp_path / f".run_20200101_00000{second}.json.partial" for second in (1, 2))
    for path in (abandoned, fresh):
        path.touch()
    os.utime(abandoned, (0, 0))
    log = open_log(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([fresh, log.path])


def test_a_reader_and_a_kill_find_valid_json_at_every_moment(tmp_path: Path):
    program = (
        "import sys, itertools; from tests.test_run_log import *; log = open_log(Path(sys.argv[1]), save_seconds=0)\n"
        "print(log.path, flush=True)\n"
        "for step in itertools.count(): log.iteration(**record(step))\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ
    )
    assert writer.stdout is not None
    path = Path(writer.stdout.readline().strip())
    seen = [len(json.loads(path.read_text())["training_iterations"]) for _ in range(300)]
    while not seen[-1]:
        seen.append(len(json.loads(path.read_text())["training_iterations"]))
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    last = json.loads(path.read_text())
    assert seen == sorted(seen)
    assert len(last["training_iterations"]) >= seen[-1]
    assert last["status"] == "running"


def test_an_out_dir_that_cannot_be_written_is_the_users_to_put_right(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"out_dir .*file/run cannot be written: Not a directory"):
        open_log(tmp_path / "file" / "run")


def test_a_log_that_cannot_be_begun_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"run_.*json cannot be written: No space left on device") as caught:
        open_log(tmp_path)
    assert caught.value.exit_status == 1
    assert list(tmp_path.iterdir()) == []


def test_a_status_is_one_of_the_three(tmp_path: Path):
    with pytest.raises(AssertionError, match="done"):
        open_log(tmp_path).finish("done", {})
