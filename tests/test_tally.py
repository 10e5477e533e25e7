import json

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft import ledger
from sft.arrays import verify_checksums
from sft.errors import UserError
from tests.preparing import dialogue, exchange, prepare, tokenizer_of

TEXT = st.sampled_from(["", "cat", "the hat", "<|im_end|>", "\n", "cafe\u0301", "the cat and the hat sat on the mat"])
MARKS = st.sampled_from([{}, {}, {"train": False}, {"weight": 0.5}, {"loss_weight": 2}])
THOUGHTS = st.sampled_from([{}, {}, {"reasoning_content": "the mat"}])
CALLS = st.sampled_from([{}, {}, {"tool_calls": [{"name": "f", "arguments": {"a": 1}}]}])
ANSWER = st.tuples(st.just("assistant"), TEXT, st.builds(lambda *parts: dict_of(parts), MARKS, THOUGHTS, CALLS))
OTHER = st.tuples(st.sampled_from(["system", "user", "user", "tool"]), TEXT)


def dict_of(parts):
    return {key: value for part in parts for key, value in part.items()}


TOOLS = st.sampled_from([{}, {"tools": [{"name": "f", "parameters": {}}]}])
DIALOGUE = st.builds(
    lambda turns, tools: dialogue(*turns, **tools), st.lists(ANSWER | OTHER, min_size=1, max_size=6), TOOLS
)
RECORD = DIALOGUE | st.builds(exchange, TEXT, TEXT) | st.fixed_dictionaries({"text": TEXT}) | st.just({"text": 1})
GROUPED = st.builds(lambda record, group: {**record, "group": group}, RECORD, st.sampled_from("abc"))
SETTINGS = st.fixed_dictionaries(
    {
        "template": st.sampled_from(["chatml", "qwen3"]),
        "train_on": st.sampled_from(["assistant", "last", "all"]),
        "too_long": st.sampled_from(["drop", "cut", "cut", "split", "split", "error"]),
        "block_size": st.sampled_from([2, 9, 15, 30, 60, 400]),
        "bad_records": st.sampled_from(["skip", "skip", "skip", "error"]),
        "max_bad_fraction": st.sampled_from([0.3, 1.0, 1.0, 1.0]),
        "val_fraction": st.sampled_from([0.0, 0.5]),
    },
    optional={
        "system_prompt": st.sampled_from(["", "Say."]),
        "max_samples": st.integers(1, 4),
        "group_by": st.just("group"),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(records=st.lists(GROUPED, min_size=1, max_size=8), chosen=SETTINGS)
def test_any_input_gives_a_ledger_that_adds_up_and_a_passed_audit_or_a_clear_error(tmp_path_factory, records, chosen):
    folder = tmp_path_factory.mktemp("any")
    outcome = outcome_of(folder, records, chosen)
    if isinstance(outcome, str):
        assert not (folder / "data").exists()
        assert "the audit did not pass" not in outcome
        assert "; " in outcome
    else:
        check(outcome, chosen)


def outcome_of(folder, records, chosen):
    """The data, or what the error says."""
    try:
        return prepare(folder, records, workers=1, **chosen)
    except UserError as error:
        return str(error)


def check(data, chosen):
    assert ledger.problems(data.meta, data.splits) == []
    verify_checksums(data)
    for samples in data.splits.values():
        assert (samples.lengths <= chosen["block_size"]).all()
        is_trained = samples.labels >= 0
        assert (samples.labels[is_trained] == samples.input_ids[is_trained]).all()
        weights = is_trained if samples.weights is None else samples.weights
        assert samples.weights is None or (weights[is_trained] != 1).any()
        sums = [weights[a:b].sum(dtype=np.float64) for a, b in zip(samples.offsets, samples.offsets[1:], strict=False)]
        np.testing.assert_allclose(samples.targets, sums, rtol=1e-12)
    both = [set(map(tuple, data.splits[split].origins[:, :2].tolist())) for split in ("train", "val")]
    assert both[0].isdisjoint(both[1])
    told = data.meta["ledger"]["records"]
    assert told["bad"] == len(data.meta["bad_records"])
    assert json.loads((data.folder / "meta.json").read_text()) == data.meta


def test_the_ledger_says_whose_the_masked_tokens_are(tmp_path):
    record = dialogue(
        ("system", "the"),
        ("user", "cat"),
        ("assistant", "hat", {"train": False}),
        ("tool", "mat"),
        ("assistant", "cat"),
    )
    text = {"text": "the cat"}
    data = prepare(tmp_path, [record, text], val_fraction=0)
    tokenizer = tokenizer_of(data)

    def count(text):
        return len(tokenizer.encode(text))

    tokens = data.meta["ledger"]["tokens"]
    assert tokens["masked"] == {
        "system": count("the"),
        "user": count("cat"),
        "assistant": count("hat"),
        "tool": count("<tool_response>\nmat\n</tool_response>"),
        "text": 1,
    }
    assert tokens["trained"] == count("cat") + 1 + count("the cat")  # with <|im_end|>, with the end of the text
    headers = count("system\n") + 2 * count("user\n") + 2 * count("assistant\n")
    assert tokens["template"] == 5 * 2 + headers + 5 * count("\n") - 1  # one end token is trained
    assert tokens["total"] == tokens["trained"] + tokens["template"] + sum(tokens["masked"].values())
    assert data.meta["sources"][0]["trained_tokens"] == tokens["trained"]


def test_a_conversation_of_which_one_sample_is_left_is_kept(tmp_path):
    long = {"reasoning_content": "the hat " * 50}  # no part of the history of the second sample
    record = dialogue(("user", "a"), ("assistant", "cat", long), ("user", "b"), ("assistant", "hat"))
    data = prepare(tmp_path, [record], val_fraction=0, template="qwen3", block_size=60)
    assert data.splits["train"].origins.tolist() == [[0, 1, 3]]
    conversations = data.meta["ledger"]["conversations"]
    assert (conversations["read"], conversations["kept"], conversations["too_long"]) == (1, 1, 0)
    assert data.meta["ledger"]["tokens"]["dropped"]["too_long"] > 50
