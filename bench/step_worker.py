"""A process of bench/step.py: it trains as one provider does, a few steps at a time, as it is told to.

Commands come as lines of JSON on standard input, answers go to standard output; what libraries print goes to standard
error. `train` opens a session and takes its first steps, `steps` takes some more, `stop` ends it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from bench.loss_measure import reason, resident_bytes, synchronise
from bench.step_inputs import load_samples
from bench.step_tasks import GROUPED, OURS, OURS_BF16, PADDED, PLAIN, TRL, Task
from sft.arrays import Samples

MODULES = {
    OURS: "bench.step_providers_ours",
    OURS_BF16: "bench.step_providers_ours",
    TRL: "bench.step_providers_trl",
    PADDED: "bench.step_providers_loops",
    GROUPED: "bench.step_providers_loops",
    PLAIN: "bench.step_providers_loops",
}


@dataclass(frozen=True)
class Work:
    """What a session trains on, and how."""

    task: Task
    provider: str
    samples: Samples
    device: torch.device
    option: dict[str, Any]
    plan: Sequence[Sequence[int]] | None  # the conversations of each step, all in one micro-step; None: as it likes

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        narrow = self.task.dtype == "bfloat16" or self.provider == OURS_BF16
        return torch.bfloat16 if narrow else None

    @property
    def documents_per_step(self) -> int:
        """For those who count conversations: as many as fill a step, or up to three more: micro-steps divide it."""
        count = max(1, round(self.task.tokens_per_step / float(self.samples.lengths.mean())))
        return count if count <= 2 else -(-count // 4) * 4


class Step(NamedTuple):
    """One update: its mean loss over trained tokens, and what it was made of; tensors are read at the end of a turn."""

    loss: Tensor | float
    tokens: Tensor | int  # real ones, padding not counted
    trained: Tensor | int


class Gate:
    """Called after each step: False once the session is over. Between turns it waits for the next command."""

    def __init__(self, device: torch.device, steps: int, say: Callable[[dict[str, Any]], None], commands: TextIO):
        self.device, self.wanted, self.say, self.commands = device, steps, say, commands
        self.steps: list[Step] = []
        self.open_seconds: float | None = None  # from here to the end of the first step
        self.first_step_seconds: float | None = None  # the same, without making the model and the data
        self.begin = self.training_begin = time.perf_counter()
        self.processor_begin = time.process_time()

    def training_starts(self) -> None:
        """Model and data are made: the first step begins."""
        self.training_begin = time.perf_counter()

    def __call__(self, step: Step) -> bool:
        self.steps.append(step)
        opening_peak = 0
        if self.open_seconds is None:
            synchronise(self.device)
            self.open_seconds = time.perf_counter() - self.begin
            self.first_step_seconds = time.perf_counter() - self.training_begin
            opening_peak = peak_bytes(self.device)
            forget_peak(self.device)
        if len(self.steps) < self.wanted:
            return True
        synchronise(self.device)
        seconds = time.perf_counter() - self.begin
        told = {
            "seconds": seconds,
            "processor_seconds": time.process_time() - self.processor_begin,
            "steps": len(self.steps),
            "tokens": sum(int(step.tokens) for step in self.steps),
            "trained": sum(int(step.trained) for step in self.steps),
            "losses": [float(step.loss) for step in self.steps],
            "peak_bytes": max(opening_peak, peak_bytes(self.device)),
            "open_seconds": self.open_seconds,
            "first_step_seconds": self.first_step_seconds,
        }
        self.steps = []
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # others take their turn now, and need the memory
        self.say(told)
        line = self.commands.readline()
        command = json.loads(line) if line else {"do": "stop"}
        if command["do"] == "stop":
            return False
        self.wanted = command["steps"]
        self.begin, self.processor_begin = time.perf_counter(), time.process_time()
        return True


def forget_peak(device: torch.device) -> None:
    """From now on the peak is that of steps: drawing the first weights is not part of anyone's training."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")


def give_back(device: torch.device) -> int:
    """Memory that nobody uses any more goes back to the device, or to the system; the bytes still held on a GPU.

    An error of the GPU is raised: after one, the process is of no use.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def session(command: dict[str, Any], provider: str, device: torch.device, say: Callable, commands: TextIO) -> None:
    """One `train` command: everything up to its `stop`."""
    gate = Gate(device, command["steps"], say, commands)
    train = import_module(MODULES[provider]).train
    task = Task.from_dict(command["task"])
    samples = load_samples(Path(command["inputs"]))
    work = Work(task, provider, samples, device, command["option"], command.get("plan"))
    train(work, gate)


def main(argv: list[str]) -> None:
    provider, device_name = argv
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def say(told: dict[str, Any]) -> None:
        answers.write(json.dumps(told) + "\n")

    device = torch.device(device_name)
    try:
        import_module(MODULES[provider]).load(provider)
        if device.type == "cuda":
            torch.zeros(1, device=device)
    except Exception as error:  # ImportError, and whatever a library does while it is imported
        say({"missing": reason(error)})
        return
    say({"ready": True, "at": time.time(), "resident_bytes": resident_bytes("VmRSS")})
    while line := sys.stdin.readline():
        command = json.loads(line)
        if command["do"] != "train":
            continue
        try:
            session(command, provider, device, say, sys.stdin)
            told: dict[str, Any] = {"stopped": True}
        except Exception as error:
            told = {"failed": reason(error)}
        say({**told, "left_bytes": give_back(device)})


if __name__ == "__main__":
    main(sys.argv[1:])
