"""No byte of a checkpoint changes unnoticed."""

import errno
import struct
import zipfile

import pytest
import torch
from torch.serialization import set_crc32_options

from sft import seal
from sft.checkpoint import DamagedCheckpoint, read_checkpoint, save_checkpoint
from sft.errors import UserError

CONTENT = {"iter_num": 3, "w": torch.arange(40.0), "b": torch.ones(3, dtype=torch.bfloat16), "none": torch.empty(0)}


@pytest.fixture
def sealed(tmp_path):
    return save_checkpoint(tmp_path, CONTENT, iter_num=3, best=False, keep=None)


def is_found(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    return isinstance(caught.value, DamagedCheckpoint)


def test_every_bit_of_a_sealed_file_counts(sealed):
    whole = sealed.read_bytes()
    path = sealed.with_name("flipped.pt")
    for place in sorted({*range(0, len(whole), 3), *range(len(whole) - 110, len(whole))}):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        assert is_found(path, bytes(changed)), place


def test_a_file_that_is_cut_short_or_goes_on_is_found(sealed):
    whole = sealed.read_bytes()
    path = sealed.with_name("other.pt")
    for length in (*range(0, len(whole), 41), *range(len(whole) - 100, len(whole))):
        assert is_found(path, whole[:length]), length
    for more in (b"\0", b"x", b"\0" * 4096, whole, b"\0" * 70_000):
        assert is_found(path, whole + more), len(more)
        assert is_found(path, more + whole), len(more)


def test_zeroed_pages_are_found(tmp_path):
    content = {"w": torch.arange(5000.0)}
    whole = save_checkpoint(tmp_path, content, iter_num=1, best=False, keep=None).read_bytes()
    for start in range(0, len(whole), 512):
        assert any(whole[start : start + 512])
        changed = whole[:start] + bytes(len(whole[start : start + 512])) + whole[start + 512 :]
        assert is_found(tmp_path / "zeroed.pt", changed), start


def test_a_sealed_file_is_an_archive_as_any_other(sealed):
    with zipfile.ZipFile(sealed) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sealed v1 sha256 ")
    for mmap in (False, True):
        content = torch.load(sealed, weights_only=True, mmap=mmap)
        assert torch.equal(content["w"], CONTENT["w"])


def test_a_flipped_bit_that_torch_load_does_not_see_is_found_in_anybodys_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save(CONTENT, path)
    assert torch.equal(read_checkpoint(path)["w"], CONTENT["w"])
    whole = bytearray(path.read_bytes())
    place = whole.index(struct.pack("<f", 17))
    whole[place + 3] ^= 0x80
    path.write_bytes(whole)
    assert torch.load(path, weights_only=True, mmap=True)["w"][17] == -17
    assert is_found(path, whole)
    assert is_found(path, path.read_bytes() + b"\0")


def test_a_checkpoint_without_checksums_is_read(tmp_path):
    set_crc32_options(False)
    try:
        torch.save(CONTENT, tmp_path / "ckpt.pt")
    finally:
        set_crc32_options(True)
    assert read_checkpoint(tmp_path / "ckpt.pt")["iter_num"] == 3


def test_a_checkpoint_from_before_archives_is_read_to_its_end_and_no_further(tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(path)["w"], CONTENT["w"])
    whole = path.read_bytes()
    assert is_found(path, whole + b"\0")
    assert is_found(path, whole[:-1])


def test_records_that_overlap_are_refused_before_they_are_summed(tmp_path, sealed):
    """A small file could name the same bytes any number of times."""
    path = tmp_path / "ckpt.pt"
    torch.save(CONTENT, path)
    whole = bytearray(path.read_bytes())
    entries = [place for place in range(len(whole)) if whole[place : place + 4] == b"PK\x01\x02"]
    places = [struct.unpack_from("<L", whole, entry + 42)[0] for entry in entries]
    struct.pack_into("<L", whole, entries[3] + 42, places[2])
    path.write_bytes(whole)
    with open(path, "rb") as file, pytest.raises(zipfile.BadZipFile, match="overlap"):
        seal.layout(file)
    assert is_found(path, whole)


def test_a_file_that_holds_less_than_was_written_is_never_sealed(tmp_path):
    """As where a disk takes what it then forgets."""
    torch.save(CONTENT, tmp_path / "short.pt")
    with open(tmp_path / "short.pt", "r+b") as file:
        whole = file.read()
        file.seek(0)
        file.truncate()
        file.write(whole[:100] + whole[200:])
        with pytest.raises(OSError, match="does not hold what was written") as caught:
            seal.seal(file)
    assert caught.value.errno == errno.EIO
