"""Kill, torn write, power cut, ENOSPC and EIO at every file operation of four programs, and what a rerun makes of it.

save       the checkpoints of a run of train_sft.py, and whatever else it writes but its log
log        its run log
resume     a run that goes on after a kill, its newest checkpoint damaged
prepare    prepare_sft.py, over an earlier data set
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from bench.faults_fork import Ended, disturbed, in_child, operations_of
from bench.faults_outcome import Fault, Outcome
from bench.faults_pairs import END, KILLING, Operation, Pair, spread
from bench.faults_scene import (
    NEW,
    OF_BEST,
    OLD,
    RUN,
    SAVED,
    STEP,
    STEPS,
    Scene,
    last_words,
    make_scene,
    read_log,
    recover,
    undisturbed,
)
from sft.arrays import open_prepared, verify_checksums
from sft.errors import UserError

PAIRS = {"save": 135, "log": 80, "resume": 75, "prepare": 145}  # so many of all pairs are tried
SHORT_PAIRS = {"save": 4, "log": 1, "resume": 1, "prepare": 2}


class Judgement(NamedTuple):
    """What became of a case: what went wrong, and what it counts as."""

    problems: list[str]
    kind: str


def judge_run(scene: Scene, expected: dict[str, str], pair: Pair, ended: Ended) -> Judgement:
    """A run of which one operation went wrong, after it has been started again."""
    problems = list(problems_of_end(pair, ended))
    problems += [f"{path.name} is not valid JSON" for path in scene.out.glob("run_*.json") if read_log(path) is None]
    recovery = recover(scene)
    if has_ended(pair, ended) and (wrong := differing(pair, recovery.before, expected)):
        problems.append(f"ended well, and yet {wrong}")
    if recovery.ended.status != 0 or recovery.ended.hung:
        return Judgement([*problems, f"needed help: {last_words(recovery.ended)}"], "needed help")
    if wrong := differing(pair, recovery.after, expected):
        return Judgement([*problems, f"lost: {wrong}"], "lost")
    saved = max(map(int, SAVED.findall(ended.output)), default=0)
    done = max(map(int, STEP.findall(ended.output)), default=0)
    if recovery.first < saved:
        problems.append(f"lost: the checkpoint of step {saved} was told of, the rerun began at {recovery.first}")
    elif pair.mode in KILLING and done - recovery.first > RUN["save_interval"]:
        problems.append(f"lost: steps {recovery.first} to {done} had to be repeated")
    if any(read_log(path) is None for path in scene.out.glob("run_*.json")):
        problems.append("after the rerun a log is not valid JSON")
    if left := sorted(path.name for path in scene.out.rglob("ckpt*.partial")):
        problems.append(f"after the rerun there still is {', '.join(left)}")
    return Judgement(problems, how_it_ended(pair, ended))


def differing(pair: Pair, found: dict[str, str], expected: dict[str, str]) -> str:
    """The checkpoints that are not those of the undisturbed run, in words.

    After a save that the disk refused, the best checkpoint is the best of those that it took.
    """
    may_be_another = pair.mode not in KILLING and " " not in found["ckpt_best.pt"]
    names = [name for name in expected if not (may_be_another and name in OF_BEST)]
    return ", ".join(f"{name} is {found.get(name)}" for name in names if found.get(name) != expected[name])


def problems_of_end(pair: Pair, ended: Ended) -> Iterator[str]:
    """What is wrong with how the disturbed program itself ended."""
    if ended.hung:
        yield f"hung: {last_words(ended)}"
    elif pair.mode in KILLING:
        if ended.status != -9:
            yield f"the fault never came: status {ended.status}, {last_words(ended)}"
    elif "Traceback (most" in ended.output:
        yield f"a traceback: {last_words(ended)}"
    elif ended.status not in (0, 1, 2):
        yield f"ended with status {ended.status}: {last_words(ended)}"
    elif ended.status and "error: " not in ended.output:
        yield f"ended with status {ended.status} without a message: {last_words(ended)}"
    elif ended.status and pair.mode.endswith("once") and trained_on(ended):
        yield f"a passing error ended the run: {last_words(ended)}"


def has_ended(pair: Pair, ended: Ended) -> bool:
    """Whether the program had done all of its work, and said so, before anything befell its files."""
    return ended.status == 0 or pair.operation.kind == END


def trained_on(ended: Ended) -> bool:
    """Whether it ended in the midst of training, though not for its last checkpoint."""
    return bool(STEP.search(ended.output)) and "the last checkpoint was not written" not in ended.output


def how_it_ended(pair: Pair, ended: Ended) -> str:
    if pair.mode in KILLING:
        return pair.mode
    return f"{pair.mode}: {'went on to its end' if ended.status == 0 else f'one message, status {ended.status}'}"


def files_of(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def judge_prepared(
    scene: Scene, older: dict[str, str], expected: dict[str, str], pair: Pair, ended: Ended
) -> Judgement:
    """A data set of which one operation went wrong, after it has been prepared again; `older` was there before."""
    problems, found = list(problems_of_end(pair, ended)), files_of(scene.prepared)
    if has_ended(pair, ended) and found != expected:
        problems.append("ended well with other files")
    whole = [{name: files[name] for name in files if name in found} for files in (older, expected)]
    if is_accepted(scene.prepared) and not any(files.items() <= found.items() for files in (older, expected)):
        problems.append(f"a half-prepared folder would be trained on: {found.keys()}, {whole}")
    again = in_child(lambda: scene.prepare(scene.prepared, conversations=NEW), scene.output)
    if again.status != 0:
        return Judgement([*problems, f"needed help: {last_words(again)}"], "needed help")
    found = files_of(scene.prepared)
    if wrong := [name for name in {**found, **expected} if found.get(name) != expected.get(name)]:
        problems.append(f"lost: other files than undisturbed: {', '.join(sorted(wrong))}")
    return Judgement(problems, how_it_ended(pair, ended))


def is_accepted(folder: Path) -> bool:
    try:
        verify_checksums(open_prepared(folder))
    except UserError:
        return False
    return True


@dataclass(frozen=True)
class Program:
    """What is disturbed: from which state, what it does, and which of its operations are to go wrong."""

    name: str
    begin: Callable[[], None]
    act: Callable[[], None]
    folder: Path
    judge: Callable[[Pair, Ended], Judgement]
    operations: list[Operation]

    def only(self, name: str, counts: Callable[[Operation], bool]) -> Program:
        return replace(self, name=name, operations=[each for each in self.operations if counts(each)])


def is_of_log(operation: Operation) -> bool:
    return operation.role.lstrip(".").startswith("run_") or operation.kind == END


def is_of_others(operation: Operation) -> bool:
    return not operation.role.lstrip(".").startswith("run_")


def programs(scene: Scene) -> Iterator[Program]:
    expected = undisturbed(scene)

    def run(begin: Callable[[], None]) -> Program:
        begin()
        operations = operations_of(scene.train, scene.out, scene.work)
        return Program("", begin, scene.train, scene.out, partial(judge_run, scene, expected), operations)

    fresh = run(scene.clear)
    yield fresh.only("save", is_of_others)
    yield fresh.only("log", is_of_log)
    killed = killed_run(scene, fresh.operations)
    yield run(lambda: scene.clear(killed)).only("resume", is_of_others)
    yield preparation(scene)


def killed_run(scene: Scene, operations: list[Operation]) -> Path:
    """A run that was killed while it saved its last step, and whose newest whole checkpoint is damaged."""
    saves = [each for each in operations if each.kind == "replace" and each.role == "ckpt_N.pt"]
    scene.clear()
    disturbed(scene.train, Pair(saves[-1], "kill"), scene.out, scene.work)
    newest = scene.out / f"ckpt_{STEPS - 1:06d}.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 16
    newest.write_bytes(content)
    return scene.keep("killed")


def preparation(scene: Scene) -> Program:
    """prepare_sft.py in a folder that holds another data set."""

    def act() -> None:
        scene.prepare(scene.prepared, conversations=NEW)

    scene.clear()
    in_child(act, scene.output)
    expected = files_of(scene.prepared)
    scene.clear()
    in_child(lambda: scene.prepare(scene.prepared, conversations=OLD), scene.output)
    older, kept = files_of(scene.prepared), scene.keep("older")
    assert older["meta.json"] != expected["meta.json"]

    def begin() -> None:
        scene.clear(kept)

    begin()
    operations = operations_of(act, scene.prepared, scene.work)
    return Program("prepare", begin, act, scene.prepared, partial(judge_prepared, scene, older, expected), operations)


def thinned(operations: list[Operation]) -> list[Operation]:
    """Of a long series of writes to a file the first, the second, the middle one and the last; all other operations."""
    left: list[Operation] = []
    for (kind, _), series in groupby(operations, key=lambda each: (each.kind, each.role)):
        found = list(series)
        ends = {0, 1, len(found) // 2, len(found) - 1}
        left += [each for i, each in enumerate(found) if kind != "write" or i in ends]
    return left


def run_files(folder: Path, short: bool) -> Outcome:
    """Every program, each operation of which goes wrong in one way or more."""
    started, scene = time.monotonic(), make_scene(folder)
    failures: list[str] = []
    counts: dict[str, Any] = {}
    kinds: Counter[str] = Counter()
    for program in programs(scene):
        passing: Counter[tuple[bool, bool]] = Counter()
        pairs = spread(thinned(program.operations), (SHORT_PAIRS if short else PAIRS)[program.name])
        for pair in pairs:
            program.begin()
            ended = disturbed(program.act, pair, program.folder, scene.work)
            judgement = program.judge(pair, ended)
            kinds[judgement.kind] += 1
            passing[pair.mode.endswith("once"), ended.status == 0] += 1
            failures += [f"{program.name}: {pair}: {problem}" for problem in judgement.problems]
        counts[f"{program.name}: operations"] = len(program.operations)
        counts[f"{program.name}: pairs"] = len(pairs)
        counts[f"{program.name}: passing errors"] = passing[True, True] + passing[True, False]
        counts[f"{program.name}: passing errors after which it went on"] = passing[True, True]
    return Outcome(
        test="kill, torn write, power cut, ENOSPC, EIO at every file operation, then resume",
        must="0 lost, 0 needed help; weights and optimizer bitwise equal, prepared data the same bytes",
        cases=sum(counts[f"{name}: pairs"] for name in PAIRS),
        least=sum(SHORT_PAIRS.values()) if short else 300,
        failures=tuple(failures),
        counts={**counts, **{name: kinds[name] for name in sorted(kinds)}},
        seconds=time.monotonic() - started,
    )


FAULTS = (Fault("files", run_files),)
