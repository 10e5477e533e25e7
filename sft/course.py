"""Which rows a run takes, for how many steps, and whether that continues the run of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sft import continuity
from sft.arrays import PreparedData
from sft.batches import TrainLoader
from sft.packing import RowStream
from sft.startup import refuse_another_run
from sft.world import World


class Course(NamedTuple):
    """The way of a run through its data."""

    loader: TrainLoader
    steps: int  # at which it ends
    identity: Mapping[str, Any]  # sft/continuity.py


def chart_course(
    settings: Any, world: World, data: PreparedData, resume_path: Path | None, saved: Mapping[str, Any] | None
) -> Course:
    """The course of a run with these settings; `saved` is what the checkpoint at resume_path holds.

    Raises UserError where it would not continue that one's.
    """
    split, weights = data.splits["train"], data.source_weights
    stream = RowStream(
        split.lengths, block_size=settings.block_size, seed=settings.seed, sources=split.origins[:, 0], weights=weights
    )
    loader = TrainLoader(
        split,
        stream,
        batch_size=settings.batch_size,
        rows_per_step=continuity.rows_of_a_step(settings, world_size=world.size, saved=saved),
        rank=world.rank,
        world_size=world.size,
        pad_id=data.meta["pad_id"],
        seed=settings.seed,
        device=world.device,
    )
    rows = loader.rows_per_step
    steps = settings.steps(stream, rows_per_step=rows, saved=saved)
    identity = continuity.identity(data, rows_per_step=rows, world_size=world.size, decay=settings.decay(steps))
    if saved is not None and resume_path is not None:
        refuse_another_run(resume_path, saved, settings, identity)
        if (before := saved.get("rows_per_step", rows)) != rows:
            world.print(f"resumed  a step had {before} rows until now, and has {rows} from here on; none is left out")
    return Course(loader, steps, identity)
