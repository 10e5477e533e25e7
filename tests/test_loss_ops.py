"""The operators of the loss: compiled once for all scales, exact to the bit, chosen for what works here."""

import itertools

import pytest
import torch
from torch import library, nn

import tests.interpreted  # noqa: F401  # before the kernels
from sft import loss as loss_module
from sft.errors import EXIT_FAILED, UserError
from sft.kernels import masked_cross_entropy, products
from sft.kernels.linear_cross_entropy import fused_head, masked_linear_cross_entropy
from sft.kernels.reference import masked_cross_entropy as reference_of_logits
from sft.loss import choose_loss
from tests.devices import NOT_COMPILED, interpreted

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SCALES = [1 / n for n in range(3, 15)]  # as a trainer has them: another one in each step, none a float32
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def leaves(dtype, *, M=50, n=20, V=257, seed=0):
    """hidden, which needs a gradient, and head, labels, weights, rows; some labels masked, some rows named twice."""
    draw = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(M, 16, generator=draw), torch.randn(V, 16, generator=draw)
    labels = torch.randint(0, V, (n,), generator=draw)
    labels[torch.rand(n, generator=draw) < 0.3] = -100
    weights, rows = 3 * torch.rand(n, generator=draw), torch.randint(0, M, (n,), generator=draw)
    return hidden.to(dtype).requires_grad_(), head.to(dtype), labels, weights, rows


@both_dtypes
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize(
    ("details", "n", "plain"), [(False, 20, False), (True, 20, False), (True, 0, False), (True, 20, True)]
)
def test_the_fused_head_is_a_sound_operator(dtype, needs, details, n, plain):
    hidden, head, labels, weights, rows = leaves(dtype, M=20, n=n)
    scale = torch.tensor(0.3, dtype=dtype)
    others = (None, None) if plain else (weights, rows)
    library.opcheck(fused_head, (hidden.detach(), head, labels, *others, scale, *needs, details, dtype, False))


class Head(nn.Module):
    """A head that is trained through the fused loss."""

    def __init__(self, head):
        super().__init__()
        self.weight = nn.Parameter(head)

    def forward(self, hidden, labels, weights, rows, grad_scale):
        return masked_linear_cross_entropy(
            hidden, self.weight, labels, weights, rows=rows, grad_scale=grad_scale
        ).loss_sum


class Logits(Head):
    """The same by the kernel over logits."""

    def forward(self, hidden, labels, weights, rows, grad_scale):
        logits = hidden[rows] @ self.weight.t()
        return masked_cross_entropy.masked_cross_entropy(logits, labels, weights, grad_scale=grad_scale).loss_sum


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("form", "dtype"), [(Head, torch.float32), (Head, torch.float64), interpreted(Logits, torch.float32)]
)
@pytest.mark.slow
def test_twelve_scales_are_compiled_twice_and_give_the_bits_of_one_that_is_not(form, dtype, backend):
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    module = form(leaves(dtype)[1])
    compiled = torch.compile(module, fullgraph=True, backend=counting)
    for seed, scale in enumerate(SCALES):
        hidden, _, *others = leaves(dtype, n=6, seed=seed)
        gradients = []
        for call in (module, compiled):
            loss = call(hidden, *others, scale) * scale
            gradients.append((loss, *torch.autograd.grad(loss, (hidden, module.weight))))
        for one, two in zip(*gradients, strict=True):
            close = {"rtol": 0, "atol": 0} if form is Head else {}  # there inductor adds and multiplies, too
            torch.testing.assert_close(two, one, **close)
    torch._dynamo.reset()
    assert len(compilations) <= 2


@both_dtypes
def test_the_gradient_is_the_one_computed_forward_to_the_bit_if_the_scale_was_foretold(dtype):
    for seed, scale in enumerate(SCALES):
        hidden, head, labels, weights, rows = leaves(dtype, seed=seed)
        head.requires_grad_()
        told = torch.tensor(scale, dtype=torch.float64).to(dtype)
        with torch.no_grad():
            _, _, *expected, _, _, _ = fused_head(
                hidden, head, labels, weights, rows, told, True, True, False, dtype, False
            )
        loss = masked_linear_cross_entropy(hidden, head, labels, weights, rows=rows, grad_scale=scale).loss_sum
        for mine, right in zip(torch.autograd.grad(loss * scale, (hidden, head)), expected, strict=True):
            assert torch.equal(mine, right)


@pytest.mark.parametrize("told", [1 / 3, 1.0])
def test_a_compiled_backward_gives_any_other_upstream_gradient_too(told):
    hidden, head, *others = leaves(torch.float64)
    torch._dynamo.reset()
    module = Head(head)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(0.7 * module(hidden, *others, 0.7), (hidden, module.weight))
    for mine, right in zip(
        torch.autograd.grad(0.7 * compiled(hidden, *others, told), (hidden, module.weight)), expected, strict=True
    ):
        torch.testing.assert_close(mine, right)
    torch._dynamo.reset()


def test_deterministic_algorithms_and_inference_mode_give_the_same_bits():
    hidden, head, labels, weights, rows = leaves(torch.float32)
    head.requires_grad_()

    def everything():
        got = masked_linear_cross_entropy(hidden, head, labels, weights, rows=rows, details=True)
        return [*got, *(torch.autograd.grad(got.loss_sum, (hidden, head)) if got.loss_sum.requires_grad else ())]

    expected = everything()
    torch.use_deterministic_algorithms(True)  # which also fills new memory with NaN
    try:
        deterministic = everything()
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.inference_mode():
        inferred = everything()
    assert (len(deterministic), len(inferred)) == (7, 5)
    for one, two in [*zip(expected, deterministic, strict=True), *zip(expected, inferred, strict=False)]:
        assert torch.equal(one, two)
    with torch.inference_mode():
        created = [tensor.detach().clone() for tensor in (hidden, head, labels, weights, rows)]
        assert created[0].is_inference()
        *inputs, rows = created
        assert torch.equal(masked_linear_cross_entropy(*inputs, rows=rows).loss_sum, expected[0])


def tried(monkeypatch, **replaced):
    """The way of adding that is chosen on this machine, with some of the ways replaced."""
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    for name, way in replaced.items():
        monkeypatch.setattr(products, name, way)
    return products.half_precision_adds.__wrapped__(CPU, torch.bfloat16)


def raises(error):
    def way(*_):
        raise error

    return way


@pytest.mark.parametrize(
    "error",
    [RuntimeError("not supported"), NotImplementedError(), AttributeError("no overload"), TypeError("out_dtype")],
)
def test_a_way_of_adding_that_is_refused_or_wrong_gives_way_to_the_next(monkeypatch, error):
    wrong, right = lambda total, a, b, first: None, products.add_widened
    assert tried(monkeypatch, add_in_epilogue=raises(error), add_apart=right) is right
    assert tried(monkeypatch, add_in_epilogue=wrong, add_apart=raises(error)) is right


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("tried to allocate"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_lack_of_memory_decides_nothing_about_a_way_of_adding(monkeypatch, error):
    with pytest.raises(type(error), match=str(error)):
        tried(monkeypatch, add_in_epilogue=raises(error))


@pytest.mark.parametrize(
    ("way", "sentence"),
    [
        (products.add_in_epilogue, "it compiles here"),
        (products.add_apart, "it compiles here; each chunk's weight gradient is added in a pass of its own, since "),
        (products.add_widened, "it compiles here; the weight gradient's products are fp32, since those of half "),
    ],
)
def test_the_reason_tells_of_a_weight_gradient_that_is_not_added_the_fast_way(monkeypatch, way, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(products, "half_precision_adds", lambda device, dtype: way)
    monkeypatch.setattr(loss_module, "_trial", lambda device, dtype: None)
    chosen = choose_loss("auto", device=CUDA, dtype=torch.bfloat16)
    assert chosen.kernel == "triton"
    assert chosen.reason.startswith(sentence)
    assert way is not products.add_in_epilogue or chosen.reason == sentence
    in_torch = choose_loss("torch", device=CUDA, dtype=torch.bfloat16)
    assert in_torch.reason == chosen.reason.replace("it compiles here", "loss_kernel=torch")
    assert choose_loss("reference", device=CUDA, dtype=torch.bfloat16).reason == "loss_kernel=reference"


@pytest.mark.parametrize("choice", ["auto", "triton"])
def test_lack_of_memory_in_the_trial_ends_the_run_instead_of_choosing_another_kernel(monkeypatch, choice):
    monkeypatch.setattr(loss_module, "_trial", raises(torch.OutOfMemoryError("tried to allocate")))
    with pytest.raises(UserError, match="cuda:0 is out of memory before the first step") as raised:
        choose_loss(choice, device=CUDA, dtype=torch.bfloat16)
    assert raised.value.exit_status == EXIT_FAILED


@NOT_COMPILED
@pytest.mark.parametrize(
    "refused",
    [
        lambda columns, gradient, weights: columns % 16 == 0,
        lambda columns, gradient, weights: columns % 16 != 0,
        lambda columns, gradient, weights: weights is not None,
        lambda columns, gradient, weights: weights is None,
        lambda columns, gradient, weights: gradient is None,
        lambda columns, gradient, weights: gradient is not None,
    ],
)
@pytest.mark.slow
def test_the_trial_meets_every_specialisation_of_the_kernel(monkeypatch, refused):
    launch = masked_cross_entropy._launch

    def failing(logits, gradient, labels, weights, *others):
        if refused(logits.shape[1], gradient, weights):
            raise RuntimeError("does not compile")
        return launch(logits, gradient, labels, weights, *others)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert loss_module.triton_problem(CPU, torch.float32) is None
    monkeypatch.setattr(masked_cross_entropy, "_launch", failing)
    assert "does not compile" in loss_module.triton_problem(CPU, torch.float32)


SHARED = {
    "transposed": lambda: torch.randn(11, 6).t(),
    "every second column": lambda: torch.randn(6, 22)[:, ::2],
    "one row for all": lambda: torch.randn(1, 11).expand(6, 11),
    "overlapping rows": lambda: torch.randn(40).unfold(0, 11, 3)[:6],
}


@NOT_COMPILED
@pytest.mark.parametrize("name", SHARED)
def test_logits_that_cannot_be_overwritten_are_copied(name):
    torch.manual_seed(0)
    logits, labels = SHARED[name](), torch.tensor([1, -100, 3, 4, 10, 0])
    found = []
    for function, given in (
        (masked_cross_entropy.masked_cross_entropy, logits),
        (reference_of_logits, logits.double()),
    ):
        leaf = given.detach().requires_grad_()
        loss = function(leaf, labels, overwrite=True).loss_sum
        found.append([loss.detach(), *torch.autograd.grad(2 * loss, leaf)])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


@NOT_COMPILED
def test_rows_that_share_memory_are_not_overwritten():
    with pytest.raises(AssertionError, match="share no memory"):
        masked_cross_entropy.cross_entropy_(
            torch.randn(1, 11).expand(2, 11), torch.zeros(2, dtype=torch.int64), None, 1.0, gradient=True, details=False
        )


def test_long_sums_of_half_precision_are_fp32_on_the_cpu(monkeypatch):
    monkeypatch.setattr(products, "CPU_SUM", 64)  # many parts
    torch.manual_seed(0)
    a, b = torch.randn(8, 8_192).bfloat16(), torch.randn(8_192, 16).bfloat16()
    exact = a.double() @ b.double()
    error = (products.product(a, b).double() - exact).norm() / exact.norm()
    assert error < 3e-3  # the parts are bfloat16; adding them up in it makes 1e-2


@pytest.mark.parametrize("wrong", [(21,), (1,), (20, 1)])
def test_there_is_one_weight_for_each_label(wrong):
    hidden, head, labels, _, rows = leaves(torch.float32)
    with pytest.raises(AssertionError, match="one weight for each label"):
        masked_linear_cross_entropy(hidden, head, labels, torch.ones(wrong), rows=rows)


def test_weights_of_another_dtype_do_not_change_the_results():
    hidden, head, labels, weights, rows = leaves(torch.float32)
    loss = masked_linear_cross_entropy(hidden, head, labels, weights.double(), rows=rows, details=True)
    assert {loss.loss_sum.dtype, loss.token_losses.dtype} == {torch.float32}


@pytest.mark.slow
@NOT_COMPILED
def test_the_choice_is_the_same_where_gradients_are_off(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            assert choose_loss("triton", device=CPU, dtype=torch.float32).kernel == "triton"
