"""Runs that train adapters: what their checkpoints hold, how they go on, and where their base may have gone."""

import shutil
from pathlib import Path

import pytest
import torch

import train_sft
from model_builder import load_pretrained
from sft.adapting import ADAPTERS_OF, merge_adapters
from sft.arrays import open_prepared
from sft.checkpoint import read_checkpoint
from sft.dry_run import checkpoint_bytes
from sft.errors import UserError
from tests.conftest import ROOT
from tests.launch import torchrun
from tests.test_train import assert_equal_trees
from tests.tiny import tiny_model

IDS = torch.arange(20)[None]


@pytest.fixture
def base(tmp_path, prepared) -> Path:
    """A checkpoint with nothing but a model, which has just the data's ids."""
    path = tmp_path / "base" / "ckpt.pt"
    path.parent.mkdir()
    return save_base(path, vocab_size=open_prepared(prepared).meta["vocab_size"])


def save_base(path: Path, **changes: object) -> Path:
    model = tiny_model(**changes)
    torch.save({"model": model.state_dict(), "model_args": model.config.to_dict()}, path)
    return path


@pytest.fixture
def tuning(arguments, base):
    """Arguments of a short run that trains adapters of the base."""

    def make(**changes: object) -> list[str]:
        settings = {"model": "none", "checkpoint_path": base, "lora_rank": 3, "eval_interval": "none"}
        return arguments(**{**settings, **changes})

    return make


def test_a_checkpoint_holds_the_adapters_and_tells_of_its_base(tuning, base, tmp_path, capsys):
    train_sft.main(tuning(lora_targets="q_proj,v_proj", lora_alpha=7))
    saved = read_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert [name for name in saved["model"] if "blocks.1" in name] == [
        f"blocks.1.attn.{part}.{kind}" for part in ("c_q.adapters.q_proj", "c_kv.adapters.v_proj") for kind in "AB"
    ]
    assert len(saved["model"]) == len(saved["optimizer"]["state"]) == 8
    assert saved["lora"]["rank"], saved["lora"]["alpha"] == (3, 7.0)
    assert saved["base"]["path"] == str(base)
    assert saved["base"]["relative_path"] == "../base/ckpt.pt"
    assert "4 adapters of rank 3" in capsys.readouterr().out
    tuned, plain = load_pretrained(tmp_path / "out"), load_pretrained(base)
    assert (tuned(IDS) - plain(IDS)).abs().max() > 1e-3
    size = (tmp_path / "out" / "ckpt.pt").stat().st_size
    assert size == pytest.approx(checkpoint_bytes(tuned), rel=0.2)
    assert size < checkpoint_bytes(plain) / 2
    for name, parameter in plain.named_parameters():  # to the bit
        assert torch.equal(tuned.get_parameter(name), parameter)


HARD = {"lora_dropout": 0.2, "dropout": 0.1, "ema_decay": 0.9, "lora_dora": True, "train_embeddings": True}
RESUMED = {"fp32": {}, "bf16": {"dtype": "bfloat16"}, "hard": {**HARD, "dtype": "bfloat16"}}


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED)
def test_a_run_that_was_broken_off_ends_as_one_that_was_not(tuning, tmp_path, changes):
    options = {**changes, "save_interval": 2, "keep_checkpoints": "none", "lr_decay_iters": 4}
    train_sft.main(tuning(**options, out_dir=tmp_path / "whole"))
    (tmp_path / "broken").mkdir()
    shutil.copy(tmp_path / "whole" / "ckpt_000002.pt", tmp_path / "broken")
    train_sft.main(tuning(**options, out_dir=tmp_path / "broken", resume="required"))
    one, other = (read_checkpoint(tmp_path / name / "ckpt_000004.pt") for name in ("whole", "broken"))
    for name in ("model", "optimizer", "lora", "base", *(["ema"] if "ema_decay" in changes else [])):
        assert_equal_trees(dict(one[name]), dict(other[name]), name)
    if "ema_decay" in changes:
        averaged = load_pretrained(tmp_path / "whole", weights="ema")
        assert all(
            torch.equal(averaged.get_parameter(name), tensor) for name, tensor in one["ema"].items() if "A" in name
        )


@pytest.mark.slow
def test_two_killed_processes_that_are_resumed_end_as_if_they_had_not_been(tuning, tmp_path):
    options = {"max_iters": 8, "lora_dropout": 0.2, "gradient_accumulation_steps": 2}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    torchrun(2, ROOT / "train_sft.py", *tuning(**options, out_dir=whole))
    broken_options = {**options, "save_interval": 4, "out_dir": broken}
    killed = torchrun(2, ROOT / "tests" / "killed_run.py", 4, *tuning(**broken_options), check=False)
    assert killed.returncode != 0
    torchrun(2, ROOT / "train_sft.py", *tuning(**broken_options, resume="required"))
    one, other = (read_checkpoint(folder / "ckpt_000008.pt") for folder in (whole, broken))
    assert_equal_trees(dict(one["model"]), dict(other["model"]))
    assert_equal_trees(one["optimizer"], other["optimizer"])


@pytest.mark.slow
def test_one_process_and_two_train_the_same_adapters(tuning, tmp_path):
    options = {"dtype": "float64", "gradient_accumulation_steps": "none", "rows_per_step": 4}
    for processes in (1, 2):
        torchrun(processes, ROOT / "train_sft.py", *tuning(**options, out_dir=tmp_path / str(processes)))
    one, other = (read_checkpoint(tmp_path / name / "ckpt.pt")["model"] for name in ("1", "2"))
    assert all(torch.allclose(tensor, other[name], rtol=1e-9, atol=1e-12) for name, tensor in one.items())
    assert any(tensor.abs().max() > 0 for name, tensor in one.items() if name.endswith(".B"))


def test_what_is_trained_does_not_change_when_a_run_is_resumed(tuning, tmp_path):
    train_sft.main(tuning())
    with pytest.raises(UserError) as caught:
        train_sft.main(tuning(resume="auto", lora_rank=4, lora_alpha=3, train_embeddings=True, freeze="blocks.0"))
    said = str(caught.value)
    assert "lora_rank: the run was started with 3, not with 4" in said
    assert "lora_alpha: the run was started with 16.0, not with 3.0" in said
    assert "train_embeddings: the run was started with False, not with True" in said
    assert "freeze: the run was started with [], not with ['blocks.0']" in said
    with pytest.raises(UserError, match="allow_change: 'lora_rank' is not among"):
        train_sft.main(tuning(resume="auto", lora_rank=4, allow_change="lora_rank"))


def test_a_full_run_is_not_gone_on_with_as_one_of_adapters(arguments, tuning, tmp_path):
    train_sft.main(arguments(eval_interval="none"))
    path = tmp_path / "out" / "ckpt_000004.pt"
    saved = torch.load(path, weights_only=True)
    del saved["config"]["lora_rank"]  # as in those that were written before there were adapters
    path.unlink()
    torch.save(saved, path)
    with pytest.raises(UserError, match="lora_rank: the run was started with None, not with 3"):
        train_sft.main(tuning(resume="auto"))


def test_a_base_that_has_changed_or_gone_is_told_and_a_link_mends_it(tuning, base, tmp_path):
    train_sft.main(tuning())
    path = tmp_path / "out" / "ckpt.pt"
    logits = load_pretrained(path)(IDS)
    base.rename(tmp_path / "elsewhere.pt")
    remedy = f"put the base back, or a link to it under the name {path.parent / 'base'}"
    with pytest.raises(UserError) as caught:
        load_pretrained(path)
    assert str(caught.value) == f"{path}: its adapters belong to the base {base}, which is not there; {remedy}"
    with pytest.raises(UserError, match="which is not there"):
        train_sft.main(tuning(resume="required", max_iters=5, lr_decay_iters=4, checkpoint_path=tmp_path))
    save_base(base, vocab_size=load_pretrained(tmp_path / "elsewhere.pt").vocab_size, seed=1)
    with pytest.raises(UserError) as caught:
        load_pretrained(path)
    headline, problem = str(caught.value).splitlines()
    assert headline == f"{path}: its adapters do not belong to what is there; {remedy}"
    assert f"{base} has other weights now (sha256 " in problem
    with pytest.raises(UserError, match="do not belong to what is there"):
        train_sft.main(tuning(resume="required", max_iters=5, lr_decay_iters=4))
    (path.parent / "base").symlink_to(tmp_path / "elsewhere.pt")
    assert torch.equal(load_pretrained(path)(IDS), logits)


def test_a_checkpoint_and_its_base_can_be_moved_together(tuning, tmp_path):
    train_sft.main(tuning())
    logits = load_pretrained(tmp_path / "out")(IDS)
    (tmp_path / "moved").mkdir()
    for name in ("base", "out"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert torch.equal(load_pretrained(tmp_path / "moved" / "out")(IDS), logits)


@pytest.mark.slow
def test_adapters_are_a_base_for_full_fine_tuning_and_for_further_adapters(tuning, tmp_path):
    train_sft.main(tuning())
    logits = load_pretrained(tmp_path / "out")(IDS)
    nothing = {"learning_rate": 1e-30, "min_lr": 0, "max_iters": 1, "checkpoint_path": tmp_path / "out"}
    train_sft.main(tuning(**nothing, lora_rank="none", out_dir=tmp_path / "full"))
    full = load_pretrained(tmp_path / "full")
    assert full.adapted is None
    torch.testing.assert_close(full(IDS), logits, rtol=0, atol=1e-5)
    train_sft.main(tuning(**nothing, lora_rank=2, lora_targets="q_proj", out_dir=tmp_path / "second"))
    second = load_pretrained(tmp_path / "second")
    assert sum(ADAPTERS_OF in name for name, _ in second.named_parameters()) == 4
    torch.testing.assert_close(second(IDS), logits, rtol=0, atol=1e-5)
    (tmp_path / "out" / "ckpt.pt").unlink()
    with pytest.raises(UserError, match=f"{tmp_path / 'out'}: holds neither"):
        load_pretrained(tmp_path / "second")


def test_adapters_of_a_base_that_has_grown_grow_it_again(tuning, tmp_path, capsys):
    path = save_base(tmp_path / "small.pt", vocab_size=40)
    train_sft.main(tuning(checkpoint_path=path))
    assert "the new tokens' rows are the mean of the old ones and stay so" in capsys.readouterr().out
    saved, tuned = read_checkpoint(tmp_path / "out" / "ckpt.pt"), load_pretrained(tmp_path / "out")
    assert tuned.vocab_size == saved["model_args"]["vocab_size"] > 40
    plain = load_pretrained(path)
    plain.grow_vocabulary(tuned.vocab_size, say=lambda sentence: None)
    assert torch.equal(tuned.head_weight, plain.head_weight)
    train_sft.main(tuning(checkpoint_path=path, train_embeddings=True, out_dir=tmp_path / "trained"))
    assert "stay so" not in capsys.readouterr().out
    trained = load_pretrained(tmp_path / "trained")
    assert torch.equal(
        trained.head_weight, read_checkpoint(tmp_path / "trained" / "ckpt.pt")["model"]["token_embeddings.weight"]
    )
    assert not torch.equal(trained.head_weight, plain.head_weight)


def test_a_run_that_freezes_leaves_the_rest_as_it_was(tuning, base, tmp_path):
    train_sft.main(tuning(lora_rank="none", freeze="token_embeddings,blocks.0"))
    before, after = load_pretrained(base).state_dict(), load_pretrained(tmp_path / "out").state_dict()
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert same == {name for name in before if name.startswith(("token_embeddings", "lm_head", "blocks.0"))}
    assert len(read_checkpoint(tmp_path / "out" / "ckpt.pt")["optimizer"]["state"]) == len(before) - len(same)


@pytest.mark.slow
def test_a_dry_run_tells_what_is_trained_and_what_that_takes(tuning, base, tmp_path, capsys):
    train_sft.main(tuning(dry_run=True))
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("model ")]
    total = sum(p.numel() for p in load_pretrained(base).parameters())
    trained = sum(tensor.numel() for tensor in _trained(tuning, tmp_path).values())
    assert lines == [f"model     {total + trained:,} parameters, {trained:,} of them trained"]
    assert "not measured" not in said
    assert "not estimated" not in said


def _trained(tuning, tmp_path: Path) -> dict:
    train_sft.main(tuning())
    return read_checkpoint(tmp_path / "out" / "ckpt.pt")["model"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": "gpt2", "checkpoint_path": "none"}, "lora_rank needs checkpoint_path"),
        ({"lora_rank": 0}, "lora_rank must be above 0"),
        ({"lora_dropout": 1}, "lora_dropout must be at least 0 and below 1"),
        ({"lora_rank": "none", "lora_dora": True}, "lora_dora needs lora_rank"),
        ({"lora_rank": "none", "train_embeddings": True}, "train_embeddings needs lora_rank"),
        ({"lora_targets": "()"}, "lora_targets must name linear layers"),
        ({"lora_targets": "q_prj"}, "'q_prj' names no linear layer"),
        ({"freeze": "blok"}, "'blok' names no parameter"),
        ({"freeze": "*"}, "nothing is left to be trained"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(tuning, changes, problem):
    with pytest.raises(UserError, match=problem):
        train_sft.main(tuning(**changes))


def test_a_damaged_description_of_adapters_is_refused_in_a_sentence(tuning, base, tmp_path):
    train_sft.main(tuning())
    saved = dict(read_checkpoint(tmp_path / "out" / "ckpt.pt"))
    name, odd = "blocks.1.ffn.w_out.adapters.down_proj.A", tmp_path / "out" / "odd.pt"

    def said(**changes: object) -> str:
        torch.save({**saved, **changes}, odd)
        with pytest.raises(UserError) as caught:
            load_pretrained(odd)
        assert str(caught.value).startswith(f"{odd}: ")
        return str(caught.value)

    assert f"wrong shape: {name} is (3, 64), must be (10000000000, 64)" in said(lora={**saved["lora"], "rank": 10**10})
    assert "cannot be understood as adapters:\n  alpha -1.0" in said(lora={**saved["lora"], "alpha": -1.0})
    assert "cannot be understood" in said(lora=[3])
    assert "does not tell which base" in said(base=None)
    assert f"wrong shape: {name} is (3, 63), must be (3, 64)" in said(
        model={**saved["model"], name: torch.zeros(3, 63)}
    )
    assert f"wrong shape: {name} is (3, 64), must be (4, 64)" in said(lora={**saved["lora"], "rank": 4})
    assert f"missing: {name}" in said(model={key: t for key, t in saved["model"].items() if key != name})
    assert "unexpected: colour" in said(model={**saved["model"], "colour": torch.zeros(1)})
    assert "another base, which has these linear layers:\n  model.layers.9.self_attn.q_proj" in said(
        lora={**saved["lora"], "targets": ["model.layers.9.self_attn.q_proj"]}
    )
    assert "n_embd 64, not 32" in said(model_args={**saved["model_args"], "n_embd": 64})
    own = {"path": str(odd), "sha256": None}
    assert "its base has a base, and so on" in said(base=own)


def test_a_merged_model_is_what_chat_answers_with(tuning, prepared, tmp_path):
    from tools.chat import ChatSettings, load_model_and_tokenizer

    train_sft.main(tuning())
    model, _ = load_model_and_tokenizer(tmp_path / "out", ChatSettings(device="cpu"))
    logits = model(IDS)
    merge_adapters(model)
    torch.testing.assert_close(model(IDS), logits, rtol=0, atol=1e-5)
