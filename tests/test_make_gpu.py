"""make gpu: the benchmarks and the GPU tests in one command, of which none costs the others' results."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.step import GRACE
from tests.conftest import ROOT

STEP, LOSS, TESTS = "bench/step.py", "bench/loss.py", "-m pytest"
PARTS = {STEP: "step.txt", LOSS: "loss.txt", TESTS: "gpu_tests.txt"}
HOLDS_GPU_TESTS = re.compile(r"mark\.gpu|tests\.devices")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def made(tmp_path: Path, script: str, *variables: str) -> tuple[int, list[str], Path]:
    """The exit status of make gpu with a script in Python's place, the script's calls, and the folder of results."""
    python, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    python.write_text(f'#!/bin/sh\necho "$PYTHONPATH $*" >>{calls}\ncase "$*" in {script} esac\necho told "$1"\n')
    python.chmod(0o755)
    command = ["make", "gpu", f"PYTHON={python}", f"OUT={out}", *variables]
    environment = {**os.environ, "PYTHONPATH": "elsewhere", "MAKEFLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, [line for line in calls.read_text().splitlines() if "import xdist" not in line], out


@pytest.mark.parametrize(("broken", "status"), [(TESTS, 2), (STEP, 2), (LOSS, 2), ("nothing", 0)])
def test_all_run_whatever_becomes_of_the_others_and_the_status_tells(broken: str, status: int, tmp_path: Path):
    returned, (step, loss, tests), out = made(tmp_path, f"*'{broken}'*) exit 1;;")
    assert returned == status
    assert re.fullmatch(rf"\.:elsewhere bench/step.py --device=cuda --minutes=[\d.]+ --out_dir={out}", step)
    assert re.fullmatch(rf"\.:elsewhere bench/loss.py --device=cuda --minutes=[\d.]+ --out_dir={out}", loss)
    assert re.match(r"\.:elsewhere -m pytest -m gpu .*--continue-on-collection-errors -n 4 --junitxml=", tests)
    files = tests.split()[-len(gpu_files()) :]
    names = sorted((f"tests/{path.name}" for path in gpu_files()), reverse=True)
    assert files == sorted(names, key=lambda name: "attention" not in name)
    assert "attention" in files[0]
    for part, name in PARTS.items():
        assert (out / name).read_text() == ("" if part == broken else f"told {part.split()[0]}\n")


@pytest.mark.parametrize("hanging", PARTS)
def test_what_hangs_is_stopped_and_the_others_have_their_results(hanging: str, tmp_path: Path):
    begin = time.monotonic()
    limits = [f"{name}_SECONDS=1" for name in ("STEP", "LOSS", "TEST")]
    returned, calls, out = made(tmp_path, f"*'{hanging}'*) exec sleep 60;;", *limits)
    assert time.monotonic() - begin < 30
    assert returned == 2
    assert len(calls) == 3
    for part, name in PARTS.items():
        assert part == hanging or (out / name).read_text().startswith("told")


def test_without_xdist_the_tests_run_in_one_process(tmp_path: Path):
    _, (_, _, tests), _ = made(tmp_path, "*xdist*) exit 1;;")
    assert " -n " not in tests


def test_all_fit_in_eight_minutes_and_the_benchmarks_in_their_limits():
    text = (ROOT / "Makefile").read_text()
    limits = {name: float(value) for name, value in re.findall(r"^(\w+_\w+) \?= ([\d.]+)", text, re.MULTILINE)}
    grace = [int(seconds) for seconds in re.findall(r"timeout .*-k (\d+)", text)]
    assert len(grace) == 3
    assert sum(value for name, value in limits.items() if name.endswith("_SECONDS")) + sum(grace) <= 8 * 60
    assert limits["LOSS_SECONDS"] >= limits["LOSS_MINUTES"] * 60 + 30
    assert limits["STEP_SECONDS"] >= limits["STEP_MINUTES"] * 60 + GRACE + 10


def gpu_files() -> list[Path]:
    return [path for path in (ROOT / "tests").glob("test_*.py") if HOLDS_GPU_TESTS.search(path.read_text())]


COLLECT = """
import sys
import pytest
for name in "datasets datasketch hypothesis jinja2 matplotlib pyarrow selenium transformers trl".split():
    sys.modules[name] = None  # importing it is an ImportError
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_files_with_gpu_tests_import_nothing_that_a_gpu_machine_may_lack():
    command = [sys.executable, "-c", COLLECT, *map(str, gpu_files())]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_masked_cross_entropy.py::" in done.stdout
