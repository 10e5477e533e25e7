"""Files that are whole or absent: written under another name, forced to the disk, and only then given their own."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO, cast

COPIED_AT_ONCE = 1 << 20
MADV_PAGEOUT = 21  # of Linux 5.4 and later
# What file systems answer that cannot sync a folder, mostly network ones: there a rename has to do.
FOLDERS_ARE_NOT_SYNCED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM}


def partial_of(path: Path) -> Path:
    """The name of a file while it is written; one that is left over was never complete."""
    return path.with_name(path.name + ".partial")


def into_place(file: IO[bytes], partial: Path, path: Path) -> None:
    """Put an open file on the disk, close it and give it its name, so that not even a power failure leaves half of it.

    Raises OSError, with what was at `path` before untouched unless only the folder could not be synced.
    """
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(partial, path)
    sync_folder(path.parent)


def let_go(address: int, size: int) -> None:
    """Let the kernel take back the memory of mapped pages that have been read; they stay readable. Linux alone."""
    first, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_PAGEOUT)


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, partial: Path | None = None) -> None:
    """Run write(file) and put the file in place; on any error nothing is left of it, and `path` is as it was.

    The file is open for reading, too.
    """
    partial = partial or partial_of(path)
    file = cast(BinaryIO, open(partial, "w+b"))  # noqa: SIM115  # into_place closes it
    try:
        write(file)
        into_place(file, partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk refuses what is still in the buffer
            file.close()
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def copy_whole(source: Path, path: Path) -> None:
    """Make `path` a copy of a file. An OSError names it."""
    try:
        with open(source, "rb") as original:
            write_whole(path, lambda file: shutil.copyfileobj(original, file, COPIED_AT_ONCE))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def link_whole(target: Path, path: Path) -> None:
    """Make `path` another name of the file `target`: a hard link, or a copy where the file system has none."""
    if path.exists() and os.path.samefile(target, path):  # a rename would do nothing, and leave the partial name
        return
    partial = partial_of(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(partial)  # may be another name of a good file: never to be opened for writing
    try:
        os.link(target, partial)
    except OSError:
        copy_whole(target, path)
        return
    try:
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    sync_folder(path.parent)


def remove_partials(folder: Path, *patterns: str) -> None:
    """Delete what killed writers of files with such names have left; none may be at work."""
    for pattern in patterns:
        for path in folder.glob(partial_of(Path(pattern)).name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, where the file system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in FOLDERS_ARE_NOT_SYNCED:
            raise
