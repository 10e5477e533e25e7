"""What a run has come to, and whether it is, to the bit, what another one came to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# what a run comes to; the rest of a checkpoint is of its settings and of the time that it took
EQUAL = ("model", "optimizer", "iter_num", "rows_seen", "order", "trained_tokens_seen", "val_loss", "best_val_loss")


class Result(NamedTuple):
    """The last checkpoint of a run, and (step, loss and order hash) of every record in all of its logs."""

    checkpoint: dict[str, Any]
    records: set[tuple[int, tuple[float, str]]]


def result_of(out_dir: Path) -> Result:
    records = {(record["iter"], (record["loss"], record["order"])) for record in log_records(out_dir)}
    path = max(out_dir.glob("ckpt_0*.pt"))
    # by torch.load itself, not by what is tested here
    return Result(torch.load(path, weights_only=True), records)


def compare(out_dir: Path, whole: Result) -> list[str]:
    """What is not equal to the undisturbed run, in its last checkpoint or in any record of any log."""
    try:
        result = result_of(out_dir)
    except json.JSONDecodeError as error:
        return [f"a run log is no JSON: {error}"]
    problems = []
    for name in EQUAL:
        if places := differences(whole.checkpoint[name], result.checkpoint[name], name):
            problems.append(f"{len(places)} parts differ from the undisturbed run, the first is {places[0]}")
    for step, told in sorted(result.records - whole.records):
        problems.append(f"a log tells another loss or order of step {step}: {told}")
    if partial_files(out_dir):
        problems.append(f"partial files are left: {partial_files(out_dir)}")
    return problems


def partial_files(out_dir: Path) -> list[str]:
    """What a save has begun and not ended."""
    try:
        return [name for name in os.listdir(out_dir) if "ckpt" in name and name.endswith(".partial")]
    except FileNotFoundError:
        return []


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The places at which two trees of containers, tensors and numbers are not equal to the bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        equal = one.dtype == other.dtype and one.shape == other.shape and bytes_of(one) == bytes_of(other)
        return [] if equal else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {**one, **other}
        missing = object()
        return [
            place for key in keys
            for place in differences(one.get(key, missing), other.get(key, missing), f"{where}.{key}".strip("."))
        ]  # fmt: skip
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [
            place
            for i, pair in enumerate(zip(one, other, strict=True))
            for place in differences(*pair, f"{where}[{i}]")
        ]
    return [] if type(one) is type(other) and one == other else [where]


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def log_records(out_dir: Path) -> list[dict[str, Any]]:
    """Every record of an iteration in any run log of a folder; each log must be valid JSON."""
    logs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out_dir.glob("run_*.json"))]
    return [record for log in logs for record in log["training_iterations"]]
