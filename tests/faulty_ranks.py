"""tests/faulty_run.py on ranks that are forked, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sft.errors import run_program
from tests import faulty_run
from tests.ranks import run_ranks

# of the content of a checkpoint: what an interrupted run has to end with, to the bit
OF_THE_RESULT = (
    *("model", "optimizer", "iter_num", "rows_seen", "order", "trained_tokens_seen"),
    *("val_loss", "best_val_loss", "watch", "owes_evaluation"),
)


def run_faulty(processes: int, fault: str, arguments: Sequence[str], folder: Path) -> list[int | None]:
    """The exit status of each rank; `fault`: what, at which point, on which rank, in which step."""
    folder.mkdir(parents=True, exist_ok=True)
    return run_ranks(processes, [str(folder), *fault.split(), *arguments], main=be_program)


def be_program(argv: list[str]) -> None:
    """What a shell does for a program."""
    folder, *arguments = argv
    redirect(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    sys.argv = ["train_sft.py", *arguments]
    run_program(faulty_run.main)


def redirect(folder: str) -> None:
    """What this rank prints goes into a file of its own."""
    output = os.open(Path(folder) / f"{os.environ['RANK']}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))


def said(folder: Path, rank: int) -> str:
    return (folder / f"{rank}.txt").read_text()


def logs(out_dir: Path) -> list[dict[str, Any]]:
    """Of all starts in a folder, the oldest first."""
    return [json.loads(path.read_text()) for path in sorted(out_dir.glob("run_*.json"))]


def evaluations(out_dir: Path) -> dict[int, float]:
    """The validation loss at each step; what was told twice, since a checkpoint was lost, is the same."""
    told: dict[int, float] = {}
    for each in (each for log in logs(out_dir) for each in log["eval_steps"]):
        assert told.setdefault(each["iter"], each["val_loss"]) == each["val_loss"]
    return told


def assert_same_end(got: Path, expected: Path) -> None:
    """The last and the best checkpoint, and each evaluation: the same to the bit."""
    for name in ("ckpt.pt", "ckpt_best.pt"):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (got, expected))
        for key in OF_THE_RESULT:
            assert is_same(one[key], two[key]), (name, key)
    assert evaluations(got) == evaluations(expected)


def is_same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(is_same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(is_same, one, two))
    return bool(one == two)
