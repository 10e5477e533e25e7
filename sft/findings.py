"""Checks of which one that fails does not stop the others, so that all that is wrong is told at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sft.errors import EXIT_BAD_INPUT, UserError, listed
from sft.world import World

Result = TypeVar("Result")


class Missing(Exception):
    """A check asked for the result of another one that has failed."""


class Findings:
    """What several checks have found wrong, the same on every rank. Every rank must call each method."""

    def __init__(self, world: World):
        self.world = world
        self.errors: list[UserError] = []

    def together(self, check: Callable[[], Result]) -> Callable[[], Result]:
        """Run check() on every rank; what is given back is to be called for its result.

        A UserError on any rank is kept, and there is no result on all of them; nor is there one where check() asks for
        another result that is not there.
        """
        return self._kept(check, self.world.together)

    def on_main(self, check: Callable[[], Result]) -> Callable[[], Result]:
        """The same, with check() run by the main rank alone and its result sent to all."""
        return self._kept(check, self.world.on_main)

    def settle(self) -> None:
        """UserError with all that was found, on every rank, if there is anything."""
        messages = list(dict.fromkeys(str(error).replace("\n", "\n  ") for error in self.errors))
        if len(messages) == 1:
            raise self.errors[0]
        if messages:
            statuses = {error.exit_status for error in self.errors}
            status = EXIT_BAD_INPUT if EXIT_BAD_INPUT in statuses else min(statuses)
            raise UserError(str(listed("the run cannot start:", messages)), exit_status=status)

    def _kept(
        self, check: Callable[[], Result], run: Callable[[Callable[[], list[Result]]], list[Result]]
    ) -> Callable[[], Result]:
        def attempt() -> list[Result]:
            try:
                return [check()]
            except Missing:
                return []

        try:
            results = run(attempt)
        except UserError as error:
            self.errors.append(error)
            results = []

        def result() -> Result:
            if not results:
                raise Missing
            return results[0]

        return result
