"""Whether the bytes of a checkpoint are those that were written: a checksum of each record, and a seal on the rest.

torch.save writes a zip archive of records that are not compressed, each with its CRC-32, which torch.load does not
compare. All that is outside the records (headers, padding, the directory) is covered by the seal: a SHA-256 in the
comment at the very end of the archive, which readers of archives skip. So no byte can change unnoticed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

ARCHIVE_STARTS = b"PK\x03\x04"
MARK = b"sealed v1 sha256 "
HEX_DIGITS = 64
LOCAL_HEADER = struct.Struct("<4s22xHH")  # before each record: ARCHIVE_STARTS ... length of name, length of padding
END = struct.Struct("<4s16xH")  # of an archive: END_STARTS ... length of the comment, which follows
END_STARTS = b"PK\x05\x06"
READ_AT_ONCE = 1 << 20
READERS = 8  # threads


class Record(NamedTuple):
    """One record of an archive: its bytes are those from `start` on."""

    name: str
    start: int
    size: int
    crc: int  # as the archive tells it


def seal(file: BinaryIO) -> None:
    """Append the seal to an archive that torch.save has just written; the file is open for reading and writing."""
    file.flush()
    try:
        records, _ = layout(file)
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"the file does not hold what was written ({error})") from error
    end = file.seek(0, os.SEEK_END)
    file.seek(end - 2)  # the length of the comment
    file.write(struct.pack("<H", len(MARK) + HEX_DIGITS) + MARK)
    file.flush()
    file.write(digest_outside(file.fileno(), records, end + len(MARK)))


def damage(path: Path) -> str | None:
    """What is wrong with an archive that torch.save or save_checkpoint wrote, in words; None where all is as written.

    Without a seal the records alone are looked at. Raises OSError where the file cannot be read, and whatever else
    where it is no such archive.
    """
    with open(path, "rb") as file:
        records, comment = layout(file)
        descriptor, end = file.fileno(), file.seek(0, os.SEEK_END)
        if comment and comment != MARK + digest_outside(descriptor, records, end - HEX_DIGITS):
            return "its seal does not fit its headers"
        if not comment and all(record.crc == 0 for record in records):  # PyTorch was told to write none
            return None
        with ThreadPoolExecutor(READERS) as pool:  # neither reading nor summing holds the lock
            found = list(pool.map(lambda record: crc_of(descriptor, record), records))
    wrong = [record.name for record, crc in zip(records, found, strict=True) if crc != record.crc]
    return f"{', '.join(wrong[:3])}: not the checksum that was stored" if wrong else None


def layout(file: BinaryIO) -> tuple[list[Record], bytes]:
    """The records of an archive in their order in the file, and its comment; BadZipFile, and others, for damage."""
    try:
        return _layout(file)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise zipfile.BadZipFile("it tells of places before the file") from error


def _layout(file: BinaryIO) -> tuple[list[Record], bytes]:
    with zipfile.ZipFile(file) as archive:
        entries, comment, directory = archive.infolist(), archive.comment, archive.start_dir
    file.seek(file.seek(0, os.SEEK_END) - END.size - len(comment))
    if END.unpack(file.read(END.size)) != (END_STARTS, len(comment)):
        raise zipfile.BadZipFile("the archive does not end where the file ends")
    records = []
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        file.seek(entry.header_offset)
        mark, name_bytes, padding = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        is_stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        if mark != ARCHIVE_STARTS or not is_stored:
            raise zipfile.BadZipFile(f"{entry.filename} has no header as PyTorch writes it")
        start = entry.header_offset + LOCAL_HEADER.size + name_bytes + padding
        records.append(Record(entry.filename, start, entry.file_size, entry.CRC))
    ends = [0, *(record.start + record.size for record in records)]
    if any(end > start for end, start in zip(ends, [*(record.start for record in records), directory], strict=True)):
        raise zipfile.BadZipFile("its records overlap")
    return records, comment


def digest_outside(descriptor: int, records: Sequence[Record], end: int) -> bytes:
    """SHA-256 in hexadecimal digits over all bytes before `end` that are of no record."""
    digest = hashlib.sha256()
    position = 0
    for record in records:
        for piece in pieces(descriptor, position, record.start):
            digest.update(piece)
        position = record.start + record.size
    for piece in pieces(descriptor, position, end):
        digest.update(piece)
    return digest.hexdigest().encode()


def crc_of(descriptor: int, record: Record) -> int:
    crc = 0
    for piece in pieces(descriptor, record.start, record.start + record.size):
        crc = zlib.crc32(piece, crc)
    return crc


def pieces(descriptor: int, start: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from start to end, read and not mapped: a disk that fails is an error, not a signal."""
    while start < end and (piece := os.pread(descriptor, min(READ_AT_ONCE, end - start), start)):
        yield piece
        start += len(piece)
