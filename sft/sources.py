"""Where records come from: files, folders, globs and standard input, each read as a stream of raw records.

A file's first bytes say what it holds: gzip, Parquet, a JSON array, or else JSON lines. Only plain text is known by its
suffix, .txt. Memory is bounded by one record or one batch of Parquet rows; a JSON array is held whole.
"""

from __future__ import annotations

import glob
import gzip
import json
import math
import os
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sft.conversation import BadFile, BadRecord
from sft.errors import UserError
from sft.json_records import broken, elements, not_utf8

SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt", ".parquet", ".jsonl.gz", ".json.gz", ".ndjson.gz", ".txt.gz")
STANDARD_INPUT = "standard input"  # as messages call it; '-' on the command line

LONGEST_RECORD = 32 * 2**20  # bytes
HEAD_BYTES = 4096  # read to find out what a file holds
LINES_PER_TELL = 64  # asking how far a file is read takes as long as reading a line
BUFFER_BYTES = 2**20
PARQUET_ROWS = 256  # decoded at a time

BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
FIRST_BYTES = {
    b"\xff\xfe": "is UTF-16 or UTF-32; save it as UTF-8",
    b"\xfe\xff": "is UTF-16; save it as UTF-8",
    b"PK\x03\x04": "is a zip archive; unpack it first (unzip)",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it first (unzstd), or use gzip",
    b"\xfd7zXZ\0": "is compressed with xz; unpack it first (unxz), or use gzip",
    b"BZh": "is compressed with bzip2; unpack it first (bunzip2), or use gzip",
    b"ARROW1": "is an Arrow file; write it as Parquet",
    b"version https://git-lfs": "is a pointer of Git LFS, not the data; fetch it (git lfs pull)",
    GZIP: "is compressed twice; unpack it once (gunzip)",
    PARQUET: "is Parquet inside gzip; unpack it first (gunzip)",
    **dict.fromkeys((b"{\0", b"[\0", b"\0{", b"\0["), "is UTF-16; save it as UTF-8"),
    **dict.fromkeys((b"<!DOCTYPE", b"<!doctype", b"<html"), "is a web page, not the data; download the file itself"),
}
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)  # what gzip raises

Piece = tuple[int, Any, int, int]  # line, value, bytes of it, bytes of the file on disk that have been passed


@dataclass(frozen=True)
class Source:
    name: str  # as messages and meta.json have it
    path: Path  # what is opened
    weight: float = 1.0  # epochs per pass over all sources


class RawRecord(NamedTuple):
    record: int  # 1-based; blank lines do not count
    line: int  # 1-based line of the file on which it begins; for Parquet the row
    value: Any  # bytes: JSON that is still to be decoded; BadRecord: why there is none; anything else is the value
    size: int  # bytes of the unpacked file; for Parquet an equal share of the file
    bom: bool = False  # of a file's first record: a byte order mark stood before it


class Found(NamedTuple):
    sources: list[Source]
    problems: list[str]  # why some cannot be used


def find_sources(spec: str) -> Found:
    """The sources that 'a.jsonl:0.7,folder,data/**/*.jsonl.gz,-' names, in this order, and all that is wrong with them.

    A number after a colon is a weight, unless a file of the whole name exists. A folder stands for the files below it
    whose suffix is known, sorted, hidden ones left out; a glob for the files that it matches, sorted.
    """
    sources: list[Source] = []
    problems: list[str] = []
    for item in filter(None, (item.strip() for item in spec.split(","))):
        name, weight = item, 1.0
        head, colon, tail = item.rpartition(":")
        if colon and not os.path.exists(item):
            try:
                name, weight = head, float(tail)
            except ValueError:
                if os.path.exists(head):
                    problems.append(f"input {item!r}: {tail!r} is no weight; write a number, as in {head}:0.5")
                    continue
            if not 0 < weight < math.inf:
                problems.append(
                    f"input {item!r}: the weight must be above 0 and finite, not {tail}; leave the file out"
                )
                continue
        found, reason = files_of(name)
        if reason:
            problems.append(f"input {name!r} cannot be read: {reason}")
            continue
        sources += [Source(label, Path(path), weight) for label, path in found]
    problems += named_twice(sources)
    if not sources and not problems:
        problems.append("input names no file; name files, folders, globs or - for standard input")
    return Found(sources, problems)


@contextmanager
def spool_standard_input(sources: list[Source], spool: Path) -> Iterator[list[Source]]:
    """The sources, standard input copied to a file that is removed at the end: it is read more than once."""
    if not any(source.name == STANDARD_INPUT for source in sources):
        yield sources
        return
    spool.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(spool, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, BUFFER_BYTES)
        yield [replace(source, path=spool) if source.name == STANDARD_INPUT else source for source in sources]
    finally:
        spool.unlink(missing_ok=True)


def files_of(name: str) -> tuple[list[tuple[str, str]], str]:
    """(name, path) of each file that a name stands for, and what is wrong with them."""
    if name == "-":
        return [(STANDARD_INPUT, name)], "" if sys.stdin else "standard input is closed; pipe the records in"
    if os.path.isdir(name):
        unreadable: list[str] = []
        paths = files_below(name, unreadable)
        if not paths and not unreadable:
            return [], f"the folder holds no file that ends in {', '.join(SUFFIXES)}; name the files themselves"
    elif glob.has_magic(name) and not os.path.exists(name):
        paths = sorted(path for path in glob.glob(name, recursive=True) if not os.path.isdir(path))
        unreadable = []
        if not paths:
            return [], "no file matches; check the pattern"
    else:
        paths, unreadable = [name], []
    for path in paths:
        if reason := why_unreadable(path):
            unreadable.append(reason if path == name else f"{path}: {reason}")
    return [(path, path) for path in paths], "; ".join(unreadable)


def files_below(folder: str, unreadable: list[str]) -> list[str]:
    paths = []
    for where, folders, names in os.walk(folder, onerror=lambda error: unreadable.append(said(error))):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [
            os.path.join(where, name) for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(paths)


def why_unreadable(path: str) -> str:
    """What speaks against reading a file, '' where it can be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "is a directory" if os.path.isdir(path) else "not a regular file; pipe it in and name it -"
        with open(path, "rb"):
            return ""
    except (OSError, ValueError) as error:  # a name may hold NUL
        return said(error)


def said(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).lower()


def named_twice(sources: list[Source]) -> list[str]:
    seen: dict[str, str] = {}
    problems = []
    for source in sources:
        name, key = source.name, str(source.path)
        if name != STANDARD_INPUT and os.path.exists(key):
            status = os.stat(key)
            key = f"{status.st_dev}:{status.st_ino}"
        if key in seen:
            also = "" if seen[key] == name else f" (also as {seen[key]!r})"
            remedy = "name - once" if name == STANDARD_INPUT else f"give a file more weight instead: {name}:2"
            problems.append(f"input {name!r} is named twice{also}; {remedy}")
        seen.setdefault(key, name)
    return problems


def raw_records(source: Source, *, advance: Callable[[int], object] = lambda count: None) -> Iterator[RawRecord]:
    """The records of a source, in order; a BadRecord stands for what cannot be split off, and for a file that cannot be
    read at all. `advance` is told of every stretch of bytes of the file on disk that has been passed."""
    with open(source.path, "rb", buffering=BUFFER_BYTES) as disk:
        total = os.fstat(disk.fileno()).st_size
        record = passed = 0
        bom = False
        for line, value, size, reached in pieces(source, disk, total):
            if line == 0:
                bom = True
                continue
            record += 1
            if reached > passed:
                advance(reached - passed)
                passed = reached
            yield RawRecord(record, line, value, size, bom)
            bom = False
        advance(total - passed)
        if record == 0:
            wanted = "one JSON object a line is expected, or an array of them"
            yield RawRecord(1, 1, BadRecord(f"the file holds no records; {wanted}"), total, bom)


def pieces(source: Source, disk: BinaryIO, total: int) -> Iterator[Piece]:
    """The records of an open file; line 0 says that it begins with a byte order mark."""
    head = disk.read(HEAD_BYTES)
    disk.seek(0)
    is_text = source.path.name.lower().endswith((".txt", ".txt.gz"))
    if head.startswith(PARQUET) and not is_text:
        yield from parquet_rows(source, total)
        return
    file: Any = disk
    if head.startswith(GZIP):
        file = gzip.GzipFile(fileobj=disk)
        try:
            head = file.peek(HEAD_BYTES)
        except DAMAGED as error:
            yield 1, damaged(error), total, total
            return
    for first_bytes, complaint in FIRST_BYTES.items():
        if head.startswith(first_bytes) and not is_text:
            yield 1, BadFile(f"the file {complaint}"), total, total
            return
    if head.startswith(BOM):
        yield 0, None, 0, 0
        file.read(len(BOM))
    if is_text:
        yield from whole_text(file, disk, total)
    elif head.removeprefix(BOM).lstrip().startswith(b"["):
        yield from array_elements(file, disk, total)
    else:
        yield from lines(file, disk, total)


def damaged(error: Exception) -> BadFile:
    return BadFile(f"the gzip file is damaged from here on ({error}); get it again")


def lines(file: BinaryIO, disk: BinaryIO, total: int) -> Iterator[Piece]:
    """Each line that is not blank; one that is too long is passed over without being held."""
    number = reached = 0
    while True:
        number += 1
        if number % LINES_PER_TELL == 0:
            reached = disk.tell()
        value: bytes | BadRecord
        try:
            value = line = file.readline(LONGEST_RECORD + 1)
            size = len(line)
            if size > LONGEST_RECORD and not line.endswith(b"\n"):
                value = too_long("line")
                while line and not line.endswith(b"\n"):
                    line = file.readline(BUFFER_BYTES)
                    size += len(line)
        except DAMAGED as error:
            yield number, damaged(error), max(1, total - disk.tell()), total
            return
        if isinstance(value, BadRecord) or not value.isspace():
            if not value:
                return
            yield number, value, size, reached


def too_long(what: str) -> BadRecord:
    return BadRecord(
        f"the {what} is longer than {LONGEST_RECORD:,} bytes ({LONGEST_RECORD >> 20} MiB); split the record"
    )


def array_elements(file: BinaryIO, disk: BinaryIO, total: int) -> Iterator[Piece]:
    """Each element of the JSON array that the file is. Broken JSON ends it."""
    try:
        data = file.read()
        text = data.decode("utf-8")
    except DAMAGED as error:
        yield 1, damaged(error), total, total
        return
    except UnicodeDecodeError as error:
        yield data.count(b"\n", 0, error.start) + 1, BadFile(not_utf8(error)), len(data), total
        return
    del data
    line, counted, last = 1, 0, 0
    try:
        for start, end, value in elements(text):
            line += text.count("\n", counted, start)
            counted, last = start, end
            size = end - start if text.isascii() else len(text[start:end].encode())
            yield line, too_long("element") if size > LONGEST_RECORD else value, size, total * end // len(text)
    except json.JSONDecodeError as error:
        bad = BadFile(f"{broken(error)}; mend it, the rest of the array cannot be read")
        yield error.lineno, bad, len(text[last:].encode()), total


def whole_text(file: BinaryIO, disk: BinaryIO, total: int) -> Iterator[Piece]:
    """One record of plain text, unless the file is blank."""
    try:
        data = file.read(LONGEST_RECORD + 1)
        size = len(data)
        while more := len(file.read(BUFFER_BYTES)):
            size += more
        value: Any = {"text": data.decode("utf-8")} if size <= LONGEST_RECORD else too_long("text")
    except DAMAGED as error:
        yield 1, damaged(error), total, total
        return
    except UnicodeDecodeError as error:
        yield data.count(b"\n", 0, error.start) + 1, BadRecord(not_utf8(error)), len(data), total
        return
    if size > LONGEST_RECORD or data.strip():
        yield 1, value, size, total


def parquet_rows(source: Source, total: int) -> Iterator[Piece]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{source.name}: is Parquet; to read it: pip install -e '.[parquet]'") from error
    row = reached = 0
    try:
        # Neither a whole row group nor threads, which a later fork would not survive.
        file = parquet.ParquetFile(str(source.path), pre_buffer=False, buffer_size=BUFFER_BYTES)
        names = file.schema_arrow.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield 1, BadFile(f"the file has several columns {twice[0]!r}; rename them"), total, total
            return
        count = file.metadata.num_rows
        for batch in file.iter_batches(PARQUET_ROWS, use_threads=False):
            for value in row_values(batch):
                row += 1
                before, reached = reached, total * min(row, count) // max(count, 1)
                yield row, value, reached - before, reached
        if row != count:
            raise pyarrow.ArrowInvalid(f"{count:,} rows promised, {row:,} found")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        why = next(iter(str(error).splitlines()), type(error).__name__)
        bad = BadFile(f"the Parquet file is damaged from here on ({why}); get it again")
        yield row + 1, bad, total - reached, total


def without_nulls(value: Any) -> Any:
    """The value without the null fields that a table gives every struct for what other rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def row_values(batch: Any) -> list[Any]:
    """The rows of a batch; a BadRecord for each that Python cannot hold."""
    try:
        return [without_nulls(row) for row in batch.to_pylist()]
    except (ValueError, OverflowError, ImportError):
        if batch.num_rows == 1:
            return [BadRecord("the row holds text that is not UTF-8, or a date that Python lacks; mend or remove it")]
        return [value for row in range(batch.num_rows) for value in row_values(batch.slice(row, 1))]
