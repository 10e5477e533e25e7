"""Which samples share a row: best-fit packing, and the endless stream of training rows. Pure functions of lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.int64]  # the samples of one row, by index


def pack(lengths: NDArray[np.integer], block_size: int) -> list[Row]:
    """Rows of samples whose lengths sum to at most block_size tokens: best fit, longest sample first.

    Each sample goes into the row with the least space that still holds it. How many rows come out depends on the
    multiset of lengths alone; among samples of equal length the earlier one is placed first.
    """
    assert len(lengths) == 0 or int(lengths.max()) <= block_size, "a sample longer than block_size reached the packer"
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[int]] = {}  # free tokens -> rows with exactly that many
    spaces: list[int] = []  # the keys of rows_by_space, sorted
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        at = bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), block_size
            rows.append([])
        else:
            space = spaces[at]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space], spaces[at]
        rows[row].append(sample)
        if left := space - length:
            if left not in rows_by_space:
                rows_by_space[left] = []
                insort(spaces, left)
            rows_by_space[left].append(row)
    return [np.array(row, dtype=np.int64) for row in rows]


class RowStream:
    """The endless stream of training rows; row r is a pure function of (lengths, block_size, seed, r).

    Every epoch holds each sample once, packed with other companions (ties in length are broken by the epoch's own
    shuffle, which leaves the number of rows as it is) and in another order.
    """

    def __init__(self, lengths: NDArray[np.integer], *, block_size: int, seed: int):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.block_size = block_size
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._pack_epoch)  # a step may span the end of one epoch
        self.rows_per_epoch = len(self._epoch(0))

    def row(self, r: int) -> Row:
        epoch, place = divmod(r, self.rows_per_epoch)
        return self._epoch(epoch)[place]

    def _pack_epoch(self, epoch: int) -> list[Row]:
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        shuffled = random.permutation(len(self.lengths))
        rows = pack(self.lengths[shuffled], self.block_size)
        return [shuffled[rows[place]] for place in random.permutation(len(rows))]
