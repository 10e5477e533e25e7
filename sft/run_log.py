"""The run log: one JSON file for each start of the trainer, valid at every moment, one record per line."""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from sft.errors import EXIT_FAILED, UserError, status_of
from sft.files import write_whole
from sft.untrusted import read_json

ABANDONED_SECONDS = 600  # the age of a partial file that no living process can be writing
NAME = re.compile(r"run_(\d{8}_\d{6})\.json")
STAMP = "%Y%m%d_%H%M%S"
RETRY_SECONDS = 1.0  # between two attempts to write, once one has failed
LAST_ATTEMPTS = 3  # for the last word
LARGEST_PARENT = 2**30  # bytes of a log that is read for its status


@dataclass(frozen=True)
class Outage:
    """The time in which the log cannot be written."""

    since: float  # time.monotonic()
    tried: float
    problem: str


class RunLog:
    """What a run was, did and came to, in out_dir/run_YYYYmmdd_HHMMSS.json; kept by the main rank alone.

    The file is replaced whole: at once for whatever is rare, and for iterations at most every `save_seconds`, by a
    timer where nothing else comes by then. Each record is serialised once. A number that is not finite becomes null,
    and an event names it. While the file cannot be written all is kept in memory and tried again, which `say` is told.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        run_name: str,
        config: Mapping[str, Any],
        origin: Mapping[str, str],
        save_seconds: float,
        say: Callable[[str], None] = print,
    ):
        """Raises UserError where the file cannot be made."""
        started = datetime.now().astimezone()
        self.save_seconds, self.say = save_seconds, say
        self.path = claim_path(Path(out_dir), started)
        parent = log_before(self.path)
        self.contents: dict[str, Any] = {  # a list holds its records as lines of JSON
            "run_name": run_name,
            "start_time": started.isoformat(timespec="seconds"),
            "parent": parent and parent.name,
            "status": "running",
            "config": dict(config),
            "origin": dict(origin),
            "startup_info": {"parent_ended": end_of(parent)} if parent else {},
            "training_iterations": [],
            "eval_steps": [],
            "checkpoints": [],
            "events": [],
            "summary": {},
        }
        self._busy = threading.RLock()  # of whoever changes or writes the contents: the run, the timer, or last_words
        self._timer: threading.Timer | None = None
        self._outage: Outage | None = None
        try:
            self._write(self.text())
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}", exit_status=EXIT_FAILED) from error

    def startup(self, **info: Any) -> None:
        """Facts that are known before the first step: versions, devices, sizes; a later call adds to them."""
        with self._busy:
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
        with self._busy:
            events_before = len(self.contents["events"])
            self.add("training_iterations", record)
            left = self.saved_at + self.save_seconds - time.monotonic()
            if len(self.contents["events"]) > events_before or left <= 0:
                self.save()
            else:
                self._save_in(left)

    def evaluation(self, *, iter: int, **measures: Any) -> None:
        self._add_and_save("eval_steps", {"iter": iter, **measures})

    def checkpoint(self, *, iter: int, path: str | Path, **more: Any) -> None:
        self._add_and_save("checkpoints", {"iter": iter, "path": str(path), **more})

    def event(self, kind: str, **details: Any) -> None:
        """Something that a reader of the curves has to know: a resume, a skipped step, a signal."""
        self._add_and_save("events", {"kind": kind, "time": now(), **details})

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """The last word: status "finished", "preempted", "interrupted" or "failed: <cause>".

        Where it cannot be written, a run that is finished has failed all the same: UserError. Any other says so.
        """
        assert status in ("finished", "preempted", "interrupted") or status.startswith("failed: "), status
        with self._busy:
            self.contents["status"] = status
            self.contents["summary"] = self.finite(dict(summary))
            for attempt in range(LAST_ATTEMPTS):
                if attempt:
                    time.sleep(RETRY_SECONDS)
                self.save(even_if_just_tried=True)
                if self._outage is None:
                    break
        if self._outage is not None:
            message = f"{self.path} cannot be written to its end: {self._outage.problem}; the checkpoints are untouched"
            if status == "finished":
                raise UserError(message, exit_status=EXIT_FAILED)
            self.say(f"warning: {message}")

    def last_words(self, status: str) -> None:
        """The status of a process that is about to end, from another thread than the one that keeps the log and hangs.

        Waits for that one if it is writing, and lets it write no more.
        """
        self._busy.acquire()
        self.contents["status"] = status
        self._write(self.text())

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

    def save(self, *, even_if_just_tried: bool = False) -> None:
        """Replace the file; who reads it sees the old one or the new one, whole.

        Where that fails the run goes on: a later save, or the timer, tries it again, a second or more after that.
        """
        with self._busy:
            outage, at = self._outage, time.monotonic()
            if outage is not None and at < outage.tried + RETRY_SECONDS and not even_if_just_tried:
                return
            told = [] if outage is None else [self._end_of_outage(outage)]
            try:
                self._write(self.text(*told))
            except OSError as error:
                problem = error.strerror or str(error)
                if outage is None:
                    self.say(f"warning: {self.path} cannot be written ({problem}); the run goes on, and tries again")
                self._outage = Outage(outage.since if outage else at, at, problem)
                self._save_in(max(RETRY_SECONDS, self.save_seconds))
                return
            if outage is not None:
                self.contents["events"] += told
                self._outage = None
                self.say(f"{self.path} is written again, after {at - outage.since:.0f} s")

    def text(self, *more_events: str) -> str:
        """The whole file."""
        shown = {**self.contents, "events": [*self.contents["events"], *more_events]}
        sections = ",\n".join(f"{json.dumps(name)}: {section_text(value)}" for name, value in shown.items())
        return f"{{\n{sections}\n}}\n"

    def _write(self, text: str) -> None:
        write_whole(self.path, lambda file: file.write(text.encode()), partial=partial_of(self.path))
        self.saved_at = time.monotonic()
        self._stop_timer()

    def _end_of_outage(self, outage: Outage) -> str:
        seconds = round(time.monotonic() - outage.since, 1)
        return json.dumps({"kind": "log_unwritten", "time": now(), "seconds": seconds, "problem": outage.problem})

    def _add_and_save(self, section: str, record: dict[str, Any]) -> None:
        with self._busy:
            self.add(section, record)
            self.save()

    def _save_in(self, seconds: float) -> None:
        """Have what waits saved after so long, unless it is before."""
        if self._timer is None:
            self._timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._time_is_up)
            self._timer.daemon = True
            self._timer.start()

    def _time_is_up(self) -> None:
        with self._busy:
            if self._timer is threading.current_thread():  # else somebody has just saved
                self._timer = None
                self.save()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def claim_path(out_dir: Path, started: datetime) -> Path:
    """The log's path, for this process alone: of the second it started in, or of the next second that is free.

    It comes after those that are there, so that their names tell their order also where a clock was set back.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out_dir, before=started - timedelta(seconds=ABANDONED_SECONDS))
        stamp = started.replace(tzinfo=None, microsecond=0)
        ahead = [time for _, time in logs_of(out_dir) if stamp <= time < stamp + timedelta(days=1)]
        stamp = max([stamp, *(time + timedelta(seconds=1) for time in ahead)])
        while True:
            path = out_dir / f"run_{stamp:{STAMP}}.json"
            stamp += timedelta(seconds=1)
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
        sentence = f"out_dir {out_dir} cannot be written: {error.strerror}"
        raise UserError(sentence, exit_status=status_of(error)) from error


def logs_of(out_dir: Path) -> list[tuple[Path, datetime]]:
    """The run logs of a folder and the times in their names, the oldest first."""
    found = []
    for path in sorted(out_dir.glob("run_*.json")):
        with contextlib.suppress(ValueError):  # somebody else's name
            if match := NAME.fullmatch(path.name):
                found.append((path, datetime.strptime(match[1], STAMP)))
    return found


def log_before(path: Path) -> Path | None:
    """The run log before this one in its folder."""
    return max((other for other, _ in logs_of(path.parent) if other.name < path.name), default=None)


def end_of(parent: Path) -> str:
    """How a run ended whose log nobody keeps any more."""
    try:
        log = read_json(parent, most=LARGEST_PARENT)
        status = log["status"]
    except (OSError, ValueError, TypeError, KeyError):
        return "its log cannot be read"
    return "running: it was killed" if status == "running" else str(status)


def remove_abandoned(out_dir: Path, *, before: datetime) -> None:
    """Delete what killed runs left behind."""
    for abandoned in out_dir.glob(".run_*.json.partial"):
        with contextlib.suppress(FileNotFoundError):  # a living run has just replaced its log
            if abandoned.stat().st_mtime < before.timestamp():
                abandoned.unlink()


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
