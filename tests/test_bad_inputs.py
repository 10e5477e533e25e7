import json
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sft.conversation import BadRecord, Conversation
from sft.records import ReadOptions, oddities, read_record
from sft.sources import RawRecord, Source, raw_records
from tests.bad_inputs import BAD_INPUTS


def outcome_of(raw, options):
    try:
        return read_record(raw, options, 0)
    except BadRecord as error:
        return error


def outcomes(path):
    """(record, line, Conversation or BadRecord) of each record of a file."""
    options = ReadOptions()
    return [(raw.record, raw.line, outcome_of(raw, options)) for raw in raw_records(Source(str(path), path))]


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_a_bad_input_has_one_problem_at_its_line_with_cause_and_remedy(tmp_path, bad):
    if bad.needs:
        pytest.importorskip(bad.needs)
    path = tmp_path / bad.file
    path.write_bytes(bad.content)
    refused = [(line, str(outcome)) for _, line, outcome in outcomes(path) if isinstance(outcome, BadRecord)]
    assert [line for line, _ in refused] == [bad.line]
    message = refused[0][1]
    assert message.startswith(bad.message)
    cause, _, remedy = message.partition("; ")
    assert cause
    assert remedy
    assert len(message) < 400
    assert message.isprintable()


def test_each_bad_input_has_a_name_and_a_cause_of_its_own():
    assert len(BAD_INPUTS) >= 44
    assert len({bad.name for bad in BAD_INPUTS}) == len({bad.content for bad in BAD_INPUTS}) == len(BAD_INPUTS)


def test_what_is_good_around_a_bad_record_is_read(tmp_path):
    for bad in BAD_INPUTS:
        if bad.line == 3 and bad.file == "bad.jsonl":
            path = tmp_path / bad.file
            path.write_bytes(bad.content)
            kinds = [(record, line, type(outcome)) for record, line, outcome in outcomes(path)]
            assert kinds == [(1, 1, Conversation), (2, 3, BadRecord), (3, 4, Conversation)], bad.name


KEYS = st.sampled_from(
    [
        *("messages", "conversations", "role", "content", "from", "value", "type", "text", "name", "arguments"),
        *("function", "tool_calls", "tools", "prompt", "completion", "input", "context", "system", "history"),
        *("weight", "loss_weight", "train", "reasoning_content", "images"),
    ]
)
TEXT = st.text(st.characters(), max_size=5)  # surrogates among them
WORDS = st.sampled_from(["user", "assistant", "tool", "system", "human", "function_call", "text", "tool_call", "[]"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXT, inner, max_size=4),
    max_leaves=20,
)
MESSAGE = st.fixed_dictionaries(
    {"role": WORDS, "content": TEXT | JSON},
    optional={
        "tool_calls": st.lists(st.fixed_dictionaries({"name": TEXT, "arguments": JSON}), max_size=2),
        "weight": JSON,
        "train": JSON,
        "reasoning_content": JSON,
    },
)
RECORD = JSON | st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=3)}, optional={"tools": JSON})
OPTIONS = st.sampled_from(
    [
        ReadOptions(),
        ReadOptions(group_by="name"),
        ReadOptions(fields={"prompt": "text", "messages": "value"}),
        *(ReadOptions(name) for name in ("messages", "sharegpt", "alpaca", "prompt_completion", "dolly", "text")),
    ]
)


@given(value=RECORD, options=OPTIONS)
def test_any_value_is_a_conversation_or_a_bad_record(value, options):
    outcome = outcome_of(RawRecord(1, 1, value, 0), options)
    again = pickle.loads(pickle.dumps(outcome))
    if isinstance(outcome, BadRecord):
        assert "; " in str(outcome) == str(again)
    else:
        assert again == outcome
        assert (outcome.text is None) == bool(outcome.messages)
        oddities(outcome)
        assert_encodable(outcome)


def assert_encodable(conversation):
    """Every text in it can be given to a tokenizer."""
    texts = [conversation.text or "", conversation.group or "", *conversation.tools]
    for message in conversation.messages:
        texts += [message.content, message.reasoning or "", *(part for call in message.tool_calls for part in call)]
        assert message.role in ("system", "user", "assistant", "tool")
        assert message.weight == 0 or 1e-6 <= message.weight <= 1e6
    for text in texts:
        text.encode("utf-8")


@given(
    content=st.binary(max_size=60),
    start=st.sampled_from([b"", b"[", b'{"text": "', b'[{"text": "a"}', b"\x1f\x8b\x08\0", b"\xef\xbb\xbf", b"PAR1"]),
    name=st.sampled_from(["any.jsonl", "any.txt"]),
)
@example(content=b"", start=b"PAR1", name="any.jsonl")
def test_any_bytes_are_conversations_or_bad_records(tmp_path_factory, content, start, name):
    if start == b"PAR1":
        pytest.importorskip("pyarrow")
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(start + content)
    found = outcomes(path)
    assert found
    assert [record for record, _, _ in found] == list(range(1, len(found) + 1))


@given(records=st.lists(JSON, min_size=1, max_size=3))
def test_an_array_and_lines_have_the_same_outcomes(tmp_path_factory, records):
    records.insert(0, {"text": "a"})  # what begins with [ is an array
    folder = tmp_path_factory.mktemp("json")
    (folder / "a.json").write_text(json.dumps(records))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    both = [
        [str(outcome) if isinstance(outcome, BadRecord) else outcome.messages for _, _, outcome in outcomes(path)]
        for path in (folder / "a.json", folder / "a.jsonl")
    ]
    assert both[0] == both[1]
