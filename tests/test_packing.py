import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.packing import RowStream, pack

lengths_and_block = st.integers(1, 60).flatmap(
    lambda block: st.tuples(st.lists(st.integers(1, block), max_size=80), st.just(block))
)


@given(lengths_and_block)
def test_every_sample_is_in_exactly_one_row_and_no_row_overflows(case):
    lengths, block_size = np.array(case[0], dtype=np.int64), case[1]
    rows = pack(lengths, block_size)
    placed = np.concatenate(rows) if rows else np.array([], dtype=np.int64)
    assert sorted(placed.tolist()) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= block_size for row in rows)


@given(lengths_and_block)
def test_a_sample_opens_a_row_only_when_no_open_row_has_space(case):
    """What best fit promises: two rows that are both at most half full never remain."""
    lengths, block_size = np.array(case[0], dtype=np.int64), case[1]
    fills = [lengths[row].sum() for row in pack(lengths, block_size)]
    assert sum(fill <= block_size / 2 for fill in fills) <= 1


def test_a_sample_goes_where_the_least_space_remains():
    rows = pack(np.array([7, 5, 3]), 10)
    assert [row.tolist() for row in rows] == [[0, 2], [1]]


def test_conversations_of_ordinary_lengths_fill_rows_almost_completely():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.0, 0.8, 5000).astype(int), 8, 2048)
    rows = pack(lengths, 2048)
    assert lengths.sum() / (len(rows) * 2048) > 0.99


def stream(seed=3, block_size=32):
    return RowStream(np.random.default_rng(1).integers(1, 20, 50), block_size=block_size, seed=seed)


def test_each_epoch_of_the_stream_holds_every_sample_once():
    rows = stream()
    for epoch in range(3):
        places = range(epoch * rows.rows_per_epoch, (epoch + 1) * rows.rows_per_epoch)
        assert sorted(np.concatenate([rows.row(r) for r in places]).tolist()) == list(range(50))


def test_a_row_of_the_stream_does_not_depend_on_what_was_asked_before():
    once, again = stream(), stream()
    forward = [once.row(r).tolist() for r in range(60)]
    backward = [again.row(r).tolist() for r in reversed(range(60))]
    assert forward == backward[::-1]


def test_epochs_and_seeds_differ_in_order_and_company():
    rows, other = stream(), stream(seed=4)
    n = rows.rows_per_epoch
    first = [rows.row(r).tolist() for r in range(n)]
    assert first != [rows.row(n + r).tolist() for r in range(n)]
    assert first != [other.row(r).tolist() for r in range(n)]
    assert {frozenset(row) for row in first} != {frozenset(rows.row(n + r).tolist()) for r in range(n)}


def test_the_packer_refuses_a_sample_that_no_row_can_hold():
    with pytest.raises(AssertionError, match="longer than block_size"):
        pack(np.array([5, 11]), 10)
