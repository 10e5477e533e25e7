"""Once this is imported, Triton interprets the kernels that are imported later in a process that sees no GPU.

Triton decides that when it is first imported, and others import it, too: torch.compile and Transformers do.
"""

import importlib
import os
import sys

import pytest
import torch

INTERPRET = "TRITON_INTERPRET"


def interpret_triton() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available() or sys.modules["triton"].knobs.runtime.interpret:
        return
    for name in list(sys.modules):
        if name.split(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]
    before = os.environ.get(INTERPRET)
    os.environ[INTERPRET] = "1"
    importlib.import_module("triton.language")
    importlib.import_module("sft.kernels.cross_entropy_kernels")
    if before is None:
        del os.environ[INTERPRET]
