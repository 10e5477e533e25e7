"""The shape of meta.json: which fields there are, and of what each consists, so that no reader has to ask."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A plain value: what it is called, and whether a value is one."""

    name: str
    fits: Callable[[Any], bool]


class Each(NamedTuple):
    """A list, or an object with any keys, of one shape."""

    container: type  # list or dict
    shape: Any


class Either(NamedTuple):
    """A plain value, or something of a shape."""

    plain: Kind
    shape: Any


COUNT = Kind("a whole number from 0", lambda value: type(value) is int and 0 <= value < 2**63)
WHOLE = Kind("a whole number", lambda value: type(value) is int and abs(value) < 2**63)
NUMBER = Kind("a number", lambda value: type(value) in (int, float) and abs(value) < 1e300)
NULL = Kind("null", lambda value: value is None)
TEXT = Kind("a string", lambda value: isinstance(value, str))
ANYTHING = Kind("anything", lambda value: True)
COUNTS = Each(dict, COUNT)
LENGTHS = {"min": NUMBER, "median": NUMBER, "mean": NUMBER, "p95": NUMBER, "max": NUMBER}
PER_SOURCE = {f"{name}?": COUNT for name in ("records", "conversations", "samples", "tokens", "trained_tokens")}

# An object has these fields; those with a question mark may be left out, others may be there. A tuple: all of these.
SHAPE = {
    "arrays": Each(dict, {"dtype": TEXT, "shape": Each(list, COUNT), "sha256?": TEXT}),
    "vocab_size": COUNT,
    "max_id": WHOLE,  # -1 where there is no token
    "pad_id": WHOLE,
    "tokenizer_files": Each(list, TEXT),
    "tokenizer_fingerprint": TEXT,
    "template": TEXT,
    "block_size?": COUNT,
    "settings?": Each(dict, ANYTHING),
    "settings_origins?": Each(dict, TEXT),
    "sources?": Each(list, {"path": TEXT, "bytes?": COUNT, "sha256?": TEXT, "weight?": NUMBER, **PER_SOURCE}),
    "ledger?": {
        "records?": COUNTS,
        "conversations?": COUNTS,
        "tokens?": ({"total?": COUNT}, Each(dict, Either(COUNT, COUNTS))),
        "splits?": Each(dict, COUNTS),
    },
    "lengths?": Each(dict, Either(NULL, LENGTHS)),
    "noticed?": Each(dict, {"conversations": COUNT, "first?": Each(list, TEXT)}),
    "bad_records?": Each(list, TEXT),
    "leaks?": {
        "conversations?": COUNT,
        "exact?": COUNT,
        "first?": Each(list, {"validation": TEXT, "training": TEXT, "similarity": NUMBER}),
    },
    "audit?": Either(NULL, Each(dict, ANYTHING)),
}


def misfits(value: Any, shape: Any = SHAPE, name: str = "") -> Iterator[str]:
    """A sentence for each part of the value that is not of the shape."""
    if type(shape) is tuple:
        for each in shape:
            yield from misfits(value, each, name)
        return
    if isinstance(shape, Either):
        if shape.plain.fits(value):
            return
        shape = shape.shape
    if isinstance(shape, Kind):
        if not shape.fits(value):
            yield f"{name} must be {shape.name}, not {reprlib.repr(value)}"
        return
    container = shape.container if isinstance(shape, Each) else dict
    is_one: bool = isinstance(value, container)
    if not is_one:
        yield f"{name} must be {'a list' if container is list else 'an object'}, not {reprlib.repr(value)}"
    elif isinstance(shape, Each):
        for key, item in enumerate(value) if container is list else value.items():
            yield from misfits(item, shape.shape, f"{name}[{reprlib.repr(key)}]")
    else:
        for field, inner in shape.items():
            key = field.removesuffix("?")
            if key in value or key == field:
                yield from misfits(value.get(key), inner, f"{name}.{key}" if name else key)
