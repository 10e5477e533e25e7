"""The Triton cross-entropy equals its definition: interpreted in fp32 and fp16, compiled on a GPU in bf16, too."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tests.interpreted  # noqa: F401  # before the kernels
from sft.kernels import reference
from sft.kernels.masked_cross_entropy import CONFIGURATIONS, cross_entropy_, masked_cross_entropy, scale_
from tests.devices import EPSILON, NOT_COMPILED, each_device, each_dtype, fp32_and_bf16, interpreted, on_gpu
from tests.kernel_problems import TILE, compare, problem, rounding


@pytest.mark.parametrize(
    "columns", [1, 2, 15, 16, 257, TILE // 2 - 1, TILE // 2, TILE // 2 + 1, TILE - 1, TILE, TILE + 1]
)
@each_dtype
def test_loss_details_and_gradient_equal_the_definition(columns: int, device: str, dtype: torch.dtype):
    compare(*problem(4, columns, dtype=dtype, device=device))


@NOT_COMPILED
@pytest.mark.parametrize(
    "columns", [151_936, pytest.param(151_669, marks=pytest.mark.slow), pytest.param(151_643, marks=pytest.mark.slow)]
)
def test_so_they_do_at_the_width_of_real_vocabularies(columns: int):
    compare(*problem(2, columns, masked=0, dtype=torch.float16))
    compare(*problem(2, columns, masked=0))


@NOT_COMPILED
@pytest.mark.slow
@pytest.mark.parametrize("configuration", range(len(CONFIGURATIONS)))
@pytest.mark.parametrize("columns", [77, 40_000, 151_669, 151_936])
def test_so_they_do_in_every_configuration(configuration: int, columns: int):
    compare(*problem(3, columns, dtype=torch.float16), configuration=configuration)


@each_dtype
def test_so_they_do_with_weights_and_any_upstream_gradient(device: str, dtype: torch.dtype):
    for overwrite, grad_scale, upstream in ((False, 1.0, -3.0), (True, 0.25, 0.25), (True, 0.25, 0.0)):
        logits, labels = problem(4, 300, dtype=dtype, device=device)
        weights = torch.rand(4, device=device)
        compare(logits, labels, weights, overwrite=overwrite, grad_scale=grad_scale, upstream=upstream)


@fp32_and_bf16
def test_no_row_has_no_loss_and_an_empty_gradient(device: str, dtype: torch.dtype):
    compare(*problem(0, 9, dtype=dtype, device=device))


@each_dtype
@pytest.mark.parametrize("columns", [300, TILE + 1])
def test_all_masked_gives_zero_everywhere_whatever_the_logits(columns: int, device: str, dtype: torch.dtype):
    logits, labels = problem(5, columns, masked=1.0, dtype=dtype, device=device)
    compare(logits, labels)
    logits[:, ::7] = math.nan
    for overwrite in (False, True):
        leaf = logits.clone().requires_grad_()
        found = masked_cross_entropy(leaf, labels, details=True, overwrite=overwrite)
        (gradient,) = torch.autograd.grad(found.loss_sum * 0.5, leaf)
        assert [field.abs().sum().item() for field in (*found, gradient)] == [0] * 6


@each_dtype
@pytest.mark.parametrize("columns", [300, TILE + 1])
def test_one_trained_row_among_masked_ones_is_the_only_one_that_counts(columns: int, device: str, dtype: torch.dtype):
    logits, labels = problem(7, columns, masked=1.0, dtype=dtype, device=device)
    labels[4] = columns - 1
    compare(logits, labels, upstream=0.5)
    alone, *_ = cross_entropy_(logits[4:5], labels[4:5], None, 1.0, gradient=False, details=False)
    loss = masked_cross_entropy(logits, labels)
    torch.testing.assert_close(loss.loss_sum, alone[0])
    assert loss.count == 1


VIEWS = {
    "padded rows": lambda wide: wide[:, :257],
    "misaligned": lambda wide: wide[:, 3:260],
    "every other row": lambda wide: wide[::2, :257],
    "every third column": lambda wide: wide[:, ::3],
    "transposed": lambda wide: wide[:, :4].t(),
    "one row, three times": lambda wide: wide[:1].expand(3, -1),
    "one column": lambda wide: wide[:, :1],
}


@fp32_and_bf16
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_are_read_and_rows_overwritten_where_they_lie(
    view: Callable[[Tensor], Tensor], device: str, dtype: torch.dtype
):
    wide, _ = problem(4, 600, dtype=dtype, device=device)
    logits = view(wide)
    labels = torch.randint(logits.shape[1], (logits.shape[0],), device=device)
    for overwrite in (False, True):
        compare(logits, labels, overwrite=overwrite)
    if (logits.shape[1] > 1 and logits.stride(1) != 1) or logits.stride(0) < logits.shape[1]:
        return  # not row after row: the primitive need not take these
    outside = wide.clone()
    view(outside).zero_()
    expected = logits.double().softmax(1) - torch.nn.functional.one_hot(labels, logits.shape[1])
    cross_entropy_(logits, labels, None, 1.0, gradient=True, details=False)
    torch.testing.assert_close(logits.double(), expected, **rounding(dtype))
    logits.zero_()
    assert wide.equal(outside)


@fp32_and_bf16
def test_the_primitive_reads_only_unless_the_gradient_is_asked_for(device: str, dtype: torch.dtype):
    logits, labels = problem(5, 300, dtype=dtype, device=device)
    before = logits.clone()
    losses, entropy, correct = cross_entropy_(logits, labels, None, 1.0, gradient=False, details=True)
    assert logits.equal(before)
    assert (entropy.dtype, correct.dtype) == (torch.float32, torch.bool)
    again, *absent = cross_entropy_(logits, labels, None, 1.0, gradient=True, details=False)
    torch.testing.assert_close(again, losses, rtol=1e-6, atol=1e-6)
    assert absent == [None, None]
    assert not logits.equal(before)


@fp32_and_bf16
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
def test_labels_may_be_int32_or_int64(label_dtype: torch.dtype, device: str, dtype: torch.dtype):
    logits, labels = problem(5, 300, dtype=dtype, device=device)
    expected = reference.masked_cross_entropy(logits, labels).loss_sum
    torch.testing.assert_close(masked_cross_entropy(logits, labels.to(label_dtype)).loss_sum, expected)


@fp32_and_bf16
def test_a_masked_row_is_not_even_read(device: str, dtype: torch.dtype):
    logits, labels = problem(4, 300, masked=0, dtype=dtype, device=device)
    labels[1:3] = -100
    logits[1:3] = math.nan
    losses, *_ = cross_entropy_(logits, labels, None, 1.0, gradient=True, details=False)
    assert (losses[1:3] == 0).all()
    assert (logits[1:3] == 0).all()
    assert logits.isfinite().all()


@pytest.mark.parametrize(("device", "dtype"), [interpreted("cpu", torch.float16), on_gpu("cuda", torch.bfloat16)])
def test_offsets_of_more_than_31_bits_reach_their_row(device: str, dtype: torch.dtype):
    stride, columns = 2**30, 20  # the last of four rows begins at 3 * 2**30; pages between rows are never touched
    logits = torch.empty(3 * stride + columns, dtype=dtype, device=device).as_strided((4, columns), (stride, 1))
    small, labels = problem(4, columns, masked=0, dtype=dtype, device=device)
    labels[1] = -100
    logits.copy_(small)
    losses, *_ = cross_entropy_(logits, labels, None, 1.0, gradient=True, details=False)
    expected, *_ = cross_entropy_(small, labels, None, 1.0, gradient=True, details=False)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, small, **rounding(dtype))
    twice = logits * 2
    scale_(logits, torch.tensor(2.0, device=device))
    assert logits.equal(twice)


@fp32_and_bf16
@pytest.mark.parametrize("label", [300, 10**12, -1, -101, -(10**12)])
def test_a_label_outside_the_vocabulary_gives_nan_in_its_own_row_alone(label: int, device: str, dtype: torch.dtype):
    wide, labels = problem(6, 320, masked=0, dtype=dtype, device=device)
    before = wide.clone()
    labels %= 300
    labels[2] = label
    losses, *_ = cross_entropy_(wide[1:5, :300], labels[1:5], None, 1.0, gradient=True, details=False)
    assert losses.isnan().tolist() == [False, True, False, False]
    assert wide[2, :300].isnan().all()
    assert wide[[1, 3, 4], :300].isfinite().all()
    assert wide[[0, 5]].equal(before[[0, 5]])
    assert wide[:, 300:].equal(before[:, 300:])


@fp32_and_bf16
def test_columns_of_minus_infinity_have_no_probability(device: str, dtype: torch.dtype):
    logits, labels = problem(4, TILE + 300, masked=0, dtype=dtype, device=device)
    labels[:] = torch.tensor([0, 5, TILE + 299, 7])
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    allowed[:, :9] = allowed[:, -2:] = True
    logits[~allowed] = -math.inf
    logits[3] = -math.inf
    logits[3, 7] = 3.0
    compare(logits, labels)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy, in the interpreter
@fp32_and_bf16
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("column", [0, 150, 299])
def test_infinite_logits_and_nan_give_nan(bad: float, column: int, device: str, dtype: torch.dtype):
    logits, labels = problem(3, 300, masked=0, dtype=dtype, device=device)
    labels[1] = 150
    logits[1, column] = bad
    losses, entropy, correct = cross_entropy_(logits, labels, None, 1.0, gradient=True, details=True)
    assert losses.isnan().tolist() == [False, True, False]
    assert entropy.isnan().tolist() == [False, True, False]
    assert not correct[1]
    assert logits.isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # NumPy, in the interpreter
@fp32_and_bf16
def test_a_row_of_nothing_but_minus_infinity_gives_nan(device: str, dtype: torch.dtype):
    logits, labels = problem(3, 300, masked=0, dtype=dtype, device=device)
    logits[1] = -math.inf
    losses, _, correct = cross_entropy_(logits, labels, None, 1.0, gradient=True, details=True)
    assert losses.isnan().tolist() == [False, True, False]
    assert not correct[1]
    assert logits.isnan().any(dim=1).tolist() == [False, True, False]


@fp32_and_bf16
def test_a_label_with_probability_zero_has_an_infinite_loss_and_a_finite_gradient(device: str, dtype: torch.dtype):
    logits, labels = problem(1, 300, masked=0, dtype=dtype, device=device)
    logits[0, labels] = -math.inf
    losses, _, correct = cross_entropy_(logits, labels, None, 1.0, gradient=True, details=True)
    assert losses.item() == math.inf
    assert not correct
    assert logits[0, labels] == -1
    assert logits.float().sum().abs() < EPSILON[dtype] / 2 + 1e-5  # what rounding adds to a sum of 1


@fp32_and_bf16
@pytest.mark.parametrize(("label", "first"), [(3, True), (200, False), (4, False)])
def test_of_equal_maxima_the_first_is_the_prediction(label: int, first: bool, device: str, dtype: torch.dtype):
    logits = torch.zeros(1, 300, device=device, dtype=dtype)
    logits[0, [3, 200]] = 2.5
    labels = torch.tensor([label], device=device)
    assert masked_cross_entropy(logits, labels, details=True).correct == int(first)


@each_device
def test_a_confident_prediction_keeps_its_small_loss(device: str):
    logits = torch.tensor([[30.0, 14.0, 13.0], [1e4, 1e4 - 14, 0.0], [20.0, 8.0, 1.0]], device=device)
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    expected = reference.masked_cross_entropy(logits.double(), labels, details=True).token_losses
    found = masked_cross_entropy(logits, labels, details=True).token_losses
    one_rounding = 2.0**-21 if device == "cuda" else 2.0**-23  # of a sum near 1; a GPU's power of two is off by 2**-22
    torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=one_rounding)
