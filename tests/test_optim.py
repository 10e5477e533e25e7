import math

import pytest
import torch

from sft.optim import cosine_lr, learning_rate_at, linear_lr, make_optimizer
from tests.tiny import tiny_model

RUN = {"peak": 3e-4, "floor": 3e-5, "warmup": 10, "total": 110}


def test_cosine_lr_equals_its_closed_form():
    for step in range(10):
        assert cosine_lr(step, **RUN) == pytest.approx(3e-4 * (step + 1) / 11, rel=1e-15)
    for step in range(10, 111):
        expected = 3e-5 + (3e-4 - 3e-5) * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert cosine_lr(step, **RUN) == pytest.approx(expected, rel=1e-15)
    assert cosine_lr(5000, **RUN) == 3e-5


def test_the_first_step_learns_and_warm_up_ends_at_the_peak():
    assert cosine_lr(0, **RUN) > 0
    assert cosine_lr(10, **RUN) == 3e-4
    assert cosine_lr(0, peak=1e-3, floor=0.0, warmup=0, total=5) == 1e-3


def test_linear_lr_is_a_straight_line_to_the_floor():
    assert linear_lr(60, **RUN) == pytest.approx((3e-4 + 3e-5) / 2)
    assert linear_lr(110, **RUN) == 3e-5


def test_constant_stays_at_the_peak():
    rates = [learning_rate_at(step, schedule="constant", **RUN) for step in (0, 9, 10, 109, 9999)]
    assert rates[0] == pytest.approx(3e-4 / 11)
    assert rates[2:] == [3e-4] * 3


def test_a_warm_up_longer_than_the_run_never_divides_by_zero():
    assert cosine_lr(20, peak=1.0, floor=0.1, warmup=20, total=20) == 0.1
    assert cosine_lr(19, peak=1.0, floor=0.1, warmup=20, total=10) == pytest.approx(20 / 21)


def test_matrices_and_embeddings_decay_and_norms_and_biases_do_not():
    model = tiny_model(normalization="layernorm", bias=True)
    groups = make_optimizer(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed = {id(p) for p in groups[0]["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (name.endswith("weight") and "norm" not in name), name
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_frozen_parameters_get_no_optimizer_state():
    model = tiny_model()
    model.token_embeddings.weight.requires_grad_(False)
    optimizer = make_optimizer(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    assert all(p is not model.token_embeddings.weight for g in optimizer.param_groups for p in g["params"])
    assert isinstance(optimizer, torch.optim.AdamW)
