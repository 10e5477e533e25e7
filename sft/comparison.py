"""Whether two runs have come to the same, to the bit, and where they have not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sft.checkpoint import read_checkpoint
from sft.past_steps import read_logs

COUNTERS = ("iter_num", "trained_tokens_seen", "val_loss", "best_val_loss", "watch")
OF_A_STEP = ("loss", "grad_norm", "lr", "trained_tokens", "tokens", "skipped", "order")
OF_AN_EVALUATION = ("val_loss", "trained_tokens", "rows")
ROWS = ("rows seen", "order of the rows")  # parts that no kernel decides


class Difference(NamedTuple):
    """One place at which two trees differ."""

    name: str  # blocks.0.attn.c_q.weight
    sentence: str
    size: float  # the largest absolute difference of two numbers; infinite where it is none of numbers


class Comparison(NamedTuple):
    values: int  # of tensors and plain values
    differences: list[Difference]  # in the order of the first tree


def outcome(out_dir: Path, *, step: int) -> dict[str, Any]:
    """What a run has come to with a step, in parts: all that must not depend on how often it was interrupted."""
    saved, logs = read_checkpoint(out_dir / f"ckpt_{step:06d}.pt"), read_logs(out_dir)
    return {
        "model": saved["model"],
        "optimizer": saved["optimizer"],
        **({"moving average": saved["ema"]} if "ema" in saved else {}),
        "rows seen": saved["rows_seen"],
        "order of the rows": saved["order"],
        "counters": {name: saved[name] for name in COUNTERS},
        "validation losses": _told(logs, "eval_steps", OF_AN_EVALUATION),
        "logged steps": _told(logs, "training_iterations", OF_A_STEP),
    }


def _told(logs: Sequence[Mapping[str, Any]], section: str, names: Sequence[str]) -> dict[str, Any]:
    """What logs tell of each step: a list of all versions where they contradict each other."""
    versions: dict[str, list[Any]] = {}
    for record in (record for log in logs for record in log[section]):
        found = versions.setdefault(f"step {record['iter']}", [])
        if (told := {name: record[name] for name in names}) not in found:
            found.append(told)
    return {step: found[0] if len(found) == 1 else found for step, found in versions.items()}


def compare(one: Any, two: Any) -> Comparison:
    """What two trees of dicts, lists, tuples, tensors and plain values have in common; -0.0 is not 0.0, NaN is NaN."""
    found = list(_pairs(one, two, ""))
    differences = [
        Difference(name, *problem) for name, *pair in found if (problem := _difference(pair[0], pair[1])) is not None
    ]
    return Comparison(len(found), differences)


class Absent:
    """Stands where the other tree has something."""

    def __repr__(self) -> str:
        return "nothing"


def _pairs(one: Any, two: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """The leaves of both trees by their names."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        for key in {**one, **two}:
            yield from _pairs(one.get(key, Absent()), two.get(key, Absent()), f"{name}.{key}" if name else str(key))
    elif isinstance(one, (list, tuple)) and type(one) is type(two) and len(one) == len(two):
        for place, (first, second) in enumerate(zip(one, two, strict=True)):
            yield from _pairs(first, second, f"{name}[{place}]")
    else:
        yield name, one, two


def _difference(one: Any, two: Any) -> tuple[str, float] | None:
    """How two leaves differ, in words and in size."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return _tensor_difference(one, two)
    if type(one) is type(two) and _key(one) == _key(two):
        return None
    are_numbers = isinstance(one, (int, float)) and isinstance(two, (int, float))
    return f"{_shown(one)} and {_shown(two)}", _size(abs(one - two)) if are_numbers else math.inf


def _key(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value  # "nan", and a sign also of zero


def _shown(value: Any) -> str:
    text = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _tensor_difference(one: Tensor, two: Tensor) -> tuple[str, float] | None:
    kinds = [f"{str(each.dtype).removeprefix('torch.')} of {tuple(each.shape)}" for each in (one, two)]
    if kinds[0] != kinds[1]:
        return f"{kinds[0]} and {kinds[1]}", math.inf
    if torch.equal(_bytes(one), _bytes(two)):
        return None
    differ = (_bytes(one) != _bytes(two)).reshape(one.numel(), -1).any(dim=1)
    first, second = (each.detach().reshape(-1)[differ].double() for each in (one, two))
    size = _size((first - second).abs().max().item())
    return f"{len(first):,} of {one.numel():,} numbers differ, by at most {size:.3g}", size


def _size(difference: float) -> float:
    return math.inf if math.isnan(difference) else float(difference)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
