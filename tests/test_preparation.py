import numpy as np
import pytest

import prepare_sft
from sft.arrays import ArrayReader
from sft.chatml import render, rendered
from sft.conversation import Conversation, Message
from sft.preparation import arrays_of
from sft.prepared_writer import PreparedWriter
from sft.tokenizer import load_tokenizer
from tests.preparing import dialogue, exchange, prepare, texts, tokenizer_of, trained_texts
from tests.tiny_tokenizer import save_tiny_tokenizer


def weights_of(data, sample=0):
    """The weight of each token of a sample, and its text, where one of them is trained."""
    samples, tokenizer = data.splits["train"], tokenizer_of(data)
    span = slice(samples.offsets[sample], samples.offsets[sample + 1])
    found = {}
    for i, weight in zip(samples.input_ids[span].tolist(), samples.weights[span].tolist(), strict=True):
        found[weight] = found.get(weight, "") + tokenizer.decode([i], skip_control=False)
    return found


def asked(*answers):
    """A dialogue in which each answer is (content, what else its message has)."""
    return dialogue(*(turn for answer in answers for turn in (("user", "a"), ("assistant", *answer))))


def test_the_weights_of_messages_stand_on_their_content_and_end(tmp_path):
    record = asked(("the cat", {"weight": 0.5}), ("hat", {"loss_weight": 2}), ("mat", {}), ("no", {"train": False}))
    data = prepare(tmp_path, [record], val_fraction=0)
    found = weights_of(data)
    assert {weight: found[weight] for weight in (0.5, 1, 2)} == {
        0.5: "the cat<|im_end|>",
        2: "hat<|im_end|>",
        1: "mat<|im_end|>",
    }
    assert "no<|im_end|>" in found[0]
    samples = data.splits["train"]
    assert ((samples.weights > 0) == (samples.labels >= 0)).all()


def test_targets_are_the_sums_of_the_weights_as_they_are_written(tmp_path):
    records = [asked(("the cat and the hat", {"weight": 0.1}), ("mat", {"weight": 0.7})), exchange("a", "b")]
    samples = prepare(tmp_path, records, val_fraction=0).splits["train"]
    for number in range(2):
        weights = samples.weights[samples.offsets[number] + 1 : samples.offsets[number + 1]]
        assert samples.targets[number] == pytest.approx(weights.astype(np.float64).sum(), rel=1e-14)
    assert samples.targets[0] != pytest.approx(0.1 * np.count_nonzero(weights == np.float32(0.1)), rel=1e-9)


@pytest.mark.parametrize("answer", [{}, {"train": True}, {"weight": 1}, {"train": False}, {"weight": 0.0}])
def test_weights_of_0_and_1_need_no_file(tmp_path, answer):
    data = prepare(tmp_path, [asked(("cat", answer), ("hat", {}))], val_fraction=0)
    assert data.splits["train"].weights is None
    assert not list((tmp_path / "data").glob("*weights*"))
    kept = "" if answer in ({"train": False}, {"weight": 0.0}) else "cat<|im_end|>"
    assert trained_texts(data) == [kept + "hat<|im_end|>"]


def test_only_a_split_that_has_weights_has_their_file(tmp_path):
    plain = [exchange(f"What is {i}?", "a cat") for i in range(40)]
    data = prepare(tmp_path, plain, val_fraction=0.3)
    record = int(data.splits["train"].origins[0, 1])
    plain[record - 1] = dialogue(("user", plain[record - 1]["prompt"]), ("assistant", "a cat", {"weight": 3}))
    data = prepare(tmp_path, plain, val_fraction=0.3)
    assert data.splits["train"].weights is not None
    assert data.splits["val"].weights is None


def test_what_is_trained_differently_is_no_duplicate(tmp_path):
    turns = [("user", "What is it?"), ("assistant", "a cat"), ("user", "And that?"), ("assistant", "a hat")]
    first, second = ([*turns[:place], (*turns[place], {"train": False}), *turns[place + 1 :]] for place in (1, 3))
    heavy = [*turns[:3], (*turns[3], {"weight": 3})]
    records = [dialogue(*each) for each in (turns, first, second, heavy, turns, second)]
    data = prepare(tmp_path, records, val_fraction=0)
    assert data.splits["train"].origins[:, 1].tolist() == [1, 2, 3, 4]
    assert data.meta["ledger"]["conversations"]["duplicate"] == 2


def test_a_mark_that_changes_nothing_makes_no_difference(tmp_path):
    plain = dialogue(("user", "What is it?"), ("assistant", "a cat"))
    marked = dialogue(("user", "What is it?", {"weight": 0}), ("assistant", "a cat", {"weight": 1}))
    assert len(prepare(tmp_path, [plain, marked], val_fraction=0).splits["train"]) == 1
    assert len(prepare(tmp_path, [plain, marked], val_fraction=0, train_on="all").splits["train"]) == 2


def test_what_is_rendered_alike_is_a_duplicate_and_in_one_split(tmp_path):
    records = []
    for number in range(40):
        for reasoning in ("r", "s"):  # for which chatml has no place
            answer = {"role": "assistant", "content": "a cat", "reasoning_content": reasoning}
            records.append({"messages": [{"role": "user", "content": f"What is {number}?"}, answer]})
    data = prepare(tmp_path, records, val_fraction=0.4)
    assert data.meta["ledger"]["conversations"]["duplicate"] == 40
    expanded = prepare(tmp_path, records, val_fraction=0.4, template="qwen3")
    train, val = ({(record - 1) // 2 for record in split.origins[:, 1]} for split in expanded.splits.values())
    assert len(train | val) == 40
    assert train.isdisjoint(val)
    assert val


def test_the_first_weight_may_come_after_thousands_of_samples_without_one(tmp_path, monkeypatch):
    takes = []

    def take(reader, rows):
        takes.append(rows)
        return original(reader, min(rows, 10_000) if rows == 1 << 20 else rows)  # so that there are several blocks

    original = ArrayReader.take
    monkeypatch.setattr(ArrayReader, "take", take)
    records = [exchange(f"What is {i}?", "a cat") for i in range(3000)]
    data = prepare(tmp_path, [*records, asked(("cat", {"weight": 0.25}))], val_fraction=0, workers=1)
    samples = data.splits["train"]
    last = samples.offsets[-2]
    assert takes[:2] == [1 << 20, 1 << 20]
    assert (samples.weights[:last] == (samples.labels[:last] >= 0)).all()
    assert weights_of(data, 3000).keys() == {0.0, 0.25}


def test_weights_go_on_where_later_samples_have_none(tmp_path):
    with PreparedWriter(tmp_path / "data") as writer:
        ids, labels = np.array([5, 6, 7], np.int32), np.array([-100, 6, 7], np.int32)
        for record, weights in enumerate([None, np.array([0, 1, 0.5], np.float32), None], 1):
            writer.add_samples(
                "train", ids, labels, lengths=[3], targets=[2.0], origins=[(0, record, -1)], weights=weights
            )
        writer.close()
        assert np.load(tmp_path / "data" / "train_weights.npy").tolist() == [0, 1, 1, 0, 1, 0.5, 0, 1, 1]


FOUR = dialogue(
    ("system", "s"), ("user", "a"), ("assistant", "cat"), ("tool", "result"), ("assistant", "hat"), ("user", "b")
)


def test_the_last_answer_alone_is_trained_where_that_is_asked_for(tmp_path):
    data = prepare(tmp_path, [FOUR], val_fraction=0, train_on="last")
    assert trained_texts(data) == ["hat<|im_end|>"]
    assert data.meta["audit"]["trained_turns"] == 1
    assert data.meta["ledger"]["tokens"]["masked"]["assistant"] > 0


def test_where_the_last_answer_is_marked_as_untrained_there_is_no_sample(tmp_path):
    untrained = asked(("cat", {}), ("hat", {"train": False}))
    data = prepare(tmp_path, [FOUR, untrained], val_fraction=0, train_on="last")
    assert data.meta["ledger"]["conversations"]["no_trained_token"] == 1


def test_all_tokens_but_the_first_and_tool_results_are_trained_where_that_is_asked_for(tmp_path):
    data = prepare(tmp_path, [FOUR], val_fraction=0, train_on="all")
    before, after = texts(data)[0].split("<|im_start|>user\n<tool_response>\nresult\n</tool_response><|im_end|>\n")
    assert trained_texts(data) == [(before + after).removeprefix("<|im_start|>")]
    masked = data.meta["ledger"]["tokens"]["masked"]
    assert {role for role, count in masked.items() if count} == {"tool"}


def test_answers_in_a_prompt_of_messages_are_not_trained(tmp_path):
    turns = [("user", "a"), ("assistant", "cat"), ("user", "b")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    record = {"prompt": prompt, "completion": [{"role": "assistant", "content": "hat"}]}
    data = prepare(tmp_path, [record], val_fraction=0)
    assert trained_texts(data) == ["hat<|im_end|>"]
    assert data.splits["train"].weights is None


WORDS = "the cat and the hat sat on the mat"


def test_split_text_loses_nothing_but_a_last_token_that_nothing_predicts(tmp_path):
    whole = prepare(tmp_path, [{"text": WORDS}], val_fraction=0)
    ids = whole.splits["train"].input_ids.tolist()
    for block_size in range(2, len(ids) + 1):
        data = prepare(tmp_path, [{"text": WORDS}], val_fraction=0, too_long="split", block_size=block_size)
        samples = data.splits["train"]
        lost = int(len(ids) % block_size == 1)
        assert samples.input_ids.tolist() == ids[: len(ids) - lost]
        assert samples.lengths.max() <= block_size
        expected = range(len(samples)) if block_size < len(ids) else [-1]
        assert samples.origins[:, 2].tolist() == list(expected)
        tokens = data.meta["ledger"]["tokens"]
        assert (tokens["total"], tokens["dropped"]["no_trained_token"]) == (len(ids), lost)
        assert data.meta["ledger"]["conversations"]["expanded"] == int(block_size < len(ids))


def test_a_conversation_that_is_too_long_is_cut_where_text_is_split(tmp_path):
    record = asked(("cat", {}), ("hat " * 30, {}))
    data = prepare(tmp_path, [record, {"text": WORDS}], val_fraction=0, too_long="split", block_size=16)
    assert texts(data)[0] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\ncat<|im_end|>\n"
    assert "".join(texts(data)[1:]) == WORDS + "<|endoftext|>"
    assert data.meta["ledger"]["conversations"]["shortened"] == 1


THOUGHT = {"reasoning_content": "the mat"}


def test_a_cut_that_would_end_before_the_trained_turn_of_a_sample_drops_it(tmp_path):
    record = dialogue(
        ("user", "a"), ("assistant", "cat", THOUGHT), ("user", "b"), ("assistant", "hat " * 20, THOUGHT), ("user", "c")
    )
    data = prepare(tmp_path, [record], val_fraction=0, too_long="cut", template="qwen3", block_size=48)
    assert data.splits["train"].origins.tolist() == [[0, 1, 1]]
    ledger = data.meta["ledger"]
    assert ledger["tokens"]["cut"] == 0
    assert ledger["tokens"]["dropped"]["too_long"] > 48
    assert (ledger["conversations"]["kept"], ledger["conversations"]["expanded"]) == (1, 1)


def test_the_labels_that_are_written_are_those_of_each_sample(tmp_path):
    tokenizer = load_tokenizer(save_tiny_tokenizer(tmp_path))
    thought = Message("assistant", "a cat", reasoning="Hm.", weight=0.5)
    conversations = [
        Conversation((Message("system", "s"), Message("user", "a"), thought, Message("tool", "t"), thought)),
        Conversation((), text="the cat sat"),
        Conversation((Message("user", "a"), Message("assistant", ""), Message("assistant", "b", weight=0.0))),
    ]
    settings = prepare_sft.PrepareSettings(input="-", tokenizer=str(tmp_path), out_dir="x")
    recipe = prepare_sft.recipe_of(settings, tokenizer, [])
    for template in ("chatml", "qwen3"):
        for train_on in ("assistant", "last", "all"):
            how = {"template": template, "train_on": train_on}
            apart = [sample for each in conversations for sample in render(each, tokenizer, **how)]
            expected = [label for sample in apart if sample.is_trained for label in sample.labels]
            together = arrays_of(rendered(conversations, tokenizer, **how), recipe)
            assert together["labels"].tolist() == expected
            assert len(expected) > 20
