"""The table of a program's settings, for --help and for the README, from the source of its dataclass."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import tokenize
import typing
from typing import Any, ClassVar, NamedTuple, Protocol

from sft.settings_types import type_name


class IsDataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


class Row(NamedTuple):
    name: str
    type: str
    default: str | None  # None: required
    comment: str


def help_text(cls: type[IsDataclass], usage: str) -> str:
    """What --help prints: the usage, the order of the sources, and every setting."""
    lines = [f"usage: {usage}", ""]
    if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("):  # else it is the signature that dataclass makes
        lines += [cls.__doc__.strip().splitlines()[0], ""]
    lines += ["Files apply from left to right, --name=value after them.", ""]
    for row in rows(cls):
        lines.append(f"  --{row.name}={row.type}  " + ("(required)" if row.default is None else f"[{row.default}]"))
        if row.comment:
            lines.append(f"        {row.comment}")
    return "\n".join(lines)


def markdown_table(cls: type[IsDataclass]) -> str:
    """Every setting as one line of a Markdown table."""
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for row in rows(cls):
        default = "required" if row.default is None else f"`{row.default}`"
        cells = (f"`{row.name}`", f"`{row.type}`", default, row.comment)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def rows(cls: type[IsDataclass]) -> list[Row]:
    hints, comments = typing.get_type_hints(cls), field_comments(cls)
    table = []
    for field in dataclasses.fields(cls):
        default = default_of(field)
        shown = None if default is dataclasses.MISSING else repr(default)
        table.append(Row(field.name, type_name(hints[field.name]), shown, comments[field.name]))
    return table


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The field's default, or dataclasses.MISSING where somebody has to give a value."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def field_comments(cls: type[IsDataclass]) -> dict[str, str]:
    """What the comments in each setting's statement say; empty where it has none."""
    comments = dict.fromkeys((field.name for field in dataclasses.fields(cls)), "")
    source = inspect.cleandoc("\n" + inspect.getsource(cls)) + "\n"
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in comments:
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)  # several where a formatter wrapped it
            comments[node.target.id] = " ".join(by_line[line] for line in lines if line in by_line)
    return comments
