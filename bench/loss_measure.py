"""Times, memory and synchronisations of contestants that take turns, and the floor that they are compared with."""

from __future__ import annotations

import math
import random
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROUNDS_AT_LEAST, ROUNDS_AT_MOST = 3, 100
WALL_EVERY = 3  # rounds: wall-clock time needs an idle GPU at the start, so it takes turns of its own
NEAR = 1.2  # times the shortest time: worth another try
PIECE = 4096  # rows of a product that is done in pieces
COPIED = {"cuda": 1 << 31, "cpu": 1 << 28}  # bytes read, and as many written, to measure the bandwidth
SYNCHRONISES = re.compile("synchronizing CUDA operation")
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")


class Contestant(NamedTuple):
    """`run(prepare(k))` is one measured call on the k-th inputs; `prepare` is not measured."""

    prepare: Callable[[int], Any]
    run: Callable[[Any], Any]


class OutOfTime(Exception):
    """The minutes of the whole benchmark are over."""


def check_time(end: float) -> None:
    """OutOfTime after `end`, on the clock of time.perf_counter."""
    if time.perf_counter() > end:
        raise OutOfTime


class Times(NamedTuple):
    device: list[float]  # milliseconds between two events behind queued work; on a CPU, wall-clock time
    wall: list[float]  # milliseconds on the host's clock from an idle device to an idle device


def device_milliseconds(contestant: Contestant, number: int, device: torch.device) -> float:
    """The time of one call on the device. The GPU still works at what was queued before it, so that launches that do
    not wait cost nothing, as in a training step."""
    if device.type != "cuda":
        return wall_milliseconds(contestant, number, device)
    inputs = contestant.prepare(number)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    result = contestant.run(inputs)
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end)


def wall_milliseconds(contestant: Contestant, number: int, device: torch.device) -> float:
    inputs = contestant.prepare(number)
    synchronise(device)
    start = time.perf_counter()
    result = contestant.run(inputs)
    synchronise(device)
    taken = time.perf_counter() - start
    del result
    return taken * 1e3


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    contestants: Mapping[str, Contestant], device: torch.device, *, seconds: float, pool: int, end: float = math.inf
) -> tuple[dict[str, Times], dict[str, str]]:
    """The times of all contestants, round by round in a new order each, until the seconds are over; and who failed.

    At least ROUNDS_AT_LEAST rounds: OutOfTime where these are not begun before `end`.
    """
    times = {name: Times([], []) for name in contestants}
    failed: dict[str, str] = {}
    begin = time.perf_counter()
    for round_number in range(ROUNDS_AT_MOST):
        if round_number < ROUNDS_AT_LEAST:
            check_time(end)
        elif time.perf_counter() - begin > seconds:
            break
        names = [name for name in contestants if name not in failed]
        random.Random(round_number).shuffle(names)
        for name in names:
            try:
                milliseconds = device_milliseconds(contestants[name], round_number % pool, device)
                times[name].device.append(milliseconds)
                if device.type != "cuda":
                    times[name].wall.append(milliseconds)
                elif round_number % WALL_EVERY == 0:
                    times[name].wall.append(wall_milliseconds(contestants[name], (round_number + 1) % pool, device))
            except Exception as error:
                failed[name] = reason(error)
    return {name: taken for name, taken in times.items() if name not in failed}, failed


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def extra_bytes(contestant: Contestant, device: torch.device) -> int | None:
    """The most memory that one call needed beyond its inputs, its results included; None where it cannot be told."""
    inputs = contestant.prepare(0)
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contestant.run(inputs)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak of the resident size
        before = resident_bytes("VmRSS")
        contestant.run(inputs)
        return max(0, resident_bytes("VmHWM") - before)
    except (OSError, StopIteration):
        return None


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def host_syncs(contestant: Contestant, device: torch.device) -> int | None:
    """How often one call made the host wait for the device, as torch sees it; None without one."""
    if device.type != "cuda":
        return None
    inputs = contestant.prepare(0)
    synchronise(device)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            contestant.run(inputs)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(bool(SYNCHRONISES.search(str(warning.message))) for warning in caught)


class Copy:
    """A copy between two large buffers: what memory can do, and work to be queued before a measured call."""

    def __init__(self, device: torch.device):
        self.source = torch.randint(0, 256, (COPIED[device.type],), dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)

    def __call__(self, _: object = None) -> None:
        self.target.copy_(self.source)

    def gigabytes_per_second(self, milliseconds: float) -> float:
        """Bytes read and written over a time that a copy took."""
        return 2 * self.source.numel() / milliseconds / 1e6


def product_layouts(hidden: Tensor, head: Tensor, gradient: Tensor) -> dict[str, dict[str, Callable[[Any], Any]]]:
    """The three products of a head in sensible forms: of hidden (n, D), head (V, D), the logits' gradient (n, V)."""
    rows, columns = range(0, len(hidden), PIECE), range(0, len(head), 8 * PIECE)
    return {
        "logits": {
            "whole": lambda _: hidden @ head.t(),
            "in pieces of rows": lambda _: [hidden[i : i + PIECE] @ head.t() for i in rows],
        },
        "hidden gradient": {
            "whole": lambda _: gradient @ head,
            "in pieces of rows": lambda _: [gradient[i : i + PIECE] @ head for i in rows],
        },
        "head gradient": {
            "whole": lambda _: gradient.t() @ hidden,
            "transposed": lambda _: hidden.t() @ gradient,
            "in pieces of columns": lambda _: [gradient[:, i : i + 8 * PIECE].t() @ hidden for i in columns],
        },
    }


def quickest(choices: Mapping[str, Contestant], device: torch.device, *, pool: int) -> str:
    """The name of the choice with the shortest try, after one try of each and two more of those near the best."""
    times = {name: device_milliseconds(choice, 0, device) for name, choice in choices.items()}
    near = [name for name, taken in times.items() if taken <= NEAR * min(times.values())]
    for k in (1, 2) if len(near) > 1 else ():
        for name in near:
            times[name] = min(times[name], device_milliseconds(choices[name], k % pool, device))
    return min(times, key=times.__getitem__)


def clocks(device: torch.device) -> dict[str, str] | None:
    """What nvidia-smi says of the GPU while it multiplies; None without a GPU or without nvidia-smi."""
    if device.type != "cuda":
        return None
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(2000):  # more than two seconds of work, queued
        square @ square
    query = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return {"unknown": reason(error)}
    finally:
        synchronise(device)
    return dict(zip(CLOCKS, (value.strip() for value in done.stdout.strip().split(",")), strict=False))


def summary(times: Times) -> dict[str, Any]:
    """Medians, and how far the device times spread."""
    low, *_, high = statistics.quantiles(times.device, n=10) if len(times.device) > 1 else times.device * 2
    return {
        "milliseconds": statistics.median(times.device),
        "wall_milliseconds": statistics.median(times.wall),
        "tenth_to_ninetieth_percentile": [low, high],
        "rounds": len(times.device),
    }
