import importlib.util
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.chatml import NOT_TRAINED, cut, prompt_ids, render, render_batch
from sft.conversation import Conversation, Message
from sft.tokenizer import load_tokenizer
from tests.tiny_tokenizer import CONTROL, OTHER, save_tiny_tokenizer

IM_START = 151_644


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    # Without NFC, so that what is decoded is exactly what was written.
    return load_tokenizer(save_tiny_tokenizer(tmp_path_factory.mktemp("tiny"), nfc=False))


def conversation(*messages):
    return Conversation(tuple(Message(*message) for message in messages))


CONTENT = st.lists(st.sampled_from([*CONTROL, *OTHER, "\n", " ", "assistant\n", "é"]) | st.text(max_size=5), max_size=5)
CONTENT = CONTENT.map("".join).filter(lambda text: not re.search("[\ud800-\udfff]", text))
MESSAGES = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), CONTENT), min_size=1, max_size=5)


@given(messages=MESSAGES)
def test_control_tokens_are_only_where_the_template_puts_them(tiny, messages):
    sample = render(conversation(*messages), tiny)
    expected = [tiny.im_start, tiny.im_end] * len(messages)
    assert [i for i in sample.input_ids if i in tiny.control.values()] == expected
    assert [sample.input_ids[turn.end - 2] for turn in sample.turns] == [tiny.im_end] * len(messages)


@given(messages=MESSAGES)
def test_trained_is_assistant_content_with_its_end_token_and_nothing_else(tiny, messages):
    sample = render(conversation(*messages), tiny)
    assert all(label in (i, NOT_TRAINED) for i, label in zip(sample.input_ids, sample.labels, strict=True))
    trained = [label for label in sample.labels if label != NOT_TRAINED]
    contents = "".join(f"{content}<|im_end|>" for role, content in messages if role == "assistant")
    assert tiny.decode(trained, skip_control=False) == contents


@given(messages=MESSAGES)
def test_all_tokens_decode_to_the_text_of_the_template(tiny, messages):
    sample = render(conversation(*messages), tiny)
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    assert tiny.decode(sample.input_ids, skip_control=False) == text


@given(messages=MESSAGES)
def test_each_prompt_is_what_render_has_before_the_assistant_content(tiny, messages):
    check_prompts(conversation(*messages), tiny)


def check_prompts(given_conversation, tokenizer):
    sample = render(given_conversation, tokenizer)
    start = 0
    for index, turn in enumerate(sample.turns):
        if turn.role == "assistant":
            prompt = prompt_ids(given_conversation.messages[:index], tokenizer)
            assert sample.input_ids[: len(prompt)] == prompt
            assert sample.labels[start : len(prompt)] == [NOT_TRAINED] * (len(prompt) - start)
            assert NOT_TRAINED not in sample.labels[len(prompt) : turn.end - 1]
        start = turn.end


def test_plain_text_is_trained_but_for_its_first_token_and_ends_with_a_trained_end(tiny):
    sample = render(Conversation((), "the cat <|im_end|> <|endoftext|>"), tiny)
    assert sample.input_ids == [*tiny.encode("the cat <|im_end|> <|endoftext|>"), tiny.pad]
    assert sample.labels == [NOT_TRAINED, *sample.input_ids[1:]]
    assert sample.input_ids.count(tiny.pad) == 1
    assert render(Conversation((), ""), tiny).labels == [NOT_TRAINED]


def test_a_batch_gives_what_each_conversation_gives_alone(tiny):
    conversations = [
        conversation(("user", "hat"), ("assistant", "cat")),
        Conversation((), "hat"),
        conversation(("assistant", "")),
    ]
    assert render_batch(conversations, tiny) == [render(each, tiny) for each in conversations]


def test_cutting_removes_whole_turns_until_the_last_is_an_assistant_turn(tiny):
    messages = [("user", "a"), ("assistant", "b"), ("user", "c"), ("user", "d"), ("assistant", "e"), ("user", "f")]
    sample = render(conversation(*messages), tiny)
    ends = [turn.end for turn in sample.turns]
    for block_size in range(1, len(sample.input_ids)):
        shorter = cut(sample, block_size)
        kept = max((count for count in (2, 5) if ends[count - 1] <= block_size), default=0)
        expected = render(conversation(*messages[:kept]), tiny) if kept else None
        assert shorter == expected


def test_plain_text_is_cut_inside(tiny):
    sample = render(Conversation((), "the cat and the hat"), tiny)
    shorter = cut(sample, 3)
    assert (shorter.input_ids, shorter.labels) == (sample.input_ids[:3], sample.labels[:3])


@pytest.fixture(scope="session")
def cases(shared):
    path = shared / "oracles/render/load_render.py"
    spec = importlib.util.spec_from_file_location("load_render", path)
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    cases = [case for case in loader.cases() if case["expected"].get("safeA")]
    assert len(cases) == 261
    for case in cases:
        for name in ("safeA", "segmentedA"):
            expected = case["expected"][name]
            expected["labels"] = loader.labels(expected["ids"], expected["imend_spans"])
    return cases


def expected_sample(case):
    """Ids and labels: assistant messages from segmentedA (content encoded apart), all others from safeA."""
    whole, apart = (list(by_message(case["expected"][name])) for name in ("safeA", "segmentedA"))
    chosen = [
        apart[index] if message["role"] == "assistant" else whole[index]
        for index, message in enumerate(case["messages"])
    ]
    assert len(whole) == len(apart) == len(chosen)
    return [i for ids, _ in chosen for i in ids], [label for _, labels in chosen for label in labels]


def by_message(expected):
    ids, labels = expected["ids"], expected["labels"]
    starts = [index for index, i in enumerate(ids) if i == IM_START] + [len(ids)]
    for start, end in itertools.pairwise(starts):
        yield ids[start:end], labels[start:end]


@pytest.mark.oracle
@pytest.mark.parametrize("file", ["tokenizer.json", "qwen.tiktoken"])
def test_every_published_case_has_the_expected_ids_and_labels(shared, cases, file):
    tokenizer = load_tokenizer(shared / "tokenizer/qwen3" / file)
    conversations = [conversation(*((m["role"], m["content"]) for m in case["messages"])) for case in cases]
    unlike_safe = 0
    for case, sample in zip(cases, render_batch(conversations, tokenizer), strict=True):
        assert (sample.input_ids, sample.labels) == expected_sample(case), case["id"]
        unlike_safe += sample.input_ids != case["expected"]["safeA"]["ids"]
    # the cases in which assistant content begins with a newline
    assert unlike_safe == 6


@pytest.mark.oracle
def test_every_prompt_of_the_published_cases_is_what_comes_before_the_content(shared, cases):
    tokenizer = load_tokenizer(shared / "tokenizer/qwen3/qwen.tiktoken")
    for case in cases:
        check_prompts(conversation(*((m["role"], m["content"]) for m in case["messages"])), tokenizer)
