"""What each rank last told of itself, kept in the store at which the ranks have met."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from sft.heartbeat import Beat

HELPER = "within"  # the name of a thread that does what may take too long
STORE_SECONDS = 2.0  # for a connection, and for an answer
Result = TypeVar("Result")


@dataclass(frozen=True)
class Notice:
    """One rank at one moment."""

    step: int
    number: int  # of its beats in that step
    place: str
    since: float  # time.time() of its last beat
    told: float  # time.time() of the notice
    failure: str | None = None  # what ends it

    def __str__(self) -> str:
        if self.failure:
            return f"failed in {self.place}: {self.failure}"
        silent, stuck = time.time() - self.told, self.told - self.since
        return f"was last seen {silent:.0f} s ago in {self.place}, where it had been for {stuck:.0f} s"


def notice_of(beat: Beat, *, failure: str | None = None) -> Notice:
    now = time.time()
    return Notice(beat.step, beat.number, beat.place, now - (time.monotonic() - beat.at), now, failure)


def within(seconds: float, act: Callable[[], Result]) -> Result | None:
    """The result of act(), run by a thread of its own; None where it failed, or is not done in time."""
    results: list[Result] = []

    def keep() -> None:
        try:
            results.append(act())
        except Exception:
            return  # who asks has no time for the reason

    thread = threading.Thread(target=keep, name=HELPER, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


class Notices:
    """The newest notice of each rank, in the store by which they have met: MASTER_ADDR and MASTER_PORT of torchrun."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self._store: dist.Store | None = None

    def post(self, notice: Notice) -> bool:
        """Replace the notice of this rank; False where there is no store any more. One that hangs is waited for."""
        try:
            self._store = self._store or connect()
            self._store.set(str(self.rank), json.dumps(asdict(notice)))
        except RuntimeError:
            return False
        return True

    def read(self) -> dict[int, Notice]:
        """By rank: of all others, as far as they are to be had in time."""
        found: dict[int, Notice] = {}

        def look() -> None:
            store = connect()  # of its own: post() may be waiting on the other one
            for rank in range(self.size):
                if rank != self.rank and store.check([str(rank)]):
                    found[rank] = Notice(**json.loads(store.get(str(rank))))

        within(STORE_SECONDS, look)
        return dict(found)


def connect() -> dist.Store:
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=STORE_SECONDS)
    store = dist.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=limit)
    # the same store serves all attempts of torchrun's, and other jobs
    job = [os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT")]
    return dist.PrefixStore("/".join(["notices", *job]), store)
