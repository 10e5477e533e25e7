"""The programs from the outside: prepare, train, kill, resume, repeat, refuse."""

import json
import math
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import prepare_sft
import train_sft
from model_builder import load_pretrained
from sft.errors import UserError
from sft.evaluation import Evaluation, Validation
from sft.run import Run
from sft.tokenizer import load_tokenizer
from tests.conftest import ROOT, SHAPE
from tests.launch import torchrun
from tests.preparing import change_meta


def run_log(folder: Path) -> dict:
    """The newest run log of a folder."""
    return json.loads(max(folder.glob("run_*.json")).read_text())


def losses(log: dict) -> dict[int, float]:
    return {record["iter"]: record["loss"] for record in log["training_iterations"]}


def assert_equal_trees(one, two, where=""):
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_equal_trees(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), where
        for place, pair in enumerate(zip(one, two, strict=True)):
            assert_equal_trees(*pair, f"{where}[{place}]")
    else:
        assert one == two, where


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_run_killed_after_a_save_and_resumed_equals_one_that_was_not(arguments, tmp_path, processes):
    """Bitwise in weights, optimizer and logged losses: with dropout, accumulation, an epoch's end and evaluations."""
    options = {"max_iters": 20, "dropout": 0.1, "log_interval": 4, "ema_decay": 0.8}  # 10 is inside a log interval
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    torchrun(processes, ROOT / "train_sft.py", *arguments(**options, out_dir=whole))
    killed = torchrun(
        processes, ROOT / "tests" / "killed_run.py", 10, *arguments(**options, out_dir=broken), check=False
    )
    assert killed.returncode != 0
    assert not (broken / "ckpt_000020.pt").exists()
    before = losses(run_log(broken))
    for path in broken.glob("run_*.json"):
        path.unlink()
    torchrun(processes, ROOT / "train_sft.py", *arguments(**options, out_dir=broken, resume="required"))

    expected, got = (torch.load(folder / "ckpt_000020.pt", weights_only=True) for folder in (whole, broken))
    assert expected["rows_seen"] == 20 * 2 * processes
    assert expected["rows_seen"] > run_log(whole)["startup_info"]["rows_per_epoch"]  # an epoch has ended
    counters = ("best_val_loss", "val_loss", "iter_num", "rows_seen", "trained_tokens_seen")
    for key in ("model", "ema", "optimizer", *counters):
        assert_equal_trees(got[key], expected[key], key)
    resumed = run_log(broken)
    assert {**before, **losses(resumed)} == losses(run_log(whole))
    assert sorted(losses(resumed)) == [12, 16, 20]
    assert [event["kind"] for event in resumed["events"]] == ["resumed"]


@pytest.mark.slow
def test_two_processes_follow_the_trajectory_of_one(arguments, tmp_path):
    """Same rows, same dropout, same divisor: what differs is the order of a float64 sum."""
    options = {"gradient_accumulation_steps": "none", "rows_per_step": 4, "dropout": 0.1, "dtype": "float64"}
    train_sft.main(arguments(**options, out_dir=tmp_path / "one"))
    torchrun(2, ROOT / "train_sft.py", *arguments(**options, out_dir=tmp_path / "two"))
    one, two = run_log(tmp_path / "one"), run_log(tmp_path / "two")
    assert losses(two) == pytest.approx(losses(one), rel=1e-12)
    for record, other in zip(one["training_iterations"], two["training_iterations"], strict=True):
        assert other["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-12)
        assert (other["tokens"], other["trained_tokens"]) == (record["tokens"], record["trained_tokens"])
    assert two["eval_steps"][-1]["val_loss"] == pytest.approx(one["eval_steps"][-1]["val_loss"], rel=1e-12)


def test_a_finished_run_leaves_its_log_its_checkpoints_and_its_tokenizer(arguments, tmp_path, prepared):
    train_sft.main(arguments(max_iters=12, out_dir=tmp_path, keep_checkpoints=1))
    log = run_log(tmp_path)
    assert log["status"] == "finished"
    assert log["config"]["learning_rate"] == 1e-2
    assert log["origin"]["learning_rate"] == "command line"
    assert log["origin"]["beta1"] == "default"
    assert [record["iter"] for record in log["training_iterations"]] == list(range(1, 13))
    assert [record["iter"] for record in log["eval_steps"]] == [0, 5, 10, 12]
    assert log["eval_steps"][-1]["val_loss"] < log["eval_steps"][0]["val_loss"]
    first = log["training_iterations"][0]
    assert first["trained_tokens"] <= first["tokens"] <= 2 * 64
    assert first["lr"] == pytest.approx(1e-2 / 3)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"ckpt_000012.pt", "ckpt.pt", "ckpt_best.pt", "tokenizer.json"} <= names
    assert not {"ckpt_000005.pt", "ckpt_000010.pt"} & names

    assert list(first) == [
        *("iter", "loss", "lr", "grad_norm", "trained_tokens", "tokens"),
        *("time_ms", "tokens_per_second", "mfu", "memory_gib"),
        *("trained_tokens_per_second", "stall_ms", "recompiled", "skipped", "order"),
    ]
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert content.keys() >= {
        *("model", "optimizer", "model_args", "iter_num", "val_loss", "best_val_loss", "config", "config_origins"),
        *(
            "data_fingerprint",
            "packing_version",
            "tokenizer_fingerprint",
            "template",
            "rows_per_step",
            "world_size",
            "decay",
            "rows_seen",
            "order",
            "owes_evaluation",
            "watch",
            "trained_tokens_seen",
            "progress",
        ),
    }
    assert content["config_origins"]["max_iters"] == "command line"
    assert content["config"]["max_iters"] == 12
    assert content["tokenizer_fingerprint"] == load_tokenizer(tmp_path).fingerprint
    model = load_pretrained(tmp_path / "ckpt.pt")
    assert_equal_trees(dict(model.state_dict()), dict(content["model"]))


def test_a_run_log_repeats_its_run(arguments, tmp_path):
    train_sft.main(arguments(out_dir=tmp_path / "first", dropout=0.1))
    log = next((tmp_path / "first").glob("run_*.json"))
    train_sft.main([str(log), f"--out_dir={tmp_path / 'second'}"])
    assert losses(run_log(tmp_path / "second")) == losses(run_log(tmp_path / "first"))


def test_rows_per_step_fixes_the_product_and_max_epochs_the_length(arguments, tmp_path):
    changes = {"gradient_accumulation_steps": "none", "max_iters": "none", "max_epochs": 2, "eval_interval": "none"}
    train_sft.main(arguments(**changes, rows_per_step=4))
    log = run_log(tmp_path / "out")
    rows = log["startup_info"]["rows_per_epoch"]
    assert log["startup_info"]["rows_per_step"] == 4
    assert log["startup_info"]["steps"] == log["summary"]["iter"] == -(-2 * rows // 4)


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"batch_size": 4}])
def test_empty_rows_that_fill_up_a_step_change_nothing(arguments, tmp_path, change):
    options = {"gradient_accumulation_steps": "none", "rows_per_step": 3, "dtype": "float64"}
    train_sft.main(arguments(**options, out_dir=tmp_path / "even"))
    train_sft.main(arguments(**options, **change, out_dir=tmp_path / "uneven"))
    even, uneven = (run_log(tmp_path / name)["training_iterations"] for name in ("even", "uneven"))
    for one, two in zip(even, uneven, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-12)
        for name in ("tokens", "trained_tokens", "order"):
            assert two[name] == one[name]


@pytest.mark.parametrize(
    "change", [{"activation_checkpointing": "full"}, {"batch_size": 2, "gradient_accumulation_steps": 1}]
)
def test_memory_settings_do_not_change_the_trajectory(arguments, tmp_path, change):
    plain, changed = tmp_path / "plain", tmp_path / "changed"
    train_sft.main(arguments(out_dir=plain, dtype="float64"))
    train_sft.main(arguments(out_dir=changed, dtype="float64", **change))
    assert losses(run_log(changed)) == pytest.approx(losses(run_log(plain)), rel=1e-9)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_trajectory(arguments, tmp_path):
    train_sft.main(arguments(out_dir=tmp_path / "plain"))
    train_sft.main(arguments(out_dir=tmp_path / "compiled", compile=True))
    assert losses(run_log(tmp_path / "compiled")) == pytest.approx(losses(run_log(tmp_path / "plain")), rel=1e-4)


def test_a_base_with_a_smaller_vocabulary_grows_and_says_so(arguments, tmp_path, capsys):
    base = {**SHAPE, "vocab_size": 400}
    train_sft.main(arguments(model=base, out_dir=tmp_path / "base"))
    content = torch.load(tmp_path / "base" / "ckpt.pt", weights_only=True)
    small = {**content["model_args"], "vocab_size": 300}
    model = {
        name: tensor[:300] if name.startswith(("token_emb", "lm_head")) else tensor
        for name, tensor in content["model"].items()
    }
    torch.save({"model": model, "model_args": small}, tmp_path / "small.pt")
    capsys.readouterr()
    train_sft.main(arguments(model="none", checkpoint_path=tmp_path / "small.pt"))
    assert "vocabulary 300 -> " in capsys.readouterr().out
    assert load_pretrained(tmp_path / "out" / "ckpt.pt").vocab_size > 300


def test_another_weight_decay_on_resume_is_used(arguments, tmp_path):
    train_sft.main(arguments())
    changes = {"weight_decay": 0.5, "beta1": 0.1, "allow_change": "decay,weight_decay,beta1"}
    train_sft.main(arguments(resume="auto", max_iters=8, **changes))
    group = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["betas"][0]) == (0.5, 0.1)


def test_a_new_model_has_a_drawn_embedding_for_every_id_of_the_data(arguments, tmp_path):
    train_sft.main(arguments(model={**SHAPE, "vocab_size": 10}, learning_rate=1e-12, min_lr=0))
    embedding = load_pretrained(tmp_path / "out" / "ckpt.pt").token_embeddings.weight
    assert len(embedding) > 10
    assert len(embedding.unique(dim=0)) == len(embedding)


def test_a_gpu_out_of_memory_is_one_message(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "update", mock.Mock(side_effect=torch.cuda.OutOfMemoryError))
    with pytest.raises(UserError, match="is out of memory in the run: a micro-batch has batch_size 1 x") as caught:
        train_sft.main(arguments())
    assert caught.value.exit_status == 1
    assert run_log(tmp_path / "out")["status"] == "failed: out of memory"


def test_the_first_lines_say_what_a_step_comes_to(arguments, capsys):
    train_sft.main(arguments())
    printed = capsys.readouterr().out
    assert "step     1 rows x 2 micro-steps x 1 processes = 2 rows = 128 tokens a step" in printed
    assert re.search(r"step      1/4  loss +\d\.\d{4}  lr 3\.33e-03  norm +\d+\.\d\d +\d+ ms +[\d.]+k? +tok/s", printed)


def test_a_validation_loss_that_is_no_number_is_never_the_best(arguments, tmp_path, monkeypatch):
    values = iter([3.0, math.nan, 5.0, 6.0])
    monkeypatch.setattr(Validation, "evaluate", lambda *_, **__: Evaluation(next(values), trained_tokens=1, rows=1))
    train_sft.main(arguments(eval_interval=1, max_iters=3))
    log = run_log(tmp_path / "out")
    assert [record["is_best"] for record in log["eval_steps"]] == [False, False, True, False]
    assert log["eval_steps"][1]["val_loss"] is None
    assert log["summary"]["best_val_loss"] == 5.0
    assert torch.load(tmp_path / "out" / "ckpt_best.pt", weights_only=True)["iter_num"] == 2


def test_the_best_evaluation_is_remembered_over_a_resume(arguments, tmp_path, monkeypatch):
    values = iter([9.0, 2.0, 3.0])
    monkeypatch.setattr(Validation, "evaluate", lambda *_, **__: Evaluation(next(values), trained_tokens=1, rows=1))
    train_sft.main(arguments(max_iters=4))
    train_sft.main(arguments(max_iters=5, resume="required", lr_decay_iters=4))
    assert run_log(tmp_path / "out")["eval_steps"] == [mock.ANY]
    assert not run_log(tmp_path / "out")["eval_steps"][0]["is_best"]
    assert torch.load(tmp_path / "out" / "ckpt_best.pt", weights_only=True)["iter_num"] == 4


def test_a_record_covers_the_steps_since_the_last_one_and_no_others(arguments, tmp_path):
    options = {"max_iters": 8, "eval_interval": "none", "dtype": "float64"}
    train_sft.main(arguments(**options, out_dir=tmp_path / "each"))
    train_sft.main(arguments(**options, out_dir=tmp_path / "fourth", log_interval=4))
    each, fourth = (run_log(tmp_path / name)["training_iterations"] for name in ("each", "fourth"))
    for record, covered in zip(fourth, (each[:4], each[4:]), strict=True):
        for count in ("tokens", "trained_tokens"):
            assert record[count] == sum(one[count] for one in covered)
        loss_sum = sum(one["loss"] * one["trained_tokens"] for one in covered)
        assert record["loss"] == pytest.approx(loss_sum / record["trained_tokens"], rel=1e-12)


def test_dropout_reaches_a_model_that_was_loaded(arguments, tmp_path):
    train_sft.main(arguments(out_dir=tmp_path / "base"))
    first = []
    for rate in (0.0, 0.5):
        start = {"model": "none", "checkpoint_path": tmp_path / "base" / "ckpt.pt", "out_dir": tmp_path / str(rate)}
        train_sft.main(arguments(**start, dropout=rate, eval_interval="none", max_iters=1))
        first.append(losses(run_log(tmp_path / str(rate)))[1])
    assert first[1] > first[0] + 0.01


def test_a_start_removes_what_a_killed_save_has_left(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ckpt_000001.pt.partial").write_bytes(b"half")
    train_sft.main(arguments())
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_run_that_breaks_says_so_in_its_log(arguments, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for error, status in ((RuntimeError("out of luck"), "failed: RuntimeError: out of luck"), (None, "interrupted")):
        with monkeypatch.context() as patch:
            patch.setattr(Run, "update", interrupt if error is None else mock.Mock(side_effect=error))
            with pytest.raises((RuntimeError, KeyboardInterrupt)):
                train_sft.main(arguments(out_dir=tmp_path / status[:6]))
        assert run_log(tmp_path / status[:6])["status"] == status


def test_training_needs_no_validation_split(arguments, prepared, tmp_path):
    data = tmp_path / "data"
    raw = prepared.parent
    names = [f"--input={raw / 'conversations.jsonl'}", f"--tokenizer={raw / 'tokenizer.json'}", f"--out_dir={data}"]
    prepare_sft.main([*names, "--block_size=64", "--val_fraction=0"])
    train_sft.main(arguments(sft_data_dir=data))
    log = run_log(tmp_path / "out")
    assert (log["status"], log["eval_steps"], log["summary"]["val_loss"]) == ("finished", [], None)


class TestRefusals:
    """One clear message each, and nothing half-written."""

    def refused(self, arguments: list[str], message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            train_sft.main(arguments)
        assert caught.value.exit_status == 2

    def test_a_plain_start_where_checkpoints_are(self, arguments, tmp_path):
        train_sft.main(arguments())
        self.refused(arguments(), r"already holds checkpoints, the newest is ckpt_000004\.pt; go on .* --resume=auto")
        train_sft.main(arguments(resume="auto", max_iters=6, lr_decay_iters=4))
        assert run_log(tmp_path / "out")["summary"]["iter"] == 6

    @pytest.mark.parametrize("resume", ["never", "auto"])
    def test_a_folder_with_checkpoints_of_another_program(self, arguments, tmp_path, resume):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "ckpt.pt").write_bytes(b"somebody's only checkpoint")
        self.refused(arguments(resume=resume), r"holds ckpt\.pt of another run; choose another --out_dir")
        assert (tmp_path / "out" / "ckpt.pt").read_bytes() == b"somebody's only checkpoint"

    def test_a_folder_with_another_tokenizer(self, arguments, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "tokenizer.json").write_text("{}")
        self.refused(arguments(), r"out/tokenizer\.json: another tokenizer than that of")
        assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"

    def test_samples_without_a_trained_token(self, arguments, prepared, tmp_path):
        other = tmp_path / "other_data"
        shutil.copytree(prepared, other)
        targets = np.load(other / "train_targets.npy")
        targets[3] = 0
        np.save(other / "train_targets.npy", targets)
        self.refused(arguments(sft_data_dir=other), "train holds samples without a trained token")

    def test_a_required_resume_where_there_is_nothing(self, arguments):
        self.refused(arguments(resume="required"), "holds no checkpoint to resume from")

    def test_another_order_of_rows_on_resume(self, arguments, prepared, tmp_path):
        train_sft.main(arguments())
        other = tmp_path / "other_data"
        shutil.copytree(prepared, other)
        change_meta(other, lambda meta: meta["sources"][0].update(weight=0.5))
        self.refused(
            arguments(resume="auto", sft_data_dir=other, seed=5),
            r"(?s)cannot be resumed.*data: .* other data.*seed: the run was started with 1337, not with 5",
        )

    def test_a_refused_resume_leaves_the_run_as_it_was(self, arguments, prepared, tmp_path):
        train_sft.main(arguments())
        out = tmp_path / "out"
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        other = tmp_path / "other_data"
        shutil.copytree(prepared, other)
        (other / "tokenizer.json").write_text("another tokenizer")
        change_meta(other, lambda meta: meta.update(tokenizer_fingerprint="f" * 64))
        self.refused(arguments(resume="auto", sft_data_dir=other), "tokenizer: .* was prepared with another one")
        self.refused(arguments(resume="auto", model={**SHAPE, "n_layer": 3}), "model: the run was started with")
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    def test_optimizer_state_of_another_shape(self, arguments, tmp_path):
        train_sft.main(arguments())
        path = tmp_path / "out" / "ckpt_000004.pt"
        content = torch.load(path, weights_only=True)
        content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2)
        torch.save(content, path)
        self.refused(
            arguments(resume="auto", max_iters=8, lr_decay_iters=4), r"optimizer state does not fit the model \(exp_avg"
        )

    def test_a_row_shorter_than_a_sample(self, arguments, tmp_path):
        self.refused(arguments(block_size=16), r"the longest sample of train has \d+ tokens, block_size is 16")
        assert not (tmp_path / "out").exists()

    def test_data_of_another_tokenizer(self, arguments, prepared, tmp_path):
        train_sft.main(arguments(out_dir=tmp_path / "base"))
        other = tmp_path / "other_data"
        shutil.copytree(prepared, other)
        change_meta(other, lambda meta: meta.update(tokenizer_fingerprint="f" * 64))
        for source in (tmp_path / "base" / "ckpt.pt", tmp_path / "base"):  # a run's folder stands for its newest
            self.refused(
                arguments(model="none", checkpoint_path=source, sft_data_dir=other), "prepared with another tokenizer"
            )

    def test_a_folder_that_cannot_be_written(self, arguments, tmp_path):
        (tmp_path / "file").write_text("not a folder")
        self.refused(arguments(out_dir=tmp_path / "file" / "out"), "cannot be written")

    def test_settings_that_contradict_each_other_all_at_once(self, arguments):
        wrong = {"max_epochs": 1, "checkpoint_path": "nowhere.pt", "min_lr": 1, "dropout": 1.5, "warmup_iters": -1}
        sentences = [
            "beta2 must be float, not 'nan'",
            "set checkpoint_path or model: one of the two",
            "checkpoint_path 'nowhere.pt' does not exist",
            "warmup_iters must be 0 or more, not -1",
            "dropout must be at least 0 and below 1, not 1.5",
            "min_lr 1.0 is above learning_rate 0.01",
            "set max_iters or max_epochs: one of the two",
            "unknown field 'n_layers'; did you mean 'n_layer'?",
        ]
        wrong["model"] = {**SHAPE, "n_layers": 3}
        self.refused(arguments(**wrong, beta2="nan"), "(?s)" + ".*".join(map(re.escape, sentences)))

    def test_more_positions_than_the_model_has_learned(self, arguments):
        shape = {**SHAPE, "position_encoding": "learned_absolute", "block_size": 32}
        self.refused(arguments(model=shape), "block_size 64 is beyond the 32 positions that the model has learned")

    def test_a_checkpoint_without_the_state_of_a_run(self, arguments, tmp_path):
        train_sft.main(arguments())
        path = tmp_path / "out" / "ckpt_000004.pt"
        content = torch.load(path, weights_only=True)
        del content["optimizer"], content["rows_seen"]
        torch.save(content, path)
        self.refused(arguments(resume="auto"), "has no optimizer, rows_seen, so it cannot be resumed")

    def test_ids_outside_the_vocabulary_in_the_prepared_data(self, arguments, prepared, tmp_path):
        other = tmp_path / "other_data"
        shutil.copytree(prepared, other)
        change_meta(other, lambda meta: meta.update(max_id=meta["vocab_size"]))
        self.refused(arguments(sft_data_dir=other), r"holds id \d+, outside its vocabulary")
