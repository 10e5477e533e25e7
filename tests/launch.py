"""Start a program on several processes, as a user would."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def torchrun(processes: int, *arguments: object, check: bool = True, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *map(str, arguments)], check=False, capture_output=True, text=True, env=environment, cwd=cwd
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
