"""Recomputing changes what is kept, and no bit of what comes out."""

import gc
import itertools
from pathlib import Path

import pytest
import torch

from sft.batches import make_batch
from sft.memory import Ledger
from sft.recompute import LEAST_FIRST, Recomputing
from sft.step import SummedLoss
from tests.conftest import ROOT
from tests.launch import torchrun
from tests.tiny import random_documents, tiny_model

DOCUMENTS = [random_documents([30, 20, 9]), random_documents([64], seed=1)]


def gradients(mode: Recomputing, *, dropout: float, backend: str | None) -> list[torch.Tensor]:
    torch._dynamo.reset()
    model = tiny_model().train()
    model.set_dropout(dropout)
    model.activation_checkpointing = mode
    if backend is not None:
        model.compile_blocks(backend=backend)
    batch = make_batch(DOCUMENTS, block_size=64, pad_id=0, dropout_seed=5)
    loss = SummedLoss(model)(batch)
    loss.backward()
    found = [parameter.grad for parameter in model.parameters()]
    return [loss.detach(), *(gradient for gradient in found if gradient is not None)]


@pytest.mark.filterwarnings("ignore:Detected that context_fn")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_recomputing_changes_no_bit_of_the_gradients(dropout, backend):
    expected = gradients("none", dropout=dropout, backend=backend)
    assert len(expected) == 1 + len(list(tiny_model().parameters()))
    for mode in LEAST_FIRST[1:]:
        for got, exact in zip(gradients(mode, dropout=dropout, backend=backend), expected, strict=True):
            assert torch.equal(got, exact), mode


def kept_bytes(mode: Recomputing) -> int:
    """What is alive after a forward pass beside the parameters: what autograd and checkpoints keep for the backward."""
    model = tiny_model().train()
    model.activation_checkpointing = mode
    batch = make_batch(DOCUMENTS, block_size=64, pad_id=0)
    with Ledger(torch.device("cpu")) as ledger:
        result = model.hidden_states(batch.input_ids, batch.positions, batch.documents)
    gc.collect()
    assert result.requires_grad
    return sum(ledger.alive.values())


def test_each_mode_keeps_less_than_the_one_before():
    kept = [kept_bytes(mode) for mode in LEAST_FIRST]
    assert all(after < 0.7 * before for before, after in itertools.pairwise(kept)), kept
    assert kept[-1] < kept[0] / 3


@pytest.mark.slow
def test_two_processes_recompute_the_same_gradients(tmp_path: Path):
    """With dropout, and with DDP's all-reduce in the backward pass."""
    torchrun(2, ROOT / "tests" / "recompute_worker.py", tmp_path / "gradients.pt")
    none, *others = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert len(others) == 2
    assert any(gradient.any() for gradient in none)
    for other in others:
        for got, exact in zip(other, none, strict=True):
            assert torch.equal(got, exact)
