"""torchrun and a run to which something happens: it ends in time, says who and where, and goes on to the same end."""

import re
import signal
import time
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.conftest import ROOT
from tests.faulty_ranks import assert_same_end, logs, run_faulty, said
from tests.launch import torchrun

pytestmark = pytest.mark.slow

RANKS, STEPS = 2, 12
OPTIONS = {"max_iters": STEPS, "dropout": 0.1, "eval_interval": 5, "save_interval": 4, "resume": "auto"}
SHUTDOWN_SECONDS = 30  # of torchrun, where a rank has failed
START_SECONDS = 60  # of torchrun and two ranks, on a machine that has other work
ALL_SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@pytest.fixture
def options(arguments, long_validation):
    def make(**changes: object) -> list[str]:
        return arguments(**{"sft_data_dir": long_validation, **OPTIONS, **changes})

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def expected(whole: Path, options) -> Path:
    """The folder of a run that nothing happens to."""
    if not (whole / "ckpt.pt").exists():
        assert run_faulty(RANKS, "nothing start -1 -1", options(out_dir=whole), whole) == [0] * RANKS
    return whole


def run(fault: str, arguments: list[str], *torchrun_options: str) -> CompletedProcess:
    script = ROOT / "tests" / "faulty_run.py"
    return torchrun(RANKS, *torchrun_options, script, *fault.split(), *arguments, check=False)


def goes_on(out_dir: Path, expected: Path, options, tmp_path: Path) -> None:
    """The same command, without what happened, ends as if it never had."""
    assert run_faulty(RANKS, "nothing start -1 -1", options(out_dir=out_dir), tmp_path) == [0] * RANKS, said(
        tmp_path, 0
    )
    assert_same_end(out_dir, expected)


@pytest.mark.parametrize(
    ("fault", "torchrun_options"),
    [
        ("parent-term forward 0 6", []),
        ("parent-int evaluation 0 5", []),
        ("parent-usr1 forward 0 6", [ALL_SIGNALS]),
        ("parent-term forward 0 6", ["--max-restarts=3"]),  # what torchrun is told is no failure
    ],
)
def test_a_signal_to_torchrun_saves_and_stops_all_ranks(options, tmp_path, expected, fault, torchrun_options):
    done = run(fault, options(out_dir=tmp_path / "out"), *torchrun_options)
    assert done.returncode == 1
    step = fault.split()[-1]
    assert f"stopped by a signal after step {step} of {STEPS}, and saved" in done.stderr
    assert [log["status"] for log in logs(tmp_path / "out")] == ["preempted"]
    goes_on(tmp_path / "out", expected, options, tmp_path)


@pytest.mark.parametrize("fault", ["parent-usr1-nap forward 0 6", "parent-kill-nap forward 0 6"])
def test_ranks_whose_torchrun_has_died_save_and_stop(options, tmp_path, expected, fault):
    """SIGUSR1 is not among the signals that torchrun handles unless told to: it dies of it. Ranks look after it once a
    second: the step lasts longer than that."""
    number = signal.SIGUSR1 if "usr1" in fault else signal.SIGKILL
    assert run(fault, options(out_dir=tmp_path / "out")).returncode == -number
    assert [log["status"] for log in logs(tmp_path / "out")] == ["preempted"]
    goes_on(tmp_path / "out", expected, options, tmp_path)


@pytest.mark.parametrize("fault", ["kill forward 1 6", "kill saving 0 8", "term forward 1 6", "raise forward 0 7"])
def test_torchrun_restarts_all_ranks_which_go_on_by_themselves(options, tmp_path, expected, fault):
    """A rank that saved and stopped since it alone was asked to is a failure for torchrun, too."""
    done = run(fault, options(out_dir=tmp_path / "out"), "--max-restarts=3")
    assert done.returncode == 0, done.stderr
    first, second = logs(tmp_path / "out")
    assert (first["status"] == "preempted") == fault.startswith("term")
    assert second["status"] == "finished"
    assert_same_end(tmp_path / "out", expected)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("kill forward 1 6", ["error: rank 0 lost another rank in step 6 (backward)\n", "exitcode  : -9"]),
        ("kill saving 0 4", ["error: rank 1 lost another rank in step 4 (saving)\n", "exitcode  : -9"]),
        (
            "raise forward 1 6",
            [
                "error: rank 1 failed in step 6 (forward): ValueError: something of the programmer's\n",
                "error: rank 0 lost another rank in step 6 (backward); rank 1 failed in step 6 (forward): ValueError",
                "traceback : rank 1 failed in step 6 (forward): ValueError: something of the programmer's",
            ],
        ),
        (
            "raise saving 0 4",
            [
                "error: rank 0 failed in step 4 (saving): ValueError: something of the programmer's\n",
                "error: rank 1 lost another rank in step 4 (saving); rank 0 failed in step 4 (saving): ValueError",
            ],
        ),
    ],
)
def test_a_rank_that_dies_ends_the_job_which_names_rank_and_step(options, tmp_path, expected, fault, says):
    started = time.monotonic()
    done = run(fault, options(out_dir=tmp_path / "out"))
    assert time.monotonic() - started < START_SECONDS
    assert done.returncode == 1
    for line in says:
        assert line in done.stderr.replace("\t", " ")
    goes_on(tmp_path / "out", expected, options, tmp_path)


@pytest.mark.parametrize("fault", ["stop forward 1 6", "hang saving 0 4", "gil forward 1 6"])
def test_a_wedged_rank_ends_the_job_in_time_with_stacks(options, tmp_path, expected, fault):
    """A stopped process does not heed SIGTERM: torchrun gives it its time before it is killed."""
    hang_timeout, (_, phase, rank, step) = 10, fault.split()
    other = 1 - int(rank)
    started = time.monotonic()
    done = run(fault, options(out_dir=tmp_path / "out", hang_timeout=hang_timeout), "--shutdown-timeout=5")
    assert time.monotonic() - started < START_SECONDS + hang_timeout + SHUTDOWN_SECONDS
    assert done.returncode == 1
    waits = "backward" if phase == "forward" else phase
    assert f"error: rank {other} hangs: in step {step} ({waits}) since " in done.stderr
    assert re.search(
        rf"rank {rank} was last seen .*; rank {other} waits for it in step {step} \({waits}\)", done.stderr
    )
    assert re.search(r'thread MainThread:\n  File ".*/tests/faulty_run.py", line \d+, in <module>\n', done.stderr)
    assert "exitcode  : 4" in done.stderr.replace("\t", " ")
    (log,) = logs(tmp_path / "out")
    assert log["status"].startswith("failed: hung in step ")
    goes_on(tmp_path / "out", expected, options, tmp_path)


def test_a_shutdown_timeout_below_a_step_and_a_save_loses_the_steps_since_the_last_checkpoint(
    options, tmp_path, expected, monkeypatch
):
    monkeypatch.setenv("NAP", "15")
    fault = "parent-term-nap forward 0 6"
    done = run(fault, options(out_dir=tmp_path / "out"), "--shutdown-timeout=3")
    assert done.returncode == 1
    assert "forcefully exiting via 9" in done.stderr
    (log,) = logs(tmp_path / "out")
    assert log["status"] == "running"
    assert [each["iter"] for each in log["checkpoints"]] == [4, 5]
    goes_on(tmp_path / "out", expected, options, tmp_path)


def test_a_second_ctrl_c_to_torchrun_stops_at_once(options, tmp_path, monkeypatch):
    monkeypatch.setenv("NAP", "60")
    started = time.monotonic()
    done = run("parent-int-twice-nap forward 0 6", options(out_dir=tmp_path / "out"))
    assert done.returncode == 1
    assert time.monotonic() - started < START_SECONDS
    assert [log["status"] for log in logs(tmp_path / "out")] == ["interrupted"]
