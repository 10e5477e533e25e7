"""A run in two parts, the second resumed from the checkpoint of the first, beside the same run in one."""

import json
from pathlib import Path

import pytest
import torch

import train_sft
from tests.test_train import assert_equal_trees

STEPS, HALF = 8, 3  # the first part ends inside a log interval
# warm-up and decay, dropout, accumulation, and the end of an epoch, which has 11 rows
OPTIONS = {"lr_decay_iters": STEPS, "dropout": 0.1, "log_interval": 2, "eval_interval": HALF}


def saved(folder: Path) -> dict:
    return torch.load(folder / "ckpt.pt", weights_only=True)


def logged(folder: Path) -> dict[int, tuple]:
    """Learning rate and order hash of each record of all logs but that of the first part's end."""
    logs = [json.loads(path.read_text()) for path in folder.glob("run_*.json")]
    records = [record for log in logs for record in log["training_iterations"] if record["iter"] != HALF]
    return {record["iter"]: (record["lr"], record["order"]) for record in records}


def test_a_run_in_two_parts_ends_as_one_in_one_to_the_bit(arguments, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_sft.main(arguments(**OPTIONS, max_iters=STEPS, save_interval=HALF, out_dir=whole))
    train_sft.main(arguments(**OPTIONS, max_iters=HALF, out_dir=parts))
    train_sft.main(arguments(**OPTIONS, max_iters=STEPS, out_dir=parts, resume="required"))
    expected, got = saved(whole), saved(parts)
    for name in ("model", "optimizer", "iter_num", "rows_seen", "order", "val_loss", "best_val_loss"):
        assert_equal_trees(got[name], expected[name], name)
    assert logged(parts) == logged(whole)
    assert expected["rows_seen"] > 11, "an epoch has ended"


@pytest.mark.slow
def test_after_a_change_of_rows_per_step_the_next_rows_come_next(arguments, tmp_path):
    def run(name: str, rows: int, steps: int, **changes: object) -> str:
        shape = {"gradient_accumulation_steps": "none", "rows_per_step": rows, "max_iters": steps, "eval_interval": 9}
        train_sft.main(arguments(**shape, lr_decay_iters=9, out_dir=tmp_path / name, **changes))
        return saved(tmp_path / name)["order"]

    run("changed", 4, 2)
    changed = run("changed", 3, 4, resume="required", allow_change="rows_per_step")
    assert changed == run("large", 7, 2), "the hash is of the rows alone, not of the steps"
