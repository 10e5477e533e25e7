"""Once this is imported, Triton interprets the project's kernels, unless the process sees a GPU.

Triton decides when it is first imported, and much else imports it: torch.compile, Transformers. So it may have to be
imported again, and the kernels with it. The environment is left as it was, for what else the process starts.
"""

import importlib
import os
import sys

import pytest
import torch

INTERPRET = "TRITON_INTERPRET"
KERNELS = "sft.kernels.cross_entropy_kernels"


def interpreted(function: object) -> bool:
    return type(function).__name__ == "InterpretedFunction"


def interpret_kernels() -> None:
    before = os.environ.get(INTERPRET)
    os.environ[INTERPRET] = "1"
    try:
        if not interpreted(pytest.importorskip("triton.language").sum):
            for name in list(sys.modules):
                if name.split(".")[0] == "triton" and not name.startswith("triton._C"):
                    del sys.modules[name]
        importlib.import_module("triton.experimental.gluon")  # which a launch would import, too late
        kernels = importlib.import_module(KERNELS)
        if not interpreted(kernels.scale_kernel):
            importlib.reload(kernels)
    finally:
        del os.environ[INTERPRET]
        if before is not None:
            os.environ[INTERPRET] = before


if not torch.cuda.is_available():
    interpret_kernels()
