import gzip
import io
import json
import os
import sys
import tracemalloc
from pathlib import Path

import pytest

import sft.sources
from sft.conversation import BadRecord
from sft.errors import UserError
from sft.records import ReadOptions, read_record
from sft.sources import Source, find_sources, raw_records, spool_standard_input

RECORDS = [
    {"messages": [{"role": "user", "content": f"é {n}"}, {"role": "assistant", "content": "\u2028", "weight": 0.5}]}
    for n in range(3)
] + [
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "call"}, {"type": "text", "text": " f"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "done"},
            {"role": "assistant", "content": "fine", "reasoning_content": "so"},
        ],
        "tools": json.dumps([{"name": "f", "parameters": {}}]),
    }
]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, indent=1).encode()


def names(spec):
    sources, problems = find_sources(spec)
    assert problems == []
    return [(source.name, source.weight) for source in sources]


def raws(path, **options):
    return list(raw_records(Source(str(path), Path(path)), **options))


def conversations(path):
    """What is read, without where it was found."""
    return [read_record(raw, ReadOptions(), 0)._replace(record=0, line=0) for raw in raws(path)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with some files."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.json", "deep/er/c.jsonl.gz", "deep/d.parquet", ".hidden/e.jsonl", "deep/.f.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}")
    Path("notes.md").write_text("")
    return tmp_path


@pytest.mark.usefixtures("here")
def test_a_number_after_a_colon_is_the_weight_of_a_source():
    assert names(" a.json:0.7, b.jsonl:2,notes.md,-:3") == [
        ("a.json", 0.7),
        ("b.jsonl", 2.0),
        ("notes.md", 1.0),
        ("standard input", 3.0),
    ]
    Path("b.jsonl:2").write_text("{}")
    assert names("b.jsonl:2,b.jsonl:4") == [("b.jsonl:2", 1.0), ("b.jsonl", 4.0)]
    assert names("b.jsonl:2:0.5") == [("b.jsonl:2", 0.5)]


@pytest.mark.usefixtures("here")
def test_a_folder_stands_for_its_readable_files_in_order_without_hidden_ones():
    everything = ["./a.json", "./b.jsonl", "./deep/d.parquet", "./deep/er/c.jsonl.gz"]
    assert names(".:0.5") == [(name, 0.5) for name in everything]
    assert names("deep/*") == [("deep/d.parquet", 1.0)]
    assert names("**/*.jsonl*:2") == [("b.jsonl", 2.0), ("deep/er/c.jsonl.gz", 2.0)]


def test_everything_that_is_wrong_with_the_sources_is_told_at_once(here):
    (here / "empty").mkdir()
    os.symlink("b.jsonl", "same.jsonl")
    os.mkfifo("pipe.jsonl")
    spec = (
        "none.jsonl,empty,*.csv,b.jsonl:0,a.json:-1,a.json:nan,a.json:1e999,a.json:x,b.jsonl,same.jsonl,pipe.jsonl,-,-"
    )
    sources, problems = find_sources(spec)
    assert len(sources) == 4
    assert problems == [
        "input 'none.jsonl' cannot be read: no such file or directory",
        "input 'empty' cannot be read: the folder holds no file that ends in .jsonl, .json, .ndjson, .txt, .parquet, "
        ".jsonl.gz, .json.gz, .ndjson.gz, .txt.gz; name the files themselves",
        "input '*.csv' cannot be read: no file matches; check the pattern",
        "input 'b.jsonl:0': the weight must be above 0 and finite, not 0; leave the file out",
        "input 'a.json:-1': the weight must be above 0 and finite, not -1; leave the file out",
        "input 'a.json:nan': the weight must be above 0 and finite, not nan; leave the file out",
        "input 'a.json:1e999': the weight must be above 0 and finite, not 1e999; leave the file out",
        "input 'a.json:x': 'x' is no weight; write a number, as in a.json:0.5",
        "input 'pipe.jsonl' cannot be read: not a regular file; pipe it in and name it -",
        "input 'same.jsonl' is named twice (also as 'b.jsonl'); give a file more weight instead: same.jsonl:2",
        "input 'standard input' is named twice; name - once",
    ]
    assert find_sources(" , ").problems == ["input names no file; name files, folders, globs or - for standard input"]
    assert find_sources("a\0.json").problems == ["input 'a\\x00.json' cannot be read: embedded null byte"]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "misnamed.json", "a.parquet", "stdin"]
)
def test_the_same_records_give_the_same_conversations_from_every_kind_of_file(tmp_path, name, monkeypatch):
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(LINES)
    path = tmp_path / name
    if name == "a.parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(table_of(RECORDS), path)
    elif name == "stdin":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES)))
        with spool_standard_input(find_sources("-").sources, path) as (source,):
            assert source.name == "standard input"
            assert conversations(source.path) == conversations(plain)
        assert not path.exists()
        return
    else:
        content = ARRAY if ".json" in path.suffixes else LINES
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    assert conversations(path) == conversations(plain)
    assert [raw.record for raw in raws(path)] == [1, 2, 3, 4]


def table_of(records):
    """A table in which, as tables do, each message has every key of any of them, null where it had none."""
    import pyarrow

    parts = pyarrow.list_(pyarrow.struct([("type", pyarrow.string()), ("text", pyarrow.string())]))
    call = pyarrow.struct([("function", pyarrow.struct([("name", pyarrow.string()), ("arguments", pyarrow.string())]))])
    message = pyarrow.struct(
        [
            ("role", pyarrow.string()),
            ("content", parts),
            ("weight", pyarrow.float64()),
            ("reasoning_content", pyarrow.string()),
            ("tool_calls", pyarrow.list_(call)),
        ]
    )
    rows = json.loads(json.dumps(records))
    for turn in (turn for row in rows for turn in row["messages"] if isinstance(turn["content"], str)):
        turn["content"] = [{"type": "text", "text": turn["content"]}]
    schema = pyarrow.schema([("messages", pyarrow.list_(message)), ("tools", pyarrow.string())])
    return pyarrow.Table.from_pylist(rows, schema)


def test_records_say_where_they_begin(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\r\n{"text": "a"}\r\n \n{"text": "b"}')
    assert [(raw.record, raw.line, raw.size) for raw in raws(path)] == [(1, 2, 15), (2, 4, 13)]
    path.write_bytes(b'[\n{"text": "\xc3\xa9"},\n\n{"text": NaN}\n, {}]')
    assert [(raw.record, raw.line, raw.size) for raw in raws(path)] == [(1, 2, 14), (2, 4, 13), (3, 5, 2)]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.txt", "a.parquet", "broken.json", "broken.jsonl.gz"]
)
def test_the_bytes_told_to_advance_add_up_to_the_file_on_disk(tmp_path, name):
    path = tmp_path / name
    content = ARRAY if ".json" in path.suffixes else b"\n" + LINES + b"\n\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    if name == "a.parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table_of(RECORDS), path)
    if name.startswith("broken"):
        path.write_bytes(path.read_bytes()[:-2])
    told: list[int] = []
    read = raws(path, advance=told.append)
    assert sum(told) == path.stat().st_size
    assert min(told) >= 0
    if path.suffix == ".parquet":
        assert sum(raw.size for raw in read) == path.stat().st_size
    if name == "broken.json":
        assert isinstance(read[-1].value, BadRecord)
        assert read[-1].size == len(content) - 2 - content.rindex(b"\n }") - len(b"\n }")


@pytest.mark.parametrize("content", [LINES, ARRAY, gzip.compress(b"\xef\xbb\xbf" + LINES)])
def test_a_byte_order_mark_at_the_start_is_passed_over_and_told(tmp_path, content):
    (tmp_path / "marked").write_bytes(content if content.startswith(b"\x1f") else b"\xef\xbb\xbf" + content)
    (tmp_path / "plain").write_bytes(LINES)
    assert conversations(tmp_path / "marked") == conversations(tmp_path / "plain")
    assert [raw.bom for raw in raws(tmp_path / "marked")] == [True, False, False, False]
    assert not any(raw.bom for raw in raws(tmp_path / "plain"))


def test_a_text_file_is_one_record_of_plain_text(tmp_path):
    path = tmp_path / "a.TXT"
    path.write_bytes(b"\xef\xbb\xbf[once\r\nupon \0\n")
    (raw,) = raws(path)
    assert (raw.value, raw.record, raw.line, raw.bom) == ({"text": "[once\r\nupon \0\n"}, 1, 1, True)
    path.write_bytes(b" \n")
    assert "no records" in str(raws(path)[0].value)


def test_what_is_longer_than_the_longest_record_is_refused_and_what_follows_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sft.sources, "LONGEST_RECORD", 50)
    monkeypatch.setattr(sft.sources, "BUFFER_BYTES", 16)
    fits, too_long = b'{"text": "' + b"a" * 38 + b'"}', b'{"text": "' + b"a" * 39 + b'"}'
    assert len(fits) == 50
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([fits, too_long, too_long * 3, fits, too_long]))
    found = [(raw.line, raw.size, isinstance(raw.value, BadRecord)) for raw in raws(path)]
    assert found == [(1, 51, False), (2, 52, True), (3, 154, True), (4, 51, False), (5, 51, True)]
    path.write_bytes(b"[" + b",".join([fits, too_long, fits]) + b"]")
    assert [isinstance(raw.value, BadRecord) for raw in raws(path)] == [False, True, False]
    path = tmp_path / "a.txt"
    path.write_bytes(("é" * 40).encode())
    assert [(str(raw.value), raw.size) for raw in raws(path)] == [
        ("the text is longer than 50 bytes (0 MiB); split the record", 80)
    ]


def test_a_hundred_megabytes_of_one_line_are_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(sft.sources, "LONGEST_RECORD", 2**20)
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(b"a" * 10**6)
        file.write(b'\n{"text": "a"}\n' * 2)
    tracemalloc.start()
    try:
        found = [(raw.line, raw.size, type(raw.value)) for raw in raw_records(Source("a", path))]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [(1, 10**8 + 1, BadRecord), (2, 14, bytes), (4, 14, bytes)]
    assert peak < 6 * 2**20


def test_a_file_is_read_as_a_stream(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES * 5_000)
    tracemalloc.start()
    try:
        count = sum(1 for _ in raw_records(Source("a", path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert path.stat().st_size > 3 * 10**6
    assert peak < 2 * 2**20


def test_the_parts_of_a_joined_gzip_file_are_one_file(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(part) for part in (b"", LINES[:30], LINES[30:])))
    assert len(conversations(path)) == 4


def test_what_comes_before_the_damage_of_a_gzip_file_is_read(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(LINES * 500, compresslevel=0)
    for content in (whole[:-5000], whole[:-5000] + b"\0" * 5000, whole[:-8] + b"\0" * 8, whole + b"junk"):
        path.write_bytes(content)
        *read, last = raws(path)
        assert len(read) > 1900
        assert not any(isinstance(raw.value, BadRecord) for raw in read)
        assert "the gzip file is damaged from here on (" in str(last.value)
        assert (last.record, last.line) == (len(read) + 1, read[-1].line + 1)
        assert last.size >= 1


def test_damaged_parquet_is_a_bad_record_and_so_is_a_row_that_python_cannot_hold(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xffb")],
    )
    parquet.write_table(pyarrow.table({"text": broken}), path)
    assert [raw.value if raw.line != 2 else str(raw.value) for raw in raws(path)] == [
        {"text": "a"},
        "the row holds text that is not UTF-8, or a date that Python lacks; mend or remove it",
        {"text": "b"},
    ]
    parquet.write_table(pyarrow.table({"text": [f"{n} {n * 7}" for n in range(5000)]}), path, compression="none")
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:100], b"PAR1", whole[:-300] + b"\xff" * 292 + whole[-8:]):
        path.write_bytes(content)
        last = raws(path)[-1]
        assert "the Parquet file is damaged from here on (" in str(last.value)
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"]), path)
    assert "several columns 'text'; rename them" in str(raws(path)[0].value)
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert "the file holds no records" in str(raws(path)[0].value)


def test_rows_that_a_parquet_file_promises_and_lacks_are_missed(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    batches = pyarrow.table({"text": ["a"]}).to_batches()
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda *arguments, **options: iter(batches))
    good, bad = raws(path)
    assert good.value == {"text": "a"}
    assert "damaged from here on (2 rows promised, 1 found)" in str(bad.value)
    assert good.size + bad.size == path.stat().st_size


def test_parquet_without_its_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"a\.parquet: is Parquet; to read it: pip install -e '\.\[parquet\]'"):
        raws(tmp_path / "a.parquet")


def test_a_file_that_is_gone_is_an_error_of_the_operating_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        raws(tmp_path / "none.jsonl")


def test_the_nulls_that_a_table_adds_to_structs_are_no_part_of_a_record(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def called(arguments):
        call = {"name": "f", "arguments": arguments}
        return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}

    table = pyarrow.Table.from_pylist([called({"city": "x"}), called({"day": 1})])
    parquet.write_table(table, tmp_path / "a.parquet")
    found = [read_record(raw, ReadOptions(), 0) for raw in raws(tmp_path / "a.parquet")]
    assert [each.messages[1].tool_calls[0].arguments for each in found] == ['{"city": "x"}', '{"day": 1}']
