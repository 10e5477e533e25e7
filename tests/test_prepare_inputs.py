import gzip
import json

import pytest

import prepare_sft
from sft.errors import UserError
from tests.preparing import exchange, prepare, texts, write_lines

FIRST, SECOND, THIRD = (exchange(f"What is {i}?", f"the cat {i}") for i in (1, 2, 3))


def prompts(data):
    return [text.split("What is ")[1][0] for text in texts(data)]


@pytest.fixture
def folder(tmp_path):
    """A folder of files, one below another."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_lines(tmp_path / "in" / "b.jsonl", [FIRST])
    (tmp_path / "in" / "a.json").write_text(json.dumps([SECOND]))
    write_lines(tmp_path / "in" / "deep" / "c.jsonl", [THIRD])
    (tmp_path / "in" / "notes.md").write_text("no data")
    return tmp_path / "in"


def test_a_folder_stands_for_its_files_in_order(tmp_path, folder):
    data = prepare(tmp_path, input=folder, val_fraction=0)
    assert [source["path"] for source in data.meta["sources"]] == [
        f"{folder}/{name}" for name in ("a.json", "b.jsonl", "deep/c.jsonl")
    ]
    assert prompts(data) == ["2", "1", "3"]
    assert data.splits["train"].origins.tolist() == [[source, 1, -1] for source in range(3)]


def test_a_glob_stands_for_what_it_matches(tmp_path, folder):
    data = prepare(tmp_path, input=f"{folder}/**/*.jsonl", val_fraction=0)
    assert prompts(data) == ["1", "3"]


def test_several_files_keep_their_sources_and_records(tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"text": "a b"}, {"text": "c d"}]))
    data = prepare(tmp_path, [FIRST], input=f"{tmp_path}/input.jsonl,{other}", val_fraction=0)
    assert data.splits["train"].origins.tolist() == [[0, 1, -1], [1, 1, -1], [1, 2, -1]]
    assert [source["records"] for source in data.meta["sources"]] == [1, 2]


def test_problems_of_several_files_are_reported_together(tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("{")
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, [FIRST, {"text": 1}], input=f"{tmp_path}/input.jsonl,{other}")
    assert f"{tmp_path}/input.jsonl:2: " in str(caught.value)
    assert f"{other}:1: " in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_the_weights_of_sources_are_kept_for_the_trainer(tmp_path, folder):
    data = prepare(tmp_path, input=f"{folder}/b.jsonl:0.5,{folder}/deep:2,{folder}/a.json", val_fraction=0)
    assert data.source_weights == [0.5, 2, 1]
    assert [source["samples"] for source in data.meta["sources"]] == [1, 1, 1]


def test_gzip_and_parquet_give_what_lines_give(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = [FIRST, SECOND, THIRD]
    plain = write_lines(tmp_path / "input.jsonl", records)
    (tmp_path / "zipped.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "table.parquet")
    arrays = [
        prepare(tmp_path, input=tmp_path / name, out=name + ".data", val_fraction=0).meta["arrays"]
        for name in ("input.jsonl", "zipped.jsonl.gz", "table.parquet")
    ]
    assert arrays[0] == arrays[1] == arrays[2]


def test_several_processes_read_parquet(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("sft.preparation.CHUNK_RECORDS", 10)
    records = [exchange(f"What is {i}?", "a cat") for i in range(100)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "table.parquet")
    data = prepare(tmp_path, input=tmp_path / "table.parquet", workers=2, val_fraction=0)
    assert data.splits["train"].origins[:, 1].tolist() == list(range(1, 101))


def test_columns_under_other_names_are_read_where_they_are_named(tmp_path):
    record = {"ask": "What is 1?", "say": "the cat", "text": "left out", "answer": "left out"}
    data = prepare(tmp_path, [record], fields="prompt:ask,completion:say", val_fraction=0)
    assert texts(data) == [
        "<|im_start|>user\nWhat is 1?<|im_end|>\n<|im_start|>assistant\nthe cat<|im_end|>\n",
    ]
    assert data.meta["settings"]["fields"] == "prompt:ask,completion:say"


def test_a_format_that_is_forced_is_not_recognised(tmp_path):
    record = {**FIRST, "text": "the hat"}
    data = prepare(tmp_path, [record], format="text", val_fraction=0)
    assert texts(data) == ["the hat<|endoftext|>"]


def test_a_byte_order_mark_is_accepted_and_counted(tmp_path):
    source = tmp_path / "marked.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + json.dumps(FIRST).encode() + b"\n" + json.dumps(SECOND).encode())
    data = prepare(tmp_path, input=source, val_fraction=0)
    assert len(texts(data)) == 2
    assert data.meta["noticed"] == {"byte_order_mark": {"conversations": 1, "first": [f"{source}:1"]}}


def test_what_is_odd_and_accepted_is_counted_with_its_first_lines(tmp_path, capsys):
    odd = {
        "empty_turn": [("user", ""), ("assistant", "a")],
        "user_turns_in_a_row": [("user", "a"), ("user", "b"), ("assistant", "c")],
        "assistant_first": [("assistant", "a")],
        "user_last": [("user", "a"), ("assistant", "b"), ("user", "c")],
        "nul": [("user", "a\0"), ("assistant", "b")],
    }
    records = [{"messages": [{"role": role, "content": content} for role, content in turns]} for turns in odd.values()]
    data = prepare(tmp_path, [record for record in records for _ in range(12)], val_fraction=0)
    noticed = data.meta["noticed"]
    assert noticed.keys() == odd.keys()
    for number, name in enumerate(odd):
        lines = [f"{tmp_path}/input.jsonl:{number * 12 + line}" for line in range(1, 11)]
        assert noticed[name] == {"conversations": 12, "first": lines}
    assert "two user turns in a row: 12 conversations\n" in capsys.readouterr().out


def test_an_input_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", [exchange("What is it?", "a cat")])

    def audited(*given):
        source.write_text(source.read_text() + "\n")
        return original(*given)

    original = prepare_sft.audited
    monkeypatch.setattr(prepare_sft, "audited", audited)
    with pytest.raises(UserError, match=r"a\.jsonl: changed while it was read, nothing was prepared"):
        prepare(tmp_path, input=source)
    assert not (tmp_path / "data").exists()
