import pytest
import torch

from sft.batches import make_batch
from sft.kernels import reference
from sft.step import SummedLoss
from tests.tiny import random_documents, tiny_model

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
