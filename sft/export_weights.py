"""Our weights as Hugging Face's files: its names, rows in the order of its rotary pairs, shards of bounded size."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sft.errors import EXIT_FAILED, UserError
from sft.export_config import Expression, Fields
from sft.files import write_whole
from sft.huggingface import NameTable, Piece, to_hugging_face

FORMAT = {"format": "pt"}  # without it Transformers refuses the file


class Stored(NamedTuple):
    """A tensor that is going to be written: a piece of one of ours."""

    ours: str
    piece: Piece

    def size(self, dtype: torch.dtype) -> int:
        return math.prod(self.piece.shape) * dtype.itemsize


def converted(
    weights: Mapping[str, Tensor], fields: Fields, expression: Expression, table: NameTable
) -> Callable[[str], Tensor]:
    """The tensor of a name of the table, made of `weights`, whose architecture is `fields`."""
    reorders = fields["rope_layout"] != expression.fields["rope_layout"]

    def tensor_of(name: str) -> Tensor:
        if name not in weights:  # a bias that the family cannot leave out
            assert name.endswith(".bias"), name
            return torch.zeros(sum(piece.shape[0] for piece in table[name]), dtype=dtype)
        return half_layout(name, weights[name], fields) if reorders else weights[name]

    dtype = next(iter(weights.values())).dtype
    assert not (unknown := weights.keys() - table.keys() - {"lm_head.weight"}), unknown  # a tied head is the embedding
    return tensor_of


def half_layout(name: str, tensor: Tensor, fields: Fields) -> Tensor:
    """The tensor in the order in which rotary pairs are (i, i + C/2), from the one in which they are (2i, 2i + 1).

    The rows of each query and key head change places, and the weights of the norms of queries and keys with them: what
    a head's scores are the sum of stays the same. Other tensors stay as they are.
    """
    C = fields["head_dim"]
    queries, keys = fields["n_head"] * C, fields["num_key_value_heads"] * C
    part = name.split(".")[-2]
    turned = {"c_q": queries, "c_kv": keys, "c_attn": queries + keys, "q_norm": C, "k_norm": C}.get(part)
    if turned is None:
        return tensor
    return torch.cat([half_rows(tensor[:turned], head_size=C), tensor[turned:]])


def half_rows(rows: Tensor, *, head_size: int) -> Tensor:
    """The rows of whole heads with the first of all pairs before the second of all."""
    heads = rows.unflatten(0, (-1, head_size // 2, 2))  # (heads, pairs, 2, ...)
    return heads.transpose(1, 2).flatten(0, 2)


def plan_shards(table: NameTable, *, dtype: torch.dtype, most_bytes: float) -> dict[str, list[Stored]]:
    """What each file holds, in the table's order; a tensor that is larger than `most_bytes` has a file of its own."""
    shards: list[list[Stored]] = [[]]
    held = 0
    for ours, pieces in table.items():
        for piece in pieces:
            stored = Stored(ours, piece)
            if shards[-1] and held + stored.size(dtype) > most_bytes:
                shards.append([])
                held = 0
            shards[-1].append(stored)
            held += stored.size(dtype)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_shards(
    folder: Path,
    shards: Mapping[str, Sequence[Stored]],
    table: NameTable,
    tensor_of: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
) -> int:
    """Write the files, and their index where there are several; the bytes of all tensors.

    Raises UserError for weights that are not finite, and where the files cannot be written.
    """
    for name, shard in shards.items():
        try:
            save_file(dict(_tensors(shard, table, tensor_of)), folder / name, metadata=FORMAT)
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
            shutil.copymode(folder / "config.json", folder / name)  # else nobody but its owner could read it
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name}: cannot be written ({error})", exit_status=EXIT_FAILED) from error
    total = sum(stored.size(dtype) for shard in shards.values() for stored in shard)
    if len(shards) > 1:
        weight_map = {stored.piece.name: name for name, shard in shards.items() for stored in shard}
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return total


def _tensors(
    shard: Sequence[Stored], table: NameTable, tensor_of: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    wanted = {stored.piece.name for stored in shard}
    for ours in dict.fromkeys(stored.ours for stored in shard):
        tensor = tensor_of(ours).detach().cpu()
        if not torch.isfinite(tensor).all():
            raise UserError(f"{ours} holds NaN or infinity: nothing that could be served; export an earlier checkpoint")
        for name, piece in to_hugging_face({ours: tensor}, {ours: table[ours]}).items():
            if name in wanted:
                yield name, piece.contiguous()


def write_json(path: Path, content: Mapping[str, object]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
