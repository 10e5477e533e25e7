"""A process that has PyTorch and pytest, but nothing of this project, and forks a pytest for each line that it reads.

python bench/fresh_pytest.py TREE     with PYTHONPATH=TREE

A line is JSON: {"tests": [...], "output": path}. So is each answer: {"status": pytest's exit status, or None where it
took too long, "elsewhere": modules of this project that did not come from TREE}.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

LATE_IMPORTS = ("torch._dynamo", "torch.distributed.fsdp")  # of the optimizer and DistributedDataParallel: seconds
LIMIT_SECONDS = 120.0


def run_tests(tests: list[str], output: str, tree: Path) -> dict[str, Any]:
    """Run pytest on these tests in a forked child, what it prints in a file."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        be_pytest(tests, output, tree, writer)
    os.close(writer)
    ended = select.select([reader], [], [], LIMIT_SECONDS)[0]
    with os.fdopen(reader) as answer:
        if not ended:
            os.kill(child, signal.SIGKILL)
        told = answer.read()
    os.waitpid(child, 0)
    return json.loads(told) if told else {"status": None, "elsewhere": []}


def be_pytest(tests: list[str], output: str, tree: Path, writer: int) -> None:
    import pytest

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.setpgid(0, 0)
    gc.freeze()
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not gpu", *tests])
    ours = {path.stem for path in tree.iterdir() if path.suffix == ".py" or path.is_dir()}
    files = {
        name: Path(file) for name, module in list(sys.modules.items())
        if name.partition(".")[0] in ours and (file := getattr(module, "__file__", None))
    }  # fmt: skip
    elsewhere = sorted(name for name, file in files.items() if not file.is_relative_to(tree))
    sys.stdout.flush()
    os.write(writer, json.dumps({"status": int(status), "elsewhere": elsewhere}).encode())
    os._exit(0)


def main(argv: list[str]) -> None:
    tree = Path(argv[0]).resolve()
    os.chdir(tree)
    sys.path[0] = str(tree)
    sys.dont_write_bytecode = True  # a file that is changed twice in a second has a new content, not a new time
    for name in ("torch", "pytest", *LATE_IMPORTS):
        importlib.import_module(name)
    for line in sys.stdin:
        answer = run_tests(**json.loads(line), tree=tree)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
