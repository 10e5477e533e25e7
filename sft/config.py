"""Settings from defaults, files and the command line, checked all at once, each value with its origin.

A program's settings are a frozen keyword-only dataclass, one field a line with a trailing comment. Values apply in
this order: the field's default, then each file of the command line from left to right (`*.py`, run as plain
assignments; `*.json`, a run log whose "config" is read as data), then `--name=value`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import json
import re
import sys
import traceback
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from sft.errors import listed
from sft.settings_help import IsDataclass, default_of, field_comments, help_text, markdown_table
from sft.settings_types import checked, options, read_text, type_name
from sft.untrusted import MEBIBYTE, read_json

__all__ = ["Resolved", "fingerprint", "help_text", "load_settings", "markdown_table", "to_dict", "words_of"]

COMMAND_LINE = "command line"
LARGEST_RUN_LOG = 256 * MEBIBYTE  # a million records
S = TypeVar("S", bound=IsDataclass)


class Resolved(NamedTuple, Generic[S]):
    settings: S
    origins: dict[str, str]  # name -> "default", "configs/x.py:3", "out/run_x.json" or "command line"


class Given(NamedTuple):
    """One value as a source gives it, before anything is known of its name and type."""

    name: str
    value: Any
    origin: str
    problem: str | None = None  # why there is no value after all


def load_settings(
    cls: type[S], argv: Sequence[str], *, elsewhere: Mapping[str, str] | None = None, usage: str | None = None
) -> Resolved[S]:
    """The settings that argv asks for; UserError lists every problem of all the sources, with file and line.

    `elsewhere` maps names that other projects use, and `name=value` that was once right, to a sentence that says what
    to do here instead. A method `contradictions(self)` of cls yields (setting name, message) for values that are fine
    alone but not together. `--help` prints the table of settings and exits with status 0.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, usage or f"python {sys.argv[0]} [config.py | run_*.json ...] [--name=value ...]"))
        raise SystemExit(0)
    given, unread = read_sources(argv, typing.get_type_hints(cls))
    values, origins, problems, doubtful = assign(cls, given, elsewhere or {})
    if unread:
        doubtful.update(name for name, origin in origins.items() if origin == "default")
    required = [field.name for field in dataclasses.fields(cls) if default_of(field) is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    comments = field_comments(cls) if missing else {}
    problems += [f"missing setting '{name}': {comments[name]}" for name in missing if name not in doubtful]
    settings = partial_settings(cls, values) if missing else cls(**values)
    problems += contradictions(settings, origins, doubtful, missing)
    if unread or problems:
        raise listed("the settings cannot be used:", [*unread, *problems])
    return Resolved(settings, origins)


def words_of(cls: type[IsDataclass], argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of argv that name a setting of cls, and all others: for a program that passes those on to another."""
    names = {field.name for field in dataclasses.fields(cls)}
    own = [word for word in argv if word.startswith("--") and word[2:].partition("=")[0] in names]
    return own, [word for word in argv if word not in own]


def assign(
    cls: type[S], given: Sequence[Given], elsewhere: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str], list[str], set[str]]:
    """The values in their types, the origin of every setting, the problems, and the settings that they make doubtful.

    Doubtful is a setting whose intended value is unknown; nothing is to be said of what may follow from it.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    origins = {field.name: "default" for field in dataclasses.fields(cls)}
    problems: list[str] = []
    doubtful: set[str] = set()
    for item in given:
        if item.name not in origins:
            sentence, meant = unknown_setting(item, origins, elsewhere)
            problems.append(f"{item.origin}: {sentence}")
            doubtful.update(meant)
            continue
        try:
            values[item.name] = value_of(item, hints[item.name])
            origins[item.name] = item.origin
        except ValueError as error:
            instead = elsewhere.get(f"{item.name}={item.value}".lower())
            problems.append(f"{item.origin}: {error}" + (f"; {instead}" if instead else ""))
            doubtful.add(item.name)
    return values, origins, problems, doubtful


def value_of(item: Given, hint: Any) -> Any:
    """The value in its declared type; ValueError with a sentence where there is none."""
    if item.problem:
        raise ValueError(item.problem)
    try:
        return read_text(item.value, hint) if item.origin == COMMAND_LINE else checked(item.value, hint)
    except ValueError as error:
        shown = repr(item.value)
        shown = shown if len(shown) <= 100 else f"{shown[:97]}..."
        raise ValueError(f"{item.name} must be {type_name(hint)}, not {shown}") from error


def unknown_setting(item: Given, known: Collection[str], elsewhere: Mapping[str, str]) -> tuple[str, list[str]]:
    """A sentence about a name that is no setting, and the setting that was probably meant."""
    if item.name in elsewhere:
        return f"unknown setting '{item.name}'; {elsewhere[item.name]}", []
    meant = difflib.get_close_matches(item.name.replace("-", "_"), known, n=1)
    if meant:
        return f"unknown setting '{item.name}'; did you mean '{meant[0]}'?", meant
    in_config_file = ".py:" in item.origin
    return f"unknown setting '{item.name}'; " + (
        "the name of a helper begins with _" if in_config_file else "--help lists the settings"
    ), []


def partial_settings(cls: type[S], values: Mapping[str, Any]) -> S:
    """An instance without the attributes that nobody has given, so that the others can be checked all the same."""
    settings = object.__new__(cls)
    for field in dataclasses.fields(cls):
        value = values.get(field.name, default_of(field))
        if value is not dataclasses.MISSING:
            object.__setattr__(settings, field.name, value)
    return settings


def contradictions(
    settings: Any, origins: Mapping[str, str], doubtful: Collection[str], missing: Collection[str]
) -> Iterator[str]:
    """What settings.contradictions() finds, with origins; nothing that another problem may have caused."""
    found = settings.contradictions() if hasattr(settings, "contradictions") else iter(())
    while True:
        try:
            name, message = next(found)
        except StopIteration:
            return
        except AttributeError:
            if missing:  # this rule needs a setting that is reported as missing, and a generator ends here
                return
            raise
        assert name in origins, f"contradictions() names {name!r}, which is no setting"
        words = re.findall(r"\w+", re.sub(r"'[^']*'", "", message))  # a quoted path may hold the name of a setting
        concerned = [word for word in dict.fromkeys(words) if word in origins and word != name]
        if not {name, *concerned} & set(doubtful):
            others = [f"{other}: {origins[other]}" for other in concerned if origins[other] != "default"]
            yield f"{origins[name]}: {message}" + (f" ({', '.join(others)})" if others else "")


def read_sources(argv: Sequence[str], hints: Mapping[str, Any]) -> tuple[list[Given], list[str]]:
    """Every value of the files, then of the command line; and what keeps a source from being read."""
    from_files: list[Given] = []
    typed: list[Given] = []
    problems: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        try:
            if word.startswith("--") and "=" in word:
                name, _, text = word.removeprefix("--").partition("=")
                typed.append(Given(name, text, COMMAND_LINE))
            elif word.startswith("--"):
                name = word.removeprefix("--")
                is_switch = bool in options(hints.get(name))
                follows = words.pop(0) if words and is_value(words[0], is_switch) else None
                if hints.get(name) is bool and follows is None:
                    typed.append(Given(name, "true", COMMAND_LINE))
                    continue
                typed.append(Given(name, None, COMMAND_LINE, without_equals(name, follows, is_switch)))
            elif word.endswith(".py"):
                from_files += read_python(word)
            elif word.endswith(".json"):
                from_files += read_run_log(word)
            else:
                problems.append(f"{COMMAND_LINE}: '{word}' is no config file (*.py), run log (*.json) or --name=value")
        except ValueError as error:
            problems.append(str(error))
    return from_files + typed, problems


def is_value(word: str, is_switch: bool) -> bool:
    """Whether the word after `--name` was meant as its value."""
    if is_switch:
        return word.lower() in ("true", "false", "none")
    return not word.startswith("--") and not word.endswith(".py")


def without_equals(name: str, value: str | None, is_switch: bool) -> str:
    if value is not None:
        return f"write --{name}={value} with an equals sign, not --{name} {value}"
    return f"--{name} needs a value: " + (f"--{name}=true or --{name}=false" if is_switch else f"--{name}=...")


def read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {(error.strerror or str(error)).lower()}") from error


def read_python(path: str) -> list[Given]:
    """The names that a file of plain assignments leaves behind, each with the line that last assigned it.

    It runs in a namespace of its own; names that begin with _ and imported modules are its private matter.
    """
    source = read_bytes(path)
    try:
        tree = ast.parse(source, path)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ValueError(f"{path}:{line}: {getattr(error, 'msg', error)}") from error
    except (MemoryError, RecursionError) as error:
        raise ValueError(f"{path}: an expression is nested too deeply") from error
    namespace: dict[str, Any] = {"__name__": "config", "__file__": path}
    try:
        exec(compile(tree, path, "exec", dont_inherit=True), namespace)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        raise ValueError(f"{path}:{lines[-1] if lines else 1}: {type(error).__name__}: {error}") from error
    line_of = assigned_lines(tree)
    return [
        Given(name, value, f"{path}:{line_of.get(name, 1)}")
        for name, value in namespace.items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    ]


def assigned_lines(tree: ast.Module) -> dict[str, int]:
    """The line of the last top-level statement that binds each name."""
    lines: dict[str, int] = {}
    for statement in tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            lines[statement.name] = statement.lineno
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                lines[node.id] = node.lineno
            elif isinstance(node, ast.alias):
                lines[node.asname or node.name] = node.lineno
    return lines


def read_run_log(path: str) -> list[Given]:
    """The "config" of a run log: what a run was started with, as data."""
    try:
        log = read_json(Path(path), most=LARGEST_RUN_LOG)
    except OSError as error:
        raise ValueError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    config = log.get("config") if isinstance(log, dict) else None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds no 'config' object; a run log (run_*.json) has one")
    return [Given(name, value, path) for name, value in config.items()]


def to_dict(settings: IsDataclass) -> dict[str, Any]:
    """The settings as plain JSON data: dicts, lists, strings, numbers, booleans, None."""
    return json.loads(json.dumps(dataclasses.asdict(settings), allow_nan=False))


def fingerprint(settings: IsDataclass) -> str:
    """sha256 (hex) of the settings' canonical JSON: equal exactly where all values are."""
    return hashlib.sha256(json.dumps(to_dict(settings), sort_keys=True).encode()).hexdigest()
