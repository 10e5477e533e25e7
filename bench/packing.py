"""How fast samples are packed into rows, and how full: beside TRL's pack_dataset, on the same lengths in one run.

PYTHONPATH=. OMP_NUM_THREADS=1 python bench/packing.py      (needs the extra `bench`: trl and datasets)

The lengths are drawn from a log-normal distribution fitted to Alpaca conversations, English and Chinese, under the
Qwen3 tokenizer. Everything runs on one core. TRL packs a data set whose only column is the token ids, the least that it
can be given. It also moves the tokens into rows; ours does that later, batch by batch, so the table has our plan with
the tokens moved as well. TRL's default packs a thousand samples at a time; "all at once" is its best fill.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft.config import load_settings
from sft.errors import UserError, run_program
from sft.packing import RowStream, pack

LOG_MEAN, LOG_SPREAD, SHORTEST = 4.755, 0.779, 18  # of 1,999 conversations with 154 tokens on average
OURS, MOVED, TRL, TRL_AT_ONCE = "ours, the plan", "ours, tokens moved", "TRL", "TRL, all at once"


@dataclass(frozen=True, kw_only=True)
class PackingBenchmark:
    """Every knob of this benchmark."""

    samples: int = 200_000  # in the comparison
    block_sizes: str = "2048,4096"  # tokens in a row
    repeats: int = 5  # of every contestant, taking turns; medians are told
    large: int = 1_000_000  # samples in the run of our own that shows the fill
    out: str = "bench/results/packing_cpu.json"  # where the result goes


class Packed(NamedTuple):
    rows: int
    tokens: int


def alpaca_lengths(samples: int, *, longest: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed).lognormal(LOG_MEAN, LOG_SPREAD, samples)
    return np.clip(draw, SHORTEST, longest).astype(np.int64)


def our_plan(lengths: np.ndarray, block_size: int) -> Packed:
    rows = pack(lengths, block_size)
    return Packed(len(rows), int(lengths[rows.samples].sum()))


def our_plan_and_tokens(lengths: np.ndarray, token_ids: np.ndarray, block_size: int) -> Packed:
    """Besides the plan, every token in its place: a copy of the data set, sample after sample as the rows have them."""
    rows = pack(lengths, block_size)
    starts, sizes = (np.cumsum(lengths) - lengths)[rows.samples].tolist(), lengths[rows.samples].tolist()
    moved = np.concatenate([token_ids[start : start + size] for start, size in zip(starts, sizes, strict=True)])
    return Packed(len(rows), len(moved))


def trl_dataset(lengths: np.ndarray, token_ids: np.ndarray) -> Any:
    """A data set in memory with the token ids as its only column."""
    import pyarrow as pa
    from datasets import Dataset

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, token_ids)}))


def trl_pack(dataset: Any, block_size: int, **map_kwargs: Any) -> Packed:
    from trl import pack_dataset

    packed = pack_dataset(dataset, seq_length=block_size, strategy="bfd", map_kwargs=map_kwargs or None)
    ids = packed.with_format("arrow")[:]["input_ids"]
    return Packed(len(packed), sum(len(chunk.flatten()) for chunk in ids.chunks))


def timed(act: Callable[[], Packed]) -> tuple[float, Packed]:
    start = time.perf_counter()
    result = act()
    return time.perf_counter() - start, result


def compare(lengths: np.ndarray, block_size: int, *, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds, samples per second and fill of each contestant. They take turns: the machine is the same for all."""
    token_ids = np.arange(lengths.sum(), dtype=np.int32)
    dataset = trl_dataset(lengths, token_ids)
    contestants: dict[str, Callable[[], Packed]] = {
        OURS: lambda: our_plan(lengths, block_size),
        MOVED: lambda: our_plan_and_tokens(lengths, token_ids, block_size),
        TRL: lambda: trl_pack(dataset, block_size),
        TRL_AT_ONCE: lambda: trl_pack(dataset, block_size, batch_size=len(lengths), keep_in_memory=True),
    }
    trl_pack(trl_dataset(lengths[:1], token_ids[: lengths[0]]), block_size)  # what only its first call does
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    results: dict[str, Packed] = {}
    for _ in range(repeats):
        for name, act in contestants.items():
            taken, results[name] = timed(act)
            seconds[name].append(taken)
    assert {result.tokens for result in results.values()} == {len(token_ids)}, "a contestant lost tokens"
    assert results[OURS].rows <= results[TRL_AT_ONCE].rows, "never more rows than best fit makes"
    ours = statistics.median(seconds[OURS])
    return {
        name: {
            "seconds": statistics.median(taken),
            "samples_per_second": len(lengths) / statistics.median(taken),
            "fill": len(token_ids) / (results[name].rows * block_size),
            "times_as_long_as_our_plan": statistics.median(taken) / ours,
        }
        for name, taken in seconds.items()
    }


def large_run(lengths: np.ndarray, block_size: int, *, repeats: int) -> dict[str, float]:
    """Our plan alone, and a whole epoch of the stream: shuffled, packed, shuffled again."""
    plans = [timed(lambda: our_plan(lengths, block_size)) for _ in range(repeats)]
    epochs = []
    for seed in range(repeats):
        start = time.perf_counter()
        RowStream(lengths, block_size=block_size, seed=seed).row(0)
        epochs.append(time.perf_counter() - start)
    seconds = statistics.median(taken for taken, _ in plans)
    rows = plans[0][1].rows
    return {
        "samples": len(lengths),
        "seconds": seconds,
        "samples_per_second": len(lengths) / seconds,
        "fill": float(lengths.sum() / (rows * block_size)),
        "seconds_for_an_epoch_of_the_stream": statistics.median(epochs),
    }


def processor() -> str:
    """The machine's name for its processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(argv: list[str]) -> None:
    settings = load_settings(PackingBenchmark, argv).settings
    try:
        import datasets
        import trl  # noqa: F401  # so that its import is not timed
    except ImportError as error:
        raise UserError(
            f"{error.name} is missing; pip install -e '.[bench]', best in an environment of its own"
        ) from error
    datasets.disable_caching()  # else a repeat reads the result of the first
    datasets.disable_progress_bars()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    report: dict[str, Any] = {
        "command": " ".join(["PYTHONPATH=. OMP_NUM_THREADS=1 python bench/packing.py", *argv]),
        "processor": processor(),
        "cores": 1,
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "trl", "datasets", "pyarrow", "transformers", "torch")},
        "samples": settings.samples,
        "repeats": settings.repeats,
        "block_sizes": {},
    }
    for block_size in map(int, settings.block_sizes.split(",")):
        lengths = alpaca_lengths(settings.samples, longest=block_size)
        table = compare(lengths, block_size, repeats=settings.repeats)
        large = large_run(alpaca_lengths(settings.large, longest=block_size), block_size, repeats=settings.repeats)
        report["block_sizes"][str(block_size)] = {"compared": table, "ours_alone": large}
        print(f"rows of {block_size} tokens, {settings.samples:,} samples of {lengths.mean():.0f} tokens on average")
        for name, row in table.items():
            print(
                f"  {name:<20} {row['seconds']:8.3f} s  {row['samples_per_second']:>12,.0f} samples/s"
                f"  fill {row['fill']:.5f}  {row['times_as_long_as_our_plan']:7.1f} x"
            )
        print(
            f"  {'ours, ' + format(settings.large, ','):<20} {large['seconds']:8.3f} s"
            f"  {large['samples_per_second']:>12,.0f} samples/s  fill {large['fill']:.5f}"
            f"  an epoch of the stream {large['seconds_for_an_epoch_of_the_stream']:.2f} s"
        )
    Path(settings.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
