"""What conversations are rendered to: token ids, and for each stretch of them whose it is and whether it is trained."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ID_BYTES = array("i").itemsize
NOT_TRAINED = -100  # the label of a token that is not trained

# Whose a token is: trained, masked content by role, what the template adds, or history that another sample has trained.
KINDS = ("trained", "system", "user", "assistant", "tool", "text", "template", "repeated_history")
TRAINED, TEMPLATE, REPEATED = (KINDS.index(name) for name in ("trained", "template", "repeated_history"))
MASKED = {name: KINDS.index(name) for name in ("system", "user", "assistant", "tool", "text")}


class Stretch(NamedTuple):
    """The tokens of a block, or of plain text: those that are of one kind, and the template's before and after them."""

    kind: int  # index in KINDS
    before: int
    length: int
    after: int
    weight: float  # of trained tokens in the loss

    @property
    def tokens(self) -> int:
        return self.before + self.length + self.after


class Sample(NamedTuple):
    """A rendered conversation, or one trained turn of it with its history, or a piece of plain text."""

    packed: bytes  # the ids, int32 after int32
    stretches: list[Stretch]  # they cover the ids from the first to the last
    roles: Sequence[str] = ()  # of each block; none for plain text
    turn: int = -1  # -1 = the whole; else the index of the message that is trained, or of the piece

    @property
    def tokens(self) -> int:
        return len(self.packed) // ID_BYTES

    @property
    def input_ids(self) -> list[int]:
        return array("i", self.packed).tolist()

    @property
    def labels(self) -> list[int]:
        """The id where trained, -100 elsewhere; not shifted."""
        input_ids = self.input_ids
        labels = [NOT_TRAINED] * len(input_ids)
        start = 0
        for stretch in self.stretches:
            if stretch.kind == TRAINED:
                span = slice(start + stretch.before, start + stretch.before + stretch.length)
                labels[span] = input_ids[span]
            start += stretch.tokens
        return labels

    @property
    def is_trained(self) -> bool:
        return any(stretch.kind == TRAINED and stretch.length for stretch in self.stretches)


@dataclass(frozen=True)
class Samples:
    """Many samples as columns: S samples with K stretches and T tokens, those of one sample next to each other."""

    conversation: NDArray[np.int64]  # (S,) index of the conversation; ascending
    turn: NDArray[np.int64]  # (S,)
    roles: list[Sequence[str]]  # (S) of each block
    sizes: NDArray[np.int64]  # (S,) stretches of each sample
    stretches: NDArray[np.int64]  # (K, 4) kind, before, length, after
    weights: NDArray[np.float64]  # (K,)
    ids: NDArray[np.int32]  # (T,)

    def __len__(self) -> int:
        return len(self.turn)

    @classmethod
    def of(cls, conversation: Sequence[int], samples: Sequence[Sample]) -> Samples:
        stretches = [stretch for sample in samples for stretch in sample.stretches]
        table = np.array(stretches, np.float64).reshape(-1, len(Stretch._fields))
        return cls(
            conversation=np.array(conversation, np.int64),
            turn=np.array([sample.turn for sample in samples], np.int64),
            roles=[sample.roles for sample in samples],
            sizes=np.array([len(sample.stretches) for sample in samples], np.int64),
            stretches=table[:, :4].astype(np.int64),
            weights=np.ascontiguousarray(table[:, 4]),
            ids=np.frombuffer(b"".join([sample.packed for sample in samples]), np.int32),
        )

    @cached_property
    def of_stretch(self) -> NDArray[np.int64]:
        """(K,) the sample of each stretch."""
        return np.repeat(np.arange(len(self)), self.sizes)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(S,) tokens of each sample."""
        return self.summed(self.stretches[:, 1:].sum(axis=1))

    @cached_property
    def trained(self) -> NDArray[np.int64]:
        """(S,) trained tokens of each sample."""
        return self.summed(np.where(self.stretches[:, 0] == TRAINED, self.stretches[:, 2], 0))

    def summed(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """(S,) the sum of what each stretch of a sample has; exact below 2^53."""
        return np.bincount(self.of_stretch, values, len(self)).astype(np.int64)

    def chosen(self, which: NDArray[np.bool_]) -> Samples:
        """Some of the samples, in their order."""
        if which.all():
            return self
        stretches = np.repeat(which, self.sizes)
        return Samples(
            conversation=self.conversation[which],
            turn=self.turn[which],
            roles=list(itertools.compress(self.roles, which)),
            sizes=self.sizes[which],
            stretches=self.stretches[stretches],
            weights=self.weights[stretches],
            ids=self.ids[np.repeat(which, self.lengths)],
        )

    def listed(self) -> list[Sample]:
        stretches = map(Stretch, *self.stretches.T.tolist(), self.weights.tolist())
        ids, ends = self.ids.tobytes(), (np.cumsum(self.lengths) * ID_BYTES).tolist()
        return [
            Sample(ids[start:end], list(itertools.islice(stretches, size)), roles, turn)
            for (start, end), size, roles, turn in zip(
                itertools.pairwise([0, *ends]), self.sizes.tolist(), self.roles, self.turn.tolist(), strict=True
            )
        ]


def text_piece(packed: bytes, turn: int = -1) -> Sample:
    """Plain text, all trained."""
    length = len(packed) // ID_BYTES
    first = min(1, length)  # nothing predicts it
    parts = [Stretch(MASKED["text"], 0, first, 0, 0.0), Stretch(TRAINED, 0, length - first, 0, 1.0)]
    return Sample(packed, parts, turn=turn)


def cut(sample: Sample, block_size: int) -> Sample | None:
    """The sample without turns at its end, so that it fits and ends on an assistant turn; None where nothing is left.

    Plain text, which has no turns, is cut inside.
    """
    if not sample.roles:
        return text_piece(sample.packed[: block_size * ID_BYTES], sample.turn)
    ends = list(itertools.accumulate(stretch.tokens for stretch in sample.stretches))
    for count in range(len(ends), 0, -1):
        if sample.roles[count - 1] == "assistant" and ends[count - 1] <= block_size:
            packed = sample.packed[: ends[count - 1] * ID_BYTES]
            return Sample(packed, sample.stretches[:count], sample.roles[:count], sample.turn)
    return None


def split_text(sample: Sample, block_size: int) -> list[Sample]:
    """Plain text as consecutive pieces of block_size tokens, the last one shorter."""
    size = block_size * ID_BYTES
    starts = range(0, len(sample.packed), size)
    return [text_piece(sample.packed[start : start + size], turn) for turn, start in enumerate(starts)]
