"""What a run tells: one aligned line per event for people, the run log for programs. The main rank alone speaks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.ema import Weights
from sft.evaluation import Evaluation
from sft.progress import Totals
from sft.run_log import RunLog
from sft.speed import memory_gib, model_flops_utilisation, peak_flops
from sft.world import World


class Journal:
    """The console and the run log of one run; every method may be called on every rank."""

    def __init__(self, world: World, log: RunLog | None, *, steps: int):
        self.world = world
        self.log = log  # None on all ranks but the main one
        self.steps = steps
        self.peak_flops = peak_flops(world.device)
        self.started = time.perf_counter()
        self.seconds = self.stall_seconds = 0.0  # of all steps told of
        self.recompiled = 0

    def startup(self, sentences: Mapping[str, str], **facts: Any) -> None:
        """Print one aligned line per topic; keep them and the facts in the log."""
        for topic, sentence in sentences.items():
            self.world.print(f"{topic:<8} {sentence}")
        if self.log:
            self.log.startup(**facts, sentences=dict(sentences))

    def event(self, kind: str, **details: Any) -> None:
        if self.log:
            self.log.event(kind, **details)

    def iteration(
        self,
        iter_num: int,
        totals: Totals,
        *,
        learning_rate: float,
        grad_norm: float,
        order: bytes,
        flops: float,
        router: Mapping[str, float] | None = None,
    ) -> None:
        """One record for the steps since the last: means over their trained tokens, rates over their time; `router`
        is of a model with experts."""
        tokens_per_second = totals.tokens / totals.seconds
        record: dict[str, Any] = {
            "iter": iter_num,
            "loss": totals.loss,
            "lr": learning_rate,
            "grad_norm": grad_norm,
            "trained_tokens": totals.trained_tokens,
            "tokens": totals.tokens,
            "time_ms": 1000 * totals.seconds / totals.steps,
            "tokens_per_second": tokens_per_second,
            "mfu": model_flops_utilisation(flops, totals.seconds, world_size=self.world.size, peak=self.peak_flops),
            "memory_gib": memory_gib(self.world.device),
            "trained_tokens_per_second": totals.trained_tokens / totals.seconds,
            "stall_ms": 1000 * totals.stall_seconds / totals.steps,
            "recompiled": totals.recompiled,
            "skipped": totals.skipped,
            "order": order.hex(),
        }
        if router is not None:
            record["router"] = dict(router)
        self.seconds += totals.seconds
        self.stall_seconds += totals.stall_seconds
        self.recompiled += totals.recompiled
        mfu = "" if record["mfu"] is None else f"  mfu {record['mfu']:4.0%}"
        self.world.print(
            f"{self._step(iter_num)}  loss {totals.loss:7.4f}  lr {learning_rate:.2e}  norm {grad_norm:6.2f}"
            f"  {record['time_ms']:7.0f} ms  {_thousands(tokens_per_second)} tok/s"
            f"  {_thousands(record['trained_tokens_per_second'])} trained/s{mfu}  {record['memory_gib']:5.1f} GiB"
        )
        if totals.recompiled:
            self.world.print(f"{self._step(iter_num)}  {totals.recompiled} graphs compiled since the last line")
            self.event("recompiled", iter=iter_num, graphs=totals.recompiled)
        if self.log:
            self.log.iteration(**record)

    def evaluation(self, iter_num: int, result: Evaluation, *, is_best: bool, weights: Weights, seconds: float) -> None:
        """`weights`: which ones were evaluated."""
        of_average = "" if weights == "model" else f"{weights} weights, "
        self.world.print(
            f"{self._step(iter_num)}  validation loss {result.loss:.4f}  ({of_average}{result.rows} rows, "
            f"{result.trained_tokens:,} trained tokens, {seconds:.1f} s){'  best so far' if is_best else ''}"
        )
        if self.log:
            self.log.evaluation(
                iter=iter_num,
                val_loss=result.loss,
                trained_tokens=result.trained_tokens,
                rows=result.rows,
                seconds=seconds,
                is_best=is_best,
                weights=weights,
            )

    def checkpoint(self, iter_num: int, path: Path, *, best_by: Weights | None) -> None:
        """`best_by`: which weights had the best evaluation so far; None = it is not the best."""
        self.world.print(f"{self._step(iter_num)}  saved {path}")
        if self.log:
            is_best = best_by is not None
            self.log.checkpoint(iter=iter_num, path=path, is_best=is_best, **({"best_by": best_by} if is_best else {}))

    def checkpoint_failed(self, iter_num: int, problem: str) -> None:
        """The run goes on all the same; older checkpoints are as they were."""
        self.world.print(f"{self._step(iter_num)}  warning: no checkpoint was written ({problem}); trying again later")
        self.event("checkpoint_failed", iter=iter_num, problem=problem)

    def odd_step(self, iter_num: int, sentence: str, **details: Any) -> None:
        """A step that was skipped, or out of the ordinary."""
        self.world.print(f"{self._step(iter_num)}  {sentence}")
        self.event("odd_step", **details)

    def trace(self, iter_num: int, sentence: str) -> None:
        """The steps before this one were slower than others: they were traced."""
        self.world.print(f"{self._step(iter_num)}  {sentence}")
        self.event("traced", iter=iter_num, sentence=sentence)

    def last_words(self, status: str) -> None:
        """The status of a run that hangs, from another thread than the one that does."""
        if self.log:
            self.log.last_words(status)

    def close(self, status: str, **summary: Any) -> None:
        """The last word: finished, preempted, interrupted, or failed: cause."""
        if self.log:
            stall_share = self.stall_seconds / self.seconds if self.seconds else None
            speed = {"stall_share": stall_share, "recompiled": self.recompiled}
            self.log.finish(status, {**summary, **speed, "seconds": time.perf_counter() - self.started})
            self.world.print(f"{status}; the run log is {self.log.path}")

    def _step(self, iter_num: int) -> str:
        return f"step {iter_num:6d}/{self.steps}"


def _thousands(rate: float) -> str:
    return f"{rate / 1000:6.1f}k" if rate >= 1000 else f"{rate:6.0f} "
