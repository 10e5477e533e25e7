"""Prove that an interrupted run of your settings equals an uninterrupted one, to the bit.

python tools/verify_resume.py configs/mine.py [--steps=8] [--nproc_per_node=2] [--name=value ...]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import train_sft
from sft import elsewhere
from sft.arrays import open_prepared
from sft.config import load_settings, words_of
from sft.course import chart_course
from sft.errors import UserError, run_program
from sft.verification import Verification
from sft.world import World

USAGE = "python tools/verify_resume.py CONFIG [--name=value ...]"
TRAINER = Path(train_sft.__file__)
SHUTDOWN_SECONDS = 3600  # that torchrun leaves its processes to save in


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """Compares runs of a few steps, interrupted and not. All other names are settings of train_sft.py."""

    steps: int = 8  # of each run
    nproc_per_node: int | None = None  # processes that torchrun starts; None = one process, without torchrun
    folder: str | None = None  # where the temporary folder is made; None = near out_dir, on the disk of the real run
    keep: bool = False  # do not delete it: it has the checkpoints and logs of all runs

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.steps < 4:
            yield "steps", f"steps must be at least 4, so that there are checkpoints on the way, not {self.steps}"
        if self.nproc_per_node is not None and self.nproc_per_node < 1:
            yield "nproc_per_node", f"nproc_per_node must be at least 1, not {self.nproc_per_node}"


def main(argv: list[str]) -> None:
    is_help = bool({"--help", "-h"} & set(argv))
    own, theirs = (argv, []) if is_help else words_of(VerifySettings, argv)
    if not theirs and not is_help:
        raise UserError(f"which configuration? {USAGE}")
    settings = load_settings(VerifySettings, own, usage=USAGE).settings
    trained = load_settings(train_sft.TrainSettings, theirs, elsewhere=elsewhere.TRAIN).settings
    near = next(path for path in Path(trained.out_dir).absolute().parents if path.is_dir())
    with temporary_folder(near if settings.folder is None else Path(settings.folder), keeps=settings.keep) as folder:
        print(f"{' '.join(theirs)}: runs of {settings.steps} steps, in {folder}", flush=True)
        command = [*trainer(settings), *theirs, *changes(settings, trained)]
        Verification(command, folder, steps=settings.steps, keeps=settings.keep).verify()


@contextmanager
def temporary_folder(place: Path, *, keeps: bool) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="verify_resume_", dir=place))
    try:
        yield folder
    finally:
        if not keeps:
            shutil.rmtree(folder, ignore_errors=True)


def trainer(settings: VerifySettings) -> list[str]:
    if settings.nproc_per_node is None:
        return [sys.executable, str(TRAINER)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [
        *torchrun,
        f"--nproc_per_node={settings.nproc_per_node}",
        f"--shutdown-timeout={SHUTDOWN_SECONDS}",
        str(TRAINER),
    ]


def changes(settings: VerifySettings, trained: train_sft.TrainSettings) -> list[str]:
    """What is other than in the real run. The learning rates are those of its first steps."""
    decay = trained.decay(real_length(settings, trained))
    changed = {
        "max_iters": settings.steps,
        "max_epochs": None,
        "lr_decay_iters": None if decay is None or decay < trained.warmup_iters else decay,  # else all is warm-up
        "eval_interval": trained.eval_interval and settings.steps // 2 - 1,
        "eval_rows": min(trained.eval_rows or 8, 8),
        "save_interval": settings.steps // 4,
        "keep_checkpoints": 1,
        "save_optimizer": True,
        "log_interval": 1,
        "log_save_seconds": 0,
        "allow_change": (),
        "dry_run": False,
        "profile": False,
    }
    return [f"--{name}={value}" for name, value in changed.items()]


def real_length(settings: VerifySettings, trained: train_sft.TrainSettings) -> int:
    """In steps."""
    if trained.max_iters is not None:
        return trained.max_iters
    world = World(rank=0, size=settings.nproc_per_node or 1, device=torch.device("cpu"))
    return chart_course(trained, world, open_prepared(trained.sft_data_dir), None, None).steps


if __name__ == "__main__":
    run_program(main)
