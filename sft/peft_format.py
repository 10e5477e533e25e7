"""Adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors in a folder, in and out."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sft.errors import UserError, listed
from sft.files import write_whole
from sft.huggingface import FLOATS, StoredTensor
from sft.safetensors_header import read_header
from sft.untrusted import MEBIBYTE, leads_out, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LARGEST_CONFIG = MEBIBYTE
STEM = "base_model.model."  # before each of Transformers' names
TENSOR = re.compile(r"(.+)\.(?:lora_(A|B)\.weight|lora_(magnitude)_vector)")
WHOLE = {
    "model.embed_tokens": "token_embeddings.weight",
    "transformer.wte": "token_embeddings.weight",
    "lm_head": "lm_head.weight",
}
KNOWN = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "modules_to_save", "bias"),
    # of which a finished adapter shows nothing, or what only chooses layers
    *("init_lora_weights", "megatron_core"),
    *("fan_in_fan_out", "ensure_weight_tying", "layers_to_transform", "layers_pattern", "exclude_modules"),
    *("peft_version", "qalora_group_size"),
}


BEGINNINGS = (None, True, False, "gaussian", "eva")  # init_lora_weights that leave the base as it is


def is_peft_folder(path: Path) -> bool:
    """Whether it holds an adapter, and no model beside it."""
    return (path / CONFIG).is_file() and not any((path / name).is_file() for name in ("config.json", "ckpt.pt"))


def read(folder: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """What a checkpoint of ours calls "lora" and "base", and the tensors: `{Hugging Face's name of the part}.A`.

    UserError with every option of PEFT that cannot be expressed here.
    """
    config = _read_config(folder)
    if problems := list(_unsupported(config)):
        raise listed(f"{folder / CONFIG}: this adapter cannot be used here:", problems)
    tensors = _read_tensors(folder)
    targets = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors if name not in WHOLE.values()))
    if problems := list(_missing(config, tensors, targets)):
        raise listed(f"{folder / WEIGHTS}: does not hold what {CONFIG} tells:", problems)
    lora = {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
        "scaling": "rank_stabilized" if config.get("use_rslora") else "standard",
        "dora": config.get("use_dora") or False,
        "targets": targets,
    }
    base = {"path": config.get("base_model_name_or_path"), "sha256": None}
    unties = not config.get("ensure_weight_tying")  # a tied head stays as it was where only the embedding is trained
    return {"lora": lora, "base": base, "unties": unties}, tensors


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / CONFIG, most=LARGEST_CONFIG)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: holds a {type(config).__name__}, not an object")
    return config


def _unsupported(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {reprlib.repr(config.get('peft_type'))}; only 'LORA' is known"
        return
    if config.get("bias", "none") != "none":
        yield f"bias {reprlib.repr(config['bias'])}: biases are not trained beside adapters; only 'none' is supported"
    if (beginning := config.get("init_lora_weights")) not in BEGINNINGS:
        yield f"init_lora_weights {reprlib.repr(beginning)} has changed the base; have PEFT convert the adapter first"
    whole = config.get("modules_to_save") or []
    endings = {name.rpartition(".")[2] for name in WHOLE}
    for name in whole if isinstance(whole, list) else [whole]:
        if not isinstance(whole, list) or not isinstance(name, str) or name.rpartition(".")[2] not in endings:
            yield f"modules_to_save holds {reprlib.repr(name)}; only {', '.join(sorted(endings))} are supported"
    for name in ("r", "lora_alpha"):
        if type(config.get(name)) not in (int, float):
            yield f"{name} must be a number, not {reprlib.repr(config.get(name))}"
    for name, value in config.items():
        if name not in KNOWN and value not in (None, False, [], {}) and name != "megatron_config":
            yield f"{name} {reprlib.repr(value)} is not supported"


def _read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors by our names of what they are."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{folder}: holds {CONFIG} but no {WEIGHTS}; other formats are not read")
    if leads_out(folder, file):
        raise UserError(f"{file}: leads to {file.resolve()}, out of its folder; put the file itself there")
    tensors, odd = {}, []
    for name, entry in read_header(file).items():
        within = name.removeprefix(STEM)
        if (whole := WHOLE.get(within.removesuffix(".weight"))) and within.endswith(".weight"):
            ours = whole
        elif match := TENSOR.fullmatch(within):
            ours = f"{match[1]}.{match[2] or match[3]}"
        else:
            odd.append(f"{name} {list(entry.shape)} is neither of a linear layer's adapter nor of embeddings or head")
            continue
        tensors[ours] = StoredTensor(entry.shape, FLOATS.get(entry.dtype, entry.dtype), name, file)
    if odd:
        raise listed(f"{file}: holds what cannot be used here:", odd)
    return tensors


def _missing(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], targets: Sequence[str]) -> Iterator[str]:
    """Halves of adapters without their others, and target modules that no adapter is of."""
    kinds = ("A", "B", "magnitude") if config.get("use_dora") else ("A", "B")
    for name in targets:
        yield from (f"missing: {kind} of {name}" for kind in kinds if f"{name}.{kind}" not in tensors)
    told = config.get("target_modules")
    for ending in told if isinstance(told, list) else []:
        if not any(name == ending or name.endswith(f".{ending}") for name in targets):
            yield f"missing: adapters of {reprlib.repr(ending)}, a target module"
    if not targets:
        yield "missing: any adapter"
    for name in config.get("modules_to_save") or []:
        if not any(WHOLE[each] in tensors for each in WHOLE if each == name or each.endswith(f".{name}")):
            yield f"missing: {name}, a module to save"


def write(
    folder: Path,
    lora: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    base: str,
    known: Sequence[str],
) -> None:
    """Save adapters for PEFT: `tensors` as read gives them, `known` all parts that the base has, `base` its place.

    The configuration is written last: without it there is no adapter.
    """
    gpt2 = known[0].startswith("transformer.")
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        ours: theirs for theirs, ours in WHOLE.items() if theirs.startswith("transformer.") == gpt2 or "." not in theirs
    }
    named, whole = {}, []
    for name, tensor in tensors.items():
        part, _, kind = name.rpartition(".")
        if name in names:
            whole.append(names[name].rpartition(".")[2])
            theirs = f"{names[name]}.weight"
        else:
            theirs = f"{part}.lora_magnitude_vector" if kind == "magnitude" else f"{part}.lora_{kind}.weight"
        named[f"{STEM}{theirs}"] = tensor.detach().cpu().contiguous().clone()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "use_rslora": lora["scaling"] == "rank_stabilized",
        "use_dora": lora["dora"],
        "target_modules": target_modules(lora["targets"], known),
        "modules_to_save": whole or None,
        "bias": "none",
        "fan_in_fan_out": gpt2,
        "inference_mode": True,
    }
    (folder / CONFIG).unlink(missing_ok=True)
    partial = folder / f"{WEIGHTS}.partial"
    save_file(named, partial, metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_whole(folder / CONFIG, lambda file: file.write(text.encode()))


def target_modules(targets: Sequence[str], known: Sequence[str]) -> list[str]:
    """Endings that name these parts of the known ones and no others; all in full where no endings do."""
    endings = sorted({name.rpartition(".")[2] for name in targets})
    named = {name for name in known if name.rpartition(".")[2] in endings}
    return endings if named == set(targets) else sorted(targets)
