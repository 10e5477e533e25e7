"""What meta.json and the offsets say of prepared data, as tables to print or to put on a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sft.arrays import SPLITS, PreparedData

HISTOGRAM_BARS = 32
WHOLE = {"records": "read", "conversations": "read", "tokens": "total"}  # what a share is a share of


class Table(NamedTuple):
    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]  # each as long as the head


class Histogram(NamedTuple):
    """How many samples have edges[i] <= tokens < edges[i + 1]: of all kinds, and of trained ones alone."""

    edges: list[int]
    tokens: list[int]
    trained: list[int]


def tables(data: PreparedData) -> list[Table]:
    """Every table that has a row."""
    meta = data.meta
    ledger = meta.get("ledger", {})
    found = [
        splits_table(data),
        *(share_table(name, ledger.get(name, {}), whole) for name, whole in WHOLE.items()),
        lengths_table(meta),
        sources_table(meta),
        Table("noticed", ("what", "conversations", "first"), list(noticed_rows(meta.get("noticed", {})))),
        leaks_table(meta.get("leaks", {})),
        Table("bad records", ("the first of them",), [(text,) for text in meta.get("bad_records", [])]),
    ]
    return [table for table in found if table.rows]


def splits_table(data: PreparedData) -> Table:
    counts = data.meta.get("ledger", {}).get("splits", {})
    rows = []
    for split in SPLITS:
        tokens, trained = len(data.splits[split].labels), counts.get(split, {}).get("trained_tokens", 0)
        rows.append((split, f"{len(data.splits[split]):,}", f"{tokens:,}", f"{trained:,}", share(trained, tokens)))
    return Table("samples", ("split", "samples", "tokens", "trained", "share"), rows)


def share_table(title: str, counts: Mapping[str, Any], whole: str) -> Table:
    """Each count and its share of the one that the others are part of."""
    total = counts.get(whole, 0)
    rows = [
        (name, f"{count:,}", "" if name == "bad bytes" else share(count, total)) for name, count in flattened(counts)
    ]
    return Table(title, ("what", title, "share"), rows)


def flattened(counts: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """{"masked": {"user": 3}} as ("masked user", 3)."""
    for name, value in counts.items():
        words = name.replace("_", " ")
        if isinstance(value, Mapping):
            yield from ((f"{words} {inner}", count) for inner, count in flattened(value))
        else:
            yield words, value


def lengths_table(meta: Mapping[str, Any]) -> Table:
    names = ("min", "median", "mean", "p95", "max")
    told = {split: found for split, found in meta.get("lengths", {}).items() if found}
    rows = [(split, *(f"{found[name]:,.10g}" for name in names)) for split, found in told.items()]
    return Table("tokens per sample", ("split", *names), rows)


def sources_table(meta: Mapping[str, Any]) -> Table:
    counts = ("records", "conversations", "samples", "tokens", "trained_tokens")
    rows = [
        (source["path"], f"{source.get('weight', 1):g}", *(f"{source.get(name, 0):,}" for name in counts))
        for source in meta.get("sources", [])
    ]
    return Table("sources", ("path", "weight", *(name.replace("_", " ") for name in counts)), rows)


def noticed_rows(noticed: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, found in noticed.items():
        if found["conversations"]:
            yield name.replace("_", " "), f"{found['conversations']:,}", ", ".join(found.get("first", []))


def leaks_table(leaks: Mapping[str, Any]) -> Table:
    """The first of the validation conversations that were dropped for being in training; the title counts all."""
    title = f"dropped from validation for being in training: {leaks.get('conversations', 0):,}"
    title += f", {leaks.get('exact', 0):,} of them exactly"
    rows = [(leak["validation"], leak["training"], f"{leak['similarity']:.1%}") for leak in leaks.get("first", [])]
    return Table(title, ("the first of them", "in training", "similarity"), rows)


def settings_table(meta: Mapping[str, Any]) -> Table:
    origins = meta.get("settings_origins", {})
    rows = [(name, repr(value), origins.get(name, "")) for name, value in meta.get("settings", {}).items()]
    return Table("settings", ("setting", "value", "from"), rows)


def audit_line(meta: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the data was proved to be what it should be, and a sentence about it."""
    audit = meta.get("audit")
    if not audit:
        return False, "none: the trainer refuses this data; run prepare_sft.py again"
    counts = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in audit.items() if type(value) is int)
    if audit.get("passed") is not True:
        return False, f"not passed: the trainer refuses this data; run prepare_sft.py again ({counts})"
    return True, f"passed: {counts}"


def histogram(data: PreparedData) -> Histogram:
    """The lengths of all samples from their offsets, and their trained tokens by weight."""
    lengths = np.concatenate([data.splits[split].lengths for split in SPLITS])
    trained = np.concatenate([data.splits[split].targets for split in SPLITS])
    if len(lengths) == 0:
        return Histogram([], [], [])
    shortest, longest = max(1, int(min(lengths.min(), trained.min()))), int(lengths.max())
    edges = bar_edges(shortest, longest)
    counts = [np.histogram(values.clip(shortest, longest), edges)[0].tolist() for values in (lengths, trained)]
    return Histogram(edges, counts[0], counts[1])


def bar_edges(shortest: int, longest: int) -> list[int]:
    """Where bars begin and the last one ends: evenly, or in half powers of two where the lengths differ widely."""
    end = longest + 1
    if end - shortest <= HISTOGRAM_BARS or longest < 8 * shortest:
        step = -(-(end - shortest) // HISTOGRAM_BARS)
        inner = list(range(shortest, end, step))
        return [*inner, inner[-1] + step]
    powers = [round(2 ** (half / 2)) for half in range(2 * end.bit_length() + 1)]
    first = max(i for i, power in enumerate(powers) if power <= shortest)
    last = min(i for i, power in enumerate(powers) if power >= end)
    return sorted(set(powers[first : last + 1]))


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""
