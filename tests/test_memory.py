"""The estimate of a step's memory against what steps take."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import train_sft
from sft import attention_backends, memory
from sft.attention import Documents, causal_attention
from sft.batches import make_batch
from sft.loss import Loss
from sft.memory import Estimate, Workload, choose, described, estimate, settle
from sft.recompute import LEAST_FIRST
from tests.tiny import CPU_WORLD, random_documents, tiny_model

WIDE = {"n_layer": 4, "n_embd": 64, "d_ff": 192}


def workload(*, dropout: float = 0.0, micro_steps: int = 1, kernel: str = "reference", **shape: object) -> Workload:
    model = tiny_model(**{**WIDE, **shape})
    model.set_dropout(dropout)
    batch = make_batch([random_documents([64, 60, 4])] * 8, block_size=128, pad_id=0)
    return Workload(
        model=model,
        batch=batch,
        loss=Loss(kernel, ""),
        autocast_dtype=None,
        micro_steps=micro_steps,
        world=CPU_WORLD,
    )


def tensors(found: Estimate) -> int:
    return found.total - found.parts.get("program", 0)


@pytest.mark.parametrize("mode", LEAST_FIRST)
@pytest.mark.slow
def test_another_tracker_counts_the_same_peak_of_a_real_forward_and_backward(mode):
    work = workload()
    model = work.model.train()
    model.activation_checkpointing = mode
    from sft.step import SummedLoss

    module = SummedLoss(model, loss=work.loss)
    module(work.batch).backward()  # whatever is cached at first use
    model.zero_grad(set_to_none=True)
    gc.collect()
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        module(work.batch).backward()
    (counted,) = tracker.get_tracker_snapshot("peak").values()
    found = estimate(work, mode)
    moments = found.parts["optimizer moments"]
    assert tensors(found) - moments == pytest.approx(counted["Total"], rel=0.03)


def test_less_is_kept_the_more_is_recomputed_and_dropout_keeps_more():
    totals = [tensors(estimate(workload(), mode)) for mode in LEAST_FIRST]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > 1.3 * totals[1]
    assert totals[1] > 1.2 * totals[2]
    assert tensors(estimate(workload(dropout=0.1), "none")) > totals[0]


def test_parameters_moments_and_gradients_are_counted_exactly():
    parts = estimate(workload(micro_steps=2), "none").parts
    size = sum(parameter.nbytes for parameter in workload().model.parameters())
    assert parts["parameters"] == size
    assert parts["optimizer moments"] == pytest.approx(2 * size, rel=0.01)  # and a step count for each parameter
    assert parts["gradients"] == size  # of the micro-step before


def test_an_estimate_changes_neither_the_model_nor_the_random_numbers():
    work = workload(dropout=0.1)
    before = torch.get_rng_state(), {name: p.clone() for name, p in work.model.named_parameters()}
    estimate(work, "full")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert work.model.activation_checkpointing == "none"
    for name, parameter in work.model.named_parameters():
        assert torch.equal(parameter, before[1][name])


def test_a_large_model_is_estimated_without_its_memory():
    with torch.device("meta"):
        model = tiny_model(n_layer=2, n_embd=16384, n_head=128, num_key_value_heads=8, d_ff=53248, vocab_size=128_256)
    found = estimate(
        Workload(
            model=model,
            batch=workload().batch,
            loss=Loss("torch", ""),
            autocast_dtype=None,
            micro_steps=1,
            world=CPU_WORLD,
        ),
        "full",
    )
    assert found.parts["parameters"] == sum(4 * parameter.numel() for parameter in model.parameters()) > 30e9


@pytest.mark.parametrize("mode", LEAST_FIRST)
def test_the_back_end_flex_needs_as_much_as_the_other_kernels_that_keep_no_scores(mode):
    found = []
    for back_end in ("flex", "varlen"):
        work = workload()
        work.model.set_attention(back_end)
        found.append(estimate(work, mode))
    assert tensors(found[0]) == tensors(found[1])


@pytest.mark.parametrize("back_end", ["varlen", "varlen_whole_rows", "flex"])
def test_no_kernel_is_launched_on_tensors_without_content(back_end, monkeypatch):
    monkeypatch.setattr(attention_backends, "_compiled_flex_attention", lambda: pytest.fail("launched"))
    documents = Documents.of_lengths([[100, 28], [128]], block_size=128, place=torch.from_numpy)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(2, 4, 128, 16, device="cuda")
        k, v = (torch.empty(2, 2, 128, 16, device="cuda") for _ in range(2))
        mixed = causal_attention(q, k, v, documents=documents, dropout=0.0, back_end=back_end)
        assert mixed.is_cuda
        assert mixed.shape == q.shape


def sized(total: int) -> Estimate:
    return Estimate({"activations": total})


def test_auto_takes_the_least_recomputing_that_fits_with_headroom():
    found = {"none": sized(1000), "selective": sized(500), "full": sized(100)}
    assert [choose(found, at_hand) for at_hand in (1200, 1050, 560, 300, 10)] == [
        *("none", "selective", "selective", "full", "full")
    ]
    assert described({"none": sized(2**30), "full": sized(2**29)}, 2**34) == (
        "estimated none 1.00 GiB, full 0.50 GiB; 16.0 GiB at hand"
    )


def test_auto_names_each_estimate_and_the_memory_at_hand(monkeypatch):
    found = {"none": sized(20 * 2**30), "selective": sized(2**30), "full": sized(2**29)}
    monkeypatch.setattr(memory, "estimates", lambda work: found)
    monkeypatch.setattr(memory, "memory_at_hand", lambda device: 16 * 2**30)
    assert settle("auto", workload()) == (
        "selective",
        "activation_checkpointing=selective of auto: estimated none 20.0 GiB, selective 1.00 GiB, full 0.50 GiB; "
        "16.0 GiB at hand",
    )


def test_what_cannot_be_estimated_is_recomputed_in_full(monkeypatch):
    monkeypatch.setattr(memory, "estimates", lambda work: 1 / 0)
    mode, sentence = settle("auto", workload())
    assert mode == "full"
    assert "cannot be estimated (ZeroDivisionError" in sentence


@pytest.mark.slow
def test_a_run_with_auto_says_so_and_changes_no_bit(arguments, tmp_path, capsys):
    weights = []
    for mode in ("auto", "none"):
        train_sft.main(arguments(activation_checkpointing=mode, dropout=0.1, out_dir=tmp_path / mode))
        weights.append(torch.load(tmp_path / mode / "ckpt.pt", weights_only=True)["model"])
    assert "activation_checkpointing=none of auto: estimated none" in capsys.readouterr().out
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_logits_on_a_cpu_are_counted_once_and_stay():
    """Their memory is kept from call to call: in the second micro-step it is there already, not there again."""
    trained = int(workload().batch.trained_tokens)
    logits = trained * workload().model.vocab_size * 4
    one, two = (estimate(workload(kernel="torch", micro_steps=steps), "none") for steps in (1, 2))
    assert one.parts["head and loss"] >= logits
    gradient = workload().model.head_weight.nbytes
    assert two.parts["head and loss"] == pytest.approx(one.parts["head and loss"], abs=gradient + 0.1 * logits)
