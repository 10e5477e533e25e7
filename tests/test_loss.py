import json
import os
import re
import subprocess
import sys

import pytest
import torch

import train_sft
from sft import loss as loss_module
from sft.batches import make_batch
from sft.errors import UserError
from sft.kernels import linear_cross_entropy, reference
from sft.loss import Loss, choose_loss
from sft.step import SummedLoss, accumulate_gradients
from tests.conftest import ROOT
from tests.devices import gpu_test
from tests.tiny import CPU_WORLD, random_documents, target_weight, tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

LABELS = torch.tensor([0, 6, -100, 2, 2])


def logits_and_weights():
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    return logits, torch.tensor([1.0, 0.25, 9.0, 0.0, 3.0], dtype=torch.float64)


def test_the_definition_is_the_sum_of_weighted_negative_log_probabilities():
    logits, weights = logits_and_weights()
    p = torch.softmax(logits.detach(), dim=-1)
    losses = torch.stack([-p[0, 0].log(), -p[1, 6].log(), p.new_zeros(()), -p[3, 2].log(), -p[4, 2].log()])
    got = reference.masked_cross_entropy(logits, LABELS, weights, details=True)
    torch.testing.assert_close(got.loss_sum, (losses * weights).sum())
    torch.testing.assert_close(got.token_losses, losses)
    torch.testing.assert_close(got.entropy, -(p * p.log()).sum(-1) * (LABELS != -100))
    hits = sum(int(p[i].argmax()) == label for i, label in enumerate(LABELS.tolist()) if label != -100)
    assert (got.count.item(), got.correct.item()) == (4, hits)
    plain = reference.masked_cross_entropy(logits, LABELS)
    torch.testing.assert_close(plain.loss_sum, losses.sum())
    assert plain.token_losses is plain.entropy is plain.correct is None


def test_the_first_of_equal_logits_is_the_prediction_and_an_excluded_token_adds_no_entropy():
    logits = torch.tensor([[1.0, 1.0, -float("inf")], [1.0, 1.0, -float("inf")]])
    got = reference.masked_cross_entropy(logits, torch.tensor([0, 1]), details=True)
    assert got.correct.item() == 1
    torch.testing.assert_close(got.entropy, torch.tensor([2.0, 2.0]).log())


def test_gradients_of_the_definition_over_logits_are_right():
    logits, weights = logits_and_weights()
    assert torch.autograd.gradcheck(lambda z: reference.masked_cross_entropy(z, LABELS, weights).loss_sum, (logits,))


def test_gradients_of_the_definition_with_the_head_are_right():
    torch.manual_seed(0)
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weights, rows = logits_and_weights()[1], torch.tensor([3, 0, 0, 1, 1])

    def loss(hidden, head):
        return reference.masked_linear_cross_entropy(hidden, head, LABELS, weights, rows=rows).loss_sum

    assert torch.autograd.gradcheck(loss, (hidden, head))


def test_rows_choose_the_hidden_states_and_masked_entries_count_for_nothing():
    torch.manual_seed(0)
    hidden, head = torch.randn(6, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    chosen, labels = torch.tensor([5, 1]), torch.tensor([4, 0])
    padded_rows, padded_labels = torch.tensor([5, 1, 0, 0]), torch.tensor([4, 0, -100, -100])
    plain = reference.masked_linear_cross_entropy(hidden[chosen], head, labels)
    padded = reference.masked_linear_cross_entropy(hidden, head, padded_labels, rows=padded_rows)
    torch.testing.assert_close(padded.loss_sum, plain.loss_sum)
    assert padded.count == plain.count == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(dtype):
    hidden, head = torch.randn(6, 8, dtype=dtype), torch.randn(11, 8, dtype=dtype)
    got = reference.masked_linear_cross_entropy(hidden, head, torch.arange(6), details=True)
    assert got.loss_sum.dtype == got.token_losses.dtype == got.entropy.dtype == torch.float32


@pytest.mark.parametrize("weight_tying", [True, False])
def test_an_all_masked_batch_gives_zero_loss_and_zero_gradients(weight_tying):
    model = tiny_model(weight_tying=weight_tying)
    batch = make_batch([random_documents([9, 4], trained_share=0.0)], block_size=16, pad_id=0)
    loss = SummedLoss(model)(batch)
    loss.backward()
    assert loss.item() == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_the_head_runs_on_trained_tokens_only_and_equals_the_full_logits():
    model = tiny_model(dtype=torch.float64)
    documents = random_documents([20, 7, 30], trained_share=0.3)
    loss = SummedLoss(model)(make_batch([documents], block_size=64, pad_id=0))
    expected = torch.zeros((), dtype=torch.float64)
    for document in documents:
        logits = model(torch.from_numpy(document.input_ids)[None])[0, :-1]
        labels = torch.from_numpy(document.labels)[1:]
        expected += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_the_kernel_is_chosen_for_the_device_and_the_dtype(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose_loss("auto", device=CPU, dtype=torch.float32) == Loss("torch", "this is the CPU")
    assert choose_loss("reference", device=CPU, dtype=torch.float32).kernel == "reference"
    assert choose_loss("torch", device=CUDA, dtype=torch.bfloat16).kernel == "torch"
    assert choose_loss("auto", device=CUDA, dtype=torch.float64) == Loss("torch", "Triton has no kernel for float64")
    for device, dtype, problem in ((CPU, torch.float32, "needs a GPU"), (CUDA, torch.float64, "no kernel for float64")):
        with pytest.raises(UserError, match=f"loss_kernel=triton: .*{problem}.*; use loss_kernel=auto, or torch"):
            choose_loss("triton", device=device, dtype=dtype)


@pytest.mark.parametrize(
    ("trial", "reason"),
    [
        (lambda device, dtype: None, "it compiles here"),
        (lambda device, dtype: "Triton gives wrong numbers here", "wrong numbers"),
        (lambda device, dtype: 1 / 0, r"Triton does not work here \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_a_gpu_on_which_triton_fails_gets_the_next_best_and_the_reason(monkeypatch, trial, reason):
    monkeypatch.setattr(loss_module, "_trial", trial)
    chosen = choose_loss("auto", device=CUDA, dtype=torch.bfloat16)
    assert chosen.kernel == ("triton" if "compiles" in reason else "torch")
    assert re.search(reason, str(chosen))


def test_the_step_foretells_its_upstream_gradient_to_the_bit(monkeypatch):
    told = []
    original = linear_cross_entropy.scale_gradient_

    def noting(gradient, upstream, grad_scale, triton):
        told.append((upstream.item(), torch.as_tensor(grad_scale, dtype=upstream.dtype).item()))
        original(gradient, upstream, grad_scale, triton)

    monkeypatch.setattr(linear_cross_entropy, "scale_gradient_", noting)
    documents = random_documents([20, 7, 30], weighted=True)
    batch = make_batch([documents], block_size=64, pad_id=0)
    weight = target_weight(documents)
    accumulate_gradients(SummedLoss(tiny_model()), [batch, batch], target_weight=weight, world=CPU_WORLD)
    assert len(told) == 4
    assert all(upstream == grad_scale != 1 for upstream, grad_scale in told)


def losses_and_sentence(out_dir):
    log = json.loads(next(out_dir.glob("run_*.json")).read_text())
    records = [record["loss"] for record in log["training_iterations"]] + [log["eval_steps"][-1]["val_loss"]]
    return records, log["startup_info"]["sentences"]["loss"]


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-4)])
def test_the_reference_gives_the_same_trajectory_and_the_choice_is_told(arguments, tmp_path, capsys, dtype, bound):
    """Over 20 steps, validation included; AdamW enlarges what fp32 rounds differently."""
    told = {}
    for kernel in ("auto", "reference"):
        options = {"loss_kernel": kernel, "out_dir": tmp_path / kernel, "dtype": dtype}
        train_sft.main(arguments(**options, max_iters=20, eval_interval=20))
        told[kernel] = losses_and_sentence(tmp_path / kernel)
        assert f"loss     {told[kernel][1]}" in capsys.readouterr().out
    assert told["auto"][0] == pytest.approx(told["reference"][0], rel=bound)
    assert told["auto"][1] == "fused head, cross-entropy in PyTorch: this is the CPU"
    assert told["reference"][1].endswith("(the definition): loss_kernel=reference")


def test_a_kernel_that_cannot_run_here_is_refused_before_the_run_is_begun(arguments, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="loss_kernel=triton: Triton needs a GPU, and this is the CPU; use"):
        train_sft.main(arguments(loss_kernel="triton"))
    assert not list((tmp_path / "out").glob("run_*.json"))


@pytest.mark.slow
def test_interpreted_triton_gives_the_same_trajectory(arguments, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    told = {}
    for kernel in ("triton", "reference"):
        options = arguments(loss_kernel=kernel, out_dir=tmp_path / kernel, max_iters=3, eval_interval=3)
        command = [sys.executable, ROOT / "train_sft.py", *options]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        told[kernel] = losses_and_sentence(tmp_path / kernel)
    assert told["triton"][0] == pytest.approx(told["reference"][0], rel=1e-5)
    assert told["triton"][1] == "fused head, cross-entropy in Triton: loss_kernel=triton"


@gpu_test
def test_fifty_steps_in_bf16_follow_the_definition_on_a_gpu(arguments, tmp_path):
    """To 1 % of the loss: what a rounding of bf16 changes early grows with the steps."""
    told = {}
    for kernel in ("auto", "torch", "reference"):
        options = {"loss_kernel": kernel, "out_dir": tmp_path / kernel, "device": "cuda", "max_iters": 50}
        train_sft.main(arguments(**options, eval_interval=50, compile=False, learning_rate=1e-3))
        told[kernel] = losses_and_sentence(tmp_path / kernel)
    assert told["auto"][1] == "fused head, cross-entropy in Triton: it compiles here"
    for kernel in ("auto", "torch"):
        assert told[kernel][0] == pytest.approx(told["reference"][0], rel=1e-2)
