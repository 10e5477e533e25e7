"""One task of bench/step.py: everyone's best option, then rounds in which all take turns, then whether they agree."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.loss_goals import MEASURED
from bench.loss_task import option_name
from bench.step_processes import ProviderFailed, Session, Workers
from bench.step_tasks import GROUPED, OURS, OURS_BF16, PADDED, PLAIN, TRL, Task
from model_config import forward_flops
from sft.arrays import Samples

Option = Mapping[str, Any]
GRID_SHARE = 0.65  # of a task's time: options that are not begun by then are not tried, save everyone's first
ROUNDS_SHARE = 0.85  # of a task's time: rounds that would not end by then are not begun; then losses are compared
ROUNDS_AT_LEAST = 2
SLOW_STEP = 10.0  # seconds of a CPU's first step that tell enough of an option without another step
NOT_TRIED = "not tried: out of time"
PLANNED_STEPS, PLANNED_DOCUMENTS = 10, 2  # of the comparison of loss curves
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}  # of a loss, relative


@dataclass
class Entry:
    """A provider in a task."""

    name: str
    grid: list[Option]
    session: Session | None = None  # of the best option so far
    option: Option = field(default_factory=dict)
    best: float = 0.0  # tokens per second
    told: dict[str, Any] = field(default_factory=dict)  # of each option: what it reached, or why not
    first: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None


@dataclass(frozen=True)
class TaskRun:
    """A task with everything that measuring it takes."""

    task: Task
    samples: Samples
    inputs: Path
    workers: Workers
    steps: int  # of a turn
    rounds: int
    end: float  # on the clock of time.monotonic; turns that are begun are finished
    turn_seconds: float  # after which a turn counts as failed
    last_end: float  # of the whole program: nothing is waited for after it

    @property
    def patience(self) -> float:
        """Seconds that the next turn may take."""
        return max(1.0, min(self.turn_seconds, self.last_end - time.monotonic()))

    def command(self, option: Option, **more: Any) -> dict[str, Any]:
        return {"task": self.task.to_dict(), "inputs": str(self.inputs), "option": dict(option), **more}


def speed(turn: Mapping[str, Any], of: str = "tokens") -> float:
    return turn[of] / turn["seconds"]


def measured_task(run: TaskRun, grids: Mapping[str, Sequence[Option]]) -> dict[str, Any]:
    """Everything that is told of a task."""
    entries = [Entry(name, list(grids[name])) for name in run.task.providers]
    begin = time.monotonic()
    grid_end, rounds_end = (begin + share * (run.end - begin) for share in (GRID_SHARE, ROUNDS_SHARE))
    for place in range(max(len(entry.grid) for entry in entries)):
        for entry in entries:
            if place < len(entry.grid):
                try_option(run, entry, entry.grid[place], in_time=place == 0 or time.monotonic() < grid_end)
    take_rounds(run, [entry for entry in entries if entry.session is not None], end=rounds_end)
    curves = {entry.name: curve for entry in entries if (curve := planned_losses(run, entry)) is not None}
    for entry in entries:
        if entry.session is not None:
            run.workers.leave(entry.session)
    flops = flops_per_token(run.task, run.samples)
    return {
        "task": run.task.to_dict(),
        "mean_length": float(run.samples.lengths.mean()),
        "trained_share": float(run.samples.targets.sum() / run.samples.lengths.sum()),
        "flops_per_token": flops,
        "providers": {entry.name: row_of(entry, flops, shares=run.workers.shares) for entry in entries},
        "agreement": agreement(run.task, curves),
    }


def try_option(run: TaskRun, entry: Entry, option: Option, *, in_time: bool) -> None:
    """Measure an option; the best so far keeps its session."""
    name = option_name(dict(option))
    if not in_time:
        entry.told[name] = NOT_TRIED
        return
    session = run.workers.session(entry.name, run.command(option))
    compiles = run.workers.device != "cpu" or option.get("compile")  # in the first step
    try:
        turn = session.turn(run.steps, run.patience, slow=math.inf if compiles else SLOW_STEP)
    except ProviderFailed as error:
        entry.told[name] = str(error)
        run.workers.leave(session)
        return
    ready = session.worker.ready or {}
    entry.told[name] = {
        "tokens_per_second": speed(turn),
        "peak_bytes": turn["peak_bytes"],
        "resident_bytes": ready["resident_bytes"],
    }
    if speed(turn) <= entry.best:
        run.workers.leave(session)
        return
    if entry.session is not None:
        run.workers.leave(entry.session)
    entry.session, entry.option, entry.best, entry.turns = session, option, speed(turn), [turn]
    entry.first = {**session.first, **ready, "import_seconds": ready["at"] - session.worker.started}


def take_rounds(run: TaskRun, entries: Sequence[Entry], *, end: float) -> None:
    """Turns of all, in a new order each round; what an option's trial took does not count any more."""
    for entry in entries:
        entry.turns = []
    longest = 0.0
    for number in range(run.rounds):
        if number >= ROUNDS_AT_LEAST and time.monotonic() + longest > end:
            return
        begin = time.monotonic()
        there = [entry for entry in entries if entry.failed is None]
        random.Random(number).shuffle(there)
        for entry in there:
            assert entry.session is not None
            try:
                run.workers.resume(entry.name, entry.session)
                if run.workers.shares and entry.session.is_open:
                    entry.session.turn(1, run.patience)  # takes back the memory that it gave away for others' turns
                entry.turns.append(entry.session.turn(run.steps, run.patience))
            except ProviderFailed as error:
                entry.failed = str(error)
        longest = max(longest, time.monotonic() - begin)


def planned_losses(run: TaskRun, entry: Entry) -> list[float] | None:
    """The losses of steps over the same conversations for everyone, in fp32 or bf16 as the task has it."""
    if entry.session is None or entry.failed is not None:
        return None
    documents = min(PLANNED_DOCUMENTS, max(1, run.task.tokens_per_step // int(run.samples.lengths.max())))
    numbers = itertools.cycle(range(len(run.samples)))
    plan = [[next(numbers) for _ in range(documents)] for _ in range(PLANNED_STEPS)]
    ours = entry.name in (OURS, OURS_BF16)
    option = entry.option if ours else {**entry.option, "compile": False}
    try:
        run.workers.resume(entry.name, entry.session)
        entry.session.stop()
        planned = {"do": "train", **run.command(option, plan=plan), "steps": PLANNED_STEPS}
        losses = entry.session.worker.ask(planned, run.patience)["losses"]
        entry.session.worker.ask({"do": "stop"}, run.patience)
    except ProviderFailed as error:
        entry.told["the same conversations"] = str(error)
        return None
    return losses


def agreement(task: Task, curves: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """How far everyone's losses are from ours, step by step over the same conversations."""
    told: dict[str, Any] = {"losses": dict(curves), "largest_relative_difference": {}, "agree": {}}
    for name, curve in curves.items():
        if OURS not in curves or name == OURS:
            continue
        differences = np.abs(np.array(curve) / np.array(curves[OURS]) - 1)
        tolerance = TOLERANCES["bfloat16" if name == OURS_BF16 else task.dtype]
        told["largest_relative_difference"][name] = float(differences.max())
        told["agree"][name] = bool(differences.max() <= tolerance)  # NaN does not
    return told


def flops_per_token(task: Task, samples: Samples) -> float:
    """What training needs for a real token of this data: exact products of causal attention within documents, the head
    on trained tokens only, forward and backward."""
    lengths = samples.lengths.astype(np.int64)
    pairs = int((lengths * (lengths + 1) // 2).sum())
    tokens, trained = int(lengths.sum()), int(samples.targets.sum())
    return 3 * forward_flops(task.config, tokens=tokens, attended_pairs=pairs, trained_tokens=trained) / tokens


def row_of(entry: Entry, flops: float, *, shares: bool) -> dict[str, Any]:
    """What is told of a provider."""
    untried = [name for name, why in entry.told.items() if why == NOT_TRIED]
    told: dict[str, Any] = {"options": entry.told, "untried": untried}
    if entry.session is None or entry.failed is not None or not entry.turns:
        reasons = [why for why in entry.told.values() if isinstance(why, str)]
        return {"status": "failed", "reason": entry.failed or "; ".join(dict.fromkeys(reasons)), **told}
    speeds = [speed(turn) for turn in entry.turns]
    peak = max(turn["peak_bytes"] for turn in entry.turns)
    return {
        "status": MEASURED,
        "option": option_name(dict(entry.option)),
        "tokens_per_second": statistics.median(speeds),
        "trained_tokens_per_second": statistics.median(speed(turn, "trained") for turn in entry.turns),
        "rounds": speeds,
        "spread": (max(speeds) - min(speeds)) / statistics.median(speeds),
        "processor_seconds_per_million_tokens": min(1e6 * t["processor_seconds"] / t["tokens"] for t in entry.turns),
        "tokens_per_update": sum(turn["tokens"] for turn in entry.turns) / sum(turn["steps"] for turn in entry.turns),
        "steps_per_round": entry.turns[0]["steps"],
        "flops_per_second": statistics.median(speeds) * flops,
        "peak_bytes": peak,
        "peak_bytes_beyond_imports": None if shares else peak - entry.first["resident_bytes"],
        "import_seconds": entry.first["import_seconds"],
        "start_to_first_step_seconds": entry.first["import_seconds"] + entry.first["open_seconds"],
        **told,
    }


def ratio(providers: Mapping[str, Any], one: str, other: str, *, of: str) -> float:
    """One provider's number over another's, the median over rounds; KeyError, with a sentence, where it is unknown."""
    rows = []
    for name in (one, other):
        row = providers.get(name, {"status": "missing", "reason": "not in this task"})
        if row["status"] != MEASURED:
            raise KeyError(f"{name} is {row['status']}: {row.get('reason')}")
        rows.append(row)
    if of != "tokens_per_second":
        if None in (rows[0][of], rows[1][of]):
            raise KeyError("it is not known apart where a process is shared")
        return rows[0][of] / rows[1][of]
    return statistics.median(a / b for a, b in zip(rows[0]["rounds"], rows[1]["rounds"], strict=False))


CPU_GRIDS: dict[str, Sequence[Option]] = {
    OURS: ({"rows": 1}, {"rows": 1, "row": 1024}),
    OURS_BF16: ({"rows": 1}, {"rows": 1, "row": 1024}),
    TRL: (
        {"packing": True, "batch": 1},
        {"packing": True, "batch": 1, "row": 1024},
        {"packing": False, "batch": 2},
    ),
    PADDED: ({"batch": 4}, {"batch": 2}),
    GROUPED: ({"batch": 4},),
    PLAIN: ({"block": 512, "batch": 1}, {"block": 256, "batch": 4}),
}
GPU_GRIDS: dict[str, Sequence[Option]] = {
    OURS: (
        {"rows": 4, "compile": True, "attention": "varlen"},
        {"rows": 2, "compile": True, "attention": "varlen"},
        {"rows": 4, "compile": True},
    ),
    TRL: (
        {"packing": True, "batch": 1, "liger": True},
        {"packing": True, "batch": 2, "liger": True, "attention": "flex_attention"},
        {"packing": True, "batch": 4, "liger": True, "attention": "flash_attention_2"},
        {"packing": True, "batch": 1},
    ),
    PADDED: ({"batch": 16}, {"batch": 32}),
    GROUPED: ({"batch": 16}, {"batch": 32}),
    PLAIN: ({"block": 4096, "batch": 2}, {"block": 4096, "batch": 2, "compile": True}),
}
GRIDS = {"cpu": CPU_GRIDS, "cuda": GPU_GRIDS}
