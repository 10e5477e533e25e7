"""Inputs that are refused, each for a cause of its own: what the file holds, and where and how it is told."""

import gzip
import json
from typing import Any, NamedTuple

from sft.conversation import LONGEST_BLANK
from sft.sources import LONGEST_RECORD


class BadInput(NamedTuple):
    name: str
    content: bytes
    line: int
    message: str  # what the only problem says, from its beginning; the remedy follows the semicolon
    file: str = "bad.jsonl"
    needs: str | None = None  # the library without which the test is skipped


GOOD = b'{"prompt": "the cat", "completion": "sat"}\n'
MESSAGE = {"role": "user", "content": "hi"}


def line(name: str, content: bytes, message: str) -> BadInput:
    """The bad line between two good ones, behind a blank one."""
    return BadInput(name, GOOD + b"\n" + content + b"\n" + GOOD, 3, message)


def record(name: str, value: Any, message: str) -> BadInput:
    return line(name, json.dumps(value).encode(), message)


def exchange(name: str, message: str, **keys: Any) -> BadInput:
    return record(name, {"prompt": "p", "completion": "c", **keys}, message)


def user(name: str, message: str, **keys: Any) -> BadInput:
    return record(name, {"messages": [{**MESSAGE, **keys}]}, message)


def assistant(name: str, message: str, **keys: Any) -> BadInput:
    turns = [MESSAGE, {"role": "assistant", "content": "ho", **keys}]
    return record(name, {"messages": turns}, message)


def human(name: str, message: str, **keys: Any) -> BadInput:
    return record(name, {"conversations": [{"from": "human", "value": "hi", **keys}]}, message)


def call(**keys: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f", "arguments": {}, **keys}}]


BROKEN_JSON = [
    line("an open string", b'{"text": "a', "broken JSON at column 10: Unterminated string"),
    line("two records on a line", GOOD.strip() * 2, "broken JSON at column 43: Extra data"),
    line("no JSON", b"the cat sat", "broken JSON at column 1: Expecting value; a line holds one whole record"),
    line("single quotes", b"{'text': 'a'}", "broken JSON at column 2: Expecting property name"),
    line("a raw control character", b'{"text": "a\x01"}', "broken JSON at column 12: Invalid control character"),
    line("NaN", b'{"text": "a", "score": NaN}', "NaN is not JSON; write null"),
    line("an infinity", b'{"text": "a", "score": [-Infinity]}', "-Infinity is not JSON; write null"),
    line("a key twice", b'{"text": "a", "text": "b"}', "the key 'text' occurs twice in one object; keep one"),
    line("invalid UTF-8", b'{"text": "\xff"}', "not UTF-8 (byte 0xff); save the file as UTF-8"),
    line("half a character", b'{"text": "a\\ud83d"}', "'text' holds half a character (\\ud83d at 1); mend or remove"),
    line("deep nesting", b"[" * 100_000, "JSON nested too deeply (more than 100 levels); flatten it"),
    line("a number without end", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "a number of thousands of digits; "),
    line("a byte order mark within", b'\xef\xbb\xbf{"text": "a"}', "a byte order mark within the file, where two were"),
    line(
        "a line of 32 MiB", b'"' + b"a" * LONGEST_RECORD + b'"', "the line is longer than 33,554,432 bytes (32 MiB); "
    ),
]
RECORDS = [
    record("a string", "text", 'a record must be an object, not a string; write {"messages": [...]}'),
    record("no known key", {"content": "a"}, "the record has no key for anything known (keys: 'content'); use"),
    record("no completion", {"prompt": "a"}, "the record has no key for a completion (keys: 'prompt'); use"),
    record("no prompt", {"text": "a", "answer": "b"}, "the record has no key for a prompt (keys: 'text', 'answer')"),
    record("text that is a number", {"text": 3}, "'text' must be a string, not a number; write the text itself"),
    record("a text of blanks", {"text": " " * (LONGEST_BLANK + 1)}, "'text' holds more than 400,000 blanks in a row; "),
    record("tools of a text", {"text": "a", "tools": call()}, "the record has 'tools' but only 'text'; write 'mess"),
    exchange("two prompts", "'prompt' and 'question' are both there; keep", question="q"),
    exchange("two completions", "'completion' and 'answer' are both there; keep", answer="q"),
    exchange("two formats", "'messages' and 'prompt' are both there; say which is meant, with --format", messages=[]),
    exchange("input and context", "'input' and 'context' are both there; say which", input="a", context="b"),
    exchange("a prompt that is true", "'prompt' must be a string, not true/false; write the text itself", prompt=True),
    exchange("a prompt of messages", "'completion' must be a list, not a string; ", prompt=[MESSAGE]),
    exchange("a history of texts", "'history' 1 is no pair; write [[question, answer], ...]", history=["a", "b"]),
    exchange("an image", "the record has 'image', which would be lost; only text can", image="cat.png"),
    exchange("tools in an object", "'tools' must be a list, not an object; write [{", tools={"name": "f"}),
    exchange(
        "tools in broken JSON", "'tools' must be JSON (broken JSON at column 2: Expecting value); write", tools="["
    ),
    exchange(
        "a tool without a name", "tool 1 has neither 'function' nor 'name'; describe a function", tools=[{"a": 1}]
    ),
    exchange("functions", "the record has 'functions', which would be lost; write 'tools'", functions=[{"name": "f"}]),
    record(
        "two system texts",
        {"system": "a", "messages": [{"role": "system", "content": "b"}]},
        "the record has 'system' and a system message; keep one",
    ),
]
MESSAGES = [
    record("messages as text", {"messages": "hi"}, "'messages' must be a list, not a string; give each message"),
    record("no messages", {"messages": []}, "'messages' is empty; remove the record"),
    record("a message as text", {"messages": ["hi"]}, "message 1 must be an object, not a string; give it 'role'"),
    record("no role", {"messages": [{"content": "hi"}]}, "message 1 has no 'role'; each message needs"),
    record("no content", {"messages": [{"role": "user"}]}, "message 1 has no 'content' (null counts as none), which"),
    user("an unknown role", "message 1 has the role 'narrator'; the roles are assistant", role="narrator"),
    user("the role function", "message 1 has the role 'function'; write 'tool'; the roles are", role="function"),
    human("two roles", "message 1 has 'role' and 'from'; keep the one that is meant", role="user"),
    human("two contents", "message 1 has 'content' and 'value'; keep the one that is meant", content="hi"),
    user("content that is a number", "message 1: 'content' must be a string or a list of parts, not a num", content=4),
    user("an image part", "message 1: 'content' part 1 is of type 'image_url'; only", content=[{"type": "image_url"}]),
    user("a part as text", "message 1: 'content' part 1 must be an object, not a string; write", content=["hi"]),
    user("an empty part", "message 1: 'content' part 1 must be a string, not null; write", content=[{"type": "text"}]),
    assistant(
        "reasoning after text",
        "message 2: 'content' part 2 (reasoning) comes too late; the order is reasoning, text",
        content=[{"type": "text", "text": "a"}, {"type": "reasoning", "text": "b"}],
    ),
    user("reasoning of a user", "message 1 (user) has reasoning, which only an assistant has; ", reasoning_content="r"),
    assistant(
        "reasoning twice",
        "message 2 has 'reasoning_content' and 'reasoning'; keep one",
        reasoning="a",
        reasoning_content="b",
    ),
    assistant("a refusal", "message 2 has 'refusal', which would be lost; write it as the content", refusal="no"),
    assistant(
        "a function_call",
        "message 2 has 'function_call', which would be lost; write 'tool_calls'",
        function_call={"name": "f", "arguments": "{}"},
    ),
]
CALLS_AND_WEIGHTS = [
    user(
        "calls of a tool",
        "message 1 (tool) has tool calls, which only an assistant has; ",
        role="tool",
        tool_calls=call(),
    ),
    assistant(
        "calls as an object", "message 2: 'tool_calls' must be a list, not an object; ", tool_calls={"name": "f"}
    ),
    assistant(
        "a call without a name", "message 2: tool call 1 has no 'name'; name the function", tool_calls=call(name="")
    ),
    assistant(
        "arguments in a list",
        "message 2: tool call 1: 'arguments' must be an object or its JSON, not a list; write {}",
        tool_calls=call(arguments=[1]),
    ),
    assistant(
        "a call of another type",
        "message 2: tool call 1 is of type 'custom'; only 'function' can be called",
        tool_calls=[{"type": "custom", "name": "f"}],
    ),
    line(
        "arguments that overflow",
        b'{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1e999}}]}]}',
        "message 1: tool call 1: 'arguments' holds what JSON cannot (",
    ),
    record(
        "a function_call in no JSON",
        {"conversations": [{"from": "function_call", "value": "f(1)"}]},
        "message 1: 'value' must be JSON (broken JSON at column 1: Expecting value); write",
    ),
    assistant(
        "a negative weight", "message 2: 'weight' is -1; a weight is 0 or a number from 1e-06 to 1e+06", weight=-1
    ),
    assistant("a weight in a string", "message 2: 'loss_weight' must be a number, not a string; ", loss_weight="1"),
    assistant("train that is a number", "message 2: 'train' must be true or false, not a number; ", train=1),
    assistant(
        "train and weight", "message 2: 'train' and 'weight' contradict each other; keep one", train=True, weight=0
    ),
    user("a trained user", "message 1 (user) is marked as trained, which only assistant messages are; ", weight=0.5),
]


def array(name: str, content: bytes, number: int, message: str) -> BadInput:
    return BadInput(name, content, number, message, "bad.json")


def compressed(name: str, content: bytes, number: int, message: str) -> BadInput:
    return BadInput(name, content, number, message, "bad.jsonl.gz")


FILES = [
    BadInput("an empty file", b"", 1, "the file holds no records; one JSON object a line is expected, or an array"),
    array("an empty array", b" [\n] ", 1, "the file holds no records; one JSON object a line is expected, or an array"),
    BadInput("UTF-16", GOOD.decode().encode("utf-16"), 1, "the file is UTF-16 or UTF-32; save it as UTF-8"),
    BadInput("UTF-16 without a mark", GOOD.decode().encode("utf-16-le"), 1, "the file is UTF-16; save it as UTF-8"),
    BadInput("a zip archive", b"PK\x03\x04" + b"\0" * 40, 1, "the file is a zip archive; unpack it first (unzip)"),
    BadInput("zstd", b"\x28\xb5\x2f\xfd" + b"\0" * 40, 1, "the file is compressed with zstd; unpack it first (unzstd)"),
    BadInput("an Arrow file", b"ARROW1\0\0" + b"\0" * 40, 1, "the file is an Arrow file; write it as Parquet"),
    BadInput(
        "a pointer of Git LFS",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        1,
        "the file is a pointer of Git LFS, not the data; fetch it (git lfs pull)",
    ),
    BadInput("a web page", b"<!DOCTYPE html>\n<html></html>\n", 1, "the file is a web page, not the data; download"),
    BadInput("a text that is not UTF-8", b"a\nb\xe9c\n", 2, "not UTF-8 (byte 0xe9); save the file as UTF-8", "bad.txt"),
    BadInput("damaged Parquet", b"PAR1" + b"\0" * 40, 1, "the Parquet file is damaged", "bad.parquet", "pyarrow"),
    compressed("gzip within gzip", gzip.compress(gzip.compress(GOOD)), 1, "the file is compressed twice; unpack it"),
    compressed("half a gzip file", gzip.compress(GOOD)[:-4], 2, "the gzip file is damaged from here on (Compressed"),
    compressed("no gzip behind its mark", b"\x1f\x8b\x08", 1, "the gzip file is damaged from here on ("),
    array("no comma", b"[\n" + GOOD + GOOD + b"]", 3, "broken JSON at column 1: Expecting ',' or ']'; mend it"),
    array("an open array", b"[\n" + GOOD, 3, "broken JSON at column 1: Expecting ',' or ']'; mend it"),
    array("two arrays", b"[" + GOOD + b"]\n[]", 3, "broken JSON at column 1: Extra data after the array; mend it"),
    array("an array with invalid UTF-8", b'[{"text": "a"},\n{"text": "\xff"}]', 2, "not UTF-8 (byte 0xff); save"),
    array("NaN in an array", b"[" + GOOD + b',{"text": NaN},' + GOOD + b"]", 2, "NaN is not JSON; write null"),
    array("a deep element", b"[" + GOOD + b"," + b"[" * 101 + b"]" * 101 + b"]", 2, "JSON nested too deeply (more"),
]

BAD_INPUTS = [*BROKEN_JSON, *RECORDS, *MESSAGES, *CALLS_AND_WEIGHTS, *FILES]
