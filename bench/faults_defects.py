"""Each defect of bench/defects.py is put into a copy of the tree, where its test must fail; without, it must pass."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from bench.defects import DEFECTS, Defect
from bench.faults_outcome import Fault, Outcome

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = 2
PASSED, FAILED = 0, 1  # pytest's exit statuses
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "out", "data", "results")
SHORT = ("the file is not synced", "each rank decides alone whether its loss is finite")


class Workbench:
    """A copy of the tree, and the process that runs tests in it."""

    def __init__(self, folder: Path):
        self.tree, self.output = folder / "tree", folder / "pytest.txt"
        shutil.copytree(ROOT, self.tree, ignore=LEFT_OUT)
        self.process = subprocess.Popen(
            [sys.executable, str(self.tree / "bench" / "fresh_pytest.py"), str(self.tree)],
            env={**os.environ, "PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.defect: Defect | None = None  # that is in the tree now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, defect: Defect | None, tests: Sequence[str]) -> None:
        """Begin to run the tests with the defect in the tree."""
        self.defect = defect
        if defect is not None:
            (self.tree / defect.file).write_text(broken(defect), encoding="utf-8")
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"tests": list(tests), "output": str(self.output)}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What pytest said; the tree is whole again."""
        assert self.process.stdout is not None
        told = json.loads(self.process.stdout.readline())
        if self.defect is not None:
            shutil.copyfile(ROOT / self.defect.file, self.tree / self.defect.file)
        return told

    def last_words(self) -> str:
        return " / ".join(self.output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:])


def run_defects(folder: Path, short: bool) -> Outcome:
    """All defects, two at a time; then, once for all, their tests without any."""
    started, failures = time.monotonic(), []
    defects = [defect for defect in DEFECTS if not short or defect.name in SHORT]
    failures = [f"{defect.name}: {problem}" for defect in defects for problem in cannot_be_put(defect)]
    put = [defect for defect in defects if not list(cannot_be_put(defect))]
    tests = sorted({defect.test for defect in put})
    jobs: list[tuple[Defect | None, list[str]]] = [(defect, [defect.test]) for defect in put]
    at_once = 1 if short else AT_ONCE
    jobs += [(None, tests[part::at_once]) for part in range(at_once)]
    seconds: dict[str, float] = {}
    for defect, told, took, words in run_jobs(jobs, folder, at_once=at_once):
        name = defect.name if defect else "no defect"
        seconds[name] = round(took, 1)
        if told["elsewhere"]:
            failures.append(f"{name}: not of the copy were {', '.join(told['elsewhere'][:3])}")
        if told["status"] != (FAILED if defect else PASSED):
            outcome = "its test passed" if told["status"] == PASSED else f"pytest ended with {told['status']}: {words}"
            failures.append(f"{name}: {outcome}")
    return Outcome(
        test="defects put into our own code: no fsync, writing in place, no CRC, mean of means, a leak of the RNG, ...",
        must="each caught by its test, which passes without it",
        cases=len(put),
        least=len(defects),
        failures=tuple(failures),
        counts={"tests": len(tests), "seconds of each": seconds},
        seconds=time.monotonic() - started,
    )


def run_jobs(
    jobs: Sequence[tuple[Defect | None, list[str]]], folder: Path, *, at_once: int
) -> Iterator[tuple[Defect | None, dict[str, Any], float, str]]:
    """Each defect with pytest's answer, the seconds that it took, and its last words."""
    waiting = list(jobs)
    with ExitStack() as stack:
        free = [stack.enter_context(Workbench(folder / f"bench_{number}")) for number in range(at_once)]
        busy: dict[int, tuple[Workbench, float]] = {}
        while waiting or busy:
            while waiting and free:
                workbench = free.pop()
                workbench.ask(*waiting.pop(0))
                assert workbench.process.stdout is not None
                busy[workbench.process.stdout.fileno()] = workbench, time.monotonic()
            for ready in select.select(list(busy), [], [])[0]:
                workbench, began = busy.pop(ready)
                told = workbench.answer()
                yield workbench.defect, told, time.monotonic() - began, workbench.last_words()
                free.append(workbench)


def cannot_be_put(defect: Defect) -> Iterator[str]:
    """Why a defect is none: its text is not in the file once, or what is put there is no Python."""
    text = (ROOT / defect.file).read_text(encoding="utf-8")
    for old, _ in defect.changes:
        if (count := text.count(old)) != 1:
            yield f"{defect.file} holds {count} times what is to be changed: {old.strip()[:80]!r}"
            return
    try:
        compile(broken(defect), defect.file, "exec")
    except SyntaxError as error:
        yield f"{defect.file} is no Python with it: {error}"
    if not (ROOT / defect.test.partition("::")[0]).exists():
        yield f"there is no {defect.test}"


def broken(defect: Defect) -> str:
    """The file with the defect."""
    text = (ROOT / defect.file).read_text(encoding="utf-8")
    for old, new in defect.changes:
        text = text.replace(old, new)
    return text


DEFECT = Fault("defects", run_defects)
