"""Gradients and validation losses for every way to spread rows over ranks; run under torchrun by test_world.py."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from sft.arrays import Samples
from sft.batches import Document, make_batch
from sft.errors import run_program
from sft.evaluation import Validation
from sft.packing import pack
from sft.step import SummedLoss, accumulate_gradients
from sft.world import World, join_world
from tests.tiny import random_documents, target_weight, tiny_model

BLOCK_SIZE = 64
LENGTHS = [1, 64, 3, 17, 40, 9, 33, 2, 28, 51, 12, 30]
LAYOUTS = ("alone", "packed")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def rows_of(layout: str, *, weighted: bool) -> list[list[Document]]:
    """The same documents one per row or packed, and one row in which nothing is trained."""
    documents = random_documents(LENGTHS, trained_share=0.4, seed=5, weighted=weighted)
    masked = random_documents([20], trained_share=0.0, seed=6, weighted=weighted)
    if layout == "alone":
        return [[document] for document in documents] + [masked]
    packed = [[documents[i] for i in row] for row in pack(np.array(LENGTHS), BLOCK_SIZE)]
    return [*packed, masked]


def gradients(
    world: World, dtype: torch.dtype, *, accumulation: int, layout: str, weighted: bool
) -> dict[str, torch.Tensor]:
    """The gradient by parameter name. The last micro-batch is all masked wherever there is more than one."""
    rows = rows_of(layout, weighted=weighted)
    micro_batches = accumulation * world.size
    full = max(1, micro_batches - 1)  # the masked row gets a micro-batch of its own
    trained, masked = (rows, []) if micro_batches == 1 else (rows[:-1], [rows[-1:]])
    spread = [trained[first::full] for first in range(full)] + masked
    mine = [rows or [[]] for rows in spread[world.rank :: world.size]]  # a row without documents is all padding
    model = tiny_model(dtype=dtype)
    loss_module = world.wrap(SummedLoss(model))
    accumulate_gradients(
        loss_module,
        [make_batch(rows, block_size=BLOCK_SIZE, pad_id=0) for rows in mine],
        target_weight=target_weight([document for row in rows for document in row]),
        world=world,
    )
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def samples_of(documents: list[Document]) -> Samples:
    """Documents as a prepared split in memory."""
    ids, labels = (np.concatenate([document[part] for document in documents]) for part in (0, 1))
    offsets = np.cumsum([0, *(len(document.input_ids) for document in documents)])
    targets = np.array([target_weight([document]) for document in documents])
    weighted = [document.weights for document in documents if document.weights is not None]
    weights = np.concatenate(weighted) if weighted else None
    return Samples(ids, labels, offsets, targets, np.zeros((len(documents), 3), np.int64), weights)


def validation_loss(world: World, *, batch_size: int, weighted: bool) -> tuple[float, int]:
    """(mean loss, trained tokens counted)"""
    validation = Validation(
        samples_of(random_documents(LENGTHS, trained_share=0.4, seed=5, weighted=weighted)),
        block_size=BLOCK_SIZE,
        batch_size=batch_size,
        pad_id=0,
        seed=1,
        limit=None,
    )
    result = validation.evaluate(SummedLoss(tiny_model(dropout=0.1)), world)
    return result.loss, result.trained_tokens


def main(argv: list[str]) -> None:
    results = {}
    with join_world("cpu") as world:
        for case in itertools.product(DTYPES, [1, 2, 4], LAYOUTS, [False, True]):
            dtype, accumulation, layout, weighted = case
            results[case] = gradients(world, DTYPES[dtype], accumulation=accumulation, layout=layout, weighted=weighted)
        losses = {
            (batch_size, weighted): validation_loss(world, batch_size=batch_size, weighted=weighted)
            for batch_size, weighted in itertools.product([1, 2, 3], [False, True])
        }
        if world.is_main:
            torch.save({"gradients": results, "validation_losses": losses}, argv[0])


if __name__ == "__main__":
    run_program(main)
