"""Ranks that torchrun starts again: its store outlives them, and holds the addresses of those that have died."""

import os
import signal
import time
from multiprocessing.process import BaseProcess

import pytest
import torch
import torch.distributed as dist

from sft.world import join_world
from tests.ranks import server

AGENT = {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def meet(rank: int, attempt: int, port: int) -> None:
    """Join a world of two and count its ranks; the first attempt is killed after that."""
    os.environ.update({**AGENT, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    os.environ.update({"MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": str(attempt)})
    dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False).set(f"rank {rank} in {attempt}", "starts")
    with join_world("cpu", timeout=15) as world:
        ranks = world.sum(torch.ones(1)).item()
        if attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    os._exit(0 if ranks == 2 else 1)


def start(rank: int, attempt: int, port: int) -> BaseProcess:
    process = server().Process(target=meet, args=(rank, attempt, port))
    process.start()
    return process


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_meet_each_other_and_not_the_dead_ones():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    killed = [start(rank, 0, store.port) for rank in (0, 1)]
    for process in killed:
        process.join(60)
    assert [process.exitcode for process in killed] == [-signal.SIGKILL] * 2
    for key in store.list_keys():
        store.set(key, "what the dead have left")  # so that who reads it fails always, and not now and then
    second = start(1, 1, store.port)
    store.wait(["rank 1 in 1"])
    time.sleep(0.5)  # it looks for rank 0 before that is there
    first = start(0, 1, store.port)
    for process in (first, second):
        process.join(20)
        process.kill()
    assert [first.exitcode, second.exitcode] == [0, 0]
