"""Checkpoints on disk: whole or absent, read as data, never as code."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sft.errors import UserError

NUMBERED = re.compile(r"ckpt_(\d{6,})\.pt")
FOREIGN_OBJECT = re.compile(r"GLOBAL (\S+)")  # what torch.load names when it refuses to build something
PARTIAL = ".partial"


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dict in a checkpoint file, its tensors on the CPU and mapped from the file rather than read.

    Only plain containers and tensors are admitted (`weights_only=True`): nothing in the file is executed.
    Raises UserError when the file is missing, damaged, holds other objects, or is not a dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; name a ckpt_*.pt file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # whatever bytes that are no checkpoint happen to do to an unpickler
        if found := FOREIGN_OBJECT.search(str(error)):
            raise UserError(
                f"{path}: refused, since it holds {found[1]}, which is not plain data and could run code when read; "
                "save it again as a dict of tensors and numbers"
            ) from error
        raise UserError(f"{path}: damaged or cut short, or no PyTorch checkpoint at all; use another one") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not the dict of a checkpoint")
    return content


def save_checkpoint(
    folder: str | os.PathLike[str], content: dict[str, Any], *, iter_num: int, best: bool, keep: int | None
) -> Path:
    """Write `ckpt_{iter_num}.pt`, point `ckpt.pt` (and `ckpt_best.pt`, if best) at it, keep the newest `keep` of them.

    At every moment the folder holds only whole checkpoints; what a kill leaves behind ends in `.partial`.
    """
    folder = Path(folder)
    path = folder / f"ckpt_{iter_num:06d}.pt"
    _write_whole(path, lambda partial: torch.save(content, partial))
    _point(folder / "ckpt.pt", path)
    if best:
        _point(folder / "ckpt_best.pt", path)
    if keep is not None:
        for _, old in numbered_checkpoints(folder)[keep:]:
            old.unlink()
    return path


def numbered_checkpoints(folder: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """(iter_num, path) of every `ckpt_NNNNNN.pt` in a folder, the newest first."""
    found = []
    for path in Path(folder).glob("ckpt_*.pt"):
        if match := NUMBERED.fullmatch(path.name):
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def newest_checkpoint(folder: str | os.PathLike[str], *, warn: Callable[[str], None]) -> Path | None:
    """The newest numbered checkpoint of a folder that can be read; None where there is none.

    A damaged newer one is passed over with a warning. Raises UserError when there are some but none can be read.
    """
    candidates = numbered_checkpoints(folder)
    for _, path in candidates:
        try:
            read_checkpoint(path)
        except UserError as error:
            warn(f"warning: {error}")
        else:
            return path
    if candidates:
        raise UserError(f"{folder}: none of its {len(candidates)} checkpoints can be read; start in another out_dir")
    return None


def remove_partial_files(folder: str | os.PathLike[str]) -> None:
    """Delete what a killed save left behind."""
    for path in Path(folder).glob(f"ckpt*{PARTIAL}"):
        path.unlink(missing_ok=True)


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Run write(partial path), force it to disk, then rename it to `path` in one atomic act."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _point(name: Path, target: Path) -> None:
    """Make `name` another name of the file `target`: a hard link, or a copy where the file system has no links."""

    def link_or_copy(partial: Path) -> None:
        partial.unlink(missing_ok=True)
        try:
            os.link(target, partial)
        except OSError:
            shutil.copyfile(target, partial)

    _write_whole(name, link_or_copy)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems refuse to sync a folder; the rename stands
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
