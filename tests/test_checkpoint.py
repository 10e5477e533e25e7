import os
import pickle
from pathlib import PurePosixPath

import pytest
import torch

from sft.checkpoint import (
    numbered_checkpoints,
    read_checkpoint,
    remove_partial_files,
    save_checkpoint,
)
from sft.errors import UserError


def save(folder, iter_num, *, best=False, keep=None):
    return save_checkpoint(
        folder, {"iter_num": iter_num, "w": torch.arange(5.0)}, iter_num=iter_num, best=best, keep=keep
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_read_back_under_all_its_names(tmp_path):
    path = save(tmp_path, 200, best=True)
    assert path.name == "ckpt_000200.pt"
    for name in ("ckpt_000200.pt", "ckpt.pt", "ckpt_best.pt"):
        content = read_checkpoint(tmp_path / name)
        assert content["iter_num"] == 200
        assert torch.equal(content["w"], torch.arange(5.0))


def test_the_newest_are_kept_and_the_best_outlives_its_number(tmp_path):
    save(tmp_path, 1, best=True, keep=2)
    for iter_num in (2, 3, 4):
        save(tmp_path, iter_num, keep=2)
    assert names(tmp_path) == ["ckpt.pt", "ckpt_000003.pt", "ckpt_000004.pt", "ckpt_best.pt"]
    assert read_checkpoint(tmp_path / "ckpt_best.pt")["iter_num"] == 1
    assert read_checkpoint(tmp_path / "ckpt.pt")["iter_num"] == 4


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 7, best=True)
    save(tmp_path, 7, best=True)
    assert names(tmp_path) == ["ckpt.pt", "ckpt_000007.pt", "ckpt_best.pt"]


def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path, 3, best=True)
    assert read_checkpoint(tmp_path / "ckpt.pt")["iter_num"] == 3
    assert not (tmp_path / "ckpt.pt").samefile(tmp_path / "ckpt_000003.pt")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_by_name_and_not_run(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt_000001.pt"
    if legacy:
        path.write_bytes(pickle.dumps({"model": Malicious()}, protocol=2))  # torch.load's own
    else:
        torch.save({"model": Malicious()}, path)
    with pytest.raises(UserError, match=r"ckpt_000001\.pt: refused, since it holds posix\.system, which is not"):
        read_checkpoint(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content", [b"", b"error: not found", b"hello\n", b"<!DOCTYPE html>", b"PK\x03\x04" + bytes(99), bytes(range(256))]
)
def test_what_is_no_checkpoint_is_called_that_and_nothing_else_is_advised(tmp_path, content):
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_checkpoint(tmp_path / "ckpt.pt")
    reason = "damaged or cut short, or no PyTorch checkpoint at all; use another one"
    assert str(caught.value) == f"{tmp_path / 'ckpt.pt'}: {reason}"


def test_an_object_of_some_class_is_named(tmp_path):
    torch.save({"model": PurePosixPath("a")}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError) as caught:
        read_checkpoint(tmp_path / "ckpt.pt")
    assert "holds pathlib.PurePosixPath, which is not plain data" in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_a_missing_file_and_a_bare_tensor_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "ckpt.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(UserError, match="holds a Tensor"):
        read_checkpoint(tmp_path / "tensor.pt")


def test_partial_files_of_a_killed_save_are_removed(tmp_path):
    save(tmp_path, 5)
    (tmp_path / "ckpt_000006.pt.partial").write_bytes(b"half")
    assert [n for n, _ in numbered_checkpoints(tmp_path)] == [5]
    remove_partial_files(tmp_path)
    assert names(tmp_path) == ["ckpt.pt", "ckpt_000005.pt"]
