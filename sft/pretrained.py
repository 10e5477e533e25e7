"""What a file of weights holds, whoever wrote it: architecture fields and tensors, opened but not read yet."""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from sft import huggingface, peft_format
from sft.checkpoint import read_checkpoint
from sft.ema import Weights
from sft.errors import UserError, listed
from sft.families import architecture_fields
from sft.files import let_go
from sft.huggingface import NameTable, OfFused, Piece, StoredTensor, pieces_of

FLOATS = tuple(huggingface.FLOATS.values())
WRAPPERS = ("_orig_mod.", "module.")  # what torch.compile and DistributedDataParallel put before each name
DERIVED_BUFFERS = re.compile(r"\.attn\.(rope\..+|bias)$")  # rotary tables and causal masks that others save
NO_AVERAGE = "holds no moving average of its weights (ema), since it was not trained with ema_decay; use its weights"
THEIR_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$|^(transformer\.)?h\.\d+\.attn\.(masked_)?bias$")
FOREIGN_FIELDS = ("attention_backend", "ffn_expansion_ratio")  # how to compute, and what d_ff already says


class MappedTensor(NamedTuple):
    """A tensor of a checkpoint, mapped from its file."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype | str:
        """The type of the values; what a tensor is that does not hold them one by one."""
        tensor = self.tensor
        if tensor.layout != torch.strided or tensor.is_meta:
            return f"{tensor.layout} on {tensor.device}"
        if (stored := tensor.untyped_storage().nbytes()) < tensor.nbytes:  # strides of 0: any shape from a few bytes
            return f"{tensor.dtype}, repeated from {stored:,} bytes"
        return tensor.dtype

    def read(self) -> Tensor:
        return self.tensor.detach()


@dataclass(frozen=True)
class Pretrained:
    """The content of one checkpoint file or folder."""

    path: Path
    fields: dict[str, Any]  # of the architecture, as plain values
    tensors: Mapping[str, MappedTensor | StoredTensor | OfFused]  # by the file's names
    table: NameTable | None  # how ours are made of them; None = the names are ours
    adapters: Mapping[str, Any] | None = None  # of tensors that are adapters: "lora" and "base", as the file has them

    @property
    def is_of_unknown_base(self) -> bool:
        """Whether it is of adapters that do not tell by a hash which their base is."""
        base = None if self.adapters is None else self.adapters["base"]
        return not isinstance(base, dict) or base.get("sha256") is None

    def weights(self, shapes: Mapping[str, tuple[int, ...]], device: str | torch.device, dtype: torch.dtype) -> dict:
        """Each of our tensors, of exactly these shapes, in memory of its own; one at a time passes through the CPU.

        shapes leaves out a tied head; the file may still hold one. Raises UserError with every missing, unexpected
        or wrong-shaped tensor.
        """
        if self.adapters is not None:
            raise UserError(
                f"{self.path}: holds adapters of a model, not the model; export it merged with its base first"
            )
        table = self.table or {name: (Piece(name, shape),) for name, shape in shapes.items()}
        assert table.keys() == shapes.keys()
        self._check(table)
        weights = {}
        for name, pieces in table.items():
            weights[name] = torch.empty(shapes[name], device=device, dtype=dtype)
            for piece, part in pieces_of(weights[name], pieces) if not weights[name].is_meta else ():
                part.copy_(stored := self.tensors[piece.name].read())
                let_go(stored.data_ptr(), stored.nbytes)  # or the whole file would count as this process's memory
        return weights

    def _check(self, table: NameTable) -> None:
        expected = {piece.name: piece.shape for pieces in table.values() for piece in pieces}
        tied_head = "lm_head.weight" in self.tensors and "lm_head.weight" not in table
        if tied_head:
            expected["lm_head.weight"] = table["token_embeddings.weight"][0].shape
        problems = [f"missing: {name} {expected[name]}" for name in expected if name not in self.tensors]
        if len(problems) == 1 and "lm_head.weight" in problems[0]:
            problems.append("(a head that is the embedding needs tie_word_embeddings true in its config.json)")
        for name, found in self.tensors.items():
            if name not in expected:
                problems.append(f"unexpected: {name} {found.shape}")
            elif found.shape != expected[name]:
                problems.append(f"wrong shape: {name} is {found.shape}, must be {expected[name]}")
            elif found.dtype not in FLOATS:
                problems.append(f"wrong type: {name} is {found.dtype}, must hold floats of 16, 32 or 64 bits")
        if problems:
            raise listed(f"{self.path}: its tensors do not fit the architecture it names:", problems)
        if tied_head and self.table is None:  # of a folder's that has been compared
            self._compare_tied_head(table["token_embeddings.weight"][0].name)

    def _compare_tied_head(self, embedding: str) -> None:
        if not torch.equal(self.tensors["lm_head.weight"].read(), self.tensors[embedding].read()):
            note = "the head is tied, so its lm_head.weight, which differs from the embedding, is not used"
            print(f"{self.path}: {note}", file=sys.stderr)


def open_pretrained(path: Path, *, verify: bool = True, weights: Weights = "model") -> Pretrained:
    """A Hugging Face or PEFT folder, a checkpoint file, or a folder with a ckpt.pt. UserError for anything else.

    `verify` compares the checksums of a checkpoint, as read_checkpoint does. `weights`: of a checkpoint that holds a
    moving average beside them, which ones.
    """
    if is_hugging_face_folder(path):
        if weights == "ema":
            raise UserError(f"{path}: {NO_AVERAGE}")
        config = huggingface.read_config(path)
        try:
            fields = architecture_fields(config)
        except UserError as error:
            raise UserError(f"{path / 'config.json'}: {error}") from error
        stored = {
            name: tensor for name, tensor in huggingface.stored_tensors(path).items() if not THEIR_BUFFERS.search(name)
        }
        tensors = huggingface.one_by_one(huggingface.with_prefix(stored, config["model_type"]))
        _refuse_too_many_layers(path, fields, tensors)
        if fields["weight_tying"] and _has_a_head_of_its_own(tensors, huggingface.name_table(fields)):
            told = "the config ties the head to the embedding, the file has an lm_head.weight that differs from it"
            print(f"{path}: {told}: the file wins, as in Transformers 5, and the head is not tied", file=sys.stderr)
            fields = {**fields, "weight_tying": False}
        return Pretrained(path, fields, tensors, huggingface.name_table(fields))
    if peft_format.is_peft_folder(path) and weights == "model":
        adapters, stored = peft_format.read(path)
        return Pretrained(path, {}, stored, table=None, adapters=adapters)
    return _open_checkpoint(checkpoint_file(path), verify=verify, weights=weights)


def _has_a_head_of_its_own(tensors: Mapping[str, StoredTensor | OfFused], table: NameTable) -> bool:
    """Whether there is a head beside the embedding, of its shape and with other numbers."""
    embedding, head = tensors.get(table["token_embeddings.weight"][0].name), tensors.get("lm_head.weight")
    if embedding is None or head is None or embedding.shape != head.shape:
        return False  # what does not fit is refused later
    if embedding.dtype not in FLOATS or head.dtype not in FLOATS:
        return False
    one, other = embedding.read(), head.read()
    return not torch.equal(one, other) if one.dtype == other.dtype else not torch.equal(one.double(), other.double())


def is_hugging_face_folder(path: Path) -> bool:
    return (path / "config.json").is_file()


def is_model_folder(path: Path) -> bool:
    """Whether it is of a model or of adapters as others save them, which tell nothing of a run."""
    return is_hugging_face_folder(path) or peft_format.is_peft_folder(path)


def checkpoint_file(path: Path) -> Path:
    """The file itself, or the newest of a run's folder. Raises UserError for a folder without one."""
    if not path.is_dir():
        return path
    if not (path / "ckpt.pt").is_file():
        raise UserError(f"{path}: holds neither a ckpt.pt nor a config.json with *.safetensors")
    return path / "ckpt.pt"


def _open_checkpoint(path: Path, *, verify: bool, weights: Weights) -> Pretrained:
    content = read_checkpoint(path, verify=verify)
    state, fields = content.get("model"), content.get("model_args")
    if not isinstance(state, dict) or not isinstance(fields, dict):
        raise UserError(f"{path}: is no model checkpoint, since it lacks 'model' or 'model_args'")
    if weights == "ema":
        if not isinstance(content.get("ema"), dict):
            raise UserError(f"{path}: {NO_AVERAGE}")
        state = {name: content["ema"].get(name, state[name]) for name in state}  # what is frozen has no average
    # Files that do not say how rotary pairs lie come from a project that only knew interleaved ones.
    fields = {"rope_layout": "interleaved", **fields}
    fields = {name: value for name, value in fields.items() if name not in FOREIGN_FIELDS}
    tensors: dict[str, MappedTensor] = {}
    for given, tensor in state.items():
        if not isinstance(given, str) or not given.isprintable():
            raise UserError(f"{path}: {reprlib.repr(given)} is no name of a tensor")
        name = _unwrapped(given)
        if DERIVED_BUFFERS.search(name):
            continue
        if type(tensor) not in (Tensor, Parameter) or tensor.is_nested:
            raise UserError(f"{path}: {given} is of type {type(tensor).__name__}, not a plain tensor")
        if name in tensors:
            raise UserError(f"{path}: holds {name} twice, with and without a wrapper's prefix")
        tensors[name] = MappedTensor(tensor)
    if "lora" in content:
        adapters = {"lora": content["lora"], "base": content.get("base")}
        return Pretrained(path, fields, tensors, table=None, adapters=adapters)
    _refuse_too_many_layers(path, fields, tensors)
    return Pretrained(path, fields, tensors, table=None)


def _refuse_too_many_layers(path: Path, fields: Mapping[str, Any], tensors: Collection[str]) -> None:
    """UserError before anything is made for each layer of an architecture whose tensors are not there."""
    layers = fields.get("n_layer")
    if isinstance(layers, int) and layers > len(tensors):
        raise UserError(f"{path}: its architecture has {layers:,} layers, but it holds only {len(tensors):,} tensors")


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name
