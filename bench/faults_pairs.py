"""Operations on files, the ways in which one of them can go wrong, and which of all these pairs are tried."""

from __future__ import annotations

from typing import NamedTuple

MODES = ("kill", "torn", "power cut", "power cut, names lost", "ENOSPC", "ENOSPC once", "EIO", "EIO once")
KILLING = MODES[:4]
GROWING = ("create", "write", "truncate", "fsync", "replace", "link", "mkdir")  # what a full disk may refuse
END = "end"  # the kind of the operation that comes after all others: none


class Operation(NamedTuple):
    """The `ordinal`-th operation of a kind on files of a role, which is a name with N for its numbers."""

    kind: str
    role: str
    ordinal: int

    def __str__(self) -> str:
        return f"{self.kind} {self.role} #{self.ordinal}"


class Pair(NamedTuple):
    """An operation, and the way in which it goes wrong.

    kill: SIGKILL before it; after it is before the next one. torn: half of the bytes are written, then SIGKILL.
    power cut: SIGKILL, and no file has what was written since its last fsync. Names are as they were left, or, where
    names are lost too, as at the last fsync of their folder. ENOSPC, EIO: that error from here to the end of the
    program; of ENOSPC the first write is cut in half, and what needs no room is done. once: the first time only.
    """

    operation: Operation
    mode: str

    def __str__(self) -> str:
        return f"{self.mode} at {self.operation}"


def modes_of(kind: str) -> tuple[str, ...]:
    """The ways in which an operation of this kind can go wrong."""
    if kind == END:
        return ("power cut", "power cut, names lost")
    if kind == "open":
        return ("kill", "EIO once")
    return tuple(
        mode for mode in MODES if (mode != "torn" or kind == "write") and ("ENOSPC" not in mode or kind in GROWING)
    )


def spread(operations: list[Operation], count: int | None) -> list[Pair]:
    """About `count` of all pairs (None = all), of every kind, role and mode, evenly over the ordinals.

    Every operation comes first with one of its modes, in turn; then every write is torn, then come others.
    """
    starts = list(dict.fromkeys((operation.kind, operation.role) for operation in operations))
    turned = []
    for operation in operations:
        pairs = [Pair(operation, mode) for mode in modes_of(operation.kind)]
        first = (operation.ordinal + starts.index((operation.kind, operation.role))) % len(pairs)
        turned.append(pairs[first:] + pairs[:first])
    first_of_each = [pairs[0] for pairs in turned]
    if count is not None and count <= len(first_of_each):
        return evenly(first_of_each, count)
    rest = [pair for pairs in turned for pair in pairs[1:]]
    torn, others = ([pair for pair in rest if (pair.mode == "torn") == is_torn] for is_torn in (True, False))
    missing = len(others) if count is None else count - len(first_of_each) - len(torn)
    return [*first_of_each, *torn, *evenly(others, max(0, min(missing, len(others))))]


def evenly(pairs: list[Pair], count: int) -> list[Pair]:
    return [pairs[i * len(pairs) // count] for i in range(count)]
