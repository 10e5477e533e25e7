"""A small run of train_sft.py whose ranks are forked from a process that has imported everything.

What a rank does is the program's own main(argv) in a process of its own, with the environment that torchrun would give
it, gloo between the ranks, and the exit status that the program leaves with.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import prepare_sft
import sft.errors
import train_sft
from sft.errors import run_program
from tests.tiny_tokenizer import save_tiny_tokenizer

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "normalization": "rmsnorm", "position_encoding": "rope"}
WORDS = ("the", "cat", "and", "hat", "sat", "on", "mat", "Paris", "France", "capital", "what", "is", "of")
BLOCK_SIZE = 64
LOOK_SECONDS = 0.02  # between two looks at processes that are waited for
NOTICE_SECONDS = 0.1  # until torchrun sees that a rank is gone: its monitor interval
GRACE_SECONDS = 5.0  # that survivors have to end after SIGTERM


def prepare_data(folder: Path) -> Path:
    """Prepared data of 60 short conversations, a fifth of them for validation."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    with open(folder / "conversations.jsonl", "w", encoding="utf-8") as file:
        for _ in range(60):
            prompt, completion = (" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for _ in range(2))
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    settings = {
        "input": folder / "conversations.jsonl",
        "out_dir": folder / "data",
        "block_size": BLOCK_SIZE,
        "val_fraction": 0.2,
    }

    def act() -> None:
        prepare_sft.main([*as_arguments(settings), f"--tokenizer={save_tiny_tokenizer(folder)}"])

    child = forked(act, folder / "prepare.txt")  # its threads, if any, are not those that ranks are forked from
    assert wait_for([child], seconds=120) == [0], (folder / "prepare.txt").read_text()
    return folder / "data"


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def run_arguments(data: Path, out_dir: Path, **changes: Any) -> list[str]:
    """Arguments of a run from scratch with dropout, accumulation, evaluations and saves."""
    settings = {
        "sft_data_dir": data,
        "out_dir": out_dir,
        "model": SHAPE,
        "block_size": BLOCK_SIZE,
        "batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_iters": 16,
        "learning_rate": 1e-2,
        "min_lr": 1e-3,
        "warmup_iters": 2,
        "dropout": 0.1,
        "eval_interval": 5,
        "save_interval": 3,
        "log_interval": 2,
        "log_save_seconds": 0,
        "device": "cpu",
    }
    return as_arguments({**settings, **changes})


def forked(act: Callable[[], None], output: Path) -> int:
    """The process id of a child that runs act(), what it prints in `output`; its exit status is that of a program."""
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    end_with(act, output)


def end_with(act: Callable[[], None], output: Path) -> NoReturn:
    """Run act() and leave the process at once, as a program that was interpreted would."""
    status = 1
    gc.freeze()  # what the parent has made is never garbage
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
        act()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Ranks:
    """All ranks of one start of the program."""

    def __init__(
        self, arguments: Sequence[str], *, size: int, outputs: Path, patch: Callable[[int], None] = lambda rank: None
    ):
        """What rank 1 prints is appended to outputs/1.txt; patch(rank) is called in each before the program begins."""
        outputs.mkdir(parents=True, exist_ok=True)
        self.outputs, self.port = outputs, free_port()
        self.living: dict[int, int] = {}  # process id -> rank
        self.statuses: dict[int, int] = {}  # rank -> exit status, or the negative number of a signal
        for rank in range(size):

            def act(rank: int = rank) -> None:
                os.environ |= {
                    **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
                    **{name: str(size) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
                    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)},
                }
                sys.argv = ["train_sft.py", *arguments]
                patch(rank)
                run_program(train_sft.main)

            self.living[forked(act, outputs / f"{rank}.txt")] = rank

    def reap(self) -> dict[int, int]:
        """Note which ranks have ended; the statuses of all that have."""
        for child in list(self.living):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                self.statuses[self.living.pop(child)] = os.waitstatus_to_exitcode(status)
        return self.statuses

    def wait(self, seconds: float) -> bool:
        """Whether all have ended by then."""
        end = time.monotonic() + seconds
        while self.reap() is not None and self.living and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
        return not self.living

    def send(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> int:
        """Send a signal to these ranks, None = all that live; to how many."""
        self.reap()
        children = [child for child, rank in self.living.items() if ranks is None or rank in ranks]
        for child in children:
            os.kill(child, number)
        return len(children)

    def end_survivors(self) -> int:
        """As torchrun does where a rank has died: SIGTERM to the others, later SIGKILL; how many needed that."""
        if self.wait(NOTICE_SECONDS):
            return 0
        self.send(signal.SIGTERM)
        if self.wait(GRACE_SECONDS):
            return 0
        killed = self.send(signal.SIGKILL)
        self.wait(GRACE_SECONDS)
        return killed

    def close(self) -> None:
        """No process is left behind, whatever happened."""
        self.send(signal.SIGKILL)
        self.wait(GRACE_SECONDS)

    def last_words(self) -> str:
        """The last line that each rank has printed."""
        words = []
        for path in sorted(self.outputs.glob("*.txt")):
            lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            words.append(f"rank {path.stem}: {lines[-1][:200] if lines else 'nothing'}")
        return "; ".join(words)


def wait_for(children: Sequence[int], *, seconds: float) -> list[int | None]:
    """The exit statuses of some children; None for one that had to be killed."""
    end, statuses = time.monotonic() + seconds, dict.fromkeys(children)
    while None in statuses.values() and time.monotonic() < end:
        for child in [child for child, status in statuses.items() if status is None]:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
        time.sleep(LOOK_SECONDS)
    for child in [child for child, status in statuses.items() if status is None]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return list(statuses.values())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_to_end(
    arguments: Sequence[str],
    *,
    size: int,
    outputs: Path,
    seconds: float = 60.0,
    patch: Callable[[int], None] = lambda rank: None,
) -> list[int | None]:
    """The exit statuses of all ranks of one start; None for one that had to be killed since it took too long."""

    def begin(rank: int) -> None:
        sft.errors.FIRST_SPEAKS_WITHIN_SECONDS = 0.0  # no torchrun ends the others as soon as the first has spoken
        patch(rank)

    ranks = Ranks(arguments, size=size, outputs=outputs, patch=begin)
    ranks.wait(seconds)
    statuses = [ranks.statuses.get(rank) for rank in range(size)]
    ranks.close()
    return statuses


def json_lines(path: Path) -> list[Any]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
