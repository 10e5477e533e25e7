import importlib
import random
from typing import Any

import pytest
import torch

from sft.rotary import rotary_tables, rotate, scaled

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 40_000]])


def by_complex_numbers(x: torch.Tensor, *, theta: float, interleaved: bool) -> torch.Tensor:
    """x (B, T, heads, C), each pair as a complex number times exp(i position / theta^(2 pair / C)), in float64."""
    C = x.shape[-1]
    pairs = x.double().unflatten(-1, (-1, 2)) if interleaved else x.double().unflatten(-1, (2, -1)).transpose(-1, -2)
    angles = POSITIONS[..., None, None] / theta ** (torch.arange(0, C, 2, dtype=torch.float64) / C)
    turn = torch.polar(torch.ones((), dtype=torch.float64), angles)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_pair_is_turned_by_its_positions_angle(dtype: torch.dtype, interleaved: bool):
    x = torch.randn(1, 6, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    tables = rotary_tables(POSITIONS, head_size=8, theta=100.0)
    turned = rotate(x, tables, interleaved=interleaved)
    assert turned.dtype == dtype
    exact = by_complex_numbers(x, theta=100.0, interleaved=interleaved)
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(turned[:, :5].double(), exact[:, :5], rtol=bound, atol=bound)
    far = max(bound, 5e-3)  # an angle of 40,000 is itself a rounded fp32 number
    torch.testing.assert_close(turned[:, 5:].double(), exact[:, 5:], rtol=far, atol=far)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_gradient_is_the_upstream_one_turned_back(interleaved: bool):
    draw = torch.Generator().manual_seed(1)
    x, upstream = (torch.randn(1, 6, 3, 8, generator=draw) for _ in range(2))
    tables = rotary_tables(POSITIONS, head_size=8, theta=100.0)
    eager, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    in_one = rotate(eager, tables, interleaved=interleaved)
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)(plain, tables, interleaved=interleaved)
    torch.testing.assert_close(in_one, compiled)
    torch.testing.assert_close(
        *(torch.autograd.grad(out, of, upstream)[0] for out, of in ((in_one, eager), (compiled, plain)))
    )


def test_nothing_but_the_tables_is_kept_for_the_backward_pass():
    kept = []

    def keep(tensor):
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    tables = rotary_tables(POSITIONS, head_size=8, theta=100.0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rotate(torch.randn(1, 6, 3, 8, requires_grad=True), tables, interleaved=False)
    assert set(kept) == {table.untyped_storage().data_ptr() for table in tables}


def drawn_scalings() -> list[dict[str, Any]]:
    draw = random.Random(0)
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scalings: list[dict[str, Any]] = [
        {"rope_type": "linear", "factor": 4.0},
        *({"rope_type": "llama3", "factor": factor, **llama3} for factor in (8.0, 32.0)),
    ]
    for _ in range(40):
        context = draw.choice([16, 4096, 32768])
        yarn = {
            "rope_type": "yarn",
            "factor": draw.choice([1.0, 4.0, 40.0]),
            "original_max_position_embeddings": context,
        }
        optional = {
            **{"attention_factor": 1.3, "beta_fast": 12.0, "beta_slow": 0.001, "mscale": 0.7, "mscale_all_dim": 1.1},
            "truncate": False,
        }
        scalings.append({**yarn, **{name: optional[name] for name in optional if draw.random() < 0.4}})
    return scalings


@pytest.mark.parametrize("scaling", drawn_scalings(), ids=str)
def test_stretched_wavelengths_are_those_of_transformers(scaling):
    transformers = pytest.importorskip("transformers")
    rope_utils = importlib.import_module("transformers.modeling_rope_utils")
    for head_size, theta in ((64, 1e4), (128, 1e6), (8, 5e5)):
        config = transformers.Qwen3Config(
            head_dim=head_size, max_position_embeddings=65536, rope_parameters={**scaling, "rope_theta": theta}
        )
        expected, length = rope_utils.ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
        exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
        found, our_length = scaled(1.0 / theta**exponents, scaling, theta=theta)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert our_length == pytest.approx(length)
