"""What the ranks of a step know of each other: all decide alike, whichever of them is odd."""

import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sft.step_facts import SHORTEST_STORY, Judge, StepFacts, facts_of
from sft.world import World

RANKS = 3


@dataclasses.dataclass(frozen=True)
class ThreadWorld(World):
    """Ranks as threads: sum() meets the others at a barrier."""

    meeting: threading.Barrier
    values: dict[int, torch.Tensor]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.values[self.rank] = values
        self.meeting.wait(10)
        total = torch.stack([self.values[rank] for rank in range(self.size)]).sum(0)
        self.meeting.wait(10)
        return total


def facts_of_all(steps: list[list[tuple[float, float, bool]]], **options: object) -> list[list[StepFacts]]:
    """What each rank knows of each step, from (loss, gradient norm, asked to stop) of each rank in each step."""
    meeting, values = threading.Barrier(RANKS), {}

    def be(rank: int) -> list[StepFacts]:
        world = ThreadWorld(rank=rank, size=RANKS, device=torch.device("cpu"), meeting=meeting, values=values)
        judge, known = Judge(world, **options), []
        for number, of_ranks in enumerate(steps):
            loss, norm, stop = of_ranks[rank]
            numbers = torch.tensor(loss).double(), torch.tensor(norm)
            known.append(facts_of(number, judge.judge(*numbers, target_weight=6.0, stop=stop).told.tolist()))
        return known

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(be, range(RANKS)))


@pytest.mark.parametrize("odd", range(RANKS))
def test_all_ranks_skip_where_the_loss_of_one_is_not_finite_and_all_know_whose(odd):
    # the gradient is the same on all ranks, and clipped to something finite by whoever computes it
    step = [(math.nan if rank == odd else 4.0, 1.0, False) for rank in range(RANKS)]
    for (facts,) in facts_of_all([step]):
        assert facts.is_skipped
        assert facts.non_finite_ranks == [odd]


@pytest.mark.parametrize("odd", range(RANKS))
def test_all_ranks_skip_where_the_loss_of_one_leaps(odd):
    story = [
        [(4.0 + 0.1 * math.sin(step + rank), 1.0, False) for rank in range(RANKS)] for step in range(SHORTEST_STORY)
    ]
    leap = [(40.0 if rank == odd else 4.0, 1.0, False) for rank in range(RANKS)]
    known = facts_of_all([*story, leap], spike_sigma=6.0, skip_spikes=True)
    for of_rank in known:
        assert [facts.is_skipped for facts in of_rank] == [False] * SHORTEST_STORY + [True]
        assert of_rank == known[0]


@pytest.mark.parametrize("asked", range(RANKS))
def test_all_ranks_stop_after_the_step_in_which_one_is_asked_to(asked):
    step = [(4.0, 1.0, rank == asked) for rank in range(RANKS)]
    quiet = [(4.0, 1.0, False)] * RANKS
    for of_rank in facts_of_all([quiet, step]):
        assert [facts.stop for facts in of_rank] == [False, True]
        assert of_rank[1].loss == 2.0
