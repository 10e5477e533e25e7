"""The fused head among autograd, autocast, checkpointing, torch.compile and DDP; its memory; under the interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sft.kernels import reference
from sft.kernels.linear_cross_entropy import masked_linear_cross_entropy
from tests.conftest import ROOT
from tests.devices import on_gpu
from tests.head_problems import Head, problem, results, small_chunks_of
from tests.launch import torchrun

each_device = pytest.mark.parametrize("device", ["cpu", on_gpu("cuda")])


@pytest.fixture
def small_chunks(monkeypatch):
    small_chunks_of(monkeypatch)


@pytest.mark.parametrize(
    ("device", "dtype", "bound"), [("cpu", torch.float64, 1e-7), on_gpu("cuda", torch.bfloat16, 0.02)]
)
@pytest.mark.usefixtures("small_chunks")
def test_activation_checkpointing_and_a_tied_head_keep_the_gradients(device, dtype, bound):
    hidden, head, labels, weights, rows = problem(n=150, device=device, dtype=dtype)
    hidden, head = hidden / 4, head / 4

    def gradient(function, through):
        table = head.detach().requires_grad_()
        loss = through(lambda t: function(hidden * t[3], t, labels, weights, rows=rows).loss_sum, table)
        (2 * loss).backward()
        return table.grad

    expected = gradient(reference.masked_linear_cross_entropy, lambda f, x: f(x))
    for through in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        found = gradient(masked_linear_cross_entropy, through)
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound * expected.abs().max().item())


@each_device
@pytest.mark.usefixtures("small_chunks")  # the product of one chunk is bf16 on a CPU
def test_under_autocast_an_fp32_head_keeps_an_fp32_gradient(device):
    hidden, head, labels, weights, rows = problem(dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = results(masked_linear_cross_entropy, hidden, head, labels, weights, rows)
        expected = results(reference.masked_linear_cross_entropy, hidden, head, labels, weights, rows)
    assert got[-1].dtype == got[-2].dtype == torch.float32
    assert not torch.equal(got[-1], got[-1].bfloat16().float())
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=0)
    for mine, theirs in zip(got[-2:], expected[-2:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


@pytest.mark.parametrize(
    ("device", "dtype", "backend"),
    [
        ("cpu", torch.float64, "aot_eager"),
        pytest.param("cpu", torch.float64, "inductor", marks=pytest.mark.slow),
        on_gpu("cuda", torch.bfloat16, "inductor"),
    ],
)
def test_compiled_whole_it_is_the_same_and_neither_a_bucket_nor_a_grad_scale_compiles_it_anew(device, dtype, backend):
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    module = Head(problem(device=device, dtype=dtype)[1])
    compiled = torch.compile(module, fullgraph=True, backend=counting)
    for step, n in enumerate((128, 256, 128, 384) * 3):
        scale = 1 / (1000 + 7 * step)  # one over the trained tokens of a step: another each time
        hidden, _, labels, weights, rows = problem(n=n, seed=n, device=device, dtype=dtype)
        hidden.requires_grad_()
        gradients = []
        for call in (module, compiled):
            loss = scale * call(hidden, labels, weights, rows, scale)
            gradients.append((loss, *torch.autograd.grad(loss, (hidden, module.weight))))
        torch.testing.assert_close(*gradients)
        if step == 1:
            before = len(compilations)
    assert len(compilations) == before
    torch._dynamo.reset()


WORKER = """
import torch
from torch.nn.parallel import DistributedDataParallel
from sft.errors import run_program
from sft.world import join_world
from tests.head_problems import Head, problem

def main(argv):
    hidden, head, labels, weights, rows = problem()
    with join_world("cpu") as world:
        module = DistributedDataParallel(Head(head))
        mine = slice(0, 5) if world.rank == 0 else slice(5, None)
        (module(hidden, labels[mine], weights[mine], rows[mine], 2.0) * world.size).backward()
        if world.is_main:
            torch.save(module.module.weight.grad, argv[0])

run_program(main)
"""


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(2, tmp_path / "worker.py", tmp_path / "gradient.pt")
    hidden, head, labels, weights, rows = problem()
    expected = results(reference.masked_linear_cross_entropy, hidden, head, labels, weights, rows)[-1]
    torch.testing.assert_close(torch.load(tmp_path / "gradient.pt", weights_only=True), expected)


PEAK = """
import resource, sys, torch
from sft.kernels import linear_cross_entropy
linear_cross_entropy.CPU_CHUNK = 2**21
n, V, D = int(sys.argv[1]), 16384, 8
hidden, head = torch.randn(n, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
labels = torch.randint(0, V, (n,))
def loss(n):
    return linear_cross_entropy.masked_linear_cross_entropy(hidden[:n], head, labels[:n]).loss_sum
loss(8).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss(n).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_peak_memory_is_that_of_a_chunk_whatever_the_number_of_rows():
    def peak_mib(rows):
        command = [sys.executable, "-c", PEAK, str(rows)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
        return int(done.stdout) / 1024

    assert peak_mib(4096) < 8 + 3 * 2 + 8  # a chunk, its blocks, and what moves; all logits are 256 MiB


INTERPRETED = """
import torch
from tests.head_problems import assert_equals_the_definition, problem
from sft.kernels import linear_cross_entropy
linear_cross_entropy.CPU_CHUNK = 7 * 257
for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 0.02)):
    for n in (0, 1, 7, 8):
        hidden, head, *others = problem(n=n, dtype=dtype)
        assert_equals_the_definition(
            (hidden / 4, head / 4, *others), rtol=bound, atol=bound, upstream=0.5, grad_scale=0.25, triton=True
        )
"""


def test_the_triton_path_equals_the_definition_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
