"""What of the table of bad inputs can be held without TRL."""

import json
import re
import sys
from collections import Counter

import pytest

from bench.bad_inputs import ACCEPTED, OUTCOMES, REFUSED, REFUSED_WITH_PLACE, main, what_ours_does
from sft.errors import UserError
from tests.bad_inputs import BAD_INPUTS, GOOD, BadInput
from tests.conftest import ROOT
from tests.preparing import tokenizer_file


@pytest.fixture(scope="module")
def report():
    return json.loads((ROOT / "bench" / "results" / "bad_inputs.json").read_text())


def test_the_table_is_of_the_inputs_that_the_tests_refuse(report):
    assert [row["input"] for row in report["table"]] == [bad.name for bad in BAD_INPUTS]


def test_the_counts_are_those_of_the_rows(report):
    assert report["inputs"] == len(report["table"])
    for who in ("ours", "trl"):
        counts = Counter(row[who] for row in report["table"])
        assert report[f"{who}_does"] == {name: counts[name] for name in OUTCOMES}
        assert counts.total() == sum(report[f"{who}_does"].values()), "no outcome is of another name"


def test_the_program_refused_every_input_at_the_line_that_is_wrong(report):
    assert report["ours_does"] == {REFUSED_WITH_PLACE: len(BAD_INPUTS), REFUSED: 0, ACCEPTED: 0}
    for row, bad in zip(report["table"], BAD_INPUTS, strict=True):
        assert row["ours_says"].startswith(f"{bad.file}:{bad.line}: {bad.message}".rstrip())


def test_the_readme_has_the_counts(report):
    (row,) = re.findall(r"^\| (\d+) inputs with one thing wrong: (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    counts = ("; ".join(str(report[f"{who}_does"][name]) for name in OUTCOMES) for who in ("ours", "trl"))
    what = "refused with line or row; refused; accepted"
    assert row == (str(report["inputs"]), " | ".join([what, *counts]))


@pytest.mark.parametrize(
    "name", ["an open string", "a negative weight", "an empty file", "two arrays", "half a gzip file"]
)
def test_what_the_table_says_of_ours_is_what_the_program_says(name, report, tmp_path):
    (bad,) = (bad for bad in BAD_INPUTS if bad.name == name)
    (row,) = (row for row in report["table"] if row["input"] == name)
    assert what_ours_does(bad, str(tokenizer_file(tmp_path))) == (row["ours"], row["ours_says"])


@pytest.mark.parametrize(
    ("content", "line", "expected"),
    [
        (GOOD + b"{\n", 2, (REFUSED_WITH_PLACE, "any.jsonl:2: broken JSON at column 2: Expecting property name ")),
        (GOOD + b"{\n", 1, (REFUSED, "the input cannot be used:")),
        (GOOD + GOOD.replace(b"cat", b"hat"), 1, (ACCEPTED, "2 samples")),
    ],
)
def test_ours_counts_as_refusing_an_input_only_where_it_names_the_very_line(content, line, expected, tmp_path):
    outcome, told = what_ours_does(BadInput("any", content, line, "", "any.jsonl"), str(tokenizer_file(tmp_path)))
    assert (outcome, told[: len(expected[1])]) == expected


def test_without_trl_it_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"missing; pip install -e '\.\[bench\]'"):
        main(["--tokenizer=qwen3"])
