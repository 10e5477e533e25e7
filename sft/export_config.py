"""Which of Hugging Face's families computes what one of our architectures does, and its config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sft.errors import listed

# Fields are those of ModelArchitectureConfig with nothing left to be derived: complete() fills in what None stands for.
Fields = Mapping[str, Any]

BIASES = ("qkv_bias", "attention_output_bias", "ffn_bias")
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu", "relu": "relu"}


def complete(fields: Fields, *, key_heads: int, head_size: int, ffn_width: int) -> dict[str, Any]:
    """The architecture fields with their derived sizes and each bias told."""
    sizes = {"num_key_value_heads": key_heads, "head_dim": head_size, "d_ff": ffn_width}
    biases = {name: fields["bias"] if fields.get(name) is None else fields[name] for name in BIASES}
    return {**fields, **sizes, **biases}


@dataclass(frozen=True)
class Family:
    """A model class of Transformers: what it cannot compute, where it has biases, and what its config.json says."""

    name: str  # as people call it
    model_type: str
    architecture: str
    obstacles: Callable[[Fields], Iterator[str]]
    biases: tuple[tuple[bool, bool, bool], ...]  # the combinations that it knows, in the order of BIASES
    config: Callable[[Fields], dict[str, Any]]


@dataclass(frozen=True)
class Expression:
    """An architecture as a family computes it: the same function, with other fields where there are notes."""

    family: Family
    fields: dict[str, Any]
    notes: list[str] = field(default_factory=list)  # what was done to the tensors


def expressed(fields: Fields) -> Expression:
    """The architecture in the first family that computes exactly this.

    A family that has the very biases goes first, then one where biases of 0 can be added. UserError with what is in
    the way of each family, the nearest first.
    """
    obstacles = {family.name: list(family.obstacles(fields)) for family in FAMILIES}
    able = [family for family in FAMILIES if not obstacles[family.name]]
    has = tuple(fields[name] for name in BIASES)
    found = [(sum(biases), i, family, biases) for i, family in enumerate(able) for biases in family.biases]
    covering = [each for each in found if all(b or not a for a, b in zip(has, each[3], strict=True))]
    if not covering:
        for family in able:
            known = " or ".join(_told(biases) for biases in family.biases)
            obstacles[family.name] = [f"has {known}, and the model {_told(has)}"]
        nearest = sorted(FAMILIES, key=lambda family: len(obstacles[family.name]))
        reasons = [f"{family.name}: {'; '.join(obstacles[family.name])}" for family in nearest]
        raise listed("no model class of Transformers computes what this architecture does:", reasons)
    _, _, family, biases = min(covering, key=lambda each: (each[3] != has, each[:2]))
    expression = Expression(family, {**fields, **dict(zip(BIASES, biases, strict=True))})
    _adapt(expression, fields)
    return expression


def _adapt(expression: Expression, fields: Fields) -> None:
    """Tell what else changes on the way, in the new fields and in words."""
    new, notes = expression.fields, expression.notes
    if added := [name.removesuffix("_bias") for name in BIASES if new[name] and not fields[name]]:
        notes.append(f"biases of 0 are added ({', '.join(added)}), which this family cannot leave out")
    if fields["normalization"] == "layernorm_nobias":
        new["normalization"] = "layernorm"
        notes.append("biases of 0 are added to the norms, which this family cannot leave out")
    if fields["position_encoding"] == "rope" and fields["rope_layout"] == "interleaved":
        new["rope_layout"] = "half"
        notes.append("rows of queries and keys are in another order: rotary pairs were neighbours")
    new["bias"] = new["ffn_bias"]


def config_json(expression: Expression, *, dtype: str, eos_id: int | None, pad_id: int | None) -> dict[str, Any]:
    """The content of config.json, as published models have it: Transformers reads it from 4.5x on, and so does vLLM."""
    family, fields = expression.family, expression.fields
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.config(fields),
        "vocab_size": fields["vocab_size"],
        "tie_word_embeddings": fields["weight_tying"],
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _told(biases: tuple[bool, ...]) -> str:
    parts = [what for what, there in zip(("q, k, v", "attention output", "feed-forward"), biases, strict=True) if there]
    return f"biases of {' and '.join(parts)}" if parts else "no biases"


def _common(fields: Fields) -> Iterator[str]:
    if fields["norm_position"] != "pre":
        yield "norms stand before attention and feed-forward part, not after"


def _decoder(fields: Fields) -> Iterator[str]:
    """What all of Qwen, Llama and Mistral lack."""
    yield from _common(fields)
    if fields["normalization"] != "rmsnorm":
        yield f"norms are rmsnorm, not {fields['normalization']}"
    if fields["ffn_type"] != "swiglu":
        yield f"the feed-forward part is swiglu, not {fields['ffn_type']}"
    if fields["position_encoding"] != "rope":
        yield f"positions are rotary, not {fields['position_encoding']}"


def _dense(fields: Fields) -> Iterator[str]:
    if fields.get("num_experts") is not None:
        yield "has no experts"


def _without_qk_norm(fields: Fields) -> Iterator[str]:
    if fields["qk_norm"]:
        yield "has no norm of queries and keys"


def _whole_heads(fields: Fields, *, exact: bool) -> Iterator[str]:
    width, heads, size = fields["n_embd"], fields["n_head"], fields["head_dim"]
    if width % heads:
        yield f"n_embd {width} must be a multiple of n_head {heads}"
    elif exact and size != width // heads:
        yield f"head_dim must be n_embd / n_head = {width // heads}, not {size}"


def _one_window(fields: Fields) -> Iterator[str]:
    """A family whose blocks all have the window, or none."""
    if windows(fields) and len(windows(fields)) < fields["n_layer"]:
        yield "all blocks have the sliding window, or none"


def _qwen3(fields: Fields) -> Iterator[str]:
    yield from (*_decoder(fields), *_dense(fields))
    if not fields["qk_norm"]:
        yield "has a norm of queries and keys"


def _qwen3_moe(fields: Fields) -> Iterator[str]:
    yield from (*_decoder(fields), *_one_window(fields))
    if fields.get("num_experts") is None:
        yield "has experts"
    if not fields["qk_norm"]:
        yield "has a norm of queries and keys"


def _qwen2(fields: Fields) -> Iterator[str]:
    yield from (*_decoder(fields), *_dense(fields), *_without_qk_norm(fields), *_whole_heads(fields, exact=True))


def _llama(fields: Fields) -> Iterator[str]:
    yield from (*_decoder(fields), *_dense(fields), *_without_qk_norm(fields), *_whole_heads(fields, exact=False))
    if windows(fields):
        yield "has no sliding window"


def _mistral(fields: Fields) -> Iterator[str]:
    yield from (*_decoder(fields), *_dense(fields), *_without_qk_norm(fields), *_one_window(fields))


def _gpt2(fields: Fields) -> Iterator[str]:
    yield from (*_common(fields), *_dense(fields), *_without_qk_norm(fields), *_whole_heads(fields, exact=True))
    if not fields["normalization"].startswith("layernorm"):
        yield f"norms are layernorm, not {fields['normalization']}"
    if fields["ffn_type"] != "standard":
        yield f"the feed-forward part is standard, not {fields['ffn_type']}"
    elif fields["activation"] not in ACTIVATIONS:
        yield f"the activation is one of {', '.join(ACTIVATIONS)}, not {fields['activation']}"
    if fields["position_encoding"] != "learned_absolute":
        yield f"positions are learned, not {fields['position_encoding']}"
    if fields["num_key_value_heads"] != fields["n_head"]:
        yield "each query head has a key head of its own"
    if windows(fields):
        yield "has no sliding window"


def windows(fields: Fields) -> list[int]:
    """The blocks that have the sliding window."""
    if fields.get("sliding_window") is None:
        return []
    blocks = fields.get("sliding_layers")
    return list(range(fields["n_layer"])) if blocks is None else sorted(blocks)


def _decoder_config(fields: Fields) -> dict[str, Any]:
    return {
        "hidden_size": fields["n_embd"],
        "num_hidden_layers": fields["n_layer"],
        "num_attention_heads": fields["n_head"],
        "num_key_value_heads": fields["num_key_value_heads"],
        "head_dim": fields["head_dim"],
        "intermediate_size": fields["d_ff"],
        "hidden_act": "silu",
        "max_position_embeddings": fields["block_size"],
        "rms_norm_eps": fields["norm_eps"],
        "rope_theta": fields["rope_theta"],
        "rope_scaling": fields.get("rope_scaling"),
        "attention_dropout": 0.0,
    }


def _qwen_config(fields: Fields) -> dict[str, Any]:
    """Windows as Transformers reads them, and max_window_layers for those who do not know layer_types."""
    blocks, layers = windows(fields), fields["n_layer"]
    first = min(blocks, default=layers)
    return {
        **_decoder_config(fields),
        "use_sliding_window": bool(blocks),
        "sliding_window": fields["sliding_window"] if blocks else None,
        "max_window_layers": first if blocks == list(range(first, layers)) else layers,
    }


def _layer_types(fields: Fields) -> dict[str, Any]:
    blocks = windows(fields)
    types = ["sliding_attention" if i in blocks else "full_attention" for i in range(fields["n_layer"])]
    return {"layer_types": types} if blocks else {}


def _qwen3_config(fields: Fields) -> dict[str, Any]:
    return {**_qwen_config(fields), **_layer_types(fields), "attention_bias": fields["qkv_bias"]}


def _qwen2_config(fields: Fields) -> dict[str, Any]:
    config = {**_qwen_config(fields), **_layer_types(fields)}
    del config["head_dim"]  # which is derived, and not looked for by everybody
    return config


def _qwen3_moe_config(fields: Fields) -> dict[str, Any]:
    return {
        **_qwen_config(fields),
        "attention_bias": fields["qkv_bias"],
        "num_experts": fields["num_experts"],
        "num_experts_per_tok": fields["num_experts_per_tok"],
        "moe_intermediate_size": fields["expert_d_ff"],
        "norm_topk_prob": fields["norm_topk_prob"],
        # Servers have no use for the router's logits; without a coefficient of its own, training has the usual one.
        **({"router_aux_loss_coef": coefficient} if (coefficient := fields["router_aux_loss_coef"]) else {}),
        "output_router_logits": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(fields["dense_layers"]),
    }


def _llama_config(fields: Fields) -> dict[str, Any]:
    return {**_decoder_config(fields), "attention_bias": fields["qkv_bias"], "mlp_bias": fields["ffn_bias"]}


def _mistral_config(fields: Fields) -> dict[str, Any]:
    return {**_decoder_config(fields), "sliding_window": fields["sliding_window"] if windows(fields) else None}


def _gpt2_config(fields: Fields) -> dict[str, Any]:
    return {
        "n_embd": fields["n_embd"],
        "n_layer": fields["n_layer"],
        "n_head": fields["n_head"],
        "n_positions": fields["block_size"],
        "n_inner": fields["d_ff"],
        "activation_function": ACTIVATIONS[fields["activation"]],
        "layer_norm_epsilon": fields["norm_eps"],
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


NO_BIAS, ATTENTION, QKV, ALL = (False, False, False), (True, True, False), (True, False, False), (True, True, True)
FAMILIES = (
    Family("Qwen3", "qwen3", "Qwen3ForCausalLM", _qwen3, (NO_BIAS, ATTENTION), _qwen3_config),
    Family("Qwen3-MoE", "qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe, (NO_BIAS, ATTENTION), _qwen3_moe_config),
    Family("Qwen2", "qwen2", "Qwen2ForCausalLM", _qwen2, (QKV,), _qwen2_config),
    Family(
        "Llama", "llama", "LlamaForCausalLM", _llama, (NO_BIAS, ATTENTION, (False, False, True), ALL), _llama_config
    ),
    Family("Mistral", "mistral", "MistralForCausalLM", _mistral, (NO_BIAS,), _mistral_config),
    Family("GPT-2", "gpt2", "GPT2LMHeadModel", _gpt2, (ALL,), _gpt2_config),
)


def meaning(fields: Fields) -> dict[str, Any]:
    """Of complete fields what decides the result, in one form for all that compute the same."""
    trained_with = ("bias", "dropout", "attention_dropout", "residual_dropout", "router_aux_loss_coef")
    told = {name: value for name, value in fields.items() if name not in trained_with}
    told["sliding_layers"] = windows(fields)
    told["sliding_window"] = fields["sliding_window"] if windows(fields) else None
    if fields["ffn_type"] == "swiglu":
        told["activation"] = "silu"
    if fields["position_encoding"] != "rope":
        for name in ("rope_theta", "rope_layout", "rope_scaling"):
            told.pop(name, None)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
