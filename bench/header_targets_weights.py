"""Small folders of weights, whose headers are mutated: as Hugging Face has them, as we save them, as others do."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch

from bench.header_mutations import (
    Mutant,
    Pairs,
    Raw,
    Target,
    archive_mutants,
    byte_mutants,
    changed_at,
    in_turn,
    json_mutants,
    places_in,
    places_outside_records,
)
from bench.header_readings import Arrays, checkpoint_weights, demand, folder_weights
from model_builder import ConfigurableGPT, load_pretrained
from model_config import ModelArchitectureConfig
from sft.checkpoint import read_checkpoint, save_checkpoint
from sft.huggingface import name_table, to_hugging_face

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "num_key_value_heads": 1, "head_dim": 8, "d_ff": 16}
SHAPE |= {"vocab_size": 20, "block_size": 32, "qk_norm": True}
LIKE_QWEN3: dict[str, Any] = {
    "normalization": "rmsnorm",
    "norm_position": "pre",
    "activation": "silu",
    "ffn_type": "swiglu",
}
LIKE_QWEN3 |= {"position_encoding": "rope", "rope_layout": "half", "qk_norm": True, "bias": False}


def weight_targets(work: Path) -> Iterator[Target]:
    """Every kind; `work` is a folder for making them."""
    yield from (folder_target(), sharded_target(), *checkpoint_targets(work))


def model_of(**changes: object) -> ConfigurableGPT:
    torch.manual_seed(0)
    return ConfigurableGPT(ModelArchitectureConfig.from_dict({**SHAPE, **changes}))


def loaded(path: Path) -> tuple[dict[str, Any], Arrays]:
    """The architecture and the parameters of what load_pretrained gives."""
    model = load_pretrained(path)
    arrays = {name: (tuple(value.shape), bytes_of(value)) for name, value in model.named_parameters()}
    return model.config.to_dict(), arrays


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def with_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture's fields, those that are not told with the values that stand for nothing told."""
    known = dataclasses.fields(ModelArchitectureConfig)
    demand(fields.keys() <= {field.name for field in known}, "unknown fields")
    values = {field.name: fields.get(field.name, field.default) for field in known}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}  # as to_dict


def safetensors_of(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A file as the safetensors library writes it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        values = bytes_of(tensor)
        kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[tensor.dtype]
        offsets = [len(data), len(data) + len(values)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
        data += values
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def qwen3_folder() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    model = model_of()
    weights = to_hugging_face(dict(model.named_parameters()), name_table(model.config.to_dict()))
    weights = {
        name: tensor.detach().to(torch.bfloat16) if "mlp" in name else tensor for name, tensor in weights.items()
    }
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 16,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 16,
        "vocab_size": 20,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "layer_types": ["full_attention"],
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    return config, weights


def read_folder(folder: Path) -> tuple[dict[str, Any], Arrays]:
    fields, arrays = folder_weights({path.name: path.read_bytes() for path in folder.iterdir()})
    return {**with_defaults(fields), **LIKE_QWEN3}, arrays


def folder_target() -> Target:
    config, weights = qwen3_folder()
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": safetensors_of(weights)}

    def mutants(draw: Random) -> Iterator[Mutant]:
        heads = header_byte_mutants(files, ("model.safetensors",), draw)
        yield from in_turn(
            json_mutants(files, ("config.json",), draw), heads, header_mutants(files, ("model.safetensors",), draw)
        )

    return Target("safetensors, config.json", files, mutants, loaded, read_folder, 1400)


def sharded_target() -> Target:
    config, weights = qwen3_folder()
    names = list(weights)
    shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    files = {shard: safetensors_of({name: weights[name] for name in held}) for shard, held in shards.items()}
    files["config.json"] = json.dumps(config).encode()
    index = "model.safetensors.index.json"
    files[index] = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()

    def mutants(draw: Random) -> Iterator[Mutant]:
        index_bytes = byte_mutants(files, lambda name: [range(len(files[name]))], (index,), draw)
        yield from in_turn(json_mutants(files, (index,), draw), index_bytes, header_mutants(files, tuple(shards), draw))

    return Target("index, shards", files, mutants, loaded, read_folder, 700)


def header_mutants(files: dict[str, bytes], names: tuple[str, ...], draw: Random) -> Iterator[Mutant]:
    """Headers that are JSON with other values, in files that are otherwise whole; some announce another length."""
    headers = {}
    for name in names:
        length = int.from_bytes(files[name][:8], "little")
        headers[name] = files[name][8 : 8 + length]
    for what, changed in json_mutants(headers, names, draw):
        ((name, text),) = changed.items()
        assert text is not None
        data = files[name][8 + len(headers[name]) :]
        announced = len(text)
        if draw.random() < 0.1:
            announced = draw.choice((0, 1, 8, announced - 1, announced + 1, announced * 2, 10**8, 2**63, 2**64 - 1))
        told = f"{what}, {announced} bytes announced"
        yield Mutant(told, {name: struct.pack("<Q", announced) + text + data})


def header_byte_mutants(files: dict[str, bytes], names: tuple[str, ...], draw: Random) -> Iterator[Mutant]:
    def places(name: str) -> list[range]:
        return [range(8), range(8, 8 + int.from_bytes(files[name][:8], "little"))]

    return (each for each in byte_mutants(files, places, names, draw) if not is_other_data(files, each))


def is_other_data(files: dict[str, bytes], mutant: Mutant) -> bool:
    """Whether the header is as it was: the format has no checksum of the data."""
    ((name, content),) = mutant.files.items()
    old = files[name]
    end = 8 + int.from_bytes(old[:8], "little")
    return content is not None and len(content) == len(old) and content[:end] == old[:end]


def checkpoint_targets(work: Path) -> Iterator[Target]:
    """One of ours, which is sealed, and one as others write them, with wrappers' names and a buffer."""
    model = model_of(weight_tying=True)
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]}
    content = {"model": model.state_dict(), "model_args": model.config.to_dict(), "optimizer": optimizer, "iter_num": 3}
    path = save_checkpoint(work, content, iter_num=3, best=False, keep=None)
    sealed = {"ckpt.pt": path.read_bytes()}

    def load_sealed(folder: Path) -> Any:
        return plain(read_checkpoint(folder / "ckpt.pt")), loaded(folder)

    def sealed_mutants(draw: Random) -> Iterator[Mutant]:
        data = sealed["ckpt.pt"]
        headers = byte_mutants(sealed, lambda _: places_outside_records(data), ("ckpt.pt",), draw)
        anywhere = byte_mutants(
            sealed, lambda _: [range(len(data)), range(len(data) - 120, len(data))], ("ckpt.pt",), draw
        )
        yield from in_turn(headers, anywhere)

    yield Target("our checkpoints, sealed", sealed, sealed_mutants, load_sealed, None, 700)

    state = {f"_orig_mod.module.{name}": tensor for name, tensor in model.state_dict().items()}
    state["_orig_mod.module.blocks.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    fields = {name: value for name, value in model.config.to_dict().items() if name != "rope_layout"}
    others = {"model": state, "model_args": {**fields, "attention_backend": "x"}, "iter_num": 3}
    plainly = {"ckpt.pt": saved(others)}

    def plain_mutants(draw: Random) -> Iterator[Mutant]:
        data = plainly["ckpt.pt"]
        headers = byte_mutants(plainly, lambda _: places_outside_records(data), ("ckpt.pt",), draw)
        whole = archive_mutants("ckpt.pt", data, draw)
        yield from in_turn(headers, whole, value_mutants(others, draw), archive_mutants("ckpt.pt", data, draw))

    def read_plain(folder: Path) -> tuple[dict[str, Any], Arrays]:
        fields, arrays = checkpoint_weights((folder / "ckpt.pt").read_bytes())
        return with_defaults(fields), arrays

    yield Target("checkpoints of others", plainly, plain_mutants, loaded, read_plain, 1000)


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def value_mutants(content: dict[str, Any], draw: Random) -> Iterator[Mutant]:
    """Endless checkpoints whose plain values and names are other ones."""
    while True:
        place = draw.choice([place for place in places_in(content) if draw.random() < 0.5 or place[0] != "model"])
        what, changed = changed_at(content, place, draw)
        if not holds_text(changed):
            yield Mutant(f"ckpt.pt: {what}", {"ckpt.pt": saved(changed)})


def holds_text(value: Any) -> bool:
    """Whether a part is what only JSON can have."""
    if isinstance(value, dict):
        return any(map(holds_text, value.values()))
    return isinstance(value, (Raw, Pairs))


def plain(value: Any) -> Any:
    """What can be compared: tensors as their type, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), bytes_of(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
