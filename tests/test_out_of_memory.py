"""A lack of memory names the place, the tokens, and settings that would fit."""

import json
import re
from unittest import mock

import pytest
import torch

import train_sft
from sft import out_of_memory
from sft.errors import UserError
from sft.memory import Estimate
from sft.out_of_memory import Change, as_arguments, changes, lacked
from sft.run import Run
from sft.step import SummedLoss
from tests.devices import gpu_test
from tests.test_train import run_log

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"


def cuda_error() -> Exception:
    return torch.cuda.OutOfMemoryError(CUDA)


@pytest.mark.parametrize("error", [cuda_error(), RuntimeError(CUBLAS), RuntimeError(CPU)])
def test_every_librarys_way_to_lack_memory_is_known(error):
    assert lacked(error)


@pytest.mark.parametrize("error", [UserError("out of memory"), RuntimeError("shapes differ"), KeyboardInterrupt()])
def test_other_errors_stay_what_they_are(error):
    assert not lacked(error)


def sizes(monkeypatch, **needed: float) -> None:
    """Estimates by mode for one row of 64 tokens in GiB; 8 GiB are at hand."""

    def estimate(work, mode):
        return Estimate({"activations": int(needed[mode] * 2**30 * work.batch.input_ids.numel() / 64)})

    monkeypatch.setattr(out_of_memory, "estimate", estimate)
    monkeypatch.setattr(out_of_memory, "memory_at_hand", lambda device: 8 * 2**30)


def message(arguments) -> str:
    with pytest.raises(UserError) as caught:
        train_sft.main(arguments)
    assert caught.value.exit_status == 1
    return str(caught.value)


@pytest.mark.parametrize("error", [cuda_error(), RuntimeError(CUBLAS)])
def test_the_message_names_phase_tokens_and_settings_that_fit(arguments, tmp_path, monkeypatch, error):
    monkeypatch.setattr(SummedLoss, "forward", mock.Mock(side_effect=error))
    sizes(monkeypatch, none=4.0, selective=3.0, full=1.0)
    assert message(arguments(batch_size=4, gradient_accumulation_steps=1, eval_interval="none")) == (
        "cpu is out of memory in the forward pass: a micro-batch has batch_size 4 x block_size 64 = 256 tokens, with "
        "activation_checkpointing=none; a step needs 16.0 GiB by the estimate, and 8.00 GiB are at hand; what would "
        "fit: --activation_checkpointing=full (4.00 GiB) or --batch_size=2 --gradient_accumulation_steps=2 "
        "--activation_checkpointing=full (2.00 GiB) or --batch_size=1 --gradient_accumulation_steps=4 (4.00 GiB)"
    )
    (log,) = (tmp_path / "out").glob("run_*.json")
    assert json.loads(log.read_text())["status"] == "failed: out of memory"


def test_where_nothing_would_fit_it_is_said(arguments, monkeypatch):
    monkeypatch.setattr(SummedLoss, "forward", mock.Mock(side_effect=cuda_error()))
    sizes(monkeypatch, none=40.0, selective=40.0, full=40.0)
    told = message(arguments())
    assert told.startswith("cpu is out of memory in the evaluation: ")
    assert told.endswith("would fit; train a smaller model")


def test_an_estimate_that_fails_leaves_the_message(arguments, monkeypatch):
    monkeypatch.setattr(Run, "save", mock.Mock(side_effect=cuda_error()))
    monkeypatch.setattr(out_of_memory, "estimate", mock.Mock(side_effect=ZeroDivisionError))
    assert message(arguments()).endswith("lower batch_size for more micro-steps, or lower block_size")


def test_a_model_that_does_not_fit_is_told_before_there_is_a_run(arguments, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", mock.Mock(side_effect=cuda_error()))
    assert message(arguments()).startswith("cpu is out of memory in loading the model; train a smaller")


def test_changes_come_the_least_costly_first_and_hold_the_longest_sample():
    now = Change(batch_size=2, recomputing="selective", block_size=1024)
    assert [as_arguments(now, change) for change in changes(now, longest=400)] == [
        "--activation_checkpointing=full",
        "--batch_size=1 --gradient_accumulation_steps=2",
        "--batch_size=1 --gradient_accumulation_steps=2 --activation_checkpointing=full",
        "--batch_size=1 --gradient_accumulation_steps=4 --activation_checkpointing=full --block_size=512",
    ]


@pytest.mark.parametrize(("batch_size", "micro_steps"), [(4, 1), (5, 3), (6, 2), (7, 1)])
def test_what_is_advised_leaves_a_step_its_tokens(batch_size, micro_steps):
    now = Change(batch_size, "none", block_size=256, micro_steps=micro_steps)
    advised = list(changes(now, longest=100))
    assert {change.batch_size * change.micro_steps * change.block_size for change in advised} == {
        batch_size * micro_steps * 256
    }
    assert min(change.batch_size for change in advised) == 1


def test_rows_per_step_is_left_alone_where_it_is_set_unless_rows_are_shorter():
    now = Change(batch_size=4, recomputing="full", block_size=1024, micro_steps=2)
    assert [as_arguments(now, change, 16) for change in changes(now, longest=400)] == [  # on two ranks
        "--batch_size=2",
        "--batch_size=1",
        "--batch_size=1 --rows_per_step=32 --block_size=512",
    ]


def test_what_is_advised_is_the_same_run_of_the_same_rows(arguments, tmp_path, monkeypatch):
    options = {"batch_size": 4, "max_iters": 2, "gradient_accumulation_steps": 1}
    train_sft.main(arguments(**options, out_dir=tmp_path / "roomy"))
    with monkeypatch.context() as patch:
        patch.setattr(SummedLoss, "forward", mock.Mock(side_effect=cuda_error()))
        sizes(patch, none=3.0, selective=3.0, full=3.0)
        (advised,) = re.findall(r"what would fit: (--.*?) \(", message(arguments(**options)))
    train_sft.main([*arguments(**options, out_dir=tmp_path / "tight"), *advised.split()])
    roomy, tight = (run_log(tmp_path / name)["training_iterations"] for name in ("roomy", "tight"))
    assert [record["tokens"] for record in tight] == [record["tokens"] for record in roomy]
    assert [record["loss"] for record in tight] == pytest.approx([record["loss"] for record in roomy], rel=1e-4)


def test_the_estimate_of_more_micro_steps_holds_the_gradients_of_the_one_before(arguments, monkeypatch):
    seen = []
    monkeypatch.setattr(SummedLoss, "forward", mock.Mock(side_effect=cuda_error()))
    sizes(monkeypatch, none=3.0, selective=3.0, full=3.0)
    known = out_of_memory.estimate
    monkeypatch.setattr(out_of_memory, "estimate", lambda work, mode: seen.append(work) or known(work, mode))
    message(arguments(batch_size=4, gradient_accumulation_steps=1))
    assert {(len(work.batch.input_ids), work.micro_steps) for work in seen} == {(4, 1), (2, 2), (1, 4)}


@gpu_test
def test_a_gpu_that_is_full_is_told_of_by_name(arguments, tmp_path):
    shape = {"n_layer": 4, "n_head": 8, "n_embd": 1024, "vocab_size": 4096}
    options = {"model": shape, "device": "cuda", "batch_size": 4096, "gradient_accumulation_steps": 1}
    torch.cuda.set_per_process_memory_fraction(0.05)
    try:
        told = message(arguments(**options, compile=False, eval_interval="none"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "out of memory in the" in told
    assert "what would fit: --activation_checkpointing" in told or "--batch_size=" in told
