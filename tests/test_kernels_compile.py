"""Every kernel compiles for Hopper, under two versions of Triton: the interpreter accepts what the compiler rejects."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton")
SHARED_MEMORY = 227 * 1024  # bytes, of a block on Hopper
SOME_SPILL = 256  # bytes, in a configuration that is not the default


def compiled(tmp_path: Path, *arguments: str, triton: Path | None = None) -> tuple[str, dict[str, dict[str, int]]]:
    """Triton's version, and what each kernel takes; compiled anew, in a process that does not interpret."""
    environment: dict[str, Any] = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, filter(None, [triton, ROOT])))}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.compile_kernels", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout)
    return told["triton"], told["kernels"]


def check(kernels: dict[str, dict[str, int]]) -> None:
    for name, used in kernels.items():
        default = not name[0].isdigit() or name.startswith("0 ")
        assert used["spilled_bytes"] <= (0 if default else SOME_SPILL), name
        assert used["shared_bytes"] <= SHARED_MEMORY, name
        assert (used["vector_loads"] > 0) == (not name.endswith(("one column", "one number"))), name


@pytest.mark.slow
def test_the_default_configuration_compiles_without_spills(tmp_path: Path):
    check(compiled(tmp_path)[1])


@pytest.mark.slow
def test_every_configuration_compiles(tmp_path: Path):
    check(compiled(tmp_path, "--all")[1])


@pytest.mark.slow
def test_every_configuration_compiles_under_triton_3_6(tmp_path: Path):
    folder = Path(os.environ.get("SFT_TRITON_36") or ROOT / "out" / "triton-3.6")
    if not (folder / "triton").is_dir():
        pytest.skip(
            f"no Triton 3.6 in {folder}; set SFT_TRITON_36, or: pip install --no-deps --target={folder} triton==3.6.0"
        )
    version, kernels = compiled(tmp_path, "--all", triton=folder)
    assert version.startswith("3.6.")
    check(kernels)
