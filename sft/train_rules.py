"""Which values of the trainer's settings can be used, alone and together."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterator
from typing import Any

from sft.continuity import CHANGEABLE, GROUPS
from sft.hub import is_name

# names of numbers, their range in words, and the range
RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("block_size batch_size gradient_accumulation_steps rows_per_step", "above 0", lambda value: value > 0),
    ("max_iters max_epochs learning_rate lr_decay_iters grad_clip", "above 0", lambda value: value > 0),
    ("eval_interval eval_rows log_interval save_interval keep_checkpoints", "above 0", lambda value: value > 0),
    ("max_skipped_steps spike_sigma hang_timeout ddp_bucket_mb", "above 0", lambda value: value > 0),
    ("lora_rank lora_alpha", "above 0", lambda value: value > 0),
    (
        "seed min_lr warmup_iters weight_decay log_save_seconds router_aux_loss_coef",
        "0 or more",
        lambda value: value >= 0,
    ),
    ("dropout beta1 beta2 ema_decay lora_dropout", "at least 0 and below 1", lambda value: 0 <= value < 1),
    ("seed", "below 2**63", lambda value: value < 2**63),
    ("block_size max_epochs hang_timeout", "at most ten million", lambda value: value <= 10**7),
)


def contradictions(settings: Any) -> Iterator[tuple[str, str]]:
    """(setting, what is wrong with it) for every value that cannot be used; `model` is left to who knows models."""
    yield from wrong_places(settings)
    yield from wrong_numbers(settings)
    if (settings.max_iters is None) == (settings.max_epochs is None):
        yield "max_iters", "set max_iters or max_epochs: one of the two, the other none"
    if settings.rows_per_step is not None and settings.gradient_accumulation_steps is not None:
        yield "rows_per_step", "rows_per_step already decides gradient_accumulation_steps; set one of the two"
    if settings.skip_spikes and settings.spike_sigma is None:
        yield "skip_spikes", "skip_spikes needs spike_sigma, which says what a spike is"
    if settings.lora_rank is not None and settings.checkpoint_path is None:
        yield "lora_rank", "lora_rank needs checkpoint_path: adapters belong to a base that was trained"
    if settings.untrained_rows == "mean" and settings.lora_rank is not None and not settings.train_embeddings:
        yield "untrained_rows", "untrained_rows=mean needs train_embeddings: adapters are saved without the base's rows"
    for name in ("train_embeddings", "lora_dora"):
        if getattr(settings, name) and settings.lora_rank is None:
            yield name, f"{name} needs lora_rank; without it everything is trained that freeze does not name"
    if not settings.lora_targets:
        yield "lora_targets", "lora_targets must name linear layers; '*' is all of them"
    for name in settings.allow_change:
        if name not in (*CHANGEABLE, *GROUPS):
            yield "allow_change", f"allow_change: {name!r} is not among {', '.join((*CHANGEABLE, *GROUPS))}"


def wrong_places(settings: Any) -> Iterator[tuple[str, str]]:
    """Of files and folders."""
    if (settings.checkpoint_path is None) == (settings.model is None):
        yield "checkpoint_path", "set checkpoint_path or model: one of the two, the other none"
    path = settings.checkpoint_path
    if path is not None and not os.path.exists(path) and not is_name(path):
        yield "checkpoint_path", f"checkpoint_path {path!r} does not exist"
    if not settings.out_dir:
        yield "out_dir", "out_dir must name a folder"
    if not os.path.isdir(settings.sft_data_dir):
        yield "sft_data_dir", f"sft_data_dir {settings.sft_data_dir!r} does not exist; write it with prepare_sft.py"


def wrong_numbers(settings: Any) -> Iterator[tuple[str, str]]:
    """Of numbers, alone and against each other."""
    for names, words, holds in RANGES:
        for name in names.split():
            if (value := getattr(settings, name)) is not None and not holds(value):
                yield name, f"{name} must be {words}, not {value}"
    if settings.min_lr > settings.learning_rate:
        yield "min_lr", f"min_lr {settings.min_lr} is above learning_rate {settings.learning_rate}"
    decay = settings.lr_decay_iters
    if decay is not None and decay < settings.warmup_iters:
        yield "lr_decay_iters", f"lr_decay_iters {decay} ends before warmup_iters {settings.warmup_iters}"
