"""Whether a model is fit to be trained, and the disk to hold what comes of it: known before the first step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sft import control_rows, dry_run
from sft.control_rows import Row
from sft.errors import EXIT_FAILED, UserError
from sft.memory import gib
from sft.run import Run

MOST_NAMED = 3
FEWEST_CHECKPOINTS = 2  # a good one stays while the next one is written


def refuse_non_finite(base: nn.Module | None, source: Path | None) -> None:
    """Raise UserError that names the tensors of a loaded model, if there is one, with a number that is not finite."""
    if base is None:
        return
    odd = [name for name, parameter in base.named_parameters() if not is_finite(parameter.detach())]
    if odd:
        named = ", ".join(odd[:MOST_NAMED]) + (f" and {len(odd) - MOST_NAMED} more" if len(odd) > MOST_NAMED else "")
        raise UserError(f"{source}: holds numbers that are not finite, in {named}; start from another checkpoint")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are; read once, without memory for an answer to each."""
    if tensor.numel() == 0 or tensor.is_meta:
        return True
    least, most = torch.aminmax(tensor)  # either is nan where any number is
    return bool(torch.isfinite(least) & torch.isfinite(most))


def refuse_full_disk(
    settings: Any, model: nn.Module, steps: int, saved: Mapping[str, Any] | None, *, say: Callable[[str], None]
) -> None:
    """Raise UserError where out_dir has no room for two checkpoints; `say` that it has none for all that are promised.

    Checkpoints that are there already have their room, and give it to later ones.
    """
    steps_left = steps - (saved["iter_num"] if saved else 0)
    if steps_left <= 0 or settings.dry_run:  # which tells of the disk in its own way
        return
    promise = dry_run.promised_disk(settings, model, steps_left)
    room = promise.free + size_of_checkpoints(Path(settings.out_dir))
    if promise.free < promise.each or room < FEWEST_CHECKPOINTS * promise.each:
        raise UserError(
            f"out_dir {settings.out_dir}: {gib(promise.free)} free at {promise.folder}, a checkpoint takes "
            f"{gib(promise.each)}, and a good one stays while the next is written; make room, or choose another "
            "--out_dir",
            exit_status=EXIT_FAILED,
        )
    if room < promise.needed:
        say(
            f"warning: {promise.told} will not fit into the {gib(promise.free)} that are free at {promise.folder}; "
            "lower keep_checkpoints, or make room"
        )


def size_of_checkpoints(folder: Path) -> int:
    """Bytes of all checkpoints in a folder, those of two names counted once."""
    found = []
    for path in folder.glob("ckpt*.pt"):
        with contextlib.suppress(OSError):  # a link that leads nowhere
            found.append(path.stat())
    return sum({(each.st_dev, each.st_ino): each.st_size for each in found}.values())


def doubt_base(run: Run, source: str) -> None:
    """Warn where the loaded model is worse on the first rows of the run than one that knows nothing.

    Such a loss comes of another tokenizer, of weights under wrong names, or of a wrong shape. Every rank looks at rows
    of its own, and the main rank speaks; neither the random generators nor what is trained afterwards are touched.
    """
    loss, limit = first_loss(run), math.log(len(run.local_loss.model.head_weight)) + 1
    if loss <= limit:
        return
    sentence = (
        f"the loss of {source} on the first rows is {loss:.2f}, that of a model which knows nothing about "
        f"{limit - 1:.2f}; are its tokenizer and its architecture those of the data and of this program?"
    )
    run.world.print(f"warning  {sentence}")
    run.journal.event("strange_base", loss=loss, limit=limit, sentence=sentence)


def untrained_rows(settings: Any, model: Any, meta: Mapping[str, Any], *, begins: bool) -> list[Row]:
    """The control tokens' rows of a base that seem untrained, where a run `begins` with one; mended where asked for."""
    if settings.checkpoint_path is None or not begins or settings.dry_run:
        return []
    rows = control_rows.strange_rows(model, meta)
    if settings.untrained_rows == "mean":
        control_rows.begin_with_mean(model, meta, rows)
    return rows


def doubt(run: Run, settings: Any, rows: Sequence[Row], *, begins: bool) -> None:
    """Warn of a base, where a run `begins` with one, that does not fit; `rows` are those that seem untrained."""
    if begins and settings.checkpoint_path is not None:
        doubt_base(run, settings.checkpoint_path)
    if rows:
        doubt_rows(run, settings, rows)


def doubt_rows(run: Run, settings: Any, rows: Sequence[Row]) -> None:
    """Warn where a base seems not to know the tokens of a conversation."""
    sentence = control_rows.told(
        rows,
        source=settings.checkpoint_path,
        begins_with_mean=settings.untrained_rows == "mean",
        are_trained=all(part.requires_grad for part in control_rows.parts_of(run.model).values()),
    )
    run.world.print(f"warning  {sentence}")
    run.journal.event("untrained_rows", rows=[row._asdict() for row in rows], sentence=sentence)


@torch.no_grad()
def first_loss(run: Run) -> float:
    """The mean loss over this rank's first micro-batch of the run, without dropout."""
    batch = next(iter(run.loader.step(run.iter_num, rows_seen=run.rows_seen).batches))
    weight = batch.trained_tokens if batch.weights is None else float(batch.weights.double().sum())
    was_training = run.local_loss.training
    run.local_loss.eval()
    loss_sum = float(run.local_loss(dataclasses.replace(batch, dropout_seed=None)))
    run.local_loss.train(was_training)
    return loss_sum / weight if weight else 0.0
