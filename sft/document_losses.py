"""The loss of each document of a row, as the step that trains on the row adds them up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from sft.batches import Document, TrainLoader, make_batch, read_row
from sft.step import SummedLoss


class DocumentLoss(NamedTuple):
    """A document of a row."""

    row: int  # its number in the stream
    sample: int  # its index in the train split
    weight: float  # the sum of its target weights
    loss_sum: float | None  # the weighted sum over its trained tokens; None without a model


def documents_of(rows: Sequence[int], loader: TrainLoader, module: SummedLoss | None) -> Iterator[DocumentLoss]:
    """The documents of the rows; the losses of a row are computed when its first document is asked for."""
    for number in rows:
        row = loader.stream.row(number)
        losses: Sequence[float | None] = [None] * len(row)
        if module is not None:
            documents, size = read_row(loader.samples, row), loader.stream.block_size
            losses = document_losses(module, documents, block_size=size, pad_id=loader.pad_id, device=loader.device)
        for sample, loss_sum in zip(row.tolist(), losses, strict=True):
            yield DocumentLoss(number, sample, float(loader.samples.targets[sample]), loss_sum)


def badness(document: DocumentLoss) -> float:
    """The mean loss; what is no number is worse than any."""
    assert document.loss_sum is not None
    return math.inf if math.isnan(document.loss_sum) else document.loss_sum / document.weight


@torch.no_grad()
def document_losses(
    module: SummedLoss, row: Sequence[Document], *, block_size: int, pad_id: int, device: torch.device
) -> list[float]:
    """The weighted sum of the token losses of each document, all computed in one packed row."""
    batch = make_batch([row], block_size=block_size, pad_id=pad_id, device=device)
    dtype = module.autocast_dtype
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        hidden = module.model.hidden_states(batch.input_ids, batch.positions, batch.documents, places=batch.trained)
        losses, start = [], 0
        for document in row:
            end = start + len(document.input_ids)
            mine = (batch.trained >= start) & (batch.trained < end)  # what fills it up on a GPU has target -100
            weights = None if batch.weights is None else batch.weights[mine]
            part = dataclasses.replace(batch, targets=batch.targets[mine], weights=weights)
            losses.append(float(module.loss.sum(hidden[mine], module.model.head_weight, part)))
            start = end
    return losses
