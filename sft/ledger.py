"""The ledger of prepared data, checked: every token is accounted for once, and the arrays hold what it says."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sft.arrays import AGAIN, SPLITS, Samples
from sft.samples import NOT_TRAINED

DROPPED = ("too_long", "no_trained_token", "duplicate", "in_training")  # what becomes of a conversation, if not "kept"
MASKED = ("system", "user", "assistant", "tool", "text")
PER_SPLIT = ("samples", "tokens", "trained_tokens")
PER_SOURCE = ("records", "conversations", *PER_SPLIT)
SHAPE: dict[str, Any] = {  # a tuple names counts
    "records": ("read", "bad", "bad_bytes"),
    "conversations": ("read", "kept", *DROPPED, "shortened", "expanded"),
    "tokens": {
        "": ("total", "trained", "template", "repeated_history", "cut"),
        "masked": MASKED,
        "dropped": DROPPED,
    },
    "splits": dict.fromkeys(SPLITS, PER_SPLIT),
}
LABELS_AT_ONCE = 2**24
SUMS_AGREE = 1e-9  # relative; weights are summed in another order


def problems(meta: Mapping[str, Any], splits: Mapping[str, Samples]) -> list[str]:
    """Why the data is not proved: its ledger, its sources or its audit is missing, in error, or of other arrays.

    Reads all ids and labels: nothing less than that tells trained tokens.
    """
    found = [*audit_problems(meta, splits), *shape_problems(meta)]
    if not found:
        counts = counts_of(meta["ledger"])
        found = [*sum_problems(counts), *array_problems(counts, splits), *source_problems(meta, counts, splits)]
    for split, samples in splits.items():
        found += sample_problems(split, samples, meta["max_id"])
    return [f"{problem}; {AGAIN}" for problem in found]


def audit_problems(meta: Mapping[str, Any], splits: Mapping[str, Samples]) -> Iterator[str]:
    audit = meta.get("audit")
    if not isinstance(audit, Mapping):
        yield "it has no audit"
        return
    if audit.get("passed") is not True:
        yield "its audit did not pass"
        return
    for name, held in (
        ("samples", sum(map(len, splits.values()))),
        ("tokens", sum(len(samples.input_ids) for samples in splits.values())),
    ):
        if (told := audit.get(name)) != held:
            yield f"its audit is of {reprlib.repr(told)} {name}, the arrays hold {held:,}"


def counts_of(ledger: Mapping[str, Any]) -> dict[str, Any]:
    """Every count of a ledger by its dotted name, as tokens.masked.user."""
    counts: dict[str, Any] = {}
    for name, value in ledger.items():
        if isinstance(value, Mapping):
            counts |= {f"{name}.{inner}": count for inner, count in counts_of(value).items()}
        else:
            counts[name] = value
    return counts


def names_of(shape: Mapping[str, Any]) -> Iterator[str]:
    """The dotted names of all counts that a ledger has."""
    for name, inner in shape.items():
        prefix = f"{name}." if name else ""
        yield from (prefix + each for each in (names_of(inner) if isinstance(inner, Mapping) else inner))


def is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def shape_problems(meta: Mapping[str, Any]) -> Iterator[str]:
    """What is missing, or no number of things."""
    ledger, sources = meta.get("ledger"), meta.get("sources")
    if not isinstance(ledger, Mapping):
        yield "it has no ledger"
    else:
        counts = counts_of(ledger)
        yield from (f"its ledger has no {name}" for name in names_of(SHAPE) if name not in counts)
        yield from (
            f"its ledger's {name} is {reprlib.repr(count)}" for name, count in counts.items() if not is_count(count)
        )
    if not isinstance(sources, list) or not all(isinstance(source, Mapping) for source in sources):
        yield "it has no list of sources"
        return
    for number, source in enumerate(sources):
        for name in PER_SOURCE:
            if not is_count(source.get(name)):
                yield f"sources[{number}].{name} is {reprlib.repr(source.get(name))}"
        weight = source.get("weight", 1)
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            yield f"sources[{number}].weight is {reprlib.repr(weight)}, not a number above 0"


def sum_problems(counts: Mapping[str, int]) -> Iterator[str]:
    """Where the ledger does not add up."""

    def total(name: str) -> int:
        return sum(counts[f"splits.{split}.{name}"] for split in SPLITS)

    def parts(prefix: str, *names: str) -> int:
        return sum(counts[f"{prefix}.{name}"] for name in names)

    tokens = sum(count for name, count in counts.items() if name.startswith("tokens.") and name != "tokens.total")
    masked = parts("tokens.masked", *MASKED)
    kept = parts("tokens", "trained", "template", "repeated_history") + masked
    for name, told, what, sums in (
        ("tokens.total", counts["tokens.total"], "its parts come to", tokens),
        ("conversations.read", counts["conversations.read"], "kept and dropped come to", kept_and_dropped(counts)),
        ("kept tokens", kept, "the splits come to", total("tokens")),
        ("tokens.trained", counts["tokens.trained"], "the splits come to", total("trained_tokens")),
    ):
        if told != sums:
            yield f"its ledger does not add up: {name} is {told:,}, {what} {sums:,}"
    if counts["conversations.read"] > counts["records.read"] - counts["records.bad"]:
        yield "its ledger does not add up: more conversations were read than good records"


def kept_and_dropped(counts: Mapping[str, int]) -> int:
    return sum(counts[f"conversations.{name}"] for name in ("kept", *DROPPED))


def array_problems(counts: Mapping[str, int], splits: Mapping[str, Samples]) -> Iterator[str]:
    """Where the arrays hold something else than the ledger says."""
    for split, samples in splits.items():
        held = (len(samples), len(samples.input_ids), trained_tokens(samples.labels))
        for name, found in zip(PER_SPLIT, held, strict=True):
            if (told := counts[f"splits.{split}.{name}"]) != found:
                yield f"its ledger's splits.{split}.{name} is {told:,}, the arrays hold {found:,}"


def trained_tokens(labels: np.ndarray) -> int:
    """How many labels are trained; a part at a time, so that a memory map stays one."""
    starts = range(0, len(labels), LABELS_AT_ONCE)
    return sum(int(np.count_nonzero(labels[start : start + LABELS_AT_ONCE] != NOT_TRAINED)) for start in starts)


def sample_problems(split: str, samples: Samples, max_id: int) -> Iterator[str]:
    """Where what is held of each sample contradicts itself: ids, labels, weights and the sum of the target weights."""
    found = dict.fromkeys(("ids", "labels", "weights", "targets"), False)
    offsets, begin = samples.offsets, 0
    while begin < len(samples):
        end = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + LABELS_AT_ONCE, "right")) - 1)
        span, starts = slice(offsets[begin], offsets[end]), offsets[begin:end] - offsets[begin]
        ids, labels = samples.input_ids[span], samples.labels[span]
        trained = labels != NOT_TRAINED
        weights = trained if samples.weights is None else samples.weights[span]
        summed = weights.astype(np.float64)
        summed[starts] = 0  # nothing predicts the first token
        found["ids"] |= not 0 <= int(ids.min()) <= int(ids.max()) <= max_id
        found["labels"] |= bool(((labels != ids) & trained).any())
        found["weights"] |= bool(((weights > 0) != trained).any() or not np.isfinite(weights).all())
        sums = np.add.reduceat(summed, starts)
        found["targets"] |= not np.allclose(sums, samples.targets[begin:end], rtol=SUMS_AGREE, atol=0)
        begin = end
    told = {
        "ids": f"ids that are not from 0 to max_id ({max_id})",
        "labels": f"labels that are neither their token nor {NOT_TRAINED}",
        "weights": "weights that are not above 0 just where a token is trained",
        "targets": "targets that are not the sum of their sample's weights",
    }
    yield from (f"{split} holds {told[name]}" for name, is_so in found.items() if is_so)


def source_problems(meta: Mapping[str, Any], counts: Mapping[str, int], splits: Mapping[str, Samples]) -> Iterator[str]:
    """Where the sources do not make up the splits, and where their weights leave nothing to train on."""
    sources = meta["sources"]
    for name in PER_SPLIT:
        told, whole = sum(source[name] for source in sources), sum(counts[f"splits.{split}.{name}"] for split in SPLITS)
        if told != whole:
            yield f"its sources have {told:,} {name.replace('_', ' ')}, the splits {whole:,}"
    held = {split: samples.origins[:, 0] for split, samples in splits.items()}
    if odd := [split for split, of in held.items() if len(of) and not 0 <= of.min() <= of.max() < len(sources)]:
        yield f"origins of {' and '.join(odd)} name a source that is not in its list"
        return
    samples = {split: np.bincount(of, minlength=len(sources)) for split, of in held.items()}
    for number, source in enumerate(sources):
        if (found := sum(int(of[number]) for of in samples.values())) != source["samples"]:
            yield f"sources[{number}].samples is {source['samples']:,}, the origins name it {found:,} times"
    weights = [source.get("weight", 1) for source in sources]
    if len(held["train"]) and not any(n * weight >= 0.5 for n, weight in zip(samples["train"], weights, strict=True)):
        yield "the weights of its sources leave no sample for an epoch"
