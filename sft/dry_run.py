"""What a run will come to, told before it starts: size, memory, data, disk, work and time; nothing is written."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.adapting import kept_parameters
from sft.batches import TrainLoader
from sft.calibration import StepTime, measure_step
from sft.checkpoint import FEWEST_WHILE_TRAINING
from sft.memory import HEADROOM, Estimate, Workload, estimates, gib, memory_at_hand
from sft.progress import Totals
from sft.recompute import Recomputing
from sft.samples import NOT_TRAINED

# What a checkpoint takes for each tensor beside its numbers, and for all that is no tensor.
CHECKPOINT_TENSOR_BYTES = 330
CHECKPOINT_BYTES = 8_000


class Counts(NamedTuple):
    """What rows hold."""

    rows: int
    tokens: int
    trained_tokens: int
    attended_pairs: int


def rehearse(
    settings: Any,
    work: Workload,
    loader: TrainLoader,
    *,
    steps: int,
    saved: Mapping[str, Any] | None,
    flops: Callable[[Totals], int],
) -> None:
    """Print what a run with these settings would come to. Every rank must call it; `saved` is where it would go on."""
    world = work.world
    first_step, first_row = (saved["iter_num"], saved["rows_seen"]) if saved else (0, 0)
    steps_left = max(0, steps - first_step)
    run = count(loader, first_row, steps_left * loader.rows_per_step)
    epoch = count(loader, 0, loader.stream.rows_per_epoch)
    step_flops = flops(as_totals(run)) / max(1, steps_left)
    memory = world.on_main(lambda: list(estimated_lines(work)))
    time = world.on_main(lambda: measure_step(work, loader, flops=flops))
    lines = [
        *size_lines(work.model),
        *memory,
        *data_lines(epoch, run, steps_left, loader),
        *disk_lines(settings, work.model, steps_left),
        f"work      {step_flops / 1e12:.3g} TFLOP a step on all ranks, {steps_left * step_flops / 1e12:.3g} in all",
        *time_lines(time, steps_left, tokens=run.tokens / max(1, steps_left)),
        "dry run   nothing was written and nothing was trained",
    ]
    for line in lines:
        world.print(line)


def as_totals(counts: Counts) -> Totals:
    return Totals(
        tokens=counts.tokens, trained_tokens=counts.trained_tokens, attended_pairs=counts.attended_pairs, steps=1
    )


def count(loader: TrainLoader, first: int, rows: int) -> Counts:
    """What the rows of the stream from `first` on hold, over all ranks: exactly what the run will log."""
    lengths, trained = loader.samples.lengths.astype(np.int64), trained_targets(loader)
    pairs = lengths * (lengths + 1) // 2
    sums = np.zeros(3, dtype=np.int64)
    for row in range(first, first + rows):
        samples = loader.stream.row(row)
        sums += [lengths[samples].sum(), trained[samples].sum(), pairs[samples].sum()]
    return Counts(rows, *map(int, sums))


def trained_targets(loader: TrainLoader) -> NDArray[np.int64]:
    """The trained tokens of each sample: a document's first token is nobody's target."""
    samples = loader.samples
    starts = np.asarray(samples.offsets[:-1], dtype=np.int64)
    is_trained = np.asarray(samples.labels) != NOT_TRAINED
    counts = np.add.reduceat(is_trained, starts, dtype=np.int64)
    return counts - is_trained[starts]


def size_lines(model: Any) -> Iterator[str]:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    yield f"model     {total:,} parameters, {trained:,} of them trained"


def estimated_lines(work: Workload) -> Iterator[str]:
    """The memory as far as it can be estimated: an operator may not run on tensors without content."""
    try:
        found = estimates(work)
    except Exception as error:
        yield f"memory    not estimated: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return
    yield from memory_lines(found, memory_at_hand(work.world.device), chosen=work.model.activation_checkpointing)


def memory_lines(found: Mapping[Recomputing, Estimate], at_hand: int, *, chosen: Recomputing) -> Iterator[str]:
    """Each part of the chosen mode's estimate, and all modes against the memory at hand."""
    needed = found[chosen].total
    yield f"memory    {gib(needed)} on this device by the estimate, {gib(at_hand)} at hand"
    for part, size in found[chosen].parts.items():
        yield f"          {part:<18} {gib(size):>10}"
    for mode, estimate in found.items():
        mark = "as set" if mode == chosen else ""
        fits = "fits" if estimate.total <= HEADROOM * at_hand else "does not fit"
        yield f"          activation_checkpointing={mode:<10} {gib(estimate.total):>10}  {fits}  {mark}".rstrip()
    if needed > HEADROOM * at_hand:
        short = f"{gib(needed)} will not fit into {gib(at_hand)} (a tenth is left free)"
        yield f"warning   {short}: {remedy(found, at_hand)}"


def remedy(found: Mapping[Recomputing, Estimate], at_hand: int) -> str:
    fitting = [mode for mode in found if found[mode].total <= HEADROOM * at_hand]
    if fitting:
        return f"set activation_checkpointing={fitting[0]}"
    parts = found["full"].parts
    kept = sum(parts.get(part, 0) for part in ("parameters", "optimizer moments", "moving average"))
    if kept > HEADROOM * at_hand:
        averaged = "" if "moving average" not in parts else "; or leave out ema_decay"
        return f"what it keeps between two steps alone is too large; train a smaller model{averaged}"
    return "set activation_checkpointing=full and lower batch_size for more micro-steps, then block_size"


def data_lines(epoch: Counts, run: Counts, steps: int, loader: TrainLoader) -> Iterator[str]:
    yield (
        f"epoch     {epoch.tokens:,} tokens, {epoch.trained_tokens:,} of them trained, in {epoch.rows:,} rows: "
        f"{math.ceil(epoch.rows / loader.rows_per_step):,} steps of {loader.rows_per_step} rows"
    )
    tokens = f"{run.tokens:,} tokens, {run.trained_tokens:,} of them trained"
    yield f"run       {steps:,} steps, {tokens}, in {run.rows:,} rows"


class DiskPromise(NamedTuple):
    """What a run will have on the disk at once, and what is free there."""

    each: int  # bytes of a checkpoint
    needed: int  # bytes of all that are kept, and of one being written
    kept: int  # numbered ones
    has_best: bool
    folder: Path  # the one that is there already, of out_dir and those around it
    free: int  # bytes

    @property
    def told(self) -> str:
        return f"{gib(self.needed)} for {self.kept} kept{', the best' if self.has_best else ''} and one being written"


def promised_disk(settings: Any, model: Any, steps: int) -> DiskPromise:
    """The checkpoints of so many steps that the settings ask for."""
    size = checkpoint_bytes(model, with_moments=settings.save_optimizer, with_average=settings.ema_decay is not None)
    every = settings.save_interval or steps
    saves = max(1, math.ceil(steps / max(1, every)))
    kept = min(saves, max(settings.keep_checkpoints or saves, FEWEST_WHILE_TRAINING))
    has_best = settings.eval_interval is not None
    out_dir = Path(settings.out_dir).absolute()
    folder = next(path for path in (out_dir, *out_dir.parents) if path.exists())
    return DiskPromise(size, (kept + has_best + 1) * size, kept, has_best, folder, shutil.disk_usage(folder).free)


def disk_lines(settings: Any, model: Any, steps: int) -> Iterator[str]:
    """The size of a checkpoint and of all that will lie on the disk at once, against what is free there."""
    promise = promised_disk(settings, model, steps)
    size = f"{gib(promise.each)} a checkpoint ({promise.each:,} bytes)"
    yield f"disk      {size}, {promise.told}; {gib(promise.free)} free at {promise.folder}"
    if promise.needed > promise.free:
        remedies = "lower keep_checkpoints, or choose an out_dir elsewhere"
        yield f"warning   {gib(promise.needed)} will not fit on that disk: {remedies}"


def checkpoint_bytes(model: Any, *, with_moments: bool = True, with_average: bool = False) -> int:
    """The file of a checkpoint: parameters, their moving average, and of the optimizer two moments and a count each."""
    size, tensors = CHECKPOINT_BYTES, 0
    for _, parameter in kept_parameters(model):
        moments, average = (parameter.requires_grad and saved for saved in (with_moments, with_average))
        size += parameter.nbytes * (1 + 2 * moments + average)
        tensors += 1 + 3 * moments + average
    return size + tensors * CHECKPOINT_TENSOR_BYTES


def time_lines(time: StepTime, steps: int, *, tokens: float) -> Iterator[str]:
    """The time of a step and of all; `tokens` are those of a step, without padding."""
    if time.problem is not None:
        yield f"time      not measured: {time.problem}"
        return
    yield (
        f"time      {duration(time.seconds)} a step, {duration(time.seconds * steps)} in all, estimated from "
        f"{time.measured}; {tokens / time.seconds:,.0f} tokens/s"
    )
    yield "          without evaluations, checkpoints, start and the exchange between ranks"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
