"""A small run of train_sft.py and its data, for cases in which something happens to their files, and for reruns."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import prepare_sft
import train_sft
from bench.faults_fork import Ended, in_child
from sft.errors import run_program
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
NEW, OLD = 24, 16  # conversations of the data set, and of one that was prepared before
# What a run comes to; the rest of a checkpoint is of its settings and of the time that it took.
RESULT = ("model", "optimizer", "iter_num", "rows_seen", "order", "trained_tokens_seen", "val_loss")
OF_BEST = ("ckpt_best.pt", "best_val_loss")  # of what a result tells
SAVED = re.compile(r"saved \S*ckpt_(\d+)\.pt$", re.MULTILINE)
STEP = re.compile(r"^step +(\d+)/\d+  loss ", re.MULTILINE)


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
    importlib.import_module("torch._dynamo")  # once, and not in each child: the program does when it makes a model
    scene = Scene(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny_tokenizer(folder)
    for count in (NEW, OLD):
        lines = [{"prompt": f"what is {i}?", "completion": f"the cat {i} sat on {i * i}"} for i in range(count)]
        (folder / f"{count}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = in_child(lambda: scene.prepare(scene.data, conversations=NEW), scene.output)
    assert ended.status == 0, ended
    scene.clear()
    return scene


def result_of(out: Path) -> dict[str, str]:
    """A digest of what the last and the best checkpoint of a folder hold, read by torch.load itself; the best loss."""
    digests = {}
    for name in (f"ckpt_{STEPS:06d}.pt", "ckpt.pt", "ckpt_best.pt"):
        try:
            content = torch.load(out / name, weights_only=True)
            digests[name] = digest({key: content[key] for key in RESULT})
            digests.setdefault("best_val_loss", repr(content["best_val_loss"]))
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
        os.fsync = lambda fd: None  # nothing cuts the power now, and the disk takes its time
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
    assert len(set(recovery.after.values())) == 3, "the best checkpoint is to be another than the last one"
    return recovery.after


def last_words(ended: Ended) -> str:
    lines = [line for line in ended.output.splitlines() if line.strip()]
    return f"status {ended.status}, {' | '.join(lines[-3:])!r}"
