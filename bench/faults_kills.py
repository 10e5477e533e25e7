"""Random SIGKILL of one or all ranks, again and again, until the run has ended: it ends as if nothing had happened."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench.faults_outcome import Fault, Outcome
from bench.faults_ranks import LOOK_SECONDS, Ranks, prepare_data, run_arguments
from bench.faults_result import Result, compare, partial_files, result_of

SEED = 20
RUNS = {1: 24, 2: 14, 3: 6}  # world size -> runs
STEPS = 16
SHORT_RUNS, SHORT_STEPS = {1: 2, 2: 1}, 8
MOST_KILLS = 3  # of a run
MOST_STARTS = 12
START_SECONDS = 60.0  # after which a start that nobody kills has hung
GLANCE_SECONDS = 0.0002  # between two looks for a save that begins
STAGES = ("save", "step", "start")  # in turn


class Whole(NamedTuple):
    """A run that nobody has disturbed."""

    result: Result
    steps: int
    first_step_seconds: float  # from the start until the first record
    seconds: float


@dataclass
class Story:
    """A run that was killed, and what was seen of it."""

    size: int
    number: int
    failures: list[str] = field(default_factory=list)
    kills: int = 0  # signals that were sent on purpose, one for each time
    stages: Counter[str] = field(default_factory=Counter)  # in which the kills hit it
    whose: Counter[str] = field(default_factory=Counter)  # one rank, or all
    starts: int = 0
    stragglers: int = 0  # survivors that neither gloo's error nor SIGTERM had ended

    def fails(self, what: str) -> None:
        self.failures.append(f"{self.size} rank(s), run {self.number}: {what}")


def run_kills(folder: Path, short: bool) -> Outcome:
    """All runs of all world sizes, each until it ends, compared with the undisturbed run of its size."""
    started, data, stories = time.monotonic(), prepare_data(folder / "data"), []
    steps = SHORT_STEPS if short else STEPS
    for size, runs in (SHORT_RUNS if short else RUNS).items():
        whole = undisturbed(data, folder / f"whole_{size}", size=size, steps=steps)
        for number in range(runs):
            stories.append(
                killed_until_it_ends(data, folder / f"killed_{size}_{number}", whole, size=size, number=number)
            )
    kills = sum(story.kills for story in stories)
    stages, whose = (total(getattr(story, name) for story in stories) for name in ("stages", "whose"))
    failures = [failure for story in stories for failure in story.failures]
    least_kills = 1 if short else 50
    if kills < least_kills:
        failures.append(f"only {kills} kills hit a living run, {least_kills} are promised")
    counts = {
        "kills": kills,
        **{f"kills in a {stage}": stages[stage] for stage in STAGES},
        **{f"kills of {ranks}": whose[ranks] for ranks in ("one rank", "all ranks")},
        "restarts per run": round(sum(story.starts - 1 for story in stories) / len(stories), 2),
        "survivors that had to be killed": sum(story.stragglers for story in stories),
        "runs by world size": dict(Counter(story.size for story in stories)),
    }
    return Outcome(
        test="random SIGKILL of one or all ranks until the run ends",
        must="weights, optimizer and order of rows bitwise equal in all",
        cases=len(stories),
        least=3 if short else 40,
        failures=tuple(failures),
        counts=counts,
        seconds=time.monotonic() - started,
    )


def total(counts: Iterable[Counter[str]]) -> Counter[str]:
    return sum(counts, Counter())


def undisturbed(data: Path, folder: Path, *, size: int, steps: int) -> Whole:
    """The run that all others of this world size are compared with, and how long its parts take."""
    started, first_step = time.monotonic(), None
    ranks = Ranks(run_arguments(data, folder / "out", max_iters=steps), size=size, outputs=folder)
    while not ranks.wait(LOOK_SECONDS):
        if first_step is None and has_told_of_a_step(folder):
            first_step = time.monotonic() - started
        assert time.monotonic() - started < START_SECONDS, ranks.last_words()
    assert set(ranks.statuses.values()) == {0}, ranks.last_words()
    seconds = time.monotonic() - started
    return Whole(result_of(folder / "out"), steps, first_step or seconds / 2, seconds)


def killed_until_it_ends(data: Path, folder: Path, whole: Whole, *, size: int, number: int) -> Story:
    """One run with up to MOST_KILLS kills, started again with --resume=auto after each, and compared at its end."""
    draw, story, out_dir = random.Random(f"{SEED} {size} {number}"), Story(size, number), folder / "out"
    planned = draw.randint(1, MOST_KILLS)
    arguments = run_arguments(data, out_dir, resume="auto", max_iters=whole.steps)
    while story.starts < MOST_STARTS:
        story.starts += 1
        ranks = Ranks(arguments, size=size, outputs=folder / f"start_{story.starts}")
        try:
            if story.kills < planned:
                kill_at_random(ranks, out_dir, whole, draw, story)
            ended = ranks.wait(START_SECONDS)
        finally:
            ranks.close()
        statuses = set(ranks.statuses.values())
        if not ended or statuses == {0}:
            break
        if signal.SIGKILL.value not in {-status for status in statuses}:
            story.fails(f"start {story.starts} needed help: {ranks.last_words()}")
            break
    if not ended:
        story.fails(f"start {story.starts} did not end within {START_SECONDS:.0f} s: {ranks.last_words()}")
    elif statuses != {0}:
        story.fails(f"it has not ended after {story.starts} starts")
    if not story.failures:
        for problem in compare(out_dir, whole.result):
            story.fails(problem)
    return story


def kill_at_random(ranks: Ranks, out_dir: Path, whole: Whole, draw: random.Random, story: Story) -> None:
    """Kill one rank or all at a random moment of a start, a step or a save, unless the run has ended before."""
    size, stage = len(ranks.living), STAGES[(story.number + story.kills) % len(STAGES)]
    everyone = size == 1 or draw.random() < 0.4
    victims = list(range(size)) if everyone else [draw.randrange(size)]
    if stage == "save":
        wait_for_a_save(ranks, out_dir, seconds=2 * whole.seconds, skips=draw.randrange(3))
        time.sleep(draw.uniform(0, 0.004))
    else:
        bounds = (0.0, whole.first_step_seconds) if stage == "start" else (whole.first_step_seconds, whole.seconds)
        ranks.wait(draw.uniform(*bounds))
    if not ranks.living or not ranks.send(signal.SIGKILL, victims):
        return
    story.kills += 1
    story.whose["all ranks" if everyone else "one rank"] += 1
    story.stragglers += ranks.end_survivors()
    if partial_files(out_dir):
        story.stages["save"] += 1
    else:
        story.stages["step" if has_told_of_a_step(ranks.outputs) else "start"] += 1


def wait_for_a_save(ranks: Ranks, out_dir: Path, *, seconds: float, skips: int) -> None:
    """Until a checkpoint begins to be written, the first ones skipped; no longer than that, nor than the run lives."""
    end, was_writing = time.monotonic() + seconds, False
    while time.monotonic() < end and ranks.living:
        is_writing = bool(partial_files(out_dir))
        if is_writing and not was_writing:
            if skips == 0:
                return
            skips -= 1
        was_writing = is_writing
        ranks.reap()
        time.sleep(GLANCE_SECONDS)


def has_told_of_a_step(outputs: Path) -> bool:
    path = outputs / "0.txt"
    return path.exists() and "  lr " in path.read_text(encoding="utf-8", errors="replace")


KILLS = Fault("kills", run_kills)
