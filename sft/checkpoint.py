"""Checkpoints on disk: whole or absent, verified before use, read as data, never as code."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sft.errors import UserError
from sft.files import link_whole, write_whole
from sft.seal import ARCHIVE_STARTS, damage, layout, seal

NUMBERED = re.compile(r"ckpt_([0-9]{6,})\.pt")
NEWEST, BEST = "ckpt.pt", "ckpt_best.pt"  # further names of numbered ones
FEWEST_WHILE_TRAINING = 2  # of two good ones one may turn out to be damaged
FOREIGN_OBJECT = re.compile(r"GLOBAL (\S+)")  # what torch.load names when it refuses to build something
NO_CHECKPOINT = "damaged or cut short, or no PyTorch checkpoint at all; use another one"


class DamagedCheckpoint(UserError):
    """The bytes of the file are not those that were written."""


def read_checkpoint(path: str | os.PathLike[str], *, verify: bool = True) -> dict[str, Any]:
    """The dict in a checkpoint file, its tensors on the CPU and mapped from the file rather than read.

    `verify` reads the whole file once and compares its checksums; leave it out only where this has been done already.
    Only plain containers and tensors are admitted (`weights_only=True`): nothing in the file is executed.
    Raises UserError when the file is missing, damaged, holds other objects, or is not a dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; name a ckpt_*.pt file")
    try:
        with open(path, "rb") as file:
            is_archive = file.read(len(ARCHIVE_STARTS)) == ARCHIVE_STARTS
        if verify and is_archive:
            _verify(path)
        content = _mapped(path) if is_archive else _legacy(path)
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason})") from error
    except UserError:
        raise
    except Exception as error:  # whatever bytes that are no checkpoint happen to do to an unpickler
        if found := FOREIGN_OBJECT.search(str(error)):
            raise UserError(
                f"{path}: refused, since it holds {found[1]}, which is not plain data and could run code when read; "
                "save it again as a dict of tensors and numbers"
            ) from error
        raise (UserError if is_archive else DamagedCheckpoint)(f"{path}: {NO_CHECKPOINT}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not the dict of a checkpoint")
    return content


def _verify(path: Path) -> None:
    try:
        found = damage(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # as the reader of archives has it
        raise DamagedCheckpoint(f"{path}: {NO_CHECKPOINT}") from error
    if found is not None:
        raise DamagedCheckpoint(f"{path}: damaged ({found}); use another one")


def _mapped(path: Path) -> Any:
    """The content of an archive, its tensors mapped; ValueError where one of them is not made of a whole record.

    torch.load maps as many bytes as the pickle says, whatever the record has, its neighbours included.
    """
    with open(path, "rb") as file:  # which refuses what is compressed before anything of it is spread out
        records = [(start, size) for name, start, size, _ in layout(file)[0] if name.split("/")[1:2] == ["data"]]
    held = []

    def stay(storage: Any, location: str) -> Any:
        held.append((storage.data_ptr(), storage.nbytes()))
        return storage  # on the CPU, wherever it came from

    content = torch.load(path, map_location=stay, weights_only=True, mmap=True)
    of_tensors, of_records = (sorted(place for place in places if place[1]) for places in (held, records))
    if _apart(of_tensors) != _apart(of_records):
        raise ValueError("its tensors are not what its records are")
    return content


def _apart(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The places (start, size) as seen from the first one."""
    return [(start - places[0][0], size) for start, size in places]


def _legacy(path: Path) -> Any:
    """The content of a file as PyTorch wrote it before 1.6: no archive, and without checksums."""
    with open(path, "rb") as file:
        content = torch.load(file, map_location="cpu", weights_only=True)
        if file.read(1):
            raise ValueError("bytes after its end")
    return content


def save_checkpoint(
    folder: str | os.PathLike[str],
    content: dict[str, Any],
    *,
    iter_num: int,
    best: bool,
    keep: int | None,
    last: bool = False,
) -> Path:
    """Write `ckpt_{iter_num}.pt`, point `ckpt.pt` (and `ckpt_best.pt`, if best) at it, keep the newest `keep` of them.

    While training, that is unless it is the `last`, two are kept at least. Nothing is deleted before the new one is
    safe on the disk. Raises OSError with the older ones as they were; what a kill leaves behind ends in `.partial`.
    """
    folder = Path(folder)
    path = folder / f"ckpt_{iter_num:06d}.pt"
    write_checkpoint(path, content)
    link_whole(path, folder / NEWEST)
    if best:
        link_whole(path, folder / BEST)
    if keep is not None:
        # A number beyond this one is of a checkpoint that was passed over: no substitute for one of this run.
        ours = [old for number, old in numbered_checkpoints(folder) if number <= iter_num]
        for old in ours[keep if last else max(keep, FEWEST_WHILE_TRAINING) :]:
            with contextlib.suppress(OSError):  # the next save tries again
                os.unlink(old)
    return path


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write one checkpoint file, whole and sealed, or nothing: OSError."""
    write_whole(path, lambda file: _write(content, file))


def name_again(folder: str | os.PathLike[str], *, iter_num: int, best: bool) -> None:
    """Give a checkpoint that a run goes on from its further names, if whoever saved it was killed before that."""
    path = Path(folder) / f"ckpt_{iter_num:06d}.pt"
    for name in (NEWEST, BEST) if best else (NEWEST,):
        with contextlib.suppress(OSError):  # it is there under its own name
            link_whole(path, path.with_name(name))


def _write(content: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # what becomes of any other error in the midst of a record
        cause: BaseException | None = error
        while cause is not None and isinstance(cause, RuntimeError):
            cause = cause.__context__
        raise (cause or error) from None
    seal(file)


def numbered_checkpoints(folder: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """(iter_num, path) of every `ckpt_NNNNNN.pt` in a folder, the newest first."""
    found = []
    for path in Path(folder).glob("ckpt_*.pt"):
        if match := NUMBERED.fullmatch(path.name):
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def newest_checkpoint(
    folder: str | os.PathLike[str], *, warn: Callable[[str], None], sets_aside: bool = False
) -> Path | None:
    """The newest good checkpoint of a folder, verified; None where there is none of ours.

    Damaged newer ones are passed over, one warning each, and with `sets_aside` get the name `*.damaged`, under which
    nothing counts, reads or deletes them. Raises UserError when there are numbered ones but no good one.
    """
    folder, damaged = Path(folder), []
    for path in _candidates(folder):
        try:
            _refuse_other_number(path, read_checkpoint(path))
        except UserError as error:
            warn(f"warning: {error}")
            if isinstance(error, DamagedCheckpoint):
                damaged.append(path)
        else:
            for each in damaged if sets_aside else ():
                _set_aside(each, instead=path)
            return path
    if numbered := numbered_checkpoints(folder):
        raise UserError(f"{folder}: none of its {len(numbered)} checkpoints can be read; start in another out_dir")
    return None


def _refuse_other_number(path: Path, content: dict[str, Any]) -> None:
    """Raise UserError for a file whose name tells another step than its content: it was copied or renamed."""
    match, step = NUMBERED.fullmatch(path.name), content.get("iter_num")
    if match is not None and type(step) is int and step != int(match[1]):
        raise UserError(f"{path}: is of step {step}, whatever its name says; remove it, or give it its own name")


def _candidates(folder: Path) -> Iterator[Path]:
    """Numbered checkpoints, the newest first; then the other names that are of no numbered one, where they are read."""
    numbered = [path for _, path in numbered_checkpoints(folder)]
    yield from numbered
    others = []
    for path in (folder / NEWEST, folder / BEST):
        if not path.is_file() or any(os.path.samefile(path, each) for each in numbered if each.exists()):
            continue
        with contextlib.suppress(UserError):
            if isinstance(iter_num := read_checkpoint(path, verify=False).get("iter_num"), int):
                others.append((iter_num, path))
    yield from (path for _, path in sorted(others, reverse=True))


def _set_aside(path: Path, *, instead: Path) -> None:
    """Rename a damaged checkpoint; ckpt.pt, if it is a name of it, is given to the one used instead, others end."""
    newest, best = path.with_name(NEWEST), path.with_name(BEST)
    with contextlib.suppress(OSError):  # it will be passed over another time
        if path != newest and newest.exists() and os.path.samefile(path, newest):
            link_whole(instead, newest)
        if path != best and best.exists() and os.path.samefile(path, best):
            os.unlink(best)
        os.replace(path, path.with_name(path.name + ".damaged"))
