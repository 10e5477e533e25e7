"""Files that are whole or absent, on disks that fail."""

import errno
import os

import pytest

from sft.files import copy_whole, link_whole, partial_of, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def noted(monkeypatch):
    """Every operation of this module `os` from now on, as (its name, the name of the file or folder that it was on)."""
    done = []

    def note(name, subject):
        original = getattr(os, name)

        def noting(*arguments):
            done.append((name, subject(*arguments)))
            return original(*arguments)

        monkeypatch.setattr(os, name, noting)

    def of_descriptor(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    note("fsync", of_descriptor)
    note("replace", lambda _, path: os.path.basename(path))
    note("link", lambda _, path: os.path.basename(path))
    note("unlink", os.path.basename)
    return done


def failing(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


def test_content_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    done = noted(monkeypatch)
    write_whole(folder / "a", lambda file: file.write(b"new"))
    assert done == [("fsync", "a.partial"), ("replace", "a"), ("fsync", "folder")]
    done.clear()
    link_whole(folder / "a", folder / "b")
    assert done == [("unlink", "b.partial"), ("link", "b.partial"), ("replace", "b"), ("fsync", "folder")]
    assert (folder / "b").samefile(folder / "a")


@pytest.mark.parametrize("operation", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_refuses_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, operation, code):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "source").write_bytes(b"new")
    monkeypatch.setattr(os, operation, failing(code))
    with pytest.raises(OSError, match=os.strerror(code)):
        write_whole(tmp_path / "a", lambda file: file.write(b"new"))
    with pytest.raises(OSError, match=os.strerror(code)):
        copy_whole(tmp_path / "source", tmp_path / "a")
    assert names(tmp_path) == ["a", "source"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_whoever_is_interrupted_while_writing_leaves_nothing(tmp_path):
    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", interrupted)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_synced_is_no_error_and_one_on_a_broken_disk_is(tmp_path, monkeypatch):
    fsync = os.fsync

    def refusing(code):
        def sync(descriptor):
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(code, os.strerror(code))
            fsync(descriptor)

        return sync

    monkeypatch.setattr(os, "fsync", refusing(errno.EINVAL))
    write_whole(tmp_path / "a", lambda file: file.write(b"new"))
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(tmp_path / "b", lambda file: file.write(b"new"))


def test_without_hard_links_a_second_name_is_a_copy(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"new")
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    link_whole(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new"
    assert not (tmp_path / "b").samefile(tmp_path / "a")
    assert names(tmp_path) == ["a", "b"]


def test_what_a_kill_has_left_is_never_written_through(tmp_path, monkeypatch):
    for name in ("old", "new"):
        (tmp_path / name).write_bytes(name.encode())
    os.link(tmp_path / "old", partial_of(tmp_path / "newest"))  # killed between the link and its renaming
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    link_whole(tmp_path / "new", tmp_path / "newest")
    assert (tmp_path / "old").read_bytes() == b"old"
    assert (tmp_path / "newest").read_bytes() == b"new"


def test_a_name_that_a_file_has_already_is_left_alone(tmp_path):
    (tmp_path / "a").write_bytes(b"new")
    for _ in range(2):
        link_whole(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "b").samefile(tmp_path / "a")


def test_a_copy_that_fails_names_its_target(tmp_path):
    (tmp_path / "source").write_bytes(b"new")
    with pytest.raises(FileNotFoundError) as caught:
        copy_whole(tmp_path / "source", tmp_path / "missing" / "a")
    assert caught.value.filename == str(tmp_path / "missing" / "a")
