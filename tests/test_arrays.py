import json

import numpy as np
import pytest

from sft.arrays import is_as_written, open_prepared, verify_checksums
from sft.errors import UserError
from sft.prepared_writer import PreparedWriter
from tests.made_data import write_prepared
from tests.test_files import noted

SAMPLES = {"train": [([1, 2, 3], [-100, 2, 3]), ([4, 5], [-100, 5])], "val": [([6, 7, 8, 9], [6, -100, -100, 9])]}
FACTS = {
    "vocab_size": 10,
    "pad_id": 0,
    "tokenizer_files": [],
    "tokenizer_fingerprint": "f" * 64,
    "template": "chatml",
}


@pytest.fixture
def folder(tmp_path):
    write_prepared(tmp_path / "data", SAMPLES, FACTS)
    return tmp_path / "data"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_written_is_what_is_opened(folder):
    data = open_prepared(folder)
    for split, samples in data.splits.items():
        pairs = [
            (samples.input_ids[start:end].tolist(), samples.labels[start:end].tolist())
            for start, end in zip(samples.offsets, samples.offsets[1:], strict=False)
        ]
        assert pairs == SAMPLES[split]
        assert samples.lengths.tolist() == [len(ids) for ids, _ in SAMPLES[split]]
        assert samples.weights is None
    assert data.splits["train"].targets.tolist() == [2.0, 1.0]
    assert data.splits["val"].targets.tolist() == [1.0]  # the first label has nothing that predicts it
    assert data.splits["train"].origins.tolist() == [[0, 1, -1], [0, 2, -1]]
    assert data.meta["max_id"] == 9
    assert data.meta["vocab_size"] == 10
    assert data.meta["lengths"]["all"] == {"min": 2, "median": 3.0, "mean": 3.0, "p95": 4.0, "max": 4}


def test_the_files_are_plain_little_endian_npy_of_the_contract(folder):
    dtypes = {name: np.load(folder / f"train_{name}.npy").dtype.str for name in ("input_ids", "labels", "offsets")}
    assert dtypes == {"input_ids": "<i4", "labels": "<i4", "offsets": "<i8"}
    assert np.load(folder / "train_targets.npy").dtype.str == "<f8"
    origins = np.load(folder / "val_origins.npy")
    assert (origins.dtype.str, origins.shape) == ("<i8", (1, 3))
    assert not (folder / "train_weights.npy").exists()


def test_an_empty_split_is_written_and_opened(tmp_path):
    write_prepared(tmp_path, {"train": SAMPLES["train"]}, FACTS)
    val = open_prepared(tmp_path).splits["val"]
    assert len(val) == 0
    assert len(val.input_ids) == 0
    assert val.origins.shape == (0, 3)


def test_an_old_meta_json_is_gone_for_good_before_an_array_has_its_name(folder, monkeypatch):
    done = noted(monkeypatch)
    write_prepared(folder, SAMPLES, FACTS)
    renamed = next(place for place, (name, _) in enumerate(done) if name == "replace")
    assert done.index(("unlink", "meta.json")) < done.index(("fsync", "data")) < renamed


def test_the_same_samples_give_the_same_bytes(folder, tmp_path):
    write_prepared(tmp_path / "again", SAMPLES, FACTS)
    assert files(tmp_path / "again") == files(folder)


def test_the_fingerprint_follows_the_arrays(folder, tmp_path):
    same = open_prepared(folder).fingerprint
    write_prepared(tmp_path / "again", SAMPLES, {**FACTS, "settings": {"out_dir": "elsewhere"}})
    assert open_prepared(tmp_path / "again").fingerprint == same
    write_prepared(tmp_path / "other", {"train": SAMPLES["train"][:1]}, FACTS)
    assert open_prepared(tmp_path / "other").fingerprint != same


def test_weights_are_opened_where_they_are_listed(folder):
    np.save(folder / "train_weights.npy", np.ones(5, "<f4"))
    assert open_prepared(folder).splits["train"].weights is None
    edit_meta(folder, lambda meta: meta["arrays"].update({"train_weights.npy": {"dtype": "<f4", "shape": [5]}}))
    assert open_prepared(folder).splits["train"].weights.tolist() == [1.0] * 5


def edit_meta(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def test_a_rerun_that_fails_leaves_no_valid_folder_and_no_half_written_file(folder):
    def samples():
        yield [1, 2], [-100, 2]
        assert not (folder / "meta.json").exists()
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write_prepared(folder, {"train": samples()}, FACTS)
    assert files(folder) == {}


def test_a_failure_takes_away_the_folder_that_it_made(tmp_path):
    with pytest.raises(RuntimeError), PreparedWriter(tmp_path / "new"):
        raise RuntimeError
    assert not (tmp_path / "new").exists()


def test_a_rerun_replaces_everything_that_was_there(folder):
    np.save(folder / "train_weights.npy", np.ones(5, "<f4"))
    write_prepared(folder, {"train": SAMPLES["val"]}, FACTS)
    data = open_prepared(folder)
    assert (len(data.splits["train"]), len(data.splits["val"])) == (1, 0)
    assert not (folder / "train_weights.npy").exists()


def test_somebody_elses_meta_json_is_left_alone(tmp_path):
    (tmp_path / "meta.json").write_text('{"name": "mine"}')
    with pytest.raises(UserError, match="not written by prepare_sft"):
        PreparedWriter(tmp_path)
    assert files(tmp_path) == {"meta.json": b'{"name": "mine"}'}


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(UserError, match="cannot be written"):
            PreparedWriter(folder)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def replace_array(folder, name, array):
    """Another array, of which meta.json knows."""
    np.save(folder / name, array)
    told = {"dtype": array.dtype.str, "shape": list(array.shape)}
    edit_meta(folder, lambda meta: meta["arrays"].update({name: told}))


def name_tokenizer_file(folder, name):
    (folder / name).exists() or (folder / name).write_text("")
    edit_meta(folder, lambda meta: meta.update(tokenizer_files=[name]))


DAMAGES = {
    "no prepared data here": lambda folder: [path.unlink() for path in folder.iterdir()],
    "interrupted; run prepare_sft.py again": lambda folder: (folder / "meta.json").unlink(),
    "not valid JSON": lambda folder: truncate(folder / "meta.json") or truncate(folder / "meta.json"),
    "not written by prepare_sft.py": lambda folder: (folder / "meta.json").write_text("[]"),
    "format version 99, this program reads 2": lambda f: edit_meta(f, lambda meta: meta.update(format_version=99)),
    "arrays must be an object, not None": lambda f: edit_meta(f, lambda meta: meta.pop("arrays")),
    "vocab_size must be a whole number from 0, not None": lambda folder: edit_meta(
        folder, lambda meta: meta.pop("vocab_size")
    ),
    "max_id must be a whole number, not '9'": lambda folder: edit_meta(folder, lambda meta: meta.update(max_id="9")),
    "pad_id 10 is outside the vocabulary of 10": lambda f: edit_meta(f, lambda meta: meta.update(pad_id=10)),
    "pad_id -1 is outside": lambda folder: edit_meta(folder, lambda meta: meta.update(pad_id=-1)),
    "tokenizer_files must be a list": lambda f: edit_meta(f, lambda meta: meta.update(tokenizer_files="abc")),
    "tokenizer_files names '../evil'": lambda f: name_tokenizer_file(f, "../evil"),
    "tokenizer_files names '..'": lambda f: name_tokenizer_file(f, ".."),
    "tokenizer_files names 'gone'": lambda f: edit_meta(f, lambda meta: meta.update(tokenizer_files=["gone"])),
    "tokenizer_fingerprint must be a string": lambda f: edit_meta(f, lambda meta: meta.pop("tokenizer_fingerprint")),
    "not valid JSON (JSON nested too deeply": lambda f: (f / "meta.json").write_text("[" * 100_000 + "]" * 100_000),
    "meta.json does not list val_labels.npy": lambda f: edit_meta(f, lambda m: m["arrays"].pop("val_labels.npy")),
    "train_labels.npy is missing": lambda folder: (folder / "train_labels.npy").unlink(),
    "val_offsets.npy cannot be read": lambda folder: truncate(folder / "val_offsets.npy"),
    "train_targets.npy cannot be read": lambda folder: (folder / "train_targets.npy").write_bytes(b""),
    "train_labels.npy holds {'dtype': '<i8'": lambda f: np.save(f / "train_labels.npy", np.zeros(5, "<i8")),
    "val_labels.npy holds {'dtype': '<i4', 'shape': [3]}": lambda f: np.save(f / "val_labels.npy", np.zeros(3, "<i4")),
    "train_labels.npy holds {'dtype': '<i8', 'shape': [5]}, must be <i4 of shape [5]": lambda f: replace_array(
        f, "train_labels.npy", np.zeros(5, "<i8")
    ),
    "train_targets.npy holds {'dtype': '<f8', 'shape': []}, must be <f8 of shape [1]": lambda f: replace_array(
        f, "train_targets.npy", np.zeros((), "<f8")
    ),
    "val_origins.npy holds {'dtype': '<i8', 'shape': [3]}, must be <i8 of shape [1, 3]": lambda f: replace_array(
        f, "val_origins.npy", np.zeros(3, "<i8")
    ),
    "train: offsets do not divide": lambda f: np.save(f / "train_offsets.npy", np.array([0, 5, 5])),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_data_is_refused(folder, message):
    DAMAGES[message](folder)
    with pytest.raises(UserError) as caught:
        open_prepared(folder)
    assert message in str(caught.value)


def test_checksums_find_a_changed_byte(folder):
    data = open_prepared(folder)
    verify_checksums(data)
    content = bytearray((folder / "train_labels.npy").read_bytes())
    content[-1] ^= 1
    (folder / "train_labels.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"train_labels\.npy does not have the checksum"):
        verify_checksums(open_prepared(folder))


def test_every_changed_byte_of_meta_json_is_found(folder):
    """By the checksum at its end, even where the change is in the checksum, or in the name that it goes by."""
    path = folder / "meta.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        changed = whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
        assert not is_as_written(changed), position
    assert is_as_written(whole)
    assert not any(is_as_written(whole[:-size]) for size in (1, 2, 3))
    assert not is_as_written(whole + b"\n")


def test_a_meta_json_from_before_it_had_a_checksum_is_taken_as_it_is(folder):
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    del meta["sha256"]
    assert is_as_written(json.dumps(meta, indent=1).encode() + b"\n")
    path.write_bytes(path.read_bytes().replace(b'"vocab_size": 10', b'"vocab_size": 11'))
    with pytest.raises(UserError, match=r"meta\.json does not have the checksum that it gives"):
        verify_checksums(open_prepared(folder))
