"""Files that anybody may have written are refused in a sentence, or say exactly what is loaded; nothing is executed."""

import ast
import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bench.faults_headers as faults
import prepare_sft
from bench.header_mutations import Mutant, Target
from bench.header_targets_weights import folder_target
from model_builder import load_pretrained
from sft.arrays import map_array, open_prepared, read_meta
from sft.checkpoint import read_checkpoint
from sft.config import load_settings
from sft.errors import UserError, harmless
from sft.prepared_writer import PreparedWriter, earlier_meta
from sft.templates import template_in
from sft.tokenizer import load_tokenizer
from sft.untrusted import is_plain_name, read_bytes, strict_json
from tests.conftest import ROOT
from tests.tiny_tokenizer import save_tiny_tokenizer
from tests.untrusted import edit, refusal, written
from train_sft import TrainSettings

JSON_BOMBS = {
    "not UTF-8 (byte 0xff at 0)": b"\xff\xfe{\x00}\x00",
    "begins with a byte order mark": b"\xef\xbb\xbf{}",
    "JSON nested too deeply": b"[" * 101 + b"]" * 101,
    "JSON nested too deeply (more": b'{"a":' * 100_000,
    "the key 'a' occurs twice": b'{"a": 1, "b": {"a": 1, "a": 1}}',
    "NaN is not JSON": b"[NaN]",
    "Infinity is not JSON": b"[Infinity]",
    "-Infinity is not JSON": b"[-Infinity]",
    "the number 1e999 is beyond what a float can hold": b"[1e999]",
    "Exceeds the limit (4300 digits)": b"[" + b"9" * 5000 + b"]",
    "holds half a character": b'["\\uD800"]',
    "Extra data": b"{} {}",
    "Expecting value": b"",
}


@pytest.mark.parametrize("said", JSON_BOMBS)
def test_json_on_which_two_readers_could_differ_is_refused_in_a_sentence(said):
    with pytest.raises(ValueError, match=r"\S") as caught:
        strict_json(JSON_BOMBS[said])
    assert said in str(caught.value)


def test_json_as_everyone_reads_it_is_read():
    text = '{"a": [1, -2.5e3, null, true, "\\ud83e\\udd99 é"], "b": ' + "[" * 99 + "]" * 99 + "}\n"
    assert strict_json(text.encode()) == json.loads(text)


def test_no_more_is_read_than_a_file_of_its_kind_can_need_and_no_pipe_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_bytes(b" " * 2001)
    with pytest.raises(ValueError, match=r"has more than .* MiB, which no such file needs"):
        read_bytes(tmp_path / "a.json", most=2000)
    assert len(read_bytes(tmp_path / "a.json", most=2001)) == 2001
    os.mkfifo(tmp_path / "meta.json")
    assert "is no regular file" in refusal(read_meta, tmp_path)
    assert "not written by prepare_sft.py" in refusal(earlier_meta, tmp_path)
    os.mkfifo(tmp_path / "chat_template.jinja")
    assert template_in(tmp_path) == "chatml"
    folder = written(tmp_path / "folder", folder_target().files)
    for where, name, load in (
        ("sft.huggingface.LARGEST_JSON", "config.json", load_pretrained),
        ("sft.tokenizer.LARGEST_FILE", "tokenizer.json", load_tokenizer),
        ("sft.tokenizer.LARGEST_FILE", "a.tiktoken", lambda folder: load_tokenizer(folder / "a.tiktoken")),
    ):
        monkeypatch.setattr(where, 2000)
        (folder / name).write_bytes(b" " * 2001)
        told = refusal(load, folder)
        assert name in told
        assert "which no such file needs" in told
    monkeypatch.setattr("sft.config.LARGEST_RUN_LOG", 2000)
    (tmp_path / "run_1.json").write_bytes(b" " * 2001)
    assert "which no such file needs" in refusal(load_settings, TrainSettings, [str(tmp_path / "run_1.json")])


def test_names_are_plain_only_where_no_system_finds_another_folder_in_them():
    assert all(map(is_plain_name, ("a.tiktoken", "model-00001.safetensors", "é", "...", "a b")))
    assert not any(map(is_plain_name, ("", ".", "..", "a/b", "/a", "..\\a", "c:a", "a\nb", "\u202ea")))


NPY = "{'descr': '<i4', 'fortran_order': False, 'shape': (5,), }"
RUN = "__import__('os').system('touch executed')"


@pytest.mark.parametrize(
    "header",
    [
        NPY.replace("'<i4'", "'|O'"),
        NPY.replace("'<i4'", "[('a', '<i4')]"),
        NPY.replace("'<i4'", "'<M8[s]'"),
        NPY.replace("'<i4'", "'<i3'"),
        NPY.replace("False", "True"),
        NPY.replace("False", RUN),
        NPY.replace("(5,)", "(5, 1)"),
        NPY.replace("(5,)", "(6,)"),
        NPY.replace("(5,)", "(4,)"),
        NPY.replace("(5,)", "(4611686018427387909,)"),
        NPY.replace("(5,)", "(-5,)"),
        NPY.replace("(5,)", "5"),
        NPY.replace("(5,)", "(" + "9" * 5000 + ",)"),
        NPY.replace("(5,)", "(1," * 2000 + ")" * 2000),
        NPY + f"; {RUN}",
        RUN,
        "",
    ],
)
def test_an_array_is_read_only_where_its_header_is_the_one_that_its_writer_gives_it(tmp_path, monkeypatch, header):
    monkeypatch.chdir(tmp_path)
    text = header.ljust(117).encode() + b"\n"
    path = tmp_path / "train_labels.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(20))
    if header == NPY.replace("(5,)", "(5, 1)"):  # another shape of as many values, which meta.json does not tell
        assert map_array(path).shape == (5, 1)
    else:
        with pytest.raises(ValueError, match=r"its header|it holds"):
            map_array(path)
    assert not (tmp_path / "executed").exists()


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("change", ["version 2", "length", "magic", "pickled objects", "cut", "longer"])
def test_an_array_of_another_version_or_with_pickled_objects_is_refused(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npy"
    np.save(path, np.arange(5, dtype="<i4"))
    content = path.read_bytes()
    if change == "pickled objects":
        np.save(path, np.array([Malicious()], dtype=object), allow_pickle=True)
        content = path.read_bytes()
    changed = {
        "version 2": content[:6] + b"\x02\x00" + struct.pack("<I", 118) + content[10:],
        "length": content[:8] + b"\xff\xff" + content[10:],
        "magic": b"\x92" + content[1:],
        "cut": content[:-1],
        "longer": content + b"\0",
    }
    path.write_bytes(changed.get(change, content))
    with pytest.raises(ValueError, match=r"its header|it holds"):
        map_array(path)
    assert not (tmp_path / "executed").exists()


def change_meta(prepared: Path, folder: Path, change: Callable[[dict], object]) -> Path:
    written(folder, {path.name: path.read_bytes() for path in prepared.iterdir()})
    edit(folder / "meta.json", change)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda meta: meta.update(vocab_size=2**40), "vocab_size is 1,099,511,627,776, no vocabulary has more"),
        (lambda meta: meta.update(vocab_size=True), "vocab_size must be a whole number from 0, not True"),
        (lambda meta: meta.update(max_id=1.5), "max_id must be a whole number, not 1.5"),
        (lambda meta: meta.pop("template"), "template must be a string, not None"),
        (lambda meta: meta.update(sources=[3]), "sources[0] must be an object, not 3"),
        (lambda meta: meta["sources"][0].pop("path"), "sources[0].path must be a string, not None"),
        (lambda meta: meta["sources"][0].update(weight=[1]), "sources[0].weight must be a number, not [1]"),
        (lambda meta: meta["ledger"]["tokens"].update(cut="x"), "ledger.tokens['cut'] must be an object, not 'x'"),
        (lambda meta: meta["ledger"]["tokens"].update(total={}), "ledger.tokens.total must be a whole number from 0"),
        (lambda meta: meta["ledger"]["splits"].update(train=[]), "ledger.splits['train'] must be an object, not []"),
        (lambda meta: meta["lengths"]["all"].pop("p95"), "lengths['all'].p95 must be a number, not None"),
        (lambda meta: meta.update(noticed={"x": {}}), "noticed['x'].conversations must be a whole number from 0"),
        (lambda meta: meta.update(bad_records=[None]), "bad_records[0] must be a string, not None"),
        (lambda meta: meta["leaks"].update(first=[{}]), "leaks.first[0].validation must be a string, not None"),
        (lambda meta: meta["arrays"]["train_labels.npy"].update(shape="x"), ".shape must be a list, not 'x'"),
        (lambda meta: meta.update(tokenizer_files=["meta.json"]), "names 'meta.json', which is no tokenizer's file"),
        (lambda meta: meta.update(tokenizer_files=["ckpt.pt"]), "names 'ckpt.pt', which is no tokenizer's file"),
    ],
)
def test_whatever_meta_json_says_of_another_kind_is_refused_by_name(prepared, tmp_path, change, said):
    folder = change_meta(prepared, tmp_path / "data", change)
    (folder / "ckpt.pt").write_bytes(b"mine")
    told = refusal(open_prepared, folder)
    assert said in told
    assert str(folder) in told


def test_a_tokenizers_file_that_is_a_link_to_elsewhere_is_not_copied_to_the_checkpoints(prepared, tmp_path):
    folder = change_meta(prepared, tmp_path / "data", lambda meta: None)
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    edit(folder / "meta.json", lambda meta: meta["tokenizer_files"].append("tokenizer_config.json"))
    assert "names 'tokenizer_config.json', which is no tokenizer's file of this folder" in refusal(
        open_prepared, folder
    )


def test_an_earlier_meta_json_that_names_no_list_of_files_is_no_crash_of_the_next_preparation(prepared, tmp_path):
    folder = change_meta(prepared, tmp_path / "data", lambda meta: meta.update(tokenizer_files=3))
    tokenizer = load_tokenizer(folder)
    prepare_sft.refuse_other_tokenizer(folder, tokenizer, "chatml")
    with PreparedWriter(folder):
        pass


def edited_tokenizer(folder: Path, change: Callable[[dict], object]) -> Path:
    edit(save_tiny_tokenizer(folder), change)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content["added_tokens"][-1].update(id=5), "'</think>' occurs twice, or gets another id"),
        (lambda content: content["model"]["vocab"].pop("z"), "occurs twice, or gets another id than it says"),
        (lambda content: content["added_tokens"].append(content["added_tokens"][-1]), "occurs twice, or gets another"),
        (lambda content: content["model"]["vocab"].update({"!": 4}), "its vocabulary has two tokens of one id"),
        (lambda content: content["model"]["vocab"].update(x=2**31), "has the id 2,147,483,64"),
        (lambda content: content["model"].update(continuing_subword_prefix="a" * 40), "not a tokenizer.json"),
        (lambda content: content["model"]["vocab"].update({">": "x" * 10_000}), "not a tokenizer.json"),
    ],
)
def test_a_tokenizer_that_would_give_other_ids_than_its_file_says_is_refused(tmp_path, capfd, change, said):
    told = refusal(load_tokenizer, edited_tokenizer(tmp_path, change))
    assert said in told
    assert len(told) < 1000


def test_a_vocabulary_in_which_a_token_occurs_twice_is_no_choice_of_one_of_them(tmp_path):
    path = save_tiny_tokenizer(tmp_path)
    path.write_text(path.read_text().replace('"vocab": {', '"vocab": {"!": 77,', 1))
    assert "the key '!' occurs twice" in refusal(load_tokenizer, path)


def test_a_pickle_in_place_of_any_file_of_weights_or_data_is_not_run(tmp_path, monkeypatch, prepared):
    monkeypatch.chdir(tmp_path)
    payload = pickle.dumps({"model": Malicious()}, protocol=2)
    pickle.loads(payload)
    assert (tmp_path / "executed").is_dir()  # that is what it would do
    (tmp_path / "executed").rmdir()
    folder = written(tmp_path / "folder", {**folder_target().files, "model.safetensors": payload})
    refusal(load_pretrained, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(payload)
    assert "other formats are not read" in refusal(load_pretrained, folder)
    (folder / "ckpt.pt").write_bytes(payload)
    refusal(read_checkpoint, folder / "ckpt.pt")
    data = change_meta(prepared, tmp_path / "data", lambda meta: None)
    (data / "train_labels.npy").write_bytes(payload)
    assert "train_labels.npy cannot be read" in refusal(open_prepared, data)
    (data / "tokenizer.json").write_bytes(payload)
    refusal(load_tokenizer, data)
    assert not (tmp_path / "executed").exists()


def test_no_program_reads_a_pickle_or_evaluates_what_it_reads():
    """torch.load only with weights_only=True, np.load without pickles, and none of their like at all."""
    sources = [
        path
        for pattern in ("*.py", "sft/**/*.py", "tools/*.py", "demo/*.py", "bench/*.py")
        for path in ROOT.glob(pattern)
    ]
    found = []
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {each.arg: ast.unparse(each.value) for each in node.keywords}
            is_bad = name in ("eval", "pickle.load", "pickle.loads", "marshal.loads", "shelve.open", "yaml.load")
            is_bad |= name == "exec" and path.name != "config.py"  # a config file is a program of the user's own
            # what imitates another project in a benchmark has the library's default, which is True as well
            default = "True" if path.parent.name == "bench" else None
            is_bad |= name == "torch.load" and options.get("weights_only", default) != "True"
            is_bad |= options.get("allow_pickle") == "True"
            found += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}"] if is_bad else []
    assert len(sources) > 80
    assert not found


def test_a_setting_of_a_run_log_is_a_problem_and_no_crash_however_long(tmp_path):
    (tmp_path / "run_1.json").write_text(json.dumps({"config": {"sft_data_dir": "a" * 9000, "model": "b" * 9000}}))
    told = refusal(load_settings, TrainSettings, [str(tmp_path / "run_1.json"), "--out_dir=x"])
    assert "no preset is called 'bbb" in told
    assert "b" * 100 not in told
    assert "does not exist" in told


def test_no_message_can_steer_the_terminal():
    assert harmless("a\x1b[2J\nb\r\u202e é 🦙") == "a\\x1b[2J\nb\\r\\u202e é 🦙"
    assert harmless("as it is") == "as it is"


def test_hundreds_of_mutated_headers_are_refused_or_say_what_is_loaded(tmp_path):
    outcome = faults.HEADERS.run(tmp_path, True)
    assert outcome.is_met, outcome.failures
    assert outcome.cases == 7 * faults.SHORT
    assert all(sum(counts.values()) == faults.SHORT for counts in outcome.counts.values())
    assert sum(counts.get("as it says", 0) for counts in outcome.counts.values()) >= 3


def misbehave(folder: Path) -> Any:
    content = (folder / "file").read_bytes()
    if content == b"crash":
        os.abort()
    if content == b"hang":
        while True:
            math.sqrt(2)
    if content == b"memory":
        assert sum(bytearray(b"\1" * (400 << 20))[:: 1 << 12])
    if content == b"program":
        os.system("true")
    if content == b"writing":
        (folder.parent / "written").write_text("")
    if content == b"traceback":
        raise KeyError(content)
    if content == b"no place":
        raise UserError("something is wrong")
    if content == b"refused":
        raise UserError(f"{folder}: refused; take another")
    return content if content in (b"says", b"wrong") else b"original"


@pytest.mark.slow
def test_the_search_finds_crashes_hangs_memory_programs_writing_tracebacks_and_wrong_values(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "CPU_SECONDS", 3.0)
    kinds = (
        "refused",
        "crash",
        "same",
        "hang",
        "memory",
        "says",
        "program",
        "writing",
        "traceback",
        "no place",
        "wrong",
    )
    mutants = [Mutant(kind, {"file": kind.encode()}) for kind in kinds]
    target = Target(
        "x", {"file": b"original"}, lambda draw: iter(mutants), misbehave, lambda folder: b"says", len(kinds)
    )
    found = {verdict.what: verdict for verdict in faults.verdicts(target, mutants, tmp_path / "work")}
    fine = {"refused": faults.REFUSED, "same": faults.AS_BEFORE, "says": faults.AS_IT_SAYS, "wrong": faults.WRONG}
    assert {kind: verdict.verdict for kind, verdict in found.items()} == {**dict.fromkeys(kinds, faults.BROKE), **fine}
    details = {"crash": "status -6", "hang": "status -27", "memory": "MiB of memory", "program": "os.system"}
    details |= {"writing": "for writing", "traceback": "KeyError", "no place": "names no file", "wrong": "not b'says'"}
    for kind, detail in details.items():
        assert detail in found[kind].detail, kind
