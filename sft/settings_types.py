"""The types that a setting may have: their names, how a value is checked against one, how text is read as one.

bool, int, float, str, None, Any, Literal, list, tuple and dict (with or without their element types), and unions.
"""

from __future__ import annotations

import ast
import json
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def type_name(hint: Any) -> str:
    """The type as one writes it: `int | None`, `'cosine' | 'linear'`, `dict[str, Any]`."""
    if len(options(hint)) > 1:
        return " | ".join(map(type_name, options(hint)))
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    if hint is type(None):
        return "None"
    return str(hint).replace("typing.", "") if typing.get_args(hint) or hint is Any else hint.__name__


def checked(value: Any, hint: Any) -> Any:
    """The value as the declared type has it (1 becomes 1.0 for float, a list a tuple); ValueError where none fits."""
    if len(options(hint)) > 1:
        return first_that_fits(checked, value, options(hint))
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    assert origin in (bool, int, float, str, type(None), Any, Literal, list, tuple, dict), f"no settings of type {hint}"
    if origin is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return origin(checked_elements(value, inner if origin is tuple else (*inner, ...)))
    if origin is dict and isinstance(value, dict):
        key_hint, value_hint = inner or (Any, Any)
        return {checked(key, key_hint): checked(item, value_hint) for key, item in value.items()}
    if origin is Any:
        fits = is_json(value)
    elif origin is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in inner)
    else:
        fits = origin in (bool, int, str, type(None)) and type(value) is origin  # by type, because True is no int here
    if not fits:
        raise ValueError
    return value


def accepts(hint: Any, value: Any) -> bool:
    try:
        checked(value, hint)
    except ValueError:
        return False
    return True


def is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def checked_elements(values: Sequence[Any], hints: tuple[Any, ...]) -> list[Any]:
    """The elements as a tuple's hints have them: one for each, or `(T, ...)` for any number, or none at all."""
    if hints[1:] == (...,):
        hints = hints[:1] * len(values)
    elif hints in ((), (...,)):
        return list(values)
    if len(hints) != len(values):
        raise ValueError
    return [checked(value, hint) for value, hint in zip(values, hints, strict=True)]


def read_text(text: str, hint: Any) -> Any:
    """What was typed after `--name=`, read as the declared type; ValueError where it cannot be."""
    if len(options(hint)) > 1:  # str last, because every text is one
        return first_that_fits(read_text, text, sorted(options(hint), key=lambda option: option is str))
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (Literal, bool, type(None)):
        choices = inner if origin is Literal else (True, False) if origin is bool else (None,)
        for choice in choices:
            if text == choice or (not isinstance(choice, str) and text.lower() == str(choice).lower()):
                return choice
        raise ValueError
    if origin in (int, float, str):
        read: Callable[[str], Any] = integer if origin is int else origin
        return checked(read(text), hint)
    try:
        return checked(ast.literal_eval(text), hint)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:  # the last two: nested deeply
        if origin in (list, tuple) and inner[:1] == (str,):
            return checked(text.split(","), hint)  # --input=a.jsonl,b.jsonl
        raise ValueError from error


def integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)  # 1e3
        if not number.is_integer():
            raise
        return int(number)


def first_that_fits(read: Callable[[Any, Any], Any], value: Any, hints: Sequence[Any]) -> Any:
    for hint in hints:
        try:
            return read(value, hint)
        except ValueError:
            continue
    raise ValueError
