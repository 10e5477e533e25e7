"""A run between two steps: what moves while it trains, and what it does at its milestones."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft.adapting import kept_state
from sft.batches import StepBatch, TrainLoader
from sft.checkpoint import name_again, save_checkpoint
from sft.collector import QuietCollector
from sft.ema import MovingAverage, Weights
from sft.errors import EXIT_DIVERGED, EXIT_FAILED, Preempted, UserError
from sft.evaluation import Validation
from sft.heartbeat import heart
from sft.journal import Journal
from sft.loss import Loss
from sft.phases import phase
from sft.prefetch import Ahead
from sft.progress import Progress, Totals
from sft.step import SummedLoss, accumulate_gradients, train_step
from sft.step_watch import StepWatch
from sft.tracing import StepTrace
from sft.world import World


class Run:
    """The state of a run on one rank. Unless said otherwise, every rank must call each method at the same step."""

    def __init__(
        self,
        *,
        world: World,
        model: nn.Module,
        autocast_dtype: torch.dtype | None,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        loader: TrainLoader,
        validation: Validation,
        journal: Journal,
        training_flops: Callable[[Totals], int],
        out_dir: Path,
        keep_checkpoints: int | None,
        save_optimizer: bool,
        constants: Mapping[str, Any],
        wrap: Callable[[nn.Module], nn.Module],
        watch: StepWatch,
        balance_weight: float = 0.0,
        ema: MovingAverage | None = None,
        asked_to_stop: Callable[[], bool] = lambda: False,
        trace: StepTrace | None = None,
    ):
        """`constants` go into every checkpoint as they are: what the run was made of. `trace` is to be made of it.
        `ema` takes every step into its average, which is then what evaluations look at.

        `wrap` makes of the loss of this rank one whose gradients are averaged over all ranks. `asked_to_stop` tells
        whether this rank was: all obey at the end of a step.
        """
        self.world, self.model, self.optimizer = world, model, optimizer
        self.loader, self.validation, self.journal = loader, validation, journal
        self.training_flops = training_flops
        self.out_dir, self.keep_checkpoints, self.save_optimizer = out_dir, keep_checkpoints, save_optimizer
        self.constants = constants
        weight = balance_weight / loader.micro_steps  # DDP averages over ranks, this over micro-batches
        self.local_loss = SummedLoss(model, autocast_dtype=autocast_dtype, loss=loss, balance_weight=weight)
        self.loss_module = wrap(self.local_loss)
        self.progress = Progress(world, self.local_loss.router_load)
        self.collector = QuietCollector()
        self.watch, self.asked_to_stop, self.trace = watch, asked_to_stop, trace
        self.ema = ema
        self.eval_weights: Weights = "model" if ema is None else "ema"
        self.ahead: Ahead[StepBatch] | None = None
        self.learning_rate = 0.0  # of the last update
        self.grad_norm = torch.zeros(())  # of the last update, on the device
        self.iter_num = 0  # completed steps
        self.rows_seen = 0
        self.order = bytes.fromhex(constants["data_fingerprint"])[:16]  # the order_hash of the data and the rows seen
        self.owes_evaluation = False  # at this step, since a signal came before it
        self.owes_saving = False  # since the last attempt failed
        self.trained_tokens_seen = 0
        self.val_loss: float | None = None
        self.best_val_loss: float | None = None

    def warm_up(self, *, evaluates: bool) -> None:
        """One discarded forward and backward, and a forward as in an evaluation if there will be one.

        DDP rebuilds its buckets after its first backward, and compiling is not a step.
        """
        with phase("warm-up"):
            step = self.loader.step(self.iter_num, rows_seen=self.rows_seen)
            first = itertools.islice(step.batches, 1)
            accumulate_gradients(self.loss_module, first, target_weight=step.target_weight, world=self.world)
            self.optimizer.zero_grad(set_to_none=True)
            if evaluates:
                self.validation.try_out(self.local_loss, self.world)

    def start(self) -> None:
        """From here on steps are timed, batches made ahead, and garbage is collected at milestones only."""
        steps = self.loader.steps(self.iter_num, rows_seen=self.rows_seen, end=self.journal.steps, order=self.order)
        self.ahead = Ahead(steps, device=self.world.device)
        self.progress.begin()
        self.collector.start()
        if self.trace is not None:  # after the collector, which never frees a cycle that was there before
            self.trace.start(pause=self.progress.clock_stopped, tell=self._tell_of_trace)
        self.progress.start_clock()

    def update(self, *, learning_rate: float, grad_clip: float | None) -> None:
        """One step on the next rows."""
        heart.begin(self.iter_num + 1)
        first = self._next_batch()
        others = (self._next_batch().batch for _ in range(self.loader.micro_steps - 1))
        result = train_step(
            self.loss_module,
            self.optimizer,
            self.progress.counting(itertools.chain([first.batch], others)),
            target_weight=first.target_weight,
            learning_rate=learning_rate,
            grad_clip=grad_clip,
            world=self.world,
            judge=self.watch.judge,
            asked_to_stop=self.asked_to_stop,
        )
        if self.ema is not None:
            self.ema.update(result.judgement.skips)
        self.progress.add_step(result.loss_sum, first.target_weight, result.judgement.skips)
        self.learning_rate, self.grad_norm = learning_rate, result.grad_norm
        self.iter_num += 1
        first_row, self.rows_seen = self.rows_seen, self.rows_seen + self.loader.rows_per_step
        self.order = first.order
        self.watch.note(self.iter_num, result.judgement, rows_seen=first_row)
        if self.trace is not None:
            self.trace.step()

    def report(self) -> None:
        """Tell of the steps since the last record; between milestones the only place that waits for the device."""
        totals = self.progress.take()
        with self.progress.stalled():
            self.trained_tokens_seen += totals.trained_tokens
            self.journal.iteration(
                self.iter_num,
                totals,
                learning_rate=self.learning_rate,
                grad_norm=self.grad_norm.item(),
                order=self.order,
                flops=self.training_flops(totals),
                router=load.record(totals.router_sums) if (load := self.progress.router_load) else None,
            )
            self.collector.collect()

    def milestone(self, *, saves: bool) -> None:
        """Between two steps: evaluate where that is owed, save where it is best or due, and stop where asked to.

        Raises Preempted once all is saved, on all ranks.
        """
        self.watch.drain()
        stops, is_last = self.watch.stops, self.iter_num == self.journal.steps
        is_best = self.owes_evaluation and not stops and self.evaluate()
        stops = self.watch.stops and not (is_last and not self.owes_evaluation)
        if is_best or saves or stops:
            self.save(is_best=is_best, must=stops or is_last, resumable=stops)
        if stops:
            raise Preempted(
                f"stopped by a signal after step {self.iter_num} of {self.journal.steps}, and saved; the same command "
                "with --resume=auto goes on"
            )

    def evaluate(self) -> bool:
        """Validation loss now; True if it is the best since training began. Still owed where a signal cut it short."""
        self.owes_evaluation = False
        if not self.validation.rows:
            return False
        started = time.perf_counter()
        with phase("evaluation"), self.ema.in_place() if self.ema else contextlib.nullcontext():
            result = self.validation.evaluate(self.local_loss, self.world, asked_to_stop=self.asked_to_stop)
        if result is None:
            self.owes_evaluation = self.watch.stops = True
            return False
        self.val_loss = result.loss
        is_better = self.best_val_loss is None or result.loss < self.best_val_loss
        is_best = self.iter_num > 0 and math.isfinite(result.loss) and is_better
        seconds = time.perf_counter() - started
        self.journal.evaluation(self.iter_num, result, is_best=is_best, weights=self.eval_weights, seconds=seconds)
        self.collector.collect()
        return is_best

    def save(self, *, is_best: bool, must: bool, resumable: bool = False) -> None:
        """Join the sums of all ranks; the main rank writes a checkpoint, with the optimizer if it must be `resumable`.

        Where it cannot be written the run goes on and tries again later, unless it `must` be: then UserError on all
        ranks. Weights that are not finite are never written: UserError, too.
        """
        self.progress.flush()
        best_before, self.best_val_loss = self.best_val_loss, self.val_loss if is_best else self.best_val_loss
        with phase("saving"):
            path, problem = self.world.on_main(
                lambda: self._write_checkpoint(is_best, self.save_optimizer or resumable)
            )
        self.owes_saving = path is None
        if path is not None:
            self.journal.checkpoint(self.iter_num, path, best_by=self.eval_weights if is_best else None)
        else:
            self.best_val_loss = best_before  # the best of what is on the disk: a later one shall have the name
            self.journal.checkpoint_failed(self.iter_num, problem)
            if must:
                raise UserError(
                    f"{self.out_dir}: the last checkpoint was not written: {problem}", exit_status=EXIT_FAILED
                )
        self.collector.collect()

    def _write_checkpoint(self, is_best: bool, with_optimizer: bool) -> tuple[Path | None, str]:
        """The path, or None and why there is none."""
        averages = self.ema.state() if self.ema else {}
        if not all(bool(torch.isfinite(each).all()) for each in (*self.model.parameters(), *averages.values())):
            raise UserError(
                f"the weights are not finite after step {self.iter_num}, and nothing was saved; go on from the last "
                "checkpoint with a lower learning_rate (--allow_change=learning_rate)",
                exit_status=EXIT_DIVERGED,
            )
        content = {
            **self.constants,
            "model": kept_state(self.model),
            **({"ema": averages} if self.ema else {}),
            **({"optimizer": self.optimizer.state_dict()} if with_optimizer else {}),
            "iter_num": self.iter_num,
            "rows_seen": self.rows_seen,
            "order": self.order.hex(),
            "owes_evaluation": self.owes_evaluation,
            "trained_tokens_seen": self.trained_tokens_seen,
            "val_loss": self.val_loss,
            "best_val_loss": self.best_val_loss,
            "is_best": is_best,
            "eval_weights": self.eval_weights,
            "progress": self.progress.state(),
            "watch": self.watch.state(),
        }
        try:
            path = save_checkpoint(
                self.out_dir,
                content,
                iter_num=self.iter_num,
                best=is_best,
                keep=self.keep_checkpoints,
                last=self.iter_num == self.journal.steps,
            )
        except (OSError, RuntimeError) as error:
            return None, str(error)
        return path, ""

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from the content of a checkpoint, whose weights the model has already.

        `saved` is empty afterwards: while its tensors are mapped the file takes room on the disk, deleted or not.
        """
        restore_optimizer(self.optimizer, saved["optimizer"])
        if self.ema is not None and saved["config"].get("ema_decay") is not None:  # else it begins here
            self.ema.load_state(saved.get("ema"))
        self.iter_num = saved["iter_num"]
        self.rows_seen = saved["rows_seen"]
        if "order" in saved:  # older checkpoints do not tell
            self.order, self.owes_evaluation = bytes.fromhex(saved["order"]), saved["owes_evaluation"]
            self.watch.load_state(saved["watch"])
        self.trained_tokens_seen = saved["trained_tokens_seen"]
        self.val_loss, self.best_val_loss = saved["val_loss"], saved["best_val_loss"]
        self.progress.load_state(saved["progress"])
        is_best = saved.get("is_best", False)
        self.world.on_main(lambda: name_again(self.out_dir, iter_num=self.iter_num, best=is_best))
        saved.clear()

    def close(self, status: str) -> None:
        """The last word in the run log, after everything that start() began has ended; the ranks need not agree."""
        if self.ahead is not None:
            self.ahead.close()
        if self.trace is not None:
            self.trace.stop()
        self.collector.stop()
        self.journal.close(
            status,
            iter=self.iter_num,
            rows_seen=self.rows_seen,
            trained_tokens_seen=self.trained_tokens_seen,
            val_loss=self.val_loss,
            best_val_loss=self.best_val_loss,
            skipped=self.watch.skipped,
            order=self.order.hex(),
        )

    def _next_batch(self) -> StepBatch:
        assert self.ahead is not None, "start() comes before the first step"
        with self.progress.stalled(), phase("batch"):
            return next(self.ahead)

    def _tell_of_trace(self, sentence: str) -> None:
        self.journal.trace(self.iter_num, sentence)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the moments of each parameter; weight decay and betas stay as the settings of this run have them.

    Raises UserError where the state belongs to other parameters.
    """
    chosen = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(dict(state))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint's optimizer state does not fit the model ({error}); start afresh") from error
    for group, values in zip(optimizer.param_groups, chosen, strict=True):
        group.update(values)
        for parameter in group["params"]:
            if state["state"] and not optimizer.state[parameter]:
                raise UserError("the checkpoint's optimizer state lacks the moments of some parameters; start afresh")
            for name, moment in own(optimizer.state[parameter]).items():
                if isinstance(moment, Tensor) and moment.dim() > 0 and moment.shape != parameter.shape:
                    shapes = f"{name} has shape {tuple(moment.shape)}, its parameter {tuple(parameter.shape)}"
                    raise UserError(f"the checkpoint's optimizer state does not fit the model ({shapes}); start afresh")


def own(moments: dict[str, Any]) -> dict[str, Any]:
    """The moments of a parameter with copies for those that are still mapped from a file, which could not go before."""
    for name, moment in moments.items():
        if isinstance(moment, Tensor) and moment.device.type == "cpu":
            moments[name] = moment.clone()
    return moments
