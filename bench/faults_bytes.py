"""Ways to damage the bytes of a file: flipped bits, zeroed pages, truncation, garbage after the end."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

PAGE = 4096
HEADER_BYTES = 30  # of a record in a zip archive, before its name
Spans = dict[str, list[tuple[int, int]]]  # kind of place in a file -> where it is, from and to


class Damage(NamedTuple):
    """A change of a file's bytes, and where it is."""

    kind: str
    place: str
    change: Callable[[bytes], bytes]

    def __str__(self) -> str:
        return f"{self.kind} {self.place}"


def flipped(position: int, bit: int, where: str) -> Damage:
    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[position] ^= 1 << bit
        return bytes(changed)

    return Damage("flipped bit", f"{bit} of byte {position} ({where})", change)


def flips(spans: Spans, each: int, draw: random.Random) -> Iterator[Damage]:
    """`each` flipped bits in every kind of place of a file."""
    for where, found in spans.items():
        if places := [span for span in found if span[0] < span[1]]:
            for place in draw.choices(places, [end - start for start, end in places], k=each):
                yield flipped(draw.randrange(*place), draw.randrange(8), where)


def zeroed_pages(content: bytes, count: int) -> Iterator[Damage]:
    """Up to `count` pages in turn; a page that is all zeros already is none."""
    starts = [start for start in range(0, len(content), PAGE) if any(content[start : start + PAGE])]
    for i in range(min(count, len(starts))):
        start = starts[i * len(starts) // min(count, len(starts))]

        def change(content: bytes, start: int = start) -> bytes:
            return content[:start] + bytes(len(content[start : start + PAGE])) + content[start + PAGE :]

        yield Damage("zeroed page", f"at byte {start}", change)


def cut(content: bytes, *, size: int) -> bytes:
    return content[:size]


def longer(content: bytes, *, tail: bytes) -> bytes:
    return content + tail


def truncations(content: bytes, count: int, draw: random.Random) -> Iterator[Damage]:
    """To nothing, to all but a byte, and to sizes in between."""
    sizes = [0, len(content) - 1, 1, len(content) // 2, len(content) - 22, len(content) // PAGE * PAGE]
    sizes += [draw.randrange(2, len(content)) for _ in range(count)]
    for size in sizes[:count]:
        yield Damage("truncation", f"to {size} of {len(content)} bytes", partial(cut, size=size))


def garbage(other: bytes, count: int, draw: random.Random) -> Iterator[Damage]:
    """Bytes after the end, the last ones a whole file of the same kind."""
    tails = [b"\0", b"\n}", bytes(PAGE), draw.randbytes(100), other]
    for tail in tails[-count:]:
        yield Damage("appended", f"{len(tail)} bytes", partial(longer, tail=tail))


def spans_of_archive(content: bytes) -> Spans:
    """The parts of the archive that torch.save writes: records, their headers, padding, and what comes after them."""
    spans: Spans = {"header": [], "padding": [], "record": []}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            name_end = entry.header_offset + HEADER_BYTES + len(entry.filename)
            extra = int.from_bytes(content[entry.header_offset + 28 : entry.header_offset + 30], "little")
            spans["header"].append((entry.header_offset, name_end))
            spans["padding"].append((name_end, name_end + extra))
            spans["record"].append((name_end + extra, name_end + extra + entry.file_size))
        end = len(content) - len(archive.comment)
        spans["directory"] = [(archive.start_dir, end)]
        if archive.comment:
            spans["comment"] = [(end, len(content))]
    return spans


def spans_of_safetensors(content: bytes) -> Spans:
    start = 8 + int.from_bytes(content[:8], "little")
    return {"header": [(0, start)], "record": [(start, len(content))]}


def spans_of_array(content: bytes) -> Spans:
    """Of a .npy file."""
    start = content.index(b"\n") + 1
    return {"header": [(0, start)], "record": [(start, len(content))]}
