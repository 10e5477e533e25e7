"""What bench/step.py measures apart from its tasks: the start of the trainer, DDP, and who the others are."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.loss import LIBRARIES, versions
from bench.loss_measure import reason
from bench.step_inputs import drawn, save_samples
from bench.step_processes import ROOT
from bench.step_tasks import SETS, Task

STEP_LINE = re.compile(r"step +\d+/")  # the trainer's line about a step
STARTS = 3  # after one that fills the caches
STALL_STEPS = 4
LIMIT = 180  # seconds for each part
RANKS_TASK = ("cpu", "V 8,192")


def measured_apart(*, threads: int | None, task: tuple[str, str] = RANKS_TASK, rounds: int = 4) -> dict[str, Any]:
    """Numbers and, where one could not be had, the reason."""
    told: dict[str, Any] = {}
    parts = (
        lambda: first_step(threads),
        lambda: stall(task, threads),
        lambda: ddp_overhead(task, rounds),
        lambda: two_ranks(task, rounds),
    )
    for part in parts:
        try:
            told |= part()
        except Exception as error:
            told["why"] = reason(error)
    return told


def first_step(threads: int | None) -> dict[str, Any]:
    """Seconds from the start of train_sft.py to its first step, for the model of configs/demo_base.py."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare_demo(folder)
        seconds = [start_seconds(folder, threads, number) for number in range(STARTS + 1)][1:]
    return {"first_step_seconds": min(seconds), "first_step_seconds_of_starts": seconds}


def prepare_demo(folder: Path) -> None:
    """The demo's conversations, fewer, prepared into data/ of a folder."""
    import prepare_sft
    from demo.materials import write_materials

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        (folder / "raw").mkdir()
        made = write_materials(folder / "raw", seed=0, paper_count=300, per_kind=40, held_out_per_kind=4)
        argv = [f"--input={made.training}", f"--tokenizer={made.tokenizer}", f"--out_dir={folder / 'data'}"]
        prepare_sft.main([*argv, "--block_size=256"])


def stall(task: tuple[str, str], threads: int | None) -> dict[str, Any]:
    """The share of its steps that train_sft.py waits for the loader and the log, with a line about each step."""
    shape = named_task(task)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare_demo(folder)
        (folder / "config.py").write_text(f"model = {dict(shape.model)!r}\n", encoding="utf-8")
        argv = [str(folder / "config.py"), f"--sft_data_dir={folder / 'data'}", f"--out_dir={folder / 'out'}"]
        argv += [f"--block_size={shape.row}", "--batch_size=1", f"--rows_per_step={shape.rows_per_step}"]
        argv += [f"--max_iters={STALL_STEPS}", "--eval_interval=none", "--log_interval=1", "--save_interval=none"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads or os.cpu_count())}
        done = subprocess.run(
            [sys.executable, "train_sft.py", *argv, "--warmup_iters=0", "--device=cpu", "--compile=false"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        logs = list((folder / "out").glob("run_*.json"))
        if done.returncode or not logs:
            raise RuntimeError(f"train_sft.py failed: {done.stderr.strip()[-300:]}")
        log = json.loads(logs[0].read_text(encoding="utf-8"))
    return {"stall_share": log["summary"]["stall_share"], "stall_steps": STALL_STEPS}


def named_task(task: tuple[str, str]) -> Task:
    task_set, name = task
    return next(each for each in SETS[task_set] if each.name == name)


def native_bf16() -> bool:
    """Whether this machine's CPU has instructions for products in bf16."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) is not None


def start_seconds(folder: Path, threads: int | None, number: int) -> float:
    argv = ["configs/demo_base.py", f"--sft_data_dir={folder / 'data'}", f"--out_dir={folder / f'out{number}'}"]
    argv += ["--max_iters=1", "--eval_interval=none", "--log_interval=1", "--warmup_iters=0", "--device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads or os.cpu_count())}
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "train_sft.py", *argv], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        taken = next((time.perf_counter() - begin for line in process.stdout if STEP_LINE.match(line)), None)
        process.stdout.read()
    if taken is None:
        raise RuntimeError("train_sft.py told of no step")
    return taken


def ranks(task: tuple[str, str], count: int, rounds: int, steps: int) -> list[dict[str, float]]:
    """The turns of DDP over so many ranks, and of a process alone, on one thread each."""
    task_set, name = task
    shape = named_task(task)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        save_samples(inputs, drawn(shape.data, shape.samples, shape.row, shape.config.vocab_size))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "bench.step_ranks", task_set, name, str(inputs), str(rounds), str(steps)]
        processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            told, _ = processes[0].communicate(timeout=LIMIT)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return [json.loads(line) for line in told.splitlines()]


def quotients(turns: Sequence[dict[str, float]]) -> list[float]:
    """The time with DDP over the time alone, of each round."""
    if not turns:
        raise RuntimeError("the ranks told nothing")
    return [turn["ranked"] / turn["alone"] for turn in turns]


def ddp_overhead(task: tuple[str, str], rounds: int) -> dict[str, Any]:
    """What DDP around a single rank adds, as a share of a step."""
    told = quotients(ranks(task, 1, 2 * rounds, 1))
    return {"ddp_overhead": statistics.median(told) - 1, "ddp_overhead_rounds": [each - 1 for each in told]}


def two_ranks(task: tuple[str, str], rounds: int) -> dict[str, Any]:
    """Both ranks do as much in a step as one alone, so equal times would be twice the speed."""
    told = quotients(ranks(task, 2, rounds, 1))
    return {
        "two_rank_efficiency": 1 / statistics.median(told),
        "two_rank_efficiency_rounds": [1 / each for each in told],
    }


def peers_versions(python: str | None) -> dict[str, str]:
    """Versions of the libraries of the interpreter that the other projects run in."""
    if python is None:
        return versions()
    code = (
        "import json, platform, sys\nfrom importlib import metadata\nfound = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n    try:\n        found[name] = metadata.version(name)\n"
        "    except metadata.PackageNotFoundError:\n        pass\nprint(json.dumps(found))"
    )
    done = subprocess.run(
        [python, "-c", code, *LIBRARIES, "accelerate", "datasets"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)
