"""The ledger while it is being kept: what became of every record, conversation, sample and token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.ledger import DROPPED, PER_SOURCE, PER_SPLIT
from sft.preparation import FATES, KEPT, Bad, Rendered
from sft.samples import KINDS, MASKED, REPEATED, TEMPLATE, TRAINED

ALL_FATES = (FATES[KEPT], *DROPPED)
assert ALL_FATES[: len(FATES)] == FATES
DUPLICATE, IN_TRAINING = map(ALL_FATES.index, ("duplicate", "in_training"))


class Ledger:
    """Sums over chunks; everything but `total` adds up to the total."""

    def __init__(self, sources: int, splits: Sequence[str]):
        self.records = Counter(dict.fromkeys(("read", "bad", "bad_bytes"), 0))
        self.conversations = Counter(dict.fromkeys(("read", *ALL_FATES, "shortened", "expanded"), 0))
        self.kinds = np.zeros(len(KINDS), np.int64)  # of what is kept
        self.tokens = Counter(dict.fromkeys(("total", "cut", *DROPPED), 0))
        self.splits = {split: Counter(dict.fromkeys(PER_SPLIT, 0)) for split in splits}
        self.sources = [Counter(dict.fromkeys(PER_SOURCE, 0)) for _ in range(sources)]

    def enter_records(self, source: int, read: int, bad: Sequence[Bad]) -> None:
        self.records.update(read=read, bad=len(bad), bad_bytes=sum(each.size for each in bad))
        self.sources[source].update(records=read)

    def enter(self, rendered: Rendered, conversations: int, fate: NDArray[np.int64], split: NDArray[np.int64]) -> None:
        """The first so many conversations of a chunk: the fate (index in ALL_FATES) and the split of each sample."""
        samples = len(fate)
        tokens, kinds = rendered.rendered[:samples], rendered.kinds[:samples]
        kept = fate == 0
        left = kinds.sum(axis=1)
        cut = np.where(kept, tokens - left, 0)
        self.kinds += kinds[kept].sum(axis=0)
        self.tokens.update(total=int(tokens.sum()), cut=int(cut.sum()))
        for number, name in enumerate(ALL_FATES[1:], 1):
            self.tokens[name] += int(tokens[fate == number].sum())
        for number, counts in enumerate(self.splits.values()):
            self._enter_samples(counts, kept & (split == number), left, kinds)
        source = self.sources[rendered.source]
        self._enter_samples(source, kept, left, kinds)
        source.update(conversations=conversations)
        self._enter_conversations(rendered.conversation[:samples], conversations, fate, cut)

    def _enter_samples(
        self, counts: Counter[str], chosen: NDArray[np.bool_], left: NDArray[np.int64], kinds: NDArray[np.int64]
    ) -> None:
        trained = int(kinds[chosen, TRAINED].sum())
        counts.update(samples=int(chosen.sum()), tokens=int(left[chosen].sum()), trained_tokens=trained)

    def _enter_conversations(
        self, of_sample: NDArray[np.int64], count: int, fate: NDArray[np.int64], cut: NDArray[np.int64]
    ) -> None:
        """A conversation is kept where one of its samples is; else it has the fate of the first."""
        _, first = np.unique(of_sample, return_index=True)
        has_kept = np.bincount(of_sample, fate == 0, count) > 0
        fates = np.bincount(np.where(has_kept, 0, fate[first]), minlength=len(ALL_FATES))
        self.conversations.update(dict(zip(ALL_FATES, fates.tolist(), strict=True)))
        shortened = np.bincount(of_sample, cut, count) > 0
        expanded = np.bincount(of_sample, minlength=count) > 1
        self.conversations.update(read=count, shortened=int(shortened.sum()), expanded=int(expanded.sum()))

    def to_dict(self) -> dict[str, Any]:
        tokens = {
            "total": self.tokens["total"],
            "trained": int(self.kinds[TRAINED]),
            "masked": {name: int(self.kinds[kind]) for name, kind in MASKED.items()},
            "template": int(self.kinds[TEMPLATE]),
            "repeated_history": int(self.kinds[REPEATED]),
            "cut": self.tokens["cut"],
            "dropped": {name: self.tokens[name] for name in DROPPED},
        }
        return {
            "records": dict(self.records),
            "conversations": dict(self.conversations),
            "tokens": tokens,
            "splits": {split: dict(counts) for split, counts in self.splits.items()},
        }
