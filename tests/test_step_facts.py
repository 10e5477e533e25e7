"""A step that is not finite, or out of the ordinary: nothing moves, its rows are named, and a run gives up in time."""

import copy
import errno
import math

import pytest
import torch
from torch import nn

import train_sft
from sft.batches import make_batch
from sft.errors import UserError
from sft.optim import make_optimizer
from sft.run import Run
from sft.step import SummedLoss, train_step
from sft.step_facts import MEMORY, SHORTEST_STORY, Judge, Ordinary, facts_of
from sft.step_watch import reason
from tests.test_train import assert_equal_trees, run_log
from tests.tiny import CPU_WORLD, random_documents, target_weight, tiny_model

ROWS = [random_documents([20, 12]), random_documents([32], seed=1)]


class TimesFactor(nn.Module):
    """A loss that is multiplied by something."""

    def __init__(self, inner: nn.Module, factor: float):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, batch, *, grad_scale=1.0):
        return self.inner(batch, grad_scale=grad_scale) * self.factor


def one_step(model, optimizer, factor=1.0, **options):
    batch = make_batch(ROWS, block_size=32, pad_id=0)
    weight = target_weight([document for row in ROWS for document in row])
    settings = {"target_weight": weight, "learning_rate": 1e-2, "grad_clip": 1.0, "world": CPU_WORLD}
    return train_step(TimesFactor(SummedLoss(model), factor), optimizer, [batch], **settings, **options)


def state_of(model, optimizer):
    return copy.deepcopy({"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()["state"]})


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_that_is_not_finite_moves_no_bit_of_weights_and_moments(factor, dtype):
    model = tiny_model().to(dtype)
    optimizer = make_optimizer(model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    one_step(model, optimizer)
    before = state_of(model, optimizer)
    result = one_step(model, optimizer, factor)
    assert bool(result.judgement.skips)
    assert_equal_trees(state_of(model, optimizer), before)
    assert not bool(one_step(model, optimizer).judgement.skips)
    after = state_of(model, optimizer)
    assert all(not torch.equal(after["model"][name], before["model"][name]) for name in before["model"])


def test_a_gradient_that_is_not_finite_beside_a_finite_loss_is_skipped_too():
    model = tiny_model()
    optimizer = make_optimizer(model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    one_step(model, optimizer)
    before = state_of(model, optimizer)
    next(model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    result = one_step(model, optimizer)
    facts = facts_of(7, result.judgement.told.tolist())
    assert math.isfinite(facts.loss)
    assert not facts.is_finite
    assert facts.is_skipped
    assert facts.non_finite_ranks == []
    assert reason(facts) == "the gradient's norm is nan"
    assert_equal_trees(state_of(model, optimizer), before)


def judged(judge, loss, norm=1.0):
    told = judge.judge(torch.tensor(loss).double(), torch.tensor(norm), target_weight=1.0, stop=False).told
    return facts_of(1, told.tolist())


def wave(step):
    return 2.0 + 0.1 * math.sin(step)


@pytest.mark.parametrize("skip", [False, True])
def test_a_spike_is_found_once_there_is_a_story_and_skipped_on_request(skip):
    judge = Judge(CPU_WORLD, spike_sigma=6.0, skip_spikes=skip)
    assert judged(judge, 100.0).loss_spike == 0  # nothing is known yet
    judge = Judge(CPU_WORLD, spike_sigma=6.0, skip_spikes=skip)
    assert not any(judged(judge, wave(step), wave(step)).loss_spike for step in range(SHORTEST_STORY))
    facts = judged(judge, 3.0, 2.0)
    assert facts.loss_spike > 6
    assert facts.norm_spike == 0
    assert facts.is_skipped == skip
    assert "the loss 3 is" in reason(facts)
    assert judged(judge, 2.0, 3.0).norm_spike > 6
    assert judged(judge, -3.0).loss_spike == 0  # a loss that falls is no spike


def test_a_lasting_change_becomes_ordinary_and_one_outlier_does_not_hide_the_next():
    judge = Judge(CPU_WORLD, spike_sigma=6.0)
    for step in range(3 * MEMORY):
        judged(judge, wave(step))
    assert judged(judge, 50.0).loss_spike > 100
    assert judged(judge, 5.0).loss_spike > 6
    spikes = [judged(judge, 5.0 + wave(step)).loss_spike > 0 for step in range(3 * MEMORY)]
    assert spikes[0]
    assert not any(spikes[-MEMORY:])


def test_what_is_not_finite_is_not_learnt_and_the_state_goes_on_to_the_bit():
    one, two = Ordinary(torch.device("cpu")), Ordinary(torch.device("cpu"))

    def learn(ordinary, value, *, is_finite=True):
        ordinary.spikes(torch.tensor([value, 1.0]).double(), sigma=6.0, is_finite=torch.tensor(is_finite))

    for step in range(30):
        learn(one, wave(step))
        learn(two, wave(step))
        if step % 3 == 0:
            learn(two, math.nan, is_finite=False)
            fresh = Ordinary(torch.device("cpu"))
            fresh.load_state(two.state())
            two = fresh
    assert one.state() == two.state()


@pytest.fixture
def broken_at(monkeypatch):
    """Make the loss of some steps not a number."""

    def break_at(*steps: int) -> None:
        forward, update = SummedLoss.forward, Run.update
        current = []

        def noted(run, **options):
            current[:] = [run.iter_num + 1]
            return update(run, **options)

        def broken(module, batch, **options):
            loss = forward(module, batch, **options)
            return loss * math.nan if current and current[0] in steps and module.training else loss

        monkeypatch.setattr(Run, "update", noted)
        monkeypatch.setattr(SummedLoss, "forward", broken)

    return break_at


def test_a_run_skips_counts_and_names_the_rows_of_what_is_not_finite(arguments, tmp_path, broken_at, capsys):
    broken_at(3)
    train_sft.main(arguments(max_iters=6, log_interval=2, eval_interval="none"))
    log = run_log(tmp_path / "out")
    (event,) = (event for event in log["events"] if event["kind"] == "odd_step")
    assert (event["iter"], event["rows"], event["skipped"]) == (3, [4, 5], True)
    assert all(sample.partition("conversations.jsonl:")[2].isdigit() for sample in event["samples"])
    assert [record["skipped"] for record in log["training_iterations"]] == [0, 1, 0]
    assert all(math.isfinite(record["loss"]) for record in log["training_iterations"])
    assert log["summary"]["skipped"] == 1
    assert "skipped: the loss on rank 0 is nan" in capsys.readouterr().out
    steps = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["optimizer"]["state"][0]["step"]
    assert steps == 5


def test_a_run_gives_up_after_so_many_skipped_steps_in_a_row(arguments, tmp_path, broken_at):
    broken_at(2, 4, 5, 6)
    with pytest.raises(UserError, match="step 6: 3 steps in a row were skipped") as caught:
        train_sft.main(arguments(max_iters=9, max_skipped_steps=3, save_interval=1))
    assert caught.value.exit_status == 3
    assert run_log(tmp_path / "out")["status"].startswith("failed: ")
    assert run_log(tmp_path / "out")["checkpoints"][-1]["iter"] == 5


def test_skipped_steps_in_a_row_are_counted_over_a_resume(arguments, broken_at):
    broken_at(3, 4, 5, 6)
    train_sft.main(arguments(max_iters=4, max_skipped_steps=3))
    with pytest.raises(UserError, match="step 5: 3 steps in a row"):
        train_sft.main(arguments(max_iters=8, max_skipped_steps=3, lr_decay_iters=4, resume="required"))


def test_weights_that_are_not_finite_are_never_saved(arguments, tmp_path, monkeypatch):
    update = Run.update

    def overflow(run, **options):
        update(run, **options)
        if run.iter_num == 3:
            next(run.model.parameters()).data[0] = math.inf

    monkeypatch.setattr(Run, "update", overflow)
    with pytest.raises(UserError, match=r"weights are not finite after step 3, and nothing was saved") as caught:
        train_sft.main(arguments(save_interval=1, max_skipped_steps=100))
    assert caught.value.exit_status == 3
    saved = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert saved["iter_num"] == 2
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_a_save_that_fails_is_told_and_tried_again_and_the_run_goes_on(arguments, tmp_path, monkeypatch, capsys):
    import sft.run

    save, tries = sft.run.save_checkpoint, []

    def full(*positional, **named):
        tries.append(named["iter_num"])
        if len(tries) <= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*positional, **named)

    monkeypatch.setattr(sft.run, "save_checkpoint", full)
    train_sft.main(arguments(max_iters=8, save_interval=4, log_interval=1, eval_interval="none"))
    assert tries == [4, 5, 6, 8]
    log = run_log(tmp_path / "out")
    assert [event["iter"] for event in log["events"] if event["kind"] == "checkpoint_failed"] == [4, 5]
    assert [each["iter"] for each in log["checkpoints"]] == [6, 8]
    assert "no checkpoint was written ([Errno 28] No space left on device)" in capsys.readouterr().out


def test_a_last_save_that_fails_is_a_failed_run(arguments, tmp_path, monkeypatch):
    import sft.run

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sft.run, "save_checkpoint", full)
    with pytest.raises(UserError, match=r"the last checkpoint was not written: .*No space left") as caught:
        train_sft.main(arguments())
    assert caught.value.exit_status == 1
