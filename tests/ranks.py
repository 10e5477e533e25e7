"""Runs in processes of their own that need no time to start: a server that has imported PyTorch forks them."""

import gc
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

import train_sft
from sft import interruption
from sft.errors import UserError, run_program

LIMIT_SECONDS = 120.0  # for a run of a few steps
EXIT_BROKEN, EXIT_REFUSED = 1, 2
LATE_IMPORTS = ("torch._dynamo", "torch.distributed.fsdp")  # of DistributedDataParallel and the optimizer: seconds

Main = Callable[[list[str]], None]


def run_ranks(processes: int, argv: Sequence[str], *, main: Main = train_sft.main) -> list[int | None]:
    """The exit status of each rank of `main(argv)`: 0 where it returned, 2 after a UserError, 1 after anything else.

    Negative where a signal killed it; None where it had to be killed, since it did not end in time.
    """
    context, port = server(), free_port()
    ranks = [
        context.Process(target=be_rank, args=(main, list(argv)), kwargs={"rank": r, "size": processes, "port": port})
        for r in range(processes)
    ]
    for each in ranks:
        each.start()
    return [status_of(each) for each in ranks]


def run_program_until(
    main: Main, argv: Sequence[str], is_moment: Callable[[str], bool], number: signal.Signals
) -> interruption.Ended:
    """As sft.interruption.run_until, for main(argv) as a program of one process."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = server().Process(target=be_program, args=(main, list(argv), writer))
    process.start()
    writer.close()
    lines: list[str] = []
    signalled_at = None
    with open(os.dup(reader.fileno())) as output:
        for line in output:
            lines.append(line.rstrip("\n"))
            if signalled_at is None and is_moment(line):
                signalled_at = lines[-1]
                assert process.pid is not None
                os.kill(process.pid, number)
    status = status_of(process)
    assert status is not None, lines
    return interruption.Ended(status, lines, signalled_at)


def be_program(main: Main, argv: list[str], output: Connection) -> None:
    """What a shell does for a program."""
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    torch.set_num_threads(1)
    gc.freeze()
    sys.argv[1:] = argv
    run_program(main)


def server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_sft", *LATE_IMPORTS])
    return context


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
