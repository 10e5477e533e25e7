"""What files of weights, arrays and settings say, read a second time: by NumPy and the standard library alone.

These readers share no code with the product. They are what a load of a changed file is compared with: it must be
refused, or give what stands here. Unreadable is raised for what no reader may accept.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, tuple[tuple[int, ...], bytes]]  # shape and float32 values of each tensor
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
STORAGES = {"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
FOREIGN_FIELDS = ("attention_backend", "ffn_expansion_ratio")


class Unreadable(Exception):
    """What nobody may take for a file of its kind."""


def demand(fact: object, what: str = "") -> None:
    if not fact:
        raise Unreadable(what)


def json_object(content: bytes) -> dict[str, Any]:
    """The object that a JSON text is; Unreadable where two readers could differ about it."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        demand(len({key for key, _ in pairs}) == len(pairs), "a key twice")
        return dict(pairs)

    def refuse(text: str) -> Any:
        raise Unreadable(text)

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise Unreadable(str(error)) from error
    demand(isinstance(value, dict), "no object")
    return value


def floats(data: bytes, dtype: str, order: str = "<") -> np.ndarray:
    demand(dtype in ITEM_BYTES, dtype)
    if dtype == "BF16":
        return (np.frombuffer(data, f"{order}u2").astype("<u4") << 16).view("<f4")
    with np.errstate(over="ignore"):
        return np.frombuffer(data, f"{order}f{ITEM_BYTES[dtype]}").astype("<f4")


def safetensors(content: bytes) -> dict[str, np.ndarray]:
    length = int.from_bytes(content[:8], "little")
    demand(8 <= 8 + length <= len(content))
    header, data = json_object(content[8 : 8 + length]), content[8 + length :]
    arrays, taken = {}, []
    for name, told in header.items():
        if name == "__metadata__":
            demand(isinstance(told, dict) and all(isinstance(value, str) for value in told.values()))
            continue
        demand(isinstance(told, dict) and {"dtype", "shape", "data_offsets"} <= told.keys())
        shape, offsets = told["shape"], told["data_offsets"]
        demand(isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2)
        demand(all(type(number) is int and number >= 0 for number in (*shape, *offsets)))
        demand(told["dtype"] in ITEM_BYTES and offsets[1] <= len(data))
        demand(offsets[1] - offsets[0] == math.prod(shape) * ITEM_BYTES[told["dtype"]])
        arrays[name] = floats(data[slice(*offsets)], told["dtype"]).reshape(shape)
        taken.append(offsets)
    ends = [0, *(end for _, end in sorted(taken))]
    demand([*(begin for begin, _ in sorted(taken)), len(data)] == ends, "holes or overlaps")
    return arrays


def folder_weights(files: Mapping[str, bytes]) -> tuple[dict[str, Any], Arrays]:
    """The architecture, as far as its config.json tells it, and our tensors of a Hugging Face folder of Qwen3."""
    fields = hugging_face_fields(json_object(files["config.json"]))
    held: dict[str, np.ndarray] = {}
    if "model.safetensors.index.json" in files:
        weight_map = json_object(files["model.safetensors.index.json"])["weight_map"]
        for shard in set(weight_map.values()):
            demand(shard in files, "no such shard")
            found = safetensors(files[shard])
            demand(found.keys() == {name for name, place in weight_map.items() if place == shard})
            held |= found
    else:
        held = safetensors(files["model.safetensors"])
    return fields, ours(held, fields)


def hugging_face_fields(config: dict[str, Any]) -> dict[str, Any]:
    demand(config.get("model_type") == "qwen3")
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    fields = {
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_embd": config["hidden_size"],
        "num_key_value_heads": config["num_key_value_heads"],
        "head_dim": config.get("head_dim", 128),
        "d_ff": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "block_size": config["max_position_embeddings"],
    }
    demand(all(type(value) is int and value > 0 for value in fields.values()))
    tied = config.get("tie_word_embeddings", False)
    demand(isinstance(tied, bool))
    return {**fields, "norm_eps": config.get("rms_norm_eps", 1e-6), "rope_theta": theta, "weight_tying": tied}


def ours(held: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> Arrays:
    """Their tensors as ours, in float32: keys above values, one beside the other where there are as many as queries."""
    demand(fields["n_layer"] < 100)
    places = {"token_embeddings": ["model.embed_tokens"], "final_norm": ["model.norm"]}
    if not fields["weight_tying"]:
        places["lm_head"] = ["lm_head"]
    elif "lm_head.weight" in held:
        held = {name: array for name, array in held.items() if name != "lm_head.weight"}
    for i in range(fields["n_layer"]):
        block, layer = f"blocks.{i}.", f"model.layers.{i}."
        q, k, v = (f"{layer}self_attn.{letter}_proj" for letter in "qkv")
        grouped = fields["num_key_value_heads"] < fields["n_head"]
        attention = {"c_q": [q], "c_kv": [k, v]} if grouped else {"c_attn": [q, k, v]}
        attention |= {"c_proj": [f"{layer}self_attn.o_proj"]}
        attention |= {name: [f"{layer}self_attn.{name}"] for name in ("q_norm", "k_norm")}
        places |= {f"{block}attn.{name}": pieces for name, pieces in attention.items()}
        places |= {f"{block}norm1": [f"{layer}input_layernorm"], f"{block}norm2": [f"{layer}post_attention_layernorm"]}
        for name, piece in (("w_gate", "gate_proj"), ("w_value", "up_proj"), ("w_out", "down_proj")):
            places[f"{block}ffn.{name}"] = [f"{layer}mlp.{piece}"]
    pieces = [f"{piece}.weight" for each in places.values() for piece in each]
    demand(sorted(pieces) == sorted(held), "other tensors")
    stacked = {name: np.concatenate([held[f"{piece}.weight"] for piece in each]) for name, each in places.items()}
    return {f"{name}.weight": (array.shape, array.tobytes()) for name, array in stacked.items()}


def checkpoint_weights(content: bytes) -> tuple[dict[str, Any], Arrays]:
    """The architecture and the tensors of a checkpoint, with wrappers' prefixes and derived buffers left out."""
    saved = archive_content(content)
    demand(isinstance(saved, dict) and isinstance(saved.get("model"), dict) and isinstance(saved["model_args"], dict))
    fields = {"rope_layout": "interleaved", **saved["model_args"]}
    arrays: Arrays = {}
    for given, array in saved["model"].items():
        demand(isinstance(given, str) and isinstance(array, np.ndarray))
        name = re.sub(r"^(_orig_mod\.|module\.)+", "", given)
        if not re.search(r"\.attn\.(rope\..+|bias)$", name):
            demand(name not in arrays)
            arrays[name] = (array.shape, array.astype("<f4").tobytes())
    if fields.get("weight_tying"):
        arrays.pop("lm_head.weight", None)
    return {name: value for name, value in fields.items() if name not in FOREIGN_FIELDS}, arrays


def archive_content(content: bytes) -> Any:
    """What torch.save was given, its tensors as float32 arrays."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = {entry.filename.split("/", 1)[1]: archive.read(entry) for entry in archive.infolist()}
        demand(records.get("byteorder", b"little") in (b"little", b"big"))
        return PlainUnpickler(records).load()
    except Unreadable:
        raise
    except Exception as error:  # whatever a damaged archive or pickle does to its reader
        raise Unreadable(f"{type(error).__name__}: {error}") from error


class PlainUnpickler(pickle._Unpickler):  # the one in Python, which allocates nothing ahead
    """Reads plain containers and tensors, and knows no other name."""

    def __init__(self, records: Mapping[str, bytes]):
        super().__init__(io.BytesIO(records["data.pkl"]), encoding="bytes")
        self.records = records

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuilt
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        demand(module == "torch" and name in STORAGES, f"{module}.{name}")
        return name

    def persistent_load(self, told: Any) -> np.ndarray:
        demand(isinstance(told, tuple) and len(told) == 5 and told[0] == "storage")
        _, kind, key, _, count = told
        data = self.records[f"data/{key}"]
        demand(kind in STORAGES and len(data) == count * ITEM_BYTES[STORAGES[kind]], "a storage of another size")
        return floats(data, STORAGES[kind], ">" if self.records.get("byteorder") == b"big" else "<")


def rebuilt(values: np.ndarray, offset: int, shape: Any, strides: Any, *_: object) -> np.ndarray:
    demand(isinstance(values, np.ndarray) and type(offset) is int and offset >= 0 and len(shape) == len(strides))
    demand(all(type(number) is int and number >= 0 for number in (*shape, *strides)))
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    demand(0 in shape or last < len(values), "beyond its storage")
    demand(math.prod(shape) <= len(values), "more values than are stored")
    places = np.full(shape, offset)
    for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        places = places + (np.arange(size) * stride).reshape([-1 if axis == i else 1 for i in range(len(shape))])
    return values[places]


def prepared_arrays(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The arrays of a prepared folder as NumPy reads them."""
    found = {}
    for path in sorted(folder.glob("*.npy")):
        try:
            array = np.load(path, allow_pickle=False)
        except Exception as error:
            raise Unreadable(f"{path.name}: {error}") from error
        found[path.name] = (array.dtype.str, array.shape, array.tobytes())
    return found
