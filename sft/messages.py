"""One item of a record's list of messages -> Message, in the style of OpenAI or of ShareGPT; tools and tool calls."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from sft.conversation import LONGEST_BLANK, BadRecord, Message, ToolCall, kind, text_of
from sft.json_records import broken, decoded, dumped

OPENAI_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
SHAREGPT_ROLES = {
    **OPENAI_ROLES,
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1e6  # float32 holds their products with any loss

# What a record or a message may have and no template can express.
ONLY_TEXT = "only text can be trained on: remove it or the record"
LOST_OF_RECORDS = {
    "functions": "write 'tools'",
    **dict.fromkeys(("audio", "audios", "image", "images", "video", "videos"), ONLY_TEXT),
}
LOST_OF_MESSAGES = {
    **LOST_OF_RECORDS,
    "function_call": "write 'tool_calls'",
    "refusal": "write it as the content",
    "thinking": "write 'reasoning_content'",
    **dict.fromkeys(("loss", "training", "train_detail"), "write 'train' or 'weight'"),
}
PLAIN_KEYS = {"role", "content", "from", "value", "name", "id", "tool_call_id"}
PART_ORDER = {"reasoning": 0, "text": 1, "tool_call": 2}
NOTHING: tuple[object, ...] = (None, "", [], {})


def messages_of(value: Any, what: str, *, sharegpt: bool = False) -> tuple[Message, ...]:
    """The messages of a list; those with 'from' and 'value' are ShareGPT's in any case."""
    if not isinstance(value, list):
        raise BadRecord(f"{what} must be a list, not {kind(value)}; give each message its 'role' and 'content'")
    if not value:
        raise BadRecord(f"{what} is empty; remove the record")
    names = SHAREGPT_ROLES if sharegpt else OPENAI_ROLES
    messages: list[Message] = []
    for item in value:
        messages.append(plain_message_of(item, names) or message_of(item, f"message {len(messages) + 1}", names))
    return tuple(messages)


def plain_message_of(item: Any, names: Mapping[str, str]) -> Message | None:
    """The message, if it is of the commonest kind, which needs no more than this; None says nothing against it."""
    if type(item) is not dict or len(item) != 2:
        return None
    if "content" in item:
        role, content = item.get("role"), item["content"]
    else:
        role, content, names = item.get("from"), item.get("value"), SHAREGPT_ROLES
    if type(role) is not str or role not in names or role == "function_call" or type(content) is not str:
        return None
    return Message(names[role], content) if content.isascii() and len(content) <= LONGEST_BLANK else None


def message_of(item: Any, where: str, names: Mapping[str, str]) -> Message:
    if not isinstance(item, dict):
        raise BadRecord(f"{where} must be an object, not {kind(item)}; give it 'role' and 'content'")
    item = {key: value for key, value in item.items() if value is not None}  # tables fill what is missing with null
    refuse_any(item, LOST_OF_MESSAGES, where)
    role_key, content_key = keys_of(item, where)
    if role_key == "from":
        names = SHAREGPT_ROLES
    given = item[role_key]
    if not isinstance(given, str) or given not in names:
        roles = ", ".join(sorted(names))
        hint = "; write 'tool'" if given == "function" else ""
        raise BadRecord(f"{where} has the role {reprlib.repr(given)}{hint}; the roles are {roles}")
    role = names[given]
    if given == "function_call":
        refuse(item, ("tool_calls",), where, "write the calls once")
        item["tool_calls"] = calls_in(item.pop(content_key, None), f"{where}: {content_key!r}")
    if item.keys() <= PLAIN_KEYS and isinstance(item.get(content_key), str):
        return Message(role, text_of(item[content_key], f"{where}: {content_key!r}"))
    content, reasoning, calls = content_of(item, content_key, where)
    if role != "assistant":
        if reasoning or calls:
            what = "reasoning" if reasoning else "tool calls"
            raise BadRecord(f"{where} ({role}) has {what}, which only an assistant has; correct the role or remove it")
        reasoning = None
    return Message(role, content, reasoning, calls, weight_of(item, role, where))


def keys_of(item: dict[str, Any], where: str) -> tuple[str, str]:
    """The names of the keys for role and content."""
    for key, other in (("role", "from"), ("content", "value")):
        if key in item and other in item:
            raise BadRecord(f"{where} has {key!r} and {other!r}; keep the one that is meant")
    role_key = "from" if "from" in item else "role"
    content_key = "value" if "value" in item else "content"
    if role_key not in item:
        raise BadRecord(f"{where} has no 'role'; each message needs 'role' and 'content'")
    return role_key, content_key


def content_of(item: dict[str, Any], key: str, where: str) -> tuple[str, str | None, tuple[ToolCall, ...]]:
    """(content, reasoning, tool calls) of a message, wherever it has them."""
    calls = tool_calls_of(item["tool_calls"], where) if item.get("tool_calls") not in NOTHING else ()
    reasoning = None
    for name in ("reasoning_content", "reasoning"):
        if name in item:
            if reasoning is not None:
                raise BadRecord(f"{where} has 'reasoning_content' and 'reasoning'; keep one")
            reasoning = text_of(item[name], f"{where}: {name!r}")
    content = item.get(key)
    if content is None:
        if not calls:
            raise BadRecord(
                f"{where} has no {key!r} (null counts as none), which only tool calls may stand for; write the text"
            )
        return "", reasoning, calls
    if isinstance(content, str):
        return text_of(content, f"{where}: {key!r}"), reasoning, calls
    if not isinstance(content, list):
        raise BadRecord(f"{where}: {key!r} must be a string or a list of parts, not {kind(content)}; write the text")
    text, thought, called = parts_of(content, f"{where}: {key!r}")
    if thought is not None and reasoning is not None:
        raise BadRecord(f"{where} has reasoning beside its content and in it; keep one")
    if called and calls:
        raise BadRecord(f"{where} has tool calls beside its content and in it; keep one")
    return text, reasoning if thought is None else thought, calls or called


def parts_of(parts: list[Any], what: str) -> tuple[str, str | None, tuple[ToolCall, ...]]:
    """(text, reasoning, tool calls) of a content's parts, each kind joined without a separator."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    last = 0
    for number, part in enumerate(parts, 1):
        where = f"{what} part {number}"
        if not isinstance(part, dict):
            raise BadRecord(f'{where} must be an object, not {kind(part)}; write {{"type": "text", "text": ...}}')
        sort = part.get("type")
        if not isinstance(sort, str) or sort not in PART_ORDER:
            raise BadRecord(f"{where} is of type {reprlib.repr(sort)}; {ONLY_TEXT}")
        if PART_ORDER[sort] < last:
            raise BadRecord(f"{where} ({sort}) comes too late; the order is reasoning, text, tool calls")
        last = PART_ORDER[sort]
        found = [part[key] for key in {sort: 0, "text": 0, "value": 0} if part.get(key) is not None]
        if len(found) > 1:
            raise BadRecord(f"{where} has more than one of {sort!r}, 'text' and 'value'; keep one")
        value = found[0] if found else None
        if sort == "tool_call":
            calls += calls_in(value, where)
        else:
            (texts if sort == "text" else thoughts).append(text_of(value, where))
    text, thought = (text_of("".join(pieces), what) for pieces in (texts, thoughts))
    return text, thought if thoughts else None, tuple(calls)


def calls_in(value: Any, what: str) -> list[ToolCall]:
    """The calls of a JSON text that holds one or a list of them, decoded already or not."""
    if isinstance(value, str):
        value = json_of(value, what, '{"name": ..., "arguments": {...}}')
    return list(tool_calls_of(value if isinstance(value, list) else [value], what))


def tool_calls_of(value: Any, where: str) -> tuple[ToolCall, ...]:
    if not isinstance(value, list):
        raise BadRecord(f"{where}: 'tool_calls' must be a list, not {kind(value)}; write [...]")
    return tuple(
        item if isinstance(item, ToolCall) else tool_call_of(item, f"{where}: tool call {number}")
        for number, item in enumerate(value, 1)
    )


def tool_call_of(item: Any, where: str) -> ToolCall:
    if not isinstance(item, dict):
        raise BadRecord(f"{where} must be an object, not {kind(item)}; give it 'name' and 'arguments'")
    if item.get("type") not in (None, "function"):
        raise BadRecord(f"{where} is of type {reprlib.repr(item['type'])}; only 'function' can be called")
    function = item if item.get("function") is None else item["function"]
    if not isinstance(function, dict):
        raise BadRecord(f"{where}: 'function' must be an object, not {kind(function)}; give it 'name' and 'arguments'")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise BadRecord(f"{where} has no 'name'; name the function")
    if isinstance(arguments, dict):
        arguments = dumped(arguments, f"{where}: 'arguments'")
    elif not isinstance(arguments, str):
        raise BadRecord(
            f"{where}: 'arguments' must be an object or its JSON, not {kind(arguments)}; write {{}} for none"
        )
    return ToolCall(text_of(name, f"{where}: 'name'"), text_of(arguments, f"{where}: 'arguments'"))


def tools_of(value: Any) -> tuple[str, ...]:
    """The tools of a record, each as the JSON that a server puts into the prompt."""
    if isinstance(value, str):
        value = json_of(value, "'tools'", "a list of functions") if value.strip() else []
    if not isinstance(value, list):
        raise BadRecord(f'\'tools\' must be a list, not {kind(value)}; write [{{"type": "function", ...}}]')
    return tuple(tool_of(item, f"tool {number}") for number, item in enumerate(value, 1))


def tool_of(item: Any, where: str) -> str:
    if not isinstance(item, dict):
        raise BadRecord(f"{where} must be an object, not {kind(item)}; describe a function by 'name' and 'parameters'")
    if not isinstance(item.get("function"), dict):
        if not isinstance(item.get("name"), str):
            raise BadRecord(f"{where} has neither 'function' nor 'name'; describe a function")
        item = {"type": "function", "function": item}
    return text_of(dumped(item, where), where)


def weight_of(item: dict[str, Any], role: str, where: str) -> float:
    """What 'train', 'weight' and 'loss_weight' say together; 1 where none is there."""
    said = {key: number_of(item[key], f"{where}: {key!r}") for key in ("weight", "loss_weight") if key in item}
    if "train" in item and not isinstance(item["train"], bool):
        raise BadRecord(f"{where}: 'train' must be true or false, not {kind(item['train'])}; 'weight' takes numbers")
    weights = set(said.values())
    trained = {weight > 0 for weight in weights} | ({item["train"]} if "train" in item else set())
    if len(weights) > 1 or len(trained) > 1:
        keys = " and ".join(repr(key) for key in ("train", *said) if key in item)
        raise BadRecord(f"{where}: {keys} contradict each other; keep one")
    if role != "assistant":
        if True in trained:
            raise BadRecord(
                f"{where} ({role}) is marked as trained, which only assistant messages are; "
                "remove the mark (--train_on=all trains on every token)"
            )
        return 0.0 if False in trained else 1.0
    return weights.pop() if weights else float(item.get("train", True))


def number_of(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRecord(f"{what} must be a number, not {kind(value)}; 'train' takes true and false")
    if value != 0 and not SMALLEST_WEIGHT <= value <= LARGEST_WEIGHT:
        raise BadRecord(
            f"{what} is {reprlib.repr(value)}; a weight is 0 or a number from {SMALLEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
        )
    return abs(float(value))


def json_of(text: str, what: str, wanted: str) -> Any:
    try:
        return decoded(text)
    except BadRecord as error:
        raise BadRecord(f"{what}: {error}") from error
    except ValueError as error:
        raise BadRecord(f"{what} must be JSON ({broken(error)}); write {wanted}") from error


def refuse_any(fields: Mapping[str, Any], lost: Mapping[str, str], where: str) -> None:
    """BadRecord for the first of the keys in `lost`, whose values are remedies."""
    if not lost.keys().isdisjoint(fields):
        for key, remedy in lost.items():
            refuse(fields, (key,), where, remedy)


def refuse(fields: Mapping[str, Any], keys: Iterable[str], where: str, remedy: str) -> None:
    for key in keys:
        if fields.get(key) not in NOTHING:
            raise BadRecord(f"{where} has {key!r}, which would be lost; {remedy}")
