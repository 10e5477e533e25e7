"""The fused head at real size on a GPU, in bf16 and as the trainer runs it: values, equal bits, memory, waiting."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sft.kernels import products, reference
from sft.kernels.linear_cross_entropy import masked_linear_cross_entropy
from sft.loss import choose_loss
from tests.devices import GPU_MARKS

pytestmark = list(GPU_MARKS)

VOCABULARY, WIDTH = 151_936, 2048
FOUR_CHUNKS = 16_384  # rows: the memory allowed holds 4,278 rows of logits at most
EXTRA_BYTES = 1.3e9  # beside the weight gradient in fp32


class Mix(NamedTuple):
    """What the parameters and the hidden states are, and whether autocast makes bf16 of them."""

    dtype: torch.dtype
    autocast: bool

    def loss(self, *tensors: Tensor, **options) -> reference.CrossEntropy:
        if not self.autocast:
            return masked_linear_cross_entropy(*tensors, **options)
        function = chosen()  # which waits for the GPU the first time
        with torch.autocast("cuda", torch.bfloat16):
            return function(*tensors, **options)


@functools.cache
def chosen() -> Callable[..., reference.CrossEntropy]:
    """What the trainer chooses."""
    loss = choose_loss("auto", device=torch.device("cuda", 0), dtype=torch.bfloat16)
    assert loss.kernel == "triton", str(loss)
    return loss.function


MIXES = {"bf16": Mix(torch.bfloat16, False), "fp32 under autocast": Mix(torch.float32, True)}
each_mix = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)


def real_size(n: int, *, mix: Mix, M: int | None = None, V: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden and head as leaves, labels and rows, a tenth of them masked; logits with a spread of about 2."""
    torch.manual_seed(n)
    M = M or n
    hidden = torch.randn(M, WIDTH, device="cuda").to(mix.dtype).requires_grad_()
    head = torch.randn(V, WIDTH, device="cuda").mul_(0.05).to(mix.dtype).requires_grad_()
    labels = torch.randint(0, V, (n,), device="cuda")
    labels[::10] = -100
    return hidden, head, labels, torch.randperm(M, device="cuda")[:n]


@each_mix
@pytest.mark.parametrize(("n", "V"), [(FOUR_CHUNKS, 151_936), (1100, 151_669)])
def test_loss_and_gradients_equal_float64_to_the_rounding_of_bf16(n: int, V: int, mix: Mix):
    """A logit of 4 is off by 2**-8 at most, a number of the gradients by 2**-8 of itself: well below 5e-3 together."""
    hidden, head, labels, rows = real_size(n, mix=mix, V=V, M=2 * n)
    weights = torch.rand(n, device="cuda") + 0.5
    got = mix.loss(hidden, head, labels, weights, rows=rows, grad_scale=0.5)
    (0.5 * got.loss_sum).backward()
    exact = [each.detach().bfloat16().double().requires_grad_() for each in (hidden, head)]
    loss_sum = 0.0
    for part in torch.arange(n).split(1024):
        mine = slice(int(part[0]), int(part[-1]) + 1)
        loss = reference.masked_linear_cross_entropy(*exact, labels[mine], weights[mine], rows=rows[mine]).loss_sum
        (0.5 * loss).backward()
        loss_sum += loss.item()
    assert got.loss_sum.item() == pytest.approx(loss_sum, rel=1e-4)
    assert got.count.item() == (labels != -100).sum().item()
    for mine, right in zip((hidden, head), exact, strict=True):
        assert mine.grad.dtype == mix.dtype
        assert (mine.grad.double() - right.grad).norm() <= 5e-3 * right.grad.norm()


def test_half_precision_is_added_in_the_products_epilogue():
    assert products.half_precision_adds(torch.device("cuda", 0), torch.bfloat16) is products.add_in_epilogue
    assert products.half_precision_adds(torch.device("cuda", 0), torch.float16) is products.add_in_epilogue


@each_mix
def test_the_same_input_gives_the_same_bits(mix: Mix):
    hidden, head, labels, rows = real_size(FOUR_CHUNKS, mix=mix, M=2 * FOUR_CHUNKS)
    runs = []
    for _ in range(2):
        got = mix.loss(hidden, head, labels, rows=rows, details=True)
        runs.append((*got, *torch.autograd.grad(got.loss_sum, (hidden, head))))
    assert all(one.equal(two) for one, two in zip(*runs, strict=True))


@each_mix
@pytest.mark.parametrize("n", [8192, 32768])
def test_peak_memory_is_the_weight_gradient_and_little_more(n: int, mix: Mix):
    hidden, head, labels, rows = real_size(n, mix=mix)
    run = functools.partial(mix.loss, hidden, head, labels, rows=rows, grad_scale=0.5)
    for _ in range(2):  # the first time, the libraries get their workspace
        hidden.grad = head.grad = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (0.5 * run().loss_sum).backward()
    in_fp32 = 4 * head.numel()  # as it is accumulated
    converted = 2 * head.numel() * mix.autocast
    assert torch.cuda.max_memory_allocated() - before <= EXTRA_BYTES + in_fp32 + converted


@each_mix
def test_the_host_never_waits_for_the_gpu(mix: Mix):
    hidden, head, labels, rows = real_size(FOUR_CHUNKS, mix=mix)
    for mode in ("default", "error"):  # the first time, kernels are compiled and additions tried
        for details in (False, True):
            for grad_scale in (0.5, 0.25):  # the upstream gradient, and another
                hidden.grad = head.grad = None
                torch.cuda.set_sync_debug_mode(mode)
                try:
                    got = mix.loss(hidden, head, labels, rows=rows, grad_scale=grad_scale, details=details)
                    (0.5 * got.loss_sum).backward()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
