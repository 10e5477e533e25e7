"""What to say when the device has no memory left: where, doing what, and which settings would fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from sft.batches import TrainLoader
from sft.errors import EXIT_FAILED, UserError
from sft.kernels import products
from sft.memory import HEADROOM, Workload, estimate, gib, memory_at_hand
from sft.packing import RowStream
from sft.phases import phases_of
from sft.recompute import LEAST_FIRST, Recomputing

PLACES = {
    "forward": "the forward pass",
    "backward": "the backward pass",
    "optimizer": "the optimizer's update",
    "evaluation": "the evaluation",
    "warm-up": "the warm-up",
    "loading": "loading the model",
    "batch": "making a batch",
    "saving": "saving a checkpoint",
}
MOST_SUGGESTIONS = 3


class Change(NamedTuple):
    """Settings that take less memory."""

    batch_size: int
    recomputing: Recomputing
    block_size: int
    micro_steps: int = 1  # of a step: fewer rows at once are more micro-steps, so that a step stays the same


def lacked(error: BaseException) -> bool:
    """Whether an error, not told in words of our own yet, comes of memory that was not to be had."""
    if not isinstance(error, Exception) or isinstance(error, UserError):
        return False
    return products.is_out_of_memory(error) or "DefaultCPUAllocator" in str(error)


@contextmanager
def told(device: torch.device) -> Iterator[None]:
    """A lack of memory inside becomes one message; for where there is no workload yet."""
    try:
        yield
    except Exception as error:
        if lacked(error):
            raise explained(error, device) from error
        raise


def explained(
    error: BaseException,
    device: torch.device,
    work: Workload | None = None,
    loader: TrainLoader | None = None,
    *,
    fixed: int | None = None,
) -> UserError:
    """One message for a lack of memory; without a workload and a loader the model was still to be loaded.

    `fixed` is the setting rows_per_step, which decides the micro-steps where it is given.
    """
    phases: list[str] = [*phases_of(error)] or ["loading" if work is None else "the run"]
    place = " of ".join(PLACES.get(phase, phase) for phase in phases)
    message = f"{device} is out of memory in {place}"
    if work is None or loader is None:
        message += "; train a smaller model, or free the device of what else runs there"
        return UserError(message, exit_status=EXIT_FAILED)
    now = Change(loader.batch_size, work.model.activation_checkpointing, loader.stream.block_size, loader.micro_steps)
    message += (
        f": a micro-batch has batch_size {now.batch_size} x block_size {now.block_size} = "
        f"{now.batch_size * now.block_size:,} tokens, with activation_checkpointing={now.recomputing}"
    )
    try:
        advice = _advice(work, loader, now, fixed)
    except Exception:  # the estimate must not take the place of the message
        advice = "set activation_checkpointing=full, lower batch_size for more micro-steps, or lower block_size"
    return UserError(f"{message}; {advice}", exit_status=EXIT_FAILED)


def _advice(work: Workload, loader: TrainLoader, now: Change, fixed: int | None) -> str:
    """Settings that fit by the estimate, the smallest changes first."""
    at_hand = memory_at_hand(work.world.device)
    needed = estimate(work, now.recomputing).total
    fitting = []
    for change in changes(now, longest=int(loader.samples.lengths.max())):
        size = estimate(changed(work, loader, change), change.recomputing).total
        if size <= min(HEADROOM * at_hand, needed - 1):
            fitting.append(f"{as_arguments(now, change, fixed)} ({gib(size)})")
        if len(fitting) == MOST_SUGGESTIONS:
            break
    told = f"a step needs {gib(needed)} by the estimate, and {gib(at_hand)} are at hand"
    if not fitting:
        return f"{told}: no batch_size, activation_checkpointing and block_size would fit; train a smaller model"
    return f"{told}; what would fit: {' or '.join(fitting)}"


def changes(now: Change, *, longest: int) -> Iterator[Change]:
    """Settings that take less memory, the least costly first; a row must hold the longest sample.

    A step keeps its rows, or its tokens where rows are shorter.
    """
    modes = LEAST_FIRST[LEAST_FIRST.index(now.recomputing) :]
    for mode in modes[1:]:
        yield now._replace(recomputing=mode)
    batch_size, rows = now.batch_size, now.batch_size * now.micro_steps
    while batch_size > 1:
        batch_size = next(size for size in range(batch_size // 2, 0, -1) if rows % size == 0)
        for mode in dict.fromkeys((modes[0], modes[-1])):
            yield now._replace(batch_size=batch_size, recomputing=mode, micro_steps=rows // batch_size)
    block_size = now.block_size
    while block_size // 2 >= longest:
        block_size //= 2
        rows *= 2
        yield Change(1, modes[-1], block_size, rows)


def changed(work: Workload, loader: TrainLoader, change: Change) -> Workload:
    """The same work with other settings."""
    stream = loader.stream
    if change.block_size != stream.block_size:
        stream = RowStream(loader.samples.lengths, block_size=change.block_size, seed=stream.seed)
    rows = change.batch_size * loader.world_size * change.micro_steps
    smaller = dataclasses.replace(loader, stream=stream, batch_size=change.batch_size, rows_per_step=rows)
    return dataclasses.replace(work, batch=next(smaller.step(0, rows_seen=0).batches), micro_steps=change.micro_steps)


def as_arguments(now: Change, change: Change, fixed: int | None = None) -> str:
    """The settings that differ, as they are typed; `fixed` as in explained."""
    new: dict[str, object] = {}
    if change.batch_size != now.batch_size:
        new["batch_size"] = change.batch_size
    rows, rows_now = (each.batch_size * each.micro_steps for each in (change, now))
    if fixed is None and change.micro_steps != now.micro_steps:
        new["gradient_accumulation_steps"] = change.micro_steps
    elif fixed is not None and rows != rows_now:
        new["rows_per_step"] = fixed * rows // rows_now
    if change.recomputing != now.recomputing:
        new["activation_checkpointing"] = change.recomputing
    if change.block_size != now.block_size:
        new["block_size"] = change.block_size
    return " ".join(f"--{name}={value}" for name, value in new.items())
