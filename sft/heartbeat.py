"""How far this process has come: told by the run as it goes, read by whoever must say where it hangs or failed."""

from __future__ import annotations

import time
from typing import NamedTuple


class Beat(NamedTuple):
    """One sign of progress."""

    at: float  # time.monotonic()
    step: int  # the step that is being taken, or the last one; 0 before the first
    number: int  # of the signs since that step began: ranks that take the same way give the same ones
    phase: str  # "" between phases

    @property
    def place(self) -> str:
        """In words: step 12 (forward)."""
        where = f"step {self.step}" if self.step else "start-up"
        return f"{where} ({self.phase})" if self.phase else where


class Heart:
    """The last beat of this process; beaten by its main thread, read by any."""

    def __init__(self) -> None:
        self.last = Beat(time.monotonic(), 0, 0, "")

    def begin(self, step: int) -> None:
        """A step begins; 0: the run does."""
        self.last = Beat(time.monotonic(), step, 0, "")

    def beat(self, phase: str | None = None) -> None:
        """Something was done. `phase`: what comes now, unless it goes on."""
        _, step, number, before = self.last
        # replaced whole: another thread sees one beat or the next
        self.last = Beat(time.monotonic(), step, number + 1, before if phase is None else phase)


heart = Heart()
