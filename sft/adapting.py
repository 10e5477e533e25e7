"""Which parameters of a model are trained: all, those of adapters, those that no pattern freezes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sft.errors import UserError
from sft.lora import AdaptedLinear, Adapter, LoRA, merge

# The linear layers of a block, and Hugging Face's names of the equal parts that their rows have there.
PARTS_OF_LLAMA = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_q": ("self_attn.q_proj",),
    "attn.c_kv": ("self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "ffn.w_gate": ("mlp.gate_proj",),
    "ffn.w_value": ("mlp.up_proj",),
    "ffn.w_out": ("mlp.down_proj",),
    "ffn.fc1": ("mlp.fc1",),
    "ffn.fc2": ("mlp.fc2",),
}
PARTS_OF_GPT2 = {
    **{ours: theirs for ours, theirs in PARTS_OF_LLAMA.items() if ours.startswith("ffn.w_")},
    "attn.c_attn": ("attn.c_attn",),
    "attn.c_q": ("attn.c_q",),
    "attn.c_kv": ("attn.c_kv",),
    "attn.c_proj": ("attn.c_proj",),
    "ffn.fc1": ("mlp.c_fc",),
    "ffn.fc2": ("mlp.c_proj",),
}
EMBEDDINGS = ("token_embeddings.weight", "lm_head.weight")
ADAPTERS_OF = ".adapters."  # between the name of a layer and that of an adapter's tensor


class Place(NamedTuple):
    """A part of a linear layer that may have an adapter."""

    name: str  # Hugging Face's, in full
    layer: str  # ours
    rows: range

    @property
    def prefix(self) -> str:
        """What the names of the adapter's tensors begin with."""
        return f"{self.layer}{ADAPTERS_OF}{self.name.rpartition('.')[2]}."


class Base(NamedTuple):
    """The model that adapters belong to, as a checkpoint tells of it."""

    path: str  # absolute
    sha256: str | None  # of its weights; None where nobody has told


class Adapted(NamedTuple):
    """What is known of an adapted model beside its tensors."""

    lora: LoRA
    base: Base | None


def places(model: Any) -> list[Place]:
    """Every part of a linear layer of the blocks, in order; a mixture of experts has none.

    As in sft/huggingface.py, learned positions give a model GPT-2's names, in which queries, keys and values are one.
    """
    is_gpt2 = model.pos_encoding is not None
    parts, stem = (PARTS_OF_GPT2, "transformer.h") if is_gpt2 else (PARTS_OF_LLAMA, "model.layers")
    found = []
    for i, block in enumerate(model.blocks):
        layers = dict(block.named_modules())
        for ours, theirs in parts.items():
            if isinstance(layer := layers.get(ours), nn.Linear):
                size = layer.out_features // len(theirs)
                rows = [range(at * size, (at + 1) * size) for at in range(len(theirs))]
                layer_name = f"blocks.{i}.{ours}"
                found += [Place(f"{stem}.{i}.{name}", layer_name, r) for name, r in zip(theirs, rows, strict=True)]
    return found


def chosen_places(model: Any, patterns: Sequence[str]) -> list[Place]:
    """Those that a pattern names. UserError for a pattern that names none."""
    known, chosen = places(model), set()
    for pattern in patterns:
        named = {place for place in known if _names(pattern, place.name) or _names(pattern, place.layer)}
        if not named:
            endings = dict.fromkeys(place.name.rpartition(".")[2] for place in known)
            raise UserError(
                f"lora_targets: {pattern!r} names no linear layer of the blocks; there are {_list(endings)}"
            )
        chosen |= named
    return [place for place in known if place in chosen]


def _names(pattern: str, name: str) -> bool:
    """Whether the pattern is of the whole name, or of its end after a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _list(names: Collection[str]) -> str:
    return ", ".join(names) or "none"


def adapt(model: Any, lora: LoRA, *, base: Base | None, seed: int | None) -> None:
    """Add adapters in the dtype of the weights, drawn from the seed (None: left empty, for what is loaded)."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    targets = set(lora.targets)
    for place in places(model):
        if place.name not in targets:
            continue
        layer = model.get_submodule(place.layer)
        if not isinstance(layer, AdaptedLinear):
            model.set_submodule(place.layer, layer := AdaptedLinear(layer).train(layer.training))
        adapter = Adapter(layer, place.rows, lora, dtype=layer.weight.dtype)
        layer.adapters[place.name.rpartition(".")[2]] = adapter
        if generator is not None and not layer.weight.is_meta:
            adapter.initialise(generator)
    for block in model.blocks:
        block.adapters_draw = lora.dropout > 0
    model.adapted = Adapted(lora, base)


def merge_adapters(model: Any) -> None:
    """Make of an adapted model a plain one, all of it trained; others stay as they are."""
    if model.adapted is not None:
        merge(model)
        for block in model.blocks:
            block.adapters_draw = False
        model.adapted = None
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def make_trainable(
    model: Any, settings: Any, *, base: Base | None, half: bool, grew: bool, say: Callable[[str], None]
) -> None:
    """Add adapters where the settings ask for them and the model has none, and freeze what is not to be trained.

    `half`: blocks compute in bfloat16, so frozen matrices are kept in it. `grew`: the vocabulary has. UserError where a
    pattern names nothing, or nothing would be trained.
    """
    if settings.lora_rank is not None:
        if model.adapted is None:
            targets = tuple(place.name for place in chosen_places(model, settings.lora_targets))
            lora = LoRA(
                rank=settings.lora_rank,
                alpha=settings.lora_alpha,
                dropout=settings.lora_dropout,
                scaling=settings.lora_scaling,
                dora=settings.lora_dora,
                targets=targets,
            )
            adapt(model, lora, base=base, seed=settings.seed)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(ADAPTERS_OF in name or (settings.train_embeddings and name in EMBEDDINGS))
    freeze(model, settings.freeze)
    if grew and not model.token_embeddings.weight.requires_grad:
        remedy = "train_embeddings=true trains them" if settings.lora_rank is not None else "freeze holds them"
        say(f"warning   the new tokens' rows are the mean of the old ones and stay so, since they are frozen; {remedy}")
    if half and settings.lora_rank is not None:
        keep_frozen_in(model, torch.bfloat16)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names, or those of modules around them, a pattern names."""
    for pattern in patterns:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        named = [name for name in trained if any(fnmatchcase(part, pattern) for part in _prefixes(name))]
        if not named:
            modules = dict.fromkeys(part for name in trained for part in _prefixes(name))
            near = difflib.get_close_matches(pattern, modules, n=3, cutoff=0.0)
            raise UserError(f"freeze: {pattern!r} names no parameter that would be trained; near it are {_list(near)}")
        for name in named:
            trained[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"freeze: nothing is left to be trained after {_list(patterns)}")


def _prefixes(name: str) -> list[str]:
    """a.b.c -> a, a.b, a.b.c"""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def keep_frozen_in(model: Any, dtype: torch.dtype) -> None:
    """Round the frozen matrices and embeddings, in which a product under autocast would round them anyway.

    What passes the embedding is widened, so that the residual stream has the precision that it has without adapters.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.dim() >= 2 and ADAPTERS_OF not in name:
            parameter.data = parameter.data.to(dtype)
    if model.token_embeddings.weight.dtype == dtype:
        model.token_embeddings.register_forward_hook(widened)


def widened(_module: nn.Module, _inputs: Any, result: Tensor) -> Tensor:
    return result.float()


def resemble(small: Any, model: Any) -> None:
    """Give a smaller model, freshly built, the adapters, the dtypes and the frozen parameters of its pattern."""
    if model.adapted is not None:
        adapt(small, model.adapted.lora, base=None, seed=0)
    for name, parameter in small.named_parameters():
        pattern = model.get_parameter(name)
        parameter.requires_grad_(pattern.requires_grad)
        parameter.data = parameter.data.to(pattern.dtype)
    if model.token_embeddings._forward_hooks:
        small.token_embeddings.register_forward_hook(widened)


def kept_state(model: Any) -> dict[str, Tensor]:
    """What a checkpoint holds of the model: all of it; of an adapted one, what its base has not."""
    if model.adapted is None:
        return model.state_dict()
    return {name: parameter.detach() for name, parameter in kept_parameters(model)}


def kept_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that kept_state is of, those of one tied tensor once."""
    for name, parameter in model.named_parameters():
        if model.adapted is None or parameter.requires_grad or ADAPTERS_OF in name:
            yield name, parameter


def matrix_values(model: nn.Module) -> tuple[int, int]:
    """How many values of matrices are trained, and how many there are."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    return sum(p.numel() for p in matrices if p.requires_grad), sum(p.numel() for p in matrices)


def trained_values(model: Any) -> str:
    """How many parameters there are, in words, and how many of them are trained where not all are."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sentence = f"{total:,} parameters"
    if model.adapted is not None:
        sentence += f", {len(model.adapted.lora.targets)} adapters of rank {model.adapted.lora.rank}"
    return sentence if trained == total else f"{sentence}, {trained:,} of them ({trained / total:.2%}) trained"
