"""Signals: noted, obeyed by all ranks between two steps, and a run that goes on as if there had been none."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sft import signals
from sft.signals import Presses, StopSignals
from tests.conftest import ROOT
from tests.faulty_ranks import assert_same_end, evaluations, logs, run_faulty, said

STEPS = 12
OPTIONS = {"max_iters": STEPS, "dropout": 0.1, "eval_interval": 5, "save_interval": 10, "resume": "auto"}
INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


@pytest.fixture
def by_torchrun(monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")


@pytest.fixture(autouse=True)
def not_by_torchrun(monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.mark.parametrize(
    ("times", "is_second"),
    [
        ([(INT, 0)], False),
        ([(INT, 0), (INT, 0.1)], True),
        ([(INT, 0), (INT, 60)], True),
        ([(INT, 0), (TERM, 60)], False),  # a scheduler's
        ([(TERM, 0), (TERM, 60), (INT, 61)], False),
        ([(USR1, 0), (INT, 60), (USR1, 70)], False),
    ],
)
def test_a_second_press_is_another_ctrl_c(times, is_second):
    presses = Presses()
    assert [presses.is_second(number, now) for number, now in times][-1] == is_second


@pytest.mark.usefixtures("by_torchrun")
def test_torchrun_passes_on_a_second_ctrl_c_as_sigterm():
    presses = Presses()
    assert not presses.is_second(TERM, 0)
    assert not presses.is_second(INT, 10)
    assert not presses.is_second(TERM, 10.5)
    assert presses.is_second(TERM, 12)


@pytest.mark.usefixtures("by_torchrun")
def test_what_torchrun_passes_on_within_a_second_is_the_same_press():
    presses = Presses()
    assert [presses.is_second(INT, now) for now in (0, 0.9, 1.1)] == [False, False, True]


@pytest.mark.parametrize("number", [TERM, INT, USR1])
def test_a_signal_is_noted_and_the_handlers_are_put_back(number):
    before = [signal.getsignal(each) for each in signals.STOPPING]
    with StopSignals() as noted:
        assert noted.received is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), USR1)
        assert noted.received == number
    assert [signal.getsignal(each) for each in signals.STOPPING] == before
    assert "signals" not in {thread.name for thread in threading.enumerate()}


def test_a_second_ctrl_c_interrupts_and_a_process_that_obeys_is_not_killed(monkeypatch):
    monkeypatch.setattr(signals, "SAME_SECONDS", 0.01)

    def press_twice() -> None:
        with StopSignals():
            os.kill(os.getpid(), INT)
            time.sleep(0.05)
            os.kill(os.getpid(), INT)
            time.sleep(10)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert time.monotonic() - started < signals.LAST_WORDS_SECONDS


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(INT, signal.SIG_IGN)
    try:
        with StopSignals() as noted:
            os.kill(os.getpid(), INT)
            assert noted.received is None
            assert signal.getsignal(INT) is signal.SIG_IGN
    finally:
        signal.signal(INT, before)


def test_what_never_comes_back_to_the_interpreter_ends_soon_after_the_second_ctrl_c():
    program = (
        "import ctypes, signal\n"
        "from sft import signals\n"
        "signals.LAST_WORDS_SECONDS = 0.2\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with signals.StopSignals():\n"
        "    print('ready', flush=True)\n"
        "    for _ in range(9):\n"  # one call in C after the other, as a collective whose rank has gone
        "        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
        "        ctypes.CDLL(None).sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        started = time.monotonic()
        process.send_signal(INT)
        time.sleep(signals.SAME_SECONDS + 0.2)
        assert process.poll() is None
        process.send_signal(INT)
        assert process.wait(timeout=10) == 130
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("started_by", ["torchrun", "a shell"])
def test_the_end_of_torchrun_is_a_request_to_stop_and_that_of_a_shell_is_none(monkeypatch, started_by):
    if started_by == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    monkeypatch.setattr(signals, "LOOK_SECONDS", 0.02)
    with StopSignals() as noted:
        time.sleep(0.1)
        assert noted.received is None
        monkeypatch.setattr(os, "getppid", lambda: 1)
        time.sleep(0.2)
        assert noted.received == (TERM if started_by == "torchrun" else None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody interrupts, by its number of ranks."""
    folders: dict[int, Path] = {}

    def run(processes: int, arguments) -> Path:
        if processes not in folders:
            folder = folders[processes] = tmp_path_factory.mktemp(f"whole_{processes}")
            statuses = run_faulty(processes, "nothing start -1 -1", arguments(**OPTIONS, out_dir=folder), folder)
            assert statuses == [0] * processes, said(folder, 0)
        return folders[processes]

    return run


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("processes", "fault", "stops_after"),
    [
        (1, "int forward 0 6", 6),
        pytest.param(1, "term evaluation 0 5", 5, marks=slow),
        pytest.param(1, "usr1 saving 0 10", 11, marks=slow),
        pytest.param(2, "usr1 forward 1 7", 7, marks=slow),
        pytest.param(2, "term evaluation 1 5", 5, marks=slow),
        pytest.param(2, "int evaluation 0 0", 0, marks=slow),
        pytest.param(2, "term saving 0 5", 6, marks=slow),
        pytest.param(3, "int forward 2 1", 1, marks=slow),
    ],
)
def test_a_run_that_was_asked_to_stop_has_saved_and_goes_on_as_if_it_had_not(
    arguments, long_validation, tmp_path, whole, processes, fault, stops_after
):
    """Asked of one rank; all of them stop after the same step, and an evaluation that was cut short is made up for."""

    def options(**changes):
        return arguments(**{"sft_data_dir": long_validation, **OPTIONS, **changes})

    expected, out_dir = whole(processes, options), tmp_path / "out"
    assert run_faulty(processes, fault, options(out_dir=out_dir), tmp_path) == [75] * processes
    (log,) = logs(out_dir)
    assert (log["status"], log["summary"]["iter"]) == ("preempted", stops_after)
    assert torch.load(out_dir / "ckpt.pt", weights_only=True)["iter_num"] == stops_after
    assert f"stopped by a signal after step {stops_after} of {STEPS}, and saved" in said(tmp_path, 0)
    if "evaluation" in fault:
        assert stops_after not in evaluations(out_dir)
    again = run_faulty(processes, "nothing start -1 -1", options(out_dir=out_dir), tmp_path)
    assert again == [0] * processes
    assert_same_end(out_dir, expected)
    assert sum(len(log["eval_steps"]) for log in logs(out_dir)) == len(evaluations(out_dir)), "each is made once"


def test_a_signal_in_the_last_step_changes_nothing(arguments, long_validation, tmp_path):
    options = {**OPTIONS, "max_iters": 2, "eval_interval": "none", "sft_data_dir": long_validation}
    assert run_faulty(1, "term forward 0 2", arguments(**options, out_dir=tmp_path / "out"), tmp_path) == [0]
    assert [log["status"] for log in logs(tmp_path / "out")] == ["finished"]


def test_a_signal_before_the_run_begins_simply_ends_it(arguments, tmp_path):
    assert run_faulty(1, "term start 0 0", arguments(out_dir=tmp_path / "out"), tmp_path) == [-signal.SIGTERM]
    assert not list((tmp_path / "out").glob("run_*.json"))
    assert not list((tmp_path / "out").glob("ckpt*.pt"))


def test_a_second_ctrl_c_ends_a_run_in_the_middle_of_a_step(arguments, tmp_path):
    started = time.monotonic()
    assert run_faulty(1, "int-twice forward 0 3", arguments(out_dir=tmp_path / "out"), tmp_path) == [130]
    (log,) = logs(tmp_path / "out")
    assert (log["status"], log["summary"]["iter"]) == ("interrupted", 2)
    assert "interrupted\n" in said(tmp_path, 0)
    assert time.monotonic() - started < 60
    assert not list((tmp_path / "out").glob("ckpt*.pt"))
