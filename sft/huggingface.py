"""Hugging Face's folders: their config and tensor names against ours, as plain dicts and tensors, both ways."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sft.errors import UserError, listed
from sft.safetensors_header import read_header
from sft.untrusted import MEBIBYTE, is_plain_name, leads_out, read_json

LARGEST_JSON = 16 * MEBIBYTE  # of config.json and the index; the largest published index has 9
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
        yield f"model_type is {reprlib.repr(kind)}; only 'qwen3' (dense) is known"
        return
    sizes = ("num_hidden_layers", "num_attention_heads", "hidden_size", "num_key_value_heads", "intermediate_size")
    for name in (*sizes, "vocab_size", "max_position_embeddings", "head_dim"):
        value = config.get(name, 128 if name == "head_dim" else None)
        if type(value) is not int:
            yield f"{name} must be a whole number, not {reprlib.repr(value)}"
    for name, supported in (("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False)):
        value = config.get(name, supported)
        if value != supported or type(value) is not type(supported):
            yield f"{name} {reprlib.repr(value)} is not supported, only {supported!r}"
    layers = config.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(layer != "full_attention" for layer in layers)):
        yield f"layer_types {reprlib.repr(layers)} are not supported, only 'full_attention'"
    elif layers is not None and len(layers) != config.get("num_hidden_layers"):
        yield f"layer_types has {len(layers)} entries, not one for each of num_hidden_layers"
    yield from _unsupported_rotation(config)


def _unsupported_rotation(config: Mapping[str, Any]) -> Iterator[str]:
    for name, read in (("rope_scaling", {"rope_type", "type"}), ("rope_parameters", {"rope_type", "rope_theta"})):
        rope = config.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            yield f"{name} {reprlib.repr(rope)} is not supported, only the default rotation"
        elif unread := sorted(rope.keys() - read):
            yield f"{name} has {', '.join(unread)}, which is not supported; only {' and '.join(sorted(read))} are"
        elif "rope_theta" in config and rope.get("rope_theta", config["rope_theta"]) != config["rope_theta"]:
            yield f"rope_theta is {reprlib.repr(config['rope_theta'])}, {name} has another, {rope['rope_theta']!r}"


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file, not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # the file's own word where it is none of FLOATS
    name: str
    file: Path

    def read(self) -> Tensor:
        """The tensor, mapped from its file, which stays mapped only as long as the tensor lives."""
        try:
            with safe_open(self.file, framework="pt") as opened:
                tensor = opened.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.file}: cannot be read any more ({error}); was it changed?") from error
        assert (tuple(tensor.shape), tensor.dtype) == (self.shape, self.dtype), self
        return tensor


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    return _read_object(folder / "config.json")


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of model.safetensors, or of the shards that model.safetensors.index.json lists, by name.

    UserError for a file that is damaged, that lies elsewhere, or whose tensors are not those that the index tells.
    """
    tensors = {}
    for file, told in _weight_files(folder).items():
        if leads_out(folder, file):
            raise UserError(f"{file}: leads to {file.resolve()}, out of its folder; put the file itself there")
        entries = read_header(file)
        if told is not None and told != entries.keys():
            raise listed(f"{file}: does not hold what the index says; fetch both again:", _differences(told, entries))
        for name, entry in entries.items():
            tensors[name] = StoredTensor(entry.shape, FLOATS.get(entry.dtype, entry.dtype), name, file)
    return tensors


def _differences(told: Collection[str], held: Collection[str]) -> list[str]:
    missing, unexpected = sorted(set(told) - set(held)), sorted(set(held) - set(told))
    return [
        f"{len(names)} {what}, as {reprlib.repr(names[0])}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files with weights and the names of the tensors in each; None = no index tells them."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise UserError(f"{folder}: holds neither {single.name} nor {index.name}; other formats are not read")
        return {single: None}
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: 'weight_map' must map each tensor's name to a file's")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    if odd := sorted(name for name in shards if not is_plain_name(name) or not name.endswith(".safetensors")):
        raise UserError(f"{index}: names {reprlib.repr(odd[0])}, which is no *.safetensors file beside it")
    if single.is_file() and single.name not in shards:
        raise UserError(f"{folder}: holds {single.name} and {index.name}, which is of other files; remove the old ones")
    files = {folder / name: names for name, names in sorted(shards.items())}
    if missing := [file.name for file in files if not file.is_file()]:
        raise listed(f"{folder}: {len(missing)} of {len(files)} shards are missing:", missing)
    return dict(files)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, most=LARGEST_JSON)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not an object")
    return content
