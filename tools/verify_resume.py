"""Prove that an interrupted run of your settings equals an uninterrupted one, to the bit.

python tools/verify_resume.py configs/mine.py [--steps=8] [--nproc_per_node=2] [--name=value ...]
"""

from __future__ import annotations

import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import train_sft
from sft import elsewhere
from sft.arrays import open_prepared
from sft.comparison import ROWS, Comparison, compare, logs_of, outcome
from sft.config import load_settings, words_of
from sft.course import chart_course
from sft.errors import EXIT_FAILED, UserError, run_program
from sft.interruption import Ended, run, run_until
from sft.world import World

USAGE = "python tools/verify_resume.py CONFIG [--name=value ...]"
TRAINER = Path(train_sft.__file__)
STEP_LINE = re.compile(r"step +(\d+)/\d+ +loss ")
SHUTDOWN_SECONDS = 3600  # that torchrun leaves its processes to save in
SIGNALS = {"SIGTERM": "preempted", "SIGKILL": "running"}  # and what the run log says after them
Result = Mapping[str, Comparison]  # by part of an outcome


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
    settings = load_settings(VerifySettings, own, usage=USAGE).settings
    if not theirs:
        raise UserError(f"which configuration? {USAGE}")
    trained = load_settings(train_sft.TrainSettings, theirs, elsewhere=elsewhere.TRAIN).settings
    near = next(path for path in Path(trained.out_dir).absolute().parents if path.is_dir())
    with temporary_folder(near if settings.folder is None else Path(settings.folder), keeps=settings.keep) as folder:
        print(f"{' '.join(theirs)}: runs of {settings.steps} steps, in {folder}", flush=True)
        Verification(settings, [*theirs, *changes(settings, trained)], folder).verify()


@contextmanager
def temporary_folder(place: Path, *, keeps: bool) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="verify_resume_", dir=place))
    try:
        yield folder
    finally:
        if not keeps:
            shutil.rmtree(folder, ignore_errors=True)


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


class Verification:
    """Runs of the same settings in folders of their own below one."""

    def __init__(self, settings: VerifySettings, words: Sequence[str], folder: Path):
        """`words`: of the trainer's command line."""
        self.settings, self.folder = settings, folder
        ranks = settings.nproc_per_node
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        torchrun.append(f"--shutdown-timeout={SHUTDOWN_SECONDS}")
        self.command = [sys.executable, *(torchrun if ranks else []), str(TRAINER), *words]

    def verify(self) -> None:
        """Make the runs and compare them; where they are not equal UserError, which says what is at fault."""
        self.finish("uninterrupted", resume="never")
        results = {}
        for name in SIGNALS:
            self.interrupt(name)
            results[name] = self.compared_with_whole(name)
        print_table(self.outcome("uninterrupted"), results)
        if not any(differing(result) for result in results.values()):
            print("equal: an interrupted run of these settings is the uninterrupted one, to the bit")
            return
        self.finish("once more", resume="never")
        raise UserError(verdict(results, self.compared_with_whole("once more")), exit_status=EXIT_FAILED)

    def interrupt(self, name: str) -> None:
        """A run that a signal ends after its middle, and that is resumed; where it comes too late, an earlier one."""
        for step in range(self.settings.steps // 2 + 1, 1, -1):
            shutil.rmtree(self.out_dir(name), ignore_errors=True)
            command = [*self.command, f"--out_dir={self.out_dir(name)}"]
            ended = run_until(command, partial(has_come, step), signal.Signals[name])
            logs = logs_of(self.out_dir(name))
            if logs and logs[-1]["status"] == SIGNALS[name] and ended.signalled_at:
                return self.finish(name, resume="required", after=f" after step {step_of(ended.signalled_at)}")
            if ended.status != 0:
                raise broken(f"{name} after step {step}: the run did not end as it should", ended)
        raise UserError(f"the runs are over before {name} comes; ask for more: --steps={4 * self.settings.steps}")

    def finish(self, name: str, *, resume: str, after: str = "") -> None:
        """A run that goes on to its end, told of on a line."""
        started = time.perf_counter()
        ended = run([*self.command, f"--out_dir={self.out_dir(name)}", f"--resume={resume}"])
        if ended.status != 0:
            raise broken(f"{name}{after}: the run failed", ended)
        events = logs_of(self.out_dir(name))[-1]["events"]
        resumed = [f", resumed from step {event['iter']}" for event in events if event["kind"] == "resumed"]
        print(f"  {name}{after}{''.join(resumed)}  ({time.perf_counter() - started:.1f} s)", flush=True)

    def compared_with_whole(self, name: str) -> Result:
        """How the outcome of a run compares; its checkpoints, which are large, go."""
        whole, other = self.outcome("uninterrupted"), self.outcome(name)
        result = {part: compare(whole[part], other[part]) for part in whole}
        for path in self.out_dir(name).glob("ckpt*.pt") if not self.settings.keep else ():
            path.unlink()
        return result

    def outcome(self, name: str) -> dict[str, Any]:
        return outcome(self.out_dir(name), step=self.settings.steps)

    def out_dir(self, name: str) -> Path:
        return self.folder / name.replace(" ", "_")


def step_of(line: str) -> int:
    """The step that a line of the trainer tells of; 0 for other lines."""
    match = STEP_LINE.match(line)
    return int(match[1]) if match else 0


def has_come(step: int, line: str) -> bool:
    return step_of(line) >= step


def broken(sentence: str, ended: Ended) -> UserError:
    return UserError(
        "\n".join([f"{sentence} (exit status {ended.status}):", *ended.output[-30:]]), exit_status=EXIT_FAILED
    )


def differing(result: Result) -> list[str]:
    """The parts that are not equal, each with its first difference."""
    return [
        f"{part}: {len(each.differences)} of {each.values} differ, first {each.differences[0].name or part}: "
        f"{each.differences[0].sentence}"
        for part, each in result.items()
        if each.differences
    ]


def print_table(whole: Mapping[str, Any], results: Mapping[str, Result]) -> None:
    print(f"\n  {'':<20}{'uninterrupted':<34}" + "".join(f"{name:<10}" for name in results))
    for part, value in whole.items():
        counts = {name: result[part] for name, result in results.items()}
        shown = f"{next(iter(counts.values())).values} values" if isinstance(value, Mapping) else str(value)
        words = (f"{len(each.differences)} differ" if each.differences else "equal" for each in counts.values())
        print(f"  {part:<20}{shown:<34}" + "".join(f"{word:<10}" for word in words))
    for name, result in results.items():
        for sentence in differing(result):
            print(f"  {name}: {sentence}")
    print(flush=True)


def verdict(results: Mapping[str, Result], again: Result) -> str:
    """What runs that differ come from, where two uninterrupted ones compare as `again`."""
    other_rows = [part for part in ROWS if any(result[part].differences for result in results.values())]
    if other_rows or not differing(again):
        why = f"the {other_rows[0]} differ" if other_rows else "two uninterrupted runs are equal, to the bit"
        return f"resuming is at fault: interrupted runs are other runs, and {why}"
    return "\n  ".join(
        [
            "these settings are not deterministic by themselves: two uninterrupted runs differ as well,",
            *differing(again),
            "and interrupted ones have seen the same rows: nothing here speaks against resuming",
        ]
    )


if __name__ == "__main__":
    run_program(main)
