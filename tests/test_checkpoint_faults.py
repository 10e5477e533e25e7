"""A save that is killed, or refused, or cut short by a power failure, at each of its file operations."""

import builtins
import contextlib
import errno
import itertools
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from sft.checkpoint import newest_checkpoint, read_checkpoint, save_checkpoint
from sft.files import link_whole, remove_partials

KILLED, REFUSED, SAVED = 9, 1, 0  # how a save ends
KILLS, ERRORS = ("kill before", "kill amid or after"), ("ENOSPC", "EIO")
EACH_WRITE = 12  # one of so many goes wrong: PyTorch makes dozens


def save(folder, iter_num, *, best=False):
    content = {"iter_num": iter_num, "w": torch.full((300,), float(iter_num))}
    return save_checkpoint(folder, content, iter_num=iter_num, best=best, keep=2)


class Watched:
    """A file whose writes are operations, too."""

    def __init__(self, file, operations):
        self._file, self._operations = file, operations

    def write(self, data):
        return self._operations.do("write", lambda: self._file.write(data), lambda: self._half(bytes(data)), self._file)

    def _half(self, data):
        self._file.write(data[: len(data) // 2])
        self._file.flush()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


@dataclass
class Operations:
    """What happens to files, one after the other; at operation number `fails_at` it goes wrong."""

    fails_at: int | None = None
    mode: str = ""
    has_links: bool = True
    done: list[tuple] = field(default_factory=list)

    def do(self, name, act, half, *subjects):
        number, subjects = len(self.done), [getattr(subject, "name", subject) for subject in subjects]
        self.done.append((name, *map(str, subjects)))
        if number == self.fails_at:
            if self.mode in KILLS:
                with contextlib.suppress(OSError):
                    half() if self.mode != "kill before" else None
                os._exit(KILLED)
            code = getattr(errno, self.mode)
            raise OSError(code, os.strerror(code))
        return act()

    def watch(self, monkeypatch):
        for name in ("replace", "link", "unlink"):
            self._watch(monkeypatch, name)
        fsync, original = os.fsync, builtins.open

        def sync(descriptor):
            subject = os.readlink(f"/proc/self/fd/{descriptor}")
            self.do("fsync", *2 * [lambda: fsync(descriptor)], subject)

        def opening(path, mode="r", *arguments, **options):
            if "w" not in mode:
                return original(path, mode, *arguments, **options)
            return Watched(self.do("open", *2 * [lambda: original(path, mode, *arguments, **options)], path), self)

        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(builtins, "open", opening)

    def _watch(self, monkeypatch, name):
        original = getattr(os, name)

        def act(*arguments):
            if name == "link" and not self.has_links:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            self.do(name, *2 * [lambda: original(*arguments)], *arguments)

        monkeypatch.setattr(os, name, act)


@pytest.fixture
def before(tmp_path):
    """A folder in which step 30 is to be saved as the best."""
    folder = tmp_path / "before"
    folder.mkdir()
    save(folder, 10, best=True)
    save(folder, 20)
    return folder


def ends(act, operations):
    """How act() ends while the operations are watched, and one perhaps goes wrong."""
    with pytest.MonkeyPatch.context() as patch:
        operations.watch(patch)
        try:
            act()
        except OSError:
            return REFUSED
    return SAVED


def ends_in_child(act, operations):
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os._exit(ends(act, operations))
        os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def saving(folder):
    return lambda: save(folder, 30, best=True)


def copied(before, folder):
    folder.mkdir()
    for name in ("ckpt_000010.pt", "ckpt_000020.pt"):
        shutil.copyfile(before / name, folder / name)
    os.link(folder / "ckpt_000010.pt", folder / "ckpt_best.pt")
    os.link(folder / "ckpt_000020.pt", folder / "ckpt.pt")
    return folder


@pytest.mark.parametrize("has_links", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_whatever_goes_wrong_wherever_in_a_save_a_good_checkpoint_is_found_without_help(before, tmp_path, has_links):
    whole = Operations(has_links=has_links)
    assert ends(saving(copied(before, tmp_path / "whole")), whole) == SAVED
    writes = [number for number, (name, *_) in enumerate(whole.done) if name == "write"]
    numbers = sorted({*range(len(whole.done))} - {*writes} | {*writes[::EACH_WRITE], *writes[-3:]})
    if not has_links:  # before the new file has its name, nothing is other than with them
        in_place = next(number for number, (name, *_) in enumerate(whole.done) if name == "replace")
        numbers = [number for number in numbers if number > in_place]
    assert len(numbers) > 10
    for number, mode in itertools.product(numbers, (*KILLS, *ERRORS)):
        folder = copied(before, tmp_path / f"{number} {mode}")
        end = ends_in_child if mode in KILLS else ends
        status = end(saving(folder), Operations(number, mode, has_links))
        check(folder, before, status, may_be_saved=mode in ERRORS, where=(whole.done[number], mode))
        shutil.rmtree(folder)


def check(folder, before, status, *, may_be_saved, where):
    """That the folder is as it may be after a save that ended so, and that the next save makes all good."""
    assert status in ((REFUSED, SAVED) if may_be_saved else (KILLED,)), where
    found = newest_checkpoint(folder, warn=pytest.fail).name
    assert found in (("ckpt_000030.pt", "ckpt_000020.pt") if status else ("ckpt_000030.pt",)), where
    for name in ("ckpt.pt", "ckpt_best.pt"):
        assert read_checkpoint(folder / name)["iter_num"] in (10, 20, 30), where
    kept = ("ckpt_000020.pt",) if found == "ckpt_000030.pt" else ("ckpt_000020.pt", "ckpt_000010.pt")
    for name in kept:
        assert (folder / name).read_bytes() == (before / name).read_bytes(), where
    assert status == KILLED or not list(folder.glob("*.partial")), where
    remove_partials(folder, "ckpt*.pt")
    save(folder, 30, best=True)
    names = ["ckpt.pt", "ckpt_000020.pt", "ckpt_000030.pt", "ckpt_best.pt"]
    assert sorted(path.name for path in folder.iterdir()) == names, where
    assert read_checkpoint(folder / "ckpt_best.pt")["iter_num"] == 30, where


def test_a_start_that_is_killed_while_it_sets_a_checkpoint_aside_is_made_good_by_the_next(before, tmp_path):
    def damaged(folder):
        copied(before, folder)
        link_whole(folder / "ckpt_000020.pt", folder / "ckpt_best.pt")
        with open(folder / "ckpt_000020.pt", "r+b") as file:
            file.write(b"garbage")
        return folder

    def starting(folder):
        return lambda: newest_checkpoint(folder, warn=lambda _: None, sets_aside=True)

    whole = Operations()
    assert ends(starting(damaged(tmp_path / "whole")), whole) == SAVED
    assert [name for name, *_ in whole.done if name != "fsync"] == ["unlink", "link", "replace", "unlink", "replace"]
    for number, mode in itertools.product(range(len(whole.done)), (*KILLS, *ERRORS)):
        folder = damaged(tmp_path / f"{number} {mode}")
        (ends_in_child if mode in KILLS else ends)(starting(folder), Operations(number, mode))
        assert starting(folder)() == folder / "ckpt_000010.pt", (whole.done[number], mode)
        found = sorted(path.name for path in folder.glob("ckpt*") if not path.name.endswith(".partial"))
        assert found == ["ckpt.pt", "ckpt_000010.pt", "ckpt_000020.pt.damaged"], (whole.done[number], mode)
        assert read_checkpoint(folder / "ckpt.pt")["iter_num"] == 10, (whole.done[number], mode)


class Disk:
    """What a power failure may leave: content that was not synced is lost, and so is any choice of the names since
    their folder was synced."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.synced = {path.stat().st_ino: True for path in folder.iterdir()}
        self.on_disk = {path.name: path.stat().st_ino for path in folder.iterdir()}
        self.names, self.since = dict(self.on_disk), []

    def do(self, operation, *subjects):
        subjects = [Path(subject).name if subject != self.folder else subject for subject in subjects]
        if operation == "write":
            self.synced[self.names[subjects[0]]] = False
        elif operation == "fsync" and subjects[0] != self.folder:
            self.synced[self.names[subjects[0]]] = True
        elif operation == "fsync":
            self.on_disk, self.since = dict(self.names), []
        elif operation == "open":
            self._name({subjects[0]: f"file {len(self.synced)}"})
            self.synced[self.names[subjects[0]]] = False
        elif operation == "replace":
            self._name({subjects[1]: self.names[subjects[0]], subjects[0]: None})
        elif operation == "link":
            self._name({subjects[1]: self.names[subjects[0]]})
        elif operation == "unlink" and subjects[0] in self.names:
            self._name({subjects[0]: None})

    def _name(self, changes):
        self.since.append(changes)
        self.names = renamed(self.names, changes)

    def after_power_failure(self):
        """The names of each folder that may be found, with whether their content is whole."""
        for chosen in itertools.product([True, False], repeat=len(self.since)):
            names = self.on_disk
            for changes, happened in zip(self.since, chosen, strict=True):
                names = renamed(names, changes) if happened else names
            yield {name: self.synced[file] for name, file in names.items()}


def renamed(names, changes):
    return {name: file for name, file in {**names, **changes}.items() if file is not None}


def losses(disk, operations):
    """The operations after which a power failure may leave a checkpoint that is not whole, or fewer than two."""
    for number, operation in enumerate(operations):
        disk.do(*operation)
        for names in disk.after_power_failure():
            found = {name: is_whole for name, is_whole in names.items() if not name.endswith(".partial")}
            numbered = [name for name in found if name.startswith("ckpt_0")]
            if len(numbered) < 2 or not all(found.values()) or not {"ckpt.pt", "ckpt_best.pt"} <= found.keys():
                yield number, operation


@pytest.mark.parametrize("has_links", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_power_failure_at_any_moment_of_a_save_leaves_whole_checkpoints(before, tmp_path, has_links):
    operations, folder = Operations(has_links=has_links), copied(before, tmp_path / "folder")
    disk = Disk(folder)
    assert ends(saving(folder), operations) == SAVED
    assert not list(losses(disk, operations.done))
