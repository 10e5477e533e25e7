"""A run with compiled blocks compiles before its first step, and tells of what it compiles later."""

import json

import pytest
import torch

import train_sft
from model_builder import ConfigurableGPT
from sft.evaluation import Validation
from sft.run import Run


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch):
    """Graphs are made as for inductor, and run as they are."""
    compile_blocks = ConfigurableGPT.compile_blocks
    monkeypatch.setattr(ConfigurableGPT, "compile_blocks", lambda model: compile_blocks(model, backend="eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run_log(folder) -> dict:
    return json.loads(max(folder.glob("run_*.json")).read_text())


COMPILED = {"compile": True, "batch_size": 3, "gradient_accumulation_steps": 2, "max_iters": 8, "block_size": 32}


def test_nothing_is_compiled_after_warm_up_not_for_an_evaluation_nor_for_its_last_batch(arguments, tmp_path):
    """The last batch of an evaluation has fewer rows. A resumed run evaluates for the first time on its way."""
    train_sft.main(arguments(**COMPILED, eval_interval=3))
    torch._dynamo.reset()  # as in a new process
    train_sft.main(arguments(**{**COMPILED, "max_iters": 16}, eval_interval=3, lr_decay_iters=8, resume="required"))
    logs = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("run_*.json"))]
    rows = logs[1]["eval_steps"][0]["rows"]
    assert rows > 3
    assert rows % 3
    assert [log["summary"]["recompiled"] for log in logs] == [0, 0]
    assert not [event for log in logs for event in log["events"] if event["kind"] == "recompiled"]
    assert all(record["recompiled"] == 0 for log in logs for record in log["training_iterations"])


def test_a_graph_that_is_compiled_during_a_step_is_told_with_its_step(arguments, tmp_path, monkeypatch, capsys):
    update = Run.update

    def surprising(run: Run, **options) -> None:
        update(run, **options)
        if run.iter_num == 5:
            torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))

    monkeypatch.setattr(Run, "update", surprising)
    train_sft.main(arguments(**COMPILED, eval_interval="none", log_interval=2))
    log = run_log(tmp_path / "out")
    assert [record["recompiled"] for record in log["training_iterations"]] == [0, 0, 1, 0]
    (event,) = log["events"]
    assert (event["kind"], event["iter"], event["graphs"]) == ("recompiled", 6, 1)
    assert log["summary"]["recompiled"] == 1
    assert "step      6/8  1 graphs compiled since the last line" in capsys.readouterr().out


@pytest.mark.slow
def test_batches_of_one_shape_give_the_same_evaluation(arguments, tmp_path):
    train_sft.main(arguments(**COMPILED, eval_interval=4, out_dir=tmp_path / "compiled"))
    train_sft.main(arguments(**{**COMPILED, "compile": False}, eval_interval=4, out_dir=tmp_path / "plain"))
    compiled, plain = (run_log(tmp_path / name)["eval_steps"] for name in ("compiled", "plain"))
    for one, two in zip(compiled, plain, strict=True):
        assert one["val_loss"] == pytest.approx(two["val_loss"], rel=1e-4)
        assert (one["rows"], one["trained_tokens"]) == (two["rows"], two["trained_tokens"])


def test_a_run_that_never_evaluates_tries_no_evaluation_out(arguments, monkeypatch):
    monkeypatch.setattr(Validation, "try_out", lambda *_: pytest.fail("tried out"))
    train_sft.main(arguments(**COMPILED, eval_interval="none"))
