"""The header of a safetensors file, checked in full: every byte of the file belongs to one tensor, and only to one.

https://huggingface.co/docs/safetensors: 8 bytes with the header's length, little-endian, the header, which is a JSON
object {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}, then the data, to which the
offsets refer. The safetensors library checks most of this. It lets pass that one name occurs twice (the last counts),
unknown keys, arrays in place of objects and any number of dimensions.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sft.errors import UserError, listed
from sft.untrusted import strict_json

LONGEST_HEADER = 100_000_000  # bytes, as the library has it
MOST_DIMENSIONS = 16
MOST_NAMED = 10  # problems in one message
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
KEYS = {"dtype", "shape", "data_offsets"}


class Entry(NamedTuple):
    """One tensor as the header describes it."""

    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    begin: int  # bytes after the header
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name. UserError with what is wrong where header and file do not fit each other."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, data = _read_object(file, size)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged or cut short ({error}); fetch it again") from error
    problems = list(_odd_entries(header))
    if not problems:
        entries = {
            name: Entry(told["dtype"], tuple(told["shape"]), *told["data_offsets"])
            for name, told in header.items()
            if name != "__metadata__"
        }
        problems = list(_misplaced(entries, data))
    if problems:
        more = [f"and {len(problems) - MOST_NAMED} more"] if len(problems) > MOST_NAMED else []
        raise listed(f"{path}: damaged or cut short; fetch it again:", [*problems[:MOST_NAMED], *more])
    return entries


def _read_object(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header of a file of that size, and how many bytes of data follow it; ValueError where it has none."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"it has {size:,} bytes, and a header of {length:,} is announced")
    if length > LONGEST_HEADER:
        raise ValueError(f"a header of {length:,} bytes is announced, {LONGEST_HEADER:,} are allowed")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    header = strict_json(text)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ must map names to strings")
    return header, size - 8 - length


def _odd_entries(header: dict[str, Any]) -> Iterator[str]:
    """What is not of the form that the format prescribes."""
    for name, told in header.items():
        shown = reprlib.repr(name)
        if name == "__metadata__":
            continue
        if not name or not name.isprintable():
            yield f"{shown} is no name for a tensor"
        if not isinstance(told, dict) or told.keys() != KEYS:
            yield f"{shown} must have just dtype, shape and data_offsets, not {reprlib.repr(told)}"
            continue
        dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            yield f"{shown} has the unknown dtype {reprlib.repr(dtype)}"
        # zeros aside, since strides are products of the other sizes even where a tensor holds nothing
        if not _are_sizes(shape, most=MOST_DIMENSIONS) or math.prod(max(1, size) for size in shape) >= 2**60:
            yield f"{shown} has the impossible shape {reprlib.repr(shape)}"
        if not _are_sizes(offsets, most=2) or len(offsets) != 2:
            yield f"{shown} has the impossible data_offsets {reprlib.repr(offsets)}"


def _are_sizes(values: Any, *, most: int) -> bool:
    """Whether it is a list of at most so many whole numbers that a file can have."""
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _misplaced(entries: dict[str, Entry], data: int) -> Iterator[str]:
    """Where the tensors, in the order of their places, do not fill the data without holes and overlaps."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        shown, needed = reprlib.repr(name), math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
        if entry.end - entry.begin != needed:
            held = f"{entry.end - entry.begin:,} bytes"
            yield f"{shown} has {held}, its dtype {entry.dtype} and shape {list(entry.shape)} need {needed:,}"
        if entry.begin != at:
            yield f"{shown} begins at byte {entry.begin:,}, what is before it ends at {at:,}"
        at = max(at, entry.end)
    if at != data:
        yield f"its tensors end at byte {at:,}, its data at {data:,}"
