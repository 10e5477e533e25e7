"""What makes a resumed run the same run; what else may change, on request and by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sft.arrays import PreparedData
from sft.packing import PACKING_VERSION

# Settings that decide which numbers come out; all others decide how fast, how often, or where.
OF_THE_ORDER = ("seed", "block_size")
OF_THE_SCHEDULE = ("learning_rate", "min_lr", "lr_schedule", "warmup_iters")
OF_THE_UPDATE = (
    "weight_decay",
    "beta1",
    "beta2",
    "grad_clip",
    "dropout",
    "skip_spikes",
    "ema_decay",
    "router_aux_loss_coef",
)
OF_THE_ADAPTERS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_scaling", "lora_dora")
OF_WHAT_IS_TRAINED = (*OF_THE_ADAPTERS, "train_embeddings", "freeze")  # which the optimizer's state is of: it stays
SETTINGS = (*OF_THE_ORDER, *OF_THE_SCHEDULE, *OF_THE_UPDATE, *OF_WHAT_IS_TRAINED)
# What runs had that began before there was the setting; of others nothing is known.
BEFORE: dict[str, Any] = {"ema_decay": None, "router_aux_loss_coef": None, "lora_rank": None, "freeze": []}
CHANGEABLE = (
    *OF_THE_ORDER,
    *OF_THE_SCHEDULE,
    *OF_THE_UPDATE,
    "data",
    "template",
    "tokenizer",
    "decay",
)
# One name for several of them, or for what needs none any more.
GROUPS = {"schedule": (*OF_THE_SCHEDULE, "decay"), "rows_per_step": ()}


def identity(data: PreparedData, *, rows_per_step: int, world_size: int, decay: int | None) -> dict[str, Any]:
    """What a checkpoint tells of its run beside the settings; `decay`: at which step the learning rate is min_lr."""
    return {
        "data_fingerprint": data.fingerprint,
        "tokenizer_fingerprint": data.meta["tokenizer_fingerprint"],
        "template": data.meta["template"],
        "packing_version": PACKING_VERSION,
        "rows_per_step": rows_per_step,
        "world_size": world_size,
        "decay": decay,
    }


def differences(
    saved: Mapping[str, Any], settings: Any, now: Mapping[str, Any], *, allowed: Collection[str]
) -> Iterator[str]:
    """What is not as in the run that wrote `saved`, in words; `now` is this run's identity.

    Left out is what the caller allows, and what old checkpoints do not tell. Another number of rows in a step is no
    difference: the rows that come next are the same.
    """
    allowed = {*allowed, *(name for group in allowed for name in GROUPS.get(group, ()))}
    # checkpoints of the first packing do not tell
    if (packing := saved.get("packing_version", 1)) != PACKING_VERSION:
        yield (
            f"its rows were packed by version {packing} of the packing, this program has version {PACKING_VERSION}; "
            "go on with the program that wrote it, or start from it with --checkpoint_path"
        )
    then = saved["config"]
    if then.get("model") != settings.model:
        yield f"model: the run was started with {then.get('model')}, not with {settings.model}"
    if saved.get("tokenizer_fingerprint", now["tokenizer_fingerprint"]) != now["tokenizer_fingerprint"]:
        if "tokenizer" not in allowed:
            yield f"tokenizer: {settings.sft_data_dir} was prepared with another one"
    elif saved.get("template", now["template"]) != now["template"]:
        if "template" not in allowed:
            yield f"template: {settings.sft_data_dir} has {now['template']}, the run began with {saved['template']}"
    elif saved["data_fingerprint"] != now["data_fingerprint"] and "data" not in allowed:
        yield f"data: {settings.sft_data_dir} holds other data than the run was started with"
    for name in SETTINGS:
        value = getattr(settings, name)
        value = list(value) if isinstance(value, tuple) else value  # as a checkpoint has it
        was = then.get(name, BEFORE.get(name, value))
        if name not in allowed and was != value:
            yield f"{name}: the run was started with {was}, not with {value}"
    if saved.get("decay", now["decay"]) != now["decay"] and "decay" not in allowed:
        yield (
            f"decay: the learning rate was to reach its end at step {saved['decay']}, not {now['decay']}; "
            f"lr_decay_iters={saved['decay']} keeps that"
        )


def rows_of_a_step(settings: Any, *, world_size: int, saved: Mapping[str, Any] | None) -> int:
    """rows_per_step, or what batch_size and gradient_accumulation_steps come to.

    A resumed run on another number of ranks keeps the rows of its steps: the accumulation follows.
    """
    if settings.rows_per_step is not None:
        return settings.rows_per_step
    product = ("rows_per_step", "batch_size", "gradient_accumulation_steps")
    of_other_size = saved is not None and saved.get("world_size", world_size) != world_size
    if saved and of_other_size and all(saved["config"].get(name) == getattr(settings, name) for name in product):
        return saved["rows_per_step"]
    return settings.batch_size * (settings.gradient_accumulation_steps or 1) * world_size
