"""Kill, torn write, power cut, ENOSPC and EIO at every file operation of four programs, and what a rerun makes of it.

save       the checkpoints of a run of train_sft.py, and whatever else it writes but its log
log        its run log
resume     a run that goes on after a kill, its newest checkpoint damaged
prepare    prepare_sft.py, over an earlier data set
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

import prepare_sft
import train_sft
from bench.faults_fork import (
    END,
    KILLING,
    Ended,
    Operation,
    Pair,
    disturbed,
    in_child,
    operations_of,
    spread,
)
from bench.faults_outcome import Fault, Outcome
from sft.arrays import open_prepared, verify_checksums
from sft.errors import UserError, run_program
from tests.tiny_tokenizer import save_tiny_tokenizer

STEPS = 3  # a checkpoint after each
SHAPE = {
    **{"n_layer": 1, "n_head": 1, "n_embd": 8, "d_ff": 8, "vocab_size": 320, "block_size": 64},
    **{"normalization": "rmsnorm", "position_encoding": "rope", "ffn_type": "swiglu", "bias": False},
}
RUN: dict[str, Any] = {  # the best evaluation is that of step 2
    **{"model": SHAPE, "block_size": 64, "batch_size": 1, "max_iters": STEPS, "save_interval": 1, "eval_interval": 2},
    **{"learning_rate": 3, "min_lr": 3, "warmup_iters": 0, "dropout": 0.1, "log_interval": 1},
    **{"log_save_seconds": 0, "device": "cpu", "resume": "auto"},
}
# What a run comes to; the rest of a checkpoint is of its settings and of the time that it took.
RESULT = ("model", "optimizer", "iter_num", "rows_seen", "order", "trained_tokens_seen", "val_loss", "best_val_loss")
PAIRS = {"save": 150, "log": 65, "resume": 75, "prepare": 120}  # so many of all pairs are tried
SHORT_PAIRS = {"save": 8, "log": 2, "resume": 2, "prepare": 4}
SAVED = re.compile(r"saved \S*ckpt_(\d+)\.pt$", re.MULTILINE)
STEP = re.compile(r"^step +(\d+)/\d+  loss ", re.MULTILINE)


class Judgement(NamedTuple):
    """What became of a case: what went wrong, and what it counts as."""

    problems: list[str]
    kind: str


@dataclass(frozen=True)
class Scene:
    """A folder with raw conversations, prepared data, and room for one case after the other, each under one name."""

    work: Path

    @property
    def data(self) -> Path:
        return self.work / "data"

    @property
    def out(self) -> Path:
        """The trainer's out_dir."""
        return self.work / "case" / "out"

    @property
    def prepared(self) -> Path:
        """The out_dir of prepare_sft.py."""
        return self.work / "case" / "prepared"

    @property
    def output(self) -> Path:
        return self.work / "output.txt"

    def clear(self, like: Path | None = None) -> None:
        """An empty case, or one that is a copy of the folder `like`."""
        shutil.rmtree(self.work / "case", ignore_errors=True)
        if like is None:
            (self.work / "case").mkdir()
        else:
            copy_with_links(like, self.work / "case")

    def keep(self, name: str) -> Path:
        """A copy of the case, to begin others with."""
        copy_with_links(self.work / "case", self.work / name)
        return self.work / name

    def train(self, **changes: Any) -> None:
        """The program train_sft.py as a command; ends in SystemExit."""
        command(train_sft.main, {**RUN, "sft_data_dir": self.data, "out_dir": self.out, **changes})

    def prepare(self, out_dir: Path, *, conversations: int) -> None:
        settings = {"input": self.work / f"{conversations}.jsonl", "tokenizer": self.work / "tokenizer.json"}
        more = {"block_size": 64, "val_fraction": 0.2, "workers": 1}
        command(prepare_sft.main, {**settings, "out_dir": out_dir, **more})


def copy_with_links(source: Path, target: Path) -> None:
    """A copy of a folder in which names of one file are names of one file again."""
    copied: dict[int, Path] = {}
    for path in [source, *sorted(source.rglob("*"))]:
        new, inode = target / path.relative_to(source), path.stat().st_ino
        if path.is_dir():
            new.mkdir()
        elif inode in copied:
            new.hardlink_to(copied[inode])
        else:
            copied[inode] = new
            shutil.copyfile(path, new)


def command(main: Callable[[list[str]], None], settings: dict[str, Any]) -> None:
    sys.argv = ["program", *(f"--{name}={value}" for name, value in settings.items())]
    run_program(main)


def make_scene(folder: Path) -> Scene:
    scene = Scene(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny_tokenizer(folder)
    for count in (24, 16):
        lines = [{"prompt": f"what is {i}?", "completion": f"the cat {i} sat on {i * i}"} for i in range(count)]
        (folder / f"{count}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = in_child(lambda: scene.prepare(scene.data, conversations=24), scene.output)
    assert ended.status == 0, ended
    scene.clear()
    return scene


def result_of(out: Path) -> dict[str, str]:
    """A digest of what the last and the best checkpoint of a folder hold, read by torch.load itself."""
    digests = {}
    for name in (f"ckpt_{STEPS:06d}.pt", "ckpt.pt", "ckpt_best.pt"):
        try:
            content = torch.load(out / name, weights_only=True)
            digests[name] = digest({key: content[key] for key in RESULT})
        except Exception as error:  # whatever a damaged file leads to
            digests[name] = f"{type(error).__name__}: {error}"
    return digests


def digest(tree: Any) -> str:
    found = hashlib.sha256()

    def add(value: Any, where: str) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{where}{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, (dict, list, tuple)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                add(item, f"{where}.{key!r}")
        else:
            found.update(f"{where}={value!r}".encode())

    add(tree, "")
    return found.hexdigest()


class Recovery(NamedTuple):
    """What a rerun without faults came to."""

    ended: Ended
    before: dict[str, str]  # the result that it found
    after: dict[str, str]
    first: int  # the step it went on from


def recover(scene: Scene, **changes: Any) -> Recovery:
    """The same command again, as a scheduler would give it."""
    told = scene.work / "recovery.json"
    told.unlink(missing_ok=True)

    def act() -> None:
        os.fsync = lambda descriptor: None  # nothing cuts the power now, and the disk takes its time
        before = result_of(scene.out)
        try:
            scene.train(**changes)
        except SystemExit as stop:
            told.write_text(json.dumps([before, result_of(scene.out)]))
            raise SystemExit(stop.code) from None

    known = set(scene.out.glob("run_*.json"))
    ended = in_child(act, scene.output)
    before, after = json.loads(told.read_text()) if told.exists() else ({}, {})
    logs = [read_log(path) for path in set(scene.out.glob("run_*.json")) - known]
    events = [event for log in logs if log for event in log["events"] if event["kind"] == "resumed"]
    return Recovery(ended, before, after, events[0]["iter"] if events else 0)


def read_log(path: Path) -> dict[str, Any] | None:
    """None where it is not valid JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def undisturbed(scene: Scene) -> dict[str, str]:
    """What a run comes to that nothing happens to, in a case of its own."""
    scene.clear()
    recovery = recover(scene)
    assert recovery.ended.status == 0, recovery.ended
    assert len(set(recovery.after.values())) == 2, "the best checkpoint is to be another than the last one"
    return recovery.after


def judge_run(scene: Scene, expected: dict[str, str], pair: Pair, ended: Ended) -> Judgement:
    """A run of which one operation went wrong, after it has been started again."""
    problems = list(problems_of_end(pair, ended))
    problems += [f"{path.name} is not valid JSON" for path in scene.out.glob("run_*.json") if read_log(path) is None]
    recovery = recover(scene)
    if ended.status == 0 and (wrong := differing(pair, recovery.before, expected)):
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
    of_best = pair.mode not in KILLING and " " not in found["ckpt_best.pt"]
    names = [name for name in expected if name != "ckpt_best.pt" or not of_best]
    return ", ".join(f"{name} is {found[name]}" for name in names if found[name] != expected[name])


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


def trained_on(ended: Ended) -> bool:
    """Whether it ended in the midst of training, though not for its last checkpoint."""
    return bool(STEP.search(ended.output)) and "the last checkpoint was not written" not in ended.output


def how_it_ended(pair: Pair, ended: Ended) -> str:
    if pair.mode in KILLING:
        return pair.mode
    return f"{pair.mode}: {'went on to its end' if ended.status == 0 else f'one message, status {ended.status}'}"


def last_words(ended: Ended) -> str:
    lines = [line for line in ended.output.splitlines() if line.strip()]
    return f"status {ended.status}, {' | '.join(lines[-3:])!r}"


def files_of(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def judge_prepared(
    scene: Scene, older: dict[str, str], expected: dict[str, str], pair: Pair, ended: Ended
) -> Judgement:
    """A data set of which one operation went wrong, after it has been prepared again; `older` was there before."""
    problems, found = list(problems_of_end(pair, ended)), files_of(scene.prepared)
    if ended.status == 0 and found != expected:
        problems.append("ended well with other files")
    whole = [{name: files[name] for name in files if name in found} for files in (older, expected)]
    if is_accepted(scene.prepared) and not any(files.items() <= found.items() for files in (older, expected)):
        problems.append(f"a half-prepared folder would be trained on: {found.keys()}, {whole}")
    again = in_child(lambda: scene.prepare(scene.prepared, conversations=24), scene.output)
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
    """What is disturbed: what it does, from which state, and what counts as its operations."""

    name: str
    begin: Callable[[], None]
    act: Callable[[], None]
    folder: Path
    judge: Callable[[Pair, Ended], Judgement]
    counts: Callable[[Operation], bool] = lambda operation: True


def is_of_log(operation: Operation) -> bool:
    return operation.role.lstrip(".").startswith("run_")


def programs(scene: Scene) -> Iterator[Program]:
    expected = undisturbed(scene)

    def judge(pair: Pair, ended: Ended) -> Judgement:
        return judge_run(scene, expected, pair, ended)

    run: dict[str, Any] = {"act": scene.train, "folder": scene.out, "judge": judge}
    yield Program("save", scene.clear, **run, counts=lambda operation: not is_of_log(operation))
    yield Program("log", scene.clear, **run, counts=is_of_log)
    killed = killed_run(scene)
    yield Program("resume", lambda: scene.clear(killed), **run, counts=lambda operation: not is_of_log(operation))

    scene.clear()
    in_child(lambda: scene.prepare(scene.prepared, conversations=24), scene.output)
    newer = files_of(scene.prepared)
    scene.clear()
    in_child(lambda: scene.prepare(scene.prepared, conversations=16), scene.output)
    older, kept = files_of(scene.prepared), scene.keep("older")
    assert older["meta.json"] != newer["meta.json"]
    yield Program(
        "prepare",
        lambda: scene.clear(kept),
        lambda: scene.prepare(scene.prepared, conversations=24),
        scene.prepared,
        lambda pair, ended: judge_prepared(scene, older, newer, pair, ended),
    )


def killed_run(scene: Scene) -> Path:
    """A run that was killed while it saved its last step, and whose newest whole checkpoint is damaged."""
    scene.clear()
    operations = operations_of(scene.train, scene.out, scene.work)
    saves = [each for each in operations if each.kind == "replace" and each.role == "ckpt_N.pt"]
    scene.clear()
    disturbed(scene.train, Pair(saves[-1], "kill"), scene.out, scene.work)
    newest = scene.out / f"ckpt_{STEPS - 1:06d}.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 16
    newest.write_bytes(content)
    return scene.keep("killed")


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
    importlib.import_module("torch._dynamo")  # once, and not in each child: the program does when it makes a model
    started, scene = time.monotonic(), make_scene(folder)
    failures: list[str] = []
    counts: dict[str, Any] = {}
    kinds: Counter[str] = Counter()
    for program in programs(scene):
        program.begin()
        every = operations_of(program.act, program.folder, scene.work)
        operations = [each for each in thinned(every) if program.counts(each) or each.kind == END]
        pairs = spread(operations, (SHORT_PAIRS if short else PAIRS)[program.name])
        for pair in pairs:
            program.begin()
            ended = disturbed(program.act, pair, program.folder, scene.work)
            judgement = program.judge(pair, ended)
            kinds[judgement.kind] += 1
            failures += [f"{program.name}: {pair}: {problem}" for problem in judgement.problems]
        counts[f"{program.name}: operations"] = len(every)
        counts[f"{program.name}: pairs"] = len(pairs)
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
