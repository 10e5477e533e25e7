"""Where a test of the loss runs: by default on the CPU, and once more, marked gpu, on a GPU.

What needs Triton is interpreted on the CPU, save in a process that sees a GPU: there the kernels are compiled for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
GPU_MARKS = (pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU"))
NOT_COMPILED = pytest.mark.skipif(HAS_GPU, reason="where there is a GPU the kernels are compiled, not interpreted")
EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # rounding: at most half of it


def gpu_test(test: Callable[..., Any]) -> Callable[..., Any]:
    for mark in GPU_MARKS:
        test = mark(test)
    return test


def on_gpu(*values: Any) -> Any:
    return pytest.param(*values, marks=GPU_MARKS)


def interpreted(*values: Any, slow: bool = False) -> Any:
    return pytest.param(*values, marks=(NOT_COMPILED, pytest.mark.slow) if slow else NOT_COMPILED)


each_device = pytest.mark.parametrize("device", [interpreted("cpu"), on_gpu("cuda")])
each_dtype = pytest.mark.parametrize(
    ("device", "dtype"),
    [interpreted("cpu", dtype) for dtype in (torch.float32, torch.float16)]
    + [on_gpu("cuda", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)],
)
fp32_and_bf16 = pytest.mark.parametrize(  # the interpreter truncates bf16 instead of rounding
    ("device", "dtype"), [interpreted("cpu", torch.float32), on_gpu("cuda", torch.bfloat16)]
)
