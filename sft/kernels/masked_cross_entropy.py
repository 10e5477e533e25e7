"""The masked cross-entropy over logits in Triton: one read and one write of each trained row, gradient included.

Derivation. For a row x of V logits with label y, weight w and scale c (the upstream gradient that is expected),

    loss = log(sum_j exp(x_j)) - x_y        gradient_j = c * w * (exp(x_j) / sum_k exp(x_k) - [j = y])

The sum is taken online, with a running maximum m (Milakov & Gimelshein 2018): s <- s * exp(m - m') + sum exp(x - m').
What makes it fast on a GPU, where the time should be that of reading and writing V logits once and nothing else:

- Each thread keeps its own m and s, of the columns that it reads, and they are joined once at the end of the row. So
  the loop has no barrier, and one rescaling, for VECTOR * UNROLL columns, costs one exponential.
- Exponentials are powers of two, exp(x - m) = exp2(x * log2(e) - m * log2(e)): one FMA and one operation of the
  special-function unit, which is then busy with both passes for half of the memory's time on an H200.
- The second pass goes backwards, from what was read last. The first asks the L2 cache to keep what it reads, the
  second to drop it. The ragged end of the row, and `held` tiles, stay in registers between the passes.
- [j = y] costs no comparison in each column: the gradient at the label is written once more, after a barrier.

All arithmetic is fp32, whatever the dtype; a loss is log2(s) - (x_y * log2(e) - m), which does not cancel. With t the
sum of exp2(z_j) * z_j, z_j = (x_j - m) * log2(e), the entropy is ln(2) * (log2(s) - t / s). A label is the (first)
argmax unless some column beats it, which the first pass sees, too.

-inf logits have probability 0. NaN or +inf, or a row of nothing but -inf, gives a NaN loss and a NaN gradient. So does
a label outside the vocabulary other than -100, and nothing outside the row is read or written.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from sft.kernels import cross_entropy_kernels
from sft.kernels.reference import CrossEntropy
from sft.kernels.upstream import SMALLEST_SCALE, foretold, is_traced, rest
from sft.samples import NOT_TRAINED

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT: int = cross_entropy_kernels.ALIGNMENT.value
WARP = 32  # threads
VECTOR_BYTES = 16  # the widest access of a thread
SCALE_BLOCK = 4096
SCALE_WARPS = 8
SCALE_PROGRAMS = 8  # per multiprocessor: as many as are resident at once


class Configuration(NamedTuple):
    """How a program goes through its row; a slab is one vector of each thread, a tile `unroll` slabs."""

    warps: int
    unroll: int
    held: int = 0  # tiles that stay in registers between the passes, beside the ragged end
    stages: int = 1  # more: so many tiles are on their way to shared memory while one is worked on
    registers: int | None = None  # at most, per thread; 65,536 / (32 * warps * registers) rows are in work at once
    keep: bool = True  # the first pass asks the L2 cache to keep what it reads


CONFIGURATIONS = (  # the first is the default; why, and what the compiler makes of each, is in NOTES.md
    Configuration(warps=32, unroll=2),
    Configuration(warps=32, unroll=2, keep=False),
    Configuration(warps=32, unroll=1, stages=3),
    Configuration(warps=32, unroll=2, stages=3),
    Configuration(warps=16, unroll=2, registers=64),
    Configuration(warps=16, unroll=2, registers=64, stages=3),
    Configuration(warps=16, unroll=4, registers=128),
    Configuration(warps=16, unroll=4, registers=128, stages=3),
    Configuration(warps=16, unroll=2, registers=128, held=4),
    Configuration(warps=8, unroll=4, registers=128, held=2),
)


def masked_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    details: bool = False,
    overwrite: bool = False,
    grad_scale: float = 1.0,
    configuration: int | None = None,
) -> CrossEntropy:
    """What reference.masked_cross_entropy gives, see there, in fp32; loss_sum is differentiable once, by logits.

    logits (N, V) in bf16, fp16 or fp32. A call that needs the gradient computes it at once, times `grad_scale`, and the
    backward pass multiplies it by what is left of the upstream gradient, if anything. With `overwrite` it takes the
    place of logits, which nothing may read any more (also no checkpoint that ends before this call); without, it has
    memory of its own. Logits whose columns are not contiguous, or whose rows share memory, are
    copied first. `configuration` is an index into CONFIGURATIONS, for benchmarks.
    """
    _check(logits, labels, weights)
    assert SMALLEST_SCALE <= grad_scale <= 1 / SMALLEST_SCALE, "a scale whose products with gradients fp32 holds"
    scale = foretold(grad_scale, logits, torch.float32)
    if torch.is_grad_enabled() and logits.requires_grad:
        may_overwrite = overwrite and _rows_apart(logits)
        outputs = _CrossEntropy.apply(logits, labels, weights, scale, details, may_overwrite, configuration)
    else:
        *told, _ = cross_entropy(logits, labels, weights, scale, False, details, configuration)
        outputs = (_weighted_sum(told[0], weights), *told)
    loss_sum, losses, entropies, correct = outputs
    count = (labels != NOT_TRAINED).sum()
    return CrossEntropy(loss_sum, count, *((losses, entropies, correct.sum()) if details else ()))


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    grad_scale: float | Tensor,
    *,
    gradient: bool,
    details: bool,
    configuration: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Token losses (N,), and with `details` their entropies and whether they are correct; not differentiable.

    With `gradient` logits (N, V) become grad_scale * weight * (softmax - onehot), 0 in masked rows; grad_scale as a
    number or as an fp32 scalar beside them.
    """
    _check(logits, labels, weights)
    scale = _scalar(grad_scale, logits)
    if gradient:
        assert _rows_apart(logits) or not _has_vectors(logits), "rows that are overwritten share no memory"
        losses, entropies, correct = overwrite_cross_entropy(logits, labels, weights, scale, details, configuration)
    else:
        losses, entropies, correct, _ = cross_entropy(logits, labels, weights, scale, False, details, configuration)
    return (losses, entropies, correct) if details else (losses, None, None)


def scale_(tensor: Tensor, factor: Tensor, divisor: float | Tensor = 1.0) -> None:
    """tensor *= factor / divisor, without waiting for the GPU; where both are equal, memory is not touched.

    tensor is dense in its last dimension, or contiguous; factor, and divisor unless it is a number, a scalar on the
    same device. Compared in fp32.
    """
    scale_in_place(tensor, factor, _scalar(divisor, tensor))


def _scalar(number: float | Tensor, like: Tensor) -> Tensor:
    return number if isinstance(number, Tensor) else foretold(number, like, torch.float32)


def _check(logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
    assert logits.ndim == 2, "logits are (N, V)"
    assert logits.dtype in DTYPES, f"no kernel for {logits.dtype}"
    assert labels.shape == logits.shape[:1], "one label for each row of logits"
    assert labels.dtype in (torch.int64, torch.int32), "labels are integers"
    assert weights is None or weights.shape == labels.shape, "one weight for each label"
    assert weights is None or not weights.requires_grad, "the weights have no gradient; the reference gives one"


class _CrossEntropy(torch.autograd.Function):
    """The gradient is computed with the loss, and kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        grad_scale: Tensor,
        details: bool,
        overwrite: bool,
        configuration: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if overwrite:
            told = overwrite_cross_entropy(logits, labels, weights, grad_scale, details, configuration)
            gradient = logits
        else:
            *told, gradient = cross_entropy(logits, labels, weights, grad_scale, True, details, configuration)
        ctx.save_for_backward(gradient, grad_scale)
        ctx.spent = False
        ctx.mark_non_differentiable(*told)
        return (_weighted_sum(told[0], weights), *told)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if is_traced(upstream):  # and a compiled backward refuses a second derivative itself
            gradient, told = ctx.saved_tensors
            return gradient * rest(upstream, told), *[None] * 6
        if torch.is_grad_enabled():
            raise RuntimeError("the masked cross-entropy has no second derivative; the reference has")
        if ctx.spent:
            raise RuntimeError("the gradient of this loss is spent by the first backward: compute the loss again")
        ctx.spent = True
        gradient, told = ctx.saved_tensors  # not before, since after a first backward it has changed
        scale_in_place(gradient, upstream, told)
        return gradient, *[None] * 6


def _weighted_sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    return (losses if weights is None else losses * weights.float()).sum()


@library.custom_op("sft::cross_entropy", mutates_args=())
def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    grad_scale: Tensor,
    gradient: bool,
    details: bool,
    configuration: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, entropies, correct and the gradient; what is not asked for is empty."""
    logits = _readable(logits)
    target = _like(logits) if gradient else None
    told = _launch(logits, target, labels, weights, grad_scale, details, configuration)
    return *told, logits.new_empty(0) if target is None else target


@cross_entropy.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    grad_scale: Tensor,
    gradient: bool,
    details: bool,
    configuration: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_results(labels, details), _like(_readable(logits)) if gradient else logits.new_empty(0)


@library.custom_op("sft::cross_entropy_", mutates_args=("logits",))
def overwrite_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    grad_scale: Tensor,
    details: bool,
    configuration: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, entropies and correct, empty without details; logits become the gradient."""
    if _has_vectors(logits):
        return _launch(logits, logits, labels, weights, grad_scale, details, configuration)
    copy = logits.contiguous()
    told = _launch(copy, copy, labels, weights, grad_scale, details, configuration)
    logits.copy_(copy)
    return told


@overwrite_cross_entropy.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    grad_scale: Tensor,
    details: bool,
    configuration: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(labels, details)


@library.custom_op("sft::scale_", mutates_args=("tensor",))
def scale_in_place(tensor: Tensor, factor: Tensor, divisor: Tensor) -> None:
    if tensor.numel() == 0:
        return
    rows, columns, stride = 1, tensor.numel(), tensor.numel()
    if not tensor.is_contiguous():
        assert tensor.ndim == 2, "contiguous, or a matrix"
        assert tensor.stride(1) == 1, "the rows of a matrix are contiguous"
        (rows, columns), stride = tensor.shape, tensor.stride(0)
    blocks = rows * -(-columns // SCALE_BLOCK)
    with _on_device_of(tensor):
        programs = min(blocks, SCALE_PROGRAMS * _multiprocessors(tensor.device))
        cross_entropy_kernels.scale_kernel[(programs,)](
            tensor, factor, divisor, rows, columns, stride, BLOCK=SCALE_BLOCK, num_warps=SCALE_WARPS
        )


@scale_in_place.register_fake
def _(tensor: Tensor, factor: Tensor, divisor: Tensor) -> None:
    return None


def _launch(
    logits: Tensor,
    gradient: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    grad_scale: Tensor,
    details: bool,
    configuration: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = logits.shape
    losses, entropies, correct = _results(labels, details)
    if rows == 0:
        return losses, entropies, correct
    chosen = CONFIGURATIONS[configuration or 0]
    stride = logits.stride(0) if rows > 1 else -(-columns // ALIGNMENT) * ALIGNMENT  # one row starts at 0
    with _on_device_of(logits):
        cross_entropy_kernels.cross_entropy_kernel[(rows,)](
            logits,
            gradient,
            labels.contiguous(),
            None if weights is None else weights.contiguous(),
            losses,
            entropies if details else None,
            correct if details else None,
            columns,
            stride,
            grad_scale,
            **constants(chosen, columns=columns, stride=stride, itemsize=logits.element_size()),
            num_warps=chosen.warps,
            maxnreg=chosen.registers,
        )
    return losses, entropies, correct


def constants(chosen: Configuration, *, columns: int, stride: int, itemsize: int) -> dict[str, Any]:
    """The compile-time constants of cross_entropy_kernel."""
    lanes, vector = WARP * chosen.warps, VECTOR_BYTES // itemsize
    fits = columns - ALIGNMENT >= chosen.held * chosen.unroll * lanes * vector
    return {
        "LANES": lanes,
        "VECTOR": vector,
        "UNROLL": chosen.unroll,
        "HELD": chosen.held if fits else 0,
        "STAGES": chosen.stages,
        "KEEP": chosen.keep,
        "ALIGNED": stride % ALIGNMENT == 0,
    }


def _results(labels: Tensor, details: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the losses, the entropies and whether the label is the argmax."""
    told = labels.shape if details else (0,)
    return (
        labels.new_empty(labels.shape, dtype=torch.float32),
        labels.new_empty(told, dtype=torch.float32),
        labels.new_empty(told, dtype=torch.bool),
    )


def _has_vectors(logits: Tensor) -> bool:
    return logits.shape[1] == 1 or logits.stride(1) == 1


def _rows_apart(logits: Tensor) -> bool:
    return _has_vectors(logits) and (len(logits) <= 1 or logits.stride(0) >= logits.shape[1])


def _readable(logits: Tensor) -> Tensor:
    """Logits, copied unless their columns are contiguous and their rows apart, but not so far that twice the memory
    would not hold a gradient with their strides."""
    rows, columns = logits.shape
    if _has_vectors(logits) and (rows <= 1 or columns <= logits.stride(0) <= 2 * columns):
        return logits
    return logits.contiguous()


def _like(logits: Tensor) -> Tensor:
    return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _multiprocessors(device: torch.device) -> int:
    """Those of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
