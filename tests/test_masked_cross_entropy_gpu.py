"""The compiled cross-entropy at full size on a GPU: all configurations, equal bits, memory, waiting, accesses."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import tests.interpreted  # noqa: F401  # before the kernels
from sft.kernels.masked_cross_entropy import CONFIGURATIONS, cross_entropy_, masked_cross_entropy, scale_
from tests.conftest import ROOT
from tests.devices import GPU_MARKS
from tests.kernel_problems import compare, problem

pytestmark = list(GPU_MARKS)

TRAINED_WITH = torch.bfloat16
DIFFERENT = (0, 8, 9)  # configurations that stand for the others in what is not trained with: each compilation costs
GRID = [(TRAINED_WITH, each) for each in range(len(CONFIGURATIONS))]
GRID += [(dtype, each) for dtype in (torch.float16, torch.float32) for each in DIFFERENT]


@pytest.mark.parametrize(("dtype", "configuration"), GRID)
@pytest.mark.parametrize("columns", [257, 151_643, 151_669, 151_936])
def test_every_configuration_equals_the_definition(configuration: int, columns: int, dtype: torch.dtype):
    logits, labels = problem(50, columns, dtype=dtype, device="cuda")
    weights = torch.rand(50, device="cuda")
    for overwrite, grad_scale in ((False, 1.0), (True, 0.5)):
        options = {"overwrite": overwrite, "grad_scale": grad_scale, "configuration": configuration}
        compare(logits, labels, weights, upstream=0.5, **options)


@pytest.mark.parametrize("columns", [151_669, 151_936])
def test_two_runs_give_the_same_bits(columns: int):
    logits, labels = problem(2000, columns, dtype=torch.bfloat16, device="cuda")
    runs = []
    for _ in range(2):
        gradient = logits.clone()
        runs.append([*cross_entropy_(gradient, labels, None, 1.0, gradient=True, details=True), gradient])
        runs[-1].append(masked_cross_entropy(logits, labels).loss_sum)
    assert all(one.equal(two) for one, two in zip(*runs, strict=True))


def test_more_than_two_billion_logits_are_all_reached():
    logits = torch.randn(15_000, 151_936, dtype=torch.bfloat16, device="cuda")
    assert logits.numel() > 2**31
    labels = torch.randint(151_936, (15_000,), device="cuda")
    labels[100:-100:2] = -100
    kept = torch.cat([torch.arange(50), torch.arange(14_950, 15_000)]).cuda()
    expected = logits[kept]
    losses, *_ = cross_entropy_(logits, labels, None, 1.0, gradient=True, details=False)
    known, *_ = cross_entropy_(expected, labels[kept], None, 1.0, gradient=True, details=False)
    assert losses[kept].equal(known)
    assert logits[kept].equal(expected)
    assert (logits[labels == -100][::100] == 0).all()
    assert logits.isfinite().all()
    scale_(logits, torch.tensor(2.0, device="cuda"))
    assert logits[kept].equal(expected * 2)


def test_overwritten_logits_need_no_memory_but_for_the_losses():
    logits, labels = problem(2000, 151_936, dtype=torch.bfloat16, device="cuda")
    logits.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = masked_cross_entropy(logits, labels, overwrite=True, grad_scale=0.5).loss_sum
    (gradient,) = torch.autograd.grad(loss * 0.25, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.cuda.max_memory_allocated() - before < 2**20


def test_the_host_never_waits_for_the_gpu():
    logits, labels = problem(100, 1000, dtype=torch.bfloat16, device="cuda")
    weights = torch.rand(100, device="cuda")
    for mode in ("default", "error"):  # the first time, kernels are compiled and loaded
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for overwrite in (True, False):
                leaf = logits.clone().requires_grad_()
                found = masked_cross_entropy(leaf, labels, weights, details=True, overwrite=overwrite, grad_scale=0.3)
                torch.autograd.grad(found.loss_sum * 0.5, leaf)
        finally:
            torch.cuda.set_sync_debug_mode("default")


SANITIZED = """
import torch
from sft.kernels.linear_cross_entropy import masked_linear_cross_entropy
from sft.kernels.masked_cross_entropy import masked_cross_entropy, scale_
from tests.kernel_problems import problem
from tests import head_problems as head

for columns in (1, 257, 4099):
    wide, labels = problem(5, columns + 3, dtype=torch.bfloat16, device="cuda")
    labels %= columns
    labels[1] = -100
    for start in (0, 3):
        rows = wide[:, start : start + columns]
        for overwrite in (False, True):
            leaf = rows.clone() if overwrite else rows.detach()
            leaf.requires_grad_()
            found = masked_cross_entropy(leaf, labels, details=True, overwrite=overwrite, grad_scale=0.25)
            torch.autograd.grad(found.loss_sum * 0.5, leaf)
        scale_(rows, torch.tensor(3.0, device="cuda"))
    given = head.problem(V=columns, dtype=torch.bfloat16, device="cuda")
    head.results(masked_linear_cross_entropy, *given, upstream=0.5, grad_scale=0.25, triton=True)
torch.cuda.synchronize()
print("all have run")
"""
REFUSED = (  # by a tool that does not know the device, the driver or the sandbox
    "Device not supported",
    "is not supported on this",
    "No attachable process",
    "Target application terminated before first instrumented API call",
    "Unable to",
    "Failed to initialize",
)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_compute_sanitizer_finds_nothing():
    """Gradients of their own and in place, rescaled, in rows that start anywhere; and those of the fused head."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = {"capture_output": True, "text": True, "env": environment, "cwd": ROOT}
    program = [sys.executable, "-c", SANITIZED]
    alone = subprocess.run(program, check=False, **options)
    assert alone.returncode == 0, alone.stderr[-2000:]
    sanitizer = ["compute-sanitizer", "--report-api-errors=no", "--error-exitcode=9"]  # libraries probe and are refused
    done = subprocess.run([*sanitizer, *program], check=False, **options)
    told = done.stdout + done.stderr
    refusals = [line.strip("= ") for line in told.splitlines() if any(words in line for words in REFUSED)]
    if refusals and "Invalid __" not in told:
        pytest.skip(f"compute-sanitizer does not work here: {refusals[0]}")
    assert done.returncode == 0, told[-4000:]
    assert "all have run" in done.stdout
    assert "ERROR SUMMARY: 0 errors" in told
