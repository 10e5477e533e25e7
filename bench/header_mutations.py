"""Small changes to files: of bytes, of JSON by the type of its values, of archives and of what their pickles say."""

from __future__ import annotations

import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

ARCHIVE_PARTS = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07")


class Mutant(NamedTuple):
    """What was done, in words, and the content of the files that it was done to, by name; None = no such file."""

    what: str
    files: dict[str, bytes | None]


class Target(NamedTuple):
    """A folder of one kind: what it holds, how it is mutated, loaded, and read a second time."""

    name: str
    files: dict[str, bytes]
    mutants: Callable[[Random], Iterator[Mutant]]
    load: Callable[[Path], Any]  # UserError, or what can be compared
    read: Callable[[Path], Any] | None  # None = no change may load at all
    wanted: int  # mutants of the full form


class Raw(NamedTuple):
    """A value as its text, which need not be JSON."""

    text: str


class Pairs(NamedTuple):
    """An object as pairs, so that a key can occur twice."""

    pairs: list[tuple[str, Any]]


ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**32, 2**53, 2**63, 2**64, 10**12, 10**30, -(2**63)),
    *(0.0, -0.0, 0.5, 1.0, 2.0, 16.0, 1e-320, 1e308, -1e308, "", "x", "0", "16", "F32", "F64", "BF16", "I32", "silu"),
    *("../x", "/etc/passwd", "a/b", "..", ".", "\x00", "\x1b[2J", "\u202e", "é" * 9, "a" * 5000, "qwen3", "chatml"),
    *([], {}, [[]], [1], [0, 16], ["x"], {"x": 1}, {"": None}, [None], [0] * 3000, {"rope_type": "default"}),
    *map(Raw, ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "-0", "1E2", "01", "+1", "0x10", "tru", "'x'")),
    *map(Raw, ('"\\ud800"', "[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000, "[" * 90 + "]" * 90)),
    *map(Raw, ('{"a": 1, "a": 2}', '"\\u0041"', '"a\tb"', "[1,]", "[1 2]", "/**/1", "")),
)


def in_turn(*mutants: Iterator[Mutant]) -> Iterator[Mutant]:
    for each in zip(*mutants, strict=True):
        yield from each


def json_mutants(files: dict[str, bytes], names: tuple[str, ...], draw: Random) -> Iterator[Mutant]:
    """Endless changes to the values and keys of JSON files."""
    while True:
        name = draw.choice(names)
        what, text = changed_json(json.loads(files[name]), draw)
        yield Mutant(f"{name}: {what}", {name: text})


def byte_mutants(
    files: dict[str, bytes], places: Callable[[str], list[range]], names: tuple[str, ...], draw: Random
) -> Iterator[Mutant]:
    """Endless changes to bytes of files: near the given places of a file."""
    while True:
        name = draw.choice(names)
        what, content = changed_bytes(files[name], draw, draw.choice(places(name)))
        yield Mutant(f"{name}: {what}", {name: content})


def changed_bytes(content: bytes, draw: Random, within: range) -> tuple[str, bytes]:
    """The content with one or a few bytes at a place of the range changed, put in, left out, repeated or cut off."""
    at = draw.choice(within) if within else 0
    length = draw.choice((1, 1, 1, 2, 4, 8, 30))
    some = bytes(draw.randrange(256) for _ in range(length))
    before, rest, after = content[:at], content[at : at + length], content[at + length :]
    flipped = bytes([content[min(at, len(content) - 1)] ^ 1 << draw.randrange(8)])
    character = bytes([draw.choice(b"0123456789-,.[]{}\"' ")])
    return draw.choice(
        (
            (f"bit flipped at {at}", before + flipped + content[at + 1 :]),
            (f"another character at {at}", before + character + content[at + 1 :]),
            (f"{length} bytes at {at} made 0", before + bytes(len(rest)) + after),
            (f"{length} bytes at {at} made 255", before + b"\xff" * len(rest) + after),
            (f"{length} bytes at {at} changed", before + some[: len(rest)] + after),
            (f"{length} bytes put in at {at}", before + some + rest + after),
            (f"{length} bytes at {at} left out", before + after),
            (f"{length} bytes at {at} twice", before + rest + rest + after),
            (f"cut off at {at}", before),
            (f"{length} bytes more at the end", content + some),
            (f"{length} bytes less at the end", content[:-length]),
            ("the whole twice", content + content),
        )
    )


def changed_json(value: Any, draw: Random) -> tuple[str, bytes]:
    """The text of the value with one or two changes; sometimes in another encoding."""
    what = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        place = draw.choice([*places_in(value)] or [()])
        change, value = changed_at(value, place, draw)
        what.append(change)
    text = json_text(value)
    if draw.random() < 0.05:
        encoding = draw.choice(("utf-16", "utf-8-sig", "utf-32", "latin-1"))
        return f"{', '.join(what)}, as {encoding}", text.encode(encoding, "replace")
    return ", ".join(what), text.encode("utf-8", "surrogatepass")


def places_in(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value inside, of long lists to the first ones only."""
    if isinstance(value, dict):
        items = list(value.items())[:40]
    elif isinstance(value, list):
        items = list(enumerate(value))[:4]
    else:
        return
    for key, item in items:
        yield (*place, key)
        yield from places_in(item, (*place, key))


def changed_at(value: Any, place: tuple[Any, ...], draw: Random) -> tuple[str, Any]:
    """A copy of the value in which something is changed at the place, and what."""
    if not place:
        return "the whole", draw.choice(ODD_VALUES)
    key = place[0]
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(place) > 1:
        change, copy[key] = changed_at(copy[key], place[1:], draw)
        return f"{key}.{change}", copy
    old, kind = copy[key], draw.randrange(10)
    if kind == 0:
        del copy[key]
        return f"{key} left out", copy
    if isinstance(copy, dict) and kind <= 2:
        return changed_key(copy, key, draw)
    if kind == 3 and len(copy) > 1:
        other = draw.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        copy[key], copy[other] = copy[other], copy[key]
        return f"{key} exchanged with {other}", copy
    is_number = type(old) in (int, float) and kind <= 6
    numbers = (old + 1, old - 1, -old, old * 2, old // 2, float(old), str(old), [old]) if is_number else ()
    copy[key] = draw.choice(numbers or ODD_VALUES)
    shown = copy[key].text if isinstance(copy[key], Raw) else repr(copy[key])
    return f"{key} made {shown[:40]}", copy


def changed_key(value: dict[str, Any], key: str, draw: Random) -> tuple[str, Any]:
    """The object with the key under another name, or twice."""
    if draw.random() < 0.5:
        name = draw.choice((f"{key}x", "", key.upper(), "../x", "\x1b", "__metadata__", *value))
        return f"{key} renamed {name!r}", {(name if each == key else each): item for each, item in value.items()}
    other = draw.choice((value[key], draw.choice(ODD_VALUES), draw.choice(list(value.values()))))
    pairs = [*value.items(), (key, other)] if draw.random() < 0.5 else [(key, other), *value.items()]
    return f"{key} twice", Pairs(pairs)


def json_text(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, (dict, Pairs)):
        pairs = value.items() if isinstance(value, dict) else value.pairs
        return "{" + ", ".join(f"{json.dumps(key)}: {json_text(item)}" for key, item in pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(json_text, value)) + "]"
    return json.dumps(value)


def places_outside_records(content: bytes) -> list[range]:
    """Where an archive has headers, its directory and its end."""
    found = []
    for part in ARCHIVE_PARTS:
        at = content.find(part)
        while at >= 0:
            found.append(range(at, min(len(content), at + 100)))
            at = content.find(part, at + 1)
    return found


def archive_mutants(name: str, content: bytes, draw: Random) -> Iterator[Mutant]:
    """Endless archives, whole and with right checksums, one of whose records is another, or is not there.

    What they hold beside tensors' data is a pickle, whose opcodes are changed.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    pickle_name = next(record for record in records if record.endswith("/data.pkl"))
    others = [record for record in records if record != pickle_name]
    while True:
        changed: dict[str, bytes | None] = {**records}
        method = zipfile.ZIP_STORED
        if draw.random() < 0.75:
            what, changed[pickle_name] = changed_pickle(records[pickle_name], draw)
        else:
            record = draw.choice(others)
            data = records[record]
            what, changed[record] = draw.choice(
                (
                    ("left out", None),
                    ("empty", b""),
                    ("half", data[: len(data) // 2]),
                    ("longer", data + b"\0" * 8),
                    ("big", b"big"),
                    ("1", b"1"),
                )
            )
            what = f"{record} {what}"
            if draw.random() < 0.3:
                what, method, changed = f"{what}, compressed", zipfile.ZIP_DEFLATED, {**changed}
        yield Mutant(f"{name}: {what}", {name: archive_of(changed, method)})


def archive_of(records: dict[str, bytes | None], method: int) -> bytes:
    """An archive with these records, each of which begins at a multiple of 64 as PyTorch has it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in records.items():
            if data is None:
                continue
            entry = zipfile.ZipInfo(name)
            entry.compress_type = method
            padding = -(buffer.tell() + 30 + len(name) + 4) % 64
            entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            archive.writestr(entry, data)
    return buffer.getvalue()


ODD_GLOBALS: tuple[bytes, ...] = (
    b"posix system",
    b"builtins exec",
    b"builtins eval",
    b"os system",
    b"subprocess Popen",
    b"sys exit",
)
ODD_GLOBALS += (b"torch DoubleStorage", b"torch BFloat16Storage", b"torch.storage UntypedStorage", b"torch Size")
ODD_GLOBALS += (b"torch._utils _rebuild_parameter", b"torch Tensor", b"builtins bytearray", b"collections Counter")


def changed_pickle(content: bytes, draw: Random) -> tuple[str, bytes]:
    """The pickle with one of its opcodes changed, left out, repeated, or of another kind."""
    opcodes = [(opcode.name, at or 0) for opcode, _, at in pickletools.genops(content)]
    index = draw.randrange(len(opcodes) - 1)
    if draw.random() < 0.5:  # of numbers and names there are fewer than of the machine's own
        wanted = ("BININT", "BININT1", "BININT2", "GLOBAL", "BINUNICODE", "BINFLOAT", "NEWTRUE", "LONG1", "NONE")
        index = draw.choice([i for i, (name, _) in enumerate(opcodes[:-1]) if name in wanted])
    (name, start), (_, end) = opcodes[index], opcodes[index + 1]
    before, opcode, after = content[:start], content[start:end], content[end:]
    some = draw.choice((0, 1, 2, 3, 4, 8, 16, 17, 255, 65_535, 2**31 - 1, -1, -16))
    integer = b"J" + struct.pack("<i", some)
    kind = draw.randrange(6)
    if kind == 0:
        return f"{name} at {start} left out", before + after
    if kind == 1:
        return f"{name} at {start} twice", before + opcode + opcode + after
    if name == "GLOBAL":
        other = draw.choice(ODD_GLOBALS).replace(b" ", b"\n")
        return f"{name} at {start} made {other!r}", before + b"c" + other + b"\n" + after
    if name.startswith("BININT") and kind <= 4:
        return f"{name} at {start} made {some}", before + integer + after
    if kind == 5:
        return changed_bytes(content, draw, range(start, end))
    other = draw.choice(
        (b"N", b"\x88", b"\x89", b"]", b"}", b")", b"0", b"G" + struct.pack(">d", 0.5), integer, b"X\x01\0\0\0a")
    )
    return f"{name} at {start} made {other!r}", before + other + after
