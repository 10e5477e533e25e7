import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.conversation import LONGEST_BLANK, Message
from sft.errors import UserError
from sft.records import Problems, read_conversations

EXCHANGE = (Message("user", "2+2?"), Message("assistant", "4"))


def read(path):
    return list(read_conversations(path))


def write(tmp_path, *records, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "name": "bot"}]},
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "tools": []},
        {"prompt": "2+2?", "completion": "4"},
        {"question": "2+2?", "answer": "4", "source": 7},
        {"query": "2+2?", "response": "4", "text": None},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"instruction": "2+2?", "input": None, "output": "4", "text": "### Instruction: 2+2? ### Response: 4"},
    ],
)
def test_each_format_of_one_exchange_gives_the_same_messages(tmp_path, record):
    (conversation,) = read(write(tmp_path, record))
    assert conversation.messages == EXCHANGE
    assert conversation.text is None


def test_alpaca_puts_the_system_turn_first_and_the_input_after_a_blank_line(tmp_path):
    record = {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Be brief."}
    (conversation,) = read(write(tmp_path, record))
    assert conversation.messages == (
        Message("system", "Be brief."),
        Message("user", "Add.\n\n2 and 2"),
        Message("assistant", "4"),
    )


def test_a_record_that_has_only_text_is_plain_text(tmp_path):
    (conversation,) = read(write(tmp_path, {"text": "Once upon a time", "id": 3}))
    assert (conversation.messages, conversation.text) == ((), "Once upon a time")


def test_an_array_and_lines_give_the_same_conversations_with_their_lines(tmp_path):
    records = [{"prompt": f"p{i} ü", "completion": "\u2028c"} for i in range(3)]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    array = tmp_path / "a.json"
    array.write_text(json.dumps(records, indent=2), encoding="utf-8")
    from_lines, from_array = read(lines), read(array)
    assert [c.messages for c in from_lines] == [c.messages for c in from_array]
    assert [(c.record, c.line) for c in from_lines] == [(1, 1), (2, 2), (3, 3)]
    assert [(c.record, c.line) for c in from_array] == [(1, 2), (2, 6), (3, 10)]


def test_blank_lines_count_as_lines_but_not_as_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\r\n{"text": "a"}\r\n\r\n{"text": "b"}')
    assert [(c.record, c.line, c.text) for c in read(path)] == [(1, 2, "a"), (2, 4, "b")]


def test_the_bytes_told_to_advance_add_up_to_the_file(tmp_path):
    for path in (
        write(tmp_path, {"text": "é"}, {"text": "b"}),
        write(tmp_path, [{"text": "é"}, {"text": "b"}], name="a.json"),
    ):
        told = []
        list(read_conversations(path, advance=told.append))
        assert sum(told) == path.stat().st_size


def exchange(**keys):
    return json.dumps({"prompt": "p", "completion": "c", **keys}).encode()


def message(**keys):
    return json.dumps({"messages": [{"role": "user", "content": "hi", **keys}]}).encode()


BAD_LINES = {
    "broken JSON at column 10: Unterminated string": b'{"text": "a',
    "broken JSON at column 15: Extra data": b'{"text": "a"} {"text": "b"}',
    "Invalid control character": b'{"text": "a\x01"}',
    "NaN is not JSON": b'{"text": "a", "score": NaN}',
    "-Infinity is not JSON": b'{"text": "a", "score": [-Infinity]}',
    "the key 'text' occurs twice": b'{"text": "a", "text": "b"}',
    "not UTF-8 (byte 0xff)": b'{"text": "\xff"}',
    "half a character (\\ud83d at 1)": b'{"text": "a\\ud83d"}',
    "JSON nested too deeply": b"[" * 100_000,
    "unreadable JSON": b'{"text": "a", "n": ' + b"1" * 5000 + b"}",
    "a record must be an object, not a string": b'"text"',
    "a record must be an object, not null": b"null",
    "'text' must be a string, not a number": b'{"text": 3}',
    "'text' must be a string, not true/false": b'{"text": true}',
    "no key for anything known (keys: 'content')": b'{"content": "a"}',
    "no key for anything known (keys: none)": b'{"text": null}',
    "no key for a completion": b'{"prompt": "a"}',
    "no key for a prompt": b'{"text": "a", "answer": "b"}',
    "'prompt' must be a string, not a list": exchange(prompt=[{"role": "user", "content": "a"}]),
    "'completion' must be a string, not an object": exchange(completion={}),
    "'prompt' and 'question' are both there": exchange(question="q"),
    "'completion' and 'answer' are both there": exchange(answer="q"),
    "has 'context', which is not read yet": exchange(context="c"),
    "has 'history', which is not read yet": exchange(history=[["a", "b"]]),
    "'conversations' (ShareGPT) is not read yet": b'{"conversations": [{"from": "human", "value": "a"}]}',
    "has 'tools', which is not read yet": exchange(tools=[{"name": "f"}]),
    "'messages' must be a list": b'{"messages": "hi"}',
    "'messages' is empty": b'{"messages": []}',
    "message 1 must be an object": b'{"messages": ["hi"]}',
    "message 1 has no 'role'": b'{"messages": [{"content": "hi"}]}',
    "message 1 has no 'content'": b'{"messages": [{"role": "user"}]}',
    "message 1 has the role 'tool'": message(role="tool"),
    "message 1 has the role ['user']": message(role=["user"]),
    "message 1: 'content' must be a string, not a list": message(content=[{"type": "text", "text": "hi"}]),
    "message 1: 'content' must be a string, not null": message(content=None),
    "message 1 has 'tool_calls'": message(tool_calls=[{"id": 1}]),
    "message 1 has 'reasoning_content'": message(reasoning_content="hm"),
    "message 1 has 'weight'": message(weight=0),
    "message 1 has 'train'": message(train=False),
    "blanks in a row": json.dumps({"text": "a" + " " * (LONGEST_BLANK + 1)}).encode(),
}


@pytest.mark.parametrize("cause", BAD_LINES)
def test_a_bad_line_is_refused_with_file_line_cause_and_remedy(tmp_path, cause):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + BAD_LINES[cause] + b'\n{"text": "good"}\n')
    with pytest.raises(UserError) as caught:
        read(path)
    headline, *problems = str(caught.value).splitlines()
    assert headline == "the input cannot be used:"
    assert len(problems) == 1
    assert problems[0].startswith(f"  {path}:3: ")
    assert cause in problems[0]
    assert ";" in problems[0]
    assert len(problems[0]) < 400


@pytest.mark.parametrize(
    ("content", "line", "cause"),
    [
        (b"", 1, "the file holds no records"),
        (b" \n\n", 1, "the file holds no records"),
        (b" [\n] ", 1, "the file holds no records"),
        (b"\xef\xbb\xbf{}", 1, "byte order mark"),
        ('{"text": "a"}'.encode("utf-16"), 1, "is UTF-16"),
        (b"\x1f\x8b\x08", 1, "is compressed"),
        (b"PAR1", 1, "is Parquet"),
        (b'{\n  "text": "a"\n}', 1, "broken JSON"),
        (b"plain text\n", 1, "broken JSON"),
        (b'[\n{"text": "a"},\n{"text": 1}\n]', 3, "'text' must be a string"),
        (b'[{"text": "a"},\n{"text": NaN},\n{"text": "b"}]', 2, "NaN is not JSON"),
        (b'[\n{"text": "a"}\n{"text": "b"}]', 3, "Expecting ',' or ']'"),
        (b'[{"text": "a"},\n]', 2, "Expecting value"),
        (b'[{"text": "a"}', 1, "Expecting ',' or ']'"),
        (b'[{"text": "a"}]\n[]', 2, "Extra data after the array"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', 2, "not UTF-8"),
        (b'[\n{"a":' + b"[" * 100_000, 2, "nested too deeply"),
        (b'[{"a": NaN, "b":' + b"[" * 100_000, 1, "nested too deeply"),
    ],
)
def test_a_bad_file_is_refused_with_the_line(tmp_path, content, line, cause):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    problems = str(caught.value).splitlines()[1:]
    assert any(problem.startswith(f"  {path}:{line}: ") and cause in problem for problem in problems)


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "none.jsonl")


def test_problems_are_collected_and_ten_are_plenty(tmp_path):
    three = write(tmp_path, {"text": 1}, {"text": "a"}, {"text": 2}, {}, name="three.jsonl")
    with pytest.raises(UserError) as caught:
        read(three)
    assert [line.split(":")[1] for line in str(caught.value).splitlines()[1:]] == ["1", "3", "4"]
    many = write(tmp_path, *[{"text": i} for i in range(50)], name="many.jsonl")
    with pytest.raises(UserError) as caught:
        read(many)
    assert len(str(caught.value).splitlines()) == 11


def test_good_records_around_a_bad_one_are_still_read(tmp_path):
    problems = Problems()
    path = write(tmp_path, {"text": "a"}, {"text": 1}, {"text": "b"})
    assert [(c.record, c.text) for c in read_conversations(path, problems=problems)] == [(1, "a"), (3, "b")]
    assert len(problems.found) == 1


KEYS = st.sampled_from(["messages", "role", "content", "text", "prompt", "completion", "input", "system", "tools"])
TEXT = st.text(st.characters(), max_size=5)  # surrogates among them
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(["user", "assistant"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(records=st.lists(JSON, max_size=3), as_array=st.booleans())
def test_any_json_is_read_or_refused_with_a_clear_error(tmp_path_factory, records, as_array):
    path = tmp_path_factory.mktemp("json") / "any.json"
    path.write_text(json.dumps(records) if as_array else "\n".join(map(json.dumps, records)))
    assert_read_or_refused(path, len(records))


@given(content=st.binary(max_size=40), start=st.sampled_from([b"", b"[", b'{"text": "', b'[{"text": "a"}']))
def test_any_bytes_are_read_or_refused_with_a_clear_error(tmp_path_factory, content, start):
    path = tmp_path_factory.mktemp("bytes") / "any.jsonl"
    path.write_bytes(start + content)
    assert_read_or_refused(path)


def assert_read_or_refused(path, count=None):
    refusal = None
    try:
        conversations = read(path)
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert f"\n  {path}:" in refusal
    elif count is not None:
        assert len(conversations) == count
