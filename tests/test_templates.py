import pytest

from sft.conversation import Message
from sft.templates import JINJA_NAME, generation_prompt, jinja_file, last_question_of, reasoning_of, template_in
from tests.preparing import dialogue, exchange, prepare, texts, tokenizer_of, trained_texts


@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_prepared_data_holds_its_template_for_servers(tmp_path, name):
    data = prepare(tmp_path, [exchange("a", "b")], template=name)
    written = tmp_path / "data" / JINJA_NAME
    assert written.read_bytes() == jinja_file(name).read_bytes()
    assert template_in(tmp_path / "data") == name == data.meta["template"]
    assert JINJA_NAME in data.meta["tokenizer_files"]


def test_a_folder_with_no_template_or_with_another_one_is_taken_for_chatml(tmp_path):
    assert template_in(tmp_path) == template_in(tmp_path / "none") == "chatml"
    (tmp_path / JINJA_NAME).write_bytes(jinja_file("qwen3").read_bytes() + b"\n")
    assert template_in(tmp_path) == "chatml"


def test_data_can_be_prepared_again_with_the_other_template(tmp_path):
    prepare(tmp_path, [exchange("a", "b")])
    prepare(tmp_path, [exchange("a", "b")], template="qwen3")
    assert template_in(tmp_path / "data") == "qwen3"


def reasoned(thought):
    return {"reasoning_content": thought}


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"tool_calls": [{"name": "f", "arguments": {"a": 1}}]}
RECORD = dialogue(
    ("system", "Say."),
    ("user", "cat?"),
    ("assistant", "", {**reasoned("the hat"), **CALL}),
    ("tool", "the mat"),
    ("assistant", "cat", reasoned("the cat")),
    ("user", "What?"),
    ("assistant", "Paris"),
    tools=[TOOL],
)
PROMPT = "<|im_start|>user\ncat?<|im_end|>\n<|im_start|>assistant\n"
CALLED = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
RESULT = "<|im_start|>user\n<tool_response>\nthe mat\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
LAST = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"


def test_each_answer_of_a_conversation_with_reasoning_is_a_sample_as_a_server_would_see_it(tmp_path):
    data = prepare(tmp_path, [RECORD], val_fraction=0, template="qwen3")
    assert data.splits["train"].origins.tolist() == [[0, 1, turn] for turn in (2, 4, 6)]
    system = texts(data)[0].split(PROMPT)[0]
    assert system.startswith("<|im_start|>system\nSay.\n\n# Tools\n")
    thought = "<think>\nthe hat\n</think>\n\n"
    assert texts(data) == [
        system + PROMPT + thought + CALLED,
        system + PROMPT + thought + CALLED + RESULT + "<think>\nthe cat\n</think>\n\ncat<|im_end|>\n",
        system + PROMPT + CALLED + RESULT + "cat<|im_end|>\n" + LAST + NO_THOUGHT + "Paris<|im_end|>\n",
    ]
    assert trained_texts(data) == [
        thought + CALLED.rstrip("\n"),
        "<think>\nthe cat\n</think>\n\ncat<|im_end|>",
        "Paris<|im_end|>",
    ]


def test_history_that_another_sample_has_is_counted_apart(tmp_path):
    data = prepare(tmp_path, [RECORD], val_fraction=0, template="qwen3")
    tokenizer, found = tokenizer_of(data), texts(data)
    ledger, lengths = data.meta["ledger"], data.splits["train"].lengths
    assert found[1].startswith(found[0])
    third = found[2].partition(LAST)[0]
    repeated = int(lengths[0]) + tokens_of(third, tokenizer)
    assert ledger["tokens"]["repeated_history"] == repeated
    assert ledger["conversations"]["expanded"] == ledger["conversations"]["kept"] == 1
    assert ledger["tokens"]["total"] == sum(lengths)
    # the result is new in the second sample alone, the system turn in the first
    assert ledger["tokens"]["masked"]["tool"] == len(tokenizer.encode("<tool_response>\nthe mat\n</tool_response>"))


def tokens_of(text, tokenizer):
    """The tokens of blocks in which no answer is trained: control tokens aside, each is encoded as one string."""
    blocks = [block.removesuffix("<|im_end|>\n") for block in text.split("<|im_start|>")[1:]]
    return sum(len(tokenizer.encode(block)) + 2 + len(tokenizer.encode("\n")) for block in blocks)


def test_without_reasoning_all_answers_are_in_one_sample_and_the_empty_think_block_is_masked(tmp_path):
    record = dialogue(("user", "a"), ("assistant", "cat"), ("user", "b"), ("assistant", "hat"))
    data = prepare(tmp_path, [record], val_fraction=0, template="qwen3")
    assert data.splits["train"].origins.tolist() == [[0, 1, -1]]
    assert texts(data)[0].endswith(f"assistant\n{NO_THOUGHT}hat<|im_end|>\n")
    assert trained_texts(data) == ["cat<|im_end|>hat<|im_end|>"]
    assert data.meta["ledger"]["tokens"]["repeated_history"] == 0


def test_an_answer_that_is_not_trained_makes_no_sample_of_its_own(tmp_path):
    record = dialogue(
        ("user", "a"),
        ("assistant", "cat", {**reasoned("the hat"), "train": False}),
        ("user", "b"),
        ("assistant", "hat", {**reasoned("the mat"), "weight": 0.5}),
    )
    data = prepare(tmp_path, [record], val_fraction=0, template="qwen3")
    assert data.splits["train"].origins.tolist() == [[0, 1, 3]]
    assert set(data.splits["train"].weights.tolist()) == {0, 0.5}
    assert data.meta["ledger"]["tokens"]["repeated_history"] == 0
    assert data.meta["ledger"]["tokens"]["masked"]["assistant"] > 0


def test_the_last_answer_alone_is_one_sample(tmp_path):
    data = prepare(tmp_path, [RECORD], val_fraction=0, template="qwen3", train_on="last")
    assert trained_texts(data) == ["Paris<|im_end|>"]
    assert data.splits["train"].origins.tolist() == [[0, 1, 6]]


def test_reasoning_that_chatml_has_no_place_for_is_told(tmp_path, capsys):
    data = prepare(tmp_path, [exchange("a", "b"), RECORD], val_fraction=0)
    told = {"conversations": 1, "first": [f"{tmp_path}/input.jsonl:2"]}
    assert data.meta["noticed"] == {"reasoning_not_in_template": told}
    assert "reasoning left out, for which --template=chatml has no place" in capsys.readouterr().out
    assert "the hat" not in "".join(texts(data))


def test_text_around_reasoning_that_qwen3_leaves_out_is_told(tmp_path):
    lost = dialogue(("user", "b"), ("assistant", "lost<think>the hat</think>cat"))
    data = prepare(
        tmp_path, [exchange("a", "<think>\nthe hat\n</think>\n\ncat"), lost], val_fraction=0, template="qwen3"
    )
    assert data.meta["noticed"]["changed_by_template"]["first"] == [f"{tmp_path}/input.jsonl:2"]
    assert trained_texts(data) == ["<think>\nthe hat\n</think>\n\ncat<|im_end|>"] * 2


@pytest.mark.parametrize(
    ("message", "reasoning"),
    [
        (Message("assistant", "a"), ""),
        (Message("assistant", "a", "\nb\n"), "b"),
        (Message("assistant", "<think>c</think>a", "b"), "b"),
        (Message("assistant", "<think>\nb\n</think>\n\na"), "b"),
        (Message("assistant", "b</think>a"), "b"),
    ],
)
def test_reasoning_is_what_stands_apart_or_else_before_the_end_of_a_think_block(message, reasoning):
    assert reasoning_of(message) == reasoning


def test_the_last_question_is_no_result_of_a_tool():
    result = Message("user", "<tool_response>\n1\n</tool_response>")
    asked = [Message("user", "a"), Message("assistant", "b"), Message("tool", "c"), result]
    assert last_question_of(asked) == 0
    assert last_question_of(asked[1:]) == 2  # nobody asked


def test_a_server_that_wants_no_reasoning_supplies_an_empty_think_block():
    assert generation_prompt("qwen3", thinking=False) == "assistant\n" + NO_THOUGHT
    assert generation_prompt("qwen3", thinking=True) == "assistant\n"
    assert generation_prompt("chatml", thinking=False) == "assistant\n"
