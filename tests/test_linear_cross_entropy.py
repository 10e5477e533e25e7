"""The fused head against the definition: values, gradients, cost, and the company that it keeps."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sft.kernels import linear_cross_entropy, products, reference
from sft.kernels.linear_cross_entropy import Job, chunk_rows, compute, masked_linear_cross_entropy
from tests.conftest import ROOT
from tests.launch import torchrun

CHUNK = 7  # rows, in tests that need several chunks


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 7 rows of 257 logits, in blocks of 3."""
    monkeypatch.setattr(linear_cross_entropy, "CPU_CHUNK", CHUNK * 257)
    monkeypatch.setattr(linear_cross_entropy, "CPU_BLOCK", 3 * 257)


def problem(*, M=50, n=20, D=16, V=257, dtype=torch.float64, masked=0.3, device="cpu", seed=0):
    """hidden, head, labels, weights, rows; some labels masked, some rows named twice."""
    draw = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(M, D, generator=draw), torch.randn(V, D, generator=draw)
    labels = torch.randint(0, V, (n,), generator=draw)
    labels[torch.rand(n, generator=draw) < masked] = -100
    rows, weights = torch.randint(0, max(M, 1), (n,), generator=draw), 3 * torch.rand(n, generator=draw)
    return hidden.to(device, dtype), head.to(device, dtype), *(x.to(device) for x in (labels, weights, rows))


def results(function, hidden, head, labels, weights=None, rows=None, *, upstream=1.0, **options):
    """Everything that comes out, and both gradients."""
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    got = function(hidden, head, labels, weights, rows=rows, details=True, **options)
    (got.loss_sum * upstream).backward()
    return [*got, hidden.grad, head.grad]


def assert_equals_the_definition(arguments, *, rtol, atol, exact=torch.float64, **options):
    """Both in the same dtype, the definition in `exact`."""
    hidden, head, *others = arguments
    upstream = options.pop("upstream", 1.0)
    expected = results(
        reference.masked_linear_cross_entropy, hidden.to(exact), head.to(exact), *others, upstream=upstream
    )
    got = results(masked_linear_cross_entropy, hidden, head, *others, upstream=upstream, **options)
    for mine, right in zip(got, expected, strict=True):
        scale = max(1.0, right.abs().max().item()) if right.numel() else 1.0
        torch.testing.assert_close(mine.to(right.dtype), right, rtol=rtol, atol=atol * scale)


@pytest.mark.parametrize("n", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 40])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
@pytest.mark.usefixtures("small_chunks")
def test_values_and_gradients_equal_the_definitions(n, dtype, bound):
    assert_equals_the_definition(
        problem(n=n, dtype=dtype, masked=0.0), rtol=bound, atol=bound, upstream=3.0, grad_scale=0.25
    )
    assert_equals_the_definition(problem(n=n, dtype=dtype), rtol=bound, atol=bound, upstream=0.3, grad_scale=0.3)
    hidden, head, labels, _, _ = problem(M=n, n=n, dtype=dtype)
    assert_equals_the_definition((hidden, head, labels), rtol=bound, atol=bound)


@pytest.mark.parametrize("V", [1, 2, 63, 151_669, 151_936])
def test_a_vocabulary_may_have_any_size(V, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CPU_CHUNK", 4 * V)
    assert_equals_the_definition(problem(V=V, D=8, n=11, dtype=torch.float32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small_chunks")
def test_half_precision_differs_by_its_rounding_only(dtype):
    hidden, head, *others = problem(dtype=dtype, n=40)
    arguments = hidden / 4, head / 4, *others
    got = results(masked_linear_cross_entropy, *arguments)
    assert [each.dtype for each in got] == [
        torch.float32,
        torch.int64,
        torch.float32,
        torch.float32,
        torch.int64,
        dtype,
        dtype,
    ]
    assert_equals_the_definition(arguments, rtol=0.02, atol=0.02, exact=torch.float32)


@pytest.mark.usefixtures("small_chunks")
def test_the_weight_gradient_of_half_precision_is_summed_in_fp32():
    hidden, head = torch.full((4097, 1), 1.0, dtype=torch.bfloat16), torch.zeros(257, 1, dtype=torch.bfloat16)
    head.requires_grad_()
    masked_linear_cross_entropy(hidden, head, torch.zeros(4097, dtype=torch.int64)).loss_sum.backward()
    assert head.grad[0].item() == pytest.approx(-4097 * 256 / 257, rel=0.004)  # 256 would be bf16's last whole number


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("n", [0, 9])
def test_all_masked_gives_zero_and_zero_gradients(n, details):
    hidden, head, labels, weights, rows = problem(n=n)
    hidden.requires_grad_()
    head.requires_grad_()
    labels = labels.fill_(-100)
    got = masked_linear_cross_entropy(hidden, head, labels, weights, rows=rows, details=details)
    got.loss_sum.backward()
    assert got.loss_sum.item() == got.count.item() == 0
    assert not hidden.grad.any()
    assert not head.grad.any()
    assert not details or (not got.token_losses.any() and not got.entropy.any() and got.correct.item() == 0)


@pytest.mark.usefixtures("small_chunks")
def test_filled_up_rows_change_no_bit():
    hidden, head, labels, weights, rows = problem(masked=0.0)
    plain = results(masked_linear_cross_entropy, hidden, head, labels, weights, rows)
    labels, weights, rows = (
        torch.cat([each, torch.full((12,), fill, dtype=each.dtype)])
        for each, fill in ((labels, -100), (weights, 0), (rows, 0))
    )
    filled = results(masked_linear_cross_entropy, hidden, head, labels, weights, rows)
    for place, (one, two) in enumerate(zip(plain, filled, strict=True)):
        assert torch.equal(one, two[: len(one)] if place in (2, 3) else two)


def test_hidden_states_and_head_may_be_strided():
    hidden, head, *others = problem()
    strided = hidden.t().contiguous().t(), torch.stack([head, head], dim=1)[:, 0]
    assert not strided[0].is_contiguous()
    assert not strided[1].is_contiguous()
    assert_equals_the_definition((*strided, *others), rtol=1e-13, atol=1e-13)


def test_any_upstream_gradient_gives_the_same_whatever_was_foretold():
    hidden, head, labels, weights, rows = problem(dtype=torch.float32)
    expected = results(masked_linear_cross_entropy, hidden, head, labels, weights, rows, upstream=0.7)
    third = 1 / 3 + 1e-9  # not a float32
    for told, upstream in ((third, third), (1.0, 0.7), (2.0, 0.0)):
        got = results(
            masked_linear_cross_entropy, hidden, head, labels, weights, rows, upstream=upstream, grad_scale=told
        )
        for mine, right in zip(got[-2:], expected[-2:], strict=True):
            torch.testing.assert_close(mine, right * (upstream / 0.7))


def test_a_gradient_that_was_foretold_is_not_touched_again():
    gradient = torch.ones(3)
    version = gradient._version
    linear_cross_entropy.scale_gradient_._init_fn(gradient, torch.tensor(1.0) * (1 / 3), 1 / 3, False)
    assert gradient._version == version
    linear_cross_entropy.scale_gradient_(gradient, torch.tensor(1.0), 0.5, False)
    assert torch.equal(gradient, torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("needs", "count"), [((True, True), 6), ((True, False), 4), ((False, True), 4), ((False, False), 2)]
)
@pytest.mark.usefixtures("small_chunks")
def test_only_the_gradients_that_are_needed_cost_anything(needs, count, monkeypatch):
    hidden, head, labels, weights, rows = problem(masked=0.0)
    job = Job(1.0, *needs, False, hidden.dtype, False)
    with FlopCounterMode(display=False) as counter:
        compute(job, hidden, head, labels=labels, weights=weights, rows=rows)
    assert counter.get_total_flops() == count * 20 * 16 * 257
    hidden.requires_grad_(needs[0])
    head.requires_grad_(needs[1])
    seen = []
    monkeypatch.setattr(linear_cross_entropy, "compute", lambda job, *a, **k: seen.append(job) or compute(job, *a, **k))
    loss = masked_linear_cross_entropy(hidden, head, labels, weights, rows=rows).loss_sum
    with torch.no_grad():
        masked_linear_cross_entropy(hidden, head, labels, weights, rows=rows)
    assert [job[1:3] for job in seen] == [needs, (False, False)]
    assert loss.requires_grad == any(needs)


def test_masked_rows_cost_nothing_on_the_cpu():
    hidden, head, labels, _, _ = problem(M=20, masked=0.5)
    with FlopCounterMode(display=False) as counter:
        compute(Job(1.0, True, True, False, hidden.dtype, False), hidden, head, labels=labels, weights=None, rows=None)
    assert counter.get_total_flops() == 6 * (labels != -100).sum() * 16 * 257


def test_a_second_backward_and_a_second_derivative_are_refused():
    hidden, head, labels, _, _ = problem(M=20)
    hidden.requires_grad_()
    loss = masked_linear_cross_entropy(hidden, head, labels).loss_sum
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="in the first backward pass"):
        loss.backward()


@pytest.mark.usefixtures("small_chunks")
def test_activation_checkpointing_and_a_tied_head_keep_the_gradients():
    hidden, head, labels, weights, rows = problem(V=257)

    def gradient(function, through):
        table = head.detach().requires_grad_()
        loss = through(lambda t: function(hidden * t[3], t, labels, weights, rows=rows).loss_sum, table)
        (2 * loss).backward()
        return table.grad

    expected = gradient(reference.masked_linear_cross_entropy, lambda f, x: f(x))
    for through in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        torch.testing.assert_close(gradient(masked_linear_cross_entropy, through), expected)


def test_under_autocast_an_fp32_head_keeps_an_fp32_gradient():
    hidden, head, labels, weights, rows = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(masked_linear_cross_entropy, hidden, head, labels, weights, rows)
        expected = results(reference.masked_linear_cross_entropy, hidden, head, labels, weights, rows)
    assert got[-1].dtype == got[-2].dtype == torch.float32
    assert not torch.equal(got[-1], got[-1].bfloat16().float())
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=0)
    for mine, theirs in zip(got[-2:], expected[-2:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


class Head(nn.Module):
    """A head that is trained through the fused loss."""

    def __init__(self, head):
        super().__init__()
        self.weight = nn.Parameter(head)

    def forward(self, hidden, labels, weights, rows, grad_scale):
        return masked_linear_cross_entropy(
            hidden, self.weight, labels, weights, rows=rows, grad_scale=grad_scale
        ).loss_sum


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whole_it_gives_the_same_and_repeated_buckets_compile_nothing(backend):
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    module = Head(problem()[1])
    compiled = torch.compile(module, fullgraph=True, backend=counting)
    for round_ in range(3):
        before = len(compilations)
        for n, scale in ((128, 0.5), (256, 0.25), (128, 0.125), (384, 1.0)):
            hidden, _, labels, weights, rows = problem(n=n, seed=n)
            hidden.requires_grad_()
            gradients = []
            for call in (module, compiled):
                loss = 3 * call(hidden, labels, weights, rows, scale)
                gradients.append((loss, *torch.autograd.grad(loss, (hidden, module.weight))))
            for one, two in zip(*gradients, strict=True):
                torch.testing.assert_close(one, two)
        assert round_ == 0 or len(compilations) == before
    torch._dynamo.reset()


WORKER = """
import torch
from torch.nn.parallel import DistributedDataParallel
from sft.errors import run_program
from sft.world import join_world
from tests.test_linear_cross_entropy import Head, problem

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


def test_two_processes_give_the_gradient_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(2, tmp_path / "worker.py", tmp_path / "gradient.pt")
    hidden, head, labels, weights, rows = problem()
    expected = results(reference.masked_linear_cross_entropy, hidden, head, labels, weights, rows)[-1]
    torch.testing.assert_close(torch.load(tmp_path / "gradient.pt"), expected)


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
from tests.test_linear_cross_entropy import assert_equals_the_definition, problem
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


def test_chunks_are_equal_and_keep_within_the_memory_allowed():
    class OnGpu:
        is_cuda, itemsize = True, 2

        def __init__(self, rows):
            self.shape = (rows, 2048)

    for count in (1, 128, 3328, 4992, 8192, 16384, 32768):
        size = chunk_rows(count, OnGpu(32768), vocabulary=151_936, dtype=torch.bfloat16, hidden_gradient=True)
        chunks = -(-count // size)
        extra = 32768 * 2048 * 2 + size * (152_000 * 2 + 2048 * 8) + 2**26
        assert extra <= 1.3e9
        assert chunks == 1 or size % 128 == 0
        assert chunks * size - count < 128 * chunks
    assert chunk_rows(0, torch.empty(0, 8), vocabulary=151_936, dtype=torch.float32, hidden_gradient=True) == 1


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")(test))


def real_size(n, *, V=151_936, M=None, dtype=torch.bfloat16):
    """hidden and head as leaves, labels and rows; D 2048, logits with a spread of about 2."""
    torch.manual_seed(n)
    M = M or n
    hidden = torch.randn(M, 2048, device="cuda").to(dtype).requires_grad_()
    head = torch.randn(V, 2048, device="cuda").mul_(0.05).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, V, (n,), device="cuda"), torch.randperm(M, device="cuda")[:n]


@on_gpu
@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 300])
def test_small_sizes_equal_the_definition_on_a_gpu(n, triton, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CUDA_BYTES", linear_cross_entropy.CUDA_WORKSPACE + 2**18)
    torch.backends.cuda.matmul.allow_tf32 = False
    arguments = problem(n=n, dtype=torch.float32, device="cuda")
    assert_equals_the_definition(arguments, rtol=1e-5, atol=1e-5, upstream=0.3, grad_scale=0.1, triton=triton)
    hidden, head, labels, weights, _ = problem(M=n, n=n, dtype=torch.float32, device="cuda")
    assert_equals_the_definition((hidden, head, labels, weights), rtol=1e-5, atol=1e-5, triton=triton)


@on_gpu
@pytest.mark.parametrize(("n", "V"), [(4992, 151_936), (1100, 151_669)])
def test_bf16_at_full_size_equals_float64_to_its_rounding(n, V):
    hidden, head, labels, rows = real_size(n, V=V, M=2 * n)
    labels[::7] = -100
    got = masked_linear_cross_entropy(hidden, head, labels, rows=rows, details=True, grad_scale=0.5)
    (0.5 * got.loss_sum).backward()
    exact = [each.detach().double().requires_grad_() for each in (hidden, head)]
    loss_sum = 0.0
    for part in range(0, n, 1024):
        chosen = slice(part, part + 1024)
        loss = reference.masked_linear_cross_entropy(*exact, labels[chosen], rows=rows[chosen]).loss_sum
        (0.5 * loss).backward()
        loss_sum += loss.item()
    assert got.loss_sum.item() == pytest.approx(loss_sum, rel=1e-4)
    assert got.count.item() == (labels != -100).sum().item()
    for mine, right in zip((hidden.grad, head.grad), (exact[0].grad, exact[1].grad), strict=True):
        assert (mine.double() - right).norm() <= 5e-3 * right.norm()


@on_gpu
def test_half_precision_is_added_in_the_products_epilogue():
    assert products.half_precision_adds(torch.device("cuda", 0), torch.bfloat16) is products.add_in_epilogue
    assert products.half_precision_adds(torch.device("cuda", 0), torch.float16) is products.add_in_epilogue


@on_gpu
def test_the_same_input_gives_the_same_bits_on_a_gpu():
    hidden, head, labels, rows = real_size(8192, M=16384)
    runs = []
    for _ in range(2):
        loss = masked_linear_cross_entropy(hidden, head, labels, rows=rows).loss_sum
        runs.append((loss, *torch.autograd.grad(loss, (hidden, head))))
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


@on_gpu
@pytest.mark.parametrize("n", [8192, 32768])
def test_peak_memory_on_a_gpu_is_the_weight_gradient_and_little_more(n):
    hidden, head, labels, rows = real_size(n)
    masked_linear_cross_entropy(hidden[:128], head, labels[:128]).loss_sum.backward()
    hidden.grad = head.grad = None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    masked_linear_cross_entropy(hidden, head, labels, rows=rows).loss_sum.backward()
    in_fp32 = 4 * head.numel()  # as it is accumulated
    assert torch.cuda.max_memory_allocated() - before <= 1.3e9 + in_fp32


@on_gpu
def test_the_host_never_waits_for_the_gpu():
    hidden, head, labels, rows = real_size(1024)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for needs_details in (False, True):
                got = masked_linear_cross_entropy(
                    hidden, head, labels, rows=rows, grad_scale=0.5, details=needs_details
                )
                (0.5 * got.loss_sum).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


SANITIZED = """
import torch
from tests.test_linear_cross_entropy import problem, results
from sft.kernels.linear_cross_entropy import masked_linear_cross_entropy
for V in (1, 257, 4099):
    results(masked_linear_cross_entropy, *problem(V=V, dtype=torch.bfloat16, device="cuda"), triton=True)
torch.cuda.synchronize()
"""


@on_gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_compute_sanitizer_finds_nothing():
    command = ["compute-sanitizer", "--error-exitcode=9", sys.executable, "-c", SANITIZED]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
