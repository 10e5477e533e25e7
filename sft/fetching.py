"""A base model from the hub for all ranks of a run: fetched by one process of each machine."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

from sft import hub
from sft.checkpoint import numbered_checkpoints
from sft.config import Resolved
from sft.heartbeat import heart
from sft.world import World

LOOKS_EVERY = 0.2  # seconds between two moments at which the ranks ask each other whether all is there
Settings = TypeVar("Settings", bound=Any)


def with_local_base(resolved: Resolved[Settings], world: World) -> tuple[Resolved[Settings], Settings]:
    """(the settings to record, those to work with): where checkpoint_path names a model of the hub, that is fetched.

    Recorded is the name with the commit, so that a run log repeats its run anywhere; the work is done in the cache's
    folder. A run that goes on from a checkpoint needs no base. Every rank must call it.
    """
    settings = resolved.settings
    name = settings.checkpoint_path
    if name is None or not hub.is_name(name):
        return resolved, settings
    resumes = settings.resume != "never"
    if world.on_main(lambda: resumes and bool(numbered_checkpoints(settings.out_dir))):
        return resolved, settings
    folder = fetched(name, world)
    recorded = hub.pinned(name, folder)
    world.agree(f"the commits of {name}", recorded)
    world.print(f"hub      {recorded} in {folder}")
    work = dataclasses.replace(settings, checkpoint_path=str(folder))
    return resolved._replace(settings=dataclasses.replace(settings, checkpoint_path=recorded)), work


def fetched(name: str, world: World) -> Path:
    """The folder of a model, which the first rank of each machine brings into its cache while the others wait."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    world.print(f"hub      fetching {name}")
    task = beside(lambda: fetch_model(name)) if is_first else None
    # asked again and again, so that no rank waits long for another one
    while world.any(task is not None and bool(wait([task], LOOKS_EVERY).not_done)):
        heart.beat()
    first = world.together(lambda: task.result() if task else None)
    return world.together(lambda: first or fetch_model(name, only_cached=True))


def fetch_model(name: str, *, only_cached: bool = False) -> Path:
    return hub.fetch(name, setting="checkpoint_path", files=hub.MODEL_FILES, only_cached=only_cached)


def beside(act: Callable[[], Path]) -> Future[Path]:
    """What act() comes to, at work in a thread that nobody waits for at the program's end."""
    future: Future[Path] = Future()

    def work() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="hub", daemon=True).start()
    return future
