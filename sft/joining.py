"""Joins rendered chunks in order: what repeats is dropped, what is kept is written, and all of it is counted."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Literal

import numpy as np

from sft.arrays import SPLITS
from sft.duplicates import Seen
from sft.errors import UserError, listed
from sft.preparation import Bad, Recipe, Rendered
from sft.prepared_writer import PreparedWriter
from sft.samples import NOT_TRAINED
from sft.tally import DUPLICATE, IN_TRAINING, Ledger

BadRecordsChoice = Literal["error", "skip"]


class BadRecords:
    """What is wrong with the input: told together where it is an error, counted up to a share where it is skipped."""

    FIRST = 10  # are told
    ENOUGH = 1_000  # records, before a share of them is judged

    def __init__(self, choice: BadRecordsChoice, max_fraction: float):
        self.choice, self.max_fraction = choice, max_fraction
        self.first: list[str] = []
        self.read = self.bad = 0
        self.is_error = False

    def enter(self, name: str, read: int, bad: Iterable[Bad], errors: Iterable[Bad]) -> None:
        """Records of a source; `errors` and what ends a file are never skipped. UserError where there is plenty."""
        skipped = self.choice == "skip"
        self.read += read
        for is_error, problems in ((not skipped, bad), (True, errors)):
            for problem in problems:
                self.is_error |= is_error or problem.is_file
                self.bad += not (is_error and skipped)
                if len(self.first) < self.FIRST:
                    self.first.append(f"{name}:{problem.line}: {problem.message}")
        if self.is_error and len(self.first) == self.FIRST:
            raise listed(f"the input cannot be used (the first {self.FIRST} problems):", self.first)
        if self.read >= self.ENOUGH:
            self.judge_share()

    def complain(self) -> None:
        """UserError where the input, which is now read to the end, cannot be used."""
        if self.is_error:
            raise listed("the input cannot be used:", self.first)
        self.judge_share()

    def judge_share(self) -> None:
        if self.choice == "skip" and self.bad > self.max_fraction * self.read:
            share = f"{self.bad:,} of the first {self.read:,} records are bad, more than max_bad_fraction"
            raise listed(f"{share} {self.max_fraction:g} allows; mend them or raise it. The first:", self.first)


class Joining:
    """The chunks of all sources, taken in order, on their way to the disk."""

    FIRST_LINES = 10  # are told of whatever is noticed

    def __init__(
        self,
        recipe: Recipe,
        writer: PreparedWriter,
        *,
        bad_records: BadRecords,
        leaked: Collection[tuple[int, int]],
        max_samples: int | None,
    ):
        """`leaked`: source and record of validation conversations that are in training."""
        self.recipe, self.writer, self.bad_records = recipe, writer, bad_records
        self.leaked, self.max_samples = leaked, max_samples
        self.seen = Seen()
        self.ledger = Ledger(len(recipe.sources), SPLITS)
        self.noticed: dict[str, dict[str, Any]] = {}

    def take(self, rendered: Rendered) -> None:
        name = self.recipe.sources[rendered.source].name
        self.bad_records.enter(name, rendered.read, rendered.bad, rendered.too_long)
        self.ledger.enter_records(rendered.source, rendered.read, rendered.bad)
        if not len(rendered.records):
            return
        is_leaked = np.zeros(len(rendered.records), bool)
        if self.leaked:
            is_leaked[:] = [(rendered.source, record) in self.leaked for record in rendered.records.tolist()]
        is_repeated = np.zeros(len(is_leaked), bool)
        is_repeated[~is_leaked] = ~self.seen.add(rendered.digests[~is_leaked])
        fate = rendered.fate.astype(np.int64)
        fate[is_leaked[rendered.conversation]] = IN_TRAINING
        fate[is_repeated[rendered.conversation]] = DUPLICATE
        conversations = self.wanted(rendered, fate == 0)
        samples = int(np.searchsorted(rendered.conversation, conversations))
        split = rendered.is_val[rendered.conversation[:samples]].astype(np.int64)
        self.ledger.enter(rendered, conversations, fate[:samples], split)
        self.notice(name, rendered, conversations)
        if not self.bad_records.is_error:  # otherwise nothing will be left of it
            for number, split_name in enumerate(SPLITS):
                self.write(rendered, split_name, (fate[:samples] == 0) & (split == number))

    @property
    def is_full(self) -> bool:
        return self.max_samples is not None and self.kept >= self.max_samples

    @property
    def kept(self) -> int:
        return sum(counts["samples"] for counts in self.ledger.splits.values())

    def wanted(self, rendered: Rendered, kept: np.ndarray) -> int:
        """How many conversations of the chunk count: all, or those up to the one that makes max_samples full."""
        count = len(rendered.records)
        if self.max_samples is None:
            return count
        so_far = self.kept + np.cumsum(np.bincount(rendered.conversation, kept, count))
        return min(count, int(np.searchsorted(so_far, self.max_samples)) + 1)

    def write(self, rendered: Rendered, split: str, chosen: np.ndarray) -> None:
        """The chosen samples of a chunk; only samples that fit have tokens."""
        if not chosen.any():
            return
        lengths = rendered.kinds.sum(axis=1)
        wanted = np.zeros(len(lengths), bool)
        wanted[: len(chosen)] = chosen
        conversation = rendered.conversation[wanted]
        source = np.full(len(conversation), rendered.source)
        tokens = slice(None) if wanted[lengths > 0].all() else np.repeat(wanted, lengths)
        labels = rendered.labels[tokens]
        weights = None if rendered.weights is None else rendered.weights[tokens]
        if weights is not None and (weights == (labels != NOT_TRAINED)).all():
            weights = None  # those that differ from 1 are of samples that were not chosen
        self.writer.add_samples(
            split,
            rendered.input_ids[tokens],
            labels,
            lengths=lengths[wanted],
            targets=rendered.targets[wanted],
            origins=np.stack([source, rendered.records[conversation], rendered.turn[wanted]], axis=1),
            weights=weights,
        )

    def notice(self, name: str, rendered: Rendered, conversations: int) -> None:
        for index, what in rendered.noticed:
            if index < conversations:
                told = self.noticed.setdefault(what, {"conversations": 0, "first": []})
                told["conversations"] += 1
                if len(told["first"]) < self.FIRST_LINES:
                    told["first"].append(f"{name}:{rendered.lines[index]}")

    def complain(self) -> None:
        """UserError where the data cannot be used, now that all is read."""
        self.bad_records.complain()
        if self.ledger.splits["train"]["samples"] == 0:
            counts = ", ".join(f"{name} {count:,}" for name, count in self.ledger.conversations.items())
            names = ", ".join(source.name for source in self.recipe.sources)
            raise UserError(f"{names}: nothing is left to train on; conversations: {counts}")
