"""The fused head against the definition: values, gradients, and what they cost."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sft import linear
from sft.kernels import linear_cross_entropy, reference
from sft.kernels.linear_cross_entropy import Job, chunk_rows, compute, masked_linear_cross_entropy
from tests.devices import on_gpu
from tests.head_problems import CPU_CHUNK, CUDA_CHUNK, assert_equals_the_definition, problem, results, small_chunks_of

each_device = pytest.mark.parametrize("device", ["cpu", on_gpu("cuda")])
HALF = [("cpu", torch.bfloat16, False), ("cpu", torch.float16, False)]
HALF += [on_gpu("cuda", dtype, triton) for dtype in (torch.bfloat16, torch.float16) for triton in (True, False)]
# bf16 rounds logits, their gradient, and the gradients of both operands: each by half of 2**-7, some of them twice
HALF_BOUND = 0.02


class Operations(TorchDispatchMode):
    """The names of those that run inside, each with the size of its first argument."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.append((str(operation), args[0].numel() if args and isinstance(args[0], torch.Tensor) else 0))
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def small_chunks(monkeypatch):
    small_chunks_of(monkeypatch)


@pytest.mark.parametrize("n", [0, 1, CPU_CHUNK - 1, CPU_CHUNK, CPU_CHUNK + 1, 40])
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


@pytest.mark.skipif(not linear.has_onednn(), reason="this build of PyTorch has no oneDNN")
@pytest.mark.parametrize("V", [257, 151_936])
def test_so_they_do_where_the_products_go_to_onednn(V, monkeypatch):
    monkeypatch.setattr(linear, "LEAST_WORK", 1)
    monkeypatch.setattr(linear_cross_entropy, "CPU_CHUNK", 4 * V)
    assert_equals_the_definition(problem(V=V, D=8, n=11, dtype=torch.float32), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("n", [0, 1, CUDA_CHUNK - 1, CUDA_CHUNK, CUDA_CHUNK + 1, 300])
@pytest.mark.parametrize(("device", "triton"), [on_gpu("cuda", True), on_gpu("cuda", False)])
@pytest.mark.usefixtures("small_chunks")
def test_so_they_do_in_fp32_on_a_gpu(n, device, triton):
    torch.backends.cuda.matmul.allow_tf32 = False
    arguments = problem(n=n, dtype=torch.float32, device=device)
    assert_equals_the_definition(arguments, rtol=1e-5, atol=1e-5, upstream=0.3, grad_scale=0.1, triton=triton)
    hidden, head, labels, weights, _ = problem(M=n, n=n, dtype=torch.float32, device=device)
    assert_equals_the_definition((hidden, head, labels, weights), rtol=1e-5, atol=1e-5, triton=triton)


ENTRIES = [{"n": 0}, {"n": 1}, {"n": 40}, {"n": 300}, {"n": 40, "masked": 1}]
ENTRIES += [{"n": 40, "filled": 24}, {"n": 150, "filled": 9}]


@pytest.mark.parametrize("V", [1, 257])
@pytest.mark.parametrize("entries", ENTRIES, ids=str)
@pytest.mark.parametrize(("device", "dtype", "triton"), HALF)
@pytest.mark.usefixtures("small_chunks")
def test_half_precision_differs_by_its_rounding_only(device, dtype, triton, entries, V):
    hidden, head, *others = problem(dtype=dtype, V=V, device=device, **entries)
    arguments = hidden / 4, head / 4, *others
    got = results(masked_linear_cross_entropy, *arguments, triton=triton)
    wide, count = torch.float32, torch.int64
    assert [each.dtype for each in got] == [wide, count, wide, wide, count, dtype, dtype]
    exact = {"exact": torch.float32, "rtol": HALF_BOUND, "atol": HALF_BOUND, "ties": 1}
    assert_equals_the_definition(arguments, **exact, triton=triton)
    assert_equals_the_definition(arguments, **exact, triton=triton, upstream=0.3, grad_scale=0.1)


@each_device
@pytest.mark.usefixtures("small_chunks")
def test_the_weight_gradient_of_half_precision_is_summed_in_fp32(device):
    bf16 = {"dtype": torch.bfloat16, "device": device}
    hidden, head = torch.full((4097, 8), 1.0, **bf16), torch.zeros(257, 8, **bf16, requires_grad=True)
    labels = torch.zeros(4097, dtype=torch.int64, device=device)
    masked_linear_cross_entropy(hidden, head, labels).loss_sum.backward()
    assert head.grad[0, 0].item() == pytest.approx(
        -4097 * 256 / 257, rel=0.004
    )  # 256 would be bf16's last whole number


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("n", [0, 9])
@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float64), on_gpu("cuda", torch.bfloat16)])
def test_all_masked_gives_zero_and_zero_gradients(n, details, device, dtype):
    hidden, head, labels, weights, rows = problem(n=n, device=device, dtype=dtype)
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
    plain = results(masked_linear_cross_entropy, *problem(masked=0.0))
    filled = results(masked_linear_cross_entropy, *problem(masked=0.0, filled=12))
    for place, (one, two) in enumerate(zip(plain, filled, strict=True)):
        assert torch.equal(one, two[: len(one)] if place in (2, 3) else two)


@pytest.mark.parametrize(
    ("device", "dtype", "bound"),
    [("cpu", torch.float64, 1e-13), on_gpu("cuda", torch.bfloat16, HALF_BOUND), on_gpu("cuda", torch.float32, 1e-5)],
)
def test_hidden_states_and_head_may_be_strided(device, dtype, bound):
    hidden, head, *others = problem(device=device, dtype=dtype)
    hidden, head = hidden / 4, head / 4
    strided = hidden.t().contiguous().t(), torch.stack([head, head], dim=1)[:, 0]
    assert not strided[0].is_contiguous()
    assert not strided[1].is_contiguous()
    ties = int(dtype == torch.bfloat16)
    assert_equals_the_definition((*strided, *others), rtol=bound, atol=bound, ties=ties)


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


@pytest.mark.parametrize("grad_scale", [1.0, 1 / 3, 1e-5 / 7])
def test_a_gradient_that_was_foretold_is_not_touched_again(grad_scale):
    hidden, head, labels, _, _ = problem(M=20, dtype=torch.float32)
    leaves = hidden.requires_grad_(), head.requires_grad_()
    for upstream in (grad_scale, 2 * grad_scale):
        loss = masked_linear_cross_entropy(hidden, head, labels, grad_scale=grad_scale).loss_sum
        with Operations() as backward:
            torch.autograd.grad(loss * upstream, leaves)
        large = [name for name, size in backward.seen if "aten.mul" in name and size > 1]
        assert bool(large) == (upstream != grad_scale), large


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


@pytest.mark.parametrize(("device", "triton"), [("cpu", False), on_gpu("cuda", False), on_gpu("cuda", True)])
def test_a_confident_prediction_keeps_its_small_loss(device, triton):
    logits = torch.tensor([[30.0, 14.0, 13.0], [1e4, 1e4 - 14, 0.0], [20.0, 8.0, 1.0]], device=device)
    labels, head = torch.zeros(3, dtype=torch.int64, device=device), torch.eye(3, device=device)
    expected = reference.masked_cross_entropy(logits.double(), labels, details=True).token_losses
    found = masked_linear_cross_entropy(logits, head, labels, details=True, triton=triton).token_losses
    one_rounding = 2.0**-21 if device == "cuda" else 2.0**-23  # of a sum near 1; a GPU's power of two is off by 2**-22
    torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=one_rounding)


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


def test_logits_on_a_cpu_have_the_same_memory_call_after_call_and_each_thread_its_own():
    def address(rows: int, dtype: torch.dtype, *, inference: bool = False) -> int:
        with torch.inference_mode(inference):
            buffer = linear_cross_entropy.logits_buffer(rows, 11, like=torch.empty(0, dtype=dtype))
        assert buffer.shape == (rows, 11)
        assert buffer.dtype == dtype
        linear_cross_entropy.logits_buffer(rows, 11, like=torch.empty(0, dtype=dtype)).zero_()  # after an evaluation
        return buffer.data_ptr()

    with ThreadPoolExecutor(1) as thread:
        elsewhere = thread.submit(address, 8, torch.float32, inference=True).result()
        here = address(8, torch.float32)
        assert here != elsewhere
        assert here == address(3, torch.float64) == address(8, torch.bfloat16)
        assert elsewhere == thread.submit(address, 7, torch.float32).result()
        address(10_000, torch.float32)
