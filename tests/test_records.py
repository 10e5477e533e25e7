import json
from pathlib import Path

import pytest

from sft.conversation import BadRecord, Conversation, Message, ToolCall
from sft.errors import UserError
from sft.records import ReadOptions, oddities, parse_fields, read_record
from sft.sources import RawRecord, find_sources, raw_records

ASK, ANSWER = Message("user", "2+2?"), Message("assistant", "4")
EXCHANGE = (ASK, ANSWER)
SYSTEM = Message("system", "Be brief.")
TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
SHAREGPT = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]


def read(record, format="auto", group_by=None, **fields):
    raw = RawRecord(3, 7, json.dumps(record).encode(), 0)
    return read_record(raw, ReadOptions(format, fields, group_by), 2)


def refusal(record, *arguments, **options):
    with pytest.raises(BadRecord) as caught:
        read(record, *arguments, **options)
    return str(caught.value)


def asked(**keys):
    return {"messages": [TURNS[0], {**TURNS[1], **keys}]}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS, "tools": [], "images": None, "system": ""},
        {"messages": [TURNS[0], {**TURNS[1], "name": "bot", "tool_calls": [], "weight": None, "unknown": {}}]},
        {"messages": [{**TURNS[0], "weight": 0, "train": False, "reasoning_content": ""}, {**TURNS[1], "train": True}]},
        {"messages": [TURNS[0], {**TURNS[1], "weight": 1, "loss_weight": 1.0, "train": True, "reasoning": None}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "value": "2?"}]}]}
        | {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?", "image_url": None}]}, TURNS[1]]},
        {"messages": TURNS, "prompt": "2+2?", "text": "rendered"},
        {"messages": SHAREGPT},
        {"conversations": SHAREGPT, "id": "identity_0", "tools": "[]"},
        {"conversation": [{"from": "user", "value": "2+2?"}, {"from": "chatgpt", "value": "4", "weight": 1}]},
        {"conversations": [{"role": "human", "content": "2+2?"}, {"role": "model", "content": "4"}]},
        {"prompt": "2+2?", "completion": "4"},
        {"question": "2+2?", "answer": "4", "source": 7},
        {"query": "2+2?", "response": "4", "text": None},
        {"instruction": "2+2?", "input": "", "output": "4", "history": [], "system": ""},
        {"instruction": "2+2?", "input": None, "output": "4", "text": "### Instruction: 2+2? ### Response: 4"},
        {"instruction": "2+2?", "context": "", "response": "4", "category": "sums"},
        {"context": "2+2?", "answer": "4", "chain_of_thought": "..."},
        {"prompt": [TURNS[0]], "completion": [TURNS[1]]},
    ],
)
def test_each_format_of_one_exchange_gives_the_same_conversation(record):
    found = read(record)
    messages = (turn if turn.role == "assistant" else turn._replace(weight=1.0) for turn in found.messages)
    assert found._replace(messages=tuple(messages)) == Conversation(EXCHANGE, source=2, record=3, line=7)


def test_a_turn_of_a_user_may_be_kept_from_being_trained_with_all_tokens():
    for mark in ({"train": False}, {"weight": 0}, {"loss_weight": 0.0}):
        asked, answered = read({"messages": [{"role": "user", "content": "a", **mark}, TURNS[1]]}).messages
        assert (asked.weight, answered.weight) == (0.0, 1.0)


def test_openai_messages_are_read_with_tools_reasoning_and_weights():
    weather = {"name": "weather", "description": "Wetter für", "parameters": {"type": "object"}}
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 1.0}}}
    record = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "reasoning_content": "", "tool_calls": [call], "weight": 0.5},
            {"role": "tool", "content": "[]", "tool_call_id": "1", "name": "weather"},
            {
                "role": "assistant",
                "tool_calls": [{"name": "weather", "arguments": '{"city":  "Bonn"}'}],
                "train": False,
            },
            {"role": "assistant", "content": "<think>\nx\n</think>\n\nSun", "reasoning": "Hm.", "loss_weight": 2},
        ],
        "tools": [weather, {"type": "function", "function": weather}],
    }
    wrapped = json.dumps({"type": "function", "function": weather}, ensure_ascii=False)
    assert read(record).tools == (wrapped, wrapped)
    assert read({**record, "tools": json.dumps(record["tools"])}).tools == (wrapped, wrapped)
    assert read(record).messages == (
        SYSTEM,
        Message("user", "Weather?"),
        Message("assistant", "", "", (ToolCall("weather", '{"city": "Köln", "days": 1.0}'),), 0.5),
        Message("tool", "[]"),
        Message("assistant", "", None, (ToolCall("weather", '{"city":  "Bonn"}'),), 0.0),
        Message("assistant", "<think>\nx\n</think>\n\nSun", "Hm.", (), 2.0),
    )


def test_the_parts_of_a_content_are_joined_by_their_kind():
    parts = [
        {"type": "reasoning", "value": "a"},
        {"type": "reasoning", "reasoning": "b"},
        {"type": "text", "text": "c "},
        {"type": "text", "value": " d"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"type": "tool_call", "value": {"name": "g", "arguments": "{}"}},
    ]
    _, said = read(asked(content=parts)).messages
    assert said == Message("assistant", "c  d", "ab", (ToolCall("f", '{"x": 1}'), ToolCall("g", "{}")))
    assert read(asked(content=[])).messages[1] == Message("assistant", "")


def test_sharegpt_is_read_with_its_roles_calls_tools_and_system_text():
    calls = [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": "é"}}]
    record = {
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": json.dumps(calls[0])},
            {"from": "observation", "value": "4"},
            {"from": "function_call", "value": json.dumps(calls), "weight": 0},
            {"from": "function_response", "value": "5"},
            {"from": "tool", "value": "6"},
            {"from": "bing", "value": "4"},
        ],
        "system": "Be brief.",
        "tools": [{"name": "f"}],
    }
    f, g = ToolCall("f", "{}"), ToolCall("g", '{"x": "é"}')
    assert read(record).messages == (
        SYSTEM,
        ASK,
        Message("assistant", "", tool_calls=(f,)),
        Message("tool", "4"),
        Message("assistant", "", tool_calls=(f, g), weight=0.0),
        Message("tool", "5"),
        Message("tool", "6"),
        ANSWER,
    )
    assert read(record).tools == ('{"type": "function", "function": {"name": "f"}}',)


def test_an_exchange_has_system_history_and_prompt_in_order_and_its_input_after_a_blank_line():
    record = {
        "instruction": "Add.",
        "input": "2 and 2",
        "output": "4",
        "system": "Be brief.",
        "history": [["2+2?", "4"]],
    }
    messages = (SYSTEM, ASK, ANSWER, Message("user", "Add.\n\n2 and 2"), ANSWER)
    assert read(record).messages == messages
    record["context"] = record.pop("input")
    assert read(record).messages == messages
    assert read({**record, "tools": [{"name": "f"}]}).tools == ('{"type": "function", "function": {"name": "f"}}',)


def test_what_an_assistant_says_in_a_prompt_of_messages_is_not_trained():
    record = {"prompt": [*TURNS, TURNS[0]], "completion": [TURNS[1]], "system": "Be brief."}
    assert read(record).messages == (SYSTEM, ASK, ANSWER._replace(weight=0.0), ASK, ANSWER)
    message = "a record whose prompt is a list of messages has 'input', which would be lost; write it as messages"
    assert refusal({**record, "input": "more"}) == message


def test_a_record_that_has_only_text_is_plain_text():
    assert read({"text": "Once \ud83d\ude00", "id": 3, "tools": None}) == Conversation((), "Once 😀", (), 2, 3, 7)


AMBIGUOUS = {
    "messages": TURNS,
    "conversations": [{"from": "human", "value": "shared"}],
    "instruction": "instructed",
    "output": "put",
    "prompt": "prompted",
    "response": "responded",
    "context": "given",
    "input": "in",
    "text": "plain",
}


@pytest.mark.parametrize(
    ("options", "contents"),
    [
        ({"format": "messages"}, ["2+2?", "4"]),
        ({"format": "sharegpt"}, ["shared"]),
        ({"format": "alpaca"}, ["instructed\n\nin", "put"]),
        ({"format": "dolly"}, ["instructed\n\ngiven", "responded"]),
        ({"format": "text"}, "plain"),
        ({"messages": "messages"}, ["2+2?", "4"]),
        ({"messages": "conversations"}, ["shared"]),
        ({"conversations": "messages"}, ["2+2?", "4"]),
        ({"text": "input"}, "in"),
        (
            {"prompt": "response", "completion": "prompt", "input": "output", "context": "none"},
            ["responded\n\nput", "prompted"],
        ),
        ({"prompt": "response", "input": "none", "context": "none"}, ["responded", "put"]),
        ({"format": "alpaca", "prompt": "text", "input": "none"}, ["plain", "put"]),
        ({"format": "text", "text": "context"}, "given"),
    ],
)
def test_what_could_be_several_formats_is_read_as_the_options_say(options, contents):
    conversation = read(AMBIGUOUS, **options)
    found = [message.content for message in conversation.messages] if conversation.text is None else conversation.text
    assert found == contents


def test_what_could_be_several_formats_is_refused_without_options():
    assert refusal(AMBIGUOUS) == (
        "'messages' and 'conversations' are both there; say which is meant, with --format or --fields"
    )
    exchange = {key: value for key, value in AMBIGUOUS.items() if key not in ("messages", "conversations")}
    assert refusal(exchange).startswith("'prompt' and 'instruction' are both there; keep the one")
    assert refusal({"text": "a"}, "messages").startswith("the record has no key for 'messages' (keys: 'text'); use")
    assert refusal({"prompt": "a", "answer": "b"}, prompt="question").startswith("the record has no key for a prompt")


def test_fields_are_parsed_and_all_that_is_wrong_with_them_is_told():
    assert parse_fields(None) == parse_fields(" ") == {}
    assert parse_fields("prompt:their question, completion : a:b ,") == {
        "prompt": "their question",
        "completion": "a:b",
    }
    with pytest.raises(UserError) as caught:
        parse_fields("promt:q,completion,text:a,text:b,system:a")
    assert str(caught.value) == (
        "fields has no name 'promt' (the names are messages, conversations, prompt, completion, input, context, "
        "system, history, tools, text); fields says no column for 'completion' (write completion:column); "
        "fields names a thing twice with 'text:b' (keep one); fields names a thing twice with 'system:a' (keep one)"
    )


def test_the_group_is_the_value_at_a_path():
    record = {**asked(), "meta": {"book": {"id": 7}}, "a.b": "é", "none": None}
    assert read(record).group is None
    assert read(record, group_by="meta.book.id").group == "7"
    assert read(record, group_by="a.b").group == '"\\u00e9"'
    remedy = "give it a string or a number, or group by another key"
    for path, what in (
        ("meta.book", "an object"),
        ("meta.author", "nothing"),
        ("none", "nothing"),
        ("messages.0", "nothing"),
    ):
        assert refusal(record, group_by=path) == f"'{path}' (group_by) holds {what}; {remedy}"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weight": float("1e-7")}, "is 1e-07; a weight is 0 or a number from 1e-06 to 1e+06"),
        ({"weight": 10**400}, "; a weight is 0 or a number from"),
        ({"weight": True}, "must be a number, not true/false; 'train' takes true and false"),
        ({"weight": 1, "loss_weight": 2}, "'weight' and 'loss_weight' contradict each other"),
        ({"train": False, "weight": 2}, "'train' and 'weight' contradict each other"),
        ({"reasoning": 1}, "'reasoning' must be a string, not a number"),
        (
            {"reasoning": "a", "content": [{"type": "reasoning", "value": "a"}]},
            "reasoning beside its content and in it",
        ),
        (
            {
                "tool_calls": [{"name": "f", "arguments": ""}],
                "content": [{"type": "tool_call", "value": {"name": "f"}}],
            },
            "'arguments' must be an object or its JSON, not null; write {} for none",
        ),
        ({"content": [{"type": "text", "text": "a", "value": "b"}]}, "more than one of 'text', 'text' and 'value'"),
        ({"content": [{"type": "tool_call", "value": "[]"}], "tool_calls": [3]}, "tool call 1 must be an object"),
        ({"content": [{"type": "text", "text": " " * 400_000}] * 3}, "more than 400,000 blanks in a row"),
        ({"content": "a" + " " * 400_001}, "message 2: 'content' holds more than 400,000 blanks in a row"),
        ({"content": "\ud800"}, "message 2: 'content' holds half a character"),
        (
            {
                "tool_calls": [{"name": "f", "arguments": {}}],
                "content": [{"type": "tool_call", "value": {"name": "f", "arguments": {}}}],
            },
            "has tool calls beside its content and in it; keep one",
        ),
        ({"content": None}, "has no 'content' (null counts as none)"),
        ({"content": None, "tool_calls": []}, "has no 'content' (null counts as none)"),
        ({"tool_calls": [{"name": "f", "arguments": {"a": "\ud800"}}]}, "'arguments' holds half a character"),
        ({"tool_calls": [{"name": "\ud800", "arguments": {}}]}, "'name' holds half a character"),
    ],
)
def test_what_a_message_cannot_say_is_refused(keys, message):
    assert message in refusal(asked(**keys))


def test_nesting_is_refused_at_one_depth_whoever_calls():
    def nested(levels):
        value = "x"
        for _ in range(levels - 1):
            value = [value]
        return {"text": "a", "other": value, "wide": [[]] * 200}

    def deeper(calls, record):
        return read(record) if calls == 0 else deeper(calls - 1, record)

    assert deeper(300, nested(100)).text == "a"
    for levels in (101, 800):
        assert refusal(nested(levels)) == "JSON nested too deeply (more than 100 levels); flatten it"
    tools = "[" * 101 + "]" * 101
    assert refusal({**asked(), "tools": tools}).startswith("'tools': JSON nested too deeply")


def test_oddities_are_named():
    def found(*turns):
        return oddities(Conversation(tuple(Message(*turn) for turn in turns)))

    user, assistant, system = ("user", "a"), ("assistant", "b"), ("system", "c")
    call = ("assistant", "", None, (ToolCall("f", "{}"),))
    assert found(system, user, assistant) == found(user, call, ("tool", "d"), assistant) == ()
    assert found(user, system, assistant) == ()
    assert found(user, ("assistant", "")) == ("empty_turn",)
    assert found(user, user, assistant) == found(user, system, user, assistant) == ("user_turns_in_a_row",)
    assert found(system, assistant, user, assistant) == ("assistant_first",)
    assert found(user, assistant, user) == ("user_last",)
    for turn in (("assistant", "\0"), ("assistant", "a", "\0"), ("assistant", "", None, (ToolCall("f", "\0"),))):
        assert found(user, turn) == ("nul",)
    assert oddities(Conversation((), "a\0")) == ("nul",)
    assert oddities(Conversation((), "a")) == ()
    assert set(found(("assistant", ""), ("user", "\0"), user)) == {
        *("empty_turn", "assistant_first", "user_turns_in_a_row", "user_last", "nul")
    }


COUNTS = {
    "fastchat/dummy_conversation.json": (500, 2000),
    "gsm8k/test.jsonl": (1319, 2638),
    "gsm8k/train.jsonl": (7473, 14946),
    "llamafactory/alpaca_en_demo.json": (999, 1998),
    "llamafactory/alpaca_zh_demo.json": (1000, 2000),
    "llamafactory/glaive_toolcall_en_demo.json": (300, 1914),
    "llamafactory/reason_tool_use_demo_50.jsonl": (50, 274),
    "llamafactory/v1_sft_demo.jsonl": (500, 1000),
    "llmfoundry/dolly_hhrlhf_train_small.jsonl": (1000, 2000),
    "llmfoundry/math.jsonl": (5000, 10000),
    "rasbt/instruction-data.json": (1100, 2200),
    "tinyshakespeare/input.txt": (1, 0),
}


@pytest.mark.oracle
def test_every_record_of_other_peoples_data_is_read(shared: Path):
    sources, problems = find_sources(str(shared / "data"))
    assert problems == []
    options = ReadOptions()
    calls = thoughts = tools = 0
    found = {}
    for index, source in enumerate(sources):
        read = [read_record(raw, options, index) for raw in raw_records(source)]
        messages = [message for conversation in read for message in conversation.messages]
        found[str(source.path.relative_to(shared / "data"))] = (len(read), len(messages))
        assert not {name for conversation in read for name in oddities(conversation)}
        calls += sum(len(message.tool_calls) for message in messages)
        thoughts += sum(message.reasoning is not None for message in messages)
        tools += sum(len(conversation.tools) for conversation in read)
        if source.path.suffix == ".txt":
            assert read[0].text == source.path.read_text(encoding="utf-8")
    assert found == COUNTS
    assert (calls, thoughts) == (279, 112)
    assert tools > 300
