"""How long a step will take, from a few seconds of the same work on the same device.

A model of two of the real blocks computes the real rows, with both blocks and with one: the difference is a block, the
rest is what does not depend on the depth.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from sft.adapting import resemble
from sft.batches import Batch, Document, TrainLoader, make_batch, read_row
from sft.memory import Workload
from sft.optim import make_optimizer
from sft.progress import Totals
from sft.samples import NOT_TRAINED
from sft.step import SummedLoss

TABLE_VALUES = 2**25  # at most so many in the measured model's embedding and in its head; the rest is extrapolated
MOST_FLOPS = {"cpu": 6e10, "cuda": 5e14}  # of a measured forward and backward
LEAST_TOKENS = 128  # of a measured row
REPETITIONS = 3


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and what they were estimated from."""

    seconds: float
    measured: str
    problem: str | None = None  # why there is no estimate


def measure_step(work: Workload, loader: TrainLoader, *, flops: Callable[[Totals], int]) -> StepTime:
    """The seconds of one step on this rank: blocks, head and optimizer are measured and extrapolated.

    `flops` counts those of a whole model's forward and backward.
    """
    try:
        with torch.random.fork_rng(enabled=work.world.device.type == "cpu"):
            return _measure(work, loader, flops)
    except Exception as error:
        return StepTime(float("nan"), "", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _measure(work: Workload, loader: TrainLoader, flops: Callable[[Totals], int]) -> StepTime:
    config, device = work.model.config, work.world.device
    vocabulary = min(config.vocab_size, max(1, TABLE_VALUES // config.n_embd))
    of_full = _flops(work.batch, flops)
    share = min(1.0, MOST_FLOPS[device.type] * config.n_layer / (2 * of_full))
    batch = work.batch
    if share < 1 or vocabulary < config.vocab_size:
        batch = smaller_batch(loader, share, vocabulary=vocabulary)
    scale = of_full / _flops(batch, flops)

    two_blocks = small_model(work.model, layers=2, vocabulary=vocabulary, device=device)
    modules = [
        SummedLoss(model, autocast_dtype=work.autocast_dtype, loss=work.loss)
        for model in (with_one_block(two_blocks), two_blocks)
    ]
    one, two = fastest([partial(forward_backward, module, batch) for module in modules], device)
    block = max(two - one, 0.0)
    rest = max(one - block, 0.0) * config.vocab_size / vocabulary
    micro_step = scale * (config.n_layer * block + rest)

    values = sum(p.numel() for p in work.model.parameters() if p.requires_grad)
    flat = nn.ParameterList([torch.zeros(min(values, TABLE_VALUES) // 64, 64, device=device)])
    flat[0].grad = torch.zeros_like(flat[0])
    optimizer = make_optimizer(flat, learning_rate=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    (update,) = fastest([partial(clip_and_update, flat, optimizer)], device)
    update *= values / max(1, flat[0].numel())
    measured = f"{batch.input_ids.numel():,} tokens through 1 and 2 of {config.n_layer} blocks"
    return StepTime(work.micro_steps * micro_step + update, measured)


def _flops(batch: Batch, flops: Callable[[Totals], int]) -> int:
    pairs, trained = batch.attended_pairs, batch.trained_tokens
    return flops(Totals(steps=1, tokens=batch.input_ids.numel(), attended_pairs=pairs, trained_tokens=trained))


def small_model(model: Any, *, layers: int, vocabulary: int, device: torch.device) -> nn.Module:
    """A model of the same blocks with weights of no meaning, computing as the model will."""
    config = dataclasses.replace(model.config, n_layer=layers, vocab_size=vocabulary)
    with torch.device(device):
        small = type(model)(config)
        resemble(small, model)
    small.set_attention(model.attention)
    small.activation_checkpointing = model.activation_checkpointing
    if model.compiled:
        small.compile_blocks()
    return small.train()


def with_one_block(model: Any) -> Any:
    """The same model, parameters shared, that ends after its first block."""
    shorter = copy.copy(model)
    shorter._modules = {**model._modules, "blocks": nn.ModuleList([model.blocks[0]])}
    return shorter


def smaller_batch(loader: TrainLoader, share: float, *, vocabulary: int) -> Batch:
    """About this share of the run's first micro-batch: fewer rows, or the beginning of one; ids below vocabulary."""
    tokens = share * loader.batch_size * loader.stream.block_size
    block_size = loader.stream.block_size
    while block_size > max(tokens, LEAST_TOKENS):
        block_size //= 2
    rows = []
    for row in range(max(1, int(tokens / block_size))):
        documents, space = [], block_size
        for ids, labels, _ in read_row(loader.samples, loader.stream.row(row)):
            if space > 0:
                small_labels = np.where(labels == NOT_TRAINED, NOT_TRAINED, labels % vocabulary)
                documents.append(Document(ids[:space] % vocabulary, small_labels[:space]))
                space -= len(ids)
        rows.append(documents)
    return make_batch(rows, block_size=block_size, pad_id=0, device=loader.device)


def forward_backward(module: nn.Module, batch: Batch) -> None:
    module(batch).backward()
    module.zero_grad(set_to_none=True)


def clip_and_update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def fastest(works: Sequence[Callable[[], None]], device: torch.device) -> list[float]:
    """The least seconds of each, in turns, after one that does not count."""
    best = [float("inf")] * len(works)
    for repetition in range(1 + REPETITIONS):
        for place, work in enumerate(works):
            synchronise(device)
            started = time.perf_counter()
            work()
            synchronise(device)
            if repetition:
                best[place] = min(best[place], time.perf_counter() - started)
    return best


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
