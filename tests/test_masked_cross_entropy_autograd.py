"""The Triton cross-entropy among autograd, torch.compile and checkpointing, and the scaling of a finished gradient."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tests.interpreted  # noqa: F401  # before the kernels
from sft.kernels import reference
from sft.kernels.masked_cross_entropy import masked_cross_entropy, scale_
from tests.devices import EPSILON, NOT_COMPILED, each_device, each_dtype, fp32_and_bf16, interpreted, on_gpu
from tests.kernel_problems import problem


@fp32_and_bf16
def test_the_loss_is_not_differentiable_twice(device: str, dtype: torch.dtype):
    logits, labels = problem(3, 20, dtype=dtype, device=device)
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, labels).loss_sum
    with pytest.raises(RuntimeError, match="no second derivative; the reference has"):
        torch.autograd.grad(loss, logits, create_graph=True)


@fp32_and_bf16
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_second_backward_through_the_same_loss_is_refused(overwrite: bool, device: str, dtype: torch.dtype):
    logits, labels = problem(3, 20, dtype=dtype, device=device)
    logits.requires_grad_()
    loss = masked_cross_entropy(logits * 1, labels, overwrite=overwrite).loss_sum
    loss.backward(retain_graph=True)
    first = logits.grad.clone()
    with pytest.raises(RuntimeError, match="is spent by the first backward: compute the loss again"):
        loss.backward()
    assert logits.grad.equal(first)


@NOT_COMPILED
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


def loss_and_gradients(run: Callable[..., Tensor], device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 8, generator=draw).to(device, dtype).requires_grad_() for n in (6, 300)]
    loss = run(*leaves, torch.tensor([1, -100, 299, 0, -100, 7], device=device))
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    ("device", "dtype", "compiled"),
    [
        interpreted("cpu", torch.float32, None),
        interpreted("cpu", torch.float32, "aot_eager"),
        interpreted("cpu", torch.float32, "inductor", slow=True),
        on_gpu("cuda", torch.bfloat16, None),
        on_gpu("cuda", torch.bfloat16, "inductor"),
    ],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_and_checkpointed_it_is_the_same_loss(
    overwrite: bool, device: str, dtype: torch.dtype, compiled: str | None, checkpointed: bool
):
    plain = run = head_and_loss(masked_cross_entropy, overwrite=overwrite, grad_scale=0.5)
    if checkpointed:
        run = partial(checkpoint, run, use_reentrant=False)
    if compiled is not None:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend=compiled)
    found = loss_and_gradients(run, device, dtype)
    torch.testing.assert_close(found, loss_and_gradients(plain, device, dtype))
    if dtype == torch.float32:  # else the logits of the definition are rounded and their gradient is not
        torch.testing.assert_close(found, loss_and_gradients(head_and_loss(reference.masked_cross_entropy), device))


@pytest.mark.parametrize(
    ("device", "dtype", "backend"),
    [
        interpreted("cpu", torch.float32, "aot_eager"),
        interpreted("cpu", torch.float32, "inductor", slow=True),
        on_gpu("cuda", torch.bfloat16, "inductor"),
    ],
)
def test_a_new_grad_scale_in_each_step_compiles_nothing_anew(device: str, dtype: torch.dtype, backend: str):
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    def loss(logits: Tensor, labels: Tensor, grad_scale: float) -> Tensor:
        return masked_cross_entropy(logits, labels, grad_scale=grad_scale).loss_sum

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counting)
    logits, labels = problem(6, 300, dtype=dtype, device=device)
    logits.requires_grad_()
    for step in range(12):
        grad_scale = 1 / (1000 + 7 * step)
        results = []
        for call in (loss, compiled):
            told = call(logits, labels, grad_scale)
            results.append((told, *torch.autograd.grad(told * grad_scale, logits)))
        torch.testing.assert_close(*results)
        if step == 1:
            before = len(compilations)
    assert len(compilations) == before
    torch._dynamo.reset()


class Calls(TorchDispatchMode):
    """The operations of this project that run inside, with copies of what they were given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "sft":
            self.seen.append((operation, [x.clone() if isinstance(x, Tensor) else x for x in args]))
        return operation(*args, **(kwargs or {}))


@fp32_and_bf16
def test_the_operations_keep_the_rules_of_torch_library(device: str, dtype: torch.dtype):
    logits, labels = problem(3, 40, dtype=dtype, device=device)
    calls = Calls()
    with calls:
        for details, overwrite, columns in ((False, False, 40), (True, False, 40), (True, True, 30)):
            leaf = logits[:, :columns].clone().requires_grad_()
            weights = torch.rand(3, device=device) if details else None
            found = masked_cross_entropy(leaf, labels % columns, weights, details=details, overwrite=overwrite)
            torch.autograd.grad(found.loss_sum * 0.5, leaf)
        masked_cross_entropy(logits, labels, details=True)
    names = {str(operation) for operation, _ in calls.seen}
    assert names >= {"sft.cross_entropy.default", "sft.cross_entropy_.default"}
    for operation, arguments in calls.seen:
        library.opcheck(operation, tuple(arguments))


@each_dtype
@pytest.mark.parametrize("shape", [(0,), (1,), (5, 4096), (4097,), (3, 5, 7)])
def test_scaling_multiplies_every_number_once(shape: tuple[int, ...], device: str, dtype: torch.dtype):
    tensor = torch.randn(shape, device=device).to(dtype)
    expected = (tensor.float() * 1.5).to(dtype)
    scale_(tensor, torch.tensor(3.0, device=device), 2.0)
    torch.testing.assert_close(tensor, expected, rtol=EPSILON[dtype], atol=0)  # a GPU's quotient may be off by 2**-22


@fp32_and_bf16
@pytest.mark.parametrize("start", [0, 3])
def test_scaling_rows_leaves_what_is_between_them(start: int, device: str, dtype: torch.dtype):
    wide = torch.randn(5, 40, device=device).to(dtype)
    expected = wide.clone()
    expected[:, start : start + 33] *= -2
    scale_(wide[:, start : start + 33], torch.tensor(-2.0, device=device))
    torch.testing.assert_close(wide, expected, rtol=EPSILON[dtype], atol=0)
    untouched = torch.ones(40, dtype=torch.bool, device=device)
    untouched[start : start + 33] = False
    assert wide[:, untouched].equal(expected[:, untouched])


@each_device
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 1e-5 / 7])
def test_scaling_by_what_is_expected_touches_nothing(scale: float, device: str):
    bits = torch.full((1000,), 0x7F800001, dtype=torch.int32, device=device)  # NaN that any arithmetic makes quiet
    tensor = bits.clone().view(torch.float32)
    scale_(tensor, torch.tensor(scale, device=device), scale)
    assert tensor.view(torch.int32).equal(bits)


@NOT_COMPILED
def test_what_has_no_kernel_is_refused():
    logits, labels = problem(3, 20)
    with pytest.raises(AssertionError, match=re.escape("no kernel for torch.float64")):
        masked_cross_entropy(logits.double(), labels)
    with pytest.raises(AssertionError, match="one label for each row"):
        masked_cross_entropy(logits, labels[:2])
    with pytest.raises(AssertionError, match="the weights have no gradient; the reference gives one"):
        masked_cross_entropy(logits, labels, torch.ones(3, requires_grad=True))
