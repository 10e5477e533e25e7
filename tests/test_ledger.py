import copy
import dataclasses

import numpy as np
import pytest

from sft import ledger
from sft.arrays import Samples
from sft.samples import NOT_TRAINED


def split_of(labels, sources):
    """A split whose samples are the given labels; ids are counted up, a trained label is its id."""
    offsets = np.cumsum([0, *map(len, labels)])
    ids = np.arange(offsets[-1], dtype=np.int32)
    flat = np.where(np.concatenate([*labels, []]) == 1, ids, NOT_TRAINED).astype(np.int32)
    origins = np.array([(source, number, -1) for number, source in enumerate(sources, 1)]).reshape(-1, 3)
    targets = np.array([sum(each[1:]) for each in labels], dtype=np.float64)
    return Samples(ids, flat, offsets, targets, origins, weights=None)


SPLITS = {
    "train": split_of([[0, 0, 1, 1], [0, 1], [0, 0, 1]], [0, 1, 1]),
    "val": split_of([[0, 1, 1]], [0]),
}
META = {
    "sources": [
        {"path": "a", "weight": 0.5, "records": 4, "conversations": 3, "samples": 2, "tokens": 7, "trained_tokens": 4},
        {"path": "b", "weight": 2.0, "records": 3, "conversations": 3, "samples": 2, "tokens": 5, "trained_tokens": 2},
    ],
    "ledger": {
        "records": {"read": 7, "bad": 1, "bad_bytes": 9},
        "conversations": {
            **{"read": 6, "kept": 3, "too_long": 1, "no_trained_token": 0, "duplicate": 1, "in_training": 1},
            **{"shortened": 1, "expanded": 1},
        },
        "tokens": {
            **{"total": 40, "trained": 6, "template": 1, "repeated_history": 1, "cut": 3},
            "masked": {"system": 0, "user": 3, "assistant": 1, "tool": 0, "text": 0},
            "dropped": {"too_long": 20, "no_trained_token": 0, "duplicate": 3, "in_training": 2},
        },
        "splits": {
            "train": {"samples": 3, "tokens": 9, "trained_tokens": 4},
            "val": {"samples": 1, "tokens": 3, "trained_tokens": 2},
        },
    },
    "audit": {"passed": True, "samples": 4, "tokens": 12},
    "max_id": 8,
}


def problems_after(*changes):
    """The problems of META with (dotted name, new value) put in; None takes it out."""
    meta = copy.deepcopy(META)
    for name, value in changes:
        *path, last = (int(part) if part.isdigit() else part for part in name.split("."))
        inner = meta
        for part in path:
            inner = inner[part]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    return ledger.problems(meta, SPLITS)


def test_a_ledger_that_adds_up_to_the_arrays_has_no_problem():
    assert problems_after() == []
    assert problems_after(("sources.0.weight", None)) == []


EVERY_COUNT = [
    *(f"ledger.{name}" for name in ledger.names_of(ledger.SHAPE)),
    *(f"sources.{number}.{name}" for number in (0, 1) for name in ledger.PER_SOURCE),
]


def test_all_counts_of_the_contract_are_named():
    assert set(ledger.names_of(ledger.SHAPE)) == set(ledger.counts_of(META["ledger"]))


@pytest.mark.parametrize("name", EVERY_COUNT)
@pytest.mark.parametrize("value", [None, -1, 1.0, "3", True])
def test_every_count_has_to_be_there_and_to_be_a_count(name, value):
    (problem,) = problems_after((name, value))
    place = name.removeprefix("ledger.").replace("sources.0", "sources[0]").replace("sources.1", "sources[1]")
    assert place in problem
    assert problem.endswith("; run prepare_sft.py again")


UNBOUND = ("records.read", "records.bad", "records.bad_bytes", "conversations.shortened", "conversations.expanded")
BOUND = [name for name in EVERY_COUNT if not name.endswith((*UNBOUND, ".records", ".conversations"))]


@pytest.mark.parametrize("name", BOUND)
def test_a_count_that_is_one_too_high_is_noticed(name):
    inner = META
    for part in name.split("."):
        inner = inner[int(part) if part.isdigit() else part]
    assert problems_after((name, inner + 1))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ([("audit", None)], "it has no audit"),
        ([("audit.passed", False)], "its audit did not pass"),
        ([("audit.passed", 1)], "its audit did not pass"),
        ([("audit.samples", 3)], "its audit is of 3 samples, the arrays hold 4"),
        ([("audit.tokens", 11)], "its audit is of 11 tokens, the arrays hold 12"),
        ([("ledger", None)], "it has no ledger"),
        ([("sources", None)], "it has no list of sources"),
        ([("ledger.tokens.total", 41)], "its ledger does not add up: tokens.total is 41, its parts come to 40"),
        (
            [("ledger.conversations.kept", 4)],
            "its ledger does not add up: conversations.read is 6, kept and dropped come to 7",
        ),
        (
            [("ledger.tokens.masked.user", 4), ("ledger.tokens.cut", 2)],
            "its ledger does not add up: kept tokens is 13, the splits come to 12",
        ),
        (
            [("ledger.tokens.trained", 5), ("ledger.tokens.template", 2)],
            "its ledger does not add up: tokens.trained is 5, the splits come to 6",
        ),
        ([("ledger.records.bad", 2)], "its ledger does not add up: more conversations were read than good records"),
        ([("sources.0.samples", 1), ("sources.1.samples", 3)], "sources[0].samples is 1, the origins name it 2 times"),
        ([("sources.1.tokens", 6)], "its sources have 13 tokens, the splits 12"),
        ([("sources.0.weight", 0)], "sources[0].weight is 0, not a number above 0"),
        ([("sources.0.weight", float("nan"))], "sources[0].weight is nan, not a number above 0"),
        (
            [("sources.0.weight", 0.4), ("sources.1.weight", 0.2)],
            "the weights of its sources leave no sample for an epoch",
        ),
    ],
)
def test_what_is_wrong_is_said(changes, problem):
    assert f"{problem}; run prepare_sft.py again" in problems_after(*changes)


def test_sums_that_fit_each_other_and_not_the_arrays_are_noticed():
    changes = [("ledger.splits.train", {"samples": 2, "tokens": 8, "trained_tokens": 3})]
    changes += [("ledger.splits.val", {"samples": 2, "tokens": 4, "trained_tokens": 3})]
    assert [problem.split(";")[0] for problem in problems_after(*changes)] == [
        f"its ledger's splits.{split}.{name} is {told}, the arrays hold {held}"
        for split, name, told, held in [
            *(("train", "samples", 2, 3), ("train", "tokens", 8, 9), ("train", "trained_tokens", 3, 4)),
            *(("val", "samples", 2, 1), ("val", "tokens", 4, 3), ("val", "trained_tokens", 3, 2)),
        ]
    ]


def test_a_source_that_nobody_listed_is_noticed():
    meta = {**META, "sources": META["sources"][:1]}
    assert any(
        "origins of train name a source that is not in its list" in each for each in ledger.problems(meta, SPLITS)
    )


def test_trained_tokens_are_counted_over_the_ends_of_the_parts(monkeypatch):
    monkeypatch.setattr(ledger, "LABELS_AT_ONCE", 3)
    labels = np.array([NOT_TRAINED, 0, 5, NOT_TRAINED, 7, 8, 9, NOT_TRAINED])
    assert ledger.trained_tokens(labels) == 5
    assert ledger.trained_tokens(labels[:0]) == 0


def with_one_changed(part, at, value):
    changed = np.array(getattr(SPLITS["train"], part))
    changed[at] = value
    return {part: changed}


WEIGHTS = np.array([0, 0, 1, 0.5, 0, 1, 0, 0, 2], np.float32)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (with_one_changed("labels", 2, 3), "labels that are neither their token nor -100"),
        (with_one_changed("labels", 2, -5), "labels that are neither their token nor -100"),
        (with_one_changed("input_ids", 0, 9), "ids that are not from 0 to max_id"),
        (with_one_changed("input_ids", 0, -1), "ids that are not from 0 to max_id"),
        (with_one_changed("targets", 1, 2), "targets that are not the sum"),
        (with_one_changed("targets", 1, np.inf), "targets that are not the sum"),
        ({"weights": WEIGHTS}, "targets that are not the sum"),
        ({"weights": -WEIGHTS, "targets": np.array([-1.5, -1, -2])}, "weights that are not above 0"),
        ({"weights": WEIGHTS * np.nan}, "weights that are not above 0"),
    ],
)
def test_samples_that_contradict_themselves_are_refused(changes, problem, monkeypatch):
    monkeypatch.setattr(ledger, "LABELS_AT_ONCE", 3)  # fewer tokens than the first sample has
    splits = {**SPLITS, "train": dataclasses.replace(SPLITS["train"], **changes)}
    assert [found for found in ledger.problems(META, splits) if f"train holds {problem}" in found]
    fine = dataclasses.replace(SPLITS["train"], weights=WEIGHTS, targets=np.array([1.5, 1, 2]))
    assert ledger.problems(META, {**SPLITS, "train": fine}) == []
