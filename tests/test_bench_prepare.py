"""What of the benchmark of preparing can be held without TRL."""

import json
import sys
from importlib import metadata

import numpy as np
import pytest

from bench.prepare import Conversations, compared, main, our_conversations, read_records, run_ours, write_repeated
from sft.errors import UserError
from tests.conftest import ROOT
from tests.preparing import tokenizer_file, write_lines

RESULT = ROOT / "bench" / "results" / "prepare_cpu.json"
RECORDS = [{"question": "the cat", "answer": "sat"}, {"question": "the hat", "answer": "\nsat on"}]


@pytest.fixture(scope="module")
def report():
    if not RESULT.exists():
        pytest.skip("bench/prepare.py has no committed result yet")
    return json.loads(RESULT.read_text())


def test_the_committed_result_reaches_what_was_promised(report):
    assert report["bytes"] >= 50e6
    assert report["cores"] == 2
    assert report["ours_over_trl"] >= 7
    assert report["ours_over_bare"] >= 0.6


def test_no_ids_and_no_labels_of_the_committed_result_differ(report):
    counts = report["compared"]
    assert counts["different"] == 0
    assert counts["equal"] + counts["answer_begins_with_line_break"] == counts["conversations"]
    assert counts["equal"] > 0.99 * counts["conversations"]


def test_the_committed_ratios_follow_from_the_medians(report):
    medians = {name: np.median(taken["all"]) for name, taken in report["seconds"].items()}
    assert medians == {name: taken["median"] for name, taken in report["seconds"].items()}
    assert report["ours_over_trl"] == pytest.approx(medians["TRL"] / medians["ours"])
    assert report["ours_over_bare"] == pytest.approx(medians["bare"] / medians["ours"])


@pytest.fixture
def repeated(tmp_path):
    path = tmp_path / "repeated.jsonl"
    write_repeated(write_lines(tmp_path / "records.jsonl", RECORDS), path, 1000)
    return path


def test_the_input_is_repeated_up_to_the_size_without_a_duplicate(repeated):
    records = list(read_records(repeated))
    assert 1000 <= repeated.stat().st_size < 1200
    assert len({record["question"] for record in records}) == len(records)
    assert records[2:4] == [{**record, "question": f"2. {record['question']}"} for record in RECORDS]


def test_our_run_keeps_every_conversation_and_tells_its_phases(repeated, tmp_path):
    phases = run_ours(repeated, str(tokenizer_file(tmp_path)), tmp_path / "data", 1)
    assert {"start-up", "preparing", "audit"} <= phases.keys()
    ours = our_conversations(tmp_path / "data")
    count = len(list(read_records(repeated)))
    assert compared(ours, ours, read_records(repeated))["equal"] == count == len(ours.offsets) - 1


def test_a_run_that_fails_is_an_error_with_its_message(tmp_path):
    with pytest.raises(UserError, match=r"failed with status 2: error: .*\n.*none\.jsonl' cannot be read"):
        run_ours(tmp_path / "none.jsonl", str(tokenizer_file(tmp_path)), tmp_path / "data", 1)


@pytest.mark.parametrize("changed", ["input_ids", "labels"])
def test_a_difference_in_ids_or_labels_is_counted_apart_from_the_one_by_design(changed):
    ours = Conversations(np.arange(6), np.arange(6), np.array([0, 2, 4, 6]))
    records = [*RECORDS, {"question": "?", "answer": " \n\nsat"}]
    for i, name in ((0, "different"), (2, "answer_begins_with_line_break"), (4, "answer_begins_with_line_break")):
        values = np.arange(6)
        values[i] = 9
        found = compared(ours, ours._replace(**{changed: values}), iter(records))
        expected = {"conversations": 3, "equal": 2, "answer_begins_with_line_break": 0, "different": 0}
        assert found == {**expected, name: 1}


def test_without_trl_it_names_what_to_install(monkeypatch):
    def version(name):
        if name == "trl":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr("bench.prepare.version", version)
    with pytest.raises(UserError, match=r"trl is missing; pip install -e '\.\[bench\]'"):
        main(["--input=a.jsonl", "--tokenizer=qwen3"])
