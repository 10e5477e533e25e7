"""Faults of every kind put into saves, steps, ranks, files and our own code, and what became of them, as a table.

OMP_NUM_THREADS=1 python -m bench.faults                       (minutes; writes bench/results/faults.json)
OMP_NUM_THREADS=1 python -m bench.faults --only=kills,nan --short=true

Each line of the table is a Fault of one of the files bench/faults_*.py, run in a process of its own, which forks the
processes that it kills, stops or damages. Two run at a time. The exit status is not 0 where one is not met.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.faults_outcome import Fault, Outcome
from bench.faults_ranks import LOOK_SECONDS, forked
from bench.loss import versions, write_json
from bench.packing import processor
from sft.config import load_settings
from sft.errors import EXIT_FAILED, UserError, run_program

HERE = Path(__file__).resolve().parent
# as in the table; those that take longest are started first
ORDER = ("files", "damage", "kills", "torchrun", "rows", "nan", "headers", "defects")
LONGEST_FIRST = ("files", "kills", "torchrun", "defects")
LIMIT_SECONDS = 480.0  # for one of them
LATE_IMPORTS = ("torch._dynamo", "torch.distributed.fsdp")  # of the optimizer and DistributedDataParallel: seconds


@dataclass(frozen=True, kw_only=True)
class FaultsBenchmark:
    """Every knob of this program."""

    only: tuple[str, ...] = ()  # names of faults; none = all
    short: bool = False  # the small form of each, which the tests run
    at_once: int = 2  # so many faults at a time
    out: str | None = None  # where the result goes; None = bench/results/faults.json, where all were run in full


class Running(NamedTuple):
    """A fault under way."""

    fault: Fault
    folder: Path
    process_id: int
    started: float


def all_faults() -> list[Fault]:
    """The faults that the files bench/faults_*.py define, in the order of the table."""
    found: dict[str, Fault] = {}
    for path in sorted(HERE.glob("faults_*.py")):
        module = importlib.import_module(f"bench.{path.stem}")
        values = [*vars(module).values(), *getattr(module, "FAULTS", ())]
        found |= {value.name: value for value in values if isinstance(value, Fault)}
    names = [*(name for name in ORDER if name in found), *sorted(set(found) - set(ORDER))]
    return [found[name] for name in names]


def run_all(faults: Sequence[Fault], folder: Path, *, short: bool, at_once: int) -> Iterator[tuple[Fault, Outcome]]:
    """The outcome of each as it comes; the folders of those that are met are removed."""
    waiting = sorted(faults, key=lambda fault: fault.name not in LONGEST_FIRST)
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(start(waiting.pop(0), folder, short=short))
            for each in list(running):
                if (outcome := outcome_of(each)) is not None:
                    running.remove(each)
                    if outcome.is_met:
                        shutil.rmtree(each.folder, ignore_errors=True)
                    yield each.fault, outcome
            time.sleep(LOOK_SECONDS)
    finally:
        for each in running:
            os.killpg(each.process_id, signal.SIGKILL)
            os.waitpid(each.process_id, 0)


def start(fault: Fault, folder: Path, *, short: bool) -> Running:
    """A process group for the fault alone, which works below a folder of its own."""
    place = folder / fault.name
    (place / "work").mkdir(parents=True)

    def act() -> None:
        os.setpgid(0, 0)
        outcome = fault.run(place / "work", short)
        (place / "outcome.json").write_text(json.dumps(outcome.to_dict()), encoding="utf-8")

    return Running(fault, place, forked(act, place / "output.txt"), time.monotonic())


def outcome_of(running: Running) -> Outcome | None:
    """None while it goes on. Where it broke or took too long, the outcome says that and nothing else."""
    ended, status, used = os.wait4(running.process_id, os.WNOHANG)
    seconds = time.monotonic() - running.started
    if not ended and seconds < LIMIT_SECONDS:
        return None
    if ended and status == 0:
        told = json.loads((running.folder / "outcome.json").read_text(encoding="utf-8"))
        told["failures"] = tuple(told["failures"])
        del told["met"]
        # the seconds by the clock hang on what else the machine does
        told["counts"]["processor seconds"] = round(used.ru_utime + used.ru_stime, 1)
        return Outcome(**told)
    if ended:
        lines = (running.folder / "output.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        problem = "it broke: " + " / ".join(line.strip() for line in lines if line.strip())[-600:]
    else:
        os.killpg(running.process_id, signal.SIGKILL)
        os.waitpid(running.process_id, 0)
        problem = f"it did not end within {LIMIT_SECONDS:.0f} s"
    return Outcome(test=running.fault.name, must="end", cases=0, least=1, failures=(problem,), seconds=seconds)


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """The table of the README."""
    rows = ["| what is done | must show | cases | went wrong | met |", "|---|---|---|---|---|"]
    for each in outcomes:
        cases = f"{each.cases:,} (at least {each.least:,})"
        rows.append(
            f"| {each.test} | {each.must} | {cases} | {len(each.failures)} | {'yes' if each.is_met else 'NO'} |"
        )
    return rows


def main(argv: list[str]) -> None:
    settings = load_settings(FaultsBenchmark, argv).settings
    faults = all_faults()
    if unknown := set(settings.only) - {fault.name for fault in faults}:
        raise UserError(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(f.name for f in faults)}")
    faults = [fault for fault in faults if not settings.only or fault.name in settings.only]
    torch.set_num_threads(1)
    for name in LATE_IMPORTS:  # so that what is forked from here need not do it each time
        importlib.import_module(name)
    started, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="faults_"))
    found: dict[str, Outcome] = {}
    for fault, outcome in run_all(faults, folder, short=settings.short, at_once=settings.at_once):
        found[fault.name] = outcome
        print(f"{fault.name:<10} {outcome.cases:6,} cases  {outcome.seconds:6.1f} s  {summary(outcome)}", flush=True)
    found = {fault.name: found[fault.name] for fault in faults}
    seconds = time.monotonic() - started
    print("", *table(list(found.values())), "", f"{seconds:.0f} s", sep="\n", flush=True)
    out = settings.out or (None if settings.only or settings.short else HERE / "results" / "faults.json")
    if out is not None:
        write_json(Path(out), report(argv, found, seconds=seconds, short=settings.short))
    if missed := [name for name, outcome in found.items() if not outcome.is_met]:
        kept = ", ".join(str(folder / name) for name in missed)
        raise UserError(f"not met: {', '.join(missed)}; what they left is in {kept}", exit_status=EXIT_FAILED)
    shutil.rmtree(folder)


def summary(outcome: Outcome) -> str:
    """One line of what was counted, or all that went wrong."""
    if outcome.failures:
        return f"{len(outcome.failures)} went wrong:" + "".join(f"\n    {failure}" for failure in outcome.failures[:20])
    return ", ".join(f"{name}: {count}" for name, count in outcome.counts.items())


def report(argv: Sequence[str], found: dict[str, Outcome], *, seconds: float, short: bool) -> dict[str, Any]:
    return {
        "command": " ".join(["OMP_NUM_THREADS=1 python -m bench.faults", *argv]),
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "short": short,
        "seconds": round(seconds, 1),
        "faults": {name: outcome.to_dict() for name, outcome in found.items()},
    }


if __name__ == "__main__":
    run_program(main)
