"""Which samples share a row, and the endless stream of training rows. Pure functions of lengths."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.int64]  # the samples of one row, by index
DIGIT = 16  # bits: numpy sorts 16-bit numbers by radix, stably and many times faster than longer ones
FULL_ENOUGH = 0.9995  # of a row: what best fit leaves where it fills so much is not worth another plan
PACKING_VERSION = 2  # raised with every change of which samples share a row: a resumed run would see other rows
FIRST_CIRCLE = 2**63  # random keys from here on draw the circles of the sources; those below draw epochs


Placement = tuple[int, int, int, int]  # of samples of one length: the fields of a RowRange, and how many a row takes
Plan = tuple[int, list[Placement]]  # how many rows, and where the samples go, longest first


@dataclass(frozen=True)
class Rows:
    """Packed rows: rows[i] is samples[offsets[i]:offsets[i + 1]], in the order in which they were placed."""

    samples: NDArray[np.int64]  # (samples,)
    offsets: NDArray[np.int64]  # (rows + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        return self.samples[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


class RowRange(NamedTuple):
    """The rows first, first + step, ..., first + (rows - 1) * step."""

    first: int
    rows: int
    step: int  # 1 or -1

    def backwards(self, rows: int) -> RowRange:
        """The last so many rows, the last one first."""
        return RowRange(self.first + (self.rows - 1) * self.step, rows, -self.step)

    def without_last(self, rows: int) -> RowRange:
        return RowRange(self.first, self.rows - rows, self.step)


def pack(lengths: NDArray[np.integer], block_size: int) -> Rows:
    """Rows of samples whose lengths sum to at most block_size tokens: best fit, longest sample first.

    Each sample goes into the row with the least space that still holds it, of equal ones the one that came to that
    space last. Where that leaves rows too empty and rows filled one after the other are fewer, it is these: best fit
    alone wastes a hundredth of GSM8K's rows of 2,048. How many rows come out depends on the multiset of lengths alone;
    among samples of equal length the earlier one is placed first.
    """
    count, placements = _plan(lengths, block_size)
    placed = stable_order(block_size - lengths.astype(np.int64))
    first, rows, step, each = np.array(placements, dtype=np.int64).reshape(-1, 4).T
    within = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
    row_of_placed = np.repeat(np.repeat(first, rows) + np.repeat(step, rows) * within, np.repeat(each, rows))
    offsets = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of_placed, minlength=count), out=offsets[1:])
    return Rows(placed[stable_order(row_of_placed)], offsets)


def count_rows(lengths: NDArray[np.integer], block_size: int) -> int:
    """How many rows `pack` makes."""
    return _plan(lengths, block_size)[0]


def _plan(lengths: NDArray[np.integer], block_size: int) -> Plan:
    """The number of rows, and in order of placement, longest samples first: a range of rows and how many samples each
    of them takes."""
    plan = _best_fit(lengths, block_size)
    tokens = int(lengths.sum(dtype=np.int64))
    if plan[0] == -(-tokens // block_size) or tokens >= FULL_ENOUGH * plan[0] * block_size:
        return plan
    return min(plan, _row_after_row(lengths, block_size), key=lambda each: each[0])


def _row_after_row(lengths: NDArray[np.integer], block_size: int) -> Plan:
    """Rows filled one after the other, each as often as there are samples for it.

    A row takes the longest sample left, then the most frequent lengths, so that those left stay varied, and at its end
    two or three that fill it to the last token, where there are such.
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    placements: list[list[Placement]] = [[] for _ in distinct]
    rows = 0
    while counts.any():
        row = _filled_row(distinct, counts.copy(), block_size)
        taken, each = np.unique(row, return_counts=True)
        times = int((counts[taken] // each).min())
        assert times > 0, "a row takes samples that are not left"
        counts[taken] -= times * each
        for place, samples in zip(taken.tolist(), each.tolist(), strict=True):
            placements[place].append((rows, times, 1, samples))
        rows += times
    return rows, [placement for of_length in reversed(placements) for placement in of_length]


def _filled_row(distinct: NDArray[np.integer], counts: NDArray[np.int64], space: int) -> list[int]:
    """The lengths of one row, as places in `distinct`; `counts` of them are left, and are taken from."""
    row: list[int] = []
    while len(fits := counts[: np.searchsorted(distinct, space, side="right")].nonzero()[0]):
        nearly_full = space <= 3 * np.average(distinct[fits], weights=counts[fits])
        if row and nearly_full and (last := _that_fill(distinct, counts, fits, space)):
            return row + last
        place = int(fits[-1] if nearly_full or not row else fits[counts[fits].argmax()])
        row.append(place)
        counts[place] -= 1
        space -= int(distinct[place])
    return row


def _that_fill(
    distinct: NDArray[np.integer], counts: NDArray[np.int64], fits: NDArray[np.int64], space: int
) -> list[int]:
    """Places of one, two or three lengths that sum to `space`, those of which most is left; none where none do."""
    if distinct[fits[-1]] == space:
        return [int(fits[-1])]

    def two(space: int) -> list[int]:
        shorter = fits[: np.searchsorted(distinct[fits], space // 2, side="right")]
        longer = np.searchsorted(distinct, space - distinct[shorter])
        longer = np.minimum(longer, len(distinct) - 1)
        left = np.minimum(counts[shorter], counts[longer] - (shorter == longer))
        left[distinct[shorter] + distinct[longer] != space] = 0
        best = left.argmax() if len(left) else 0
        return [int(shorter[best]), int(longer[best])] if (left > 0).any() else []

    if found := two(space):
        return found
    for place in fits[::-1].tolist():
        if 3 * distinct[place] < space:
            break
        counts[place] -= 1
        found = two(space - int(distinct[place]))
        counts[place] += 1
        if found:
            return [place, *found]
    return []


def _best_fit(lengths: NDArray[np.integer], block_size: int) -> Plan:
    """Each sample into the row with the least space that holds it, longest first.

    Rows of equal space move together. The tightest row, of space s, takes s // length samples of a length one after
    the other, since after each of them it is the tightest still; then its neighbour of equal space does the same.
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    assert len(distinct) == 0 or distinct[-1] <= block_size, "a sample longer than block_size reached the packer"
    assert len(distinct) == 0 or distinct[0] > 0, "an empty sample reached the packer"
    placements: list[Placement] = []
    stacks: dict[int, list[RowRange]] = {}  # free tokens -> rows with exactly that many, the last one next
    spaces = SortedSet(block_size)  # the keys of stacks
    rows = 0

    def put(space: int, open_rows: RowRange) -> None:
        if space and open_rows.rows:
            if space not in stacks:
                stacks[space] = []
                spaces.add(space)
            stacks[space].append(open_rows)

    for length, samples in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = samples
        while left:
            space = spaces.at_least(length)
            if space is None:
                space = block_size
                opened = math.ceil(left / (block_size // length))
                put(space, RowRange(rows + opened - 1, opened, -1))
                rows += opened
            open_rows = stacks[space].pop()
            if not stacks[space]:
                del stacks[space]
                spaces.remove(space)
            each = min(space // length, left)
            filled = min(open_rows.rows, left // each)
            taken = open_rows.backwards(filled)
            placements.append((*taken, each))
            put(space - each * length, taken)
            put(space, open_rows.without_last(filled))
            left -= filled * each
    return rows, placements


class SortedSet:
    """Whole numbers from 0 to `largest`: add, remove and look up in steps that do not grow with how many there are.

    Two levels of bits, each Python integer about sqrt(largest) of them long.
    """

    def __init__(self, largest: int):
        self.shift = (largest.bit_length() + 1) // 2
        self.words = [0] * ((largest >> self.shift) + 1)
        self.used = 0  # bit i: words[i] is not 0

    def add(self, value: int) -> None:
        word = value >> self.shift
        self.words[word] |= 1 << (value - (word << self.shift))
        self.used |= 1 << word

    def remove(self, value: int) -> None:
        word = value >> self.shift
        self.words[word] ^= 1 << (value - (word << self.shift))
        if not self.words[word]:
            self.used ^= 1 << word

    def at_least(self, value: int) -> int | None:
        """The smallest member that is not below `value`."""
        word = value >> self.shift
        if above := self.words[word] >> (value - (word << self.shift)):
            return value + _lowest_bit(above)
        if not (later := self.used >> (word + 1)):
            return None
        word += 1 + _lowest_bit(later)
        return (word << self.shift) + _lowest_bit(self.words[word])


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def stable_order(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """What np.argsort(keys, kind="stable") gives, for keys of 0 or more."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")  # the lowest digit: what lies above it is cut off
    largest = int(keys.max(initial=0)) >> DIGIT
    while largest:
        keys = keys >> DIGIT
        order = order[np.argsort(keys[order].astype(np.uint16), kind="stable")]
        largest >>= DIGIT
    return order


class Epochs:
    """How often each epoch takes each sample: `weights` are epochs of a source per epoch of the whole, exactly.

    The samples of a source stand in a seeded circle, and each epoch goes on where the last one stopped. After e epochs
    round(samples * weight * e) have been taken, so that no sample's count is ever a whole one off weight * e.
    """

    def __init__(self, sources: NDArray[np.integer], weights: Sequence[float], *, seed: int):
        """`sources` is each sample's index into `weights`; sources beyond those given have weight 1."""
        self.samples = len(sources)
        exact = {source: decimal(weight) for source, weight in enumerate(weights) if weight != 1}
        self.period = math.lcm(*(weight.denominator for weight in exact.values()))  # then the counts repeat
        self.circles: list[tuple[NDArray[np.int64], Fraction]] = []
        for source, weight in exact.items():
            random = np.random.Generator(np.random.Philox(key=[seed, FIRST_CIRCLE + source]))
            self.circles.append((random.permutation(np.flatnonzero(sources == source)), weight))

    def counts(self, epoch: int) -> NDArray[np.int64] | None:
        """(samples,) how often this epoch takes each; None = each once."""
        if not self.circles:
            return None
        counts = np.ones(self.samples, dtype=np.int64)
        for circle, weight in self.circles:
            share = len(circle) * weight
            start, end = (math.floor(share * bound + Fraction(1, 2)) for bound in (epoch, epoch + 1))
            laps, more = divmod(end - start, max(1, len(circle)))
            counts[circle] = laps
            counts[circle.take(np.arange(more) + start % max(1, len(circle)), mode="wrap")] += 1
        return counts


def decimal(number: float) -> Fraction:
    """Exactly the decimal number that a person wrote: 0.7 is seven tenths."""
    return Fraction(str(number))


class RowStream:
    """The endless stream of training rows; row r is a pure function of (lengths, weights, block_size, seed, r).

    Every epoch holds each sample once, or as often as its source's weight asks for (see Epochs), packed with other
    companions (ties in length are broken by the epoch's own shuffle, which leaves the number of rows as it is) and in
    another order. Copies of a sample are spread over the samples of their length: they share a row only where few
    others have that length. It would do no harm, since the documents of a row do not see each other.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],
        *,
        block_size: int,
        seed: int,
        sources: NDArray[np.integer] | None = None,
        weights: Sequence[float] = (),
    ):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.block_size = block_size
        self.seed = seed
        sources = np.zeros(len(lengths), dtype=np.int64) if sources is None else sources
        self.epochs = Epochs(sources, weights, seed=seed)
        self._first_rows = [0]  # of epochs 0, 1, ..., as far as they were needed, at most to the end of a period
        self._epoch = lru_cache(maxsize=2)(self._pack_epoch)  # a step may span the end of one epoch

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch; with weights later epochs may have a few more or fewer."""
        return self.first_row(1)

    def row(self, r: int) -> Row:
        epoch, place = self._locate(r)
        rows, order = self._epoch(epoch)
        return rows[int(order[place])]

    def first_row(self, epoch: int) -> int:
        """How many rows the epochs before this one have."""
        periods, rest = divmod(epoch, self.epochs.period)
        self._count_epochs(self.epochs.period if periods else rest)
        return periods * self._first_rows[-1] + self._first_rows[rest] if periods else self._first_rows[rest]

    def rows_in(self, epochs: float) -> int:
        """How many rows so many epochs from the start have; a part of a row counts as one."""
        whole, part = divmod(decimal(epochs), 1)
        start = self.first_row(whole)
        return start + (math.ceil(part * (self.first_row(whole + 1) - start)) if part else 0)

    def _locate(self, r: int) -> tuple[int, int]:
        """The epoch of row r, and its place there."""
        while r >= self._first_rows[-1] and len(self._first_rows) <= self.epochs.period:
            self._count_epochs(len(self._first_rows))
        periods = 0
        if r >= self._first_rows[-1]:
            periods, r = divmod(r, self._first_rows[-1])
        epoch = bisect_right(self._first_rows, r) - 1
        return periods * self.epochs.period + epoch, r - self._first_rows[epoch]

    def _count_epochs(self, epochs: int) -> None:
        """Know the rows of so many epochs, at most a period."""
        for epoch in range(len(self._first_rows) - 1, epochs):
            self._first_rows.append(self._first_rows[-1] + count_rows(self.lengths_in(epoch), self.block_size))

    def lengths_in(self, epoch: int) -> NDArray[np.int64]:
        """The length of every sample that an epoch takes, copies included, in no order of use."""
        counts = self.epochs.counts(epoch)
        return self.lengths if counts is None else np.repeat(self.lengths, counts)

    def _pack_epoch(self, epoch: int) -> tuple[Rows, NDArray[np.int64]]:
        """The rows of an epoch, and the order in which the stream has them."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        counts = self.epochs.counts(epoch)
        if counts is None:
            shuffled = random.permutation(len(self.lengths))
        else:
            taken = np.flatnonzero(counts)
            shuffled = taken[random.permutation(len(taken))]
            shuffled = spread_copies(shuffled, counts[shuffled])
        rows = pack(self.lengths[shuffled], self.block_size)
        return Rows(shuffled[rows.samples], rows.offsets), random.permutation(len(rows))


def spread_copies(samples: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each sample counts[i] times, its copies evenly far from each other; the order as it is where all counts are 1."""
    copy = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    place = (copy + np.repeat(np.arange(len(samples)) / max(1, len(samples)), counts)) / np.repeat(counts, counts)
    return np.repeat(samples, counts)[np.argsort(place, kind="stable")]
