"""What a dry run tells against the run that follows."""

import json
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import prepare_sft
import train_sft
from sft import dry_run
from sft.errors import UserError
from sft.memory import Estimate
from tests.conftest import ROOT
from tests.devices import gpu_test
from tests.launch import torchrun

LARGE = {"n_layer": 8, "n_head": 7, "n_embd": 448, "vocab_size": 8192}  # 26.6 million parameters


def told(capsys, arguments) -> str:
    """What a dry run prints."""
    capsys.readouterr()
    train_sft.main([*arguments, "--dry_run"])
    return capsys.readouterr().out


def numbers(pattern: str, text: str) -> list[float]:
    (match,) = re.findall(pattern, text, flags=re.MULTILINE)
    return [float(each.replace(",", "")) for each in ((match,) if isinstance(match, str) else match)]


def totals(log: dict, name: str) -> int:
    return sum(record[name] for record in log["training_iterations"])


def the_log(folder: Path) -> dict:
    (path,) = folder.glob("run_*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("length", [{"max_iters": 13}, {"max_iters": "none", "max_epochs": 1.5}])
def test_steps_and_tokens_are_those_of_the_run_that_follows(arguments, tmp_path, capsys, length):
    printed = told(capsys, arguments(**length))
    train_sft.main(arguments(**length))
    log = the_log(tmp_path / "out")
    run = numbers(r"^run       ([\d,]+) steps, ([\d,]+) tokens, ([\d,]+) of them trained", printed)
    assert run == [len(log["training_iterations"]), totals(log, "tokens"), totals(log, "trained_tokens")]


def test_tokens_per_second_count_no_padding(arguments, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "measure_step", lambda *_, **__: dry_run.StepTime(0.5, "nothing"))
    printed = told(capsys, arguments(max_iters=4, block_size=100))
    (tokens,) = numbers(r"^run       4 steps, ([\d,]+) tokens", printed)
    (rows,) = numbers(r"of them trained, in ([\d,]+) rows$", printed)
    assert tokens < 100 * rows
    assert numbers(r"nothing; ([\d,]+) tokens/s", printed) == [pytest.approx(tokens / 4 / 0.5, abs=0.5)]


def test_an_epoch_has_the_tokens_of_the_prepared_data(arguments, prepared, capsys):
    meta = json.loads((prepared / "meta.json").read_text())["ledger"]["splits"]["train"]
    printed = told(capsys, arguments())
    assert numbers(r"^epoch     ([\d,]+) tokens, ([\d,]+) of them trained", printed) == [
        *(meta["tokens"], meta["trained_tokens"])
    ]


@pytest.mark.slow
def test_the_rest_of_a_resumed_run_is_told(arguments, tmp_path, capsys):
    train_sft.main(arguments(max_iters=6))
    (tmp_path / "out").joinpath("ckpt_best.pt").unlink(missing_ok=True)
    next((tmp_path / "out").glob("run_*.json")).unlink()
    printed = told(capsys, arguments(max_iters=10, resume="required", lr_decay_iters=6))
    train_sft.main(arguments(max_iters=10, resume="required", lr_decay_iters=6))
    log = the_log(tmp_path / "out")
    run = numbers(r"^run       ([\d,]+) steps, ([\d,]+) tokens", printed)
    assert run == [4, totals(log, "tokens")] == [len(log["training_iterations"]), totals(log, "tokens")]


def test_nothing_is_written_anywhere(arguments, tmp_path, capsys):
    told(capsys, arguments())
    assert not (tmp_path / "out").exists()
    train_sft.main(arguments(max_iters=2))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    told(capsys, arguments(max_iters=4, resume="auto", lr_decay_iters=2))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(("shape", "save_optimizer"), [({}, True), ({"n_embd": 128, "n_layer": 6}, True), ({}, False)])
@pytest.mark.slow
def test_the_size_of_a_checkpoint_is_within_one_percent(arguments, tmp_path, capsys, shape, save_optimizer):
    model = {"n_layer": 2, "n_head": 2, "n_embd": 64, **shape}
    options = {"model": model, "save_optimizer": save_optimizer}
    (size,) = numbers(r"a checkpoint \(([\d,]+) bytes\)", told(capsys, arguments(**options)))
    train_sft.main(arguments(**options, max_iters=1))
    assert size == pytest.approx((tmp_path / "out" / "ckpt.pt").stat().st_size, rel=0.01)


@pytest.mark.parametrize(("keep", "kept"), [(1, 2), (3, 3), (9, 4), (None, 4)])
def test_two_checkpoints_are_promised_even_where_one_is_asked_for(keep, kept):
    options = {"save_optimizer": True, "save_interval": 1, "eval_interval": None, "out_dir": "out", "ema_decay": None}
    settings = SimpleNamespace(**options, keep_checkpoints=keep)
    model = torch.nn.Linear(2, 2)
    model.adapted = None
    assert dry_run.promised_disk(settings, model, steps=4).kept == kept


def test_a_dry_run_refuses_what_the_run_would(arguments, tmp_path, capsys):
    train_sft.main(arguments(max_iters=1))
    with pytest.raises(UserError, match="already holds checkpoints"):
        told(capsys, arguments())
    with pytest.raises(UserError, match="the longest sample of train has"):
        told(capsys, arguments(block_size=16, out_dir=tmp_path / "other"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        told(capsys, arguments(out_dir=tmp_path / "file"))


def test_the_shape_of_a_checkpoint_is_read_without_its_weights(arguments, tmp_path, capsys):
    train_sft.main(arguments(max_iters=1))
    start = {"model": "none", "checkpoint_path": tmp_path / "out" / "ckpt.pt", "out_dir": tmp_path / "next"}
    assert "44,832 parameters, 44,832 of them trained" in told(capsys, arguments(**start))


@pytest.mark.slow
def test_an_eight_billion_model_is_told_of_on_a_small_machine(arguments, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "measure_step", lambda *_, **__: dry_run.StepTime(1.0, "nothing"))
    printed = told(capsys, arguments(model="qwen3-8b"))
    (parameters,) = numbers(r"^model     ([\d,]+) parameters", printed)
    assert parameters == 8_190_735_360
    assert "model" in printed
    (needed,) = numbers(r"^memory    ([\d.]+) GiB", printed)
    assert needed > 90


@pytest.mark.slow
def test_two_processes_tell_once(arguments, tmp_path):
    done = torchrun(2, ROOT / "train_sft.py", *arguments(), "--dry_run=True")
    assert done.stdout.count("nothing was written and nothing was trained") == 1
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_warned_of_with_a_remedy(arguments, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "memory_at_hand", lambda device: 2**30)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda folder: usage(1000))
    sizes = {"none": 2.0, "selective": 1.5, "full": 0.5}
    found = {mode: Estimate({"activations": int(size * 2**30)}) for mode, size in sizes.items()}
    monkeypatch.setattr(dry_run, "estimates", lambda work: found)
    printed = told(capsys, arguments())
    assert "2.00 GiB will not fit into 1.00 GiB (a tenth is left free): set activation_checkpointing=full" in printed
    assert "will not fit on that disk: lower keep_checkpoints" in printed


def test_a_model_that_cannot_be_estimated_is_told_of_all_the_same(arguments, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "estimates", lambda work: 1 / 0)
    printed = told(capsys, arguments())
    assert "memory    not estimated: ZeroDivisionError: division by zero" in printed
    assert "nothing was trained" in printed


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory, prepared) -> Path:
    """A prepared folder whose rows of 2,048 tokens are full."""
    folder = tmp_path_factory.mktemp("long")
    with open(folder / "long.jsonl", "w") as file:
        for number in range(40):
            answer = " ".join(["the cat and the hat"] * (20 + number))
            file.write(json.dumps({"prompt": f"what is {number}", "completion": answer}) + "\n")
    arguments = {"input": folder / "long.jsonl", "tokenizer": prepared, "out_dir": folder / "data"}
    options = [f"--{name}={value}" for name, value in arguments.items()]
    prepare_sft.main([*options, "--block_size=2048", "--val_fraction=0"])
    return folder / "data"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_memory_is_within_a_tenth_of_what_the_run_takes_and_the_time_not_far_off(long_rows, tmp_path, mode):
    """The peak of a process of its own; the time loosely, since a machine may have other work, too."""
    options = {"sft_data_dir": long_rows, "out_dir": tmp_path / "out", "model": LARGE, "batch_size": 1}
    options |= {"max_iters": 3, "eval_interval": "none", "log_interval": 1, "device": "cpu"}
    command = [sys.executable, str(ROOT / "train_sft.py"), *(f"--{name}={value}" for name, value in options.items())]
    command += [f"--activation_checkpointing={mode}"]
    dry, real = (
        subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=True, timeout=900).stdout
        for more in (["--dry_run"], [])
    )
    last = the_log(tmp_path / "out")["training_iterations"][-1]
    assert "step      3/3" in real
    (needed,) = numbers(r"^memory    ([\d.]+) GiB", dry)
    assert needed == pytest.approx(last["memory_gib"], rel=0.1)
    (seconds,) = numbers(r"^time      ([\d.]+) (?:s|ms) a step", dry)
    seconds /= 1000 if f"{seconds:.0f} ms a step" in dry else 1
    assert last["time_ms"] / 1000 / 3 < seconds < 3 * last["time_ms"] / 1000


@gpu_test
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("compiled", "dtype"), [(False, "bfloat16"), (True, "bfloat16"), (False, "float32"), (True, "float32")]
)
def test_memory_on_a_gpu_is_within_a_tenth(long_rows, tmp_path, mode, compiled, dtype):
    shape = {**LARGE, "n_embd": 896}
    options = {"sft_data_dir": long_rows, "out_dir": tmp_path / "out", "model": shape, "batch_size": 8}
    options |= {"max_iters": 3, "eval_interval": "none", "log_interval": 1, "device": "cuda", "compile": compiled}
    options["dtype"] = dtype
    command = [sys.executable, str(ROOT / "train_sft.py"), *(f"--{name}={value}" for name, value in options.items())]
    command += [f"--activation_checkpointing={mode}"]
    dry, _ = (
        subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=True, timeout=900).stdout
        for more in (["--dry_run"], [])
    )
    (needed,) = numbers(r"^memory    ([\d.]+) GiB", dry)
    assert needed == pytest.approx(the_log(tmp_path / "out")["training_iterations"][-1]["memory_gib"], rel=0.1)
