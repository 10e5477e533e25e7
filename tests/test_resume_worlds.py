"""The rows of a run, whatever the number of ranks and the interruptions, and what it may not be resumed with.

Ranks are separate processes. With float64 the losses of different worlds differ by the order of their sums alone.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_sft
from sft.arrays import open_prepared
from sft.continuity import CHANGEABLE
from sft.errors import UserError
from sft.packing import RowStream
from tests.conftest import ROOT
from tests.launch import torchrun
from tests.preparing import exchange, prepare, write_lines
from tests.ranks import run_ranks
from tests.tiny_tokenizer import CONTROL, save_tiny_tokenizer

slow = pytest.mark.slow
ROUNDING = 1e-12  # relative
STEPS, HALF = 4, 2
# dropout, the end of an epoch of 11 rows, and evaluations: what could depend on the ranks or on an interruption
OPTIONS = {
    "max_iters": STEPS,
    "lr_decay_iters": STEPS,
    "dropout": 0.1,
    "dtype": "float64",
    "eval_interval": HALF,
    "eval_rows": 5,
    "save_interval": "none",
}


def fixed(rows_per_step: int) -> dict[str, Any]:
    return {"gradient_accumulation_steps": "none", "rows_per_step": rows_per_step}


def run_logs(folder: Path) -> list[dict[str, Any]]:
    """Of all starts in a folder, the oldest first."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("run_*.json"))]


def records(folder: Path) -> dict[int, dict[str, Any]]:
    """What the logs of a folder tell of each step; none may be told of twice."""
    told = [record for log in run_logs(folder) for record in log["training_iterations"]]
    assert len({record["iter"] for record in told}) == len(told)
    return {record["iter"]: record for record in told}


def validation_losses(folder: Path) -> dict[int, float]:
    return {record["iter"]: record["val_loss"] for log in run_logs(folder) for record in log["eval_steps"]}


def last_checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "ckpt.pt", weights_only=True)


def assert_same_steps(got: Path, expected: Path) -> None:
    """The same rows in each step, and up to rounding the same losses and gradients."""
    one, two = records(expected), records(got)
    assert list(two) == list(one) == list(range(1, STEPS + 1))
    for step, record in one.items():
        for name in ("order", "tokens", "trained_tokens", "lr"):
            assert two[step][name] == record[name], (step, name)
        for name in ("loss", "grad_norm"):
            assert two[step][name] == pytest.approx(record[name], rel=ROUNDING), (step, name)
    assert validation_losses(got) == pytest.approx(validation_losses(expected), rel=ROUNDING)
    assert last_checkpoint(got)["order"] == last_checkpoint(expected)["order"] == one[STEPS]["order"]
    assert last_checkpoint(got)["rows_seen"] == last_checkpoint(expected)["rows_seen"]


@pytest.fixture(scope="module")
def of_one(tmp_path_factory) -> Callable[..., Path]:
    """The folder of a run of one process, uninterrupted, by its rows per step."""
    folders: dict[int, Path] = {}

    def run(arguments: Callable[..., list[str]], rows_per_step: int) -> Path:
        if rows_per_step not in folders:
            folder = tmp_path_factory.mktemp(f"one_{rows_per_step}")
            train_sft.main(arguments(**OPTIONS, **fixed(rows_per_step), out_dir=folder))
            folders[rows_per_step] = folder
        return folders[rows_per_step]

    return run


@pytest.mark.parametrize(
    ("processes", "rows_per_step"),
    [(2, 7), (3, 7), *(pytest.param(*each, marks=slow) for each in ((4, 7), (6, 7), (2, 6), (3, 6), (4, 6), (6, 6)))],
)
def test_each_step_has_the_same_rows_and_losses_on_any_number_of_ranks(
    arguments, tmp_path, of_one, processes, rows_per_step
):
    """Dropout included. 7 rows come out even on no number of ranks: empty ones fill them up."""
    assert run_ranks(processes, arguments(**OPTIONS, **fixed(rows_per_step), out_dir=tmp_path)) == [0] * processes
    assert_same_steps(tmp_path, of_one(arguments, rows_per_step))
    assert last_checkpoint(tmp_path)["world_size"] == processes


def test_the_order_in_a_log_record_is_a_hash_of_the_data_and_of_every_row_until_then(arguments, prepared, of_one):
    samples = open_prepared(prepared).splits["train"]
    stream = RowStream(samples.lengths, block_size=64, seed=1337)
    order = bytes.fromhex(open_prepared(prepared).fingerprint)[:16]
    for step in range(STEPS):
        for row in range(7 * step, 7 * step + 7):
            indices = b"".join(int(index).to_bytes(8, "little") for index in stream.row(row))
            order = hashlib.blake2b(indices, digest_size=16, key=order).digest()
        assert records(of_one(arguments, 7))[step + 1]["order"] == order.hex()


@slow
@pytest.mark.parametrize("processes", [2, 3])
def test_under_torchrun_steps_have_the_rows_and_losses_of_one_process(arguments, tmp_path, of_one, processes):
    torchrun(processes, ROOT / "train_sft.py", *arguments(**OPTIONS, **fixed(7), out_dir=tmp_path))
    assert_same_steps(tmp_path, of_one(arguments, 7))


@pytest.mark.parametrize("processes", [1, *(pytest.param(size, marks=slow) for size in (3, 4, 6))])
def test_a_run_of_two_ranks_goes_on_with_the_next_rows_on_another_number(arguments, tmp_path, of_one, processes):
    """2 ranks x 3 micro-steps = 6 rows, which stay 6: how many micro-steps they take follows from the ranks."""
    options = {**OPTIONS, "gradient_accumulation_steps": 3, "out_dir": tmp_path}
    assert run_ranks(2, arguments(**{**options, "max_iters": HALF})) == [0, 0]
    assert run_ranks(processes, arguments(**options, resume="required")) == [0] * processes
    assert_same_steps(tmp_path, of_one(arguments, 6))
    told = run_logs(tmp_path)[-1]["startup_info"]
    assert (told["world_size"], told["rows_per_step"]) == (processes, 6)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"batch_size": 1, **fixed(6)}, {"batch_size": 4, **fixed(6)}),
        (
            {"batch_size": 2, "gradient_accumulation_steps": 3},
            {"batch_size": 3, "gradient_accumulation_steps": 2},
        ),
    ],
)
def test_another_batch_size_neither_repeats_nor_skips_a_row(arguments, tmp_path, before, after):
    """Without dropout, whose seeds go with the micro-batches."""
    options = {**OPTIONS, "dropout": 0.0}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_sft.main(arguments(**{**options, **before}, out_dir=whole))
    train_sft.main(arguments(**{**options, **before, "max_iters": HALF}, out_dir=broken))
    train_sft.main(arguments(**{**options, **after}, out_dir=broken, resume="required"))
    assert_same_steps(broken, whole)


def test_another_number_of_rows_a_step_neither_repeats_nor_skips_a_row(arguments, tmp_path, capsys):
    options = {**OPTIONS, "dropout": 0.0, "eval_interval": "none", "gradient_accumulation_steps": 1}
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    train_sft.main(arguments(**{**options, "batch_size": 2, "max_iters": 9}, out_dir=whole))
    decay = {**options, "lr_decay_iters": 9}
    train_sft.main(arguments(**{**decay, "batch_size": 2, "max_iters": 3}, out_dir=changed))
    train_sft.main(arguments(**{**decay, "batch_size": 4, "max_iters": 6}, out_dir=changed, resume="required"))
    assert "a step had 2 rows until now, and has 4 from here on" in capsys.readouterr().out
    summary, expected = (run_logs(folder)[-1]["summary"] for folder in (changed, whole))
    assert summary["rows_seen"] == expected["rows_seen"] == 18
    assert summary["order"] == expected["order"]


# what makes a resumed run another one, by the name that it is refused by
CHANGES: dict[str, dict[str, Any]] = {
    "learning_rate": {"learning_rate": 2e-2},
    "min_lr": {"min_lr": 2e-3},
    "lr_schedule": {"lr_schedule": "linear"},
    "warmup_iters": {"warmup_iters": 1},
    "decay": {"lr_decay_iters": 9},
    "seed": {"seed": 7},
    "block_size": {"block_size": 80},
    "weight_decay": {"weight_decay": 0.5},
    "beta1": {"beta1": 0.5},
    "beta2": {"beta2": 0.5},
    "grad_clip": {"grad_clip": "none"},
    "dropout": {"dropout": 0.2},
    "skip_spikes": {"skip_spikes": True},
    "ema_decay": {"ema_decay": 0.9},
    "data": {"sft_data_dir": "other"},
    "template": {"sft_data_dir": "thinking"},
    "tokenizer": {"sft_data_dir": "tokenizer"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the data of the run is, and other data."""
    folder = tmp_path_factory.mktemp("runs")
    for name, count, template in (("data", 12, "chatml"), ("other", 13, "chatml"), ("thinking", 12, "qwen3")):
        exchanges = [exchange(f"cat {number}?", "hat " * (number + 1)) for number in range(count)]
        write_lines(folder / "input.jsonl", exchanges)
        prepare(folder, out=name, template=template, block_size=64, val_fraction=0.2)
    more = [*CONTROL, *(f"<|{number}|>" for number in range(100))]
    for name, choices in (("tokenizer", {"texts": ["other words make other tokens"]}), ("larger", {"control": more})):
        (folder / f"of_{name}").mkdir()
        tokenizer = save_tiny_tokenizer(folder / f"of_{name}", **choices)
        prepare(folder, out=name, tokenizer=tokenizer, block_size=64, val_fraction=0.2)
    return folder


@pytest.fixture
def resume(arguments, folder, tmp_path) -> Callable[..., dict[str, Any]]:
    """Resumes a run of two steps with other settings until the fourth; the new log."""

    def go_on(**changes: Any) -> dict[str, Any]:
        given = {"max_iters": 4, "lr_decay_iters": 4, "eval_interval": "none", **changes}
        given["sft_data_dir"] = folder / given.get("sft_data_dir", "data")
        train_sft.main(arguments(**given, out_dir=tmp_path / "out", resume="required"))
        return run_logs(tmp_path / "out")[-1]

    if not (folder / "begun").exists():
        given = {"max_iters": 2, "lr_decay_iters": 4, "eval_interval": "none", "sft_data_dir": folder / "data"}
        train_sft.main(arguments(**given, out_dir=folder / "begun"))
    shutil.copytree(folder / "begun", tmp_path / "out")
    return go_on


def test_every_change_that_can_be_let_through_is_tested():
    assert {*CHANGES, "router_aux_loss_coef"} == set(CHANGEABLE)  # the latter below, of a model that has experts


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_by_its_name_and_let_through_by_it(name, resume):
    others = ",".join(other for other in CHANGEABLE if other not in (name, *implied(name)))
    with pytest.raises(UserError, match=rf"(?m)cannot be resumed[^\n]*\n  {name}: [^\n]*\n  what is meant"):
        resume(**CHANGES[name], allow_change=others)
    log = resume(**CHANGES[name], allow_change=name)
    assert (log["status"], log["summary"]["iter"]) == ("finished", 4)


def implied(name: str) -> list[str]:
    """Another tokenizer or template makes other data: who lets it through has let them through."""
    return {"template": ["tokenizer"], "data": ["template", "tokenizer"]}.get(name, [])


def test_all_changes_are_told_of_at_once(resume):
    with pytest.raises(UserError, match=r"(?s)  data: .*  seed: .*  learning_rate: .*  dropout: .*  decay: "):
        resume(sft_data_dir="other", seed=7, learning_rate=1, dropout=0.2, lr_decay_iters=9)


def test_the_whole_schedule_is_let_through_by_one_name(resume):
    changes = {**CHANGES["learning_rate"], **CHANGES["lr_schedule"], **CHANGES["decay"]}
    assert resume(**changes, allow_change="schedule")["status"] == "finished"
    with pytest.raises(UserError, match=r"allow_change: .schedul. is not among .*, schedule"):
        resume(**changes, allow_change="schedul")


def test_the_tokenizer_beside_the_checkpoints_is_that_of_the_data(resume, folder, tmp_path):
    (tmp_path / "out" / "old.tiktoken").touch()
    resume(sft_data_dir="tokenizer", allow_change="tokenizer")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer" / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "old.tiktoken").exists()


def test_the_weight_of_the_balance_of_experts_is_a_part_of_the_run(arguments, tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "expert_d_ff": 16}
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, **experts}
    options = {"model": shape, "lr_decay_iters": 4, "eval_interval": "none", "out_dir": tmp_path / "out"}
    train_sft.main(arguments(**options, max_iters=2, router_aux_loss_coef=0.1))
    with pytest.raises(UserError, match=r"router_aux_loss_coef: the run was started with 0\.1, not with 0\.2"):
        train_sft.main(arguments(**options, max_iters=4, router_aux_loss_coef=0.2, resume="required"))
    train_sft.main(arguments(**options, max_iters=4, router_aux_loss_coef=0.1, resume="required"))
    router = run_logs(tmp_path / "out")[-1]["training_iterations"][-1]["router"]
    assert list(router) == ["balance_loss", "least_load", "largest_load", "idle_experts"]
    assert router["largest_load"] >= 1 >= router["least_load"]


def test_a_resumed_model_does_not_grow(resume, folder):
    with pytest.raises(UserError, match=r"tokenizer: .*has \d+ ids, the model of .* has \d+; .*--checkpoint_path="):
        resume(sft_data_dir="larger", allow_change="tokenizer")


def test_a_refused_resume_changes_no_file(resume, tmp_path):
    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[!.]*")}

    before = contents()
    with pytest.raises(UserError, match="seed: "):
        resume(seed=7)
    assert contents() == before
