"""The ranks of a run as separate processes that need no time to start: a server that has PyTorch already forks them."""

import gc
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess

import torch

import train_sft
from sft.errors import UserError

LIMIT_SECONDS = 120.0  # for a run of a few steps
EXIT_BROKEN, EXIT_REFUSED = 1, 2
LATE_IMPORTS = ("torch._dynamo", "torch.distributed.fsdp")  # of DistributedDataParallel and the optimizer: seconds

Main = Callable[[list[str]], None]


def run_ranks(processes: int, argv: Sequence[str], *, main: Main = train_sft.main) -> list[int | None]:
    """The exit status of each rank of `main(argv)`: 0 where it returned, 2 after a UserError, 1 after anything else.

    Negative where a signal killed it; None where it had to be killed, since it did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_sft", *LATE_IMPORTS])
    port = free_port()
    ranks = [
        context.Process(target=be_rank, args=(main, list(argv)), kwargs={"rank": r, "size": processes, "port": port})
        for r in range(processes)
    ]
    for each in ranks:
        each.start()
    return [status_of(each) for each in ranks]


def status_of(process: BaseProcess) -> int | None:
    process.join(LIMIT_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def be_rank(main: Main, argv: list[str], *, rank: int, size: int, port: int) -> None:
    """What torchrun tells a process by its environment, and the program."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    gc.freeze()  # what the server has made is never garbage
    status = 0
    try:
        main(argv)
    except UserError as error:
        print(error)
        status = EXIT_REFUSED
    except Exception:
        traceback.print_exc()
        status = EXIT_BROKEN
    sys.stdout.flush()
    os._exit(status)  # as run_program does: threads of the process group may outlive it


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
