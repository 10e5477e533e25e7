"""What a run makes of its checkpoints: who verifies them, what is left out of them, what comes of a damaged one."""

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_sft
from model_builder import load_pretrained
from sft import checkpoint, dry_run
from sft.checkpoint import read_checkpoint, save_checkpoint
from sft.errors import Preempted, UserError
from sft.run import Run
from tests.launch import torchrun
from tests.test_checkpoint import mapped_files, names
from tests.test_train import run_log

GOES_ON = {"resume": "required", "lr_decay_iters": 4}


def damage(path):
    content = torch.load(path, weights_only=True)
    start = content["model"]["token_embeddings.weight"].numpy().tobytes()[:64]
    whole = bytearray(path.read_bytes())
    whole[whole.index(start) + 5] ^= 4
    path.write_bytes(whole)


@pytest.fixture
def looks(monkeypatch):
    """The files that were verified, in order."""
    verified, damage = [], checkpoint.damage
    monkeypatch.setattr(checkpoint, "damage", lambda path: verified.append(path.name) or damage(path))
    return verified


def test_a_run_verifies_what_it_begins_with_once_and_lets_it_go(arguments, tmp_path, looks, monkeypatch):
    train_sft.main(arguments(eval_interval="none"))
    assert looks == []
    start, mapped = Run.start, []
    with monkeypatch.context() as patch:
        patch.setattr(Run, "start", lambda run: mapped.extend(mapped_files()) or start(run))
        train_sft.main(arguments(**GOES_ON, max_iters=5))
    assert looks == ["ckpt_000004.pt"]
    assert mapped
    assert str(tmp_path / "out" / "ckpt_000004.pt") not in mapped
    looks.clear()
    start = {"model": "none", "checkpoint_path": tmp_path / "out" / "ckpt.pt", "out_dir": tmp_path / "next"}
    train_sft.main(arguments(**start))
    assert looks == ["ckpt.pt"]


WORKER = """
import sys
from tests.test_checkpoint import mapped_files
import train_sft
from sft import checkpoint
from sft.run import Run

damage, restore, verified = checkpoint.damage, Run.restore, []
checkpoint.damage = lambda path: verified.append(path.name) or damage(path)

def restoring(run, saved):
    devices = {x.device.type for x in (*saved["optimizer"]["state"][0].values(), *saved["model"].values())}
    mapped = any(name.endswith("ckpt_000004.pt") for name in mapped_files())
    restore(run, saved)
    released = not any(name.endswith("ckpt_000004.pt") for name in mapped_files())
    print(f"rank {run.world.rank}: verified {verified}, {devices}, mapped {mapped}, released {released}", flush=True)

Run.restore = restoring
train_sft.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_one_rank_verifies_and_all_map_the_file_and_let_it_go(arguments, tmp_path):
    train_sft.main(arguments())
    (tmp_path / "worker.py").write_text(WORKER)
    changes = {**GOES_ON, "max_iters": 5, "gradient_accumulation_steps": 1, "allow_change": "rows_per_step"}
    done = torchrun(2, tmp_path / "worker.py", *arguments(**changes))
    for rank, verified in enumerate((["ckpt_000004.pt"], [])):
        assert f"rank {rank}: verified {verified}, {{'cpu'}}, mapped True, released True" in done.stdout


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "measure_step", lambda *_, **__: dry_run.StepTime(0.5, "nothing"))
    train_sft.main(arguments(save_interval=2, eval_interval="none"))
    whole = load_pretrained(tmp_path / "out" / "ckpt.pt").state_dict()
    damage(tmp_path / "out" / "ckpt_000004.pt")
    with pytest.raises(UserError, match=r"ckpt\.pt: damaged \(archive/data/\d+: not the checksum that was stored\)"):
        load_pretrained(tmp_path / "out" / "ckpt.pt")
    train_sft.main([*arguments(**GOES_ON, save_interval=2, eval_interval="none"), "--dry_run"])
    assert (tmp_path / "out" / "ckpt_000004.pt").exists()
    train_sft.main(arguments(**GOES_ON, save_interval=2, eval_interval="none"))
    assert capsys.readouterr().out.count("ckpt_000004.pt: damaged") == 2
    assert {"ckpt_000002.pt", "ckpt_000004.pt", "ckpt_000004.pt.damaged"} <= {*names(tmp_path / "out")}
    for name, value in load_pretrained(tmp_path / "out" / "ckpt.pt").state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_a_damaged_base_is_refused(arguments, tmp_path):
    train_sft.main(arguments())
    damage(tmp_path / "out" / "ckpt_000004.pt")
    for source in ("ckpt.pt", "."):
        start = {"model": "none", "checkpoint_path": tmp_path / "out" / source, "out_dir": tmp_path / "next"}
        with pytest.raises(UserError, match=r"ckpt\.pt: damaged"):
            train_sft.main(arguments(**start))


def test_a_folder_that_has_lost_its_numbered_checkpoints_goes_on_from_another_name(arguments, tmp_path):
    train_sft.main(arguments())
    (tmp_path / "out" / "ckpt_000004.pt").unlink()
    train_sft.main(arguments(**GOES_ON, max_iters=5))
    assert run_log(tmp_path / "out")["summary"]["iter"] == 5


def test_weights_alone_are_a_third_and_start_a_run_but_do_not_continue_one(arguments, tmp_path):
    train_sft.main(arguments(out_dir=tmp_path / "whole"))
    train_sft.main(arguments(save_optimizer=False))
    path = tmp_path / "out" / "ckpt_000004.pt"
    whole, alone = read_checkpoint(tmp_path / "whole" / "ckpt.pt"), read_checkpoint(path)
    assert whole.keys() - alone.keys() == {"optimizer"}
    assert all(torch.equal(value, alone["model"][name]) for name, value in whole["model"].items())
    assert path.stat().st_size < 0.45 * (tmp_path / "whole" / "ckpt.pt").stat().st_size
    with pytest.raises(
        UserError, match="has no optimizer, so it cannot be resumed; start from it with --checkpoint_path"
    ):
        train_sft.main(arguments(**GOES_ON))
    train_sft.main(arguments(model="none", checkpoint_path=path, out_dir=tmp_path / "next"))


def test_one_checkpoint_is_kept_at_the_end_and_two_where_a_signal_ends_the_run(arguments, tmp_path, monkeypatch):
    options = {"keep_checkpoints": 1, "save_interval": 1, "eval_interval": "none"}
    train_sft.main(arguments(**options))
    assert [name for name in names(tmp_path / "out") if name.startswith("ckpt_0")] == ["ckpt_000004.pt"]
    monkeypatch.setattr(Run, "_write_checkpoint", stop_after_three(Run._write_checkpoint))
    with pytest.raises(KeyboardInterrupt):
        train_sft.main(arguments(**options, out_dir=tmp_path / "stopped"))
    found = [name for name in names(tmp_path / "stopped") if name.startswith("ckpt_0")]
    assert found == ["ckpt_000002.pt", "ckpt_000003.pt"]


def test_what_a_signal_has_saved_can_be_resumed_even_where_the_optimizer_is_not_wanted(
    arguments, tmp_path, monkeypatch
):
    update = Run.update

    def stopped(run: Run, **options) -> None:
        update(run, **options)
        if run.iter_num == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "update", stopped)
        with pytest.raises(Preempted):
            train_sft.main(arguments(save_optimizer=False))
    train_sft.main(arguments(save_optimizer=False, resume="required"))
    assert run_log(tmp_path / "out")["status"] == "finished"


def test_names_that_lead_nowhere_are_passed_over(arguments, tmp_path, capsys):
    train_sft.main(arguments())
    out = tmp_path / "out"
    for name in ("ckpt.pt", "ckpt_best.pt", "ckpt_000008.pt"):
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to("gone.pt")
    train_sft.main(arguments(**GOES_ON))
    assert run_log(out)["status"] == "finished"
    assert read_checkpoint(out / "ckpt.pt")["iter_num"] == run_log(out)["summary"]["iter"]


def test_a_checkpoint_under_another_number_is_passed_over(arguments, tmp_path, capsys):
    train_sft.main(arguments(keep_checkpoints="none", save_interval=1))
    out = tmp_path / "out"
    shutil.copyfile(out / "ckpt_000002.pt", out / "ckpt_000099.pt")
    train_sft.main(arguments(**GOES_ON))
    assert "ckpt_000099.pt: is of step 2, whatever its name says" in capsys.readouterr().out
    assert [event["iter"] for event in run_log(out)["events"] if event["kind"] == "resumed"] == [4]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rows_seen", value) for value in (-5, "x", True)),
        *(("order", "zz"), ("best_val_loss", "low"), ("progress", {"colour": 1}), ("watch", 3)),
    ],
)
def test_what_a_checkpoint_cannot_mean_is_refused_by_name(arguments, tmp_path, key, value):
    train_sft.main(arguments())
    path = tmp_path / "out" / "ckpt_000004.pt"
    save_checkpoint(tmp_path / "out", {**read_checkpoint(path), key: value}, iter_num=4, best=False, keep=None)
    with pytest.raises(UserError, match=f"its {key} cannot be understood"):
        train_sft.main(arguments(**GOES_ON))


def test_moments_that_are_missing_are_not_begun_afresh(arguments, tmp_path):
    train_sft.main(arguments())
    content = read_checkpoint(tmp_path / "out" / "ckpt_000004.pt")
    del content["optimizer"]["state"][0]
    save_checkpoint(tmp_path / "out", content, iter_num=4, best=False, keep=None)
    with pytest.raises(UserError, match="lacks the moments of some parameters"):
        train_sft.main(arguments(**GOES_ON))


def stop_after_three(write):
    def writing(run, *options):
        result = write(run, *options)
        if run.iter_num == 3:
            raise KeyboardInterrupt
        return result

    return writing


def test_of_all_ranks_the_main_one_verifies_a_base(monkeypatch):
    told = []
    monkeypatch.setattr(train_sft, "load_pretrained", lambda *_, verify: told.append(verify))
    monkeypatch.setattr(train_sft.adapting, "merge_adapters", lambda _: None)
    settings = SimpleNamespace(dtype="auto", dry_run=False, resume="auto", out_dir="out", lora_rank=None)
    for is_main in (True, False):
        train_sft.load_base(settings, SimpleNamespace(is_main=is_main), Path("a.pt"))
    assert told == [True, False]
