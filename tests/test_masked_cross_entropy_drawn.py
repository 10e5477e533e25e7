"""The Triton cross-entropy equals its definition for whatever is drawn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernel_problems import compare, problem

SMALL_TILES = 9  # the configuration that the interpreter is quickest with


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the kernels are compiled, not interpreted")
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
def test_any_shape_mask_weights_and_scale_give_what_the_definition_gives(
    rows, columns, padding, masked, weighted, overwrite, upstream, grad_scale, seed
):
    wide, _ = problem(rows, columns + padding, seed=seed)
    _, labels = problem(rows, columns, masked=masked, seed=seed)
    weights = torch.rand(rows) if weighted else None
    before = wide.clone()
    options = {"grad_scale": grad_scale, "configuration": SMALL_TILES}
    compare(wide[:, :columns], labels, weights, upstream=upstream, overwrite=overwrite, **options)
    assert wide.equal(before)
