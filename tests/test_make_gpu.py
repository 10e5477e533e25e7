"""make gpu: the benchmark and the GPU tests in one command, of which neither costs the other's result."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.loss import LossBenchmark
from tests.conftest import ROOT

BENCHMARK, TESTS = "bench/loss.py", "-m pytest"
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


@pytest.mark.parametrize(("broken", "status"), [(TESTS, 2), (BENCHMARK, 2), ("nothing", 0)])
def test_both_run_whatever_becomes_of_the_other_and_the_status_tells(broken: str, status: int, tmp_path: Path):
    returned, (benchmark, tests), out = made(tmp_path, f"*'{broken}'*) exit 1;;")
    assert returned == status
    assert benchmark == f".:elsewhere bench/loss.py --device=cuda --out_dir={out}"
    assert re.match(r"\.:elsewhere -m pytest -m gpu .*--continue-on-collection-errors -n 4 --junitxml=", tests)
    files = tests.split()[-len(gpu_files()) :]
    assert files == sorted((f"tests/{path.name}" for path in gpu_files()), reverse=True)
    assert files[0].startswith("tests/test_masked_cross_entropy")
    assert (out / "loss.txt").read_text() == ("" if broken == BENCHMARK else "told bench/loss.py\n")
    assert (out / "gpu_tests.txt").read_text() == ("" if broken == TESTS else "told -m\n")


@pytest.mark.parametrize("hanging", [TESTS, BENCHMARK])
def test_what_hangs_is_stopped_and_the_other_has_its_result(hanging: str, tmp_path: Path):
    begin = time.monotonic()
    returned, calls, out = made(tmp_path, f"*'{hanging}'*) exec sleep 60;;", "BENCH_SECONDS=1", "TEST_SECONDS=1")
    assert time.monotonic() - begin < 30
    assert returned == 2
    assert len(calls) == 2
    assert (out / ("loss.txt" if hanging == TESTS else "gpu_tests.txt")).read_text().startswith("told")


def test_without_xdist_the_tests_run_in_one_process(tmp_path: Path):
    _, (_, tests), _ = made(tmp_path, "*xdist*) exit 1;;")
    assert " -n " not in tests


def test_both_fit_in_eight_minutes_and_the_benchmark_in_its_limit():
    text = (ROOT / "Makefile").read_text()
    limits = {name: int(value) for name, value in re.findall(r"^(\w+_SECONDS) \?= (\d+)", text, re.MULTILINE)}
    grace = [int(seconds) for seconds in re.findall(r"timeout .*-k (\d+)", text)]
    assert len(limits) == len(grace) == 2
    assert sum(limits.values()) + sum(grace) <= 8 * 60
    assert limits["BENCH_SECONDS"] >= LossBenchmark().minutes * 60 + 30


def gpu_files() -> list[Path]:
    return [path for path in (ROOT / "tests").glob("test_*.py") if HOLDS_GPU_TESTS.search(path.read_text())]


COLLECT = """
import sys
import pytest
for name in "datasets datasketch hypothesis jinja2 matplotlib pyarrow selenium transformers trl".split():
    sys.modules[name] = None  # importing it is an ImportError
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", *sys.argv[1:]]))
"""


def test_files_with_gpu_tests_import_nothing_that_a_gpu_machine_may_lack():
    command = [sys.executable, "-c", COLLECT, *map(str, gpu_files())]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_masked_cross_entropy.py::" in done.stdout
