"""From rows of samples to the tensors of a micro-batch. The one place where labels are shifted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft.arrays import Samples
from sft.attention import Documents
from sft.packing import Row, RowStream
from sft.samples import NOT_TRAINED

Each = TypeVar("Each")
NO_ROWS = bytes(16)  # the order hash of a run that has seen none


class Document(NamedTuple):
    """One sample inside a row: ids (L,), labels (L,) unshifted with -100, weights (L,) or None for all ones."""

    input_ids: NDArray[np.integer]
    labels: NDArray[np.integer]
    weights: NDArray[np.floating] | None = None


@dataclass(frozen=True)
class Batch:
    """The rows of one micro-step on one rank. B rows, T = block_size tokens, n trained tokens."""

    input_ids: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64, restarting at 0 in each document
    documents: Documents
    trained: Tensor  # (n,) int64: places in the flattened (B * T) rows whose next token is trained
    targets: Tensor  # (n,) int64: that next token; on CUDA the three are filled up to a bucket, with target -100
    weights: Tensor | None  # (n,) float32; None when all are 1
    trained_tokens: int  # n, filling not counted
    tokens: int  # real tokens, padding not counted
    attended_pairs: int  # sum over documents of L (L + 1) / 2: what causal attention has to compute
    dropout_seed: int | None = None  # set before the forward, so that no generator state needs saving


def make_batch(
    rows: Sequence[Sequence[Document]],
    *,
    block_size: int,
    pad_id: int,
    device: torch.device | str = "cpu",
    dropout_seed: int | None = None,
) -> Batch:
    """Lay documents end to end in rows of block_size tokens; the unused tail of a row is a document of its own.

    The target of a position is the label of the next token of the same document; a document's last token has none.
    """
    shape = (len(rows), block_size)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.empty(shape, dtype=np.int64)
    targets = np.full(shape, NOT_TRAINED, dtype=np.int64)
    weights = np.ones(shape, dtype=np.float32)
    weighted = False
    tokens = attended_pairs = 0
    for row, documents in enumerate(rows):
        start = 0
        for document in documents:
            length = len(document.input_ids)
            end = start + length
            assert end <= block_size, "the documents of a row are longer than the row"
            input_ids[row, start:end] = document.input_ids
            positions[row, start:end] = np.arange(length)
            targets[row, start : end - 1] = document.labels[1:]
            if document.weights is not None:
                weights[row, start : end - 1] = document.weights[1:]
                weighted = True
            tokens += length
            attended_pairs += length * (length + 1) // 2
            start = end
        positions[row, start:] = np.arange(block_size - start)
    lengths = [[len(document.input_ids) for document in documents] for documents in rows]
    trained = np.flatnonzero(targets != NOT_TRAINED)
    filling = bucket(len(trained)) - len(trained) if torch.device(device).type == "cuda" else 0

    def place(array: NDArray[np.generic]) -> Tensor:
        return on_device(torch.from_numpy(array), device)

    def place_trained(array: NDArray[np.generic], fill: int) -> Tensor:
        return place(np.pad(array, (0, filling), constant_values=fill))

    return Batch(
        input_ids=place(input_ids),
        positions=place(positions),
        documents=Documents.of_lengths(lengths, block_size=block_size, place=place),
        trained=place_trained(trained, 0),
        targets=place_trained(targets.reshape(-1)[trained], NOT_TRAINED),
        weights=place_trained(weights.reshape(-1)[trained], 0) if weighted else None,
        trained_tokens=len(trained),
        tokens=tokens,
        attended_pairs=attended_pairs,
        dropout_seed=dropout_seed,
    )


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on its way to the device; nothing waits for it."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def bucket(count: int) -> int:
    """The least of a few sizes that holds `count`: shapes repeat, for at most 128 more or 1/32 of it."""
    step = max(128, 2 ** (max(count, 1).bit_length() - 6))
    return max(1, -(-count // step)) * step


def read_row(samples: Samples, row: Row) -> list[Document]:
    """The documents of a row, read from the prepared arrays."""
    documents = []
    for sample in row.tolist():
        span = slice(int(samples.offsets[sample]), int(samples.offsets[sample + 1]))
        weights = None if samples.weights is None else samples.weights[span]
        documents.append(Document(samples.input_ids[span], samples.labels[span], weights))
    return documents


class StepBatches(NamedTuple):
    """One rank's share of a step; the rows of the whole step over all ranks, and their normaliser."""

    batches: Iterator[Batch]
    target_weight: float
    rows: Sequence[Row]


class StepBatch(NamedTuple):
    """A batch, and what there is to know of the step that it belongs to."""

    batch: Batch
    target_weight: float
    order: bytes  # the order_hash of all rows up to the end of that step


@dataclass(frozen=True)
class TrainLoader:
    """Which rows a step takes and which of them this rank computes.

    A step takes the next rows_per_step rows of the stream and cuts them into micro-batches of batch_size rows.
    Micro-step m of a rank is micro-batch m * world_size + rank: the same rows meet the same dropout on any number of
    ranks. Where the rows do not divide evenly, empty ones fill up the last batches, whose labels are all masked.
    """

    samples: Samples
    stream: RowStream
    batch_size: int
    rows_per_step: int
    rank: int
    world_size: int
    pad_id: int
    seed: int
    device: torch.device

    @property
    def micro_steps(self) -> int:
        """Batches of one rank in a step, those of empty rows included."""
        return -(-self.rows_per_step // (self.batch_size * self.world_size))

    def steps(self, step: int, *, rows_seen: int, end: int, order: bytes = NO_ROWS) -> Iterator[StepBatch]:
        """This rank's batches of the steps from `step` to before `end`, one by one; `order` is the hash until then."""
        for number in range(step, end):
            batches, target_weight, rows = self.step(number, rows_seen=rows_seen + (number - step) * self.rows_per_step)
            order = order_hash(order, rows)
            for batch in batches:
                yield StepBatch(batch, target_weight, order)

    def step(self, step: int, *, rows_seen: int) -> StepBatches:
        """Batches are made one by one as they are asked for; the normaliser comes from disk, before any forward."""
        rows = [self.stream.row(rows_seen + place) for place in range(self.rows_per_step)]
        target_weight = float(sum(self.samples.targets[row].sum() for row in rows))
        return StepBatches(self._share(step, rows), target_weight, rows)

    def shares(self, rows: Sequence[Each], rank: int) -> Iterator[Sequence[Each]]:
        """Of the rows of a step, or their numbers, what a rank computes, by micro-step; fewer where none are left."""
        for micro_step in range(self.micro_steps):
            first = (micro_step * self.world_size + rank) * self.batch_size
            yield rows[first : first + self.batch_size]

    def _share(self, step: int, rows: Sequence[Row]) -> Iterator[Batch]:
        for micro_step, share in enumerate(self.shares(rows, self.rank)):
            micro_batch = micro_step * self.world_size + self.rank
            documents = [read_row(self.samples, row) for row in share]
            yield make_batch(
                [*documents, *([] for _ in range(self.batch_size - len(share)))],
                block_size=self.stream.block_size,
                pad_id=self.pad_id,
                device=self.device,
                dropout_seed=dropout_seed(self.seed, step, micro_batch),
            )


def order_hash(order: bytes, rows: Sequence[Row]) -> bytes:
    """What becomes of the hash of all rows before, NO_ROWS at first, by these rows: of their samples, in order.

    So two runs that are at the same hash have seen the same rows of the same data.
    """
    for row in rows:
        order = hashlib.blake2b(row.astype("<i8").tobytes(), digest_size=16, key=order).digest()
    return order


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """A seed of its own for each micro-batch of a run, the same whoever computes it and however often."""
    return int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
