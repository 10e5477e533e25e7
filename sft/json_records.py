"""Strict JSON: what the standard decoder lets pass although it is no JSON, or would be lost, is refused."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator
from typing import Any

from sft.conversation import BadRecord

DEEPEST = 100  # levels of nesting; a fixed number, where Python's own limit depends on who calls


def decoded_line(line: bytes) -> Any:
    """The value of a line that holds one whole record; BadRecord where it does not."""
    try:
        text = line.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(not_utf8(error)) from error
    try:
        return decoded(text)
    except ValueError as error:
        if text.startswith("\ufeff"):
            raise BadRecord("a byte order mark within the file, where two were joined; remove it") from error
        raise BadRecord(
            f"{broken(error)}; a line holds one whole record, unless the file is one array [...]"
        ) from error


def decoded(text: str) -> Any:
    """The value that the text is, blanks around it aside; BadRecord for what is refused, ValueError for broken JSON."""
    try:
        try:
            value, end = STRICT.raw_decode(text)  # half of what decode does: no looking for blanks around the value
        except json.JSONDecodeError:
            end = -1
        if end != len(text):
            value = STRICT.decode(text)
    except RecursionError as error:
        raise BadRecord(TOO_DEEP) from error
    if text.count("{") + text.count("[") > DEEPEST:
        refuse_deep(value)
    return value


def elements(text: str, start: int = 0) -> Iterator[tuple[int, int, Any]]:
    """(start, end, value) of each element of the array that the text is; the value may be a BadRecord.

    JSONDecodeError where the array is broken: the elements before that have been given.
    """
    at = after_blanks(text, text.index("[", start) + 1)
    more = text[at : at + 1] != "]"
    while more:
        try:
            value, end = element(text, at)
        except json.JSONDecodeError:
            raise
        except (RecursionError, ValueError) as error:
            raise json.JSONDecodeError(broken(error), text, at) from error
        yield at, end, value
        at = after_blanks(text, end)
        if more := text[at : at + 1] == ",":
            at = after_blanks(text, at + 1)
    if text[at : at + 1] != "]":
        raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    at = after_blanks(text, at + 1)
    if at < len(text):
        raise json.JSONDecodeError("Extra data after the array", text, at)


def element(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at `at`, or a BadRecord for it, and its end."""
    try:
        value, end = STRICT.raw_decode(text, at)
    except BadRecord as error:
        return error, LENIENT.raw_decode(text, at)[1]
    if text.count("{", at, end) + text.count("[", at, end) > DEEPEST:
        try:
            refuse_deep(value)
        except BadRecord as error:
            return error, end
    return value, end


def after_blanks(text: str, at: int) -> int:
    found = JSON_BLANKS.match(text, at)
    return found.end() if found else at


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte {error.object[error.start]:#04x}); save the file as UTF-8"


def broken(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON at column {error.colno}: {error.msg}"
    # The one other ValueError of the decoder: Python's guard against integers that take long to convert.
    return "JSON nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"


def dumped(value: object, what: str) -> str:
    """The value as the chat templates print it."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRecord(f"{what} holds what JSON cannot ({error}); write it as a string") from error


def refuse_deep(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEEPEST):
        level = [
            item
            for outer in level
            for item in (outer.values() if type(outer) is dict else outer)
            if type(item) is dict or type(item) is list
        ]
        if not level:
            return
    raise BadRecord(TOO_DEEP)


def refuse_constant(name: str) -> Any:
    raise BadRecord(f"{name} is not JSON; write null or leave it out")


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRecord(f"the key {reprlib.repr(twice)} occurs twice in one object; keep one")
    return keys


STRICT = json.JSONDecoder(parse_constant=refuse_constant, object_pairs_hook=without_duplicates)
LENIENT = json.JSONDecoder()  # finds the end of what STRICT refuses
JSON_BLANKS = re.compile(r"[ \t\r\n]*")
TOO_DEEP = f"JSON nested too deeply (more than {DEEPEST} levels); flatten it"
