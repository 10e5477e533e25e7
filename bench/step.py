"""Whole training steps side by side: ours, Transformers with TRL, a padded loop, one in nanoGPT's manner; in one run.

PYTHONPATH=. python bench/step.py --peers_python=~/trl/bin/python          (two models of 25M parameters on a CPU)
PYTHONPATH=. python bench/step.py --device=cuda                            (a model of Qwen3-1.7B's shape on a GPU)

Everyone has the same initial weights, conversations, trained tokens, precision, optimizer and tokens a step, and the
best of a grid of options of its own (bench/step_measure.py), found anew in each task. Then all take turns of a few
steps, round by round; each in a process of its own, so that its memory is its own. Tokens/s are real tokens: padding
does not count. In the end all take the same steps over the same conversations, and their losses are compared.

Peak memory is what a process had resident while it took steps, on a GPU what its tensors had. Transformers, TRL,
datasets and liger-kernel (extra `bench`) are looked for in the interpreter of --peers_python; who is missing is listed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench.loss import machine, short_name, write_json
from bench.loss_goals import MEASURED
from bench.loss_measure import clocks, reason
from bench.step_extra import measured_apart, native_bf16, peers_versions
from bench.step_goals import goal_lines, judge
from bench.step_inputs import make_samples, save_samples
from bench.step_measure import GRIDS, TaskRun, measured_task
from bench.step_processes import ROOT, Workers
from bench.step_table import table_lines
from bench.step_tasks import OURS, SETS, Task
from sft.config import load_settings
from sft.errors import UserError, run_program
from sft.speed import peak_flops

STEPS = {"cpu": 1, "cuda": 3}  # of a turn
GRACE = 20  # seconds after the minutes in which turns may end and processes leave


@dataclass(frozen=True, kw_only=True)
class StepBenchmark:
    """Every knob of this benchmark."""

    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto = CUDA where there is a GPU
    tasks: Literal["auto", "cpu", "cuda", "tiny"] = "auto"  # auto = those of the device
    only: str | None = None  # tasks by name, with semicolons; None = all
    leave_out: str | None = None  # providers, with semicolons
    peers_python: str | None = None  # the interpreter that has the other projects; None = this one
    shared: str | None = None  # a folder with data/ and tokenizer/; None = ../shared, if there is one
    threads: int | None = None  # of each process on a CPU; None = as many as there are cores
    steps: int | None = None  # of a turn; None = 1 on a CPU, 3 on a GPU
    shares: bool | None = None  # one process per provider for all of its options; None = on a GPU
    rounds: int = 6  # at most
    minutes: float = 3.0  # for everything but what is measured apart; a CPU needs 12
    turn_seconds: float = 90.0  # a turn that takes longer has failed
    apart: bool = True  # also measure start-up and DDP, on a CPU
    out_dir: str = "bench/results"  # where step_<device>.json goes, whole after each task


def resolved(settings: StepBenchmark) -> StepBenchmark:
    """The settings with the defaults of the device in the place of None; a UserError where they cannot be."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU; use --device=cpu")
    if settings.peers_python is not None and shutil.which(settings.peers_python) is None:
        raise UserError(f"peers_python {settings.peers_python} is no program; name the interpreter that has TRL")
    given = asdict(settings) | {"device": device, "tasks": device if settings.tasks == "auto" else settings.tasks}
    given["steps"] = settings.steps or STEPS[device]
    given["shares"] = device == "cuda" if settings.shares is None else settings.shares
    if device == "cpu":
        given["threads"] = settings.threads or os.cpu_count()
    settings = StepBenchmark(**given)
    if not chosen_tasks(settings):
        raise UserError(f"no such task: {settings.only}; there are {'; '.join(t.name for t in SETS[settings.tasks])}")
    return settings


def chosen_tasks(settings: StepBenchmark) -> list[Task]:
    only = None if settings.only is None else settings.only.split(";")
    left_out = set((settings.leave_out or "").split(";"))
    return [
        Task.from_dict({**task.to_dict(), "providers": [name for name in task.providers if name not in left_out]})
        for task in SETS[settings.tasks]
        if only is None or task.name in only
    ]


def shared_folder(settings: StepBenchmark) -> Path | None:
    folder = Path(settings.shared or ROOT.parent / "shared")
    return folder if folder.is_dir() else None


def run_all(settings: StepBenchmark, report: dict[str, Any], out: Path, end: float) -> None:
    """Measure task after task, with what is left of the minutes shared out evenly; the report is written after each."""
    tasks = chosen_tasks(settings)
    device = torch.device(settings.device)
    workers = Workers(
        device=settings.device,
        shares=bool(settings.shares),
        peers_python=settings.peers_python,
        threads=settings.threads,
    )
    workers.start(list(dict.fromkeys(name for task in tasks for name in task.providers)))
    assert settings.steps is not None
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number, task in enumerate(tasks):
                samples, words = make_samples(task, shared_folder(settings))
                inputs = Path(folder) / f"{number}.npz"
                save_samples(inputs, samples)
                begin = time.monotonic()
                run = TaskRun(
                    task=task,
                    samples=samples,
                    inputs=inputs,
                    workers=workers,
                    steps=settings.steps,
                    rounds=settings.rounds,
                    end=begin + (end - begin) * task.time_share / sum(each.time_share for each in tasks[number:]),
                    turn_seconds=settings.turn_seconds,
                    last_end=end + GRACE,
                )
                result = {"data": words, **measured_task(run, GRIDS[settings.device])}
                peak = peak_flops(device)
                for row in result["providers"].values():
                    row["mfu"] = row["flops_per_second"] / peak if peak and row["status"] == MEASURED else None
                result["seconds"] = time.monotonic() - begin
                report["tasks"].append(result)
                report["goals"] = judge(
                    settings.device, report["tasks"], report["apart"], native_bf16=report["native_bf16"]
                )
                write_json(out, report)
                print("\n".join(table_lines(result)), flush=True)
    finally:
        workers.close()


def main(argv: list[str]) -> None:
    settings = resolved(load_settings(StepBenchmark, argv).settings)
    begin = time.monotonic()
    device = torch.device(settings.device)
    out = Path(settings.out_dir) / f"step_{short_name(device)}.json"
    report: dict[str, Any] = {
        "command": " ".join(["PYTHONPATH=. python bench/step.py", *argv]),
        "status": "running",
        **machine(device),
        "peers_versions": peers_versions(settings.peers_python),
        "settings": asdict(settings),
        "grids": {name: list(grid) for name, grid in GRIDS[settings.device].items()},
        "native_bf16": native_bf16(),
        "clocks_before": clocks(device),
        "tasks": [],
        "apart": {},
        "goals": [],
    }
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the clocks were read under
    try:
        if settings.apart and device.type == "cpu":
            report["apart"] = measured_apart(threads=settings.threads)
        run_all(settings, report, out, time.monotonic() + settings.minutes * 60)
        report["status"] = "finished"
    except BaseException as error:
        report["status"] = f"stopped: {reason(error)}"
        raise
    finally:
        report |= {"clocks_after": clocks(device), "seconds": time.monotonic() - begin}
        write_json(out, report)
    print("\n".join(["goals", *goal_lines(report["goals"]), f"{out}: {report['seconds']:.0f} s"]))
    bad = [result["task"]["name"] for result in report["tasks"] if result["providers"][OURS]["status"] != MEASURED]
    if bad:
        raise UserError(f"ours failed in {', '.join(bad)}")


if __name__ == "__main__":
    run_program(main)
