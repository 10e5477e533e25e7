"""The processes of bench/step.py as seen by the program that gives them their turns."""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.step_tasks import OURS, OURS_BF16

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 10  # seconds that a process has to leave by itself
MOST_LEFT = 2**30  # bytes that a session may leave allocated on a GPU, or its process is ended


class ProviderFailed(Exception):
    """A provider cannot do what it was asked for; the message is the reason."""


class Worker:
    """One process of a provider. It starts at once and imports its libraries while others are at work, if they are."""

    def __init__(self, provider: str, *, python: str, device: str, threads: int | None):
        self.started = time.time()
        self.provider = provider
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # close() closes it
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self.process = subprocess.Popen(
            [python, "-m", "bench.step_worker", provider, device],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.ready: dict[str, Any] | None = None

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(json.loads(line))
        self.answers.put(None)

    def wait(self, seconds: float) -> dict[str, Any]:
        """Its next answer; ProviderFailed if that is a failure, or does not come in time, which ends the process."""
        try:
            answer = self.answers.get(timeout=max(0.1, seconds))
        except queue.Empty:
            self.kill()
            raise ProviderFailed(f"no answer within {seconds:.0f} s") from None
        if answer is None:
            raise ProviderFailed(f"the process ended: {self.last_words()}")
        if why := answer.get("failed") or answer.get("missing"):
            raise ProviderFailed(why)
        return answer

    def ask(self, command: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to a command, once the process is ready for it."""
        end = time.monotonic() + seconds
        if self.ready is None:
            self.ready = self.wait(seconds)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise ProviderFailed(f"the process ended: {self.last_words()}") from None
        return self.wait(end - time.monotonic())

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def last_words(self) -> str:
        if self.errors.closed:
            return "it was ended"
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        return (lines or ["it said nothing"])[-1][:300]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End the process: its input ends, and it leaves; if it does not, it is stopped."""
        if self.errors.closed:
            return
        try:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(timeout=PATIENCE)
        except (OSError, subprocess.TimeoutExpired):
            self.kill()
        self.errors.close()


class Session:
    """A provider with one option on one task: opened by its first turn, open until it is stopped."""

    def __init__(self, worker: Worker, train: dict[str, Any]):
        self.worker, self.train = worker, train
        self.is_open = False
        self.first: dict[str, Any] = {}  # what its very first step told

    def turn(self, steps: int, seconds: float, *, slow: float = math.inf) -> dict[str, Any]:
        """So many steps. A session that has to be opened takes one before them, which is not counted, save where it
        takes longer than `slow` seconds: then that is the turn."""
        end = time.monotonic() + seconds
        try:
            if not self.is_open:
                opened = self.worker.ask({"do": "train", **self.train, "steps": 1}, seconds)
                self.is_open = True
                self.first = self.first or opened
                if opened["first_step_seconds"] > slow:
                    return {**opened, "seconds": opened["first_step_seconds"]}
            return self.worker.ask({"do": "steps", "steps": steps}, end - time.monotonic())
        except ProviderFailed:
            self.is_open = False
            raise

    def stop(self, seconds: float = 30.0) -> None:
        was_open, self.is_open = self.is_open, False
        if was_open and self.worker.alive:
            stopped = self.worker.ask({"do": "stop"}, seconds)
            if stopped["left_bytes"] > MOST_LEFT:
                self.worker.close()


class Workers:
    """Who runs where: a process for each option on a CPU, whose memory is then its own; else one per provider."""

    def __init__(self, *, device: str, shares: bool, peers_python: str | None, threads: int | None):
        self.device, self.shares, self.peers_python, self.threads = device, shares, peers_python, threads
        self.shared: dict[str, Worker] = {}
        self.sessions: dict[str, Session] = {}  # of the shared processes: the one that is open, or was
        self.own: list[Worker] = []

    def new(self, provider: str) -> Worker:
        python = sys.executable if provider in (OURS, OURS_BF16) else self.peers_python or sys.executable
        return Worker(provider, python=python, device=self.device, threads=self.threads)

    def start(self, providers: Sequence[str]) -> None:
        """Shared processes import their libraries at the same time, while nothing is measured yet."""
        if self.shares:
            self.shared = {provider: self.new(provider) for provider in providers}

    def session(self, provider: str, train: dict[str, Any]) -> Session:
        """A new session. In a shared process the one before it is stopped."""
        if not self.shares:
            self.own.append(self.new(provider))
            return Session(self.own[-1], train)
        session = Session(self.free(provider), train)
        self.sessions[provider] = session
        return session

    def resume(self, provider: str, session: Session) -> None:
        """Make sure that the session can take turns, after others had its process."""
        if self.shares and self.sessions.get(provider) is not session:
            session.worker = self.free(provider)
            self.sessions[provider] = session

    def free(self, provider: str) -> Worker:
        """The provider's shared process with no session open; a new one where it is gone."""
        if provider in self.sessions:
            self.leave(self.sessions[provider])
        if provider not in self.shared or not self.shared[provider].alive:
            self.shared[provider] = self.new(provider)
        return self.shared[provider]

    def leave(self, session: Session) -> None:
        """The session is not needed any more; nor is its process, unless others share it."""
        if session.worker in self.own:
            self.own.remove(session.worker)
            session.worker.close()
        elif self.sessions.get(session.worker.provider) is session:
            del self.sessions[session.worker.provider]
            try:
                session.stop()
            except ProviderFailed:
                session.worker.close()

    def close(self) -> None:
        for worker in (*self.own, *self.shared.values()):
            worker.close()
        self.own, self.shared, self.sessions = [], {}, {}
