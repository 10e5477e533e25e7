"""What counts as the time of a step, and what of that as stall."""

import contextlib
import json
import threading
from time import sleep

import pytest
import torch

import train_sft
from sft import progress
from sft.batches import TrainLoader
from sft.evaluation import Validation
from sft.journal import Journal
from sft.prefetch import Ahead
from sft.progress import Progress, Totals
from sft.run import Run
from sft.world import World
from tests.tiny import CPU_WORLD


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)

    def takes(self, seconds: float, act=None):
        """The function, made to take so long."""

        def slow(*arguments, **options):
            self.now += seconds
            return act(*arguments, **options) if act else None

        return slow


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def run_log(folder) -> dict:
    return json.loads(max(folder.glob("run_*.json")).read_text())


def test_evaluation_saving_and_warm_up_are_not_in_the_time_of_a_step(arguments, tmp_path, monkeypatch, clock):
    """Steps of 2 seconds; everything else takes hours, and none of it is seen in tokens/s."""
    monkeypatch.setattr(Run, "update", clock.takes(2.0, Run.update))
    monkeypatch.setattr(Run, "save", clock.takes(1e4, Run.save))
    monkeypatch.setattr(Validation, "evaluate", clock.takes(1e5, Validation.evaluate))
    monkeypatch.setattr(Run, "warm_up", clock.takes(1e6, Run.warm_up))
    train_sft.main(arguments(max_iters=6, eval_interval=2, save_interval=3, compile=False))
    log = run_log(tmp_path / "out")
    assert [record["iter"] for record in log["eval_steps"]] == [0, 2, 4, 6]
    for record in log["training_iterations"]:
        assert record["time_ms"] == pytest.approx(2000)
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / 2)
        assert record["trained_tokens_per_second"] == pytest.approx(record["trained_tokens"] / 2)
        assert record["trained_tokens"] < record["tokens"]


def test_waiting_for_batches_and_telling_is_stall_and_part_of_the_step(arguments, tmp_path, monkeypatch, clock):
    """A step of 2 seconds that waits a quarter of a second for each of its 2 batches; a report takes 1 second."""
    monkeypatch.setattr(Run, "update", clock.takes(1.5, Run.update))
    monkeypatch.setattr(Journal, "iteration", clock.takes(1.0, Journal.iteration))
    monkeypatch.setattr("sft.prefetch.Ahead.__next__", clock.takes(0.25, Ahead.__next__))
    train_sft.main(arguments(max_iters=6, log_interval=2, eval_interval="none", gradient_accumulation_steps=2))
    log = run_log(tmp_path / "out")
    stalls = [record["stall_ms"] for record in log["training_iterations"]]
    assert stalls == pytest.approx([500, 1000, 1000])  # the report of a record is over only in the next one
    assert [record["time_ms"] for record in log["training_iterations"]] == pytest.approx([2000, 2500, 2500])
    assert log["summary"]["stall_share"] == pytest.approx((1.0 + 2.0 + 2.0) / (4.0 + 5.0 + 5.0))


@pytest.mark.slow
def test_loader_and_log_stall_less_than_half_a_percent_of_steps_of_half_a_second(arguments, tmp_path, monkeypatch):
    """Measured by the trainer, with its real loader and log; the best record, since the machine may be busy."""
    update = Run.update

    def slow(run: Run, **options) -> None:
        update(run, **options)
        sleep(0.5)

    monkeypatch.setattr(Run, "update", slow)
    train_sft.main(arguments(max_iters=8, log_interval=4, eval_interval="none"))
    records = run_log(tmp_path / "out")["training_iterations"]
    assert 0 < min(record["stall_ms"] / record["time_ms"] for record in records) <= 0.005


def test_the_stall_of_a_record_survives_a_checkpoint():
    first = Progress(CPU_WORLD)
    first.totals.stall_seconds = 0.5
    second = Progress(CPU_WORLD)
    second.load_state(first.state())
    assert second.totals == first.totals
    older = {name: value for name, value in first.state().items() if name != "stall_seconds"}
    second.load_state(older)  # a checkpoint of an earlier version
    assert second.totals == Totals()


def test_counts_are_joined_over_all_ranks(monkeypatch):
    monkeypatch.setattr(World, "sum", lambda world, values: values * world.size)
    three = Progress(World(rank=0, size=3, device=torch.device("cpu")))
    three._counts = [5, 7, 11]
    totals = three.flush()
    assert (totals.trained_tokens, totals.tokens, totals.attended_pairs) == (15, 21, 33)


def test_a_run_needs_the_same_batches_from_its_thread_as_from_the_loader(arguments, tmp_path, monkeypatch):
    """Bitwise: the losses of a run whose batches are made where they are asked for."""
    train_sft.main(arguments(out_dir=tmp_path / "ahead", dropout=0.1, gradient_accumulation_steps=3))

    class OneByOne:
        def __init__(self, items, **_):
            self.items = items

        def __iter__(self):
            return self.items

        def __next__(self):
            return next(self.items)

        def close(self):
            pass

    monkeypatch.setattr("sft.run.Ahead", OneByOne)
    train_sft.main(arguments(out_dir=tmp_path / "asked", dropout=0.1, gradient_accumulation_steps=3))
    ahead, asked = (run_log(tmp_path / name)["training_iterations"] for name in ("ahead", "asked"))
    assert [record["loss"] for record in ahead] == [record["loss"] for record in asked]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_thread_ends_with_the_run_however_it_ends(arguments, monkeypatch, error):
    update = Run.update

    def failing(run: Run, **options) -> None:
        update(run, **options)
        assert run.iter_num > 1 or [thread for thread in threading.enumerate() if thread.name == "batches ahead"]
        if error is not None and run.iter_num == 2:
            raise error

    monkeypatch.setattr(Run, "update", failing)
    with pytest.raises(error) if error else contextlib.nullcontext():
        train_sft.main(arguments(eval_interval="none", max_iters=50 if error else 4))
    assert not [thread for thread in threading.enumerate() if thread.name == "batches ahead"]


def test_an_error_of_the_loader_ends_the_run_with_its_own_message(arguments, tmp_path, monkeypatch):
    step = TrainLoader.step

    def broken(loader: TrainLoader, number: int, **options):
        if number == 2:
            raise OSError("the disk is gone")
        return step(loader, number, **options)

    monkeypatch.setattr(TrainLoader, "step", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        train_sft.main(arguments(eval_interval="none"))
    log = run_log(tmp_path / "out")
    assert log["status"] == "failed: OSError: the disk is gone"
    assert not [thread for thread in threading.enumerate() if thread.name == "batches ahead"]
    assert [record["iter"] for record in log["training_iterations"]] == [1, 2]


def test_graphs_that_other_ranks_compile_are_counted_after_the_warm_up(monkeypatch):
    class OfTwo(World):
        def sum(self, values):
            return 2 * values  # the other rank does as this one

    made = 5
    monkeypatch.setattr("sft.progress.compiled_graphs", lambda: made)
    progress = Progress(OfTwo(rank=0, size=2, device=torch.device("cpu")))
    assert progress.flush().recompiled == 0
    progress.begin()
    made = 8
    assert progress.take().recompiled == 6
    assert progress.take().recompiled == 0
