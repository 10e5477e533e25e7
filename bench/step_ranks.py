"""One rank of the comparison of DDP with a single process: both take turns in the same processes, one thread each.

Started by bench/step_extra.py with torchrun's environment. Rank 0 prints the seconds of each turn as a line of JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench.step_inputs import load_samples
from bench.step_tasks import OURS, SETS
from bench.step_worker import Work
from sft.batches import TrainLoader
from sft.optim import make_optimizer
from sft.step import SummedLoss, train_step
from sft.world import World

CPU = torch.device("cpu")
ROWS_PER_RANK = 2  # of a step
ALONE = World(rank=0, size=1, device=CPU)


class Trainer:
    """A model of its own with its optimizer and its rows, in a world of one or of all ranks."""

    def __init__(self, work: Work, world: World, *, wrapped: bool):
        from bench.step_providers_ours import PAD, SEED, RowStream, make_model

        model = make_model(work)
        self.world, self.work = world, work
        self.loss: nn.Module = SummedLoss(model)
        if wrapped:  # as World.wrap does for more than one rank
            ranked = world.wrap(self.loss)
            single = ranked is self.loss
            self.loss = DistributedDataParallel(self.loss, gradient_as_bucket_view=True) if single else ranked
        self.optimizer = make_optimizer(model, learning_rate=1e-4, betas=(0.9, 0.95), weight_decay=0.01)
        self.loader = TrainLoader(
            work.samples,
            RowStream(work.samples.lengths, block_size=work.task.row, seed=SEED),
            batch_size=1,
            rows_per_step=ROWS_PER_RANK * world.size,
            rank=world.rank,
            world_size=world.size,
            pad_id=PAD,
            seed=SEED,
            device=CPU,
        )
        self.taken = itertools.count()

    def turn(self, steps: int) -> float:
        """The seconds of so many steps."""
        begin = time.perf_counter()
        for number in itertools.islice(self.taken, steps):
            step = self.loader.step(number, rows_seen=number * self.loader.rows_per_step)
            train_step(
                self.loss,
                self.optimizer,
                step.batches,
                target_weight=step.target_weight,
                learning_rate=1e-4,
                grad_clip=1.0,
                world=self.world,
            )
        return time.perf_counter() - begin


def main(argv: list[str]) -> None:
    task_set, name, inputs, rounds, steps = argv
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    task = next(task for task in SETS[task_set] if task.name == name)
    work = Work(task, OURS, load_samples(Path(inputs)), CPU, {"rows": 1}, None)
    alone = Trainer(work, ALONE, wrapped=False) if rank == 0 else None
    ranked = Trainer(work, World(rank=rank, size=size, device=CPU), wrapped=True)
    for trainer in (alone, ranked):
        if trainer is not None:
            trainer.turn(1)
    for _ in range(int(rounds)):
        dist.barrier()
        one = alone.turn(int(steps)) if alone is not None else 0.0
        dist.barrier()
        all_of_them = ranked.turn(int(steps))
        if rank == 0:
            print(json.dumps({"alone": one, "ranked": all_of_them}), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # a thread of the group may abort an orderly end


if __name__ == "__main__":
    main(sys.argv[1:])
