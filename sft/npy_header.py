"""The header of a .npy file, read as text: NumPy's own reader evaluates it as Python and then builds any dtype."""

from __future__ import annotations

import re
from typing import BinaryIO, NamedTuple

import numpy as np

MAGIC = b"\x93NUMPY\x01\x00"
# Just what NumPy writes for plain numbers in C order: no Python objects, no records, no Fortran order.
SIZES = rb"\((\d{1,18},|\d{1,18}(?:, \d{1,18}){1,7}|)\)"
WRITTEN = re.compile(rb"\{'descr': '([<|][biuf]\d{1,2})', 'fortran_order': False, 'shape': " + SIZES + rb", \} *\n")


class NpyHeader(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    length: int  # bytes before the data


def read_npy_header(file: BinaryIO) -> NpyHeader:
    """The header at the beginning of the file, which is read no further; ValueError where it is not as NumPy's."""
    begin = file.read(len(MAGIC) + 2)
    text = file.read(int.from_bytes(begin[len(MAGIC) :], "little"))
    found = WRITTEN.fullmatch(text)
    if len(begin) != len(MAGIC) + 2 or not begin.startswith(MAGIC) or found is None:
        raise ValueError("its header is not that of an array of plain numbers")
    try:
        dtype = np.dtype(found[1].decode("ascii"))
    except TypeError as error:  # numbers of sizes that there are not
        raise ValueError(f"its header has the unknown dtype {found[1].decode('ascii')}") from error
    shape = tuple(int(size) for size in found[2].decode("ascii").replace(",", " ").split())
    return NpyHeader(dtype, shape, len(begin) + len(text))
