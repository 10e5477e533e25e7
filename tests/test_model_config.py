import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model_builder import ConfigurableGPT
from model_config import PRESETS, ModelArchitectureConfig, forward_flops, parameter_count
from sft.errors import UserError

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 100, "block_size": 16}
PUBLISHED_TOTALS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "sft-qwen3-1.8b": 1_829_296_128,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
}
VARIANTS = [
    {},
    {"num_key_value_heads": 1, "bias": True, "qk_norm": True},
    {"head_dim": 6, "num_key_value_heads": 2, "d_ff": 17, "weight_tying": True},
    {"ffn_type": "standard", "normalization": "layernorm", "bias": True, "position_encoding": "learned_absolute"},
    {"normalization": "layernorm_nobias", "norm_position": "post", "position_encoding": "none"},
]


@pytest.mark.parametrize("name", PRESETS)
def test_the_parameter_count_of_a_preset_is_the_published_one_and_that_of_the_model(name: str):
    with torch.device("meta"):
        model = ConfigurableGPT(PRESETS[name])
    assert parameter_count(PRESETS[name]) == PUBLISHED_TOTALS[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_TOTALS[name]


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_parameter_count_is_exact_for_every_kind_of_part(changes: dict):
    config = ModelArchitectureConfig(**SHAPE, **changes)
    model = ConfigurableGPT(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("changes", VARIANTS)
def test_forward_flops_are_what_pytorch_counts(changes: dict):
    config = ModelArchitectureConfig(**SHAPE, **changes)
    model, rows, length = ConfigurableGPT(config), 3, 16
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(rows, length, dtype=torch.long))
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for operation, n in counts.items() if "attention" not in str(operation))
    tokens = rows * length
    assert products == forward_flops(config, tokens=tokens, attended_pairs=0, trained_tokens=tokens)


@pytest.mark.parametrize("changes", VARIANTS)
def test_what_only_trained_tokens_need_is_counted_and_computed_for_them_alone(changes: dict):
    config = ModelArchitectureConfig(**SHAPE, **changes)
    model, rows, length = ConfigurableGPT(config), 3, 16
    places = torch.arange(7)
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden_states(torch.zeros(rows, length, dtype=torch.long), places=places)
        F.linear(hidden, model.head_weight)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for operation, n in counts.items() if "attention" not in str(operation))
    assert products == forward_flops(config, tokens=rows * length, attended_pairs=0, trained_tokens=len(places))


def test_attention_flops_are_two_products_of_every_attended_pair():
    config = ModelArchitectureConfig(**SHAPE, num_key_value_heads=2, head_dim=6)
    pairs = 5 * 6 // 2
    scores_and_mix = 2 * (2 * pairs * 4 * 6)  # two products, a multiply-add each, 4 heads of size 6
    flops = forward_flops(config, tokens=0, attended_pairs=pairs, trained_tokens=0)
    assert flops == config.n_layer * scores_and_mix


@pytest.mark.parametrize("config", [*PRESETS.values(), ModelArchitectureConfig(**SHAPE)])
def test_an_architecture_survives_json_exactly(config: ModelArchitectureConfig):
    values = config.to_dict()
    assert list(values) == [field.name for field in dataclasses.fields(config)]
    again = ModelArchitectureConfig.from_dict(json.loads(json.dumps(values)))
    assert again == config
    assert again.to_dict() == values


def test_what_is_left_out_stays_none_and_is_derived():
    swiglu = ModelArchitectureConfig(**SHAPE, dropout=0.25)
    standard = ModelArchitectureConfig(**SHAPE, ffn_type="standard")
    assert (swiglu.d_ff, swiglu.head_dim, swiglu.num_key_value_heads) == (None, None, None)
    assert (swiglu.ffn_width, standard.ffn_width) == (85, 128)  # int(8 * 32 / 3) and 4 * 32
    assert (swiglu.head_size, swiglu.key_heads) == (8, 4)
    assert (swiglu.attention_dropout_rate, swiglu.residual_dropout_rate) == (0.25, 0.25)
    assert dataclasses.replace(swiglu, attention_dropout=0.0).attention_dropout_rate == 0.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        swiglu.d_ff = 4  # type: ignore[misc]


def test_everything_wrong_with_an_architecture_is_said_at_once():
    with pytest.raises(UserError) as caught:
        ModelArchitectureConfig.from_dict(
            {
                "n_layer": 0,
                "n_head": 3,
                "n_embd": 64,
                "vocab_sise": 3,
                "vocab_size": True,
                "activation": "gleu",
                "num_key_value_heads": 2,
                "dropout": 1.0,
                "rope_theta": float("inf"),
            }
        )
    assert str(caught.value).splitlines() == [
        "the architecture cannot be built:",
        "  unknown field 'vocab_sise'; did you mean 'vocab_size'?",
        "  vocab_size must be int, not True",
        "  block_size is missing",
        "  activation must be 'gelu' | 'gelu_tanh' | 'silu' | 'relu' | 'leaky_relu', not 'gleu'",
        "  rope_theta must be float, not inf",
        "  n_layer must be above 0, not 0",
        "  dropout must be at least 0 and below 1, not 1.0",
        "  n_head 3 must be a multiple of num_key_value_heads 2",
        "  n_embd 64 must be a multiple of n_head 3, or head_dim given",
    ]


def test_sizes_that_no_device_could_hold_are_refused_before_anything_is_built():
    for change in ({"n_embd": 10**12}, {"n_layer": 10**9}, {"n_embd": 10**400, "n_head": 10**399}):
        with pytest.raises(UserError, match="it has more than 1,000,000,000,000 parameters"):
            ModelArchitectureConfig.from_dict({**SHAPE, **change})


def test_the_constructor_refuses_what_from_dict_refuses():
    with pytest.raises(UserError, match="rotary positions need an even head size, not 5"):
        ModelArchitectureConfig(**SHAPE, head_dim=5)
    assert ModelArchitectureConfig(**SHAPE, head_dim=5, position_encoding="none").head_size == 5
