"""What a power cut leaves of the files of a folder: what is on the disk for certain."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path


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
