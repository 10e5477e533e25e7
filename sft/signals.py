"""Signals that ask a run to stop: noted at once, obeyed between two steps."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Self

from sft.errors import EXIT_INTERRUPTED

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_SECONDS = 1.0  # torchrun passes on a Ctrl-C that its processes may have had from the terminal: both are one
LOOK_SECONDS = 1.0  # between two looks after torchrun
LAST_WORDS_SECONDS = 5.0  # for the log, once a second Ctrl-C has been pressed


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


class Presses:
    """Whether Ctrl-C was pressed twice, told by the signals and their times."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._same = SAME_SECONDS if started_by_torchrun() else 0.0
        # torchrun passes on the first Ctrl-C as SIGINT, the second as SIGTERM
        self._second = (signal.SIGINT, signal.SIGTERM) if started_by_torchrun() else (signal.SIGINT,)

    def is_second(self, number: int, now: float) -> bool:
        """Count a signal; True if it is another press than the first."""
        if number == signal.SIGINT and self._first is None:
            self._first = now
        return self._first is not None and number in self._second and now - self._first > self._same


class StopSignals:
    """While it is entered, SIGTERM, SIGINT and SIGUSR1 are requests to stop; a second SIGINT stops at once.

    At once: KeyboardInterrupt is raised where the main thread is, and a thread ends the process a few seconds later,
    since what waits for another rank may never come back to the interpreter. A signal that was ignored stays ignored,
    as SIGINT is in what a script starts in the background. The end of torchrun, which starts its processes in sessions
    of their own, is a request, too. The main thread alone may enter it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # the first one; SIGTERM where torchrun has gone
        self._parent = os.getppid()
        self._presses = Presses()
        self._insisted = False
        self._before: dict[signal.Signals, object] = {}
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self._heard, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._heard.settimeout(LOOK_SECONDS)
        self._fd_before = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        heeded = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: it was not Python's own, and is lost
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._fd_before)
        self._over.set()
        self._wake.close()  # the end of what the listener hears
        self._listener.join()
        self._heard.close()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        # the listener knows when they came; what waited for another rank hears of both at the same time
        if self._presses.is_second(number, time.monotonic()) or self._insisted:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        """What the interpreter's own C handler writes comes here, wherever the main thread is."""
        presses = Presses()
        while numbers := self._numbers():
            for number in numbers:
                if presses.is_second(number, time.monotonic()):
                    self._insisted = True
                    if not self._over.wait(LAST_WORDS_SECONDS):
                        os._exit(EXIT_INTERRUPTED)
                    return

    def _numbers(self) -> bytes:
        """The next signals; nothing at the end. Meanwhile torchrun is looked after."""
        while True:
            try:
                return self._heard.recv(64)
            except TimeoutError:
                if started_by_torchrun() and os.getppid() != self._parent:
                    self.received = self.received or signal.SIGTERM
