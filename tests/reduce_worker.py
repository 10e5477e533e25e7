"""What is all-reduced in a step, and what compressing it changes; run under torchrun by test_world.py."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist

from sft.batches import make_batch
from sft.errors import run_program
from sft.optim import make_optimizer
from sft.step import SummedLoss, train_step
from sft.world import World, join_world, mean_sent_as_bf16
from tests.tiny import random_documents, target_weight, tiny_model

STEPS = 20
SMALLEST = 1  # MiB of a bucket, and the model has more
SHAPE = {"n_embd": 128, "d_ff": 512, "n_layer": 4}


def batches_of(world: World, *, micro_steps: int) -> tuple[list[Any], float]:
    """This rank's micro-batches of one step, and the step's target weight."""
    documents = [random_documents([50, 14], seed=number) for number in range(micro_steps * world.size)]
    mine = [make_batch([each], block_size=64, pad_id=0) for each in documents[world.rank :: world.size]]
    return mine, target_weight(list(itertools.chain(*documents)))


def reductions(world: World, *, micro_steps: int) -> list[int]:
    """How many buckets each of three steps sends."""
    count = 0

    def counted(_, bucket):  # without annotations: see World.wrap
        nonlocal count
        count += 1
        return mean_sent_as_bf16(bucket, ranks=world.size)

    model = tiny_model(**SHAPE)
    wrapped: Any = world.wrap(SummedLoss(model), bucket_mb=SMALLEST)
    wrapped.register_comm_hook(None, counted)
    optimizer = make_optimizer(model, learning_rate=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    batches, weight = batches_of(world, micro_steps=micro_steps)
    counts = []
    for _ in range(3):
        before = count
        step = {"target_weight": weight, "learning_rate": 0.0, "grad_clip": 1.0, "world": world}
        train_step(wrapped, optimizer, batches, **step)
        counts.append(count - before)
    return counts


def trajectory(world: World, compression: Any) -> tuple[list[float], list[float], list[torch.Tensor]]:
    """The losses and gradient norms of some steps, over all ranks, and the parameters of this rank at the end."""
    model = tiny_model(**SHAPE)
    wrapped = world.wrap(SummedLoss(model), bucket_mb=SMALLEST, compression=compression)
    optimizer = make_optimizer(model, learning_rate=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    batches, weight = batches_of(world, micro_steps=2)
    losses, norms = [], []
    for _ in range(STEPS):
        step = {"target_weight": weight, "learning_rate": 3e-3, "grad_clip": 1.0, "world": world}
        result = train_step(wrapped, optimizer, batches, **step)
        losses.append(world.sum(result.loss_sum).item() / weight)
        norms.append(result.grad_norm.item())
    return losses, norms, [parameter.detach() for parameter in model.parameters()]


def same_everywhere(world: World, parameters: list[torch.Tensor]) -> bool:
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    parts = [torch.empty_like(flat) for _ in range(world.size)]
    dist.all_gather(parts, flat)
    return all(torch.equal(part, flat) for part in parts)


def main(argv: list[str]) -> None:
    with join_world("cpu") as world:
        results: dict[str, Any] = {
            f"reductions of {micro_steps}": reductions(world, micro_steps=micro_steps) for micro_steps in (1, 3)
        }
        for compression in ("none", "bf16"):
            *results[compression], parameters = trajectory(world, compression)
            results[f"{compression} is the same on all ranks"] = same_everywhere(world, parameters)
        if world.is_main:
            torch.save(results, argv[0])


if __name__ == "__main__":
    run_program(main)
