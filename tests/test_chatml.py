import importlib.util
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft import chatml
from sft.chatml import prompt_ids, render
from sft.conversation import Conversation, Message, ToolCall
from sft.records import ReadOptions, read_record
from sft.samples import KINDS, NOT_TRAINED, cut, split_text
from sft.sources import RawRecord
from sft.templates import blocks_of, blocks_of_turn, text_of_blocks
from sft.tokenizer import load_tokenizer
from tests.tiny_tokenizer import CONTROL, OTHER, save_tiny_tokenizer

IM_START = 151_644


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    # Without NFC, so that what is decoded is exactly what was written.
    return load_tokenizer(save_tiny_tokenizer(tmp_path_factory.mktemp("tiny"), nfc=False))


def ends_of(sample):
    return list(itertools.accumulate(stretch.tokens for stretch in sample.stretches))


def conversation(*messages, tools=()):
    return Conversation(tuple(Message(*message) for message in messages), tools=tools)


def rendered(given, tokenizer, **choices):
    """The one sample of a conversation."""
    (sample,) = render(given, tokenizer, **choices)
    return sample


CONTENT = st.lists(st.sampled_from([*CONTROL, *OTHER, "\n", " ", "assistant\n", "é"]) | st.text(max_size=5), max_size=5)
CONTENT = CONTENT.map("".join).filter(lambda text: not re.search("[\ud800-\udfff]", text))
MESSAGES = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), CONTENT), min_size=1, max_size=5)


@given(messages=MESSAGES)
def test_control_tokens_are_only_where_the_template_puts_them(tiny, messages):
    sample = rendered(conversation(*messages), tiny)
    expected = [tiny.im_start, tiny.im_end] * len(messages)
    assert [i for i in sample.input_ids if i in tiny.control.values()] == expected
    assert [sample.input_ids[end - 2] for end in ends_of(sample)] == [tiny.im_end] * len(messages)


@given(messages=MESSAGES)
def test_trained_is_assistant_content_with_its_end_token_and_nothing_else(tiny, messages):
    sample = rendered(conversation(*messages), tiny)
    assert all(label in (i, NOT_TRAINED) for i, label in zip(sample.input_ids, sample.labels, strict=True))
    trained = [label for label in sample.labels if label != NOT_TRAINED]
    contents = "".join(f"{content}<|im_end|>" for role, content in messages if role == "assistant")
    assert tiny.decode(trained, skip_control=False) == contents


@given(messages=MESSAGES)
def test_all_tokens_decode_to_the_text_of_the_template(tiny, messages):
    sample = rendered(conversation(*messages), tiny)
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    assert tiny.decode(sample.input_ids, skip_control=False) == text


@given(messages=MESSAGES)
def test_each_prompt_is_what_render_has_before_the_assistant_content(tiny, messages):
    check_prompts(conversation(*messages), tiny)


def check_prompts(given, tokenizer, **choices):
    """Before each trained stretch stands what a server sends; for the first one of a sample to the last id."""
    for sample in render(given, tokenizer, **choices):
        trained = np.flatnonzero(np.array(sample.labels) != NOT_TRAINED)
        starts = [int(at) for at in trained if at - 1 not in set(trained.tolist())]
        turns = [i for i, message in enumerate(given.messages) if message.role == "assistant"]
        turns = turns if sample.turn < 0 else [sample.turn]
        assert len(starts) == len(turns)
        for number, (start, turn) in enumerate(zip(starts, turns, strict=True)):
            expected = [
                prompt_ids(given.messages[:turn], tokenizer, tools=given.tools, thinking=thinking, **choices)
                for thinking in (True, False)
            ]
            found = sample.input_ids[:start]
            if number == 0:
                assert found in expected
            else:  # the trained turns before are encoded apart from their headers
                decoded = tokenizer.decode(found, skip_control=False)
                assert decoded in [tokenizer.decode(ids, skip_control=False) for ids in expected]


@given(messages=MESSAGES)
def test_untrained_assistant_turns_are_encoded_as_a_server_encodes_history(tiny, messages):
    untrained = [Message(role, content, weight=0.0) for role, content in messages]
    sample = rendered(Conversation((*untrained, Message("assistant", "cat"))), tiny)
    assert sample.input_ids[: len(prompt_ids(untrained, tiny))] == prompt_ids(untrained, tiny)
    assert tiny.decode([label for label in sample.labels if label >= 0], skip_control=False) == "cat<|im_end|>"


def test_plain_text_is_trained_but_for_its_first_token_and_ends_with_a_trained_end(tiny):
    sample = rendered(Conversation((), "the cat <|im_end|> <|endoftext|>"), tiny)
    assert sample.input_ids == [*tiny.encode("the cat <|im_end|> <|endoftext|>"), tiny.pad]
    assert sample.labels == [NOT_TRAINED, *sample.input_ids[1:]]
    assert sample.input_ids.count(tiny.pad) == 1
    assert rendered(Conversation((), ""), tiny).labels == [NOT_TRAINED]


def test_a_batch_gives_what_each_conversation_gives_alone(tiny):
    conversations = [
        conversation(("user", "hat"), ("assistant", "cat")),
        Conversation((), "hat"),
        conversation(("assistant", "")),
    ]
    together = chatml.rendered(conversations, tiny).listed()
    assert together == [sample for each in conversations for sample in render(each, tiny)]


def test_cutting_removes_whole_turns_until_the_last_is_an_assistant_turn(tiny):
    messages = [("user", "a"), ("assistant", "b"), ("user", "c"), ("user", "d"), ("assistant", "e"), ("user", "f")]
    sample = rendered(conversation(*messages), tiny)
    ends = ends_of(sample)
    for block_size in range(1, len(sample.input_ids)):
        shorter = cut(sample, block_size)
        kept = max((count for count in (2, 5) if ends[count - 1] <= block_size), default=0)
        expected = rendered(conversation(*messages[:kept]), tiny) if kept else None
        assert shorter == expected


def test_plain_text_is_cut_inside(tiny):
    sample = rendered(Conversation((), "the cat and the hat"), tiny)
    shorter = cut(sample, 3)
    assert (shorter.input_ids, shorter.labels) == (sample.input_ids[:3], [NOT_TRAINED, *sample.input_ids[1:3]])


def test_plain_text_is_split_into_pieces_that_lose_nothing(tiny):
    sample = rendered(Conversation((), "the cat and the hat sat on the mat"), tiny)
    pieces = split_text(sample, 4)
    assert [i for piece in pieces for i in piece.input_ids] == sample.input_ids
    assert [piece.turn for piece in pieces] == list(range(len(pieces)))
    assert {len(piece.input_ids) for piece in pieces[:-1]} == {4}
    assert all(piece.labels == [NOT_TRAINED, *piece.input_ids[1:]] for piece in pieces)


def test_the_last_turn_alone_is_trained_where_that_is_asked_for(tiny):
    messages = [("user", "a"), ("assistant", "hat"), ("user", "b"), ("assistant", "cat"), ("user", "c")]
    sample = rendered(conversation(*messages), tiny, train_on="last")
    assert tiny.decode([label for label in sample.labels if label >= 0], skip_control=False) == "cat<|im_end|>"


def test_weights_stand_on_the_content_and_end_of_their_message(tiny):
    messages = (Message("user", "a"), Message("assistant", "hat", weight=0.5), Message("assistant", "cat", weight=0.0))
    sample = rendered(Conversation(messages), tiny)
    trained = [stretch for stretch in sample.stretches if KINDS[stretch.kind] == "trained"]
    assert [(stretch.length, stretch.weight) for stretch in trained] == [(len(tiny.encode("hat")) + 1, 0.5)]


def test_all_tokens_but_the_first_and_tool_results_are_trained_where_that_is_asked_for(tiny):
    messages = [("system", "s"), ("user", "hat"), ("assistant", "cat"), ("tool", "result"), ("assistant", "mat")]
    sample = rendered(conversation(*messages), tiny, train_on="all")
    masked = [i for i, label in zip(sample.input_ids, sample.labels, strict=True) if label == NOT_TRAINED]
    result = "<|im_start|>user\n<tool_response>\nresult\n</tool_response><|im_end|>\n"
    assert tiny.decode(masked, skip_control=False) == "<|im_start|>" + result


THOUGHT = Message("assistant", "Paris.", reasoning="It is in France.")


def test_reasoning_makes_one_sample_per_trained_turn_in_the_template_that_knows_it(tiny):
    given = Conversation((Message("user", "a"), THOUGHT, Message("user", "b"), Message("assistant", "cat")))
    first, second = render(given, tiny, template="qwen3")
    assert (first.turn, second.turn) == (1, 3)
    answers = [tiny.decode([i for i in sample.labels if i >= 0], skip_control=False) for sample in (first, second)]
    assert answers == ["<think>\nIt is in France.\n</think>\n\nParis.<|im_end|>", "cat<|im_end|>"]
    history = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n<|im_start|>user\nb<|im_end|>\n"
    supplied = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tiny.decode(second.input_ids, skip_control=False) == history + supplied + "cat<|im_end|>\n"
    assert [KINDS[stretch.kind] for stretch in second.stretches] == ["repeated_history"] * 2 + ["user", "trained"]


def test_reasoning_is_left_out_by_the_template_that_does_not_know_it(tiny):
    given = Conversation((Message("user", "a"), THOUGHT))
    assert tiny.decode([i for i in rendered(given, tiny).labels if i >= 0], skip_control=False) == "Paris.<|im_end|>"


KIND_MESSAGES = st.lists(
    st.builds(
        Message,
        st.sampled_from(["system", "user", "assistant", "tool"]),
        CONTENT,
        st.none() | CONTENT,
        st.lists(st.builds(ToolCall, st.just("f"), st.sampled_from(["{}", '{"a": 1}'])), max_size=2).map(tuple),
        st.sampled_from([0.0, 0.5, 1.0]),
    ),
    min_size=1,
    max_size=6,
).map(tuple)
CHOICES = st.fixed_dictionaries(
    {"template": st.sampled_from(["chatml", "qwen3"]), "train_on": st.sampled_from(["assistant", "last", "all"])}
)


@given(messages=KIND_MESSAGES, tools=st.sampled_from([(), ("{}",)]), choices=CHOICES)
def test_stretches_cover_every_sample_and_its_text_is_that_of_the_template(tiny, messages, tools, choices):
    for sample in render(Conversation(messages, tools=tools), tiny, **choices):
        assert ends_of(sample)[-1] == len(sample.input_ids) == len(sample.labels)
        turn = [sample.turn] if sample.turn >= 0 else []
        text = text_of_blocks((blocks_of_turn if turn else blocks_of)(messages, tools, choices["template"], *turn))
        assert tiny.decode(sample.input_ids, skip_control=False) == text
        assert [i for i in sample.input_ids if i in tiny.control.values()] == [tiny.im_start, tiny.im_end] * len(
            sample.roles
        )
        assert sample.labels[0] == NOT_TRAINED


@given(messages=KIND_MESSAGES, tools=st.sampled_from([(), ("{}",)]), template=st.sampled_from(["chatml", "qwen3"]))
def test_the_prompt_of_every_sample_is_what_a_server_sends(tiny, messages, tools, template):
    every = [message._replace(weight=1.0) for message in messages]
    check_prompts(Conversation(tuple(every), tools=tools), tiny, template=template)


@pytest.fixture(scope="session")
def cases(shared):
    path = shared / "oracles/render/load_render.py"
    spec = importlib.util.spec_from_file_location("load_render", path)
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    cases = list(loader.cases())
    assert len(cases) == 313
    for case in cases:
        for expected in case["expected"].values():
            if isinstance(expected, dict):
                expected["labels"] = loader.labels(expected["ids"], expected["imend_spans"])
    return cases


def conversation_of_case(case):
    """As the reader gives it; the weight of one case is left out, which the published templates ignore."""
    record = {"messages": [{k: v for k, v in m.items() if k not in ("weight", "train")} for m in case["messages"]]}
    raw = RawRecord(1, 1, {**record, "tools": case.get("tools")}, 0)
    return read_record(raw, ReadOptions(), 0)


def unlike(case):
    """Whether we deliberately read a case otherwise than the published templates, which lose the content."""
    return bool({"unknown-role", "list-content"} & set(case["tags"]))


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
def test_every_plain_case_has_the_expected_ids_and_labels(shared, cases, file):
    tokenizer = load_tokenizer(shared / "tokenizer/qwen3" / file)
    cases = [case for case in cases if "safeA" in case["expected"]]
    assert len(cases) == 261
    samples = chatml.rendered([conversation_of_case(case) for case in cases], tokenizer).listed()
    unlike_safe = 0
    for case, sample in zip(cases, samples, strict=True):
        assert (sample.input_ids, sample.labels) == expected_sample(case), case["id"]
        unlike_safe += sample.input_ids != case["expected"]["safeA"]["ids"]
    # the cases in which assistant content begins with a newline
    assert unlike_safe == 6


@pytest.mark.oracle
@pytest.mark.parametrize("template", ["chatml", "qwen3"])
def test_every_case_has_the_text_of_the_published_template(cases, template):
    for case in cases:
        if not unlike(case):
            given = conversation_of_case(case)
            assert (
                text_of_blocks(blocks_of(given.messages, given.tools, template)) == case["expected"][template]["text"]
            )


@pytest.mark.oracle
@pytest.mark.parametrize("template", ["chatml", "qwen3"])
def test_every_case_has_the_ids_and_labels_of_the_published_template(shared, cases, template):
    """Where content spells no control token, and not where it begins with a newline: that merges with the header."""
    tokenizer = load_tokenizer(shared / "tokenizer/qwen3/qwen.tiktoken")
    compared = 0
    for case in cases:
        if unlike(case) or "inject" in case["tags"]:
            continue
        samples = render(conversation_of_case(case), tokenizer, template=template)
        expected = case["expected"][template]
        if samples[0].turn >= 0:
            continue
        if samples[0].input_ids != expected["ids"]:
            assert any(m["role"] == "assistant" and m["content"].startswith("\n") for m in case["messages"]), case["id"]
            continue
        compared += 1
        ids = tokenizer.encode("<think>\n\n</think>\n\n")
        assert samples[0].labels == without_supplied(expected["labels"], ids if template == "qwen3" else None), case[
            "id"
        ]
    assert compared > 240


def without_supplied(labels, block):
    """The labels without the empty think block at the beginning of a trained stretch, which a server supplies."""
    labels = list(labels)
    for at in range(len(labels)):
        if block and labels[at : at + len(block)] == block and (at == 0 or labels[at - 1] == NOT_TRAINED):
            labels[at : at + len(block)] = [NOT_TRAINED] * len(block)
    return labels


@pytest.mark.oracle
@pytest.mark.parametrize("template", ["chatml", "qwen3"])
def test_every_prompt_of_the_published_cases_is_what_comes_before_the_content(shared, cases, template):
    tokenizer = load_tokenizer(shared / "tokenizer/qwen3/qwen.tiktoken")
    for case in cases:
        if not unlike(case):
            check_prompts(conversation_of_case(case), tokenizer, template=template)


@pytest.mark.oracle
def test_the_prompts_that_servers_build_are_ours(shared, cases):
    tokenizer = load_tokenizer(shared / "tokenizer/qwen3/qwen.tiktoken")
    asked = [case for case in cases if "gen" in case["expected"]]
    assert asked
    for case in asked:
        messages = conversation_of_case(case).messages
        for name, thinking in (("gen", True), ("gen_nothink", False)):
            found = prompt_ids(messages, tokenizer, template="qwen3", thinking=thinking)
            assert found == case["expected"][name]


@pytest.mark.oracle
def test_each_sample_of_a_case_with_reasoning_is_the_published_text_of_its_history(shared, cases):
    """Rendered by the published template in Jinja, turn by turn."""
    tokenizer = load_tokenizer(shared / "tokenizer/qwen3/qwen.tiktoken")
    template = published(shared / "templates/qwen3.jinja")
    samples_found = 0
    for case in cases:
        samples = render(conversation_of_case(case), tokenizer, template="qwen3") if not unlike(case) else []
        for sample in samples:
            if sample.turn >= 0:
                if case["messages"][sample.turn - 1]["role"] != "assistant":
                    text = template.render(messages=case["messages"][: sample.turn + 1], tools=case.get("tools"))
                    assert tokenizer.decode(sample.input_ids, skip_control=False) == text
                prompts = [
                    template.render(
                        messages=case["messages"][: sample.turn],
                        tools=case.get("tools"),
                        add_generation_prompt=True,
                        enable_thinking=thinking,
                    )
                    for thinking in (True, False)
                ]
                start = next(at for at, label in enumerate(sample.labels) if label != NOT_TRAINED)
                assert tokenizer.decode(sample.input_ids[:start], skip_control=False) in prompts
                samples_found += 1
    assert samples_found > 20


def published(path):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(path.read_text())
