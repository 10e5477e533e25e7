"""One run at a time in an out_dir, by two processes; and what a dead one leaves behind."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import train_sft
from sft import out_dir_lock
from sft.errors import UserError
from sft.out_dir_lock import NAME, OutDirLock
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from sft.out_dir_lock import OutDirLock
with OutDirLock(Path(sys.argv[1])) as lock:
    lock.take(say=print)
    print("taken", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holder(out_dir: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock until it is told or killed."""
    command = [sys.executable, "-c", HOLD, str(out_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(out_dir_lock, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(out_dir_lock, "SETTLING_SECONDS", 0.05)


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that has none, as some that come over a network."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)


def take(out_dir: Path) -> list[str]:
    """Take the lock and give it back; what was said."""
    said: list[str] = []
    with OutDirLock(out_dir) as lock:
        lock.take(say=said.append)
        content = json.loads((out_dir / NAME).read_text())
        assert (content["pid"], content["host"]) == (os.getpid(), socket.gethostname())
    assert not (out_dir / NAME).exists()
    return said


def leave(out_dir: Path, **changes: object) -> None:
    """The lock file of a process that has ended."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    content = {"pid": gone.pid, "host": socket.gethostname(), "since": "2026-01-01T00:00:00+00:00", "born": 1}
    out_dir.mkdir(exist_ok=True)
    (out_dir / NAME).write_text(json.dumps({**content, **changes}))


def test_a_second_process_is_refused_and_told_who_has_it(tmp_path):
    with holder(tmp_path) as process:
        expected = f"another run is at work in it .process {process.pid} on {socket.gethostname()}, since 2"
        with pytest.raises(UserError, match=expected) as caught:
            take(tmp_path)
        assert caught.value.exit_status == 2
        process.communicate("done\n")
    assert take(tmp_path) == []


def test_the_lock_of_a_killed_process_is_taken_over_with_a_word(tmp_path):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert json.loads((tmp_path / NAME).read_text())["pid"] == process.pid
        (said,) = take(tmp_path)
    assert f"process {process.pid} on {socket.gethostname()}, since 2" in said
    assert "has ended without giving it back; it is taken over" in said
    assert take(tmp_path) == []


def test_a_process_that_is_about_to_die_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(out_dir_lock, "PATIENCE_SECONDS", 30)
    with holder(tmp_path) as process:
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {process.pid}"])
        started = time.monotonic()
        assert len(take(tmp_path)) == 1
        assert time.monotonic() - started > 0.3


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", '{"pid": 7}', '{"pid": 7, "host": 1, "since": "now", "born": 3}'),
        *(f'{{"pid": {pid}, "host": "elsewhere", "since": "now", "born": 3}}' for pid in ('"x"', -1, 2**70, "true")),
    ],
)
def test_a_lock_file_that_names_nobody_is_in_nobodys_way(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    assert take(tmp_path) == []


def test_a_lock_that_is_given_back_before_it_is_taken_is_made_anew(tmp_path, monkeypatch):
    """Another process removes the file after we have opened it: a lock of that file would keep nobody out."""
    lockf, removed = fcntl.lockf, []

    def remove_first(file: int, how: int) -> None:
        if not removed:
            removed.append((tmp_path / NAME).unlink())
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", remove_first)
    assert take(tmp_path) == []
    assert removed


def test_what_was_opened_is_closed(tmp_path):
    before = os.listdir("/proc/self/fd")
    with holder(tmp_path):
        opened = os.listdir("/proc/self/fd")
        with pytest.raises(UserError):
            take(tmp_path)
        assert OutDirLock(tmp_path).holder()
        assert os.listdir("/proc/self/fd") == opened
    take(tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def test_only_one_of_many_that_start_at_once_gets_it(tmp_path):
    """Also where the file goes and comes back between the opening and the locking."""
    program = (
        "import sys, time; from pathlib import Path; from sft import out_dir_lock as module\n"
        "inside = Path(sys.argv[1]) / 'inside'\n"
        "for _ in range(60):\n"
        "    with module.OutDirLock(Path(sys.argv[1])) as lock:\n"
        "        try: lock.take(say=print)\n"
        "        except module.UserError: continue\n"
        "        inside.touch(exist_ok=False); inside.unlink()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert ["".join(process.communicate()[1:]) for process in processes] == [""] * 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_locks")
class TestWithoutLocks:
    def test_a_living_process_of_this_machine_keeps_it(self, tmp_path):
        with holder(tmp_path) as process:
            with pytest.raises(UserError, match=rf"process {process.pid} .*; wait for its end"):
                take(tmp_path)
            process.kill()
            process.wait()
            assert len(take(tmp_path)) == 1

    def test_a_dead_process_of_this_machine_is_known_by_its_pid(self, tmp_path):
        leave(tmp_path)
        (said,) = take(tmp_path)
        assert "has ended without giving it back" in said

    def test_a_pid_that_was_given_again_is_another_process(self, tmp_path):
        leave(tmp_path, pid=os.getpid())
        assert len(take(tmp_path)) == 1

    def test_a_process_of_another_machine_is_refused_with_the_file_to_remove(self, tmp_path):
        leave(tmp_path, host="elsewhere")
        file = tmp_path / NAME
        with pytest.raises(UserError, match=rf"process \d+ on elsewhere, .* known to have ended, remove {file}"):
            take(tmp_path)
        file.unlink()
        assert take(tmp_path) == []

    def test_of_two_that_write_at_once_the_last_one_has_it(self, tmp_path, monkeypatch):
        def meanwhile(seconds: float) -> None:
            leave(tmp_path, host="elsewhere")

        monkeypatch.setattr(out_dir_lock.time, "sleep", meanwhile)
        with pytest.raises(UserError, match="on elsewhere"):
            take(tmp_path)

    def test_who_has_it_is_told(self, tmp_path):
        lock = OutDirLock(tmp_path)
        assert lock.holder() is None
        leave(tmp_path)
        assert lock.holder() is None
        leave(tmp_path, host="elsewhere")
        assert "on elsewhere" in lock.holder()


def test_who_has_it_is_told_without_taking_it(tmp_path):
    lock = OutDirLock(tmp_path / "new")
    assert lock.holder() is None
    with holder(tmp_path / "new") as process:
        assert lock.holder().startswith(f"process {process.pid} on ")
        process.kill()
        process.wait()
        assert lock.holder() is None
    assert (tmp_path / "new" / NAME).exists()


def test_a_start_that_comes_to_nothing_leaves_no_folder(tmp_path):
    with OutDirLock(tmp_path / "new" / "out") as lock:
        lock.take(say=print)
    assert list(tmp_path.iterdir()) == []
    with OutDirLock(tmp_path / "new" / "out") as lock:
        lock.take(say=print)
        (tmp_path / "new" / "kept").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kept"]


def test_a_lock_that_cannot_be_written_is_not_left_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with OutDirLock(tmp_path / "out") as lock, pytest.raises(OSError, match="No space left"):
        lock.take(say=print)
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_in_the_same_out_dir_is_refused_and_leaves_the_first_alone(arguments, tmp_path):
    out_dir = tmp_path / "out"
    with holder(out_dir) as process:
        before = sorted(out_dir.iterdir())
        with pytest.raises(UserError, match=f"another run is at work in it .process {process.pid} on ") as caught:
            train_sft.main(arguments())
        assert caught.value.exit_status == 2
        assert sorted(out_dir.iterdir()) == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        train_sft.main(arguments())
    assert not (out_dir / NAME).exists()


def test_a_run_holds_the_lock_from_its_first_write_to_its_last(arguments, tmp_path, monkeypatch, capsys):
    """A dry run beside it takes nothing, and says who is at work."""
    fork, out_dir = os.fork(), tmp_path / "out"
    if fork == 0:
        try:
            monkeypatch.setattr(train_sft, "loop", lambda *_, **__: time.sleep(600))
            train_sft.main(arguments())
        finally:
            os._exit(1)
    try:
        while not list(out_dir.glob("run_*.json")):
            time.sleep(0.05)
        with pytest.raises(UserError, match=f"another run is at work in it .process {fork} on "):
            train_sft.main(arguments(resume="auto"))
        train_sft.main([*arguments(resume="auto"), "--dry_run"])
        assert f"a run is at work in {out_dir}: process {fork} on " in capsys.readouterr().out
    finally:
        os.kill(fork, signal.SIGKILL)
        os.waitpid(fork, 0)
    train_sft.main(arguments(resume="auto"))
    assert f"process {fork} on {socket.gethostname()}" in capsys.readouterr().out
