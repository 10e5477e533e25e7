"""What torchrun makes of a run that is stopped, killed, frozen or broken: it ends in time, says who, and goes on.

Every case is a real torchrun with two ranks; tests/faulty_run.py is train_sft.py to which something happens in one rank
at one step. After it has ended, the same run is started again without the fault, and compared with one that had none.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.faults_outcome import Fault, Outcome
from bench.faults_ranks import LOOK_SECONDS, prepare_data, run_arguments, run_to_end
from bench.faults_result import Result, compare, result_of

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
STEP = 7  # in which it happens; the newest checkpoint is that of step 6
HANG_SECONDS = 12  # hang_timeout; a busy machine may take long to start
SHUTDOWN_SECONDS = 30  # until torchrun kills the ranks left that SIGTERM does not end; it has no setting
LIMIT_SECONDS = 90.0  # from the start of a case to its end; beyond that, torchrun is killed
AT_ONCE = 3  # one of them sleeps most of the time
SETTINGS: dict[str, Any] = {"log_interval": 1, "resume": "auto"}


class Case(NamedTuple):
    """What happens to a run, and what torchrun has to make of it."""

    name: str
    fault: str  # what happens, at which point, in which rank: as tests/faulty_run.py has it
    says: tuple[str, ...]  # patterns that the output has
    seconds: float = 20.0  # from the fault to the end of the last process
    step: int = STEP
    status: str = "failed"  # finished, failed or preempted: of the run log; torchrun's exit status is 0 if finished
    torchrun: tuple[str, ...] = ()
    hang_timeout: int = 60


CASES = (  # the one that takes longest is the first
    Case(
        "a rank stopped by SIGSTOP",
        "stop forward 1",
        (rf"rank 0 hangs: .*step {STEP}", rf"rank 1 was last seen .* rank 0 waits for it in step {STEP}"),
        seconds=HANG_SECONDS + SHUTDOWN_SECONDS + 15,
        hang_timeout=HANG_SECONDS,
    ),
    Case(
        "kill -9 of a rank with --max-restarts=1",
        "kill forward 1",
        (rf"rank 0 lost another rank in step {STEP}",),
        seconds=60.0,
        status="finished",
        torchrun=("--max-restarts=1",),
    ),
    Case("SIGTERM to torchrun", "parent-term forward 0", (r"stopped by a signal after step \d+",), status="preempted"),
    Case("kill -9 of a rank", "kill forward 1", (rf"rank 0 lost another rank in step {STEP}", "exitcode +: -9")),
    Case(
        "exception in forward", "raise forward 1", (rf"rank 1 failed in step {STEP} \(forward\)", "of the programmer")
    ),
    Case("exception in save", "raise saving 0", (r"rank 0 failed in step 9 \(saving\)", "of the programmer"), step=9),
)
SHORT_CASES = ("exception in forward",)


class Ended(NamedTuple):
    """How a case ended."""

    status: int | None  # None: it had to be killed
    output: str
    seconds: float  # from the fault on


class Running:
    """A case under way."""

    def __init__(self, case: Case, arguments: Sequence[str], folder: Path):
        folder.mkdir(parents=True)
        self.case, self.output = case, folder / "torchrun.txt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
        command += [*case.torchrun, str(ROOT / "tests" / "faulty_run.py"), *case.fault.split(), str(case.step)]
        with open(self.output, "wb") as file:
            self.process = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.started = time.monotonic()
        self.fault_at: float | None = None  # None while the step before it has not been told of

    def look(self) -> Ended | None:
        """None while it goes on."""
        now, output = time.monotonic(), self.output.read_text(encoding="utf-8", errors="replace")
        if self.fault_at is None and re.search(rf"^step +{self.case.step - 1}/\d+  loss", output, re.MULTILINE):
            self.fault_at = now
        status = self.process.poll()
        if status is None and now - self.started < LIMIT_SECONDS:
            return None
        self.close()
        return Ended(status, output, now - (self.fault_at or self.started))

    def close(self) -> None:
        """Kill torchrun and its ranks, which have sessions of their own, where they are still there."""
        for child in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self.process.wait()


def run_torchrun(folder: Path, short: bool) -> Outcome:
    """All cases, some at a time; then each is started again without its fault, and compared."""
    started, data = time.monotonic(), prepare_data(folder / "data")
    out_dir = folder / "whole" / "out"
    statuses = run_to_end(run_arguments(data, out_dir, **SETTINGS), size=RANKS, outputs=folder / "whole")
    assert statuses == [0] * RANKS, statuses
    whole = result_of(out_dir)
    cases = [case for case in CASES if not short or case.name in SHORT_CASES]
    # all of them first: nothing else shall take time while they are watched
    ended = dict(run_cases(cases, data, folder))
    failures = []
    for case in cases:
        failures += [f"{case.name}: {problem}" for problem in problems(case, ended[case], place_of(case, folder))]
        failures += [f"{case.name}, started again: {problem}" for problem in went_on(case, data, folder, whole)]
    return Outcome(
        test="torchrun: " + ", ".join(case.name for case in cases),
        must="ends in time, not 0 where failed; rank and step named; a restart ends bitwise equal",
        cases=len(cases),
        least=len(cases),
        failures=tuple(failures),
        counts={"seconds from the fault to the end": {case.name: round(ended[case].seconds, 1) for case in cases}},
        seconds=time.monotonic() - started,
    )


def run_cases(cases: Sequence[Case], data: Path, folder: Path) -> Iterator[tuple[Case, Ended]]:
    """Each case and how it ended, as they end."""
    waiting = list(cases)
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                case = waiting.pop(0)
                place = place_of(case, folder)
                arguments = run_arguments(data, place / "out", **SETTINGS, hang_timeout=case.hang_timeout)
                running.append(Running(case, arguments, place))
            for each in list(running):
                if (ended := each.look()) is not None:
                    running.remove(each)
                    yield each.case, ended
            time.sleep(LOOK_SECONDS)
    finally:
        for each in running:
            each.close()


def problems(case: Case, ended: Ended, place: Path) -> list[str]:
    """What is wrong with how it ended."""
    if ended.status is None:
        return [f"it did not end within {LIMIT_SECONDS:.0f} s"]
    found = []
    if ended.seconds > case.seconds:
        found.append(f"it ended {ended.seconds:.0f} s after the fault, {case.seconds:.0f} were allowed")
    if (ended.status == 0) != (case.status == "finished"):
        found.append(f"torchrun's exit status is {ended.status}")
    found += [f"no line says {pattern!r}" for pattern in case.says if not re.search(pattern, ended.output)]
    logs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((place / "out").glob("run_*.json"))]
    if not logs or not logs[-1]["status"].startswith(case.status):
        found.append(f"the run log says {logs[-1]['status'] if logs else 'nothing'}, not {case.status}")
    return found


def went_on(case: Case, data: Path, folder: Path, whole: Result) -> list[str]:
    """What is wrong with the end of the same run, started again."""
    place = place_of(case, folder)
    arguments = run_arguments(data, place / "out", **SETTINGS)
    statuses = run_to_end(arguments, size=RANKS, outputs=place) if case.status != "finished" else [0] * RANKS
    if statuses != [0] * RANKS:
        return [f"exit statuses {statuses}: {(place / '0.txt').read_text()[-500:]}"]
    return compare(place / "out", whole)


def place_of(case: Case, folder: Path) -> Path:
    return folder / re.sub(r"\W+", "_", case.name)


def descendants(process_id: int) -> list[int]:
    """Processes that a process has started, and those that they have."""
    found: list[int] = []
    for task in Path(f"/proc/{process_id}/task").glob("*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


TORCHRUN = Fault("torchrun", run_torchrun)
