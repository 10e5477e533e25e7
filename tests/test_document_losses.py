import dataclasses

import pytest
import torch

from sft.batches import Document, make_batch
from sft.document_losses import DocumentLoss, badness, document_losses
from sft.loss import Loss
from sft.step import SummedLoss
from tests.tiny import random_documents, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("weighted", [False, True])
def test_each_document_of_a_row_has_the_loss_that_it_has_alone(weighted):
    documents = random_documents([17, 5, 30, 9], weighted=weighted)
    module = SummedLoss(tiny_model(dtype=torch.float64).eval(), loss=Loss("reference", ""))
    losses = document_losses(module, documents, block_size=64, pad_id=0, device=CPU)

    def of_row(*row: Document) -> float:
        return module(make_batch([row], block_size=64, pad_id=0)).item()

    alone = [of_row(document) for document in documents]
    assert losses == pytest.approx(alone, rel=1e-12)
    assert sum(losses) == pytest.approx(of_row(*documents), rel=1e-12)


def test_a_document_without_a_trained_token_has_no_loss():
    documents = random_documents([17, 5])
    documents[0] = documents[0]._replace(labels=documents[0].labels * 0 - 100)
    module = SummedLoss(tiny_model().eval())
    assert document_losses(module, documents, block_size=64, pad_id=0, device=CPU)[0] == 0


def test_what_fills_a_batch_up_on_a_gpu_belongs_to_no_document(monkeypatch):
    documents = random_documents([17, 5, 30])
    module = SummedLoss(tiny_model(dtype=torch.float64).eval(), loss=Loss("reference", ""))
    expected = document_losses(module, documents, block_size=64, pad_id=0, device=CPU)

    def filled(*arguments, **named):
        batch = make_batch(*arguments, **named)
        trained = torch.cat([batch.trained, torch.zeros(7, dtype=torch.int64)])
        targets = torch.cat([batch.targets, torch.full((7,), -100)])
        return dataclasses.replace(batch, trained=trained, targets=targets)

    monkeypatch.setattr("sft.document_losses.make_batch", filled)
    assert document_losses(module, documents, block_size=64, pad_id=0, device=CPU) == pytest.approx(expected, rel=1e-12)


def test_what_is_no_number_is_worse_than_any():
    losses = [2.0, float("nan"), 9.0]
    documents = [DocumentLoss(0, sample, 2.0, loss) for sample, loss in enumerate(losses)]
    assert [each.sample for each in sorted(documents, key=badness, reverse=True)] == [1, 2, 0]
