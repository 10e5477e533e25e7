"""What a published config.json says, as our architecture fields: Qwen3, Qwen3-MoE, Qwen2, Llama, Mistral and GPT-2.

Both styles are read, the one of the published models and the one that Transformers 5 writes. What a config leaves out
has the value that Transformers gives it, except for sizes, which must be there.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sft.errors import listed
from sft.rotary import scaling_problems

Config = Mapping[str, Any]

LLAMA_LIKE = ("qwen3", "qwen3_moe", "qwen2", "llama", "mistral")
FAMILIES = (*LLAMA_LIKE, "gpt2")
GPT2_ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
    **{"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"},
}
# Left out, or null, in a config.json: as in Transformers. None = as many as query heads; n_embd / n_head.
KEY_HEADS = {"qwen3": 32, "qwen3_moe": 4, "qwen2": 32, "llama": None, "mistral": 8}
HEAD_SIZE = {"qwen3": 128}
SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size")
SIZES_OF_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
GPT2_SIZES = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
# What changes the numbers and is not computed here; the value that is.
ONLY: dict[str, dict[str, Any]] = {
    **{kind: {"hidden_act": "silu", "partial_rotary_factor": 1.0} for kind in LLAMA_LIKE},
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
}
FULL, SLIDING = "full_attention", "sliding_attention"


def architecture_fields(config: Config) -> dict[str, Any]:
    """Our architecture fields for a config.json. UserError with everything that this project cannot compute."""
    config = {**config, "num_experts": config.get("num_experts", config.get("num_local_experts"))}
    if problems := list(_unsupported(config)):
        raise listed("this model cannot be built here:", problems)
    return _gpt2(config) if config["model_type"] == "gpt2" else _llama_like(config)


def _llama_like(config: Config) -> dict[str, Any]:
    kind = config["model_type"]
    bias = kind in ("qwen3", "qwen3_moe", "llama") and config.get("attention_bias", False)
    theta, scaling = _rotation(config)
    return {
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_embd": config["hidden_size"],
        "num_key_value_heads": _key_heads(config),
        "head_dim": _head_size(config),
        "d_ff": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "block_size": config["max_position_embeddings"],
        "normalization": "rmsnorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "norm_position": "pre",
        "activation": "silu",
        "ffn_type": "swiglu",
        "position_encoding": "rope",
        "rope_theta": theta,
        "rope_layout": "half",
        "rope_scaling": scaling,
        **_windows(config),
        **(_experts(config) if kind == "qwen3_moe" else {}),
        "qk_norm": kind in ("qwen3", "qwen3_moe"),
        "bias": False,
        "qkv_bias": kind == "qwen2" or bias or None,
        "attention_output_bias": bias or None,
        "ffn_bias": (kind == "llama" and config.get("mlp_bias", False)) or None,
        "weight_tying": config.get("tie_word_embeddings", False),
    }


def _experts(config: Config) -> dict[str, Any]:
    """The load-balancing loss is weighted as Transformers does in training: only where the router's logits are asked
    for."""
    step, layers = config.get("decoder_sparse_step", 1), config["num_hidden_layers"]
    dense = set(config.get("mlp_only_layers") or ()) | {i for i in range(layers) if (i + 1) % step}
    return {
        "num_experts": config["num_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "expert_d_ff": config["moe_intermediate_size"],
        "norm_topk_prob": config.get("norm_topk_prob", False),
        "dense_layers": tuple(sorted(dense)),
        "router_aux_loss_coef": (
            config.get("router_aux_loss_coef", 0.001) if config.get("output_router_logits", False) else 0.0
        ),
    }


def _gpt2(config: Config) -> dict[str, Any]:
    return {
        **{name: config[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")},
        "d_ff": config.get("n_inner") or 4 * config["n_embd"],
        "block_size": config["n_positions"],
        "normalization": "layernorm",
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "norm_position": "pre",
        "activation": GPT2_ACTIVATIONS[config.get("activation_function", "gelu_new")],
        "ffn_type": "standard",
        "position_encoding": "learned_absolute",
        "qk_norm": False,
        "bias": True,
        "weight_tying": config.get("tie_word_embeddings", True),
    }


def _key_heads(config: Config) -> int:
    given = config.get("num_key_value_heads", KEY_HEADS[config["model_type"]])
    return config["num_attention_heads"] if given is None else given


def _head_size(config: Config) -> int:
    given = config.get("head_dim")
    usual = HEAD_SIZE.get(config["model_type"]) if "head_dim" not in config else None
    return given or usual or config["hidden_size"] // config["num_attention_heads"]


def _rotation(config: Config) -> tuple[float, dict[str, Any] | None]:
    """The base of the wavelengths, and how they are stretched."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind, other = rope.pop("rope_type", None), rope.pop("type", None)
    rope.pop("partial_rotary_factor", None)
    scaling = {
        "rope_type": kind or other or "default",
        **{name: value for name, value in rope.items() if value is not None},
    }
    if scaling["rope_type"] == "default":
        return theta, None
    if scaling["rope_type"] in ("llama3", "yarn"):
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    if scaling["rope_type"] == "yarn":
        scaling.setdefault("factor", config["max_position_embeddings"] / scaling["original_max_position_embeddings"])
    return theta, scaling


def _windows(config: Config) -> dict[str, Any]:
    """The sliding window, and the blocks that have it."""
    kind, none = config["model_type"], {"sliding_window": None, "sliding_layers": None}
    if kind == "llama" or (kind != "mistral" and not config.get("use_sliding_window", False)):
        return none
    window = config.get("sliding_window", 4096)
    if window is None or kind in ("mistral", "qwen3_moe"):
        return {"sliding_window": window, "sliding_layers": None}
    layers = range(config["num_hidden_layers"])
    kinds = config.get("layer_types")
    if kinds is None:
        sliding = [i for i in layers if i >= config.get("max_window_layers", 28)]
    else:
        sliding = [i for i in layers if kinds[i] == SLIDING]
    return {"sliding_window": window, "sliding_layers": tuple(sliding)} if sliding else none


def _unsupported(config: Config) -> Iterator[str]:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        yield f"model_type is {reprlib.repr(kind)}; known are {', '.join(FAMILIES)}"
        return
    if config.get("quantization_config") is not None:
        yield "its weights are quantized (quantization_config); fetch the model that they were made from"
    sizes = GPT2_SIZES if kind == "gpt2" else (*SIZES, "max_position_embeddings")
    for name in (*sizes, *(SIZES_OF_EXPERTS if kind == "qwen3_moe" else ())):
        if not _is_size(config.get(name)):
            yield f"{name} must be a whole number above 0, not {reprlib.repr(config.get(name))}"
    for name in ("num_key_value_heads", "head_dim", "n_inner", "sliding_window", "decoder_sparse_step"):
        needed = name == "head_dim" and kind in HEAD_SIZE  # whose null Transformers refuses, too
        if name in config and not _is_size(config[name]) and (needed or config[name] is not None):
            yield f"{name} must be a whole number above 0, not {reprlib.repr(config[name])}"
    for name in ("attention_bias", "mlp_bias", "use_sliding_window", "tie_word_embeddings", "norm_topk_prob"):
        if not isinstance(config.get(name, False), bool):
            yield f"{name} must be true or false, not {reprlib.repr(config[name])}"
    for name, supported in ONLY[kind].items():
        value = config.get(name, supported)
        if value != supported or type(value) is not type(supported):
            yield f"{name} {reprlib.repr(value)} is not supported, only {supported!r}"
    if kind == "gpt2":
        if (name := config.get("activation_function", "gelu_new")) not in GPT2_ACTIVATIONS:
            yield f"activation_function {reprlib.repr(name)} is not supported, only {', '.join(GPT2_ACTIVATIONS)}"
        return
    yield from _unsupported_layers(config)
    yield from _unsupported_rotation(config)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _unsupported_layers(config: Config) -> Iterator[str]:
    kinds, count = config.get("layer_types"), config.get("num_hidden_layers")
    if kinds is not None:
        known = [FULL, SLIDING] if config.get("use_sliding_window", False) else [FULL]
        if config["model_type"] == "mistral":
            known = [FULL if config.get("sliding_window", 4096) is None else SLIDING]
        if not isinstance(kinds, list) or any(each not in known for each in kinds):
            yield f"layer_types {reprlib.repr(kinds)} are not supported, only {' and '.join(map(repr, known))}"
        elif len(kinds) != count:
            yield f"layer_types has {len(kinds)} entries, not one for each of num_hidden_layers"
    if type(config.get("max_window_layers", 0)) is not int:
        yield f"max_window_layers must be a whole number, not {reprlib.repr(config['max_window_layers'])}"
    if (other := config.get("num_local_experts")) is not None and other != config["num_experts"]:
        yield f"num_experts is {reprlib.repr(config['num_experts'])}, num_local_experts {reprlib.repr(other)}"
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, Sequence) or not all(type(each) is int for each in dense):
        yield f"mlp_only_layers must be numbers of blocks, not {reprlib.repr(dense)}"


def _unsupported_rotation(config: Config) -> Iterator[str]:
    given = [name for name in ("rope_scaling", "rope_parameters") if config.get(name) is not None]
    problems = [problem for name in given for problem in _unsupported_rope(config, name)]
    if not problems and len({repr(_rotation({**config, **_without(given, name)})) for name in given}) > 1:
        problems.append("rope_scaling and rope_parameters say different things; remove the one that is not meant")
    if not problems and _is_size(config.get("max_position_embeddings")):
        problems.extend(scaling_problems(_rotation(config)[1]))
    yield from problems


def _without(given: Sequence[str], name: str) -> dict[str, None]:
    return {other: None for other in given if other != name}


def _unsupported_rope(config: Config, name: str) -> Iterator[str]:
    """What is wrong with rope_scaling or rope_parameters, before it is looked at what its kind needs."""
    rope = config[name]
    if not isinstance(rope, dict):
        yield f"{name} {reprlib.repr(rope)} is not supported"
        return
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unread := sorted(key for key in rope.keys() - known if kind == "default" or isinstance(rope[key], dict | list)):
        yield f"{name} has {', '.join(unread)}, which is not supported"
    elif not isinstance(kind, str):
        yield f"{name} has the rope_type {reprlib.repr(kind)}, which is no name"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"{name} turns a part of each head only (partial_rotary_factor), which is not supported"
    elif "rope_theta" in config and rope.get("rope_theta", config["rope_theta"]) != config["rope_theta"]:
        yield f"rope_theta is {reprlib.repr(config['rope_theta'])}, {name} has another, {rope['rope_theta']!r}"
