from pathlib import Path
from typing import Any

import pytest

from model_config import PRESETS, ModelArchitectureConfig
from sft.errors import UserError
from sft.export_config import complete, config_json, expressed, meaning
from sft.families import architecture_fields
from sft.huggingface import read_config
from tests.tiny import tiny_config

GPT2 = {
    "normalization": "layernorm",
    "position_encoding": "learned_absolute",
    "ffn_type": "standard",
    "activation": "gelu_tanh",
    "num_key_value_heads": 4,
    "qk_norm": False,
}
ROTATION = {"rope_scaling", "torch_dtype", "dtype"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "expert_d_ff": 16}


def fields_of(config: ModelArchitectureConfig) -> dict[str, Any]:
    return complete(
        config.to_dict(), key_heads=config.key_heads, head_size=config.head_size, ffn_width=config.ffn_width
    )


def tiny_fields(**changes: object) -> dict[str, Any]:
    return fields_of(tiny_config(**changes))


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_has_the_family_that_it_is_named_after(name: str):
    family = {"qwen3": "Qwen3", "gpt2": "GPT-2", "llama": "Llama", "sft": "Llama"}[name.partition("-")[0]]
    expression = expressed(fields_of(PRESETS[name]))
    assert (expression.family.name, expression.notes) == (family, [])


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "Qwen3"),
        ({"qkv_bias": True, "attention_output_bias": True}, "Qwen3"),
        ({"sliding_window": 9, "sliding_layers": (1,)}, "Qwen3"),
        (EXPERTS, "Qwen3-MoE"),
        ({"qk_norm": False, "qkv_bias": True}, "Qwen2"),
        ({"qk_norm": False}, "Llama"),
        ({"qk_norm": False, "bias": True}, "Llama"),
        ({"qk_norm": False, "ffn_bias": True}, "Llama"),
        ({"qk_norm": False, "head_dim": 16}, "Llama"),
        ({"qk_norm": False, "sliding_window": 9}, "Mistral"),
        ({"qk_norm": False, "n_head": 6, "num_key_value_heads": 3, "head_dim": 8}, "Mistral"),
        ({**GPT2, "bias": True}, "GPT-2"),
    ],
)
def test_the_first_family_with_the_very_tensors_is_taken(changes: dict, family: str):
    expression = expressed(tiny_fields(**changes))
    assert (expression.family.name, expression.notes) == (family, [])
    assert meaning(expression.fields) == meaning(tiny_fields(**changes))


@pytest.mark.parametrize(
    ("changes", "family", "added"),
    [
        ({**GPT2, "bias": False}, "GPT-2", "qkv, attention_output, ffn"),
        ({"attention_output_bias": True}, "Qwen3", "qkv"),
        ({"qk_norm": False, "sliding_window": 9, "sliding_layers": (1,)}, "Qwen2", "qkv"),
        ({"qk_norm": False, "qkv_bias": True, "head_dim": 16}, "Llama", "attention_output"),
    ],
)
def test_biases_of_0_are_added_where_no_family_does_without(changes: dict, family: str, added: str):
    expression = expressed(tiny_fields(**changes))
    assert expression.family.name == family
    assert expression.notes == [f"biases of 0 are added ({added}), which this family cannot leave out"]
    for name in added.split(", "):
        assert expression.fields[f"{name}_bias"]


def test_what_no_family_computes_is_refused_with_all_reasons_and_the_nearest_first():
    with pytest.raises(UserError) as caught:
        expressed(tiny_fields(norm_position="post", qk_norm=False, sliding_window=9))
    headline, first, *others = str(caught.value).splitlines()
    assert headline == "no model class of Transformers computes what this architecture does:"
    norms = "norms stand before attention and feed-forward part, not after"
    assert first == f"  Qwen2: {norms}"
    assert f"  Qwen3: {norms}; has a norm of queries and keys" in others
    assert f"  Llama: {norms}; has no sliding window" in others
    assert len(others) == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalization": "layernorm"}, "Qwen3: norms are rmsnorm, not layernorm"),
        ({"ffn_type": "standard"}, "Qwen3: the feed-forward part is swiglu, not standard"),
        ({"position_encoding": "none"}, "Qwen3: positions are rotary, not none"),
        ({"ffn_bias": True}, "Qwen3: has no biases or biases of q, k, v and attention output, and the model biases of"),
        ({**GPT2, "num_key_value_heads": 2}, "GPT-2: each query head has a key head of its own"),
        ({**GPT2, "head_dim": 16}, "GPT-2: head_dim must be n_embd / n_head = 8, not 16"),
        (
            {**GPT2, "activation": "leaky_relu"},
            "GPT-2: the activation is one of gelu, gelu_tanh, silu, relu, not leaky",
        ),
        ({**EXPERTS, "qk_norm": False}, "Qwen3-MoE: has a norm of queries and keys"),
        ({**EXPERTS, "sliding_window": 9, "sliding_layers": (1,)}, "Qwen3-MoE: all blocks have the sliding window"),
    ],
)
def test_each_obstacle_is_named(changes: dict, said: str):
    with pytest.raises(UserError) as caught:
        expressed(tiny_fields(**changes))
    assert said in str(caught.value)


def test_a_config_tells_the_same_to_older_and_newer_readers():
    scaling = {"rope_type": "linear", "factor": 2.0}
    expression = expressed(tiny_fields(sliding_window=9, sliding_layers=(1,), rope_scaling=scaling))
    config = config_json(expression, dtype="bfloat16", eos_id=2, pad_id=0)
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, scaling)
    assert config["layer_types"] == ["full_attention", "sliding_attention"]
    assert (config["use_sliding_window"], config["sliding_window"], config["max_window_layers"]) == (True, 9, 1)
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (2, 0, None)


@pytest.mark.oracle
def test_published_and_recorded_models_go_out_as_they_came_in(shared: Path):
    folders = [path.parent for path in (shared / "oracles").glob("**/config.json")]
    assert len(folders) >= 10
    for folder in folders:
        published = read_config(folder)
        fields = fields_of(ModelArchitectureConfig.from_dict(architecture_fields(published)))
        expression = expressed(fields)
        assert (expression.family.model_type, expression.notes) == (published["model_type"], []), folder
        config = config_json(expression, dtype="float32", eos_id=None, pad_id=None)
        assert meaning(fields_of(ModelArchitectureConfig.from_dict(architecture_fields(config)))) == meaning(fields)
        told = set(config) & set(published) - {"bos_token_id", "eos_token_id", "max_window_layers", "use_cache"}
        assert {name: config[name] for name in told - ROTATION} == {name: published[name] for name in told - ROTATION}


def test_architectures_mean_the_same_exactly_if_they_compute_the_same():
    assert meaning(tiny_fields(sliding_window=9)) == meaning(tiny_fields(sliding_window=9, sliding_layers=(0, 1)))
    assert meaning(tiny_fields(sliding_window=9, sliding_layers=())) == meaning(tiny_fields())
    assert meaning(tiny_fields(activation="relu", dropout=0.5)) == meaning(tiny_fields())
    assert meaning(tiny_fields(norm_eps=1e-5)) != meaning(tiny_fields())
    assert meaning(tiny_fields(rope_theta=1e6)) != meaning(tiny_fields())
    assert meaning(tiny_fields(**GPT2, rope_theta=1e6)) == meaning(tiny_fields(**GPT2))
