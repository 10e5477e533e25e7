"""Gradients of two micro-steps with each way to recompute; run under torchrun by test_recompute.py."""

from __future__ import annotations

import torch

from sft.batches import make_batch
from sft.errors import run_program
from sft.recompute import LEAST_FIRST
from sft.step import SummedLoss, accumulate_gradients
from sft.world import join_world
from tests.tiny import random_documents, tiny_model


def main(argv: list[str]) -> None:
    with join_world("cpu") as world:
        results = []
        for mode in LEAST_FIRST:
            model = tiny_model().train()
            model.set_dropout(0.1)
            model.activation_checkpointing = mode
            batches = [
                make_batch([random_documents([40, 20], seed=seed)], block_size=64, pad_id=0, dropout_seed=seed)
                for seed in (world.rank, 2 + world.rank)
            ]
            accumulate_gradients(world.wrap(SummedLoss(model)), batches, target_weight=100.0, world=world)
            results.append([parameter.grad for parameter in model.parameters()])
        if world.is_main:
            torch.save(results, argv[0])


if __name__ == "__main__":
    run_program(main)
