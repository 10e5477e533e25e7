"""The moving average of the weights: what it is, where it is seen, and that it goes on where it was."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import train_sft
from model_builder import load_pretrained
from sft.checkpoint import read_checkpoint
from sft.ema import MovingAverage
from sft.errors import UserError
from sft.memory import estimate
from sft.run import Run
from tests.conftest import SHAPE
from tests.test_memory import workload
from tests.tiny import tiny_model

MOVES, SKIPS = torch.tensor(False), torch.tensor(True)


def run_log(folder: Path) -> dict:
    return json.loads(max(folder.glob("run_*.json")).read_text())


def move(model: torch.nn.Module, *, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_it_is_the_exponential_average_of_the_weights_of_steps_that_moved_them():
    model = tiny_model(weight_tying=False)
    average, expected = MovingAverage(model, 0.9), {n: p.detach().double() for n, p in model.named_parameters()}
    for step in range(5):
        move(model, seed=step)
        average.update(SKIPS if step == 2 else MOVES)
        if step != 2:
            expected = {n: 0.9 * expected[n] + 0.1 * p.detach().double() for n, p in model.named_parameters()}
    assert average.state().keys() == expected.keys()
    for name, value in average.state().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_what_is_tied_is_averaged_once_and_what_is_frozen_not_at_all():
    model = tiny_model()
    model.final_norm.weight.requires_grad_(False)
    average = MovingAverage(model, 0.5)
    move(model, seed=0)
    average.update(MOVES)
    state = average.state()
    assert state["lm_head.weight"] is state["token_embeddings.weight"]
    assert model.state_dict().keys() - state.keys() == {"final_norm.weight"}
    before = tiny_model().token_embeddings.weight
    torch.testing.assert_close(state["lm_head.weight"], (before + model.token_embeddings.weight) / 2)


def test_the_model_has_the_averages_inside_and_its_own_weights_again_afterwards():
    model = tiny_model()
    average = MovingAverage(model, 0.5)
    move(model, seed=0)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    averages = {name: value.clone() for name, value in average.state().items()}
    with contextlib.suppress(KeyboardInterrupt), average.in_place():
        for name, value in model.state_dict().items():
            assert torch.equal(value, averages[name]), name
        assert model.lm_head.weight is model.token_embeddings.weight
        raise KeyboardInterrupt
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name]), name
        assert torch.equal(average.state()[name], averages[name]), name


def test_evaluations_and_the_best_checkpoint_are_of_the_average_and_say_so(arguments, tmp_path, capsys):
    train_sft.main(arguments(ema_decay=0.8, eval_interval=2, max_iters=4))
    printed, log = capsys.readouterr().out, run_log(tmp_path / "out")
    assert "about the last 5 steps, and 41.0% of the first weights at the end" in printed
    assert re.search(r"step      4/4  validation loss \d\.\d{4}  \(ema weights, \d+ rows", printed)
    assert [record["weights"] for record in log["eval_steps"]] == ["ema"] * 3
    assert [record["best_by"] for record in log["checkpoints"] if record["is_best"]] == ["ema"] * 2
    best = tmp_path / "out" / "ckpt_best.pt"
    content = read_checkpoint(best)
    assert content["eval_weights"] == "ema"
    model, average = load_pretrained(best).state_dict(), load_pretrained(best, weights="ema").state_dict()
    for name, value in average.items():
        assert torch.equal(value, content["ema"][name]), name
        assert torch.equal(model[name], content["model"][name]), name
    assert not torch.equal(model["lm_head.weight"], average["lm_head.weight"])

    torch.save({"model": average, "model_args": content["model_args"]}, tmp_path / "average.pt")
    base = {"model": "none", "checkpoint_path": tmp_path / "average.pt", "out_dir": tmp_path / "next"}
    train_sft.main(arguments(**base, max_iters=1))
    assert run_log(tmp_path / "next")["eval_steps"][0]["val_loss"] == content["val_loss"]
    assert run_log(tmp_path / "next")["eval_steps"][0]["weights"] == "model"


@pytest.mark.slow
def test_training_goes_its_way_as_without_an_average(arguments, tmp_path):
    train_sft.main(arguments(out_dir=tmp_path / "without", eval_interval=2))
    train_sft.main(arguments(out_dir=tmp_path / "with", eval_interval=2, ema_decay=0.5))
    one, two = (read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("without", "with"))
    assert two.keys() - one.keys() == {"ema"}
    for name, value in one["model"].items():
        assert torch.equal(two["model"][name], value), name


def test_an_interrupted_run_has_the_average_of_one_that_was_not(arguments, tmp_path, monkeypatch):
    options = {"ema_decay": 0.7, "max_iters": 6, "save_interval": 3, "eval_interval": 2, "dropout": 0.1}
    train_sft.main(arguments(**options, out_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_write_checkpoint", stop_after(3, Run._write_checkpoint))
        with pytest.raises(KeyboardInterrupt):
            train_sft.main(arguments(**options))
    train_sft.main(arguments(**options, resume="required"))
    whole, resumed = (read_checkpoint(tmp_path / name / "ckpt_000006.pt") for name in ("whole", "out"))
    for key in ("ema", "model"):
        for name, value in whole[key].items():
            assert torch.equal(resumed[key][name], value), name
    assert resumed["best_val_loss"] == whole["best_val_loss"]


def stop_after(step, write):
    def writing(run, *arguments):
        result = write(run, *arguments)
        if run.iter_num == step:
            raise KeyboardInterrupt
        return result

    return writing


@pytest.mark.parametrize(("first", "then"), [("0.5", "0.6"), ("0.5", "none"), ("none", "0.5")])
def test_a_resumed_run_with_another_decay_is_refused_by_name_unless_it_is_meant(arguments, tmp_path, first, then):
    train_sft.main(arguments(ema_decay=first, max_iters=1))
    again = {"ema_decay": then, "max_iters": 2, "resume": "required", "allow_change": "decay"}
    message = f"ema_decay: the run was started with {first}, not with {then}".replace("none", "None")
    with pytest.raises(UserError, match=message):
        train_sft.main(arguments(**again))
    train_sft.main(arguments(**{**again, "allow_change": "decay,ema_decay"}))
    assert ("ema" in read_checkpoint(tmp_path / "out" / "ckpt.pt")) == (then != "none")


def test_a_run_from_before_there_were_averages_had_none(arguments, tmp_path):
    train_sft.main(arguments(max_iters=1))
    path = tmp_path / "out" / "ckpt_000001.pt"
    content = torch.load(path, weights_only=True)
    del content["config"]["ema_decay"]
    torch.save(content, path)
    again = {"max_iters": 2, "resume": "required", "allow_change": "decay"}
    with pytest.raises(UserError, match=r"ema_decay: the run was started with None, not with 0\.5"):
        train_sft.main(arguments(**again, ema_decay=0.5))
    train_sft.main(arguments(**again))


def test_a_checkpoint_that_has_lost_its_average_is_refused(arguments, tmp_path):
    train_sft.main(arguments(ema_decay=0.5, max_iters=1))
    path = tmp_path / "out" / "ckpt_000001.pt"
    content = torch.load(path, weights_only=True)
    del content["ema"]
    torch.save(content, path)
    with pytest.raises(UserError, match="the checkpoint's moving average does not fit the model"):
        train_sft.main(arguments(ema_decay=0.5, max_iters=2, resume="required", allow_change="decay"))


def test_an_average_of_another_model_is_refused():
    average = MovingAverage(tiny_model(), 0.5)
    state = average.state()
    for odd in (
        {**state, "more": state["lm_head.weight"]},
        {**state, "lm_head.weight": torch.zeros(2)},
        {**state, "lm_head.weight": 1},
        {},
        None,
    ):
        with pytest.raises(UserError, match="the checkpoint's moving average does not fit the model"):
            average.load_state(odd)


def test_an_average_that_is_not_finite_is_never_written(arguments, tmp_path, monkeypatch):
    def spoil(average, skips):
        average.state()["final_norm.weight"][0] = float("nan")

    monkeypatch.setattr(MovingAverage, "update", spoil)
    with pytest.raises(UserError, match="the weights are not finite after step 4, and nothing was saved"):
        train_sft.main(arguments(ema_decay=0.5, eval_interval="none"))
    assert not list((tmp_path / "out").glob("ckpt*"))


def test_averages_are_not_to_be_had_where_there_are_none(arguments, tmp_path):
    train_sft.main(arguments(max_iters=1))
    path = tmp_path / "out" / "ckpt.pt"
    with pytest.raises(UserError, match=r"ckpt\.pt: holds no moving average of its weights \(ema\)"):
        load_pretrained(path, weights="ema")


def test_the_estimate_of_memory_has_the_average_and_nothing_else_grows():
    without, with_average = workload(), dataclasses.replace(workload(), ema_decay=0.5)
    size = sum(parameter.nbytes for parameter in without.model.parameters())
    parts = dict(estimate(with_average, "none").parts)
    assert parts.pop("moving average") == size
    plain = dict(estimate(without, "none").parts)
    del parts["program"], plain["program"]
    assert parts == plain


@pytest.mark.slow
@pytest.mark.parametrize("save_optimizer", [True, False])
def test_the_promised_size_of_a_checkpoint_counts_the_average(arguments, tmp_path, capsys, save_optimizer):
    options = {"model": {**SHAPE, "n_embd": 64}, "ema_decay": 0.9, "save_optimizer": save_optimizer, "max_iters": 1}
    train_sft.main([*arguments(**options), "--dry_run"])
    (size,) = re.findall(r"a checkpoint \(([\d,]+) bytes\)", capsys.readouterr().out)
    train_sft.main(arguments(**options))
    assert int(size.replace(",", "")) == pytest.approx((tmp_path / "out" / "ckpt.pt").stat().st_size, rel=0.01)
