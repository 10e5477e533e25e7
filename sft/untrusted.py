"""Files that anybody may have written: read whole but bounded, as strict JSON, and never from outside their folder."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

from sft.conversation import BadRecord
from sft.json_records import TOO_DEEP, refuse_constant, refuse_deep, without_duplicates

MEBIBYTE = 2**20
MOST_IDS = 2**22  # of a vocabulary: a model gets a row for each, and the largest there are have a million
HALF_A_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON spells a surrogate; pairs of them are characters


def read_bytes(path: Path, *, most: int) -> bytes:
    """The content of a regular file of at most so many bytes.

    Raises OSError, and ValueError with a sentence that does not name the path.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for, a device read for ever
        raise ValueError("is no regular file")
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"has more than {most / MEBIBYTE:g} MiB, which no such file needs")
    return content


def read_json(path: Path, *, most: int) -> Any:
    """The value in a JSON file of at most so many bytes; raises as read_bytes and strict_json do."""
    return strict_json(read_bytes(path, most=most))


def strict_json(content: bytes) -> Any:
    """The value that the bytes are, where all readers of JSON agree on it.

    ValueError (JSONDecodeError where the text breaks off or goes wrong at a place) for another encoding, a byte order
    mark, keys that occur twice, numbers beyond floats, half characters, deep nesting, NaN and Infinity.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.object[error.start]:#04x} at {error.start:,})") from error
    if text.startswith("\ufeff"):
        raise ValueError("begins with a byte order mark; save it without one")
    try:
        value = STRICT.decode(text)
        refuse_deep(value)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    except BadRecord as error:
        raise ValueError(str(error)) from error
    if HALF_A_CHARACTER.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("holds half a character (a lone \\ud800 to \\udfff)") from error
    return value


def finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise BadRecord(f"the number {text[:20]} is beyond what a float can hold")
    return number


STRICT = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite, object_pairs_hook=without_duplicates)


def is_plain_name(name: str) -> bool:
    """Whether a name from a file names a file beside it, on every system, and can be shown on a terminal."""
    return name.isprintable() and not any(mark in name for mark in "/\\:") and name not in ("", ".", "..")


def leads_out(folder: Path, file: Path) -> bool:
    """Whether a file of the folder is a link to one that is not in it.

    Allowed is the layout of Hugging Face's cache: models--x/snapshots/REVISION/file links to models--x/blobs/HASH.
    """
    inside, real = folder.resolve(), file.resolve()
    in_cache = inside.parent.name == "snapshots" and real.parent == inside.parent.parent / "blobs"
    return not in_cache and not real.is_relative_to(inside)
