import pytest
import torch
import torch.nn.functional as F

from sft import linear
from sft.linear import Linear

pytestmark = pytest.mark.skipif(not linear.has_onednn(), reason="this build of PyTorch has no oneDNN")


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of what oneDNN was given; layers of any size go there."""
    seen = []
    onednn = linear.onednn

    def counted(x, weight, bias=None):
        seen.append(tuple(x.shape))
        return onednn(x, weight, bias)

    monkeypatch.setattr(linear, "onednn", counted)
    monkeypatch.setattr(linear, "LEAST_WORK", 0)
    return seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("K", "N"), [(16, 32), (17, 32), (16, 31), (13, 11)])
def test_values_and_gradients_are_those_of_a_linear_layer(calls, K: int, N: int, bias: bool):
    torch.manual_seed(0)
    layer = Linear(K, N, bias=bias)
    x = torch.randn(2, 5, K, requires_grad=True)
    upstream = torch.randn(2, 5, N)
    tensors = [x, *layer.parameters()]
    ours = layer(x)
    gradients = torch.autograd.grad(ours, tensors, upstream)
    assert calls == [(2, 5, K), (2, 5, N)]
    plain = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(ours, plain)
    for gradient, exact in zip(gradients, torch.autograd.grad(plain, tensors, upstream), strict=True):
        torch.testing.assert_close(gradient, exact)


def test_only_the_gradients_that_are_needed_are_computed(calls):
    layer = Linear(16, 32)
    layer(torch.randn(4, 16)).sum().backward()  # of the first layer of a frozen embedding, say
    assert calls == [(4, 16)]
    layer.zero_grad()
    layer.requires_grad_(False)
    x = torch.randn(4, 16, requires_grad=True)
    layer(x).sum().backward()
    assert calls[1:] == [(4, 16), (4, 32)]
    assert layer.weight.grad is None


def test_what_is_not_a_large_fp32_product_on_the_cpu_stays_with_pytorch(calls, monkeypatch):
    layer = Linear(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 16)).dtype == torch.bfloat16
    layer.double()(torch.randn(4, 16, dtype=torch.float64))
    torch.compile(layer.float(), backend="eager", fullgraph=True)(torch.randn(4, 16))
    monkeypatch.setattr(linear, "LEAST_WORK", 4 * 16 * 32 + 1)
    layer(torch.randn(4, 16))
    assert calls == []
    monkeypatch.setattr(linear, "LEAST_WORK", 4 * 16 * 32)
    layer(torch.randn(4, 16))
    assert calls == [(4, 16)]
