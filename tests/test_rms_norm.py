import pytest
import torch
import torch.nn.functional as F

from sft.rms_norm import rms_norm

EPS = 1e-3


@pytest.mark.parametrize("shape", [(7, 16), (2, 5, 16), (2, 5, 3, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_pytorchs(shape: tuple[int, ...], dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for _ in range(2))
    weight = torch.rand(16, generator=draw, dtype=dtype).requires_grad_()
    ours, plain = rms_norm(x, weight, EPS), F.rms_norm(x, weight.shape, weight, EPS)
    torch.testing.assert_close(ours, plain)
    gradients = (torch.autograd.grad(out, (x, weight), upstream) for out in (ours, plain))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_gradients_are_the_derivatives():
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in ((3, 4), (4,)))
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), (x, weight))


def test_half_precision_is_rounded_once_at_the_end():
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.full((16,), 1.5, dtype=torch.bfloat16)
    exact = F.rms_norm(x.double(), (16,), weight.double(), EPS)
    assert torch.equal(rms_norm(x, weight, EPS), exact.bfloat16())


def test_a_row_of_zeros_has_no_gradient_that_is_not_finite():
    x, weight = torch.zeros(2, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(weight.grad, torch.zeros(16))
