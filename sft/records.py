"""A raw record -> Conversation: messages, ShareGPT, Alpaca, prompt/completion, Dolly or plain text.

The format is recognised record by record, and so is what is wrong: each problem says cause and remedy.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from sft.conversation import BadRecord, Conversation, Message, kind, text_of
from sft.errors import UserError
from sft.json_records import decoded_line
from sft.messages import LOST_OF_RECORDS, messages_of, refuse, refuse_any, tools_of
from sft.sources import RawRecord

Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "dolly", "text"]

PROMPT_KEYS = ("prompt", "question", "instruction", "query")
COMPLETION_KEYS = ("completion", "response", "answer", "output")
SHAREGPT_KEYS = ("conversations", "conversation")
LIST_KEYS = ("messages", *SHAREGPT_KEYS)
FIELDS = (
    *("messages", "conversations", "prompt", "completion", "input", "context"),
    *("system", "history", "tools", "text"),
)
ALIASES = {"prompt": PROMPT_KEYS, "completion": COMPLETION_KEYS, "conversations": SHAREGPT_KEYS}
EXTRAS = ("input", "context", "system", "history", "tools")  # of an exchange
# Which keys a forced format looks at, a name of --fields before its own.
EXCHANGES = {
    "alpaca": (("instruction",), ("output",), ("input", "system", "history", "tools")),
    "dolly": (("instruction",), ("response",), ("context", "system", "history", "tools")),
    "prompt_completion": (PROMPT_KEYS, COMPLETION_KEYS, EXTRAS),
}
FORMAT_OF_FIELD: dict[str, Format] = {
    "messages": "messages",
    "conversations": "sharegpt",
    "text": "text",
    "prompt": "prompt_completion",
    "completion": "prompt_completion",
}


@dataclass(frozen=True)
class ReadOptions:
    format: Format = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)  # our name -> the column that stands for it
    group_by: str | None = None  # a key, or a dotted path to one, whose value is the conversation's group


def parse_fields(text: str | None) -> dict[str, str]:
    """{our name: their column} of 'prompt:col,completion:col'; UserError with everything that is wrong, in one line."""
    fields: dict[str, str] = {}
    problems = []
    for item in (text or "").split(","):
        if not item.strip():
            continue
        name, _, column = (part.strip() for part in item.partition(":"))
        if name not in FIELDS:
            problems.append(f"fields has no name {name!r} (the names are {', '.join(FIELDS)})")
        elif not column:
            problems.append(f"fields says no column for {name!r} (write {name}:column)")
        elif name in fields or column in fields.values():
            problems.append(f"fields names a thing twice with {item.strip()!r} (keep one)")
        fields.setdefault(name, column)
    if problems:
        raise UserError("; ".join(problems))
    return fields


def read_record(raw: RawRecord, options: ReadOptions, source: int) -> Conversation:
    """The conversation of a record of sources[source]; BadRecord where none can be had."""
    value = raw.value
    if isinstance(value, BadRecord):
        raise value
    if isinstance(value, bytes):
        value = decoded_line(value)
    if not isinstance(value, dict):
        raise BadRecord(f'a record must be an object, not {kind(value)}; write {{"messages": [...]}}')
    group = None if options.group_by is None else group_of(value, options.group_by)
    if None in value.values():  # tables fill what is missing with null
        value = {key: item for key, item in value.items() if item is not None}
    refuse_any(value, LOST_OF_RECORDS, "the record")
    wanted = options.format
    if options.fields:
        value = renamed(value, options.fields)
        formats = {FORMAT_OF_FIELD[name] for name in options.fields if name in FORMAT_OF_FIELD}
        if wanted == "auto" and len(formats) == 1:
            wanted = formats.pop()
    found = recognised(tuple(value)) if wanted == "auto" else wanted
    tools = tools_of(value["tools"]) if "tools" in value else ()
    if found == "text":
        if tools:
            raise BadRecord("the record has 'tools' but only 'text'; write 'messages'")
        if "text" not in value:
            raise missing(value, "'text'")
        return Conversation((), text_of(value["text"], "'text'"), (), source, raw.record, raw.line, group)
    messages = listed_messages(value, found) if found in ("messages", "sharegpt") else exchange_of(value, found)
    return Conversation(messages, None, tools, source, raw.record, raw.line, group)


@lru_cache(maxsize=256)
def recognised(record: tuple[str, ...]) -> Format:
    """The one format that a record with these keys can be read as; BadRecord where there is none, or several."""
    candidates = [key for key in LIST_KEYS if key in record]
    prompts = [key for key in PROMPT_KEYS if key in record]
    completions = [key for key in COMPLETION_KEYS if key in record]
    if completions and (prompts or "context" in record):
        candidates.append((prompts or ["context"])[0])
    if len(candidates) > 1:
        raise BadRecord(
            f"{candidates[0]!r} and {candidates[1]!r} are both there; say which is meant, with --format or --fields"
        )
    if not candidates:
        if "text" in record and not prompts and not completions:
            return "text"
        raise missing(record, "a completion" if prompts else "a prompt" if completions else "anything known")
    if candidates[0] in LIST_KEYS:
        return "messages" if candidates[0] == "messages" else "sharegpt"
    return "prompt_completion"


def missing(record: Iterable[str], what: str) -> BadRecord:
    keys = list(record)
    names = ", ".join(map(reprlib.repr, keys[:6])) + (" ..." if len(keys) > 6 else "")
    return BadRecord(
        f"the record has no key for {what} (keys: {names or 'none'}); use 'messages', 'conversations', "
        f"{'|'.join(PROMPT_KEYS)} with {'|'.join(COMPLETION_KEYS)}, or 'text', or name your columns with --fields"
    )


def listed_messages(record: dict[str, Any], found: Format) -> tuple[Message, ...]:
    """The messages of a record that lists them, a 'system' text of its own put first."""
    keys = ("messages",) if found == "messages" else (*SHAREGPT_KEYS, "messages")
    key = next((key for key in keys if key in record), None)
    if key is None:
        raise missing(record, repr(keys[0]))
    return after_system(record, messages_of(record[key], repr(key), sharegpt=found == "sharegpt"))


def after_system(record: dict[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages, behind the text of the record's 'system' if it has one."""
    if "system" not in record or not (system := text_of(record["system"], "'system'")):
        return messages
    if any(message.role == "system" for message in messages):
        raise BadRecord("the record has 'system' and a system message; keep one")
    return (Message("system", system), *messages)


def exchange_of(record: dict[str, Any], found: Format) -> tuple[Message, ...]:
    """One exchange, with the system text and earlier exchanges that may come with it."""
    prompt_key, completion_key = exchange_keys(tuple(record), found)
    extras = EXCHANGES[found][2]
    prompt, completion = record[prompt_key], record[completion_key]
    given = [key for key in ("input", "context") if key in extras and key != prompt_key and record.get(key, "") != ""]
    if len(given) > 1:
        raise BadRecord("'input' and 'context' are both there; say which is meant, with --format or --fields")
    if isinstance(prompt, list) or isinstance(completion, list):
        refuse(record, (*given, "history"), "a record whose prompt is a list of messages", "write it as messages")
        return after_system(record, conversational(record, prompt_key, completion_key))
    prompt = text_of(prompt, repr(prompt_key))
    if given:
        prompt = f"{prompt}\n\n{text_of(record[given[0]], repr(given[0]))}"
    exchange = (Message("user", prompt), Message("assistant", text_of(completion, repr(completion_key))))
    return after_system(record, history_of(record["history"]) + exchange if "history" in record else exchange)


@lru_cache(maxsize=256)
def exchange_keys(record: tuple[str, ...], found: Format) -> tuple[str, str]:
    """Which of a record's keys are the prompt and the completion; BadRecord where one is missing or not alone."""
    prompt_keys, completion_keys, extras = EXCHANGES[found]
    prompt_key = only_key(record, prompt_keys, "prompt") or ("context" if "context" in extras else "")
    completion_key = only_key(record, completion_keys, "completion")
    if prompt_key not in record or not completion_key:
        raise missing(record, "a completion" if prompt_key in record else "a prompt")
    return prompt_key, completion_key


def only_key(record: tuple[str, ...], keys: tuple[str, ...], name: str) -> str:
    """The one of the keys that the record has; `name` is there where --fields named it."""
    found = [key for key in keys if key in record]
    if len(found) > 1:
        raise BadRecord(
            f"{found[0]!r} and {found[1]!r} are both there; keep the one that is meant, or name it with --fields"
        )
    return found[0] if found else name if name in record else ""


def conversational(record: dict[str, Any], prompt_key: str, completion_key: str) -> tuple[Message, ...]:
    """Lists of messages as prompt and completion: what an assistant says in the prompt is not trained."""
    prompt, completion = (messages_of(record[key], repr(key)) for key in (prompt_key, completion_key))
    masked = (message._replace(weight=0.0) if message.role == "assistant" else message for message in prompt)
    return (*masked, *completion)


def history_of(value: Any) -> tuple[Message, ...]:
    remedy = "write [[question, answer], ...]"
    if value == "":
        return ()
    if not isinstance(value, list):
        raise BadRecord(f"'history' must be a list, not {kind(value)}; {remedy}")
    messages: list[Message] = []
    for number, pair in enumerate(value, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecord(f"'history' {number} is no pair; {remedy}")
        question, answer = (text_of(text, f"'history' {number}") for text in pair)
        messages += (Message("user", question), Message("assistant", answer))
    return tuple(messages)


def renamed(record: dict[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The record with our names for the columns that `fields` gives, which then have no aliases."""
    gone = {*fields.values()}
    for name in fields:
        gone.update(ALIASES.get(name, (name,)))
    rest = {key: value for key, value in record.items() if key not in gone}
    return rest | {name: record[column] for name, column in fields.items() if column in record}


def group_of(record: dict[str, Any], path: str) -> str:
    """The value at the path, as JSON."""
    value: Any = record
    for key in [path] if path in record else path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, (str, int, float)):
        what = "nothing" if value is None else kind(value)
        raise BadRecord(f"{path!r} (group_by) holds {what}; give it a string or a number, or group by another key")
    return json.dumps(value)


def oddities(conversation: Conversation) -> tuple[str, ...]:
    """What is accepted in a conversation but worth counting."""
    if conversation.text is not None:
        return ("nul",) if "\0" in conversation.text else ()
    found = {}
    before = ""
    for role, content, reasoning, calls, _ in conversation.messages:
        if not content and not calls:
            found["empty_turn"] = True
        if role == before == "user":
            found["user_turns_in_a_row"] = True
        if role != "system":
            if role == "assistant" and not before:
                found["assistant_first"] = True
            before = role
        if "\0" in content or (reasoning and "\0" in reasoning) or any("\0" in part for call in calls for part in call):
            found["nul"] = True
    if before == "user":
        found["user_last"] = True
    return tuple(found)
