"""The watchdog: what gets no further is ended in time, and told where it was; what goes on is left alone."""

import ctypes
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sft import watchdog as watchdog_module
from sft.arrays import open_prepared
from sft.errors import EXIT_HUNG
from sft.evaluation import Validation
from sft.heartbeat import Beat, Heart, heart
from sft.notices import Notice, Notices, within
from sft.phases import phase
from sft.run_log import RunLog
from sft.step import SummedLoss
from sft.watchdog import MOST_NAMED, Watchdog, ranks_behind, stacks
from sft.world import is_lost_peer, join_world
from tests.faulty_ranks import logs, redirect, run_faulty, said
from tests.ranks import run_ranks
from tests.tiny import CPU_WORLD, tiny_model

TIMEOUT = 1.0  # of the small programs below; a start takes none of it
slow = pytest.mark.slow


def ended(processes: int, folder: Path, main) -> list[int | None]:
    """The exit status of each rank of main(argv), what they say in files of the folder."""
    return run_ranks(processes, [str(folder)], main=main)


def wait_in_c() -> None:
    ctypes.CDLL(None).sleep(60)


def get_stuck(argv: list[str]) -> None:
    redirect(argv[0])
    with Watchdog(TIMEOUT):
        heart.begin(12)
        threading.Thread(target=wait_in_c, name="batches", daemon=True).start()
        with phase("forward"):
            wait_in_c()


def test_a_process_that_hangs_is_ended_with_its_place_and_all_stacks(tmp_path):
    started = time.monotonic()
    assert ended(1, tmp_path, get_stuck) == [EXIT_HUNG]
    assert time.monotonic() - started < 30
    told = said(tmp_path, 0)
    assert f"error: the run hangs: in step 12 (forward) since {time.strftime('%H:')}" in told
    assert "more than 1 s (hang_timeout)" in told
    assert told.count("in wait_in_c") == 2
    assert told.index("thread batches:") < told.index("thread MainThread:") < told.index("in get_stuck")
    assert "thread watchdog" not in told


def go_on(argv: list[str]) -> None:
    redirect(argv[0])
    watchdog_module.LOCKED_GRACE_SECONDS = 0.2
    with Watchdog(1.5 * TIMEOUT):
        for step in range(1, 7):
            heart.begin(step)
            time.sleep(TIMEOUT / 5)
            heart.beat()
            time.sleep(TIMEOUT / 5)


@pytest.mark.slow
def test_a_process_that_goes_on_is_left_alone_for_longer_than_the_timeout(tmp_path):
    assert ended(1, tmp_path, go_on) == [0]
    assert said(tmp_path, 0) == ""


def keep_the_lock(argv: list[str]) -> None:
    redirect(argv[0])
    watchdog_module.LOCKED_GRACE_SECONDS = 0.5
    with Watchdog(TIMEOUT):
        ctypes.PyDLL(None).sleep(60)  # what PyDLL calls keeps the interpreter's lock


def test_a_thread_that_never_gives_back_the_interpreters_lock_is_ended_with_its_stack(tmp_path):
    assert ended(1, tmp_path, keep_the_lock) == [1]
    assert "Timeout (0:00:01.5" in said(tmp_path, 0)
    assert "in keep_the_lock" in said(tmp_path, 0)


def hang_with_a_full_console(argv: list[str]) -> None:
    watchdog_module.LAST_WORDS_SECONDS = 0.3
    _reader, writer = os.pipe()
    os.set_blocking(writer, False)
    while True:
        try:
            os.write(writer, bytes(4096))
        except BlockingIOError:
            break
    os.set_blocking(writer, True)
    os.dup2(writer, 2)
    with Watchdog(TIMEOUT) as watchdog:
        watchdog.last_words = lambda status: Path(argv[0], "status.txt").write_text(status)
        wait_in_c()


def test_a_console_that_takes_no_more_does_not_keep_the_watchdog_from_its_work(tmp_path):
    assert ended(1, tmp_path, hang_with_a_full_console) == [EXIT_HUNG]
    assert (tmp_path / "status.txt").read_text() == "failed: hung in start-up"


def hang_while_the_log_is_written(argv: list[str]) -> None:
    redirect(argv[0])
    watchdog_module.LAST_WORDS_SECONDS = 0.3
    log = RunLog(argv[0], run_name="run", config={}, origin={}, save_seconds=0)

    def stuck(_: int) -> None:
        if threading.current_thread() is threading.main_thread():
            wait_in_c()

    with Watchdog(TIMEOUT) as watchdog:
        watchdog.last_words = log.last_words
        os.fsync = stuck  # type: ignore[assignment]
        log.event("anything")


def test_a_log_that_is_being_written_stays_as_it_was(tmp_path):
    assert ended(1, tmp_path, hang_while_the_log_is_written) == [EXIT_HUNG]
    (log,) = logs(tmp_path)
    assert (log["status"], log["events"]) == ("running", [])


def wait_for_each_other(argv: list[str]) -> None:
    redirect(argv[0])
    watchdog = Watchdog(4.0)
    with watchdog, join_world("cpu", timeout=watchdog.group_timeout) as world, watchdog.among(world):
        for step in (1, 2, 3):
            heart.begin(step)
            with phase("forward"):
                if (world.rank, step) == (1, 3):
                    time.sleep(0.5)  # it is seen there once
                    WHAT_HAPPENS[argv[1]]()
            with phase("backward"):
                world.sum(torch.ones(1))
                time.sleep(0.3)


def stop_for_good() -> None:
    """What has started us is not kept waiting for ever."""
    subprocess.Popen(["sh", "-c", f"sleep 12; kill -9 {os.getpid()}"], stdout=subprocess.DEVNULL)
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise ValueError("no such thing\nbut more")


WHAT_HAPPENS = {
    "stops": stop_for_good,
    "hangs": wait_in_c,
    "fails": fail,
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


@pytest.mark.parametrize(("what", "status"), [("hangs", EXIT_HUNG), pytest.param("stops", -signal.SIGKILL, marks=slow)])
def test_a_rank_that_waits_for_another_is_ended_too_and_names_it(tmp_path, what, status):
    started = time.monotonic()
    assert run_ranks(2, [str(tmp_path), what], main=wait_for_each_other) == [EXIT_HUNG, status]
    assert time.monotonic() - started < 60
    assert "error: rank 0 hangs: in step 3 (backward) since" in said(tmp_path, 0)
    assert "rank 1 was last seen" in said(tmp_path, 0)
    assert "s ago in step 3 (forward), where it had been for" in said(tmp_path, 0)
    assert "; rank 0 waits for it in step 3 (backward)" in said(tmp_path, 0)
    if what == "hangs":
        assert "error: rank 1 hangs: in step 3 (forward) since" in said(tmp_path, 1)


@pytest.mark.parametrize(
    ("what", "status", "cause"),
    [("fails", 1, "; rank 1 failed in step 3 (forward): ValueError: no such thing ..."), ("is killed", -9, "")],
)
def test_a_rank_that_loses_another_says_so_and_why(tmp_path, what, status, cause):
    assert run_ranks(2, [str(tmp_path), what], main=wait_for_each_other) == [1, status]
    assert f"error: rank 0 lost another rank in step 3 (backward){cause}\n" in said(tmp_path, 0)


def wait_in_vain(argv: list[str]) -> None:
    redirect(argv[0])
    with join_world("cpu", timeout=1.0) as world:
        if world.rank == 1:
            time.sleep(4)
        world.sum(torch.ones(1))


@pytest.mark.slow
def test_a_collective_fails_after_the_timeout_of_the_world(tmp_path):
    assert ended(2, tmp_path, wait_in_vain)[0] == 1
    assert "Timed out waiting 1000ms" in said(tmp_path, 0)


def test_collectives_fail_later_than_the_watchdog_who_tells_more():
    assert Watchdog(5.0).group_timeout >= 5.0 + watchdog_module.LOCKED_GRACE_SECONDS + 10


def test_errors_of_a_lost_connection_are_told_from_others():
    assert is_lost_peer(RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:4"))
    assert is_lost_peer(dist.DistNetworkError("the store has gone"))
    assert not is_lost_peer(RuntimeError("shapes do not fit"))
    assert not is_lost_peer(ValueError("gloo/transport"))


def test_among_one_there_is_nobody_to_tell():
    with Watchdog(60) as watchdog, watchdog.among(CPU_WORLD):
        assert "notices" not in {thread.name for thread in threading.enumerate()}
        assert watchdog.lost_peer(dist.DistNetworkError("the store has gone")) is None


def test_the_watchdog_leaves_no_thread_and_an_error_knows_its_place():
    def fail_in_a_step() -> None:
        with Watchdog(60), phase("saving"):
            assert "watchdog" in {thread.name for thread in threading.enumerate()}
            heart.begin(3)
            with phase("forward"):
                pass
            with phase("backward"):
                fail()

    with pytest.raises(ValueError, match="no such thing") as caught:
        fail_in_a_step()
    assert caught.value.__dict__["place"] == "the run failed in step 3 (backward)"
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_beat_tells_the_place_and_how_far_it_is():
    ours = Heart()
    assert ours.last.place == "start-up"
    ours.beat("evaluation")
    assert ours.last.place == "start-up (evaluation)"
    ours.begin(7)
    assert (ours.last.place, ours.last.number) == ("step 7", 0)
    ours.beat("forward")
    ours.beat()
    assert (ours.last.place, ours.last.number) == ("step 7 (forward)", 2)


def notice(step: int, number: int, failure: str | None = None) -> Notice:
    now = time.time()
    return Notice(step, number, f"step {step}", now - 30, now - 20, failure)


def test_the_ranks_that_are_furthest_behind_are_named_first_and_not_too_many():
    beat = Beat(0.0, 5, 3, "backward")
    told = {1: notice(5, 3), 2: notice(5, 2), 3: notice(4, 9), 4: notice(6, 0)}
    assert [line.split(" was")[0] for line in ranks_behind("rank 0", beat, told)] == ["rank 3", "rank 2"]
    (line,) = ranks_behind("rank 0", beat, {2: notice(5, 2)})
    assert line == (
        "rank 2 was last seen 20 s ago in step 5, where it had been for 10 s; rank 0 waits for it in step 5 (backward)"
    )
    assert list(ranks_behind("rank 0", beat, {1: notice(5, 3)})) == ["no other rank is known to be behind rank 0"]
    assert list(ranks_behind("rank 0", beat, {})) == []
    *named, rest = ranks_behind("rank 0", beat, {rank: notice(1, 0) for rank in range(1, 20)})
    assert len(named) == MOST_NAMED
    assert rest == f"and {19 - MOST_NAMED} other ranks are behind"


def test_what_takes_too_long_or_fails_is_given_up():
    started = time.monotonic()
    assert within(5, lambda: "done") == "done"
    assert within(5, lambda: 1 / 0) is None
    assert within(0.05, lambda: time.sleep(5)) is None
    assert time.monotonic() - started < 4


def test_without_a_store_there_are_no_notices(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr("sft.notices.STORE_SECONDS", 0.2)
    assert not Notices(0, 2).post(notice(1, 1))
    assert Notices(0, 2).read() == {}


def test_stacks_read_no_file(monkeypatch):
    monkeypatch.setattr("linecache.getlines", None)
    assert any("in test_stacks_read_no_file" in line for line in stacks())


def test_each_batch_of_an_evaluation_is_progress(long_validation):
    samples = open_prepared(long_validation).splits["val"]
    validation = Validation(samples, block_size=64, batch_size=1, pad_id=0, seed=0, limit=None)
    beats = []

    class Counting(SummedLoss):
        def forward(self, *args, **named):
            beats.append(heart.last.number)
            return super().forward(*args, **named)

    validation.evaluate(Counting(tiny_model(vocab_size=600)), CPU_WORLD)
    assert len(beats) == len(validation.rows) == 38
    assert beats == sorted(set(beats))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=slow)])
@pytest.mark.slow
def test_a_run_that_hangs_has_its_status_in_the_log_and_goes_on_from_its_checkpoint(arguments, tmp_path, processes):
    options = {"max_iters": 4, "save_interval": 2, "resume": "auto", "out_dir": tmp_path / "out"}
    fault, hangs = f"hang forward {processes - 1} 3", arguments(**options, hang_timeout=6 * processes)
    assert run_faulty(processes, fault, hangs, tmp_path) == [EXIT_HUNG] * processes
    place = "forward" if processes == 1 else "backward"
    (log,) = logs(tmp_path / "out")
    assert log["status"].startswith(f"failed: hung in step 3 ({place})")
    assert f"more than {6 * processes} s (hang_timeout)" in said(tmp_path, 0)
    assert ("rank 1 was last seen" in log["status"]) == (processes == 2)
    assert run_faulty(processes, "nothing start -1 -1", arguments(**options), tmp_path) == [0] * processes


@pytest.mark.parametrize(("processes", "point"), [(1, "forward"), (1, "saving"), (2, "saving")])
def test_an_unexpected_error_names_rank_step_and_phase_under_its_traceback(arguments, tmp_path, processes, point):
    options = {"max_iters": 4, "save_interval": 2, "out_dir": tmp_path / "out", "eval_interval": "none"}
    assert run_faulty(processes, f"raise {point} 0 2", arguments(**options), tmp_path) == [1] * processes
    told, who = said(tmp_path, 0), "rank 0" if processes > 1 else "the run"
    assert "Traceback (most recent call last)" in told
    assert f"error: {who} failed in step 2 ({point}): ValueError: something of the programmer's\n" in told
    (log,) = logs(tmp_path / "out")
    assert log["status"] == "failed: ValueError: something of the programmer's"
    if processes == 2:
        assert "Traceback" not in said(tmp_path, 1)
        assert "error: rank 1 lost another rank in step 2 (saving)" in said(tmp_path, 1)
