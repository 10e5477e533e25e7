import pytest
import torch

from sft.batches import make_batch
from sft.kernels.reference import linear_cross_entropy
from sft.step import SummedLoss
from tests.tiny import random_documents, tiny_model


def test_the_definition_is_the_sum_of_weighted_negative_log_probabilities():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    targets, weights = torch.tensor([0, 10, 3, 3, 7]), torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0])
    log_probabilities = torch.log_softmax(hidden @ weight.T, dim=-1)
    expected = -sum(w * log_probabilities[i, t] for i, (t, w) in enumerate(zip(targets, weights, strict=True)))
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, weights), expected)
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, targets, None),
        linear_cross_entropy(hidden, weight, targets, torch.ones(5)),
    )


def test_gradients_of_the_definition_are_right():
    torch.manual_seed(0)
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.tensor([0, 6, 2, 2]), torch.tensor([1.0, 0.25, 0.0, 3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, weights), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(dtype):
    hidden, weight = torch.randn(6, 8, dtype=dtype), torch.randn(11, 8, dtype=dtype)
    assert linear_cross_entropy(hidden, weight, torch.arange(6), None).dtype == torch.float32


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
