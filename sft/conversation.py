"""What every raw format is read into, and the two things that may be wrong with a record or a text in it."""

from __future__ import annotations

import re
from typing import NamedTuple

ROLES = ("system", "user", "assistant", "tool")

# The regular expressions of tokenizers give up on long runs of white space (tiktoken at 999,999); two may be joined.
LONGEST_BLANK = 400_000
BLANK = re.compile(rf"\s(?<!\s\s)\s{{{LONGEST_BLANK}}}")  # tried at the beginning of a run alone, hence in linear time


class ToolCall(NamedTuple):
    name: str
    arguments: str  # JSON as the template prints it: a string stands as it was given, a value as json.dumps has it


class Message(NamedTuple):
    role: str  # one of ROLES
    content: str
    reasoning: str | None = None  # None: none was given apart from the content
    tool_calls: tuple[ToolCall, ...] = ()
    weight: float = 1.0  # of an assistant message's tokens in the loss; 0 = not trained


class Conversation(NamedTuple):
    """Either the messages of a conversation or, for plain text, none and `text`; and where it was found."""

    messages: tuple[Message, ...]
    text: str | None = None
    tools: tuple[str, ...] = ()  # one JSON object each, as the template prints it
    source: int = 0  # index of the file in the list of sources
    record: int = 1  # 1-based, blank lines not counted
    line: int = 1  # 1-based line of the file on which the record begins; for Parquet the row
    group: str | None = None  # conversations of one group share a split


class BadRecord(Exception):
    """Why a record is refused: 'cause; remedy'."""


class BadFile(BadRecord):
    """Why not even the records after it can be read: nothing that may be skipped."""


def text_of(value: object, what: str) -> str:
    """The value, if it is a string that a tokenizer can encode."""
    if not isinstance(value, str):
        raise BadRecord(f"{what} must be a string, not {kind(value)}; write the text itself")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise BadRecord(
                f"{what} holds half a character (\\u{code:04x} at {error.start}); mend or remove it"
            ) from error
    if len(value) > LONGEST_BLANK and BLANK.search(value):
        raise BadRecord(f"{what} holds more than {LONGEST_BLANK:,} blanks in a row; remove them")
    return value


def kind(value: object) -> str:
    """What JSON calls the value, or Python where a table holds what JSON cannot."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return names.get(type(value)) or ("a number" if isinstance(value, (int, float)) else type(value).__name__)
