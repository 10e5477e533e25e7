"""The mean of checkpoints: which ones belong together, and their weights, tensor by tensor."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft.checkpoint import read_checkpoint
from sft.ema import Weights
from sft.errors import UserError, listed
from sft.huggingface import pieces_of
from sft.pretrained import Pretrained, checkpoint_file, is_hugging_face_folder, open_pretrained
from sft.tokenizer import load_tokenizer

AT_ONCE = 1 << 24  # numbers of a tensor that are added up in float64 at a time
NO_SHAPE = ("dropout", "attention_dropout", "residual_dropout")  # fields that say how a run trained
TOLD = ("tokenizer_fingerprint", "template")  # what else has to be the same, where files tell
KEPT = ("data_fingerprint", "config", "config_origins")  # what is told of the average where it is the same for all


@dataclass(frozen=True)
class Member:
    """One checkpoint of an average, open; its tensors are mapped, not read."""

    path: Path
    share: float  # against the other members'
    content: Mapping[str, Any]
    pretrained: Pretrained

    @property
    def fields(self) -> dict[str, Any]:
        return self.pretrained.fields

    @property
    def file(self) -> Path:
        """What is one and the same, whatever its names: the checkpoint, or the folder."""
        return self.path if is_hugging_face_folder(self.path) else checkpoint_file(self.path)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of our name, mapped where the file has it as it is."""
        stored, table = self.pretrained.tensors, self.pretrained.table
        if table is None:
            return stored[name].read()
        parts = [stored[piece.name].read() for piece in table[name]]
        whole = torch.empty(shape, dtype=parts[0].dtype)
        for (_, place), part in zip(pieces_of(whole, table[name]), parts, strict=True):
            place.copy_(part)
        return whole


def parse_share(text: str) -> tuple[Path, float]:
    """The path and the share that 'a.pt:0.5' names, 1 where it names none; ValueError with a sentence."""
    head, colon, tail = text.rpartition(":")
    if not colon or os.path.exists(text):
        return Path(text), 1.0
    try:
        share = float(tail)
    except ValueError:
        raise ValueError(f"{text!r}: {tail!r} is no number; write its share of the mean, as in {head}:0.5") from None
    if not 0 <= share < math.inf:
        raise ValueError(f"{text!r}: a share of the mean must be 0 or more and finite, not {tail}")
    return Path(head), share


def open_member(path: Path, share: float, *, weights: Weights) -> Member:
    """A checkpoint, verified, or a Hugging Face folder. Raises UserError for what is neither, and for adapters."""
    pretrained = open_pretrained(path, weights=weights)
    if pretrained.adapters is not None:
        raise UserError(
            f"{path}: holds adapters (LoRA), and the product of two means is not the mean of the products; merge each "
            "into its base with tools/export_hf.py, and average the folders"
        )
    if not is_hugging_face_folder(path):
        return Member(path, share, read_checkpoint(checkpoint_file(path), verify=False), pretrained)
    told = {}
    with contextlib.suppress(UserError):  # without one, or with one of no use to us, the folder does not tell
        told["tokenizer_fingerprint"] = load_tokenizer(path).fingerprint
    return Member(path, share, told, pretrained)


def refuse_strangers(members: Sequence[Member], architectures: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError with all in which a member differs from the first: its architecture, its tokenizer, its template.

    `architectures` are the members', complete.
    """
    first, shape = members[0], architectures[0]
    problems = list(_named_twice(members))
    for member, other in zip(members[1:], architectures[1:], strict=True):
        for name in sorted({*shape, *other} - {*NO_SHAPE}):
            if shape.get(name) != other.get(name):
                problems.append(f"{member.path}: {name} is {other.get(name)}, in {first.path} {shape.get(name)}")
        for name in TOLD:
            ours, theirs = first.content.get(name), member.content.get(name)
            if None not in (ours, theirs) and ours != theirs:
                problems.append(
                    f"{member.path}: its {_words(name)} is {_short(theirs)}, in {first.path} {_short(ours)}"
                )
    if problems:
        raise listed("these checkpoints cannot be averaged:", problems)


def mean_weights(members: Sequence[Member], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The mean of each tensor by the members' shares, computed in float64, in the widest of their types.

    One tensor is in memory twice, the others once. Raises UserError that names every one with a number that is not
    finite.
    """
    result: dict[str, Tensor] = {}
    odd: list[str] = []
    for name, shape in shapes.items():
        tensors = [member.tensor(name, shape) for member in members]
        result[name] = weighted_mean(tensors, [member.share for member in members])
        if not bool(torch.isfinite(result[name]).all()):
            odd += [f"{path}: {name}" for path in _not_finite(members, tensors) or ["the mean"]]
    if odd:
        raise listed("numbers that are not finite cannot be averaged; leave these checkpoints out:", odd)
    return result


def weighted_mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """(sum of share x tensor) / (sum of shares), each number rounded once."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    mean = torch.empty(tensors[0].shape, dtype=dtype)
    flat, total = mean.view(-1), math.fsum(shares)
    for start in range(0, flat.numel(), AT_ONCE):
        place = slice(start, start + AT_ONCE)
        added = torch.zeros(flat[place].shape, dtype=torch.float64)
        for tensor, share in zip(tensors, shares, strict=True):
            added.add_(tensor.reshape(-1)[place].double(), alpha=share)
        flat[place] = added.div_(total)
    return mean


def told(members: Sequence[Member]) -> dict[str, Any]:
    """What a checkpoint of the average tells beside its weights."""
    total = math.fsum(member.share for member in members)
    of = [member.content for member in members]
    return {
        **{name: value for name in TOLD if (value := next(_known(of, name), None)) is not None},
        **{name: of[0][name] for name in KEPT if name in of[0] and all(each.get(name) == of[0][name] for each in of)},
        "iter_num": max((number for number in _known(of, "iter_num") if isinstance(number, int)), default=0),
        "averaged": [
            {"path": str(each.path), "weight": each.share / total, "iter_num": each.content.get("iter_num")}
            for each in members
        ],
    }


def _named_twice(members: Sequence[Member]) -> Iterator[str]:
    seen: dict[tuple[int, int], Path] = {}
    for member in members:
        found = member.file.stat()
        before = seen.setdefault((found.st_dev, found.st_ino), member.path)
        if before is not member.path:
            yield f"{member.path}: is the same file as {before}; name it once, with a larger share"


def _known(contents: Sequence[Mapping[str, Any]], name: str) -> Iterator[Any]:
    return (content[name] for content in contents if content.get(name) is not None)


def _not_finite(members: Sequence[Member], tensors: Sequence[Tensor]) -> list[str]:
    return [str(m.path) for m, tensor in zip(members, tensors, strict=True) if not bool(torch.isfinite(tensor).all())]


def _words(name: str) -> str:
    return name.removesuffix("_fingerprint")


def _short(value: Any) -> str:
    return str(value)[:12]
