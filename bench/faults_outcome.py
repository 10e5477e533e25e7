"""What a test of bench/faults.py comes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One line of the table: how many cases were provoked, and what became of them."""

    test: str  # what was done
    must: str  # what it must show
    cases: int  # distinct ones
    least: int  # so many cases are promised
    failures: tuple[str, ...] = ()  # one sentence for each case that went wrong: lost, undetected, unequal, too late
    counts: dict[str, Any] = field(default_factory=dict)  # whatever else was counted
    seconds: float = 0.0

    @property
    def is_met(self) -> bool:
        return not self.failures and self.cases >= self.least

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.is_met}


class Fault(NamedTuple):
    """A test of the table: run(empty folder, short) -> its outcome; `short` is the form that `make test` has."""

    name: str
    run: Callable[[Path, bool], Outcome]
