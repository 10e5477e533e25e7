import json
import random
import sys
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.conversation import Conversation, Message, ToolCall
from sft.duplicates import DIGEST_BYTES, Seen, bands_and_rows, content_digest, find_leaks, shingles_of
from sft.errors import UserError


def conversation(*texts, **fields):
    """The texts said in turn by user and assistant."""
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], text) for i, text in enumerate(texts)), **fields)


def test_equal_content_has_one_digest_wherever_it_is_and_whatever_it_weighs():
    here = Conversation((Message("assistant", "a"),))
    there = Conversation((Message("assistant", "a", weight=0.5),), source=1, record=7, line=9, group="g")
    assert content_digest(here) == content_digest(there)
    assert len(content_digest(here)) == DIGEST_BYTES


# Pieces of the digest's own framing, so that text may pretend to be what follows it.
TEXT = st.lists(st.sampled_from(["", "a", "é", "1:", "user 1:a", "~0:", "@1,1:", "#1:a", "$"]), max_size=3).map("".join)
CALLS = st.lists(st.builds(ToolCall, TEXT, TEXT), max_size=2).map(tuple)
MESSAGE = st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT, st.none() | TEXT, CALLS).map(
    lambda fields: Message(*fields)
)
PARTS = st.tuples(st.lists(MESSAGE, max_size=2).map(tuple), st.none() | TEXT, st.lists(TEXT, max_size=2).map(tuple))
CONVERSATION = PARTS.map(lambda parts: Conversation(parts[0], text=parts[1], tools=parts[2]))


def what_is_said(conversation):
    messages = [
        (role, normalize("NFC", content), calls)
        for role, content, _, calls, _ in conversation.messages
        if role != "system"
    ]
    return tuple(messages), None if conversation.text is None else normalize("NFC", conversation.text)


@given(conversations=st.lists(CONVERSATION, min_size=2, max_size=20))
def test_digests_differ_where_something_else_is_said(conversations):
    assert len({content_digest(each) for each in conversations}) == len(set(map(what_is_said, conversations)))


def test_a_digest_does_not_tell_how_or_under_which_instructions_something_is_said():
    plain = conversation("caf\u00e9", "b")
    asked, answered = conversation("cafe\u0301", "b").messages
    thought = answered._replace(reasoning="r")
    for other in (
        Conversation((Message("system", "Be brief."), *plain.messages)),
        Conversation((asked, answered)),
        Conversation((asked, thought)),
        plain._replace(tools=("{}",)),
    ):
        assert content_digest(other) == content_digest(plain)


def test_what_pretends_to_be_the_frame_has_a_digest_of_its_own():
    pairs = [
        (conversation("a", "b"), conversation("aassistant 1:b")),
        (conversation("a", "b"), conversation("aassistant b")),
        (
            Conversation((Message("assistant", "", None, (ToolCall("ab", "c"),)),)),
            Conversation((Message("assistant", "", None, (ToolCall("a", "bc"),)),)),
        ),
        (Conversation((), text=""), Conversation(())),
    ]
    for one, other in pairs:
        assert content_digest(one) != content_digest(other)


@settings(deadline=None)
@given(
    batches=st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1) | st.integers(0, 3)), max_size=40))
)
def test_of_equal_digests_the_first_is_new_and_no_other(batches):
    seen, expected = Seen(), set()
    for batch in batches:
        digests = np.array(batch, np.uint64).reshape(-1, 2)
        new = [not (digest in expected or expected.add(digest)) for digest in batch]
        assert seen.add(digests).tolist() == new
        assert len(seen) == len(expected)


def test_two_hundred_thousand_digests_are_told_apart_in_32_bytes_each():
    draw = np.random.default_rng(0)
    digests = draw.integers(0, 256, (200_000, DIGEST_BYTES), np.uint8)
    digests[:100] = digests[0]  # equal ones
    digests[100:200, :8] = 255  # and such as differ in their second half only, in the last bucket
    seen = Seen()
    new = np.concatenate([seen.add(batch) for batch in np.array_split(digests, 100)])
    assert new[:100].tolist() == [True] + [False] * 99
    assert new[100:].all()
    assert len(seen) == 199_901
    assert seen.nbytes <= 32 * len(seen)
    assert not seen.add(digests).any()
    assert seen.add(digests.view("<u8") ^ np.uint64(1)).sum() == 199_901


def test_nothing_added_is_nothing_new():
    assert Seen().add(np.empty((0, DIGEST_BYTES), np.uint8)).tolist() == []


def places(split):
    """The conversations, each with a place of its own: validation in source 0, training in source 1."""
    for source, kind in enumerate(("validation", "training")):
        for record, each in enumerate(split[kind], start=1):
            fields = {"text": each.text, "tools": each.tools}
            yield Conversation(each.messages, source=source, record=record, **fields), kind == "validation"


def leaks(validation, training, *, order=None, **choices):
    everything = list(places({"validation": validation, "training": training}))
    return find_leaks(lambda: order(everything) if order else everything, **choices)


WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "re", "so", "ti") for b in ("ba", "du", "fe", "gi", "po", "va")]


def passage(seed, words=60):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def test_the_same_content_is_found_at_its_first_place_for_every_validation_conversation_that_has_it():
    training = [conversation("x"), conversation("q", "a"), conversation("q", "a")]
    found = leaks([conversation("q", "a"), conversation("q", "b"), conversation("q", "a")], training, near=False)
    assert found == {(0, 1): ((1, 2), 1.0, True), (0, 3): ((1, 2), 1.0, True)}
    assert list(found) == [(0, 1), (0, 3)]


def test_what_leaks_is_told_in_the_order_of_validation():
    found = leaks([conversation("q"), conversation("r")], [conversation("r"), conversation("q")], near=False)
    assert list(found) == [(0, 1), (0, 2)]


def test_digests_that_agree_in_one_half_are_not_the_same_content(monkeypatch):
    def half_a_digest(conversation):
        return bytes(8) + conversation.messages[0].content.encode().ljust(8)

    monkeypatch.setattr("sft.duplicates.content_digest", half_a_digest)
    validation = [conversation(text) for text in "abc"]
    assert leaks(validation, [conversation("z"), conversation("b")], near=False) == {(0, 2): ((1, 2), 1.0, True)}


def test_what_differs_in_a_letter_is_not_the_same_content():
    assert leaks([conversation("q", "a")], [conversation("q", "A")], near=False) == {}


@pytest.mark.parametrize("near", [False, True])
def test_without_validation_or_without_training_nothing_leaks(near):
    if near:
        pytest.importorskip("datasketch")
    one = [conversation("q", "a")]
    assert leaks([], one, near=near) == leaks(one, [], near=near) == leaks([], [], near=near) == {}


@pytest.fixture
def _datasketch():
    pytest.importorskip("datasketch")


near_duplicates = pytest.mark.usefixtures("_datasketch")


@near_duplicates
def test_planted_near_duplicates_are_found_and_nothing_else():
    texts = [passage(i) for i in range(60)]
    shouted = [conversation(text.upper().replace(" ", ",  ") + "!", "Yes.") for text in texts[:10]]
    reworded = [conversation(text + " and more", "yes") for text in texts[10:20]]
    changed = [conversation(text.replace(text.split()[30], "other", 1), "yes") for text in texts[20:30]]
    rewritten = [conversation(" ".join(sorted(text.split())), "yes") for text in texts[30:40]]
    unrelated = [conversation(passage(1000 + i), "yes") for i in range(200)]
    training = [*unrelated, *shouted, *reworded, *changed, *rewritten]
    found = leaks([conversation(text, "yes") for text in texts], training, near=True)
    assert found.keys() == {(0, record) for record in range(1, 31)}
    for record in range(1, 31):
        place, similarity, exact = found[0, record]
        assert place == (1, 200 + record)
        assert not exact
        assert similarity == 1.0 if record <= 10 else 0.8 <= similarity < 1.0


@near_duplicates
def test_similarity_is_that_of_the_sets_of_shingles_and_the_threshold_decides():
    one, other = "a b c d e f g h i j k l m n", "a b c d e f g h i j k l m z"
    pair = [conversation(one)], [conversation(other)]  # ten shingles each, nine of them shared
    assert leaks(*pair, near=True)[0, 1].similarity == 9 / 11
    assert leaks(*pair, near=True, threshold=9 / 11)
    assert not leaks(*pair, near=True, threshold=9 / 11 + 1e-9)


@near_duplicates
def test_of_several_near_duplicates_the_first_is_reported():
    text = passage(0)
    found = leaks([conversation(text)], [conversation(text + " more"), conversation(text.upper())], near=True)
    assert found[0, 1].place == (1, 1)


@near_duplicates
def test_a_near_duplicate_that_is_also_there_exactly_is_reported_as_exact():
    text = passage(0)
    found = leaks([conversation(text)], [conversation(text.upper()), conversation(text)], near=True)
    assert found == {(0, 1): ((1, 2), 1.0, True)}


@near_duplicates
def test_the_order_of_validation_and_training_changes_nothing():
    texts = [passage(i) for i in range(30)]
    validation = [conversation(text) for text in texts]
    training = [conversation(text + " more") for text in texts[::2]]

    def mixed(everything):
        validation, training = everything[:30], everything[30:]
        return [*training[:5], *validation[:20], *training[5:], *validation[20:]]

    expected = leaks(validation, training, near=True)
    assert len(expected) == 15
    assert leaks(validation, training, near=True) == expected
    assert leaks(validation, training, near=True, order=mixed) == expected
    backwards = leaks(validation, training, near=True, order=lambda everything: everything[::-1])
    assert dict(sorted(backwards.items())) == expected


@near_duplicates
def test_short_texts_are_near_only_where_their_words_are_the_same():
    validation = [conversation(text) for text in ("Yes.", "no", "!!!", "", "one two three four")]
    training = [conversation(text) for text in ("yes", "not", "???", "four three two one")]
    assert leaks(validation, training, near=True) == {(0, 1): ((1, 1), 1.0, False)}
    assert leaks(validation, [conversation("")], near=True) == {(0, 4): ((1, 1), 1.0, True)}


@near_duplicates
def test_text_without_spaces_is_compared_by_its_characters():
    letters = [chr(0x4E00 + i) for i in random.Random(0).choices(range(2000), k=80)]
    changed = [*letters[:40], "一", *letters[41:]]
    found = leaks([conversation("".join(letters))], [conversation("、".join(changed) + "。")], near=True)
    assert found[0, 1].similarity == 71 / 81
    assert leaks([conversation("".join(letters))], [conversation("".join(letters[::-1]))], near=True) == {}


def test_what_whole_data_sets_share_makes_no_conversations_alike():
    rules = Message("system", passage(0, words=500))
    one, other = (Conversation((rules, Message("user", passage(i))), tools=(passage(9),)) for i in (1, 2))
    assert not np.intersect1d(shingles_of(one), shingles_of(other)).size


def test_answers_reasoning_and_tool_calls_are_compared_too():
    def said(*, content="", reasoning=None, calls=(), text=None):
        return shingles_of(Conversation((Message("assistant", content, reasoning, calls),), text=text)).tolist()

    words = "a b c d e f"
    expected = said(content=words)
    assert len(expected) == 2
    assert said(reasoning=words) == said(calls=(ToolCall("a", "b c d e f"),)) == said(text=words) == expected


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_a_pair_at_the_threshold_is_proposed_99_times_in_a_hundred(threshold):
    bands, rows = bands_and_rows(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.99


def test_near_duplicates_without_their_library_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[near-duplicates\]'"):
        leaks([conversation("a")], [], near=True)


@pytest.mark.oracle
@near_duplicates
def test_real_questions_are_found_again_after_small_changes(shared: Path):
    with open(shared / "data" / "gsm8k" / "test.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file][:300]
    validation = [conversation(record["question"], record["answer"]) for record in records]
    changed = [conversation(f"Question: {record['question']}", record["answer"].lower()) for record in records[:150]]
    found = leaks(validation, changed, near=True)
    assert found.keys() == {(0, record) for record in range(1, 151)}
    assert all(leak.place == (1, record) for (_, record), leak in found.items())
