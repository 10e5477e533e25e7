"""The masked cross-entropy beside every other that can be had, and beside the floor that the hardware sets; in one run.

PYTHONPATH=. python bench/loss.py                   (on a GPU: the sizes of a 1.8B model with Qwen3's vocabulary)
PYTHONPATH=. python bench/loss.py --minutes=12      (on a CPU: small sizes)

Needs torch and numpy, and triton on a GPU. Other projects take part where they are installed (extra `bench`) and are
listed with the reason where they are not. All work on the same inputs (bench/loss_inputs.py says how they are made) and
take turns, round by round; an option of theirs is the best of the grid in bench/loss_providers.py, found anew in each
configuration. Values and gradients are compared with the definition, sft/kernels/reference.py in fp32, in the same run.

The floor: the three bare products of a head over the n trained rows, plus 4 n V bytes (bf16 logits read once, their
gradient written once) at the measured bandwidth of a copy; over logits, the bytes alone, with the zeros written to the
masked rows; for the loss alone, one product and the bytes read. It takes its turns with the others. Medians of the time
between two events, and of wall-clock time from an idle GPU to an idle GPU.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from bench.loss_goals import goal_lines, judge
from bench.loss_inputs import Pool, draws_of, expected_of, make_head, make_pool
from bench.loss_measure import Copy, OutOfTime, clocks, reason
from bench.loss_providers import EVALUATION, OURS, PROVIDERS, WORKLOADS
from bench.loss_task import Task, measured_task
from bench.packing import processor
from sft.config import load_settings
from sft.errors import UserError, run_program

LIBRARIES = ("torch", "triton", "numpy", "liger-kernel", "cut-cross-entropy", "trl", "transformers", "quack-kernels")
POOL = 3  # batches that the rounds go through
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"tokens": "16384,8192,32768", "hidden_size": 2048, "dtype": "bfloat16"},
    "cpu": {"tokens": "2048", "hidden_size": 160, "dtype": "float32"},
}


@dataclass(frozen=True, kw_only=True)
class LossBenchmark:
    """Every knob of this benchmark."""

    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto = CUDA where there is a GPU
    tokens: str | None = None  # N, several with commas; None: 16384,8192,32768 on a GPU, 2048 on a CPU
    shares: str = "1.0,0.3,0.1,0.5"  # of the tokens that are trained
    hidden_size: int | None = None  # None: 2048 on a GPU, 160 on a CPU
    vocabulary: int = 151_936
    dtype: Literal["bfloat16", "float32"] | None = None  # of inputs; None: bfloat16 on a GPU, float32 on a CPU
    workloads: str = "head,logits,evaluation"
    leave_out: str | None = None  # providers, with semicolons: one that breaks the CUDA context spoils all after it
    minutes: float = 4.5  # for everything: so many rounds as fit; configurations that do not are left out, last first
    out_dir: str = "bench/results"  # where loss_<device>.json goes, whole after each configuration


def resolved(settings: LossBenchmark) -> LossBenchmark:
    """The settings with the defaults of the device in the place of None; a UserError where they cannot be."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU; use --device=cpu")
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    settings = LossBenchmark(**{**DEFAULTS[device], **given, "device": device})
    unknown = set(settings.workloads.split(",")) - set(WORKLOADS)
    unknown |= set(filter(None, (settings.leave_out or "").split(";"))) - {provider.name for provider in PROVIDERS}
    if unknown:
        raise UserError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)} and "
                        f"{'; '.join(dict.fromkeys(provider.name for provider in PROVIDERS))}")  # fmt: skip
    return settings


def configurations(settings: LossBenchmark) -> list[tuple[str, int, float]]:
    """Workload, N and share of each, the most important first; the loss alone with all tokens trained, which is what
    evaluation has."""
    assert settings.tokens is not None
    shares = [float(share) for share in settings.shares.split(",")]
    return [
        (workload, int(tokens), share)
        for share in shares
        for tokens in settings.tokens.split(",")
        for workload in settings.workloads.split(",")
        if workload != EVALUATION or share == max(shares)
    ]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def short_name(device: torch.device) -> str:
    """cpu, or a GPU's name as a part of a file's name: h200 of NVIDIA H200."""
    if device.type == "cpu":
        return "cpu"
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    return "_".join(word for word in words if word != "nvidia")


def machine(device: torch.device) -> dict[str, Any]:
    told = {"processor": processor(), "threads": torch.get_num_threads(), "versions": versions()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        told |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return told


def write_json(path: Path, report: dict[str, Any]) -> None:
    """The whole report or the one before it, at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def run_all(settings: LossBenchmark, device: torch.device) -> Iterator[dict[str, Any]]:
    """The result of each configuration, with what is left of the minutes shared out evenly, until they are over."""
    end = time.perf_counter() + settings.minutes * 60
    head = make_head(
        settings.vocabulary, settings.hidden_size, device=device, dtype=getattr(torch, str(settings.dtype))
    )
    copy = Copy(device)
    left_out = set((settings.leave_out or "").split(";"))
    pools: dict[int, Pool] = {}
    made = None
    plan = configurations(settings)
    for done, (workload, tokens, share) in enumerate(plan):
        if tokens not in pools:
            pools[tokens] = make_pool(head, tokens, size=POOL)
        pool = pools[tokens]
        if made != (tokens, share):
            made, draws = (tokens, share), draws_of(pool, share)
            expected = expected_of(head, draws[0])
        task = Task(workload=workload, pool=pool, share=share, draws=draws, copy=copy, expected=expected, end=end)
        try:
            yield measured_task(task, seconds=(end - time.perf_counter()) / (len(plan) - done), left_out=left_out)
        except OutOfTime:
            return


def print_configuration(result: dict[str, Any]) -> None:
    floor = result["floor"]
    print(
        f"{result['workload']}: N {result['tokens']:,}, share {result['share']:g}, n {result['trained']:,}; "
        f"floor {floor['milliseconds']:.3f} ms, copy {floor['gigabytes_per_second']:.0f} GB/s; "
        f"loss {result['loss']:.3f} nats, top probability {result['top_probability']:.2f}"
    )
    ranked = sorted(result["providers"].items(), key=lambda item: item[1].get("milliseconds", float("inf")))
    for name, row in ranked:
        if "milliseconds" not in row:
            print(f"  {name:<22} {row['status']}: {row['reason']}")
            continue
        memory = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e9:8.3f} GB"
        syncs = "" if row["host_syncs"] is None else f"  syncs {row['host_syncs']}"
        errors = " ".join(f"{key} {value:.1e}" for key, value in row["errors"].items())
        wrong = f"  WRONG: {row['reason']}" if row["status"] == "wrong" else ""
        print(
            f"  {name:<22} {row['milliseconds']:10.3f} ms {row['milliseconds'] / floor['milliseconds']:7.3f} x  "
            f"wall {row['wall_milliseconds']:10.3f} ms {memory}{syncs}  {row['option']}  errors: {errors}{wrong}",
            flush=True,
        )


def main(argv: list[str]) -> None:
    settings = resolved(load_settings(LossBenchmark, argv).settings)
    device = torch.device(settings.device)
    out = Path(settings.out_dir) / f"loss_{short_name(device)}.json"
    report: dict[str, Any] = {
        "command": " ".join(["PYTHONPATH=. python bench/loss.py", *argv]),
        "status": "running",
        **machine(device),
        "settings": asdict(settings),
        "grid": {f"{row.name}, {', '.join(row.workloads)}": [*row.grid, *row.gpu_grid] for row in PROVIDERS},
        "clocks_before": clocks(device),
        "planned": len(configurations(settings)),
        "configurations": [],
        "goals": [],
    }
    start = time.monotonic()
    try:
        for result in run_all(settings, device):
            report["configurations"].append(result)
            report["goals"] = judge(settings.device, report["configurations"])
            print_configuration(result)
            write_json(out, report)
    except Exception as error:
        report["status"] = f"stopped: {reason(error)}"
        write_json(out, report)
        raise
    measured, planned = len(report["configurations"]), report["planned"]
    status = "finished" if measured == planned else "out of time"
    report |= {"clocks_after": clocks(device), "status": status, "seconds": time.monotonic() - start}
    write_json(out, report)
    print(f"{status}: {measured} of {planned} configurations, by which the goals are judged")
    print("\n".join(["goals", *goal_lines(report["goals"]), f"{out}: {report['seconds']:.0f} s"]))
    bad = [result for result in report["configurations"] if result["providers"][OURS]["status"] in ("wrong", "failed")]
    if bad:
        raise UserError(f"ours is wrong or failed in {len(bad)} of {len(report['configurations'])} configurations")


if __name__ == "__main__":
    run_program(main)
