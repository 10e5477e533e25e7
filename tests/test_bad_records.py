import json

import pytest

import prepare_sft
from sft.conversation import BadFile
from sft.errors import UserError
from sft.joining import BadRecords
from sft.sources import Source, raw_records
from tests.bad_inputs import BAD_INPUTS
from tests.preparing import exchange, prepare, write_lines

GOOD = exchange("What is it?", "a cat")


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    """The file of each bad input."""
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(BadRecords, "FIRST", len(BAD_INPUTS) + 1)  # so that all are told
    paths = []
    for number, bad in enumerate(BAD_INPUTS):
        paths.append(tmp_path / str(number) / bad.file)
        paths[-1].parent.mkdir()
        paths[-1].write_bytes(bad.content)
    return paths


def test_each_bad_input_is_refused_at_its_line_and_nothing_is_left(tmp_path, bad_files):
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, input=",".join(map(str, bad_files)))
    headline, *problems = str(caught.value).splitlines()
    assert headline == "the input cannot be used:"
    for path, bad, problem in zip(bad_files, BAD_INPUTS, problems, strict=True):
        assert problem.startswith(f"  {path}:{bad.line}: {bad.message}")
        assert problem.partition("; ")[2]
    assert not (tmp_path / "data").exists()


def ends_its_file(path):
    return any(isinstance(raw.value, BadFile) for raw in raw_records(Source(str(path), path)))


def test_each_bad_input_is_skipped_counted_and_named_where_that_is_asked_for(tmp_path, bad_files):
    good = write_lines(tmp_path / "good.jsonl", [GOOD])
    settings = {"bad_records": "skip", "max_bad_fraction": 1, "val_fraction": 0}
    inputs = [(path, bad) for path, bad in zip(bad_files, BAD_INPUTS, strict=True) if not ends_its_file(path)]
    assert len(inputs) > 60
    data = prepare(tmp_path, input=",".join(map(str, [*(path for path, _ in inputs), good])), **settings)
    ledger = data.meta["ledger"]
    assert ledger["records"]["bad"] == len(data.meta["bad_records"]) == len(inputs)
    for (path, bad), problem in zip(inputs, data.meta["bad_records"], strict=True):
        assert problem.startswith(f"{path}:{bad.line}: {bad.message}")
    sources = data.meta["sources"]
    assert ledger["records"]["bad_bytes"] > sum(len(bad.content) for _, bad in inputs) * 0.9
    assert ledger["records"]["read"] == sum(source["records"] for source in sources)
    assert [source["records"] - source["conversations"] for source in sources] == [1] * len(inputs) + [0]
    assert data.splits["train"].origins[-1].tolist() == [len(inputs), 1, -1]


def test_what_keeps_the_rest_of_a_file_from_being_read_is_never_skipped(tmp_path, bad_files):
    inputs = [(path, bad) for path, bad in zip(bad_files, BAD_INPUTS, strict=True) if ends_its_file(path)]
    assert len(inputs) > 10
    good = write_lines(tmp_path / "good.jsonl", [GOOD])
    for path, bad in inputs:
        with pytest.raises(UserError) as caught:
            prepare(tmp_path, input=f"{good},{path}", bad_records="skip", max_bad_fraction=1)
        assert f"{path}:{bad.line}: {bad.message}" in str(caught.value)


def bad_lines(count):
    return [{"text": number} for number in range(count)]


def test_all_problems_are_listed_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, [GOOD, *bad_lines(9)])
    told = [problem.split(": ")[0] for problem in str(caught.value).splitlines()[1:]]
    assert told == [f"  {tmp_path}/input.jsonl:{line}" for line in range(2, 11)]
    assert caught.value.exit_status == 2


def test_ten_problems_are_enough(tmp_path):
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, [GOOD, *bad_lines(30)])
    headline, *told = str(caught.value).splitlines()
    assert headline == "the input cannot be used (the first 10 problems):"
    assert len(told) == 10
    assert not (tmp_path / "data").exists()


def test_ten_problems_end_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("sft.preparation.CHUNK_RECORDS", 20)
    source = write_lines(tmp_path / "input.jsonl", [*bad_lines(20), *[GOOD] * 200])
    chunks = []

    def render_chunk(recipe, chunk):
        chunks.append(chunk)
        return original(recipe, chunk)

    original = prepare_sft.render_chunk
    monkeypatch.setattr(prepare_sft, "render_chunk", render_chunk)
    with pytest.raises(UserError, match="the first 10 problems"):
        prepare(tmp_path, input=source, workers=1)
    assert len(chunks) == 1


def test_more_bad_records_than_are_allowed_are_an_error_that_tells_the_share(tmp_path):
    records = [*(exchange(f"What is {i}?", "a cat") for i in range(8)), *bad_lines(2)]
    data = prepare(tmp_path, records, bad_records="skip", max_bad_fraction=0.2)
    assert data.meta["ledger"]["records"]["bad"] == 2
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, records, bad_records="skip", max_bad_fraction=0.19)
    headline, *told = str(caught.value).splitlines()
    share = "2 of the first 10 records are bad, more than max_bad_fraction 0.19 allows; mend them or raise it"
    assert headline == f"{share}. The first:"
    assert [problem.split(": ")[0] for problem in told] == [f"  {tmp_path}/input.jsonl:{line}" for line in (9, 10)]
    left = {path.name for path in (tmp_path / "data").iterdir()}
    assert left == {"tokenizer.json", "chat_template.jinja"}  # of the run before


def test_too_many_bad_records_end_the_reading_after_a_thousand(tmp_path):
    records = [*bad_lines(11), *(exchange(f"What is {i}?", "a cat") for i in range(3000))]
    with pytest.raises(UserError, match=r"11 of the first 1,000 records are bad, more than max_bad_fraction 0\.01"):
        prepare(tmp_path, records, bad_records="skip", workers=1)


def test_the_bytes_of_bad_records_are_those_of_their_lines(tmp_path):
    records = [b'{"text": 1}', json.dumps(GOOD).encode(), b'  {"text": 22}  ']
    data = prepare(tmp_path, records, bad_records="skip", max_bad_fraction=1, val_fraction=0)
    assert data.meta["ledger"]["records"] == {"read": 3, "bad": 2, "bad_bytes": 12 + 17}


def test_skipping_is_no_remedy_for_conversations_that_are_too_long(tmp_path):
    with pytest.raises(UserError, match="the input cannot be used:") as caught:
        prepare(
            tmp_path,
            [GOOD, {"text": 1}, exchange("the cat " * 50, "sat")],
            bad_records="skip",
            max_bad_fraction=1,
            block_size=40,
            too_long="error",
        )
    assert f"{tmp_path}/input.jsonl:3: " in str(caught.value)
    assert "block_size is 40" in str(caught.value)


def test_the_first_ten_of_the_skipped_are_named_and_all_are_counted(tmp_path, capsys):
    records = [*(exchange(f"What is {i}?", "a cat") for i in range(20)), *bad_lines(15)]
    data = prepare(tmp_path, records, bad_records="skip", max_bad_fraction=0.5)
    assert data.meta["ledger"]["records"]["bad"] == 15
    assert len(data.meta["bad_records"]) == 10
    assert "  skipped 15 bad records (" in capsys.readouterr().out
