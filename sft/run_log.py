"""The run log: one JSON file for each start of the trainer, valid at every moment, one record per line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from sft.errors import EXIT_FAILED, UserError

ABANDONED_SECONDS = 600  # the age of a partial file that no living process can be writing


class RunLog:
    """What a run was, did and came to, in out_dir/run_YYYYmmdd_HHMMSS.json; kept by the main rank alone.

    The file is replaced whole: at once for whatever is rare, and for iterations at most every `save_seconds`. Each
    record is serialised once. A number that is not finite becomes null, and an event names it.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        run_name: str,
        config: Mapping[str, Any],
        origin: Mapping[str, str],
        save_seconds: float,
    ):
        started = datetime.now().astimezone()
        self.save_seconds = save_seconds
        self.contents: dict[str, Any] = {  # a list holds its records as lines of JSON
            "run_name": run_name,
            "start_time": started.isoformat(timespec="seconds"),
            "status": "running",
            "config": dict(config),
            "origin": dict(origin),
            "startup_info": {},
            "training_iterations": [],
            "eval_steps": [],
            "checkpoints": [],
            "events": [],
            "summary": {},
        }
        self._writing = threading.Lock()
        self.path = claim_path(Path(out_dir), started)
        self.save()

    def startup(self, **info: Any) -> None:
        """Facts that are known before the first step: versions, devices, sizes; a later call adds to them."""
        self.contents["startup_info"].update(self.finite(info))
        self.save()

    def iteration(
        self,
        *,
        iter: int,
        loss: float,
        lr: float,
        grad_norm: float,
        trained_tokens: int,
        tokens: int,
        time_ms: float,
        tokens_per_second: float,
        mfu: float | None,
        memory_gib: float | None,
        **more: Any,
    ) -> None:
        """One record per log_interval; the loss is the mean over the tokens trained since the last record."""
        record = {
            "iter": iter,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "trained_tokens": trained_tokens,
            "tokens": tokens,
            "time_ms": time_ms,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            "memory_gib": memory_gib,
            **more,
        }
        events_before = len(self.contents["events"])
        self.add("training_iterations", record)
        if len(self.contents["events"]) > events_before or time.monotonic() - self.saved_at >= self.save_seconds:
            self.save()

    def evaluation(self, *, iter: int, **measures: Any) -> None:
        self.add("eval_steps", {"iter": iter, **measures})
        self.save()

    def checkpoint(self, *, iter: int, path: str | Path, **more: Any) -> None:
        self.add("checkpoints", {"iter": iter, "path": str(path), **more})
        self.save()

    def event(self, kind: str, **details: Any) -> None:
        """Something that a reader of the curves has to know: a resume, a skipped step, a signal."""
        self.add("events", {"kind": kind, "time": datetime.now().astimezone().isoformat(timespec="seconds"), **details})
        self.save()

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """The last word: status "finished", "preempted", "interrupted" or "failed: <cause>"."""
        assert status in ("finished", "preempted", "interrupted") or status.startswith("failed: "), status
        self.contents["status"] = status
        self.contents["summary"] = self.finite(dict(summary))
        self.save()

    def add(self, section: str, record: dict[str, Any]) -> None:
        line = json.dumps(self.finite(record, iter=record.get("iter")), allow_nan=False)
        self.contents[section].append(line)

    def finite(self, record: dict[str, Any], **where: Any) -> dict[str, Any]:
        """The record as plain data, null for each number that is not finite, and an event for each of those."""
        lost: dict[str, str] = {}
        plain = plain_data(record, "", lost)
        for field, value in lost.items():
            self.add("events", {"kind": "non_finite", "field": field, "value": value, **where})
        return plain

    def last_words(self, status: str) -> None:
        """The status of a process that is about to end, from another thread than the one that keeps the log and hangs.

        Waits for that one if it is writing, and lets it write no more.
        """
        self._writing.acquire()
        self.contents["status"] = status
        self._replace()

    def save(self) -> None:
        """Replace the file; who reads it sees the old one or the new one, whole."""
        with self._writing:
            self._replace()

    def _replace(self) -> None:
        partial = partial_of(self.path)
        text = ",\n".join(f"{json.dumps(name)}: {section_text(value)}" for name, value in self.contents.items())
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.write("{\n" + text + "\n}\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(f"{self.path} cannot be written: {error.strerror}", exit_status=EXIT_FAILED) from error
        self.saved_at = time.monotonic()


def claim_path(out_dir: Path, started: datetime) -> Path:
    """The log's path, for this process alone: of the second it started in, or of the next second that is free."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out_dir, before=started - timedelta(seconds=ABANDONED_SECONDS))
        while True:
            path = out_dir / f"run_{started:%Y%m%d_%H%M%S}.json"
            started += timedelta(seconds=1)
            if path.exists():
                continue
            try:
                partial_of(path).touch(exist_ok=False)
            except FileExistsError:
                continue  # of another process that starts now
            if not path.exists():
                return path
            partial_of(path).unlink()  # the other process has just written its first log
    except OSError as error:
        raise UserError(f"out_dir {out_dir} cannot be written: {error.strerror}") from error


def remove_abandoned(out_dir: Path, *, before: datetime) -> None:
    """Delete what killed runs left behind."""
    for partial in out_dir.glob(".run_*.json.partial"):
        with contextlib.suppress(FileNotFoundError):  # a living run has just replaced its log
            if partial.stat().st_mtime < before.timestamp():
                partial.unlink()


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def section_text(value: Any) -> str:
    """A list or an object with one item per line, so that the log can be searched and compared by line."""
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(value) + "\n]"
    if isinstance(value, dict) and value:
        return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(item)}" for name, item in value.items()) + "\n}"
    return json.dumps(value)


def plain_data(value: Any, name: str, lost: dict[str, str]) -> Any:
    """The value with NumPy scalars as Python's and None for numbers that are not finite, which go into `lost`."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {key: plain_data(item, f"{name}.{key}" if name else str(key), lost) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item, f"{name}[{index}]", lost) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost[name] = str(value)
        return None
    return value
