"""Hugging Face's folders: their files, and their tensors' names against ours, both ways."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    transposed: bool = False  # its rows are our columns

    @property
    def rows(self) -> int:
        """The rows that it fills of ours."""
        return self.shape[1] if self.transposed else self.shape[0]


# Each of our tensors and the pieces that, stacked along their rows, make it; experts are stacked in the same way. Every
# tensor of either side is in it once.
NameTable = dict[str, tuple[Piece, ...]]


def name_table(fields: Mapping[str, Any]) -> NameTable:
    """The tensors of a model with these architecture fields; a tied head is no tensor of its own.

    Learned positions make it GPT-2's, with its matrices transposed; everything else is named as in Llama and Qwen.
    """
    D, V = fields["n_embd"], fields["vocab_size"]
    gpt2 = fields["position_encoding"] == "learned_absolute"
    table: NameTable = {
        "token_embeddings.weight": (Piece("transformer.wte.weight" if gpt2 else "model.embed_tokens.weight", (V, D)),)
    }
    if gpt2:
        table["pos_encoding.wpe.weight"] = (Piece("transformer.wpe.weight", (fields["block_size"], D)),)
    for i in range(fields["n_layer"]):
        table |= _gpt2_block(fields, i) if gpt2 else {**_attention(fields, i), **_feed_forward(fields, i)}
    if gpt2:
        table |= {f"final_norm.{kind}": (Piece(f"transformer.ln_f.{kind}", (D,)),) for kind in ("weight", "bias")}
    else:
        table["final_norm.weight"] = (Piece("model.norm.weight", (D,)),)
    if not fields["weight_tying"]:
        table["lm_head.weight"] = (Piece("lm_head.weight", (V, D)),)
    return table


def _given(fields: Mapping[str, Any], name: str, usual: Any) -> Any:
    value = fields.get(name)
    return usual if value is None else value


def _attention(fields: Mapping[str, Any], i: int) -> NameTable:
    """Block i of a model in Llama's style: its attention and both of its norms."""
    D, H, bias = fields["n_embd"], fields["n_head"], fields.get("bias", False)
    C = _given(fields, "head_dim", D // H)
    rows = {"q": H * C, "k": _given(fields, "num_key_value_heads", H) * C}
    ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
    table: NameTable = {}
    for kind in ("weight", "bias") if _given(fields, "qkv_bias", bias) else ("weight",):
        q, k, v = (
            Piece(f"{theirs}self_attn.{letter}_proj.{kind}", (size, D) if kind == "weight" else (size,))
            for letter, size in (("q", rows["q"]), ("k", rows["k"]), ("v", rows["k"]))
        )
        if rows["q"] == rows["k"]:
            table[f"{ours}attn.c_attn.{kind}"] = (q, k, v)
        else:
            table[f"{ours}attn.c_q.{kind}"] = (q,)
            table[f"{ours}attn.c_kv.{kind}"] = (k, v)
    table[f"{ours}attn.c_proj.weight"] = (Piece(f"{theirs}self_attn.o_proj.weight", (D, rows["q"])),)
    if _given(fields, "attention_output_bias", bias):
        table[f"{ours}attn.c_proj.bias"] = (Piece(f"{theirs}self_attn.o_proj.bias", (D,)),)
    if fields.get("qk_norm", False):
        for letter in "qk":
            table[f"{ours}attn.{letter}_norm.weight"] = (Piece(f"{theirs}self_attn.{letter}_norm.weight", (C,)),)
    table[f"{ours}norm1.weight"] = (Piece(f"{theirs}input_layernorm.weight", (D,)),)
    table[f"{ours}norm2.weight"] = (Piece(f"{theirs}post_attention_layernorm.weight", (D,)),)
    return table


def _feed_forward(fields: Mapping[str, Any], i: int) -> NameTable:
    """The feed-forward part of block i in Llama's style, or its experts."""
    D, F = fields["n_embd"], _given(fields, "d_ff", 8 * fields["n_embd"] // 3)
    ours, theirs = f"blocks.{i}.ffn.", f"model.layers.{i}.mlp."
    pairs = (("w_gate", "gate_proj"), ("w_value", "up_proj"), ("w_out", "down_proj"))
    experts, table = fields.get("num_experts"), dict[str, tuple[Piece, ...]]()
    if experts is None or i in fields.get("dense_layers", ()):
        shapes = {"w_gate": (F, D), "w_value": (F, D), "w_out": (D, F)}
        table |= {f"{ours}{a}.weight": (Piece(f"{theirs}{b}.weight", shapes[a]),) for a, b in pairs}
        if _given(fields, "ffn_bias", fields.get("bias", False)):
            table |= {f"{ours}{a}.bias": (Piece(f"{theirs}{b}.bias", shapes[a][:1]),) for a, b in pairs}
        return table
    F = fields["expert_d_ff"]
    shapes = {"w_gate": (F, D), "w_value": (F, D), "w_out": (D, F)}
    table[f"{ours}router.weight"] = (Piece(f"{theirs}gate.weight", (experts, D)),)
    for a, b in pairs:
        table[ours + a] = tuple(Piece(f"{theirs}experts.{j}.{b}.weight", shapes[a]) for j in range(experts))
    return table


def _gpt2_block(fields: Mapping[str, Any], i: int) -> NameTable:
    """Block i of GPT-2, whose linear layers hold their matrices transposed."""
    D, F = fields["n_embd"], _given(fields, "d_ff", 4 * fields["n_embd"])
    ours, theirs = f"blocks.{i}.", f"transformer.h.{i}."
    table: NameTable = {}
    for a, b in (("norm1", "ln_1"), ("norm2", "ln_2")):
        table |= {f"{ours}{a}.{kind}": (Piece(f"{theirs}{b}.{kind}", (D,)),) for kind in ("weight", "bias")}
    for a, b, inputs, outputs in (
        ("attn.c_attn", "attn.c_attn", D, 3 * D),
        ("attn.c_proj", "attn.c_proj", D, D),
        ("ffn.fc1", "mlp.c_fc", D, F),
        ("ffn.fc2", "mlp.c_proj", F, D),
    ):
        table[f"{ours}{a}.weight"] = (Piece(f"{theirs}{b}.weight", (inputs, outputs), transposed=True),)
        table[f"{ours}{a}.bias"] = (Piece(f"{theirs}{b}.bias", (outputs,)),)
    return table


def pieces_of(tensor: Tensor, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Tensor]]:
    """Each piece with the view of our tensor that it fills, as the file has it."""
    if len(pieces) == 1 and pieces[0].shape == tensor.shape and not pieces[0].transposed:
        yield pieces[0], tensor
        return
    rows = tensor.flatten(0, -2) if tensor.dim() == 3 else tensor  # experts: all rows of one after those of another
    for piece, part in zip(pieces, rows.split([piece.rows for piece in pieces]), strict=True):
        yield piece, part.t() if piece.transposed else part


def to_hugging_face(weights: Mapping[str, Tensor], table: NameTable) -> dict[str, Tensor]:
    """Our tensors under their names, fused ones cut into views of their pieces; the table must know every one."""
    unknown = [name for name in weights if name not in table]
    assert not unknown, f"no Hugging Face name for {unknown}"
    return {piece.name: part for ours, row in table.items() for piece, part in pieces_of(weights[ours], row)}


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


class OfFused(NamedTuple):
    """A part of a stored tensor that holds those of all experts."""

    whole: StoredTensor
    expert: int
    rows: slice

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows.stop - self.rows.start, *self.whole.shape[2:])

    @property
    def dtype(self) -> torch.dtype | str:
        return self.whole.dtype

    def read(self) -> Tensor:
        return self.whole.read()[self.expert, self.rows]


def one_by_one(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor | OfFused]:
    """Each expert's tensors, whether stored so, or those of all in one, as Transformers 5 has them in memory."""
    found: dict[str, StoredTensor | OfFused] = {}
    for name, tensor in tensors.items():
        place, _, kind = name.rpartition(".experts.")
        names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind)
        if not place or names is None or len(tensor.shape) != 3 or tensor.shape[1] % len(names):
            found[name] = tensor
            continue
        rows = tensor.shape[1] // len(names)
        for expert in range(tensor.shape[0]):
            for part, letter in enumerate(names):
                cut = slice(part * rows, (part + 1) * rows)
                found[f"{place}.experts.{expert}.{letter}.weight"] = OfFused(tensor, expert, cut)
    return found


def with_prefix(tensors: Mapping[str, StoredTensor], model_type: str) -> dict[str, StoredTensor]:
    """The same with the prefix that a model with a head has: GPT-2 was published without it, and so are bare models."""
    prefix = "transformer." if model_type == "gpt2" else "model."
    if any(name.startswith(prefix) for name in tensors):
        return dict(tensors)
    return {name if name.startswith("lm_head.") else prefix + name: tensor for name, tensor in tensors.items()}


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
