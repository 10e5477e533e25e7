"""One run at a time in an out_dir: a file that its main process holds locked, and that says which process that is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from sft.errors import UserError

NAME = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # some network file systems
PATIENCE_SECONDS = 2.0  # a process that was killed a moment ago may not be gone yet
SETTLING_SECONDS = 0.3  # without locks: after so long, whoever wrote last has it


@dataclass(frozen=True)
class Holder:
    """The process that a lock file names."""

    pid: int
    host: str
    since: str
    born: int | None  # by the machine's own count, since a pid is given again; None where that cannot be told

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def is_dead(self) -> bool:
        """Whether it is known to have ended: only of processes of this machine can that be told."""
        return self.host == socket.gethostname() and (not _is_alive(self.pid) or self.born != _birth_of(self.pid))


class OutDirLock:
    """The lock of one out_dir, which one process of a run takes, and leaving the context gives back.

    Where the file system has locks, the kernel gives it back when its process dies, however that comes about, and on
    whatever machine; where it has none, a process of this machine that has died is known by its pid, and one of
    another machine is not. Within one process it excludes nobody.
    """

    def __init__(self, out_dir: Path):
        self.out_dir, self.path = out_dir, out_dir / NAME
        self._file: int | None = None
        self._made: list[Path] = []  # folders, the innermost first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # whoever comes next finds that its process has ended
                self.path.unlink()
            os.close(self._file)
            self._file = None
        for folder in self._made:  # a start that came to nothing leaves nothing; what has content stays
            with contextlib.suppress(OSError):
                folder.rmdir()

    def take(self, *, say: Callable[[str], None]) -> None:
        """Make out_dir and lock it; UserError where another run has it, OSError where it cannot be written.

        `say` is told of a lock that a dead process has left. Where it is ours already, nothing happens.
        """
        if self._file is not None:
            return
        self._made = [folder for folder in (self.out_dir, *self.out_dir.parents) if not folder.exists()]
        self.out_dir.mkdir(parents=True, exist_ok=True)
        give_up = time.monotonic() + PATIENCE_SECONDS
        while True:
            holder, is_ours = self._try()
            if is_ours:
                break
            if time.monotonic() > give_up:
                raise UserError(self._refusal(holder))
            time.sleep(0.05)
        if holder is not None:
            say(f"out_dir {self.out_dir}: {holder} had it and has ended without giving it back; it is taken over")

    def holder(self) -> str | None:
        """Who has the lock now, in words, as far as that can be told without taking it; None = nobody."""
        try:
            file = os.open(self.path, os.O_RDONLY)
        except OSError:
            return None
        try:
            named = _read(file)
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in HELD:
                    return str(named or "a process that it does not name")
                return None if named is None or named.is_dead() else str(named)
            return None
        finally:
            os.close(file)

    def _try(self) -> tuple[Holder | None, bool]:
        """(the process named before, whether the lock is ours now)."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                settles = False
            except OSError as error:
                if error.errno in HELD:
                    return _read(file), False
                if error.errno not in UNSUPPORTED:
                    raise
                settles = True
            named = _read(file)
            if not _is_file(file, self.path) or (settles and named is not None and not named.is_dead()):
                return named, False  # given back meanwhile, and perhaps taken under the same name by a third
            ours = Holder(os.getpid(), socket.gethostname(), _now(), _birth_of(os.getpid()))
            self._name(file, ours)
            if settles:
                time.sleep(SETTLING_SECONDS)
                if not _is_file(file, self.path) or (written := _read(file)) != ours:
                    return written, False
            self._file, file = file, -1
            return named, True
        finally:
            if file >= 0:
                os.close(file)

    def _name(self, file: int, holder: Holder) -> None:
        """Write it in place: the lock is on this very file, so another one cannot be put there."""
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(asdict(holder)).encode(), 0)
            os.fsync(file)  # other machines see it from now on
        except OSError:
            self.path.unlink(missing_ok=True)
            raise

    def _refusal(self, holder: Holder | None) -> str:
        at_work = f"out_dir {self.out_dir}: another run is at work in it ({holder or 'it does not say which'}); "
        if holder is not None and holder.host != socket.gethostname():
            return f"{at_work}choose another --out_dir; if that run is known to have ended, remove {self.path}"
        return f"{at_work}wait for its end, or choose another --out_dir"


def _is_file(file: int, path: Path) -> bool:
    """Whether this is the file that goes by this name now."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _read(file: int) -> Holder | None:
    """Whom the file names; None where it is new, or was not written to its end."""
    try:
        holder = Holder(**json.loads(os.pread(file, 4096, 0)))
    except (ValueError, TypeError, RecursionError):
        return None
    is_pid = type(holder.pid) is int and 0 < holder.pid < 2**31
    return holder if is_pid and isinstance(holder.host, str) and isinstance(holder.since, str) else None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def _birth_of(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the machine did; None where it does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
