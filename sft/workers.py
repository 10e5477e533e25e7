"""A pool of processes that share one state and give their results back in order."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from sft.errors import EXIT_FAILED, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_state: Any = None  # of a worker process


class Workers:
    """`count` processes with a copy of `state`; with a count of 1 the calling process does the work itself."""

    def __init__(self, state: Any, count: int):
        self.state, self.count = state, count
        self._pool: ProcessPoolExecutor | None = None

    def map(self, function: Callable[[Any, Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """function(state, item) for each item, in order; two items per process are under way at most.

        The function must be one of a module's own. Processes start with the second item.
        """
        waiting: deque[Future[Result]] = deque()
        source = iter(items)
        first = list(itertools.islice(source, 2))
        if self.count == 1 or len(first) < 2:
            for item in itertools.chain(first, source):
                yield function(self.state, item)
            return
        try:
            for item in itertools.chain(first, source):
                if len(waiting) == 2 * self.count:
                    yield waiting.popleft().result()
                waiting.append(self.pool.submit(_call, function, item))
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, perhaps for want of memory; try fewer --workers", exit_status=EXIT_FAILED
            ) from error
        finally:
            for future in waiting:
                future.cancel()

    @property
    def pool(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Forked processes have the state at once. Elsewhere system libraries do not survive a fork.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self._pool = ProcessPoolExecutor(self.count, context, _set_state, (self.state,))
        return self._pool

    def __enter__(self) -> Workers:
        self._collects = gc.isenabled()
        gc.disable()  # a chunk makes many objects and no cycles; forked processes begin like this
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._collects:
            gc.enable()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _set_state(state: Any) -> None:
    global _state  # noqa: PLW0603  # what makes a worker of a process
    _state = state
    gc.disable()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker would wait for ever for the next item of a process that was killed, and hold its files open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(EXIT_FAILED)


def _call(function: Callable[[Any, Item], Result], item: Item) -> Result:
    return function(_state, item)
