"""Raw records -> Conversation: messages, Alpaca, prompt/completion or plain text, from JSON lines or a JSON array.

The format is recognised record by record, and so is what is wrong: each problem names file, line, cause and remedy.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sft.conversation import BadRecord, Conversation, Message, kind, text_of
from sft.errors import UserError, listed

KNOWN = ("system", "user", "assistant")
PROMPT_KEYS = ("prompt", "question", "instruction", "query")
COMPLETION_KEYS = ("completion", "response", "answer", "output")

# What would be lost if it were ignored.
UNREAD_RECORD_KEYS = ("tools", "functions")
UNREAD_EXCHANGE_KEYS = ("history", "context")
UNREAD_MESSAGE_KEYS = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "weight", "train")

FIRST_BYTES = {
    b"\xef\xbb\xbf": "begins with a byte order mark; save it as UTF-8 without BOM",
    b"\xff\xfe": "is UTF-16; save it as UTF-8",
    b"\xfe\xff": "is UTF-16; save it as UTF-8",
    b"\x1f\x8b": "is compressed; unpack it first (gunzip)",
    b"PK\x03\x04": "is compressed; unpack it first (unzip)",
    b"PAR1": "is Parquet; convert it to JSON lines first",
}


class Problems:
    """Collects what is wrong with the input and complains once: when asked, or as soon as there is plenty."""

    PLENTY = 10

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        self.found.append(problem)
        if len(self.found) == self.PLENTY:
            raise listed(f"the input cannot be used (the first {self.PLENTY} problems):", self.found)

    def complain(self) -> None:
        if self.found:
            raise listed("the input cannot be used:", self.found)


class RawRecord(NamedTuple):
    record: int
    line: int
    value: Any


def read_conversations(
    path: str | Path,
    source: int = 0,
    *,
    problems: Problems | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> Iterator[Conversation]:
    """The conversations of one file, in order. What is wrong goes to `problems` and is skipped; without that list,
    a UserError with all of it ends the iteration. `advance` is told of every stretch of bytes that has been read."""
    found = Problems() if problems is None else problems
    try:
        with open(path, "rb") as file:
            for raw in raw_records(file, str(path), found, advance):
                try:
                    messages, text = conversation_of(raw.value)
                except BadRecord as error:
                    found.add(f"{path}:{raw.line}: {error}")
                else:
                    yield Conversation(messages, text, source=source, record=raw.record, line=raw.line)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; name a file of JSON lines or a JSON array") from error
    if problems is None:
        found.complain()


def raw_records(file: BinaryIO, path: str, problems: Problems, advance: Callable[[int], object]) -> Iterator[RawRecord]:
    """The decoded JSON values of a file whose first character says whether it is an array or lines."""
    head = file.read(4096)
    file.seek(0)
    for first_bytes, complaint in FIRST_BYTES.items():
        if head.startswith(first_bytes):
            problems.add(f"{path}:1: the file {complaint}")
            return
    read = array_elements if head.lstrip().startswith(b"[") else lines
    count = len(problems.found)
    record = 0
    for line, value in read(file, path, problems, advance):
        record += 1
        if not isinstance(value, BadRecord):
            yield RawRecord(record, line, value)
    if record == 0 and len(problems.found) == count:
        problems.add(f"{path}:1: the file holds no records; one JSON object a line is expected, or an array of them")


def lines(file: BinaryIO, path: str, problems: Problems, advance: Callable[[int], object]) -> Iterator[tuple[int, Any]]:
    """(line, value) for each line that is not blank; the value is a BadRecord where there is none."""
    for number, line in enumerate(file, 1):
        advance(len(line))
        if not line.strip():
            continue
        try:
            yield number, decoded(line)
        except BadRecord as error:
            problems.add(f"{path}:{number}: {error}")
            yield number, error


def decoded(line: bytes) -> Any:
    try:
        return STRICT.decode(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord(not_utf8(error)) from error
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        raise BadRecord(
            f"{broken(error)}; a line holds one whole record, unless the file is one array [...]"
        ) from error


def array_elements(
    file: BinaryIO, path: str, problems: Problems, advance: Callable[[int], object]
) -> Iterator[tuple[int, Any]]:
    """(line, value) for each element of a JSON array; the file is held in memory. Broken JSON ends the array."""
    data = file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.add(f"{path}:{line}: {not_utf8(error)}")
        return
    unread = len(data)
    del data
    line, counted = 1, 0
    try:
        for start, end, value in elements(text):
            line += text.count("\n", counted, start)
            counted = start
            advance(end - start)
            unread -= end - start
            if isinstance(value, BadRecord):
                problems.add(f"{path}:{line}: {value}")
            yield line, value
    except json.JSONDecodeError as error:
        problems.add(f"{path}:{error.lineno}: {broken(error)}; mend it, the rest of the array cannot be read")
    advance(unread)


def elements(text: str) -> Iterator[tuple[int, int, Any]]:
    """(start, end, value) of each element of the array that is the whole text; the value may be a BadRecord."""
    at = after_blanks(text, text.index("[") + 1)
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
        return STRICT.raw_decode(text, at)
    except BadRecord as error:
        return error, LENIENT.raw_decode(text, at)[1]


def after_blanks(text: str, at: int) -> int:
    found = JSON_BLANKS.match(text, at)
    return found.end() if found else at


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte {error.object[error.start]:#04x}); save the file as UTF-8"


def broken(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON at column {error.colno}: {error.msg}"
    return "JSON nested too deeply" if isinstance(error, RecursionError) else f"unreadable JSON: {error}"


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


def conversation_of(value: Any) -> tuple[tuple[Message, ...], str | None]:
    """The messages of a record, or no messages and its plain text; BadRecord where neither can be had."""
    if not isinstance(value, dict):
        raise BadRecord(f'a record must be an object, not {kind(value)}; write {{"messages": [...]}}')
    record = {key: item for key, item in value.items() if item is not None}  # tables fill what is missing with null
    refuse_unread(record, UNREAD_RECORD_KEYS, "the record")
    if "messages" in record:
        return messages_of(record["messages"]), None
    if "conversations" in record:
        raise BadRecord("'conversations' (ShareGPT) is not read yet; write 'messages' with 'role' and 'content'")
    prompts = [key for key in PROMPT_KEYS if key in record]
    completions = [key for key in COMPLETION_KEYS if key in record]
    for found in (prompts, completions):
        if len(found) > 1:
            raise BadRecord(f"{found[0]!r} and {found[1]!r} are both there; keep the one that is meant")
    if prompts and completions:
        return prompt_and_completion(record, prompts[0], completions[0]), None
    if "text" in record and not prompts and not completions:
        return (), text_of(record["text"], "'text'")
    missing = "a completion" if prompts else "a prompt" if completions else "anything known"
    keys = list(record)
    names = ", ".join(map(reprlib.repr, keys[:6])) + (" ..." if len(keys) > 6 else "")
    raise BadRecord(
        f"the record has no key for {missing} (keys: {names or 'none'}); "
        f"use 'messages', {'|'.join(PROMPT_KEYS)} with {'|'.join(COMPLETION_KEYS)}, or 'text'"
    )


def prompt_and_completion(record: dict[str, Any], prompt_key: str, completion_key: str) -> tuple[Message, ...]:
    """One exchange; Alpaca is the case that may have 'input' (joined to the prompt by a blank line) and 'system'."""
    refuse_unread(record, UNREAD_EXCHANGE_KEYS, "the record")
    prompt = text_of(record[prompt_key], repr(prompt_key))
    given = text_of(record.get("input", ""), "'input'")
    system = text_of(record.get("system", ""), "'system'")
    completion = text_of(record[completion_key], repr(completion_key))
    exchange = (Message("user", f"{prompt}\n\n{given}" if given else prompt), Message("assistant", completion))
    return (Message("system", system), *exchange) if system else exchange


def messages_of(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise BadRecord(f"'messages' must be a list, not {kind(value)}; give each message its 'role' and 'content'")
    if not value:
        raise BadRecord("'messages' is empty; remove the record")
    return tuple(message_of(item, f"message {number}") for number, item in enumerate(value, 1))


def message_of(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise BadRecord(f"{where} must be an object, not {kind(item)}; give it 'role' and 'content'")
    refuse_unread(item, UNREAD_MESSAGE_KEYS, where)
    for key in ("role", "content"):
        if key not in item:
            raise BadRecord(f"{where} has no {key!r}; each message needs 'role' and 'content'")
    if item["role"] not in KNOWN:
        raise BadRecord(f"{where} has the role {reprlib.repr(item['role'])}; the roles are {', '.join(KNOWN)}")
    return Message(item["role"], text_of(item["content"], f"{where}: 'content'"))


def refuse_unread(fields: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in keys:
        if fields.get(key) not in (None, [], {}, ""):
            raise BadRecord(f"{where} has {key!r}, which is not read yet and would be lost; remove it or the record")
