"""The Triton cross-entropy equals its definition in float64: interpreted where there is no GPU, else compiled."""

import math
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tests.interpreted  # noqa: F401  # before the kernels
from sft.kernels import reference
from sft.kernels.masked_cross_entropy import (
    CONFIGURATIONS,
    cross_entropy,
    cross_entropy_,
    masked_cross_entropy,
    overwrite_cross_entropy,
    scale_,
    scale_in_place,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = 2 * 32 * 32 * 8  # columns: of the default configuration in half precision
EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SMALL_TILES = 9  # the configuration that the interpreter is quickest with
each_configuration = pytest.mark.parametrize("configuration", range(len(CONFIGURATIONS)))


def problem(rows: int, columns: int, *, masked: float = 0.3, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Logits with a few peaks, and labels of which some are on a peak."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    draw = {"generator": generator, "device": DEVICE}
    logits = torch.randn(rows, columns, dtype=torch.float32, **draw).mul_(2)
    labels = torch.randint(columns, (rows,), **draw)
    peaked = torch.rand(rows, **draw) < 0.5
    logits[torch.arange(rows, device=DEVICE), labels] += 12 * peaked
    labels[torch.rand(rows, **draw) < masked] = -100
    return logits.to(dtype), labels


def compare(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    upstream: float = 1.0,
    overwrite: bool = False,
    **options,
) -> None:
    """Loss, count, details and gradient against the definition in float64."""
    wide = logits.detach().double().requires_grad_()
    expected = reference.masked_cross_entropy(wide, labels, weights, details=True)
    (expected_gradient,) = torch.autograd.grad(expected.loss_sum * upstream, wide)
    mine = (logits.detach().clone() if overwrite else logits.detach()).requires_grad_()
    found = masked_cross_entropy(mine, labels, weights, details=True, overwrite=overwrite, **options)
    (gradient,) = torch.autograd.grad(found.loss_sum * upstream, mine)
    assert (found.loss_sum.dtype, found.token_losses.dtype) == (torch.float32, torch.float32)
    close = partial(torch.testing.assert_close, check_dtype=False, rtol=3e-6, atol=3e-6)
    close(found.loss_sum, expected.loss_sum, atol=3e-6 * max(1, len(labels)))
    close(found.token_losses, expected.token_losses)
    close(found.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    assert found.count == expected.count
    assert found.correct == expected.correct
    epsilon = EPSILON[logits.dtype]
    smallest = 2.0**-24 if logits.dtype == torch.float16 else 0.0  # half precision's smallest number
    close(gradient, expected_gradient, rtol=max(2 * epsilon, 2e-6), atol=max(smallest, 3e-7 * abs(upstream)))
    assert (gradient[labels == -100] == 0).all()


@pytest.mark.parametrize(
    "columns", [1, 2, 15, 16, 257, TILE // 2 - 1, TILE // 2, TILE // 2 + 1, TILE - 1, TILE, TILE + 1]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loss_details_and_gradient_equal_the_definition(columns: int, dtype: torch.dtype):
    compare(*problem(4, columns, dtype=dtype))


@pytest.mark.parametrize(
    "columns", [151_936, pytest.param(151_669, marks=pytest.mark.slow), pytest.param(151_643, marks=pytest.mark.slow)]
)
def test_so_they_do_at_the_width_of_real_vocabularies(columns: int):
    compare(*problem(2, columns, masked=0, dtype=torch.float16))
    compare(*problem(2, columns, masked=0))


@pytest.mark.slow
@each_configuration
@pytest.mark.parametrize("columns", [77, 40_000, 151_669, 151_936])
def test_so_they_do_in_every_configuration(configuration: int, columns: int):
    compare(*problem(3, columns, dtype=torch.float16), configuration=configuration)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 40),
    padding=st.integers(0, 20),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    weighted=st.booleans(),
    overwrite=st.booleans(),
    upstream=st.sampled_from([1.0, 0.25, -3.0, 0.0]),
    grad_scale=st.sampled_from([1.0, 0.25]),
    seed=st.integers(0, 1000),
)
def test_so_they_do_for_any_shape_mask_weights_and_scale(
    rows, columns, padding, masked, weighted, overwrite, upstream, grad_scale, seed
):
    wide, _ = problem(rows, columns + padding, seed=seed)
    _, labels = problem(rows, columns, masked=masked, seed=seed)
    weights = torch.rand(rows, device=DEVICE) if weighted else None
    before = wide.clone()
    options = {"grad_scale": grad_scale, "configuration": SMALL_TILES}
    compare(wide[:, :columns], labels, weights, upstream=upstream, overwrite=overwrite, **options)
    assert wide.equal(before)


def test_no_row_has_no_loss_and_an_empty_gradient():
    compare(*problem(0, 9))


@pytest.mark.parametrize(
    "view",
    [
        lambda wide: wide[:, :257],
        lambda wide: wide[:, 3:260],
        lambda wide: wide[::2, :257],
        lambda wide: wide[:, ::3],
        lambda wide: wide[:, :4].t(),
        lambda wide: wide[:1].expand(3, -1),
        lambda wide: wide[:, :1],
    ],
)
def test_views_are_read_and_overwritten_where_they_lie(view: Callable[[Tensor], Tensor]):
    wide, _ = problem(4, 600)
    logits = view(wide)
    labels = torch.randint(logits.shape[1], (logits.shape[0],), device=DEVICE)
    compare(logits, labels)
    if 0 in logits.stride():
        return
    outside = wide.clone()
    view(outside).zero_()
    expected = logits.double().softmax(1) - torch.nn.functional.one_hot(labels, logits.shape[1])
    cross_entropy_(logits, labels, None, 1.0, gradient=True, details=False)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)
    logits.zero_()
    assert wide.equal(outside)


def test_the_primitive_reads_only_unless_the_gradient_is_asked_for():
    logits, labels = problem(5, 300)
    before = logits.clone()
    losses, entropy, correct = cross_entropy_(logits, labels, None, 1.0, gradient=False, details=True)
    assert logits.equal(before)
    assert (entropy.dtype, correct.dtype) == (torch.float32, torch.bool)
    again, *absent = cross_entropy_(logits, labels, None, 1.0, gradient=True, details=False)
    assert again.equal(losses)
    assert absent == [None, None]
    assert not logits.equal(before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels_may_be_int32_or_int64(dtype: torch.dtype):
    logits, labels = problem(5, 300)
    expected = reference.masked_cross_entropy(logits, labels).loss_sum
    torch.testing.assert_close(masked_cross_entropy(logits, labels.to(dtype)).loss_sum, expected)


def test_a_masked_row_is_not_even_read():
    logits, labels = problem(4, 300)
    labels[1:3] = -100
    logits[1:3] = math.nan
    losses, *_ = cross_entropy_(logits, labels, None, 1.0, gradient=True, details=False)
    assert (losses[1:3] == 0).all()
    assert (logits[1:3] == 0).all()
    assert logits.isfinite().all()


def test_offsets_of_more_than_31_bits_reach_their_row():
    stride, columns = 2**30, 20  # the last of four rows begins at 3 * 2**30; pages between rows are never touched
    logits = torch.empty(3 * stride + columns, dtype=torch.float16, device=DEVICE).as_strided((4, columns), (stride, 1))
    small, labels = problem(4, columns, masked=0, dtype=torch.float16)
    labels[1] = -100
    logits.copy_(small)
    losses, *_ = cross_entropy_(logits, labels, None, 1.0, gradient=True, details=False)
    expected, *_ = cross_entropy_(small, labels, None, 1.0, gradient=True, details=False)
    assert losses.equal(expected)
    assert logits.equal(small)
    scale_(logits, torch.tensor(2.0, device=DEVICE))
    assert logits.equal(small * 2)


@pytest.mark.parametrize("label", [300, 10**12, -1, -101, -(10**12)])
def test_a_label_outside_the_vocabulary_gives_nan_in_its_own_row_alone(label: int):
    wide, labels = problem(6, 320, masked=0)
    before = wide.clone()
    labels[2] = label
    losses, *_ = cross_entropy_(wide[1:5, :300], labels[1:5], None, 1.0, gradient=True, details=False)
    assert losses.isnan().tolist() == [False, True, False, False]
    assert wide[2, :300].isnan().all()
    assert wide[[1, 3, 4], :300].isfinite().all()
    assert wide[[0, 5]].equal(before[[0, 5]])
    assert wide[:, 300:].equal(before[:, 300:])


def test_columns_of_minus_infinity_have_no_probability():
    logits, labels = problem(4, TILE + 300, masked=0)
    labels[:] = torch.tensor([0, 5, TILE + 299, 7])
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    allowed[:, :9] = allowed[:, -2:] = True
    logits[~allowed] = -math.inf
    logits[3] = -math.inf
    logits[3, 7] = 3.0
    compare(logits, labels)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy, in the interpreter
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("column", [0, 150, 299])
def test_infinite_logits_and_nan_give_nan(bad: float, column: int):
    logits, labels = problem(3, 300, masked=0)
    labels[1] = 150
    logits[1, column] = bad
    losses, entropy, correct = cross_entropy_(logits, labels, None, 1.0, gradient=True, details=True)
    assert losses.isnan().tolist() == [False, True, False]
    assert entropy.isnan().tolist() == [False, True, False]
    assert not correct[1]
    assert logits.isnan().any(dim=1).tolist() == [False, True, False]


def test_a_label_with_probability_zero_has_an_infinite_loss_and_a_finite_gradient():
    logits, labels = problem(1, 300, masked=0)
    logits[0, labels] = -math.inf
    losses, _, correct = cross_entropy_(logits, labels, None, 1.0, gradient=True, details=True)
    assert losses.item() == math.inf
    assert not correct
    assert logits[0, labels] == -1
    assert logits.sum().abs() < 1e-5


@pytest.mark.parametrize(("label", "first"), [(3, True), (200, False), (4, False)])
def test_of_equal_maxima_the_first_is_the_prediction(label: int, first: bool):
    logits = torch.zeros(1, 300, device=DEVICE)
    logits[0, [3, 200]] = 2.5
    labels = torch.tensor([label], device=DEVICE)
    assert masked_cross_entropy(logits, labels, details=True).correct == int(first)


def test_a_confident_prediction_keeps_its_small_loss():
    logits = torch.tensor([[30.0, 14.0, 13.0], [1e4, 1e4 - 14, 0.0]], device=DEVICE)
    labels = torch.tensor([0, 0], device=DEVICE)
    expected = reference.masked_cross_entropy(logits.double(), labels, details=True).token_losses
    found = masked_cross_entropy(logits, labels, details=True).token_losses
    torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=1.2e-7)


def test_the_loss_is_not_differentiable_twice():
    logits, labels = problem(3, 20)
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, labels).loss_sum
    with pytest.raises(RuntimeError, match="no second derivative; the reference has"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_second_backward_through_the_same_loss_is_refused(overwrite: bool):
    logits, labels = problem(3, 20)
    logits.requires_grad_()
    loss = masked_cross_entropy(logits * 1, labels, overwrite=overwrite).loss_sum
    loss.backward(retain_graph=True)
    first = logits.grad.clone()
    with pytest.raises(RuntimeError, match="is spent by the first backward: compute the loss again"):
        loss.backward()
    assert logits.grad.equal(first)


def test_only_the_loss_sum_is_differentiable():
    logits, labels = problem(3, 20)
    found = masked_cross_entropy(logits.requires_grad_(), labels, details=True)
    assert [field.requires_grad for field in found] == [True, False, False, False, False]
    with torch.no_grad():
        assert not masked_cross_entropy(logits, labels).loss_sum.requires_grad
    assert masked_cross_entropy(logits, labels)[2:] == (None, None, None)


def head_and_loss(loss: Callable[..., reference.CrossEntropy], **options) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return loss(hidden @ weight.t(), labels, **options).loss_sum * 0.5

    return run


def loss_and_gradients(run: Callable[..., Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, device=DEVICE), torch.randn(300, 8, device=DEVICE)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = run(*leaves, torch.tensor([1, -100, 299, 0, -100, 7], device=DEVICE))
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    "compiled", [None, pytest.param("aot_eager"), pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_and_checkpointed_it_is_the_same_loss(overwrite: bool, compiled: str | None, checkpointed: bool):
    run = head_and_loss(masked_cross_entropy, overwrite=overwrite, grad_scale=0.5)
    if checkpointed:
        run = partial(checkpoint, run, use_reentrant=False)
    if compiled is not None:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend=compiled)
    torch.testing.assert_close(
        loss_and_gradients(run), loss_and_gradients(head_and_loss(reference.masked_cross_entropy))
    )


def test_the_operations_keep_the_rules_of_torch_library():
    logits, labels = problem(3, 40)
    weights = torch.rand(3, device=DEVICE)
    for details in (False, True):
        for gradient in (False, True):
            torch.library.opcheck(cross_entropy, (logits, labels, weights, 0.5, gradient, details))
        torch.library.opcheck(overwrite_cross_entropy, (logits[:, :30].clone(), labels, None, 0.5, details))
    torch.library.opcheck(scale_in_place, (logits.clone(), torch.tensor(2.0, device=DEVICE), 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(0,), (1,), (5, 4096), (4097,), (3, 5, 7)])
def test_scaling_multiplies_every_number_once(shape: tuple[int, ...], dtype: torch.dtype):
    tensor = torch.randn(shape, device=DEVICE).to(dtype)
    expected = (tensor.float() * 1.5).to(dtype)
    scale_(tensor, torch.tensor(3.0, device=DEVICE), 2.0)
    assert tensor.equal(expected)


def test_scaling_rows_leaves_what_is_between_them():
    wide = torch.randn(5, 40, device=DEVICE)
    expected = wide.clone()
    expected[:, :33] *= -2
    scale_(wide[:, :33], torch.tensor(-2.0, device=DEVICE))
    assert wide.equal(expected)


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 1e-5 / 7])
def test_scaling_by_what_is_expected_touches_nothing(scale: float):
    bits = torch.full((1000,), 0x7F800001, dtype=torch.int32, device=DEVICE)  # NaN that any arithmetic makes quiet
    tensor = bits.clone().view(torch.float32)
    scale_(tensor, torch.tensor(scale, device=DEVICE), scale)
    assert tensor.view(torch.int32).equal(bits)


def test_what_has_no_kernel_is_refused():
    logits, labels = problem(3, 20)
    with pytest.raises(AssertionError, match=re.escape("no kernel for torch.float64")):
        masked_cross_entropy(logits.double(), labels)
    with pytest.raises(AssertionError, match="one label for each row"):
        masked_cross_entropy(logits, labels[:2])
    with pytest.raises(AssertionError, match="the weights have no gradient; the reference gives one"):
        masked_cross_entropy(logits, labels, torch.ones(3, device=DEVICE, requires_grad=True))


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def marked(test: Callable) -> Callable:
    for mark in on_gpu:
        test = mark(test)
    return test


@marked
@each_configuration
@pytest.mark.parametrize("columns", [1, 257, 151_643, 151_669, 151_936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_configuration_equals_the_definition_on_a_gpu(configuration: int, columns: int, dtype: torch.dtype):
    logits, labels = problem(50, columns, dtype=dtype)
    weights = torch.rand(50, device=DEVICE)
    for overwrite in (False, True):
        compare(logits, labels, weights, upstream=0.5, configuration=configuration, overwrite=overwrite)
        compare(logits, labels, upstream=0.5, grad_scale=0.5, configuration=configuration, overwrite=overwrite)


@marked
@pytest.mark.parametrize("columns", [151_669, 151_936])
def test_two_runs_give_the_same_bits(columns: int):
    logits, labels = problem(2000, columns, dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        gradient = logits.clone()
        runs.append([*cross_entropy_(gradient, labels, None, 1.0, gradient=True, details=True), gradient])
        runs[-1].append(masked_cross_entropy(logits, labels).loss_sum)
    assert all(one.equal(two) for one, two in zip(*runs, strict=True))


@marked
def test_more_than_two_billion_logits_are_all_reached():
    logits = torch.randn(15_000, 151_936, dtype=torch.bfloat16, device=DEVICE)
    assert logits.numel() > 2**31
    labels = torch.randint(151_936, (15_000,), device=DEVICE)
    labels[100:-100:2] = -100
    kept = torch.cat([torch.arange(50), torch.arange(14_950, 15_000)]).to(DEVICE)
    expected = logits[kept]
    losses, *_ = cross_entropy_(logits, labels, None, 1.0, gradient=True, details=False)
    known, *_ = cross_entropy_(expected, labels[kept], None, 1.0, gradient=True, details=False)
    assert losses[kept].equal(known)
    assert logits[kept].equal(expected)
    assert (logits[labels == -100][::100] == 0).all()
    assert logits.isfinite().all()
    scale_(logits, torch.tensor(2.0, device=DEVICE))
    assert logits[kept].equal(expected * 2)


@marked
def test_overwritten_logits_need_no_memory_but_for_the_losses():
    logits, labels = problem(2000, 151_936, dtype=torch.bfloat16)
    logits.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = masked_cross_entropy(logits, labels, overwrite=True, grad_scale=0.5).loss_sum
    (gradient,) = torch.autograd.grad(loss * 0.25, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.cuda.max_memory_allocated() - before < 2**20


@marked
def test_the_host_never_waits_for_the_gpu():
    logits, labels = problem(100, 1000, dtype=torch.bfloat16)
    weights = torch.rand(100, device=DEVICE)
    for mode in ("default", "error"):  # the first time, kernels are compiled and loaded
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for overwrite in (True, False):
                leaf = logits.clone().requires_grad_()
                found = masked_cross_entropy(leaf, labels, weights, details=True, overwrite=overwrite)
                torch.autograd.grad(found.loss_sum * 0.5, leaf)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@marked
def test_compiled_for_a_gpu_it_is_the_same_loss():
    for overwrite in (True, False):
        torch._dynamo.reset()
        run = head_and_loss(masked_cross_entropy, overwrite=overwrite, grad_scale=0.5)
        compiled = torch.compile(run, fullgraph=True)
        expected = loss_and_gradients(head_and_loss(reference.masked_cross_entropy))
        torch.testing.assert_close(loss_and_gradients(compiled), expected)
