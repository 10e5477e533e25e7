"""The fused head: hidden states to the masked cross-entropy, with logits for more than one chunk of rows never held.

Chunk by chunk of the n rows that have a label, z = h W' are the logits, and the cross-entropy turns them in place into
the gradient g = s w (softmax(z) - onehot(label)), from which both gradients follow: dh = g W and dW += g' h. So the
forward pass already holds the gradients of s * loss, for 6nDV FLOPs in three products, where recomputing the logits in
the backward pass would cost 8nDV. The backward pass is left with the factor upstream / s: with s = `grad_scale` told
in advance it is exactly 1, and nothing is done. In fp16 a small s may underflow in g, which fp16 training avoids with
a loss scale; it belongs into `grad_scale`.

Memory beside the weight gradient: the logits of a chunk, its hidden states, and the gradient for all hidden states.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from sft.kernels.products import accumulation_dtype, add_product, product
from sft.kernels.reference import CrossEntropy
from sft.kernels.upstream import SMALLEST_SCALE, foretold, is_traced, rest
from sft.samples import NOT_TRAINED

CUDA_BYTES = 1_300_000_000  # at most so much extra, beside the weight gradient and a head that autocast converts
CUDA_WORKSPACE = 2 * 2**25  # of it what cuBLAS and cuBLASLt keep, 32 MiB each on Hopper
CUDA_ROWS = 128  # chunks are a multiple of a GEMM's tile
CUDA_LEAST_ROWS = 2048  # in a chunk: each passes over the weight gradient, whatever the hidden states' gradient leaves
CPU_CHUNK = 80_000_000  # logits in a chunk: 526 rows of 151,936
CPU_BLOCK = 2**20  # logits at once in the cross-entropy, which stay in a cache
CUDA_BLOCK = 2**25  # the same on CUDA without Triton: 128 MiB in fp32
ALIGNED = 64  # logits; so that each of a chunk's rows begins at an aligned address, whatever the vocabulary

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
TokenResults = tuple[Tensor, Tensor | None, Tensor | None]  # losses, entropies and is-correct, each (N,)


def masked_linear_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    details: bool = False,
    grad_scale: float = 1.0,
    triton: bool | None = None,
) -> CrossEntropy:
    """What reference.masked_linear_cross_entropy gives, see there; differentiable once, by hidden and head_weight.

    Once: a second backward pass is refused, though not by a graph of inductor, which scales again without a word.
    Never waits for a GPU. Under autocast it computes in autocast's dtype, and the gradient of an fp32 head stays fp32.
    `triton` decides who computes the cross-entropy of a chunk; None = Triton on CUDA, PyTorch elsewhere. Where this
    call itself is compiled, backward may not change what forward saved: it reads and writes each gradient once more.
    """
    dtype = compute_dtype(hidden)
    assert hidden.ndim == head_weight.ndim == 2, "hidden is (M, D), head_weight (V, D)"
    assert hidden.shape[1] == head_weight.shape[1], "hidden and head_weight differ in width"
    autocast = torch.is_autocast_enabled(hidden.device.type)
    assert autocast or hidden.dtype == head_weight.dtype, "hidden and head_weight differ in dtype, without autocast"
    assert len(labels) == (len(hidden) if rows is None else len(rows)), "one label for each row"
    assert weights is None or weights.shape == labels.shape, "one weight for each label"
    assert SMALLEST_SCALE <= grad_scale <= 1 / SMALLEST_SCALE, "a scale whose products with gradients fp32 holds"
    assert weights is None or not weights.requires_grad, "the weights have no gradient; the reference gives one"
    if triton is None:
        triton = hidden.is_cuda and dtype != torch.float64
    scale = foretold(grad_scale, hidden, accumulation_dtype(dtype))
    loss_sum, count, *told = _FusedHead.apply(
        hidden, head_weight, labels, weights, rows, scale, torch.is_grad_enabled(), details, dtype, triton
    )
    return CrossEntropy(loss_sum, count, *(told if details else ()))


class _FusedHead(torch.autograd.Function):
    """`fused_head`, whose gradients nobody sees before the backward pass gives them away."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        rows: Tensor | None,
        grad_scale: Tensor,
        differentiable: bool,
        details: bool,
        dtype: torch.dtype,
        triton: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        ctx.hidden_gradient = differentiable and hidden.requires_grad
        ctx.head_gradient = differentiable and head_weight.requires_grad
        ctx.triton, ctx.is_spent = triton, False
        needs = ctx.hidden_gradient, ctx.head_gradient
        loss_sum, count, grad_hidden, grad_head, *told = fused_head(
            hidden, head_weight, labels, weights, rows, grad_scale, *needs, details, dtype, triton
        )
        ctx.save_for_backward(grad_hidden, grad_head, grad_scale)
        ctx.mark_non_differentiable(count, *told)
        ctx.set_materialize_grads(False)
        return loss_sum, count, *told

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        assert upstream is not None, "loss_sum alone is differentiable"
        if is_traced(upstream):  # and a compiled backward refuses a second derivative itself
            grad_hidden, grad_head, told = ctx.saved_tensors
            factor = rest(upstream, told)
            by_hidden = grad_hidden * factor if ctx.hidden_gradient else None
            return by_hidden, grad_head * factor if ctx.head_gradient else None, *[None] * 8
        if torch.is_grad_enabled():
            raise RuntimeError(
                "masked_linear_cross_entropy is differentiable once: its gradients are numbers from the forward pass. "
                "For create_graph=True use sft.kernels.reference (--loss_kernel=reference)"
            )
        if ctx.is_spent:
            raise RuntimeError(
                "masked_linear_cross_entropy gives its gradients away in the first backward pass; run the forward pass "
                "again, or use sft.kernels.reference (--loss_kernel=reference) with retain_graph=True"
            )
        ctx.is_spent = True
        grad_hidden, grad_head, told = ctx.saved_tensors  # not before, since after a first backward they have changed
        if ctx.hidden_gradient:
            scale_gradient_(grad_hidden, upstream, told, ctx.triton)
        if ctx.head_gradient:
            scale_gradient_(grad_head, upstream, told, ctx.triton)
        return grad_hidden if ctx.hidden_gradient else None, grad_head if ctx.head_gradient else None, *[None] * 8


def scale_gradient_(gradient: Tensor, upstream: Tensor, told: Tensor, triton: bool) -> None:
    """Multiply in place by upstream / told; nothing is read where that is 1, save on CUDA without Triton."""
    if triton:
        from sft.kernels import masked_cross_entropy

        masked_cross_entropy.scale_(gradient, upstream, told)
        return
    factor = rest(upstream, told)
    if gradient.is_cuda or factor.item() != 1:
        gradient.mul_(factor)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on, as for any linear layer, else that of hidden."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


@library.custom_op("sft::masked_linear_cross_entropy", mutates_args=())
def fused_head(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    rows: Tensor | None,
    grad_scale: Tensor,
    hidden_gradient: bool,
    head_gradient: bool,
    details: bool,
    dtype: torch.dtype,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss sum, count, the gradients of grad_scale * loss by hidden and by head_weight, token losses, entropies and the
    number that is correct; what is not asked for is empty.

    Not differentiable itself. grad_scale is a scalar in the dtype of the sums.
    """
    job = Job(grad_scale, hidden_gradient, head_gradient, details, dtype, triton)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return compute(job, hidden, head_weight, labels=labels, weights=weights, rows=rows)


class Job(NamedTuple):
    """What is asked of the fused head."""

    grad_scale: Tensor
    hidden_gradient: bool
    head_gradient: bool
    details: bool
    dtype: torch.dtype  # of the products
    triton: bool


@fused_head.register_fake
def _(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    rows: Tensor | None,
    grad_scale: Tensor,
    hidden_gradient: bool,
    head_gradient: bool,
    details: bool,
    dtype: torch.dtype,
    triton: bool,
) -> Gradients:
    wide = accumulation_dtype(dtype)
    tokens = labels.shape if details else (0,)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty((), dtype=torch.int64),
        hidden.new_empty(hidden.shape if hidden_gradient else (0,)),
        head_weight.new_empty(head_weight.shape if head_gradient else (0,)),
        hidden.new_empty(tokens, dtype=wide),
        hidden.new_empty(tokens, dtype=wide),
        hidden.new_empty((), dtype=torch.int64),
    )


def compute(
    job: Job, hidden: Tensor, head_weight: Tensor, *, labels: Tensor, weights: Tensor | None, rows: Tensor | None
) -> Gradients:
    """The results of `fused_head`."""
    entries = None
    if not hidden.is_cuda:  # reading is free here, so that masked rows need not be computed
        entries = torch.nonzero(labels != NOT_TRAINED)[:, 0]
        rows = entries if rows is None else rows[entries]
        weights = None if weights is None else weights[entries]
    chosen = labels if entries is None else labels[entries]
    grad_hidden, grad_head, told = compute_chunks(job, hidden, head_weight, labels=chosen, weights=weights, rows=rows)
    grad_head = grad_head.to(head_weight.dtype)  # after the chunk's memory has been given back
    losses, entropy, is_correct = told
    loss_sum = (losses if weights is None else losses * weights.to(losses.dtype)).sum()
    count = (chosen != NOT_TRAINED).sum()
    if not job.details:
        empty = losses.new_empty(0)
        return loss_sum, count, grad_hidden, grad_head, empty, losses.new_empty(0), torch.zeros_like(count)
    assert entropy is not None
    assert is_correct is not None
    if entries is not None:
        losses, entropy = (each.new_zeros(len(labels)).index_copy_(0, entries, each) for each in (losses, entropy))
    return loss_sum, count, grad_hidden, grad_head, losses, entropy, is_correct.sum(dtype=torch.int64)


def compute_chunks(
    job: Job, hidden: Tensor, head_weight: Tensor, *, labels: Tensor, weights: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor, TokenResults]:
    """The gradient by hidden, that by head_weight in the dtype of its sum, and the results by token."""
    N, (V, _) = len(labels), head_weight.shape
    wide = accumulation_dtype(job.dtype)
    size = chunk_rows(N, hidden, vocabulary=V, dtype=job.dtype, hidden_gradient=job.hidden_gradient)
    head = head_weight.to(job.dtype)
    logits = logits_buffer(min(size, N), V, like=head)  # used by each chunk
    grad_hidden = hidden.new_zeros(hidden.shape) if job.hidden_gradient else hidden.new_empty(0)
    grad_head = head_weight.new_empty(0)
    if job.head_gradient:
        of_one_chunk = head_weight.dtype if job.dtype == head_weight.dtype else wide
        grad_head = head_weight.new_empty(head_weight.shape, dtype=of_one_chunk if size >= N else wide)
    token_results = []
    for start in range(0, N, size):
        part = slice(start, start + size)
        h = (hidden[part] if rows is None else hidden.index_select(0, rows[part])).to(job.dtype)  # (n, D)
        z = torch.mm(h, head.t(), out=logits[: len(h)])  # (n, V)
        token_results.append(
            cross_entropy_(job, z, labels[part], None if weights is None else weights[part])  # z is a gradient now
        )
        if job.hidden_gradient:
            gradient = product(z, head).to(hidden.dtype)
            if rows is None:
                grad_hidden[part] = gradient
            else:
                grad_hidden.index_add_(0, rows[part], gradient)
            del gradient
        if job.head_gradient:
            add_product(grad_head, z, h, first=start == 0)
    if N == 0:
        grad_head.zero_()
    return grad_hidden, grad_head, joined(token_results, hidden, wide=wide)


class _Kept(threading.local):
    """Memory of a thread that stays between calls."""

    bytes: Tensor | None = None


_kept = _Kept()


def logits_buffer(rows: int, V: int, *, like: Tensor) -> Tensor:
    """Uninitialised (rows, V). On a CPU it is the same memory call after call, whose pages the kernel need not clear
    again: a twelfth of a step of a small model. PyTorch's CUDA allocator keeps memory itself.
    """
    if like.is_cuda:
        return like.new_empty(rows, -(-V // ALIGNED) * ALIGNED)[:, :V]
    size = rows * V * like.itemsize
    if _kept.bytes is None or _kept.bytes.numel() < size:
        _kept.bytes = None  # before it is replaced
        _kept.bytes = torch.empty(size, dtype=torch.uint8, device=like.device)
    return _kept.bytes[:size].view(like.dtype).view(rows, V)


def joined(parts: list[TokenResults], like: Tensor, *, wide: torch.dtype) -> TokenResults:
    """The chunks' results by token in a row."""
    if not parts:
        return like.new_empty(0, dtype=wide), like.new_empty(0, dtype=wide), like.new_empty(0, dtype=wide)
    losses, entropy, is_correct = zip(*parts, strict=True)
    if entropy[0] is None:
        return torch.cat(losses), None, None
    return torch.cat(losses), torch.cat(entropy), torch.cat(is_correct)


def chunk_rows(count: int, hidden: Tensor, *, vocabulary: int, dtype: torch.dtype, hidden_gradient: bool) -> int:
    """Rows in a chunk, so that the chunks of `count` rows are few and of equal size, and fit in the memory allowed."""
    if not hidden.is_cuda:
        most, multiple = max(1, CPU_CHUNK // vocabulary), 1
    else:
        M, D = hidden.shape
        fixed = CUDA_WORKSPACE + M * D * hidden.itemsize * hidden_gradient
        # logits; hidden states as they are and converted, or their gradient as a sum and converted
        row = (vocabulary + ALIGNED) * dtype.itemsize + D * (dtype.itemsize + 4 + hidden.itemsize)
        most, multiple = (CUDA_BYTES - fixed) // row, CUDA_ROWS
        most = max(CUDA_LEAST_ROWS, most // multiple * multiple)
    chunks = max(1, -(-count // most))
    return max(1, -(-count // chunks // multiple) * multiple) if count > most else max(1, count)


def cross_entropy_(job: Job, logits: Tensor, labels: Tensor, weights: Tensor | None) -> TokenResults:
    """Losses, entropies and is-correct by token; the logits become their gradient where one is asked for."""
    gradient = job.hidden_gradient or job.head_gradient
    if job.triton:
        from sft.kernels import masked_cross_entropy

        return masked_cross_entropy.cross_entropy_(
            logits, labels, weights, job.grad_scale, gradient=gradient, details=job.details
        )
    threads = torch.get_num_threads()  # which share the rows of a block evenly
    rows = -(-max(1, (CUDA_BLOCK if logits.is_cuda else CPU_BLOCK) // logits.shape[1]) // threads) * threads
    factors = labels.ne(NOT_TRAINED).to(accumulation_dtype(job.dtype)).mul_(job.grad_scale)
    if weights is not None:
        factors = torch.where(factors != 0, factors * weights.to(factors.dtype), 0.0)
    parts = [
        block_cross_entropy_(*block, gradient=gradient, details=job.details)
        for block in zip(logits.split(rows), labels.split(rows), factors.split(rows), strict=True)
    ]
    return joined(parts, logits, wide=factors.dtype)


def block_cross_entropy_(
    logits: Tensor, labels: Tensor, factors: Tensor, *, gradient: bool, details: bool
) -> TokenResults:
    """The same for a few rows, in PyTorch, whose logits are used up; `factors` (n,) multiply the gradient."""
    trained = labels != NOT_TRAINED
    labels = torch.where(trained, labels, 0)
    is_correct = (logits.argmax(-1) == labels) & trained if details else None
    wide = logits.to(factors.dtype)
    at_label, top = wide.gather(1, labels[:, None]), wide.amax(1, keepdim=True)
    p = torch.softmax(wide, 1, out=wide)  # whose maximum is 1 / sum(exp(z - top)): no second pass of exponentials
    losses = ((top - at_label) - p.amax(1, keepdim=True).log_())[:, 0].where(trained, 0.0)  # near 0 both terms are
    entropy = torch.special.entr(p).sum(-1).where(trained, 0.0) if details else None
    if gradient:
        p.mul_(factors[:, None]).scatter_add_(1, labels[:, None], -factors[:, None])
        if p.is_cuda:  # masked rows are among these, and 0 times an infinity is none
            p.masked_fill_(~trained[:, None], 0.0)
        if p is not logits:
            logits.copy_(p)
    return losses, entropy, is_correct
