"""The trainer of this project in bench/step.py: its model, packing, loader, loss and step, as train_sft.py joins them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch

from bench.step_inputs import document, fill_weights
from bench.step_worker import Gate, Step, Work
from model_builder import ConfigurableGPT
from sft.batches import Batch, Document, StepBatches, TrainLoader, make_batch
from sft.huggingface import name_table, to_hugging_face
from sft.optim import make_optimizer
from sft.packing import RowStream, pack
from sft.step import SummedLoss, train_step
from sft.world import World

PAD = 0
SEED = 1337


def load() -> None:
    """Everything is imported already."""


def make_model(work: Work) -> ConfigurableGPT:
    with work.device:
        model = ConfigurableGPT(work.task.config)
    table = name_table(work.task.config.to_dict())
    fill_weights(to_hugging_face(dict(model.named_parameters()), table))
    if work.option.get("compile"):
        torch._dynamo.reset()  # shapes of another option would be taken for dynamic ones
        model.compile_blocks()
    return model.train()


def loaded_steps(work: Work) -> Iterator[StepBatches]:
    """Step after step of the trainer's own stream of packed rows."""
    samples, task = work.samples, work.task
    stream = RowStream(samples.lengths, block_size=task.row, seed=SEED)
    loader = TrainLoader(
        samples,
        stream,
        batch_size=work.option["rows"],
        rows_per_step=task.rows_per_step,
        rank=0,
        world_size=1,
        pad_id=PAD,
        seed=SEED,
        device=work.device,
    )
    for step in itertools.count():
        yield loader.step(step, rows_seen=step * task.rows_per_step)


def planned_steps(work: Work) -> Iterator[StepBatches]:
    """The conversations of the plan, packed into as few rows as hold them."""
    assert work.plan is not None
    for numbers in work.plan:
        rows = pack(work.samples.lengths[numbers], work.task.row)
        documents = [[Document(*document(work.samples, numbers[i])) for i in row.tolist()] for row in rows]
        batch = make_batch(documents, block_size=work.task.row, pad_id=PAD, device=work.device)
        yield StepBatches(iter([batch]), float(work.samples.targets[numbers].sum()))


def train(work: Work, gate: Gate) -> None:
    model = make_model(work)
    loss_module = SummedLoss(model, autocast_dtype=work.autocast_dtype)
    optimizer = make_optimizer(model, learning_rate=work.task.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    world = World(rank=0, size=1, device=work.device)
    for batches, target_weight in loaded_steps(work) if work.plan is None else planned_steps(work):
        counts = [0, 0]
        result = train_step(
            loss_module,
            optimizer,
            counted(batches, counts),
            target_weight=target_weight,
            learning_rate=work.task.learning_rate,
            grad_clip=1.0,
            world=world,
        )
        if not gate(Step(result.loss_sum / target_weight, *counts)):
            return


def counted(batches: Iterable[Batch], counts: list[int]) -> Iterator[Batch]:
    """The same batches, with their real and their trained tokens added up as they pass."""
    for batch in batches:
        counts[0] += batch.tokens
        counts[1] += batch.trained_tokens
        yield batch
