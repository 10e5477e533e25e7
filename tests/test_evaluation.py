import numpy as np
import pytest
import torch

from sft.evaluation import Validation
from sft.step import SummedLoss
from tests.spread_worker import BLOCK_SIZE, LENGTHS, samples_of, validation_loss
from tests.tiny import CPU_WORLD, random_documents, tiny_model


def validation(*, weighted=False, **changes):
    samples = samples_of(random_documents(LENGTHS, trained_share=0.4, seed=5, weighted=weighted))
    choices = {"block_size": BLOCK_SIZE, "batch_size": 2, "pad_id": 0, "seed": 1, "limit": None, **changes}
    return Validation(samples, **choices)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_does_not_depend_on_the_batch_size(weighted):
    loss, trained_tokens = validation_loss(CPU_WORLD, batch_size=1, weighted=weighted)
    for batch_size in (2, 3, 100):
        got = validation_loss(CPU_WORLD, batch_size=batch_size, weighted=weighted)
        assert got == (pytest.approx(loss, rel=1e-6), trained_tokens)


def test_every_sample_counts_once():
    rows = validation().rows
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(LENGTHS)))


def test_a_limit_takes_the_first_rows_of_the_shuffled_order():
    everything, some = validation().rows, validation(limit=3).rows
    assert [row.tolist() for row in some] == [row.tolist() for row in everything[:3]]
    assert len(validation(limit=1000).rows) == len(everything)


@pytest.mark.parametrize("weighted", [False, True])
def test_evaluation_is_the_weighted_mean_over_trained_tokens_without_dropout(weighted):
    model = tiny_model(dropout=0.5)
    documents = random_documents(LENGTHS, trained_share=0.4, seed=5, weighted=weighted)
    model.eval()
    loss_sum = weight_sum = tokens = 0.0
    for document in documents:
        logits = model(torch.from_numpy(document.input_ids)[None])[0, :-1]
        labels = torch.from_numpy(document.labels)[1:]
        losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        weights = torch.from_numpy(document.weights)[1:] if weighted else (labels != -100).float()
        loss_sum += (losses * weights).sum().item()
        weight_sum += weights.sum().item()
        tokens += (labels != -100).sum().item()
    result = validation(weighted=weighted).evaluate(SummedLoss(model.train()), CPU_WORLD)
    assert result.loss == pytest.approx(loss_sum / weight_sum, rel=1e-5)
    assert (result.trained_tokens, result.rows) == (tokens, len(validation().rows))


def test_evaluation_leaves_the_generators_and_the_training_mode_alone():
    loss_module = SummedLoss(tiny_model(dropout=0.5))
    state = torch.get_rng_state()
    for training in (True, False):
        loss_module.train(training)
        validation().evaluate(loss_module, CPU_WORLD)
        assert loss_module.training is training
    assert torch.equal(torch.get_rng_state(), state)
