"""Adapters in PEFT's format, for the base that Transformers knows."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft import adapting, peft_format, saved_adapters
from sft.errors import UserError, listed
from sft.export_config import Expression, Fields
from sft.export_weights import half_rows
from sft.pretrained import is_hugging_face_folder, open_pretrained

REORDERED = ("q_proj", "k_proj")  # whose rows rotary pairs lie in


def base_for_peft(model: Any, chosen: str | None) -> str:
    """What PEFT is told to load beneath the adapters; UserError where no model in Transformers is known to be that."""
    if model.adapted is None:
        raise UserError("--lora=apart: the checkpoint holds no adapters; leave it out")
    base = model.adapted.base
    grown = base is not None and open_pretrained(Path(base.path), verify=False).fields.get("vocab_size")
    if grown and grown != model.vocab_size:
        sizes = f"from {grown:,} to {model.vocab_size:,} ids"
        raise UserError(f"--lora=apart: training grew the vocabulary {sizes}, which PEFT cannot do; use --lora=merged")
    if chosen is not None:
        return os.path.abspath(chosen) if is_hugging_face_folder(Path(chosen)) else chosen
    if base is None or not is_hugging_face_folder(Path(base.path)):
        told = "unknown" if base is None else f"{base.path}, which is no Hugging Face folder"
        raise UserError(f"--lora=apart: the base is {told}; export it first, and name that folder with --base=")
    return base.path


def write_adapters(folder: Path, model: Any, *, base: str, fields: Fields, expression: Expression) -> int:
    """Write the adapters of a model whose complete fields are given, read them back, and return their bytes.

    Of a model with interleaved rotary pairs the rows of its adapters are put into the order of the exported base.
    """
    if fields["rope_layout"] != expression.fields["rope_layout"]:
        reorder_rows(model, head_size=fields["head_dim"])
    kept = adapting.kept_state(model)
    if odd := [name for name, tensor in kept.items() if not torch.isfinite(tensor).all()]:
        raise listed("NaN or infinity is in what would be exported; use an earlier checkpoint:", odd)
    saved_adapters.write_peft(folder, model, base=base)
    with open(folder / peft_format.WEIGHTS, "rb") as file:
        os.fsync(file.fileno())
    shutil.copymode(folder / peft_format.CONFIG, folder / peft_format.WEIGHTS)
    refuse_other_adapters(folder, model, kept)
    return sum(tensor.nbytes for tensor in kept.values())


@torch.no_grad()
def reorder_rows(model: Any, *, head_size: int) -> None:
    """Bring what the adapters of queries and keys add into the half layout."""
    parameters = dict(model.named_parameters())
    for place in adapting.places(model):
        if place.name.rpartition(".")[2] in REORDERED:
            for kind in ("B", "magnitude"):
                if (parameter := parameters.get(f"{place.prefix}{kind}")) is not None:
                    parameter.copy_(half_rows(parameter, head_size=head_size))


def refuse_other_adapters(folder: Path, model: Any, kept: dict[str, Tensor]) -> None:
    """UserError unless our importer reads the very bits back."""
    _, stored = peft_format.read(folder)
    names = {f"{place.prefix}{kind}": f"{place.name}.{kind}" for place in adapting.places(model) for kind in "AB"}
    names |= {f"{place.prefix}magnitude": f"{place.name}.magnitude" for place in adapting.places(model)}
    other = []
    for name, tensor in kept.items():
        found = stored.pop(names.get(name, name), None)
        if found is None or found.dtype != tensor.dtype or not torch.equal(found.read(), tensor.cpu()):
            other.append(name)
    if other:
        raise listed(f"{folder}: does not hold what was exported:", other)
