"""Batches made ahead: while the model computes one, a thread reads, builds, pins and copies the next ones."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


class Made(NamedTuple):
    """What the thread hands over: an item, or the error that came in its place; neither at the end."""

    item: Any = None
    error: BaseException | None = None
    copied: torch.cuda.Event | None = None  # passed when all copies to the GPU have been done


class Ahead(Iterator[Item], Generic[Item]):
    """The items of an iterator in their order, of which a thread makes at most `depth` before they are asked for.

    An error of the iterator is raised where its item would have come. On CUDA the thread works on a stream of its own:
    an item's tensors (see `tensors_of`) are waited for by the stream on which it is asked for, not by the host.
    """

    def __init__(self, items: Iterator[Item], *, device: torch.device, depth: int = 2):
        self._items, self._device = items, device
        self._room = threading.Semaphore(depth)
        self._made: queue.SimpleQueue[Made] = queue.SimpleQueue()
        self._closed = False
        # a daemon: a process that dies without close() does not wait for it
        self._thread = threading.Thread(target=self._make_all, name="batches ahead", daemon=True)
        self._thread.start()

    def __next__(self) -> Item:
        if self._closed:
            raise StopIteration
        made = self._made.get()
        self._room.release()
        if made.error is not None:
            self.close()
            raise made.error
        if made.item is None:
            self.close()
            raise StopIteration
        if made.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(made.copied)
            for tensor in tensors_of(made.item):
                if tensor.is_cuda:  # its memory is the other stream's, to be reused when this one is done
                    tensor.record_stream(stream)
        return made.item

    def close(self) -> None:
        """End the thread, and wait until it has ended; what was made and not asked for is dropped."""
        self._closed = True
        self._room.release()
        self._thread.join()

    def _make_all(self) -> None:
        on_gpu = self._device.type == "cuda"
        try:
            with contextlib.ExitStack() as place:
                stream = None
                if on_gpu:
                    place.enter_context(torch.cuda.device(self._device))  # a new thread begins on device 0
                    stream = torch.cuda.Stream(self._device)
                    place.enter_context(torch.cuda.stream(stream))
                while self._has_room():
                    item = next(self._items, None)
                    self._made.put(Made(item, copied=None if stream is None else stream.record_event()))
                    if item is None:
                        return
        except BaseException as error:  # whatever it is, the thread that asks for the item shall know
            self._made.put(Made(error=error))

    def _has_room(self) -> bool:
        self._room.acquire()
        return not self._closed


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in a dataclass, what it has cached included, in a tuple, a list or a dict, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        yield from tensors_of(vars(value))
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_of(part)
