"""The start of a run: all that it begins with, made sure of before anything is written; what is wrong, told at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sft import start_checks, startup
from sft.arrays import PreparedData
from sft.attention_choice import Attention, Heads, choose_attention
from sft.control_rows import Row
from sft.course import Course, chart_course
from sft.experts import balance_weight
from sft.findings import Findings
from sft.loss import Loss, choose_loss
from sft.out_dir_lock import OutDirLock
from sft.world import World


class Start(NamedTuple):
    """What a run begins with, all of it examined."""

    data: PreparedData
    resume_path: Path | None
    saved: dict[str, Any] | None  # what is in that checkpoint, until the run has taken it over
    course: Course
    model: Any  # on its device
    loss: Loss
    attention: Attention
    untrained_rows: list[Row]  # of a base, sft/control_rows.py


def make_sure(
    settings: Any,
    world: World,
    lock: OutDirLock,
    *,
    load: Callable[[Path], Any],
    build: Callable[[PreparedData, Any], Any],
) -> Start:
    """Take the lock of out_dir, and read all that the run begins with; UserError with everything that is wrong with it.

    `load` gives the model of a checkpoint; `build` makes of it, or of None, the one to train. Every rank must call it.
    What is large, and the same for all, the main rank examines.
    """
    writes, proves, limit = not settings.dry_run, world.is_main, settings.block_size
    found = Findings(world)
    entered = found.on_main(lambda: startup.enter_out_dir(lock, say=world.print, writes=writes))
    data = found.together(lambda: startup.open_training_data(settings.sft_data_dir, block_size=limit, proves=proves))
    found.on_main(lambda: startup.refuse_swapped_tokenizer(data()))
    resume_path = found.on_main(lambda: _resume_path(settings, lock, writes, entered()))
    saved = found.together(lambda: startup.read_saved_state(path) if (path := resume_path()) else None)
    course = found.together(lambda: chart_course(settings, world, data(), resume_path(), saved()))

    def source() -> Path | None:
        path = (settings.resume != "never" and resume_path()) or settings.checkpoint_path
        return Path(path) if path else None

    def new_base() -> Path | None:  # what is resumed has been compared in all
        return source() if resume_path() is None else None

    base = found.together(lambda: load(path) if (path := source()) else None)
    found.on_main(lambda: start_checks.refuse_non_finite(base(), source()))
    found.on_main(lambda: startup.refuse_other_tokenizer(new_base(), data(), allowed=settings.allow_change))
    found.on_main(lambda: startup.refuse_foreign_tokenizer(data(), lock.out_dir, resumes=resume_path() is not None))
    found.on_main(lambda: startup.refuse_to_grow(base(), resume_path(), data()))
    model = found.together(lambda: build(data(), base()))
    found.on_main(lambda: start_checks.refuse_full_disk(settings, model(), course().steps, saved(), say=world.print))
    found.together(lambda: balance_weight(settings.router_aux_loss_coef, model()))
    loss = found.together(lambda: _loss(settings, world, model()))
    attention = found.together(lambda: _attention(settings, world, model(), course()))
    found.settle()
    begins = resume_path() is None
    rows = world.together(lambda: start_checks.untrained_rows(settings, model(), data().meta, begins=begins))
    return Start(data(), resume_path(), saved(), course(), model(), loss(), attention(), rows)


def _resume_path(settings: Any, lock: OutDirLock, writes: bool, _: None) -> Path | None:
    return startup.prepare_out_dir(lock, resume=settings.resume, writes=writes)


def _dtype(settings: Any, world: World, model: Any) -> torch.dtype:
    return settings.autocast_dtype(world.device) or model.head_weight.dtype


def _loss(settings: Any, world: World, model: Any) -> Loss:
    return choose_loss(settings.loss_kernel, device=world.device, dtype=_dtype(settings, world, model), world=world)


def _attention(settings: Any, world: World, model: Any, course: Course) -> Attention:
    """The way that all blocks of the model compute attention from now on."""
    attention = choose_attention(
        settings.attention,
        heads=Heads(model.config.n_head, model.config.key_heads, model.config.head_size),
        dtype=_dtype(settings, world, model),
        dropout=settings.dropout,
        loader=course.loader,
        world=world,
    )
    model.set_attention(attention.back_end)
    return attention
