"""Whether an interrupted run equals an uninterrupted one: both are made, compared, and what differs is explained."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sft.comparison import ROWS, Comparison, compare, outcome
from sft.errors import EXIT_FAILED, UserError
from sft.interruption import Ended, run, run_until
from sft.past_steps import read_logs

STEP_LINE = re.compile(r"step +(\d+)/\d+ +loss ")
SIGNALS = {"SIGTERM": "preempted", "SIGKILL": "running"}  # and what the run log says after them
Result = Mapping[str, Comparison]  # by part of an outcome


class Verification:
    """Runs of the same settings in folders of their own below one."""

    def __init__(self, command: Sequence[str], folder: Path, *, steps: int, keeps: bool):
        """`command` starts the trainer for so many steps, out_dir and resume left out; `keeps` all checkpoints."""
        self.command, self.folder, self.steps, self.keeps = command, folder, steps, keeps

    def verify(self) -> None:
        """Make the runs and compare them; where they are not equal UserError, which says what is at fault."""
        self.finish("uninterrupted", resume="never")
        results = {}
        for name in SIGNALS:
            self.interrupt(name)
            results[name] = self.compared_with_whole(name)
        print_table(self.outcome("uninterrupted"), results)
        if not any(differing(result) for result in results.values()):
            print("equal: an interrupted run of these settings is the uninterrupted one, to the bit")
            return
        self.finish("once more", resume="never")
        raise UserError(verdict(results, self.compared_with_whole("once more")), exit_status=EXIT_FAILED)

    def interrupt(self, name: str) -> None:
        """A run that a signal ends after its middle, and that is resumed; where it comes too late, an earlier one."""
        for step in range(self.steps // 2 + 1, 1, -1):
            shutil.rmtree(self.out_dir(name), ignore_errors=True)
            command = [*self.command, f"--out_dir={self.out_dir(name)}"]
            ended = run_until(command, partial(has_come, step), signal.Signals[name])
            logs = read_logs(self.out_dir(name))
            if logs and logs[-1]["status"] == SIGNALS[name] and ended.signalled_at:
                return self.finish(name, resume="required", after=f" after step {step_of(ended.signalled_at)}")
            if ended.status != 0:
                raise broken(f"{name} after step {step}: the run did not end as it should", ended)
        raise UserError(f"the runs are over before {name} comes; ask for more: --steps={4 * self.steps}")

    def finish(self, name: str, *, resume: str, after: str = "") -> None:
        """A run that goes on to its end, told of on a line."""
        started = time.perf_counter()
        ended = run([*self.command, f"--out_dir={self.out_dir(name)}", f"--resume={resume}"])
        if ended.status != 0:
            raise broken(f"{name}{after}: the run failed", ended)
        events = read_logs(self.out_dir(name))[-1]["events"]
        resumed = [f", resumed from step {event['iter']}" for event in events if event["kind"] == "resumed"]
        print(f"  {name}{after}{''.join(resumed)}  ({time.perf_counter() - started:.1f} s)", flush=True)

    def compared_with_whole(self, name: str) -> Result:
        """How the outcome of a run compares; its checkpoints, which are large, go."""
        whole, other = self.outcome("uninterrupted"), self.outcome(name)
        result = {part: compare(whole[part], other[part]) for part in whole}
        for path in self.out_dir(name).glob("ckpt*.pt") if not self.keeps else ():
            path.unlink()
        return result

    def outcome(self, name: str) -> dict[str, Any]:
        return outcome(self.out_dir(name), step=self.steps)

    def out_dir(self, name: str) -> Path:
        return self.folder / name.replace(" ", "_")


def step_of(line: str) -> int:
    """The step that a line of the trainer tells of; 0 for other lines."""
    match = STEP_LINE.match(line)
    return int(match[1]) if match else 0


def has_come(step: int, line: str) -> bool:
    return step_of(line) >= step


def broken(sentence: str, ended: Ended) -> UserError:
    return UserError(
        "\n".join([f"{sentence} (exit status {ended.status}):", *ended.output[-30:]]), exit_status=EXIT_FAILED
    )


def differing(result: Result) -> list[str]:
    """The parts that are not equal, each with its first difference."""
    return [
        f"{part}: {len(each.differences)} of {each.values} differ, first {each.differences[0].name or part}: "
        f"{each.differences[0].sentence}"
        for part, each in result.items()
        if each.differences
    ]


def print_table(whole: Mapping[str, Any], results: Mapping[str, Result]) -> None:
    print(f"\n  {'':<20}{'uninterrupted':<34}" + "".join(f"{name:<10}" for name in results))
    for part, value in whole.items():
        counts = {name: result[part] for name, result in results.items()}
        shown = f"{next(iter(counts.values())).values} values" if isinstance(value, Mapping) else str(value)
        words = (f"{len(each.differences)} differ" if each.differences else "equal" for each in counts.values())
        print(f"  {part:<20}{shown:<34}" + "".join(f"{word:<10}" for word in words))
    for name, result in results.items():
        for sentence in differing(result):
            print(f"  {name}: {sentence}")
    print(flush=True)


def verdict(results: Mapping[str, Result], again: Result) -> str:
    """What runs that differ come from, where two uninterrupted ones compare as `again`."""
    other_rows = [part for part in ROWS if any(result[part].differences for result in results.values())]
    if other_rows or not differing(again):
        why = f"the {other_rows[0]} differ" if other_rows else "two uninterrupted runs are equal, to the bit"
        return f"resuming is at fault: interrupted runs are other runs, and {why}"
    return "\n  ".join(
        [
            "these settings are not deterministic by themselves: two uninterrupted runs differ as well,",
            *differing(again),
            "and interrupted ones have seen the same rows: nothing here speaks against resuming",
        ]
    )
