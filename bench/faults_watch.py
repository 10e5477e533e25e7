"""Counts the file operations of a process, and lets one of them go wrong: killed, torn, refused, or cut off from power.

What Python writes files with (`open`, os.open, os.write, os.fsync, os.replace, ...) is patched for the paths below one
folder, in a forked child. Python's own buffers stay what they are, so that an operation is a call of the operating
system. What C++ or Rust writes goes by unseen. Linux only: paths of descriptors come from /proc.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.faults_disk import Disk
from bench.faults_pairs import GROWING, KILLING, Operation, Pair


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
            is_the_one = self.pair is not None and self.pair.operation == operation
            if self.pair is not None and is_the_one:
                self._go_wrong(self.pair.mode, torn)
            if not self._refuses(kind, path):
                return act()
            number = self.refusal
            if self.pair is not None and self.pair.mode.endswith("once"):
                self.refusal = 0
            if kind == "close":
                act()  # the descriptor is gone all the same
            elif number == errno.ENOSPC and torn is not None and is_the_one:
                torn()
            raise OSError(number, os.strerror(number), path)

    def _refuses(self, kind: str, path: str) -> bool:
        if self.refusal == errno.ENOSPC:
            return kind in GROWING and not (kind == "create" and os.path.exists(path))
        return self.refusal != 0

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
            if (path := self.descriptors.pop(descriptor, None)) is None:
                close(descriptor)
            else:
                self.perform("close", path, lambda: close(descriptor))

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
