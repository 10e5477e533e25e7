"""The watchdog: ends a process that gets no further, once it has told where it is, and which rank is behind."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from traceback import StackSummary, walk_stack
from types import TracebackType
from typing import Any, Self

from sft.errors import EXIT_HUNG, PeerLost, Preempted, tell_torchrun
from sft.heartbeat import Beat, heart
from sft.notices import HELPER, STORE_SECONDS, Notice, Notices, notice_of, within
from sft.world import World, is_lost_peer

STDERR = 2  # the descriptor: the main thread may hold the lock of sys.stderr
LAST_WORDS_SECONDS = 2.0  # for each of them: stderr or the disk may be what hangs
LOOKS = 10  # of the watchdog in each timeout
NOTICE_SECONDS = 1.0  # at most, between two moments at which the other ranks are told where this one is
OWN_THREADS = ("watchdog", "notices", HELPER)
MOST_NAMED = 8  # ranks
# What a thread of Python cannot end, since the interpreter's lock is never given back, is ended so much later; and
# collectives fail later than that, so that they do not come before who tells more.
LOCKED_GRACE_SECONDS = 15.0
GROUP_GRACE_SECONDS = 60.0


class Watchdog:
    """While it is entered, the process ends with EXIT_HUNG once its heart has not beaten for `timeout` seconds.

    It tells where that was, the stacks of all threads, and where the other ranks were last seen. A process whose main
    thread never gives back the interpreter's lock is ended by a thread of C, with its stacks and status 1.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.last_words: Callable[[str], Any] = lambda status: None  # writes the status of a run that hung into its log
        self.who = f"rank {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "the run"
        self._notices: Notices | None = None  # None while there is nobody to tell
        self._failure: str | None = None  # of this rank
        self._over = threading.Event()

    @property
    def group_timeout(self) -> float:
        """Seconds after which a collective may fail by itself."""
        return self.timeout + GROUP_GRACE_SECONDS

    def __enter__(self) -> Self:
        heart.begin(0)
        if not faulthandler.is_enabled():  # the stacks of a process that dies of a segmentation fault or a bus error
            faulthandler.enable(file=STDERR)
        self._arm()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if error is not None:
            error.__dict__.setdefault("place", f"{self.who} failed in {heart.last.place}")

    @contextmanager
    def among(self, world: World) -> Iterator[None]:
        """Inside, the ranks know of each other where they are, and what made one of them fail.

        An error that comes of another rank's end is raised as PeerLost.
        """
        if world.size == 1:
            yield
            return
        self._notices = Notices(world.rank, world.size)
        threading.Thread(target=self._post_often, name="notices", daemon=True).start()
        try:
            yield
        except Preempted:
            raise
        except BaseException as error:
            if lost := self.lost_peer(error):
                raise PeerLost(lost) from error
            self._failure = in_a_line(error)
            within(STORE_SECONDS, self._post)
            raise

    def lost_peer(self, error: BaseException) -> str | None:
        """What to say of an error that comes of another rank's end, with its cause if that is known; None of others.

        Said on stderr at once: torchrun ends this process soon.
        """
        if self._notices is None or not is_lost_peer(error):
            return None
        if "lost_peer" not in error.__dict__:
            causes = [f"rank {rank} {notice}" for rank, notice in self._notices.read().items() if notice.failure]
            lost = "; ".join([f"{self.who} lost another rank in {heart.last.place}", *causes])
            within(LAST_WORDS_SECONDS, lambda: say(f"error: {lost}"))
            error.__dict__["lost_peer"] = lost
        return error.__dict__["lost_peer"]

    def _arm(self) -> None:
        """From now on the thread of C counts."""
        faulthandler.dump_traceback_later(self.timeout + LOCKED_GRACE_SECONDS, exit=True, file=STDERR)

    def _watch(self) -> None:
        while True:
            beat = heart.last
            left = beat.at + self.timeout - time.monotonic()
            if left <= 0:
                self._end(beat)
            if self._over.wait(min(left, self.timeout / LOOKS)):
                return
            self._arm()

    def _post(self) -> bool:
        assert self._notices is not None
        return self._notices.post(notice_of(heart.last, failure=self._failure))

    def _post_often(self) -> None:
        while self._post() and not self._over.wait(min(self.timeout / LOOKS, NOTICE_SECONDS)):
            pass

    def _end(self, beat: Beat) -> None:
        since = datetime.fromtimestamp(time.time() - (time.monotonic() - beat.at))
        hangs = f"{self.who} hangs: in {beat.place} since {since:%H:%M:%S}, more than {self.timeout:g} s (hang_timeout)"
        within(LAST_WORDS_SECONDS, lambda: say(f"error: {hangs}", *stacks()))
        behind = list(ranks_behind(self.who, beat, self._notices.read())) if self._notices else []
        within(LAST_WORDS_SECONDS, lambda: say(*behind))
        within(LAST_WORDS_SECONDS, lambda: tell_torchrun("\n".join([hangs, *behind])))
        within(LAST_WORDS_SECONDS, lambda: self.last_words("; ".join([f"failed: hung in {beat.place}", *behind])))
        os._exit(EXIT_HUNG)


def in_a_line(error: BaseException) -> str:
    line, _, more = str(error).partition("\n")
    return type(error).__name__ + (f": {line}" if line else "") + (" ..." if more else "")


def say(*lines: str) -> None:
    """Print on stderr, whoever holds its lock."""
    os.write(STDERR, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))


def stacks() -> Iterator[str]:
    """The stack of every thread but the watchdog's own, that of the main thread last, its innermost call at the end.

    No file is read for it: the disk may be what hangs.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {ident: frame for ident, frame in sys._current_frames().items() if names.get(ident) not in OWN_THREADS}
    for ident in sorted(frames, key=lambda ident: ident == threading.main_thread().ident):
        yield f"thread {names.get(ident, ident)}:"
        calls = StackSummary.extract(walk_stack(frames[ident]), lookup_lines=False)
        yield from (f'  File "{call.filename}", line {call.lineno}, in {call.name}' for call in reversed(calls))


def ranks_behind(who: str, beat: Beat, told: Mapping[int, Notice]) -> Iterator[str]:
    """Which other ranks have not come as far as this one, those that are furthest behind first."""
    behind = sorted(
        (notice.step, notice.number, rank)
        for rank, notice in told.items()
        if (notice.step, notice.number) < (beat.step, beat.number)
    )
    for _, _, rank in behind[:MOST_NAMED]:
        yield f"rank {rank} {told[rank]}; {who} waits for it in {beat.place}"
    if len(behind) > MOST_NAMED:
        yield f"and {len(behind) - MOST_NAMED} other ranks are behind"
    if told and not behind:
        yield f"no other rank is known to be behind {who}"
