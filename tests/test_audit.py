from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest

import prepare_sft
from sft.arrays import SPLITS
from sft.audit import audit_chunk, with_written
from sft.errors import UserError
from sft.preparation import chunks
from sft.prepared_writer import PreparedWriter
from sft.sources import find_sources
from sft.tokenizer import load_tokenizer
from tests.preparing import dialogue, exchange, prepare, tokenizer_file
from tests.written_samples import read_samples, write_samples


def audit(tmp_path, **settings):
    """(counts, problems) of the folder, audited as it now is."""
    given = {"input": str(tmp_path / "input.jsonl"), "tokenizer": str(tokenizer_file(tmp_path)), "out_dir": "x"}
    chosen = prepare_sft.PrepareSettings(**{**given, **settings})
    recipe = prepare_sft.recipe_of(chosen, load_tokenizer(chosen.tokenizer), find_sources(chosen.input).sources)
    counts, problems = Counter(), []
    for item in with_written(chunks(recipe.sources), tmp_path / "data", SPLITS):
        findings = audit_chunk(recipe, item)
        counts += findings.counts
        problems += findings.problems
    return counts, problems


TURNS = dialogue(
    ("system", "the hat"),
    ("user", "What is the capital of France?"),
    ("assistant", "It is Paris."),
    ("tool", "the cat sat"),
    ("assistant", "the mat", {"train": False}),
    ("user", "What?"),
    ("assistant", "the cat and the hat"),
)
# A blank line, so that lines are not records.
PLAIN = [exchange("What is it?", "a cat"), b"", TURNS, {"text": "the cat and the hat sat on the mat"}]
SYSTEM, QUESTION, ANSWER, RESULT, UNTRAINED, AGAIN, LAST = range(7)  # the blocks of TURNS


class Damage(NamedTuple):
    name: str
    change: object  # of all samples
    problem: str
    record: int = 2
    records: list = PLAIN
    settings: Mapping = MappingProxyType({})
    weights: bool = False


def damage(name, change, problem, record=2, **more):
    """Damage to the first sample of a record of the training split."""

    def to_sample(samples):
        change(next(sample for sample in samples["train"] if sample.origin[1] == record))

    return Damage(name, to_sample, problem, record, **more)


def after(block, tokens):
    """A place counted from where a block begins."""
    return lambda sample: sample.starts[block] + tokens


def answer_at(sample, block):
    """The trained places of a block."""
    end = [*sample.starts, len(sample.ids)][block + 1]
    return [at for at in sample.trained if sample.starts[block] <= at < end]


def to_another_id(sample):
    sample.labels[sample.trained[0]] ^= 1


def renumbered(sample):
    sample.origin[2] = 3


def twice(samples):
    samples["train"].insert(1, samples["train"][1].copy())


def to_both_splits(samples):
    samples["val"].append(samples["train"][1].copy())


BEGINS = "a trained stretch does not begin right after the header of an assistant message"
ENDS = "a trained stretch does not end with its one end token"
DECODES = "the ids do not decode to the text of the template"
OF_TEXT = "the ids do not decode to the text"
LABEL = "a label is neither its token nor -100"
FIRST = "the first token is trained, or none"
ONE_STRETCH = "an answer is not trained as one stretch"
WEIGHT_0 = "a weight is 0 where a token is trained, or the other way round"

OF_LABELS = [
    damage("a label that is another id", to_another_id, LABEL),
    damage("a user token trained", lambda s: s.train(s.starts[QUESTION] + 4), "tokens of a user message that is not"),
    damage("a user's end token trained", lambda s: s.train(s.starts[ANSWER] - 2), "tokens of a user message that is"),
    damage("a system token trained", lambda s: s.train(4), "tokens of a system message that is not trained are"),
    damage("a tool result trained", lambda s: s.train(s.starts[RESULT] + 9), "tokens of a tool message that is not"),
    damage("an untrained answer trained", lambda s: s.train(s.starts[AGAIN] - 3), "tokens of a assistant message that"),
    damage("the header trained", lambda s: s.train(answer_at(s, ANSWER)[0] - 1), BEGINS),
    damage("a whole block trained", lambda s: s.train(*range(s.starts[LAST], s.trained[-1])), BEGINS),
    damage("the newline after an answer trained", lambda s: s.train(answer_at(s, LAST)[-1] + 1), ENDS),
    damage("the end token untrained", lambda s: s.train(answer_at(s, ANSWER)[-1], on=False), ENDS),
    damage("an answer's beginning untrained", lambda s: s.train(answer_at(s, ANSWER)[0], on=False), BEGINS),
    damage("an answer's middle untrained", lambda s: s.train(answer_at(s, ANSWER)[1], on=False), ONE_STRETCH),
    damage("an answer untrained", lambda s: s.train(*answer_at(s, ANSWER), on=False), ONE_STRETCH),
    damage("nothing trained", lambda s: s.train(*s.trained, on=False), FIRST),
    damage("the first token trained", lambda s: s.train(0), FIRST),
    damage("the first token of a text trained", lambda s: s.train(0), FIRST, 3),
    damage("a token of a text untrained", lambda s: s.train(2, on=False), "a token of the text is not trained", 3),
    damage("the end of a text untrained", lambda s: s.train(len(s.ids) - 1, on=False), "a token of the text is not", 3),
]
OF_IDS = [
    damage("a token of an answer replaced", lambda s: s.replace(s.trained[0], 70), DECODES),
    damage("a token of a question replaced", lambda s: s.replace(s.starts[QUESTION] + 4, 70), DECODES),
    damage("a control token in an answer", lambda s: s.replace(s.trained[0], 2), DECODES),
    damage("the last turns missing", lambda s: s.remove(slice(s.starts[AGAIN], None)), "turns are missing"),
    damage("a turn missing within", lambda s: s.remove(slice(s.starts[RESULT], s.starts[UNTRAINED])), "turns are mis"),
    damage("a turn twice", lambda s: s.append(slice(s.starts[LAST], None)), DECODES),
    damage("the last newline missing", lambda s: s.remove(slice(-1, None)), DECODES),
    damage("an end of a text missing", lambda s: s.remove(slice(-1, None)), "the end of the text is missing", 3),
    damage("a token of a text replaced", lambda s: s.replace(3, 70), OF_TEXT, 3),
    damage("a token of a text twice", lambda s: s.append(slice(-1, None)), OF_TEXT, 3),
    Damage("a sample twice", twice, "a turn is there twice"),
    Damage("a record in both splits", to_both_splits, "it is in more than one split"),
]
WEIGHED = [
    exchange("What?", "a cat"),
    dialogue(("user", "a"), ("assistant", "the cat", {"weight": 0.5}), ("user", "b"), ("assistant", "the mat")),
]


def weigh(at, weight):
    def change(sample):
        sample.weights[sample.trained[0] + at] = weight

    return change


OF_WEIGHTS = [
    damage("a weight of 0 where a token is trained", weigh(0, 0.0), WEIGHT_0, records=WEIGHED, weights=True),
    damage("a weight where no token is trained", weigh(-1, 0.5), WEIGHT_0, records=WEIGHED, weights=True),
    damage("another weight", weigh(1, 1.0), "tokens have another weight than 0.5", records=WEIGHED, weights=True),
    Damage("no weights", lambda samples: None, "tokens have another weight than 0.5", records=WEIGHED),
]
CALL = [{"name": "f", "arguments": {"a": "the cat"}}]
THOUGHT = dialogue(
    ("user", "What?"),
    ("assistant", "a cat", {"reasoning_content": "the hat"}),
    ("user", "What is it?"),
    ("assistant", "", {"tool_calls": CALL}),
    ("tool", "the mat"),
    ("assistant", "the cat"),
)
THINKING = {"records": [exchange("What?", "the hat"), THOUGHT], "settings": {"template": "qwen3"}}
THINK, END_THINK = "<think>", "</think>"


def of_turn(turn, change):
    def to_sample(samples):
        change(next(sample for sample in samples["train"] if sample.origin[1:] == [2, turn]))

    return to_sample


def train_before(tokens):
    """Train so many tokens before the trained stretch too."""
    return lambda sample: sample.train(*range(sample.trained[0] - tokens, sample.trained[0]))


NOT_THE_ANSWER = "a trained stretch is not the answer of its turn"
# The empty think block is <think> \n\n </think> \n\n: in the tiny tokenizer six tokens.
OF_REASONING = [
    Damage("the empty think block trained", of_turn(5, train_before(6)), NOT_THE_ANSWER, **THINKING),
    Damage("the end of the empty think block trained", of_turn(5, train_before(2)), BEGINS, **THINKING),
    Damage("reasoning untrained", of_turn(1, lambda s: s.train(*s.trained[:-3], on=False)), BEGINS, **THINKING),
    Damage(
        "an answer trained again",
        of_turn(3, lambda s: s.train(s.starts[2] - 3)),
        "tokens of a assistant message that is not trained are trained",
        **THINKING,
    ),
    Damage(
        "a tool call left out of an answer",
        of_turn(3, lambda s: s.remove(slice(s.trained[0], s.trained[-1]))),
        DECODES,
        **THINKING,
    ),
    Damage("a turn under another number", of_turn(5, renumbered), "a turn is there", **THINKING),
]
LONG = {"text": "the cat and the hat sat on the mat"}
SPLIT = {"records": [exchange("a", "b"), LONG], "settings": {"too_long": "split", "block_size": 4}}


def without_piece(piece):
    def change(samples):
        found = [at for at, sample in enumerate(samples["train"]) if sample.origin[1:] == [2, piece]]
        del samples["train"][found[0]]

    return change


OF_PIECES = [
    Damage("the first piece missing", without_piece(0), OF_TEXT, **SPLIT),
    Damage("a piece missing", without_piece(1), OF_TEXT, **SPLIT),
]
DAMAGES = [*OF_LABELS, *OF_IDS, *OF_WEIGHTS, *OF_REASONING, *OF_PIECES]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_what_is_wrong_with_a_sample_is_found_at_its_line(tmp_path, damage):
    prepare(tmp_path, damage.records, val_fraction=0, **damage.settings)
    assert audit(tmp_path, **damage.settings)[1] == []
    samples = read_samples(tmp_path / "data")
    damage.change(samples)
    write_samples(tmp_path / "data", samples, weights=damage.weights)
    line = damage.record + (damage.records is PLAIN and damage.record > 1)
    (problem,) = audit(tmp_path, **damage.settings)[1]
    assert problem.startswith(f"{tmp_path}/input.jsonl:{line}: {damage.problem}")


def test_cut_data_may_end_on_an_answer_and_nowhere_else(tmp_path):
    prepare(tmp_path, PLAIN, val_fraction=0, too_long="cut")
    whole = read_samples(tmp_path / "data")

    def problems(tokens_of):
        samples = {split: [sample.copy() for sample in of_split] for split, of_split in whole.items()}
        sample = samples["train"][1]
        sample.remove(slice(tokens_of(sample), None))
        write_samples(tmp_path / "data", samples, weights=False)
        return audit(tmp_path, too_long="cut")[1]

    where = f"{tmp_path}/input.jsonl:3: "
    assert problems(lambda s: s.starts[RESULT]) == problems(lambda s: s.starts[AGAIN]) == []
    for block in (UNTRAINED, LAST):
        assert problems(lambda s, block=block: s.starts[block]) == [where + "turns are missing"]
    assert problems(lambda s: s.starts[AGAIN] - 1) == [where + DECODES]


def test_ids_without_a_control_token_are_found_in_cut_data(tmp_path):
    prepare(tmp_path, PLAIN, val_fraction=0, too_long="cut")
    samples = read_samples(tmp_path / "data")
    samples["train"][0].ids = [70] * len(samples["train"][0].ids)
    samples["train"][0].train(*samples["train"][0].trained)
    write_samples(tmp_path / "data", samples, weights=False)
    assert audit(tmp_path, too_long="cut")[1] == [f"{tmp_path}/input.jsonl:1: turns are missing"]


def test_a_sample_of_no_record_is_found(tmp_path):
    prepare(tmp_path, PLAIN, val_fraction=0)
    samples = read_samples(tmp_path / "data")
    samples["train"][0].origin[1] = 0
    write_samples(tmp_path / "data", samples, weights=False)
    assert audit(tmp_path)[1] == [f"{tmp_path}/input.jsonl: there is no record 0"]


def test_a_sample_of_a_record_that_cannot_be_read_is_found(tmp_path):
    prepare(tmp_path, [{"text": "the hat"}, *PLAIN], val_fraction=0)
    (tmp_path / "input.jsonl").write_bytes((tmp_path / "input.jsonl").read_bytes().replace(b'the hat"', b"\xff", 1))
    assert audit(tmp_path)[1] == [f"{tmp_path}/input.jsonl:1: it was written, but cannot be read again"]


def test_an_input_that_changes_meanwhile_is_found(tmp_path):
    prepare(tmp_path, PLAIN, val_fraction=0)
    lines = (tmp_path / "input.jsonl").read_bytes().splitlines()
    (tmp_path / "input.jsonl").write_bytes(b"\n".join([lines[0].replace(b"a cat", b"a mat"), *lines[1:]]))
    assert audit(tmp_path)[1] == [f"{tmp_path}/input.jsonl:1: {DECODES}"]


def test_a_passed_audit_counts_what_is_there(tmp_path):
    decomposed = "cafe\u0301"
    records = [
        *(exchange("cat", "hat") for _ in range(2)),  # 3 trained turns, the second record a copy
        dialogue(("user", "a"), ("assistant", decomposed), ("user", decomposed), ("assistant", "cafe")),
        {"text": "the mat"},
        dialogue(("user", "nobody answers")),
    ]
    data = prepare(tmp_path, records, val_fraction=0)
    labels = data.splits["train"].labels
    assert data.meta["audit"] == {
        "passed": True,
        "conversations": 3,
        "samples": 3,
        "tokens": len(labels),
        "trained_tokens": int((labels >= 0).sum()),
        "trained_turns": 3,
        "normalised_turns": 1,
    }
    counts, problems = audit(tmp_path)
    assert problems == []
    assert {"passed": True, **counts} == data.meta["audit"]


def test_the_audit_of_reasoning_counts_a_turn_for_each_sample(tmp_path):
    data = prepare(tmp_path, THINKING["records"], val_fraction=0, template="qwen3")
    told = data.meta["audit"]
    assert (told["conversations"], told["samples"], told["trained_turns"]) == (2, 4, 4)


def damaged_at_close(monkeypatch, change):
    """Change what was written, just before it is audited."""
    close = PreparedWriter.close

    def close_and_change(writer):
        close(writer)
        samples = read_samples(writer.folder)
        change(samples)
        write_samples(writer.folder, samples, weights=False)

    monkeypatch.setattr(PreparedWriter, "close", close_and_change)


def test_a_failed_audit_is_an_error_that_leaves_nothing(tmp_path, monkeypatch):
    damaged_at_close(monkeypatch, lambda samples: to_another_id(samples["train"][1]))
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, PLAIN, val_fraction=0)
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("the audit did not pass, nothing was prepared")
    assert second == f"  {tmp_path}/input.jsonl:3: {LABEL}"
    assert caught.value.exit_status != 0
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "change",
    [lambda samples: samples["train"].pop(), lambda samples: samples["train"][-1].origin.__setitem__(1, 99)],
    ids=["a sample missing", "a sample of a record beyond the last"],
)
def test_what_was_written_and_not_found_again_is_an_error(tmp_path, monkeypatch, change):
    damaged_at_close(monkeypatch, change)
    with pytest.raises(UserError, match="samples: written 3, found 2") as caught:
        prepare(tmp_path, PLAIN, val_fraction=0)
    assert "tokens: written" in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_a_failed_audit_tells_the_first_ten_problems(tmp_path, monkeypatch):
    damaged_at_close(monkeypatch, lambda samples: [to_another_id(sample) for sample in samples["train"]])
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, [exchange(f"What is {i}?", "a cat") for i in range(20)], val_fraction=0)
    told = str(caught.value).splitlines()[1:]
    assert told == [f"  {tmp_path}/input.jsonl:{line}: {LABEL}" for line in range(1, 11)]
