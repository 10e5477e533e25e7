"""Programs in forked children, in which one file operation goes wrong: killed, torn, refused, or cut off from power.

A child patches what Python writes files with (`open`, os.open, os.write, os.fsync, os.replace, ...) for the paths below
one folder, counts every operation there, and lets one of them go wrong. Python's own buffers stay what they are, so
that an operation is a call of the operating system. What C++ or Rust writes goes by unseen. Linux only: paths of
descriptors come from /proc.
"""

from __future__ import annotations

import builtins
import errno
import gc
import io
import json
import os
import re
import select
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

MODES = ("kill", "torn", "power cut", "power cut, names lost", "ENOSPC", "ENOSPC once", "EIO", "EIO once")
KILLING = MODES[:4]
CHANGING = ("create", "write", "truncate", "fsync", "close", "replace", "link", "unlink", "mkdir", "rmdir")
GROWING = ("create", "write", "truncate", "fsync", "replace", "link", "mkdir")  # what a full disk may refuse
END = "end"  # the kind of the operation that comes after all others: none


class Operation(NamedTuple):
    """The `ordinal`-th operation of a kind on files of a role, which is a name with N for its numbers."""

    kind: str
    role: str
    ordinal: int

    def __str__(self) -> str:
        return f"{self.kind} {self.role} #{self.ordinal}"


class Pair(NamedTuple):
    """An operation, and the way in which it goes wrong.

    kill: SIGKILL before it; after it is before the next one. torn: half of the bytes are written, then SIGKILL.
    power cut: SIGKILL, and no file has what was written since its last fsync. Names are as they were left, or, where
    names are lost too, as at the last fsync of their folder. ENOSPC, EIO: that error from here to the end of the
    program, a write of ENOSPC being cut in half; a full disk refuses only what needs room. once: only here.
    """

    operation: Operation
    mode: str

    def __str__(self) -> str:
        return f"{self.mode} at {self.operation}"


def modes_of(kind: str) -> tuple[str, ...]:
    """The ways in which an operation of this kind can go wrong."""
    if kind == END:
        return ("power cut", "power cut, names lost")
    if kind == "open":
        return ("kill", "EIO once")
    return tuple(
        mode for mode in MODES if (mode != "torn" or kind == "write") and ("ENOSPC" not in mode or kind in GROWING)
    )


def spread(operations: list[Operation], count: int | None) -> list[Pair]:
    """About `count` of all pairs (None = all), of every kind, role and mode, evenly over the ordinals.

    Every operation comes first with one of its modes, in turn, then with others.
    """
    starts = list(dict.fromkeys((operation.kind, operation.role) for operation in operations))
    turned = []
    for operation in operations:
        pairs = [Pair(operation, mode) for mode in modes_of(operation.kind)]
        first = (operation.ordinal + starts.index((operation.kind, operation.role))) % len(pairs)
        turned.append(pairs[first:] + pairs[:first])
    rounds = [[pairs[i] for pairs in turned if i < len(pairs)] for i in range(max(map(len, turned), default=0))]
    pairs = [pair for each in rounds for pair in each]
    if count is None or count >= len(pairs):
        return pairs
    whole = [pair for each in rounds[: count // max(1, len(operations))] for pair in each]
    rest = pairs[len(whole) :][: len(operations)]
    missing = count - len(whole)
    return whole + [rest[i * len(rest) // missing] for i in range(missing)] if rest and missing > 0 else whole


class Ended(NamedTuple):
    """How a child ended: its exit status, or minus the signal; and all that it said. `hung`: it had to be ended."""

    status: int
    output: str
    hung: bool = False


def in_child(act: Callable[[], object], output: Path, *, seconds: float = 60) -> Ended:
    """Run act() in a forked child, whose words go to the file `output`; SystemExit is its exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        gc.freeze()  # a collection looks through the child's own objects only
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  # a killed child has said its words
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            act()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(status)
    descriptor = os.pidfd_open(child)
    try:
        hung = not select.select([descriptor], [], [], seconds)[0]
        if hung:
            os.kill(child, signal.SIGKILL)
        _, state = os.waitpid(child, 0)
    finally:
        os.close(descriptor)
    return Ended(os.waitstatus_to_exitcode(state), output.read_text(errors="replace"), hung)


def operations_of(act: Callable[[], object], folder: Path, work: Path) -> list[Operation]:
    """Every operation of act() below `folder`, in order, and its end; AssertionError where it does not end well."""
    counted = work / "operations.json"

    def count() -> None:
        watch = Watch(folder, work / "shadow")
        watch.install()
        try:
            act()
        except SystemExit as stop:
            if stop.code:
                raise
        watch.remove()
        counted.write_text(json.dumps(watch.seen))

    ended = in_child(count, work / "output.txt")
    assert ended.status == 0, ended
    return [Operation(*each) for each in json.loads(counted.read_text())] + [Operation(END, "", 0)]


def disturbed(act: Callable[[], object], pair: Pair, folder: Path, work: Path, *, seconds: float = 60) -> Ended:
    """Run act() in a child in which the pair's operation goes wrong."""

    def run() -> None:
        watch = Watch(folder, work / "shadow", pair)
        watch.install()
        try:
            act()
        finally:
            if pair.operation.kind == END:
                watch.die(pair.mode)

    return in_child(run, work / "output.txt", seconds=seconds)


class Watch:
    """Counts the file operations below a folder, and lets the one of `pair` go wrong; for one forked child.

    `shadow`: an empty folder on the same file system, for what a power cut brings back.
    """

    def __init__(self, folder: Path, shadow: Path, pair: Pair | None = None):
        self.folder, self.pair = os.path.abspath(folder), pair
        self.seen: list[Operation] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.refusal = 0  # the error number of everything from now on
        self.lock = threading.RLock()
        self.disk = Disk(shadow)
        self.descriptors: dict[int, str] = {}  # of what os.open opened for writing
        self.originals: list[tuple[Any, str, Any]] = []

    def inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The absolute path of what is below the folder, or the folder; None of anything else."""
        if isinstance(path, int):
            name = self.descriptors.get(path) or os.readlink(f"/proc/self/fd/{path}")
        else:
            name = os.fsdecode(path)
            name = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), name) if dir_fd is not None else name
        name = os.path.abspath(name)
        return name if name == self.folder or name.startswith(self.folder + os.sep) else None

    def perform(self, kind: str, path: str, act: Callable[[], Any], torn: Callable[[], object] | None = None) -> Any:
        """act(), which is an operation, unless this is the one that goes wrong; `torn` does half of it."""
        with self.lock:
            role = re.sub(r"\d+", "N", os.path.relpath(path, self.folder))
            operation = Operation(kind, role, self.counts[kind, role])
            self.counts[kind, role] += 1
            self.seen.append(operation)
            if self.pair is not None and self.pair.operation == operation:
                self._go_wrong(self.pair.mode, torn)
            number = self.refusal
            if self.pair is not None and self.pair.mode.endswith("once"):
                self.refusal = 0
            if number and (kind in GROWING if number == errno.ENOSPC else kind in (*CHANGING, "open")):
                if kind == "close":
                    act()  # the descriptor is gone all the same
                elif number == errno.ENOSPC and torn is not None:
                    torn()
                raise OSError(number, os.strerror(number), path)
            return act()

    def _go_wrong(self, mode: str, torn: Callable[[], object] | None) -> None:
        if mode not in KILLING:
            self.refusal = getattr(errno, mode.removesuffix(" once"))
            return
        if mode == "torn":
            assert torn is not None
            torn()
        self.die(mode)

    def die(self, mode: str) -> None:
        """SIGKILL to this process, after what a power cut does to its files."""
        self.remove()
        if mode in ("power cut", "power cut, names lost"):
            self.disk.cut(Path(self.folder), names_are_lost=mode.endswith("lost"))
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        for module, name, replacement in self._replacements():
            self.originals.append((module, name, getattr(module, name)))
            setattr(module, name, replacement)

    def remove(self) -> None:
        for module, name, original in reversed(self.originals):
            setattr(module, name, original)
        self.originals.clear()

    def _replacements(self) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        opened = self._open()
        yield from ((module, "open", opened) for module in (builtins, io))
        yield from self._of_descriptors()
        yield from self._of_names()

    def _open(self) -> Callable[..., Any]:
        real = io.open

        def watched_open(  # as the built-in one
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            path = self.inside(file)
            if path is None or not set(mode) & set("wax+"):
                rest = (mode, buffering, encoding, errors, newline, closefd, opener)
                return real(file, *rest) if path is None else self.perform("open", path, lambda: real(file, *rest))
            is_new = not os.path.exists(path)
            raw_mode = mode.replace("b", "").replace("t", "")
            raw = self.perform("create", path, lambda: WatchedFile(self, path, file, raw_mode, closefd, opener))
            self.disk.opened(path, raw.fileno(), is_new=is_new)
            if buffering == 0:
                return raw
            kind = io.BufferedRandom if "+" in mode else io.BufferedWriter
            buffered = kind(raw, buffering if buffering > 1 else raw._blksize)
            if "b" in mode:
                return buffered
            text = io.TextIOWrapper(buffered, io.text_encoding(encoding), errors, newline, buffering == 1)
            text.mode = mode  # type: ignore[misc]
            return text

        return watched_open

    def _of_descriptors(self) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        open_, write, close, fsync, sendfile = os.open, os.write, os.close, os.fsync, os.sendfile
        truncate = os.ftruncate

        def watched_os_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            inside = self.inside(path, dir_fd)
            if inside is None or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                if inside is None or os.path.isdir(inside):
                    return open_(path, flags, mode, dir_fd=dir_fd)  # a folder can be opened where it is there
                return self.perform("open", inside, lambda: open_(path, flags, mode, dir_fd=dir_fd))
            is_new = not os.path.exists(inside)
            descriptor = self.perform("create", inside, lambda: open_(path, flags, mode, dir_fd=dir_fd))
            self.descriptors[descriptor] = inside
            self.disk.opened(inside, descriptor, is_new=is_new)
            return descriptor

        def watched_write(descriptor: int, data: Any) -> int:
            if (path := self.descriptors.get(descriptor)) is None:
                return write(descriptor, data)
            half = memoryview(data).cast("B")[: len(data) // 2]
            return self.perform("write", path, lambda: write(descriptor, data), lambda: write(descriptor, half))

        def watched_close(descriptor: int) -> None:
            path = self.descriptors.pop(descriptor, None)
            return close(descriptor) if path is None else self.perform("close", path, lambda: close(descriptor))

        def watched_fsync(file: Any) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            if (path := self.inside(descriptor)) is None:
                return fsync(descriptor)
            # Only the cut of a power that this module knows of could tell whether the disk has been waited for.
            return self.perform("fsync", path, lambda: self.disk.synced(path, descriptor))

        def watched_sendfile(out: int, source: int, offset: int, count: int) -> int:
            if (path := self.inside(out)) is None:
                return sendfile(out, source, offset, count)
            half = min(count, os.fstat(source).st_size) // 2
            return self.perform(
                "write", path, lambda: sendfile(out, source, offset, count), lambda: sendfile(out, source, offset, half)
            )

        def watched_truncate(descriptor: int, length: int) -> None:
            if (path := self.inside(descriptor)) is None:
                return truncate(descriptor, length)
            return self.perform("truncate", path, lambda: truncate(descriptor, length))

        yield from ((os, "open", watched_os_open), (os, "write", watched_write), (os, "close", watched_close))
        yield from ((os, "fsync", watched_fsync), (os, "fdatasync", watched_fsync), (os, "sendfile", watched_sendfile))
        yield os, "ftruncate", watched_truncate

    def _of_names(self) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        def of_one(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def watched(path: Any, *arguments: Any, dir_fd: int | None = None, **options: Any) -> Any:
                inside = self.inside(path, dir_fd)
                if inside is None or os.path.lexists(inside) == (kind == "mkdir"):  # it has nothing to do
                    return real(path, *arguments, dir_fd=dir_fd, **options)

                def act() -> Any:
                    if kind == "unlink":
                        self.disk.unlinking(inside)
                    return real(path, *arguments, dir_fd=dir_fd, **options)

                return self.perform(kind, inside, act)

            return watched

        def of_two(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def watched(source: Any, target: Any, **options: Any) -> Any:
                old, new = self.inside(source), self.inside(target)
                if new is None:
                    return real(source, target, **options)

                def act() -> Any:
                    self.disk.naming(kind, old or os.path.abspath(source), new)
                    return real(source, target, **options)

                return self.perform(kind, new, act)

            return watched

        yield from ((os, name, of_one("unlink", os.unlink)) for name in ("unlink", "remove"))
        yield from ((os, name, of_one(name, getattr(os, name))) for name in ("mkdir", "rmdir"))
        yield from ((os, name, of_two("replace", getattr(os, name))) for name in ("replace", "rename"))
        yield os, "link", of_two("link", os.link)


class WatchedFile(io.FileIO):
    """A file without buffer, of which every call that changes the disk is an operation."""

    def __init__(self, watch: Watch, path: str, file: Any, mode: str, closefd: bool, opener: Any):
        super().__init__(file, mode, closefd, opener)
        self.watch, self.path = watch, path

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        act, torn = super().write, view[: len(view) // 2]
        return self.watch.perform("write", self.path, lambda: act(view), lambda: act(torn))

    def truncate(self, size: int | None = None) -> int:
        act = super().truncate
        return self.watch.perform("truncate", self.path, lambda: act(size))

    def close(self) -> None:
        if not self.closed and self.watch.originals:
            self.watch.perform("close", self.path, super().close)
        else:
            super().close()


class Disk:
    """What is on the disk for certain, so that a power cut can take the rest away.

    Contents are certain after an fsync of the file, names after an fsync of their folder. New folders are certain at
    once: no journal in use today would keep what is in a folder, and lose the folder.
    """

    def __init__(self, shadow: Path):
        self.shadow = shadow
        shutil.rmtree(shadow, ignore_errors=True)
        shadow.mkdir(parents=True)
        self.certain: dict[int, bytes] = {}  # inode of a file with other contents -> its contents for certain
        self.undone: list[tuple[str, Callable[[], object]]] = []  # (folder, what undoes a change of its names)
        self.real = {name: getattr(os, name) for name in ("link", "unlink", "replace", "stat", "fstat")}
        self.real_open = io.open

    def opened(self, path: str, descriptor: int, *, is_new: bool) -> None:
        status = self.real["fstat"](descriptor)
        if status.st_size == 0:
            self.certain[status.st_ino] = b""
        elif status.st_ino not in self.certain:
            self._note(status.st_ino, descriptor)
        if is_new:
            self.undone.append((os.path.dirname(path), lambda: self._forget(path)))

    def synced(self, path: str, descriptor: int) -> None:
        if os.path.isdir(path):
            self.undone = [each for each in self.undone if each[0] != path]
            return
        inode = self.real["fstat"](descriptor).st_ino
        if inode in self.certain:
            self._note(inode, descriptor)

    def unlinking(self, path: str) -> None:
        if os.path.lexists(path):
            kept = self._kept(path)
            self.undone.append((os.path.dirname(path), lambda: self.real["link"](kept, path)))

    def naming(self, kind: str, old: str, new: str) -> None:
        """`new` is about to become the name of `old`, or another name of it."""
        if os.path.isdir(old):
            self.undone.append((os.path.dirname(new), lambda: self.real["replace"](new, old)))
            return
        kept = self._kept(new) if os.path.lexists(new) and kind == "replace" else None

        def undo() -> None:
            if kind == "replace":
                self.real["replace"](new, old)
            elif os.path.lexists(new):
                self.real["unlink"](new)
            if kept is not None:
                self.real["link"](kept, new)

        self.undone.append((os.path.dirname(new), undo))

    def cut(self, folder: Path, *, names_are_lost: bool) -> None:
        for _, undo in reversed(self.undone) if names_are_lost else ():
            undo()
        for path in folder.rglob("*"):
            certain = self.certain.get(self.real["stat"](path).st_ino)
            if path.is_file() and certain is not None:
                with self.real_open(path, "wb") as file:
                    file.write(certain)

    def _note(self, inode: int, descriptor: int) -> None:
        with self.real_open(f"/proc/self/fd/{descriptor}", "rb") as file:
            self.certain[inode] = file.read()

    def _kept(self, path: str) -> str:
        """Another name of the file, where it stays."""
        kept = str(self.shadow / str(len(os.listdir(self.shadow))))
        self.real["link"](path, kept)
        return kept

    def _forget(self, path: str) -> None:
        if os.path.lexists(path):
            self.real["unlink"](path)
