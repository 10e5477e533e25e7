"""Every way to compute attention within documents that can be had here, in turns on the same rows; in one run.

PYTHONPATH=. python bench/attention.py                   (on a GPU: a layer of a 1.7B model in bfloat16)
PYTHONPATH=. python bench/attention.py --device=cpu      (a layer of a 25M model in float32)

Needs torch and numpy. A forward and a backward pass of one layer's attention, without its linear layers: the median
time between two events behind queued work, as in a training step; on a CPU wall-clock time. FLOP/s count what causal
attention within documents has to do, 14 H C for each pair of a query and a key, whatever a back end does beside it.
A back end takes part if its values and gradients are those of the definition.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bench.loss import machine, short_name, write_json
from bench.loss_measure import Contestant, clocks, take_turns
from sft.attention import Documents, attention_under_a_mask, causal_attention
from sft.attention_choice import Attention, Heads, active, documents_of, drawn, problem_of
from sft.config import load_settings
from sft.errors import UserError, run_program

BY_DOCUMENT, MASK, REPEATED = "one document after the other", "sdpa, mask", "sdpa, mask, keys repeated"
BACK_ENDS = ("varlen", "varlen_whole_rows", "flash3", "flash4", "flex")  # on a GPU
HEADS = {"cuda": Heads(16, 8, 128), "cpu": Heads(8, 4, 64)}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
# name of the rows: how many of how many tokens, the shortest and the longest document
ROWS = {
    "cuda": {"documents of 600": (8, 2048, 300, 900), "documents of 100": (8, 2048, 30, 170), "whole": (4, 4096, 0, 0)},
    "cpu": {"documents of 600": (1, 2048, 300, 900), "documents of 100": (1, 2048, 30, 170), "whole": (1, 2048, 0, 0)},
}


@dataclass(frozen=True, kw_only=True)
class AttentionBenchmark:
    """Every knob of this benchmark."""

    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto = CUDA where there is a GPU
    seconds: float = 4.0  # of turns for each kind of rows; compiling comes on top
    out_dir: str = "bench/results"  # where attention_<device>.json goes, whole after each kind of rows


def row_lengths(tokens: int, shortest: int, longest: int, generator: np.random.Generator) -> list[int]:
    """Documents that fill a row; one where there is no longest."""
    lengths: list[int] = []
    while left := tokens - sum(lengths):
        lengths.append(min(left, int(generator.integers(shortest, longest, endpoint=True))) if longest else left)
    return lengths


def under_a_mask(q: Tensor, k: Tensor, v: Tensor, *, documents: Documents, repeats: bool) -> Tensor:
    if repeats:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return attention_under_a_mask(q, k, v, documents.mask, dropout=0.0)


def by_back_end(q: Tensor, k: Tensor, v: Tensor, *, documents: Documents, name: str) -> Tensor:
    return causal_attention(q, k, v, documents=documents, dropout=0.0, back_end=Attention(name, "").back_end)


def contestant(name: str, attend: Callable[..., Tensor], inputs: list[Tensor], busy: Tensor | None) -> Contestant:
    *queries, grad = inputs

    def prepare(_number: int) -> None:
        if busy is not None:
            for _ in range(4):  # milliseconds, in which the host launches what is measured
                busy @ busy

    def run(_prepared: None) -> Any:
        with active(name):  # of its own kernels, where it has any: the host's time, which is not measured
            return torch.autograd.grad(attend(*queries), queries, grad)

    return Contestant(prepare, run)


def measured(device: torch.device, name: str, settings: AttentionBenchmark) -> dict[str, Any]:
    """Milliseconds and FLOP/s of every contestant on one kind of rows."""
    count, tokens, shortest, longest = ROWS[device.type][name]
    generator = np.random.default_rng(0)
    lengths = [row_lengths(tokens, shortest, longest, generator) for _ in range(count)]
    documents = documents_of(lengths, tokens, device)
    heads, dtype = HEADS[device.type], DTYPE[device.type]
    inputs = drawn(heads, dtype, documents)
    busy = torch.zeros(8192, 8192, dtype=torch.bfloat16, device=device) if device.type == "cuda" else None
    left_out: dict[str, str] = {}
    functions: dict[str, Callable[..., Tensor]] = {}
    if device.type == "cpu":
        functions[BY_DOCUMENT] = partial(by_back_end, documents=documents, name="by_document")
    else:
        for back_end in BACK_ENDS:
            if (problem := problem_of(back_end, heads, dtype, documents)) is not None:
                left_out[back_end] = problem
            elif back_end != "varlen_whole_rows" or not longest:
                functions[back_end] = partial(by_back_end, documents=documents, name=back_end)
    for repeats, label in ((False, MASK), (True, REPEATED)):
        functions[label] = partial(under_a_mask, documents=documents, repeats=repeats)
    contestants = {label: contestant(label, attend, inputs, busy) for label, attend in functions.items()}
    for each in contestants.values():
        each.run(each.prepare(0))  # compiled, loaded, allocated
    times, failed = take_turns(contestants, device, seconds=settings.seconds, pool=1)
    pairs = sum(length * (length + 1) // 2 for row in lengths for length in row)
    flops = 14 * heads.query * heads.size * pairs
    milliseconds = {label: statistics.median(taken.device) for label, taken in times.items()}
    return {
        "rows": {"name": name, "count": count, "tokens": tokens, "documents": sum(map(len, lengths)), "pairs": pairs},
        "heads": heads._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": min(len(taken.device) for taken in times.values()),
        "providers": {
            label: {"milliseconds": taken, "least": min(times[label].device), "tflops": flops / taken / 1e9}
            for label, taken in sorted(milliseconds.items(), key=lambda item: item[1])
        },
        "left_out": {**left_out, **failed},
    }


def main(argv: list[str]) -> None:
    settings = load_settings(AttentionBenchmark, argv).settings
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU; use --device=cpu")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if settings.device == "auto" else settings.device)
    out = Path(settings.out_dir) / f"attention_{short_name(device)}.json"
    command = " ".join(["PYTHONPATH=. python bench/attention.py", *argv])
    report = {"command": command, **machine(device), "settings": asdict(settings), "clocks_before": clocks(device)}
    start, results = time.monotonic(), []
    for name in ROWS[device.type]:
        results.append(result := measured(device, name, settings))
        print(f"{name}: {result['rows']['documents']} documents, {result['rounds']} rounds")
        for label, row in result["providers"].items():
            print(f"  {label:<30} {row['milliseconds']:9.3f} ms  {row['tflops']:8.3f} TFLOP/s")
        for label, problem in result["left_out"].items():
            print(f"  {label:<30} {problem}", flush=True)
        write_json(out, {**report, "rows": results, "clocks_after": clocks(device)})
    print(f"{out}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    run_program(main)
