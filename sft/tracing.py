"""A profile of a few steps, to see where their time goes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED = 2  # steps at the start that are not traced: the first ones allocate memory
PREPARED = 1  # steps in which the profiler runs and its records are thrown away, since starting it takes time
TRACED = 3
DEAREST = 10  # operators in the table


class StepTrace:
    """A Chrome trace of three early steps, and beside it a table of the operators that took most of their time."""

    def __init__(self, path: Path, *, device: torch.device):
        """`path` ends in .json or .json.gz; the table has the same name and ends in .txt."""
        self.path, self.table_path = path, path.with_name(f"{path.name.partition('.')[0]}.txt")
        self.running = False
        self._on_gpu = device.type == "cuda"

    def start(self, *, pause: Callable[[], AbstractContextManager[None]], tell: Callable[[str], None]) -> None:
        """Begin with the next step. The files are written inside pause(), and tell() gets a sentence about them."""
        self._pause, self._tell, self.running = pause, tell, True
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])],
            schedule=schedule(skip_first=SKIPPED, wait=0, warmup=PREPARED, active=TRACED, repeat=1),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def step(self) -> None:
        """To be called after each step; does nothing once the trace is written."""
        if self.running:
            self._profiler.step()
            if not self.running:
                del self._profiler  # a hundred thousand events, which each collection of garbage would look through

    def stop(self) -> None:
        """Write what there is, if the run ends before all of its steps were traced."""
        if self.running:
            self._profiler.stop()
        if self.running:
            self.running = False
            self._tell(f"nothing is traced: the run ended within its first {SKIPPED + PREPARED} steps")

    def _write(self, profiler: profile) -> None:
        self.running = False
        with self._pause():
            profiler.export_chrome_trace(str(self.path))
            order = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=DEAREST)
            self.table_path.write_text(table + "\n", encoding="utf-8")
            self._tell(f"{self.path} shows where the last steps spent their time, {self.table_path} on what most of it")
