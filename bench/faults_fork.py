"""Programs in forked children: to their end, with their file operations counted, or with one that goes wrong."""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bench.faults_pairs import END, Operation, Pair
from bench.faults_watch import Watch


class Ended(NamedTuple):
    """How a child ended: its exit status, or minus the signal; and all that it said. `hung`: it had to be ended."""

    status: int
    output: str
    hung: bool = False


def in_child(act: Callable[[], object], output: Path, *, seconds: float = 60) -> Ended:
    """Run act() in a forked child, whose words go to the file `output`; SystemExit is its exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        gc.freeze()  # a collection looks through the child's own objects only
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  # a killed child has said its words
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            act()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(status)
    descriptor = os.pidfd_open(child)
    try:
        hung = not select.select([descriptor], [], [], seconds)[0]
        if hung:
            os.kill(child, signal.SIGKILL)
        _, state = os.waitpid(child, 0)
    finally:
        os.close(descriptor)
    return Ended(os.waitstatus_to_exitcode(state), output.read_text(errors="replace"), hung)


def operations_of(act: Callable[[], object], folder: Path, work: Path) -> list[Operation]:
    """Every operation of act() below `folder`, in order, and its end; AssertionError where it does not end well."""
    counted = work / "operations.json"

    def count() -> None:
        watch = Watch(folder, work / "shadow")
        watch.install()
        try:
            act()
        except SystemExit as stop:
            if stop.code:
                raise
        watch.remove()
        counted.write_text(json.dumps(watch.seen))

    ended = in_child(count, work / "output.txt")
    assert ended.status == 0, ended
    return [Operation(*each) for each in json.loads(counted.read_text())] + [Operation(END, "", 0)]


def disturbed(act: Callable[[], object], pair: Pair, folder: Path, work: Path, *, seconds: float = 60) -> Ended:
    """Run act() in a child in which the pair's operation goes wrong."""

    def run() -> None:
        watch = Watch(folder, work / "shadow", pair)
        watch.install()
        try:
            act()
        finally:
            if pair.operation.kind == END:
                watch.die(pair.mode)

    return in_child(run, work / "output.txt", seconds=seconds)
