"""Adapters in a checkpoint or a PEFT folder, and the base that they belong to: found, proved to be it, put together."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft import adapting, hub, peft_format
from sft.adapting import EMBEDDINGS, Base, Place
from sft.errors import UserError, listed
from sft.huggingface import OfFused, StoredTensor
from sft.lora import LoRA
from sft.pretrained import FLOATS, MappedTensor, Pretrained, open_pretrained
from sft.untrusted import MOST_IDS

LINK = "base"  # a name beside a checkpoint under which its base may be, wherever it was
LONGEST_CHAIN = 16  # adapters of a base that is another's adapters itself
MOST_THREADS = 8
KINDS = ("A", "B", "magnitude")  # of an adapter's tensors


def sha256_of(source: Pretrained) -> str:
    """A hash (hex) of all tensors of a source, whatever files they are in: names, types, shapes and bytes.

    Of adapters it covers their base as they tell of it.
    """
    tensors = sorted(source.tensors.items())
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        digests = list(threads.map(lambda item: _digest(item[1].read()), tensors))
    whole = hashlib.sha256()
    for (name, told), digest in zip(tensors, digests, strict=True):
        whole.update(f"{name} {told.dtype} {tuple(told.shape)} {digest}\n".encode())
    if source.adapters is not None:
        whole.update(repr(sorted(source.adapters["lora"].items())).encode())
        whole.update(str((source.adapters["base"] or {}).get("sha256")).encode())
    return whole.hexdigest()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def base_of_run(settings: Any, model: Any) -> Base | None:
    """What a run's checkpoints will tell of the base, where it begins with adapters of one."""
    if settings.lora_rank is None or model.adapted is not None or settings.dry_run:
        return None
    path = Path(settings.checkpoint_path)
    return Base(os.path.abspath(path), sha256_of(open_pretrained(path, verify=False)))


def base_of(source: Pretrained, *, verify: bool) -> Path:
    """Where the base of these adapters is; UserError where it is not, or, if `verify`, where it is another now."""
    path = _location(source, verify=verify)
    chain = [source.path, path]
    while len(chain) <= LONGEST_CHAIN:
        inner = open_pretrained(chain[-1], verify=False)
        if inner.adapters is None:
            return path
        chain.append(_location(inner, verify=False))
    raise UserError(f"{source.path}: its base has a base, and so on: more than {LONGEST_CHAIN} of them")


def _location(source: Pretrained, *, verify: bool) -> Path:
    assert source.adapters is not None
    base = source.adapters["base"]
    told = base.get("path") if isinstance(base, dict) else None
    if not isinstance(told, str) or not told.isprintable() or not told:
        raise UserError(f"{source.path}: does not tell which base its adapters belong to; {_remedy(source)}")
    expected, changed = base.get("sha256"), []
    there = {path.resolve(): path for path in reversed([*_candidates(source, base, told)]) if path.exists()}
    for path in reversed(there.values()):
        # of several each process must take the same, whether it is to verify or not
        if expected is None or (not verify and len(there) == 1):
            return path
        found = sha256_of(open_pretrained(path, verify=False))
        if found == expected:
            return path
        changed.append(f"{path} has other weights now (sha256 {found[:12]}, then {str(expected)[:12]})")
    if changed:
        raise listed(f"{source.path}: its adapters do not belong to what is there; {_remedy(source)}", changed)
    raise UserError(f"{source.path}: its adapters belong to the base {told}, which is not there; {_remedy(source)}")


def _candidates(source: Pretrained, base: Mapping[str, Any], told: str) -> Iterator[Path]:
    """Where the base may be: where somebody says, where it was, and where it was as seen from the checkpoint."""
    folder = source.path if source.path.is_dir() else source.path.parent
    yield folder / LINK
    if hub.is_name(told):  # as most published adapters name it
        with contextlib.suppress(UserError):
            yield hub.fetch(told, setting="base", files=hub.MODEL_FILES, only_cached=True)
    yield Path(told)
    relative = base.get("relative_path", told)
    if isinstance(relative, str) and relative.isprintable():
        yield folder / relative


def _remedy(source: Pretrained) -> str:
    folder = source.path if source.path.is_dir() else source.path.parent
    return f"put the base back, or a link to it under the name {folder / LINK}"


def constants(model: Any, out_dir: Path) -> dict[str, Any]:
    """What a checkpoint in out_dir tells of the adapters of a model and of their base; {} where it has none."""
    if model.adapted is None:
        return {}
    lora, base = model.adapted
    if base is None:  # on the main rank alone it is known
        return {"lora": lora.to_dict(), "base": None}
    relative = os.path.relpath(base.path, os.path.abspath(out_dir))
    return {"lora": lora.to_dict(), "base": {"path": base.path, "relative_path": relative, "sha256": base.sha256}}


def apply(source: Pretrained, model: Any, *, base: Path) -> None:
    """Give the model of this base the adapters, and the embeddings that were trained with them; all else is frozen.

    They take the model's dtype and device. A base that has adapters already is merged with them. Raises UserError with
    all that does not fit.
    """
    assert source.adapters is not None
    lora = _lora(source)
    adapting.merge_adapters(model)
    known = {place.name: place for place in adapting.places(model) if place.name in lora.targets}
    if unknown := [name for name in lora.targets if name not in known]:
        raise listed(f"{source.path}: adapters of another base, which has these linear layers:", unknown)
    names = {f"{name}.{kind}": f"{place.prefix}{kind}" for name, place in known.items() for kind in KINDS}
    tensors = {names.get(name, name): tensor for name, tensor in source.tensors.items()}
    _grow(source, model, tensors)
    tensors = _untied(source, model, tensors)
    if problems := list(_misfits(model, lora, known, tensors)):
        raise listed(f"{source.path}: its tensors do not fit its base:", problems)
    told = source.adapters["base"].get("sha256")
    adapting.adapt(model, lora, base=Base(os.path.abspath(base), told if isinstance(told, str) else None), seed=None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in tensors)
        if name in tensors and not parameter.is_meta:
            parameter.data.copy_(tensors[name].read())


def write_peft(folder: Path, model: Any, *, base: str) -> None:
    """Save the adapters of a model for PEFT; `base` is the place of the model in Transformers that they are for."""
    assert model.adapted is not None, "a model without adapters has none to save"
    known = adapting.places(model)
    kept = adapting.kept_state(model)
    tensors = {}
    for place in known:
        for kind in KINDS:
            if (name := f"{place.prefix}{kind}") in kept:
                tensors[f"{place.name}.{kind}"] = kept.pop(name)
    if odd := [name for name in kept if name not in EMBEDDINGS]:
        raise listed("PEFT cannot express what was trained beside adapters:", odd)
    if model.config.weight_tying and EMBEDDINGS[0] in kept:  # there a trained embedding and its head are two
        kept[EMBEDDINGS[1]] = kept[EMBEDDINGS[0]]
    names, lora = [place.name for place in known], model.adapted.lora.to_dict()
    peft_format.write(folder, lora, {**tensors, **kept}, base=base, known=names)


def _grow(source: Pretrained, model: Any, tensors: Mapping[str, MappedTensor | StoredTensor | OfFused]) -> None:
    """As many rows for ids as the adapted model had: as its architecture or its embeddings tell."""
    size = source.fields.get("vocab_size", 0)
    if not source.fields and (embeddings := tensors.get("token_embeddings.weight")) and len(embeddings.shape) == 2:
        size = embeddings.shape[0]
    if type(size) is int and model.vocab_size < size <= MOST_IDS:
        model.grow_vocabulary(size, say=lambda sentence: None)
    told = {**model.config.to_dict(), **source.fields}
    for name in ("dropout", "attention_dropout", "residual_dropout", "block_size"):
        told[name] = getattr(model.config, name)
    if different := [name for name, value in model.config.to_dict().items() if told[name] != value]:
        raise listed(
            f"{source.path}: adapters of another architecture than its base has:",
            [f"{name} {reprlib.repr(told[name])}, not {getattr(model.config, name)!r}" for name in different],
        )


def _untied(source: Pretrained, model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors without a second copy of a tied embedding; UserError where the copies differ, or one is alone."""
    embedding, head = (tensors.get(name) for name in EMBEDDINGS)
    if not model.config.weight_tying or (embedding is None and head is None):
        return tensors
    assert source.adapters is not None
    if head is None and not source.adapters.get("unties"):
        return tensors
    if (
        embedding is None
        or head is None
        or embedding.shape != head.shape
        or not torch.equal(embedding.read(), head.read())
    ):
        raise UserError(
            f"{source.path}: its base has a tied head, of which it makes another than the embedding; that cannot be "
            "expressed here: train both as one"
        )
    return {name: tensor for name, tensor in tensors.items() if name != EMBEDDINGS[1]}


def _misfits(model: Any, lora: LoRA, known: Mapping[str, Place], tensors: Mapping[str, Any]) -> Iterator[str]:
    expected: dict[str, tuple[int, ...]] = {}
    for place in known.values():
        rows, width = len(place.rows), model.get_submodule(place.layer).in_features
        expected |= {f"{place.prefix}A": (lora.rank, width), f"{place.prefix}B": (rows, lora.rank)}
        expected |= {f"{place.prefix}magnitude": (rows,)} if lora.dora else {}
    yield from (f"missing: {name} {shape}" for name, shape in expected.items() if name not in tensors)
    expected |= {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, found in tensors.items():
        if name not in expected:
            yield f"unexpected: {name} {found.shape}"
        elif found.shape != expected[name]:
            yield f"wrong shape: {name} is {found.shape}, must be {expected[name]}"
        elif found.dtype not in FLOATS:
            yield f"wrong type: {name} is {found.dtype}, must hold floats of 16, 32 or 64 bits"


def _lora(source: Pretrained) -> LoRA:
    """What a file tells of its adapters; UserError where that is not to be understood."""
    assert source.adapters is not None
    told = source.adapters["lora"]
    told = told if isinstance(told, dict) else {}
    targets = told.get("targets")
    checks = {
        "rank": type(told.get("rank")) is int and told["rank"] > 0,
        "alpha": _is_number(told.get("alpha")) and told["alpha"] > 0,
        "dropout": _is_number(told.get("dropout")) and 0 <= told["dropout"] < 1,
        "scaling": told.get("scaling") in ("standard", "rank_stabilized"),
        "dora": type(told.get("dora")) is bool,
        "targets": isinstance(targets, list) and bool(targets) and all(isinstance(name, str) for name in targets),
    }
    if odd := [f"{name} {reprlib.repr(told.get(name))}" for name, is_sound in checks.items() if not is_sound]:
        raise listed(f"{source.path}: cannot be understood as adapters:", odd)
    return LoRA(**{**{name: told[name] for name in checks}, "targets": tuple(told["targets"])})


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
