"""Files with mutated headers, given to everything that loads files: refused, or loaded as exactly what they say.

Each mutant is loaded in a forked child, many to a child. What ends a child (a crash, a hang, memory) is the fault of
the mutant that it was at. A load may end in one UserError that names the file, or give what the file held before it was
changed, or what an independent reader finds in it now (bench/header_readings.py). All else is a failure: another
exception, other values, memory in proportion to nothing, a program that was run, a file that was written.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch

from bench.faults_fork import in_child
from bench.faults_outcome import Fault, Outcome
from bench.header_mutations import Mutant, Target
from bench.header_readings import Unreadable
from bench.header_targets_data import data_targets
from bench.header_targets_weights import weight_targets
from sft.errors import UserError

LEAST = 5000
AT_ONCE = 100  # mutants of a child
SHORT = 40  # mutants of each target in the short form
CPU_SECONDS = 10.0  # for one mutant, which needs a few milliseconds
SECONDS = 180.0  # for all of a child
MEMORY = 4 << 30  # bytes of address space that a child may come to have more
RESIDENT = 256 << 20  # bytes of memory that loading files of a few kilobytes may touch
LONGEST_MESSAGE = 10_000  # characters: one value may be shown whole, not all that a file holds
REFUSED, AS_BEFORE, AS_IT_SAYS, WRONG, BROKE = "refused", "as before", "as it says", "silently wrong", "broke"
STARTS_PROGRAMS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
)


class Verdict(NamedTuple):
    """What became of one mutant."""

    what: str
    verdict: str
    detail: str = ""


def run(folder: Path, short: bool) -> Outcome:
    started = time.monotonic()
    torch.set_num_threads(1)
    made = folder / "made"
    made.mkdir()
    counts: dict[str, dict[str, int]] = {}
    failures: list[str] = []
    cases = 0
    for number, target in enumerate((*weight_targets(made), *data_targets(made))):
        wanted = SHORT if short else target.wanted
        mutants = distinct(target, Random(number), wanted)
        found = Counter[str]()
        for verdict in verdicts(target, mutants, folder / "work"):
            found[verdict.verdict] += 1
            if verdict.verdict in (WRONG, BROKE):
                failures.append(f"{target.name}: {verdict.what}: {verdict.verdict}: {verdict.detail}")
        counts[target.name] = dict(found)
        cases += found.total()
    return Outcome(
        test="mutated headers of safetensors, index, .pt, .npy and JSON files",
        must=f">= {LEAST:,}; 0 crashes, 0 silent wrong loads",
        cases=cases,
        least=SHORT * len(counts) if short else LEAST,
        failures=tuple(failures),
        counts=counts,
        seconds=time.monotonic() - started,
    )


HEADERS = Fault("headers", run)


def distinct(target: Target, draw: Random, count: int) -> list[Mutant]:
    """So many mutants that differ from the original and from each other."""
    found: dict[tuple[Any, ...], Mutant] = {}
    for mutant in target.mutants(draw):
        key = tuple(mutant.files.items())
        if any(target.files.get(name) != content for name, content in key):
            found.setdefault(key, mutant)
        if len(found) == count:
            break
    return list(found.values())


def verdicts(target: Target, mutants: Sequence[Mutant], folder: Path) -> Iterator[Verdict]:
    """What becomes of each; a child that ends too early has met its end by the mutant that it was at."""
    waiting = list(mutants)
    while waiting:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        batch, told, said = waiting[:AT_ONCE], folder.with_suffix(".jsonl"), folder.with_suffix(".txt")
        told.unlink(missing_ok=True)
        ended = in_child(partial(judge_all, target, batch, folder, told), said, seconds=SECONDS)
        assert told.exists(), ended  # else the original does not load
        found = [Verdict(*json.loads(line)) for line in told.read_text(encoding="utf-8").splitlines()]
        if len(found) < len(batch):
            found.append(Verdict(batch[len(found)].what, BROKE, f"ended with status {ended.status}: {ended.output}"))
        yield from found
        waiting = waiting[len(found) :]


def judge_all(target: Target, mutants: Sequence[Mutant], folder: Path, told: Path) -> None:
    """Write a verdict for each as a line of JSON, as soon as it is known."""
    address_space = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()
    watch = Watch()
    for name, content in target.files.items():
        (folder / name).write_bytes(content)
    original = target.load(folder)
    with open(told, "w", encoding="utf-8") as file:
        sys.addaudithook(watch.see)
        for mutant in mutants:
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            for name in mutant.files:
                put(folder / name, mutant.files[name])
            with watch:
                verdict = judge(target, mutant, folder, original)
            if watch.seen:
                verdict = Verdict(mutant.what, BROKE, ", ".join(watch.seen))
            file.write(json.dumps(verdict) + "\n")
            file.flush()
            for name in mutant.files:
                put(folder / name, target.files.get(name))


def put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)


class Watch:
    """Notes, while it is entered, what a load must not do: start programs, write files, touch much memory."""

    def __init__(self) -> None:
        self.is_on, self.seen, self.before = False, list[str](), 0

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event in STARTS_PROGRAMS:
            self.seen.append(f"{event} {arguments!r:.100}")
        elif (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            self.seen.append(f"opened {arguments[0]!r:.100} for writing")

    def __enter__(self) -> None:
        self.seen, self.is_on, self.before = [], True, most_resident()

    def __exit__(self, *_: object) -> None:
        self.is_on = False
        if (more := most_resident() - self.before) > RESIDENT:
            self.seen.append(f"{more >> 20} MiB of memory")


def most_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def judge(target: Target, mutant: Mutant, folder: Path, original: Any) -> Verdict:
    try:
        found = target.load(folder)
    except UserError as error:
        problem = message_problem(str(error), folder)
        return Verdict(mutant.what, BROKE if problem else REFUSED, problem)
    except BaseException as error:  # a library's panic is no Exception
        lines = traceback.format_exception(error)
        return Verdict(mutant.what, BROKE, " ".join(" ".join(lines[-2:]).split())[:600])
    if found == original:
        return Verdict(mutant.what, AS_BEFORE)
    if target.read is None:
        return Verdict(mutant.what, WRONG, "loaded with other values")
    try:
        said = target.read(folder)
    except Exception as error:
        kind = "" if isinstance(error, Unreadable) else f"{type(error).__name__} "
        return Verdict(mutant.what, WRONG, f"loaded, but cannot be read: {kind}{error}")
    return Verdict(mutant.what, AS_IT_SAYS) if found == said else Verdict(mutant.what, WRONG, difference(found, said))


def message_problem(message: str, folder: Path) -> str:
    """What keeps a message from being one that people can use; empty for nothing."""
    # what is missing from settings is of no file
    if str(folder) not in message and not message.startswith("the settings cannot be used:"):
        return f"the message names no file: {message[:200]}"
    return f"a message of {len(message):,} characters" if len(message) > LONGEST_MESSAGE else ""


def difference(found: Any, said: Any) -> str:
    """The first part in which they differ."""
    if isinstance(found, (list, tuple)) and isinstance(said, (list, tuple)) and len(found) == len(said):
        return next((difference(*pair) for pair in zip(found, said, strict=True) if pair[0] != pair[1]), "nothing")
    if isinstance(found, dict) and isinstance(said, dict):
        keys = [key for key in itertools.chain(found, said) if found.get(key) != said.get(key)]
        return f"{keys[0]}: {found.get(keys[0])!r:.100}, not {said.get(keys[0])!r:.100}" if keys else "their keys"
    return f"{found!r:.200}, not {said!r:.200}"
