"""Weights that anybody may have written are loaded as exactly what their file says, or refused in a sentence."""

import json
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.header_targets_weights import folder_target, model_of, safetensors_of, sharded_target
from model_builder import load_pretrained
from sft.checkpoint import read_checkpoint
from sft.huggingface import stored_tensors
from sft.safetensors_header import LONGEST_HEADER, read_header
from sft.untrusted import is_plain_name, leads_out
from tests.untrusted import edit, refusal, written

DATA = bytes(range(32))
ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def with_header(path: Path, header: object, data: bytes = DATA[:16], *, announced: int | None = None) -> Path:
    """A safetensors file; `header` is JSON's value or its bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if announced is None else announced) + text + data)
    return path


def other(**changes: object) -> dict[str, object]:
    return {"a": {**ENTRY, **changes}}


TWICE = b'{"a": %s, "a": %s}' % ((json.dumps(ENTRY).encode(),) * 2)
HEADERS: list[tuple[str, object, bytes]] = [
    ("a header of 2 is announced", None, b""),
    ("no JSON object", b"[]", b""),
    ("no JSON object", b" {}", b""),
    ("not UTF-8", b'{"\xff": 1}', b""),
    ("Expecting", b"{nope}", b""),
    ("JSON nested too deeply", b'{"__metadata__": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", b""),
    ("the key 'a' occurs twice", TWICE, DATA[:16]),
    ("NaN is not JSON", b'{"a": NaN}', b""),
    ("__metadata__ must map names to strings", {"__metadata__": ["x"], "a": ENTRY}, DATA[:16]),
    ("__metadata__ must map names to strings", {"__metadata__": {"x": 1}, "a": ENTRY}, DATA[:16]),
    ("__metadata__ must map names to strings", {"__metadata__": None, "a": ENTRY}, DATA[:16]),
    ("'' is no name for a tensor", {"": ENTRY}, DATA[:16]),
    (r"'\x1b[2J' is no name for a tensor", {"\x1b[2J": ENTRY}, DATA[:16]),
    ("'a' must have just dtype, shape and data_offsets", {"a": ["F32", [2, 2], [0, 16]]}, DATA[:16]),
    ("'a' must have just dtype, shape and data_offsets", other(more=1), DATA[:16]),
    ("'a' must have just dtype, shape and data_offsets", {"a": None}, DATA[:16]),
    ("unknown dtype 'F31'", other(dtype="F31"), DATA[:16]),
    ("unknown dtype ['F32']", other(dtype=["F32"]), DATA[:16]),
    ("impossible shape [-2, -2]", other(shape=[-2, -2]), DATA[:16]),
    ("impossible shape [2.0, 2.0]", other(shape=[2.0, 2.0]), DATA[:16]),
    ("impossible shape [True, 4]", other(shape=[True, 4]), DATA[:16]),
    ("impossible shape", other(shape=[2**64 + 4]), DATA[:16]),
    ("impossible shape", other(shape=[0, 2**40, 2**40], data_offsets=[0, 0]), b""),
    ("impossible shape", other(shape=[4, *[1] * 100]), DATA[:16]),
    ("impossible shape 'ab'", other(shape="ab"), DATA[:16]),
    ("impossible data_offsets [-16, 0]", other(data_offsets=[-16, 0]), DATA[:16]),
    ("impossible data_offsets [0.0, 16.0]", other(data_offsets=[0.0, 16.0]), DATA[:16]),
    ("impossible data_offsets [0]", other(data_offsets=[0]), DATA[:16]),
    ("impossible data_offsets [0, 16, 32]", other(data_offsets=[0, 16, 32]), DATA[:16]),
    ("'a' has 16 bytes, its dtype F32 and shape [2, 3] need 24", other(shape=[2, 3]), DATA[:16]),
    ("'a' has -16 bytes", other(data_offsets=[16, 0]), DATA[:16]),
    (
        "'b' begins at byte 20, what is before it ends at 16",
        {"a": ENTRY, **{"b": {**ENTRY, "data_offsets": [20, 36]}}},
        DATA,
    ),
    (
        "'b' begins at byte 8, what is before it ends at 16",
        {"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 24]}},
        DATA[:24],
    ),
    ("'b' begins at byte 0, what is before it ends at 16", {"a": ENTRY, "b": ENTRY}, DATA[:16]),
    ("tensors end at byte 16, its data at 12", {"a": ENTRY}, DATA[:12]),
    ("tensors end at byte 16, its data at 17", {"a": ENTRY}, DATA[:17]),
]


@pytest.mark.parametrize(
    ("said", "header", "data"), HEADERS, ids=[f"{i} {said}" for i, (said, *_) in enumerate(HEADERS)]
)
def test_a_safetensors_header_that_does_not_account_for_every_byte_once_is_refused(tmp_path, said, header, data):
    path = with_header(tmp_path / "model.safetensors", b"{}" if header is None else header, data)
    if header is None:
        path.write_bytes(path.read_bytes()[:-1])
    told = refusal(read_header, path)
    assert told.startswith(f"{path}: damaged or cut short")
    assert said in told


@pytest.mark.parametrize("announced", [17, 10**6, 10**8, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused_before_it_is_read(tmp_path, announced):
    path = with_header(tmp_path / "a.safetensors", {}, b"", announced=announced)
    assert f"a header of {announced:,} is announced" in refusal(read_header, path)


def test_a_header_longer_than_the_format_allows_is_refused_before_it_is_read(tmp_path):
    path = with_header(tmp_path / "a.safetensors", {}, announced=LONGEST_HEADER + 1)
    os.truncate(path, LONGEST_HEADER + 100)
    started = time.perf_counter()
    assert "100,000,000 are allowed" in refusal(read_header, path)
    assert time.perf_counter() - started < 1


def test_a_refusal_of_thousands_of_tensors_names_a_few(tmp_path):
    path = with_header(tmp_path / "a.safetensors", {f"t{i}": {**ENTRY, "dtype": "F31"} for i in range(5000)})
    told = refusal(read_header, path)
    assert told.endswith("\n  and 4990 more")
    assert len(told.splitlines()) == 12


def test_files_of_the_library_pass_with_every_type_and_empty_tensors_and_beyond_four_gigabytes(tmp_path):
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
    tensors = {f"t.{kind}": torch.zeros(3, 2).to(kind) for kind in types}
    tensors |= {"none": torch.zeros(0, 5), "one": torch.ones(())}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "a.safetensors")
    assert {name: entry.shape for name, entry in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    big = 5 * 2**30
    entries = {"a": {"dtype": "U8", "shape": [big], "data_offsets": [0, big]}}
    entries["b"] = {"dtype": "U8", "shape": [big], "data_offsets": [big, 2 * big]}
    path = with_header(tmp_path / "b.safetensors", entries)
    os.truncate(path, path.stat().st_size - 16 + 2 * big)
    assert read_header(path)["b"].end == 2 * big


@pytest.fixture
def sharded(tmp_path) -> Path:
    return written(tmp_path / "sharded", sharded_target().files)


INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


def elsewhere(weight_map: dict[str, str]) -> str:
    return next(name for name, shard in weight_map.items() if shard != FIRST)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "a\\b", "C:x", "a\x1b", "x/../y"])
def test_an_index_cannot_name_a_file_elsewhere(sharded, name):
    (sharded.parent / "x.safetensors").write_bytes((sharded / FIRST).read_bytes())
    edit(sharded / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": f"{name}.safetensors"}))
    if is_plain_name(f"{name}.safetensors"):  # "..safetensors" and ".safetensors" are files of the folder
        assert "shards are missing" in refusal(load_pretrained, sharded)
    else:
        assert "which is no *.safetensors file beside it" in refusal(load_pretrained, sharded)


def test_an_index_names_no_file_of_another_kind(sharded):
    edit(sharded / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": "config.json"}))
    assert "names 'config.json', which is no *.safetensors file" in refusal(load_pretrained, sharded)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told.update({elsewhere(told): FIRST}), "1 missing, as "),
        (lambda told: told.update({"extra": FIRST}), "1 missing, as 'extra'"),
        (lambda told: told.pop("model.embed_tokens.weight"), "1 unexpected, as 'model.embed_tokens.weight'"),
    ],
)
def test_a_shard_must_hold_just_the_tensors_that_the_index_tells(sharded, change, said):
    edit(sharded / INDEX, lambda index: change(index["weight_map"]))
    told = refusal(load_pretrained, sharded)
    assert "does not hold what the index says" in told
    assert said in told


def test_a_tensor_in_two_shards_is_no_choice_of_the_last_one(sharded):
    config_and_shards = sharded_target().files
    whole = folder_target().files["model.safetensors"]
    (sharded / FIRST).write_bytes(whole)
    assert "unexpected, as" in refusal(load_pretrained, sharded)
    assert config_and_shards[FIRST] != whole


def test_weights_in_one_file_beside_an_index_of_others_are_refused(sharded):
    (sharded / "model.safetensors").write_bytes(folder_target().files["model.safetensors"])
    assert "remove the old ones" in refusal(load_pretrained, sharded)


def test_a_link_leads_out_of_the_folder_only_as_in_the_hubs_cache(tmp_path, sharded):
    whole = folder_target().files
    outside = tmp_path / "elsewhere.safetensors"
    outside.write_bytes(whole["model.safetensors"])
    folder = written(tmp_path / "plain", {"config.json": whole["config.json"]})
    (folder / "model.safetensors").symlink_to(outside)
    assert f"leads to {outside}, out of its folder" in refusal(load_pretrained, folder)
    (sharded / FIRST).rename(tmp_path / FIRST)
    (sharded / FIRST).symlink_to(Path("..") / FIRST)
    assert "out of its folder" in refusal(load_pretrained, sharded)
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0123"
    for each in (blobs, snapshot):
        each.mkdir(parents=True)
    for name, content in whole.items():
        (blobs / f"hash_of_{name}").write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / f"hash_of_{name}")
    assert load_pretrained(snapshot).config.n_layer == 1
    (tmp_path / "linked").symlink_to(snapshot)
    assert load_pretrained(tmp_path / "linked").config.n_layer == 1
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(outside)
    assert "out of its folder" in refusal(load_pretrained, snapshot)
    assert leads_out(snapshot, snapshot / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 10**9, "layer_types": None}, "1,000,000,000 layers, but it holds only 14 tensors"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number above 0, not True"),
        ({"head_dim": None}, "head_dim must be a whole number above 0, not None"),
        ({"vocab_size": 10**30}, "it has more than 1,000,000,000,000 parameters"),
        ({"rms_norm_eps": "small"}, "norm_eps must be float, not 'small'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, not 'no'"),
        ({"attention_bias": 0}, "attention_bias must be true or false, not 0"),
        ({"hidden_act": ["silu"]}, "hidden_act ['silu'] is not supported"),
        ({"rope_parameters": False}, "rope_parameters False is not supported"),
        ({"rope_parameters": []}, "rope_parameters [] is not supported"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1"}}, "rope_theta must be float, not '1'"),
        ({"rope_theta": 5.0}, "rope_theta is 5.0, rope_parameters has another, 10000.0"),
        ({"rope_scaling": {"rope_theta": 5.0}}, "rope_scaling and rope_parameters say different things"),
        ({"layer_types": 0}, "layer_types 0 are not supported"),
        ({"layer_types": []}, "layer_types has 0 entries, not one for each of num_hidden_layers"),
        ({"model_type": {"a": "x" * 10**5}}, "model_type is {'a': 'xxxxxxxxxxxx...xxxxxxxxxxxxx'}; known are qwen3"),
    ],
)
def test_a_config_with_a_value_that_would_be_guessed_at_or_takes_for_ever_is_refused(tmp_path, change, said):
    folder = written(tmp_path, folder_target().files)
    edit(folder / "config.json", lambda config: config.update(change))
    told = refusal(load_pretrained, folder)
    assert said in told
    assert str(folder) in told
    assert len(told) < 1000


def saved(path: Path, **changes: object) -> Path:
    model = model_of(weight_tying=True)
    torch.save({"model": model.state_dict(), "model_args": model.config.to_dict(), **changes}, path)
    return path


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_checkpoint_cannot_ask_for_more_layers_than_it_holds_tensors_or_for_more_values_than_bytes(tmp_path):
    fields, state = model_of().config.to_dict(), model_of().state_dict()
    path = saved(tmp_path / "a.pt", model_args={**fields, "n_layer": 10**9})
    assert "its architecture has 1,000,000,000 layers, but it holds only" in refusal(load_pretrained, path)
    wide = {**fields, "vocab_size": 10**6, "n_embd": 10**5}
    table = torch.zeros(1).expand(10**6, 10**5)
    path = saved(tmp_path / "b.pt", model_args=wide, model={**state, "token_embeddings.weight": table})
    assert "token_embeddings.weight is torch.float32, repeated from 4 bytes" in refusal(load_pretrained, path)
    for name in (3, "a\x1b[2J", ("a", "b")):
        path = saved(tmp_path / "c.pt", model={**state, name: torch.zeros(1)})
        assert "is no name of a tensor" in refusal(load_pretrained, path)
    nested = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)])
    path = saved(tmp_path / "d.pt", model={**state, "final_norm.weight": nested})
    assert "final_norm.weight is of type Tensor, not a plain tensor" in refusal(load_pretrained, path)


def rebuilt(path: Path, change: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED) -> Path:
    """The archive with other records, all with the right checksum."""
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            if (changed := change(name, data)) is not None:
                archive.writestr(name, changed, compress_type=method)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda name, data: data[:8] if name.endswith("/data/1") else data,
        lambda name, data: data + bytes(64) if name.endswith("/data/1") else data,
        lambda name, data: b"" if name.endswith("/data/1") else data,
        lambda name, data: None if name.endswith("/data/1") else data,
    ],
    ids=["shorter", "longer", "empty", "missing"],
)
def test_a_tensor_is_not_read_from_beyond_its_own_record(tmp_path, change):
    path = rebuilt(saved(tmp_path / "a.pt"), change)
    assert "damaged or cut short" in refusal(read_checkpoint, path, verify=False)
    assert str(path) in refusal(load_pretrained, path)


def test_compressed_records_are_refused_and_not_taken_for_numbers(tmp_path):
    assert load_pretrained(rebuilt(saved(tmp_path / "a.pt"), lambda name, data: data)).config.n_layer == 1
    bomb = {"x": torch.zeros(10**6)}
    path = rebuilt(saved(tmp_path / "b.pt", optimizer=bomb), lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 50_000
    assert str(path) in refusal(read_checkpoint, path, verify=False)


def test_a_safetensors_file_of_the_search_is_as_the_library_writes_it(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(4).to(torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(safetensors_of(tensors))
    for folder in (tmp_path, tmp_path / "other"):
        assert all(torch.equal(stored.read(), tensors[name]) for name, stored in stored_tensors(folder).items())
