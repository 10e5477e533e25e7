"""make faults in its short form, and what its table is worth: a fault that breaks, hangs or finds something is told."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.defects import DEFECTS, Defect
from bench.faults import all_faults, main, table
from bench.faults_defects import cannot_be_put
from bench.faults_outcome import Outcome
from bench.faults_result import Result, compare, differences, result_of
from sft.errors import UserError
from tests.conftest import ROOT

QUICK = ("kills", "rows", "nan", "defects")


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def run_faults(out: Path, *names: str) -> dict:
    """The outcomes of the short form of some faults."""
    done = run(
        sys.executable,
        "-m",
        "bench.faults",
        "--short=true",
        f"--only={','.join(names)}",
        f"--out={out / 'faults.json'}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "faults.json").read_text())["faults"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict:
    return run_faults(tmp_path_factory.mktemp("faults"), *QUICK)


@pytest.mark.parametrize("name", QUICK)
def test_what_the_table_says_holds_in_short(quick, name):
    outcome = quick[name]
    assert outcome["met"]
    assert outcome["failures"] == []
    assert outcome["cases"] >= outcome["least"] > 1


@pytest.mark.slow
def test_torchrun_holds_in_short(tmp_path):
    assert run_faults(tmp_path, "torchrun")["torchrun"]["met"]


FAULTS = """
import sys, time
from bench import faults
from bench.faults_outcome import Fault, Outcome

def outcome(**changes):
    return Outcome(**{"test": "t", "must": "m", "cases": 2, "least": 2, **changes})

def breaks(folder, short):
    raise ZeroDivisionError("something broke")

acts = {
    "good": lambda folder, short: outcome(counts={"short": short}),
    "found": lambda folder, short: outcome(failures=("it was lost",)),
    "few": lambda folder, short: outcome(cases=1),
    "breaks": breaks,
    "hangs": lambda folder, short: time.sleep(600),
}
faults.LIMIT_SECONDS, faults.LATE_IMPORTS = 3.0, ()
faults.all_faults = lambda: [Fault(name, act) for name, act in acts.items()]
faults.run_program(faults.main)
"""


@pytest.mark.slow
def test_a_fault_that_finds_something_or_breaks_or_hangs_or_had_too_few_cases_is_not_met(tmp_path):
    done = run(sys.executable, "-c", FAULTS, f"--out={tmp_path / 'faults.json'}", "--short=true")
    assert done.returncode == 1
    told = json.loads((tmp_path / "faults.json").read_text())["faults"]
    assert {name: each["met"] for name, each in told.items()} == {
        **dict.fromkeys(["good"], True),
        **dict.fromkeys(["found", "few", "breaks", "hangs"], False),
    }
    assert told["good"]["counts"]["short"] is True
    assert "ZeroDivisionError: something broke" in told["breaks"]["failures"][0]
    assert told["hangs"]["failures"] == ["it did not end within 3 s"]
    assert "error: not met: " in done.stderr
    assert not {"good"} & set(re.findall(r"\w+", done.stderr.partition(";")[0]))


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match=r"--only: no kils; there are .*kills"):
        main(["--only=kills,kils"])


def test_the_table_says_of_each_line_whether_it_is_met():
    met = Outcome(test="one", must="hold", cases=1200, least=1000)
    missed = Outcome(test="two", must="end", cases=3, least=3, failures=("it was lost", "so was this"))
    assert table([met, missed])[2:] == [
        "| one | hold | 1,200 (at least 1,000) | 0 | yes |",
        "| two | end | 3 (at least 3) | 2 | NO |",
    ]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_the_code_still_has_the_place_of_each_defect_and_its_test(defect):
    assert list(cannot_be_put(defect)) == []
    file, *names = defect.test.partition("[")[0].split("::")
    text = (ROOT / file).read_text()
    assert all(re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE) for name in names)


def test_the_names_of_defects_differ():
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)


@pytest.mark.parametrize(
    ("changes", "test", "says"),
    [
        ((("no such text", ""),), "tests/test_faults.py", "holds 0 times what is to be changed"),
        ((("import", ""),), "tests/test_faults.py", r"holds \d+ times what is to be changed"),
        ((("def sync_folder(", "def sync_folder(("),), "tests/test_faults.py", "is no Python with it"),
        ((("def sync_folder(", "def sync_folders("),), "tests/test_nothing.py", "there is no tests/test_nothing.py"),
    ],
)
def test_a_defect_that_cannot_be_put_is_told(changes, test, says):
    (problem,) = cannot_be_put(Defect("a defect", "sft/files.py", changes, test))
    assert re.search(says, problem)


def test_equal_is_equal_to_the_bit():
    def tree(number: float) -> dict:
        return {"w": torch.tensor([1.0, number]), "steps": [{"step": 3, "loss": number}]}

    assert differences(tree(math.inf), tree(math.inf)) == []
    assert differences({"w": torch.tensor(math.nan)}, {"w": torch.tensor(math.nan)}) == []
    assert differences(tree(0.0), tree(math.nextafter(0, 1))) == ["steps[0].loss"]  # 0 in float32
    assert differences({"w": torch.tensor(0.0)}, {"w": torch.tensor(-0.0)}) == ["w"]
    assert differences({"w": torch.zeros(2)}, {"w": torch.zeros(2, dtype=torch.int32)}) == ["w"]
    assert differences({"w": torch.zeros(2)}, {"w": torch.zeros(2, 1)}) == ["w"]
    assert differences({"w": 1, "v": [1]}, {"v": [1, 2]}) == ["w", "v"]


def write_run(folder: Path, *, weight: float, loss: float, checkpoint: str = "ckpt_000004.pt") -> Result:
    folder.mkdir()
    names = ("optimizer", "iter_num", "rows_seen", "order", "trained_tokens_seen", "val_loss", "best_val_loss")
    torch.save({**dict.fromkeys(names, 1), "model": {"w": torch.tensor(weight)}}, folder / checkpoint)
    log = {"training_iterations": [{"iter": 4, "loss": loss, "order": "00"}]}
    (folder / "run_20260101_000000.json").write_text(json.dumps(log))
    return result_of(folder)


def test_another_weight_another_record_and_a_partial_file_are_told(tmp_path):
    whole = write_run(tmp_path / "whole", weight=1.0, loss=2.0)
    assert compare(tmp_path / "whole", whole) == []
    write_run(tmp_path / "other", weight=1.5, loss=2.5)
    (tmp_path / "other" / "ckpt_000008.pt.partial").touch()
    weights, record, partial = compare(tmp_path / "other", whole)
    assert weights == "1 parts differ from the undisturbed run, the first is model.w"
    assert record.startswith("a log tells another loss or order of step 4")
    assert partial == "partial files are left: ['ckpt_000008.pt.partial']"
    (tmp_path / "other" / "run_20260101_000000.json").write_text("{")
    assert re.match("a run log is no JSON", compare(tmp_path / "other", whole)[0])


def test_the_committed_results_are_of_all_faults_in_full_within_eight_minutes_and_met():
    report = json.loads((ROOT / "bench" / "results" / "faults.json").read_text())
    assert list(report["faults"]) == [fault.name for fault in all_faults()]
    assert not report["short"]
    assert report["seconds"] < 8 * 60
    assert report["command"] == "OMP_NUM_THREADS=1 python -m bench.faults"
    for outcome in report["faults"].values():
        assert outcome["failures"] == []
        assert outcome["cases"] >= outcome["least"]
    assert report["faults"]["kills"]["counts"]["kills"] >= 50
    assert report["faults"]["defects"]["cases"] == len(DEFECTS)
