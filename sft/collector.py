"""Python's garbage collector, which would look through every object of the program in the middle of a step."""

from __future__ import annotations

import gc


class QuietCollector:
    """No collection by itself between start() and stop(), only where collect() is called.

    Reference counts free nearly everything at once; what is left are cycles, and a step makes none of tensors. What is
    there at the start is looked at no more, so that collect() takes as long as what came after it is large.
    """

    def __init__(self) -> None:
        self._quiet = False

    def start(self) -> None:
        assert not self._quiet
        self._quiet, self._was_enabled = True, gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()

    def collect(self) -> None:
        """Do what was held back, if anything was."""
        if self._quiet:
            gc.collect()

    def stop(self) -> None:
        """As it was before start(); nothing where it was not started."""
        if self._quiet:
            self._quiet = False
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()
