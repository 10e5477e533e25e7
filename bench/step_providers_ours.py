"""This project's trainer in bench/step.py: its model, packing, loader, loss and step, as train_sft.py joins them.

Left out is what train_sft.py adds around a step: counting progress (Progress, Totals), the log and its report,
validation, checkpoints, tracing and signals. What logging and the loader cost there is measured apart, as the
share of a step that train_sft.py itself tells (bench/step_extra.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from bench.step_inputs import document, fill_weights
from bench.step_worker import Gate, Step, Work
from model_builder import ConfigurableGPT
from sft.attention_choice import Heads, choose_attention
from sft.batches import NO_ROWS, Batch, Document, StepBatch, TrainLoader, make_batch
from sft.collector import QuietCollector
from sft.huggingface import name_table, to_hugging_face
from sft.optim import make_optimizer
from sft.packing import RowStream, pack
from sft.prefetch import Ahead
from sft.step import SummedLoss, train_step
from sft.world import World

PAD = 0
SEED = 1337
MOST_STEPS = 10**6
COMPILED: list[dict[str, Any]] = []  # the option that torch.compile worked for last


def load(provider: str) -> None:
    """Everything is imported already."""


def make_model(work: Work) -> ConfigurableGPT:
    with work.device:
        model = ConfigurableGPT(work.task.config)
    table = name_table(work.task.config.to_dict())
    fill_weights(to_hugging_face(dict(model.named_parameters()), table))
    if work.option.get("compile"):
        if COMPILED and work.option not in COMPILED:
            torch._dynamo.reset()  # shapes of another option would be taken for dynamic ones
        COMPILED[:] = [work.option]
        model.compile_blocks()
    return model.train()


def make_loader(work: Work) -> TrainLoader:
    """The trainer's own stream of packed rows."""
    row = work.option.get("row", work.task.row)
    rows_per_step = work.task.tokens_per_step // row
    return TrainLoader(
        work.samples,
        RowStream(work.samples.lengths, block_size=row, seed=SEED),
        batch_size=min(work.option["rows"], rows_per_step),
        rows_per_step=rows_per_step,
        rank=0,
        world_size=1,
        pad_id=PAD,
        seed=SEED,
        device=work.device,
    )


def planned_batches(work: Work) -> Iterator[StepBatch]:
    """The conversations of each planned step, packed into as few rows as hold them; compiled, into as many as ever."""
    assert work.plan is not None
    row = work.option.get("row", work.task.row)
    least = min(work.option["rows"], work.task.tokens_per_step // row) if work.option.get("compile") else 1
    for numbers in work.plan:
        rows = pack(work.samples.lengths[numbers], row)
        documents = [[Document(*document(work.samples, numbers[i])) for i in places.tolist()] for places in rows]
        documents += [[] for _ in range(least - len(rows))]
        batch = make_batch(documents, block_size=row, pad_id=PAD, device=work.device)
        yield StepBatch(batch, float(work.samples.targets[numbers].sum()), NO_ROWS)


def train(work: Work, gate: Gate) -> None:
    world = World(rank=0, size=1, device=work.device)
    model, loader = make_model(work), make_loader(work)
    config, dtype = model.config, work.autocast_dtype or torch.float32
    heads = Heads(config.n_head, config.key_heads, config.head_size)
    choice = work.option.get("attention", "auto")
    attention = choose_attention(choice, heads=heads, dtype=dtype, dropout=0.0, loader=loader, world=world)
    model.set_attention(attention.back_end)
    loss_module = SummedLoss(model, autocast_dtype=work.autocast_dtype)
    optimizer = make_optimizer(model, learning_rate=work.task.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    if work.plan is None:
        batches, micro_steps = loader.steps(0, rows_seen=0, end=MOST_STEPS), loader.micro_steps
    else:
        batches, micro_steps = planned_batches(work), 1
    ahead, collector = Ahead(batches, device=work.device), QuietCollector()
    collector.start()
    gate.training_starts()
    try:
        while (first := next(ahead, None)) is not None:
            counts = [0, 0]
            others = (following.batch for following in itertools.islice(ahead, micro_steps - 1))
            result = train_step(
                loss_module,
                optimizer,
                counted(itertools.chain([first.batch], others), counts),
                target_weight=first.target_weight,
                learning_rate=work.task.learning_rate,
                grad_clip=1.0,
                world=world,
            )
            if not gate(Step(result.loss_sum / first.target_weight, *counts)):
                return
    finally:
        ahead.close()
        collector.stop()


def counted(batches: Iterable[Batch], counts: list[int]) -> Iterator[Batch]:
    """The same batches, with their real and their trained tokens added up as they pass."""
    for batch in batches:
        counts[0] += batch.tokens
        counts[1] += batch.trained_tokens
        yield batch
