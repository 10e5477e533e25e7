"""train_sft.py to which something happens: `faulty_run.py WHAT POINT RANK STEP arguments...`, alone or under torchrun.

Real signals and real errors, in one rank (or -1, all), at its first call of what POINT names in step STEP, and only in
torchrun's first attempt.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import sft.run
import train_sft
from sft.errors import run_program
from sft.heartbeat import heart
from sft.step import SummedLoss

POINTS: dict[str, tuple[Any, str]] = {
    "forward": (SummedLoss, "forward"),  # of training
    "evaluation": (SummedLoss, "forward"),
    "saving": (sft.run, "save_checkpoint"),
    "start": (train_sft, "build_model"),
}


def fail() -> None:
    raise ValueError("something of the programmer's")


def interrupt_twice() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)


def interrupt_parent_twice() -> None:
    """From a session of its own, since torchrun sends to all processes of ours what it is sent."""
    twice = f"kill -INT {os.getppid()}; sleep 2; kill -INT {os.getppid()}"
    subprocess.Popen(["sh", "-c", twice], start_new_session=True)
    nap()


def nap() -> None:
    time.sleep(float(os.environ.get("NAP", "3")))


WHAT: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "int": lambda: os.kill(os.getpid(), signal.SIGINT),
    "usr1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "parent-term": lambda: os.kill(os.getppid(), signal.SIGTERM),
    "parent-int": lambda: os.kill(os.getppid(), signal.SIGINT),
    "parent-usr1": lambda: os.kill(os.getppid(), signal.SIGUSR1),
    "parent-kill": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "parent-usr1-nap": lambda: (os.kill(os.getppid(), signal.SIGUSR1), nap()),
    "parent-kill-nap": lambda: (os.kill(os.getppid(), signal.SIGKILL), nap()),
    "parent-term-nap": lambda: (os.kill(os.getppid(), signal.SIGTERM), nap()),
    "int-twice": interrupt_twice,
    "parent-int-twice-nap": interrupt_parent_twice,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(600),
    "gil": lambda: ctypes.PyDLL(None).sleep(600),  # what PyDLL calls keeps the interpreter's lock
    "raise": fail,
    "nap": nap,
}


def main(argv: list[str]) -> None:
    what, point, rank, step, *arguments = argv
    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if is_first and os.environ.get("RANK", "0") in (rank, rank.replace("-1", os.environ.get("RANK", "0"))):
        owner, name = POINTS[point]
        original, happened = getattr(owner, name), []

        def faulty(*positional: Any, **named: Any) -> Any:
            fits = heart.last.step == int(step) and heart.last.phase != "warm-up"
            if point in ("forward", "evaluation"):
                fits &= positional[0].training == (point == "forward")
            if fits and not happened:
                happened.append(True)
                WHAT[what]()
            return original(*positional, **named)

        setattr(owner, name, faulty)
    train_sft.main(arguments)


if __name__ == "__main__":
    run_program(main)
