"""Loops that people write themselves, in bench/step.py: Transformers over padded batches, and one in nanoGPT's manner.

The padded loop gives AutoModelForCausalLM batches of whole conversations, padded to the longest, with an attention mask
and labels of -100; conversations of like length can share a batch. nanoGPT's manner is a model of one's own, rows of a
fixed size cut from conversations laid end to end, causal attention over the whole row, all logits, F.cross_entropy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.step_inputs import document, fill_weights
from bench.step_plain_model import PlainModel
from bench.step_tasks import GROUPED, PLAIN
from bench.step_worker import Gate, Step, Work
from sft.samples import NOT_TRAINED

BATCHES_SORTED_TOGETHER = 50  # as Transformers' sampler that groups by length does


class Micro(NamedTuple):
    """A micro-batch on its way to the device. B rows, T tokens."""

    input_ids: Tensor  # (B, T)
    labels: Tensor  # (B, T), unshifted
    real: Tensor  # (B, T): 1 where a token is no padding
    tokens: int
    trained: int  # labels that are the target of some position


def load(provider: str) -> None:
    if provider != PLAIN:
        import transformers

        transformers.logging.set_verbosity_error()


def laid_out(documents: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device) -> Micro:
    """Documents as rows of one batch, padded to the longest."""
    shape = len(documents), max(len(ids) for ids, _ in documents)
    input_ids, labels = np.zeros(shape, np.int64), np.full(shape, NOT_TRAINED, np.int64)
    real = np.zeros(shape, np.int64)
    for row, (ids, targets) in enumerate(documents):
        input_ids[row, : len(ids)], labels[row, : len(ids)], real[row, : len(ids)] = ids, targets, 1
    trained = int((labels[:, 1:] != NOT_TRAINED).sum())

    def place(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    return Micro(place(input_ids), place(labels), place(real), int(real.sum()), trained)


def batches_of_documents(work: Work) -> Iterator[list[int]]:
    """Conversations in batches, epoch after epoch in a new order."""
    random, size = np.random.default_rng(0), min(work.option["batch"], work.documents_per_step)
    while True:
        order = random.permutation(len(work.samples))
        if work.provider == GROUPED:
            together = size * BATCHES_SORTED_TOGETHER
            parts = [order[i : i + together] for i in range(0, len(order), together)]
            order = np.concatenate([part[np.argsort(-work.samples.lengths[part], kind="stable")] for part in parts])
        batches = [order[i : i + size].tolist() for i in range(0, len(order) - size + 1, size)]
        for place in random.permutation(len(batches)):
            yield batches[place]


def padded_steps(work: Work) -> Iterator[list[Micro]]:
    batches = batches_of_documents(work)
    each = max(1, work.documents_per_step // work.option["batch"])
    while True:
        yield [laid_out([document(work.samples, n) for n in next(batches)], work.device) for _ in range(each)]


def row_steps(work: Work) -> Iterator[list[Micro]]:
    """Rows of a fixed size out of the endless text of all conversations, in a new order each epoch."""
    size, rows = work.option["block"], work.option["batch"]
    each = max(1, work.task.tokens_per_step // (size * rows))
    random = np.random.default_rng(0)
    while True:
        order = random.permutation(len(work.samples))
        documents = [document(work.samples, number) for number in order]
        ids, labels = (np.concatenate(parts) for parts in zip(*documents, strict=True))
        cut = [(ids[i : i + size], labels[i : i + size]) for i in range(0, len(ids) - size + 1, size)]
        for first in range(0, len(cut) - rows * each + 1, rows * each):
            step = cut[first : first + rows * each]
            yield [laid_out(step[i : i + rows], work.device) for i in range(0, len(step), rows)]


def planned_steps(work: Work) -> Iterator[list[Micro]]:
    assert work.plan is not None
    for numbers in work.plan:
        yield [laid_out([document(work.samples, n) for n in numbers], work.device)]


def steps_of(work: Work) -> Iterator[list[Micro]]:
    if work.plan is not None:
        return planned_steps(work)
    return row_steps(work) if work.provider == PLAIN else padded_steps(work)


def padded_loss(model: Any, micro: Micro, trained: int) -> Tensor:
    """What Transformers' own loss makes of a batch: a sum over `trained` targets of the whole step."""
    outputs = model(
        input_ids=micro.input_ids, attention_mask=micro.real, labels=micro.labels, num_items_in_batch=trained
    )
    return outputs.loss


def plain_loss(model: nn.Module, micro: Micro, trained: int) -> Tensor:
    logits = model(micro.input_ids)  # (B, T, V)
    targets = F.pad(micro.labels[:, 1:], (0, 1), value=NOT_TRAINED)
    mean = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NOT_TRAINED)
    return mean * (micro.trained / trained)


def make_model(work: Work) -> nn.Module:
    if work.provider != PLAIN:
        from bench.step_providers_trl import make_model as make_transformers_model

        return make_transformers_model(work)
    with work.device:
        model = PlainModel(work.task.config)
    fill_weights(dict(model.named_parameters()))
    if work.option.get("compile"):
        torch._dynamo.reset()
        model.compile()
    return model.train()


def make_optimizer(model: nn.Module, work: Work) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=work.task.learning_rate, betas=(0.9, 0.95), fused=True)


def train(work: Work, gate: Gate) -> None:
    model = make_model(work)
    optimizer = make_optimizer(model, work)
    loss_of = plain_loss if work.provider == PLAIN else padded_loss
    narrow = work.autocast_dtype
    gate.training_starts()
    for micros in steps_of(work):
        trained = sum(micro.trained for micro in micros)
        total = torch.zeros((), device=work.device)
        for micro in micros:
            with torch.autocast(work.device.type, narrow, enabled=narrow is not None):
                loss = loss_of(model, micro, trained)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not gate(Step(total, sum(micro.tokens for micro in micros), trained)):
            return
