"""What a step of training takes of a GPU's memory, with adapters and without: the trainer's own estimate, part by part.

PYTHONPATH=. python bench/lora_memory.py      (needs no GPU: the step is played on tensors without content)

Rows are full of documents of 512 tokens, of which half are trained; the blocks compute in bfloat16, and everything is
computed again in the backward pass (activation_checkpointing=full). The measurement is of this machine's CPU: the peak
of a process that takes two steps in fp32, less what it had before the model was built.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import resource
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from model_builder import ConfigurableGPT
from model_config import PRESETS, ModelArchitectureConfig
from sft.adapting import kept_parameters, make_trainable
from sft.batches import Batch, Document, make_batch
from sft.config import load_settings
from sft.dry_run import checkpoint_bytes
from sft.errors import run_program
from sft.loss import Loss
from sft.memory import Workload, estimate
from sft.optim import make_optimizer
from sft.samples import NOT_TRAINED
from sft.step import SummedLoss, train_step
from sft.world import World

WAYS: dict[str, dict[str, Any]] = {
    "full": {"lora_rank": None},
    "adapters of rank 16": {"lora_rank": 16},
    "adapters of rank 16, embeddings": {"lora_rank": 16, "train_embeddings": True},
}
DOCUMENT = 512
MEASURED = {"n_layer": 8, "n_head": 8, "n_embd": 512, "vocab_size": 32_000, "block_size": 1024}


@dataclass(frozen=True, kw_only=True)
class LoraMemory:
    """Every knob of this benchmark."""

    models: str = "qwen3-0.6b,qwen3-1.7b,qwen3-8b"  # presets
    block_size: int = 2048  # tokens in a row
    batch_size: int = 4  # rows in a micro-step
    out: str = "bench/results/lora_memory.json"


def main(argv: list[str]) -> None:
    settings = load_settings(LoraMemory, argv).settings
    models = {}
    for name in settings.models.split(","):
        models[name] = {way: estimated(PRESETS[name], way, settings) for way in WAYS}
        for way, told in models[name].items():
            print(f"{name:<14} {way:<34} {told['bytes'] / 2**30:7.1f} GiB, {told['trained']:>14,} trained")
    measured = {way: measured_bytes(way) for way in WAYS}
    for way, size in measured.items():
        print(
            f"on this CPU    {way:<34} {size['measured'] / 2**20:7.0f} MiB, estimated {size['estimated'] / 2**20:.0f}"
        )
    result = {
        "command": "PYTHONPATH=. python bench/lora_memory.py",
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "block_size": settings.block_size,
        "batch_size": settings.batch_size,
        "activation_checkpointing": "full",
        "models": models,
        "measured_on_a_cpu": {"model": MEASURED, "ways": measured},
    }
    Path(settings.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def model_for(config: ModelArchitectureConfig, way: str, *, half: bool, device: str) -> ConfigurableGPT:
    with torch.device(device):
        model = ConfigurableGPT(config)
    knobs = {"lora_alpha": 16.0, "lora_dropout": 0.0, "lora_targets": ("*",), "lora_scaling": "standard"}
    knobs |= {"lora_dora": False, "train_embeddings": False, "freeze": (), "seed": 1, **WAYS[way]}
    make_trainable(model, SimpleNamespace(**knobs), base=None, half=half, grew=False, say=print)
    return model


def rows(*, count: int, block_size: int, vocabulary: int) -> Batch:
    random = np.random.default_rng(0)
    documents = []
    for _ in range(block_size // DOCUMENT):
        ids = random.integers(0, vocabulary, DOCUMENT)
        documents.append(Document(ids, np.where(np.arange(DOCUMENT) < DOCUMENT // 2, NOT_TRAINED, ids)))
    return make_batch([documents] * count, block_size=block_size, pad_id=0)


def estimated(config: ModelArchitectureConfig, way: str, settings: LoraMemory) -> dict[str, Any]:
    """Of one GPU, without what CUDA itself takes."""
    model = model_for(config, way, half=True, device="meta")
    model.set_attention("varlen")
    work = Workload(
        model=model,
        batch=rows(count=settings.batch_size, block_size=settings.block_size, vocabulary=config.vocab_size),
        loss=Loss("torch", ""),
        autocast_dtype=torch.bfloat16,
        micro_steps=2,
        world=World(rank=0, size=1, device=torch.device("cpu")),  # without content it is all the same
    )
    parts = {part: size for part, size in estimate(work, "full").parts.items() if part != "program"}
    return {
        "bytes": sum(parts.values()),
        "parts": parts,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "checkpoint_bytes": checkpoint_bytes(model),
        "model_bytes_in_a_checkpoint": sum(p.nbytes for _, p in kept_parameters(model)),
    }


def measured_bytes(way: str) -> dict[str, int]:
    """The peak of a process of its own, and its estimate."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(take_steps, (way,))


def take_steps(way: str) -> dict[str, int]:
    torch.set_num_threads(1)
    config = ModelArchitectureConfig.from_dict(MEASURED)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    batch = rows(count=1, block_size=config.block_size, vocabulary=config.vocab_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = model_for(config, way, half=False, device="cpu").train()
    loss = Loss("torch", "")
    work = Workload(model=model, batch=batch, loss=loss, autocast_dtype=None, micro_steps=1, world=world)
    found = estimate(work, "none")
    optimizer = make_optimizer(model, learning_rate=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(2):
        train_step(
            SummedLoss(model, loss=loss),
            optimizer,
            [batch],
            target_weight=float(batch.trained_tokens),
            learning_rate=1e-4,
            grad_clip=1.0,
            world=world,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"measured": peak - before, "estimated": found.total - found.parts.get("program", 0)}


if __name__ == "__main__":
    run_program(main)
