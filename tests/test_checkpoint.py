"""What checkpoints hold, what is kept of them, and which one a run goes on from."""

import errno
import os
import pickle
import struct
from pathlib import Path, PurePosixPath

import pytest
import torch

from sft import checkpoint
from sft.checkpoint import (
    DamagedCheckpoint,
    newest_checkpoint,
    numbered_checkpoints,
    read_checkpoint,
    save_checkpoint,
)
from sft.errors import UserError
from sft.files import remove_partials
from sft.run import restore_optimizer
from tests.devices import gpu_test


def save(folder, iter_num, *, best=False, keep=None, last=False):
    content = {"iter_num": iter_num, "w": torch.arange(5.0)}
    return save_checkpoint(folder, content, iter_num=iter_num, best=best, keep=keep, last=last)


def damage(path):
    """Flip a bit in the file, under whatever names, as a disk may."""
    with open(path, "r+b") as file:
        place = file.read().index(struct.pack("<f", 3))
        file.seek(place)
        file.write(b"\1")


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


def test_one_is_kept_at_the_end_and_never_fewer_than_two_before(tmp_path):
    for iter_num in (1, 2, 3):
        save(tmp_path, iter_num, keep=1)
    assert names(tmp_path) == ["ckpt.pt", "ckpt_000002.pt", "ckpt_000003.pt"]
    save(tmp_path, 4, keep=1, last=True)
    assert names(tmp_path) == ["ckpt.pt", "ckpt_000004.pt"]


def test_files_of_others_stay_and_what_was_passed_over_takes_no_place_of_a_good_one(tmp_path):
    theirs = [
        "ckpt_1.pt",
        "ckpt_000001.pt.bak",
        "ckpt_000900.pt",
        "ckpt_final.pt",
        "model.pt",
        "ckpt_000001.pt.damaged",
    ]
    for name in theirs:
        (tmp_path / name).write_bytes(b"precious")
    for iter_num in (1, 2, 3):
        save(tmp_path, iter_num, keep=2)
    assert names(tmp_path) == sorted([*theirs, "ckpt.pt", "ckpt_000002.pt", "ckpt_000003.pt"])
    assert all((tmp_path / name).read_bytes() == b"precious" for name in theirs)


def test_a_checkpoint_that_cannot_be_deleted_is_no_failed_save(tmp_path, monkeypatch):
    unlink = os.unlink

    def refuse(path, **options):
        if Path(path).name == "ckpt_000001.pt":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    for iter_num in (1, 2, 3):
        save(tmp_path, iter_num, keep=2)
    assert [number for number, _ in numbered_checkpoints(tmp_path)] == [3, 2, 1]


def test_a_damaged_newest_one_is_told_of_once_set_aside_and_the_one_before_used(tmp_path):
    for iter_num in (1, 2, 3):
        save(tmp_path, iter_num, best=iter_num == 3)
    damage(tmp_path / "ckpt_000003.pt")
    before, warnings = names(tmp_path), []
    assert newest_checkpoint(tmp_path, warn=warnings.append) == tmp_path / "ckpt_000002.pt"
    assert names(tmp_path) == before  # a dry run writes nothing
    assert newest_checkpoint(tmp_path, warn=warnings.append, sets_aside=True) == tmp_path / "ckpt_000002.pt"
    reason = "damaged (archive/data/0: not the checksum that was stored); use another one"
    assert warnings == 2 * [f"warning: {tmp_path / 'ckpt_000003.pt'}: {reason}"]
    assert names(tmp_path) == ["ckpt.pt", "ckpt_000001.pt", "ckpt_000002.pt", "ckpt_000003.pt.damaged"]
    assert read_checkpoint(tmp_path / "ckpt.pt")["iter_num"] == 2
    assert newest_checkpoint(tmp_path, warn=pytest.fail) == tmp_path / "ckpt_000002.pt"


def test_where_no_numbered_one_is_good_the_newer_of_the_others_is_used(tmp_path, monkeypatch):
    save(tmp_path, 1, best=True, keep=2)
    for iter_num in (2, 3):
        save(tmp_path, iter_num, keep=2)
    for _, path in numbered_checkpoints(tmp_path):
        damage(path)
    warnings = []
    found = newest_checkpoint(tmp_path, warn=warnings.append, sets_aside=True)
    assert found == tmp_path / "ckpt_best.pt"
    assert read_checkpoint(found)["iter_num"] == 1
    assert len(warnings) == 2
    assert names(tmp_path) == ["ckpt.pt", "ckpt_000002.pt.damaged", "ckpt_000003.pt.damaged", "ckpt_best.pt"]
    assert read_checkpoint(tmp_path / "ckpt.pt")["iter_num"] == 1

    def no_links(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    damage(save(tmp_path, 4))
    assert newest_checkpoint(tmp_path, warn=warnings.append) == tmp_path / "ckpt.pt"


def test_where_none_is_good_all_keep_their_names_and_the_start_is_refused_each_time(tmp_path):
    assert newest_checkpoint(tmp_path, warn=print) is None
    for iter_num in (1, 2):
        damage(save(tmp_path, iter_num))
    for _ in range(2):
        with pytest.raises(UserError, match="none of its 2 checkpoints can be read"):
            newest_checkpoint(tmp_path, warn=lambda _: None, sets_aside=True)
    assert names(tmp_path) == ["ckpt.pt", "ckpt_000001.pt", "ckpt_000002.pt"]


def test_what_a_disk_cannot_read_now_is_passed_over_and_not_called_damaged(tmp_path, monkeypatch):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    pread, descriptors = os.pread, []

    def failing(descriptor, size, place):
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(bad):
            descriptors.append(descriptor)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, size, place)

    monkeypatch.setattr(os, "pread", failing)
    warnings = []
    assert newest_checkpoint(tmp_path, warn=warnings.append, sets_aside=True) == good
    assert descriptors
    assert warnings == [f"warning: {bad}: cannot be read (Input/output error)"]
    assert bad.exists()


def mapped_files():
    return {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if line.count("/")}


def test_tensors_are_mapped_on_the_cpu_and_a_restored_optimizer_lets_the_file_go(tmp_path):
    weights = torch.nn.Parameter(torch.randn(50, 50))
    optimizer = torch.optim.AdamW([weights])
    weights.sum().backward()
    optimizer.step()
    path = save_checkpoint(tmp_path, {"optimizer": optimizer.state_dict()}, iter_num=1, best=False, keep=None)
    expected = {name: value.clone() for name, value in optimizer.state[weights].items()}
    saved = read_checkpoint(path)
    assert all(value.device.type == "cpu" for value in saved["optimizer"]["state"][0].values())
    assert str(path) in mapped_files()
    restore_optimizer(optimizer, saved["optimizer"])
    del saved
    assert str(path) not in mapped_files()
    assert all(torch.equal(optimizer.state[weights][name], value) for name, value in expected.items())


@gpu_test
def test_a_checkpoint_of_a_gpu_takes_no_memory_of_one_when_it_is_read(tmp_path):
    content = {"w": torch.ones(1 << 20, device="cuda")}
    path = save_checkpoint(tmp_path, content, iter_num=1, best=False, keep=None)
    content.clear()
    before = torch.cuda.memory_allocated()
    saved = read_checkpoint(path)
    assert saved["w"].device.type == "cpu"
    assert torch.cuda.memory_allocated() == before


def test_whoever_has_verified_a_file_reads_it_without_a_second_look(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "damage", lambda path: pytest.fail("looks again"))
    assert read_checkpoint(path, verify=False)["iter_num"] == 1


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
    assert isinstance(caught.value, DamagedCheckpoint)
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
    remove_partials(tmp_path, "ckpt*.pt")
    assert names(tmp_path) == ["ckpt.pt", "ckpt_000005.pt"]
