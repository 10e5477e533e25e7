"""Hugging Face's folders: their config and tensor names against ours, as plain dicts and tensors, both ways."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sft.errors import UserError, listed

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Piece(NamedTuple):
    """One tensor as Hugging Face names and shapes it."""

    name: str
    shape: tuple[int, ...]


# Each of our tensors and the pieces that, stacked along their rows, make it. Every tensor of either side is in it once.
NameTable = dict[str, tuple[Piece, ...]]


def name_table(fields: Mapping[str, Any]) -> NameTable:
    """The tensors of a Qwen3 dense model with these architecture fields; a tied head is no tensor of its own."""
    D, F, C, V = fields["n_embd"], fields["d_ff"], fields["head_dim"], fields["vocab_size"]
    query_rows, key_rows = fields["n_head"] * C, fields["num_key_value_heads"] * C
    table: NameTable = {"token_embeddings.weight": (Piece("model.embed_tokens.weight", (V, D)),)}
    for i in range(fields["n_layer"]):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        q, k, v = (
            Piece(f"{theirs}self_attn.{letter}_proj.weight", (rows, D))
            for letter, rows in (("q", query_rows), ("k", key_rows), ("v", key_rows))
        )
        if query_rows == key_rows:
            table[f"{ours}attn.c_attn.weight"] = (q, k, v)
        else:
            table[f"{ours}attn.c_q.weight"] = (q,)
            table[f"{ours}attn.c_kv.weight"] = (k, v)
        for our_name, their_name, shape in (
            ("norm1", "input_layernorm", (D,)),
            ("attn.q_norm", "self_attn.q_norm", (C,)),
            ("attn.k_norm", "self_attn.k_norm", (C,)),
            ("attn.c_proj", "self_attn.o_proj", (D, query_rows)),
            ("norm2", "post_attention_layernorm", (D,)),
            ("ffn.w_gate", "mlp.gate_proj", (F, D)),
            ("ffn.w_value", "mlp.up_proj", (F, D)),
            ("ffn.w_out", "mlp.down_proj", (D, F)),
        ):
            table[f"{ours}{our_name}.weight"] = (Piece(f"{theirs}{their_name}.weight", shape),)
    table["final_norm.weight"] = (Piece("model.norm.weight", (D,)),)
    if not fields["weight_tying"]:
        table["lm_head.weight"] = (Piece("lm_head.weight", (V, D)),)
    return table


def to_hugging_face(weights: Mapping[str, Tensor], table: NameTable) -> dict[str, Tensor]:
    """Our tensors under their names, fused ones cut into views of their pieces; the table must know every one."""
    unknown = [name for name in weights if name not in table]
    assert not unknown, f"no Hugging Face name for {unknown}"
    theirs = {}
    for ours, pieces in table.items():
        for piece, tensor in zip(pieces, weights[ours].split([piece.shape[0] for piece in pieces]), strict=True):
            theirs[piece.name] = tensor
    return theirs


def architecture_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our architecture fields for a config.json, in the published style or as Transformers 5 writes it.

    What a config leaves out has the value that Transformers gives it. Raises UserError with everything that this
    project cannot compute.
    """
    if problems := list(_unsupported(config)):
        raise listed("this model cannot be built here:", problems)
    rope = config.get("rope_parameters") or {}
    return {
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_embd": config["hidden_size"],
        "num_key_value_heads": config["num_key_value_heads"],
        "head_dim": config.get("head_dim", 128),
        "d_ff": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "block_size": config["max_position_embeddings"],
        "normalization": "rmsnorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "norm_position": "pre",
        "activation": "silu",
        "ffn_type": "swiglu",
        "position_encoding": "rope",
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        "rope_layout": "half",
        "qk_norm": True,
        "bias": False,
        "weight_tying": config.get("tie_word_embeddings", False),
    }


def _unsupported(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("model_type")
    if kind != "qwen3":
        yield f"model_type is {kind!r}; only 'qwen3' (dense) is known"
        return
    sizes = ("num_hidden_layers", "num_attention_heads", "hidden_size", "num_key_value_heads", "intermediate_size")
    for name in (*sizes, "vocab_size", "max_position_embeddings"):
        if not isinstance(config.get(name), int):
            yield f"{name} must be a whole number, not {config.get(name)!r}"
    if not isinstance(config.get("head_dim", 128), int):
        yield f"head_dim must be a whole number, not {config['head_dim']!r}"
    for name, supported in (("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False)):
        if config.get(name, supported) != supported:
            yield f"{name} {config[name]!r} is not supported, only {supported!r}"
    layers = config.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        yield f"layer_types {reprlib.repr(layers)} are not supported, only 'full_attention'"
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name) or {}
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            yield f"{name} {rope} is not supported, only the default rotation"
        elif unread := sorted(rope.keys() - {"rope_type", "type", "rope_theta"}):
            yield f"{name} has {', '.join(unread)}, which is not supported; only rope_type and rope_theta are"


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file, not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # the file's own word where it is none of FLOATS
    name: str
    file: Path

    def read(self) -> Tensor:
        """The tensor, mapped from its file, which stays mapped only as long as the tensor lives."""
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(self.name)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    return _read_json(folder / "config.json")


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of model.safetensors, or of the shards that model.safetensors.index.json lists, by name."""
    tensors = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping: it has keys() and no iteration)
                    view = opened.get_slice(name)
                    dtype = FLOATS.get(view.get_dtype(), view.get_dtype())
                    tensors[name] = StoredTensor(tuple(view.get_shape()), dtype, name, file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged or cut short ({error}); fetch it again") from error
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise UserError(f"{folder}: holds neither model.safetensors nor {index.name}; other formats are not read")
        return [single]
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: 'weight_map' must map each tensor's name to a file's")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise listed(f"{folder}: {len(missing)} of {len(files)} shards are missing:", missing)
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not an object")
    return content
