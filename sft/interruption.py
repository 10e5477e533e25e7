"""Programs that are started, and ended by a signal at a moment that their output tells."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """A program that is over, with all the processes that it had started."""

    status: int
    output: list[str]  # lines of stdout and stderr together
    signalled_at: str | None  # the line after which the signal was sent


def run(command: Sequence[str]) -> Ended:
    """Run a program to its end."""
    return run_until(command, lambda _: False, signal.SIGTERM)


def run_until(command: Sequence[str], is_moment: Callable[[str], bool], number: signal.Signals) -> Ended:
    """Run a program, and send it a signal after the first line that is the moment for it.

    SIGKILL goes to all processes that the program has started, too; any other is for the program to pass on.
    """
    lines: list[str] = []
    signalled_at = None
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:  # until no process is left that could write
            lines.append(line.rstrip("\n"))
            if signalled_at is None and is_moment(line):
                signalled_at = lines[-1]
                if number == signal.SIGKILL:
                    kill_all(process.pid)
                else:
                    process.send_signal(number)
        return Ended(process.wait(), lines, signalled_at)
    finally:
        if process.poll() is None:  # an exception is on its way
            kill_all(process.pid)
            process.wait()


def kill_all(pid: int) -> None:
    """End a process at once, and all that it has started."""
    for each in (pid, *descendants(pid)):
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have; none where there is no /proc to tell."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for each in found:  # which grows meanwhile
        found.extend(children.get(each, []))
    return found[1:]
