"""The phases of a run: a name for profiles, for what fails inside, and for what hangs."""

from __future__ import annotations

from types import TracebackType
from typing import Literal

import torch

from sft.heartbeat import heart

Phase = Literal["loading", "warm-up", "batch", "forward", "backward", "optimizer", "evaluation", "saving"]


class phase:
    """A context manager: a range of this name in profiles, and the name on every error that leaves it.

    Its beginning and its end are progress; the heart stays where an error has left it.
    """

    def __init__(self, name: Phase):
        self.name = name
        self.range = torch.profiler.record_function(name)

    def __enter__(self) -> None:
        self.outer = heart.last.phase
        heart.beat(self.name)
        self.range.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.range.__exit__(kind, error, traceback)
        if error is None:
            heart.beat(self.outer)
        else:
            error.__dict__.setdefault("phases", []).append(self.name)


def phases_of(error: BaseException) -> list[Phase]:
    """The phases in which an error was raised, the innermost first."""
    return list(error.__dict__.get("phases", []))
