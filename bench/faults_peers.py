"""The same faults for other trainers' savers: Hugging Face's Trainer, TRL's SFTTrainer, and nanoGPT's way.

PYTHONPATH=. OMP_NUM_THREADS=1 python bench/faults_peers.py --python=ENVIRONMENT/bin/python

(an environment with the extra `bench`: torch, transformers, trl, datasets; without TRL it says so and does nothing)

Each trains a model of a few hundred weights for a few steps on the CPU, with dropout, and saves after every step, as
bench/faults_files.py lets ours do. A run is disturbed at one file operation, then started again in the documented way:
`trainer.train(resume_from_checkpoint=get_last_checkpoint(output_dir))`, and torch.load of ckpt.pt. If that raises, a
person helps by deleting the newest checkpoint, until it starts. nanoGPT's way is its train.py's: torch.save in place to
one ckpt.pt. Its batches are made a function of the step, so that its saver alone is measured.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from bench.faults_bytes import (
    flips,
    garbage,
    spans_of_archive,
    spans_of_safetensors,
    truncations,
    zeroed_pages,
)
from bench.faults_fork import Ended, disturbed, in_child, operations_of
from bench.faults_pairs import Operation, Pair, spread
from bench.faults_savers import BEGAN, PEERS, RESULT, SAVED, STEPS, Peer, write_through_python
from bench.packing import processor
from sft.config import load_settings
from sft.errors import UserError, run_program

PAIRS = 60  # so many (operation, mode) pairs are tried of each saver
COMPLAINT = re.compile(r"/\S+/|\d+")  # what differs from case to case: folders and numbers
IN_RECORDS, ELSEWHERE = 20, 2  # flipped bits in tensors, of which a large model consists; and in each kind of place


@dataclass(frozen=True, kw_only=True)
class PeersBenchmark:
    """Every knob of this program."""

    python: str | None = None  # of the environment where TRL is installed; None = this one
    only: tuple[str, ...] = ()  # names of savers; none = all
    pairs: int = PAIRS  # (operation, mode) pairs of each
    out: str = "bench/results/faults_peers.json"  # where the result goes


class Case(NamedTuple):
    """What was done, the names of all that went wrong, and what was said where a restart failed."""

    what: str
    names: list[str]
    complaint: str


class Restart(NamedTuple):
    """What starting again came to: the helps that it took, and how the last attempt ended."""

    helps: int
    ended: Ended
    complaint: str  # of the first attempt, where it failed

    @property
    def began(self) -> int:
        return int(found[0]) if (found := BEGAN.findall(self.ended.output)) else 0


def result_of(ended: Ended) -> tuple[str, ...]:
    """Digests of weights and optimizer; () where it did not come to an end."""
    return found[0] if (found := RESULT.findall(ended.output)) else ()


def start_again(peer: Peer, out: Path, work: Path) -> Restart:
    """As often as it takes, the newest checkpoint being deleted where it cannot be resumed from."""
    helps, complaint = 0, ""
    while True:
        ended = in_child(lambda: peer.train(out), work / "output.txt", seconds=60)
        if ended.status == 0 or (newest := peer.newest(out)) is None:
            return Restart(helps, ended, complaint)
        complaint = complaint or ended.output.strip().splitlines()[-1]
        shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
        helps += 1


def what_became(restart: Restart, expected: tuple[str, ...], *, saved: int) -> list[str]:
    """The names of all that went wrong. Where nothing was left to train, nobody needs the optimizer."""
    found = []
    if restart.helps:
        found.append("needed help")
    if restart.began < saved or restart.ended.status != 0:
        found.append("lost a finished save")
    count = 1 if restart.began == STEPS else 2
    if restart.ended.status == 0 and result_of(restart.ended)[:count] != expected[:count]:
        found.append("ended with other weights without a word")
    return found or ["resumed exactly"]


def faults_of(peer: Peer, out: Path, work: Path, expected: tuple[str, ...], count: int) -> Iterator[Case]:
    shutil.rmtree(out, ignore_errors=True)
    operations = operations_of(lambda: peer.train(out), out, work)
    for pair in spread(operations, count):
        shutil.rmtree(out, ignore_errors=True)
        ended = disturbed(lambda: peer.train(out), pair, out, work)
        saved = max(map(int, SAVED.findall(ended.output)), default=0)
        if ended.status == 0:
            is_whole = result_of(ended) == expected
            yield Case(str(pair), ["went on" if is_whole else "ended with other weights without a word"], "")
            continue
        restart = start_again(peer, out, work)
        found = what_became(restart, expected, saved=saved)
        if pair.mode.endswith("once"):
            found.append("a passing error ended the run")
        yield Case(str(pair), found, restart.complaint)


def damages_of(peer: Peer, out: Path, work: Path, expected: tuple[str, ...]) -> Iterator[Case]:
    """Damage in each file with tensors of the newest checkpoint, in a run that was killed before its last save."""
    state, draw = work / "state", random.Random(0)
    killed_before_last_save(peer, out, work)
    shutil.copytree(out, state)
    newest = peer.newest(out)
    assert newest is not None
    paths = sorted(newest.iterdir()) if newest.is_dir() else [newest]
    paths = [path for path in paths if path.name in ("model.safetensors", "optimizer.pt", "ckpt.pt")]
    has_older = newest.is_dir()
    for path in paths:
        content = path.read_bytes()
        spans = spans_of_safetensors(content) if path.suffix == ".safetensors" else spans_of_archive(content)
        records = {"record": spans["record"]}
        damages = [*flips(records, IN_RECORDS // len(paths), draw), *flips(spans, ELSEWHERE, draw)]
        damages += [*zeroed_pages(content, 2), *truncations(content, 4, draw), *garbage(content, 2, draw)]
        for damage in damages:
            shutil.rmtree(out)
            shutil.copytree(state, out)
            path.write_bytes(damage.change(content))
            restart = start_again(peer, out, work)
            names = what_became(restart, expected, saved=STEPS - 2 if has_older else 1)
            yield Case(f"{damage} of {path.name}", names, restart.complaint)


def killed_before_last_save(peer: Peer, out: Path, work: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    operations = operations_of(lambda: peer.train(out), out, work)
    starts = [each for each in operations if is_start_of_save(each)]
    shutil.rmtree(out)
    disturbed(lambda: peer.train(out), Pair(starts[-1], "kill"), out, work)


def is_start_of_save(operation: Operation) -> bool:
    return operation.kind == ("create" if operation.role == "ckpt.pt" else "mkdir") and operation.role != "."


def measure(peer: Peer, work: Path, count: int) -> dict[str, Any]:
    started, out = time.monotonic(), work / "case" / "out"
    work.mkdir(parents=True)
    whole = result_of(start_again(peer, out, work).ended)
    assert whole, f"{peer.name} does not train here"
    killed_before_last_save(peer, out, work)
    resumed = start_again(peer, out, work)
    assert resumed.began == STEPS - 1, resumed
    found: dict[str, Any] = {"resumes exactly where nothing went wrong": result_of(resumed.ended) == whole}
    faults, damage = list(faults_of(peer, out, work, whole, count)), list(damages_of(peer, out, work, whole))
    without_power = [case for case in faults if not case.what.startswith("power cut")]
    for what, cases in (("faults", faults), ("faults but power cuts", without_power), ("damage", damage)):
        found[what] = {"cases": len(cases), **Counter(name for case in cases for name in case.names)}
    found["examples"] = {
        **examples(faults),
        **{f"{name} after damage": each for name, each in examples(damage).items()},
    }
    complaints = Counter(COMPLAINT.sub("...", case.complaint)[:100] for case in [*faults, *damage] if case.complaint)
    found["what was said where a restart failed"] = dict(complaints.most_common(8))
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def examples(cases: list[Case], each: int = 3) -> dict[str, list[str]]:
    shown: dict[str, list[str]] = {}
    for case in cases:
        for name in case.names:
            shown.setdefault(name, []).append(case.what)
    return {name: found[:each] for name, found in shown.items()}


def main(argv: list[str]) -> None:
    settings = load_settings(PeersBenchmark, argv).settings
    if settings.python is not None and os.path.abspath(settings.python) != sys.executable:
        rest = [word for word in argv if not word.startswith("--python=")]
        raise SystemExit(subprocess.run([settings.python, __file__, *rest], check=False).returncode)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    try:
        import transformers

        for name in ("torch._dynamo", "trl", "trl.trainer.sft_trainer"):  # children are forked with all of it
            importlib.import_module(name)
    except ImportError as error:
        print(f"skipped: {error.name} is not installed here; name an environment that has it with --python")
        return
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    chosen = [peer for peer in PEERS if not settings.only or peer.name in settings.only]
    if not chosen:
        raise UserError(f"only: names of {', '.join(peer.name for peer in PEERS)}")
    write_through_python()
    report: dict[str, Any] = {
        "command": " ".join(["PYTHONPATH=. OMP_NUM_THREADS=1 python bench/faults_peers.py", *argv]),
        "processor": processor(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "datasets", "safetensors")},
        "steps": STEPS,
        "savers": {},
    }
    for peer in chosen:
        with tempfile.TemporaryDirectory() as folder:
            report["savers"][peer.name] = found = measure(peer, Path(folder) / "work", settings.pairs)
        print(peer.name, json.dumps(found, indent=1), flush=True)
    Path(settings.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
