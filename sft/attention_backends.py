"""What attention within documents is computed by, apart from PyTorch's own attention under a mask.

All take what the host knows of the documents, so that nothing waits for the device, and their shapes do not depend on
the documents, so that torch.compile translates a block once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, library

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Shapes: B rows, T tokens, N = B * T, H query heads, G key heads, C head size.
FLEX_BLOCK = 128  # tokens; FlexAttention leaves out whole blocks of scores


def attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, extent: Tensor, rows: int, kernel: str) -> Tensor:
    """Causal attention within documents, (N, H, C), of what forward_pass describes; with gradients."""
    if torch.compiler.is_compiling() or is_without_content(q):
        return document_attention(q, k, v, offsets, extent, rows, kernel)[0]
    return DocumentAttention.apply(q, k, v, offsets, extent, rows, kernel)


def is_without_content(q: Tensor) -> bool:
    """Whether q is a fake tensor outside a compiler: memory alone is of interest, and nothing may be launched."""
    return type(q) is not Tensor and not torch.compiler.is_compiling()


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, extent: Tensor, rows: int, kernel: str
) -> tuple[Tensor, Tensor]:
    """Causal attention within documents, (N, H, C), and the logarithm of each softmax's denominator, (H, N).

    q is (N, H, C), k and v are (N, G, C): the documents of all `rows` rows end to end. `offsets` (N + 1,) int32 on the
    device has where each begins and the last one ends, then anything; `extent` (2,) on the host has their number and
    the tokens of the longest.
    """
    out, lse = _kernel(kernel, extent, rows).forward(q, k, v, _used(offsets, extent), extent)
    assert lse.numel() == q.shape[0] * q.shape[1], f"one denominator for each query and head, not {lse.shape}"
    return out.contiguous(), lse.reshape(q.shape[1], q.shape[0]).contiguous()


# In a compiled block an operator of its own reads number and length when it runs; handed to PyTorch's varlen_attn they
# would be part of the program. Elsewhere it would only cost: some time at each call, and a second at the first.
document_attention = library.custom_op("sft::document_attention", forward_pass, mutates_args=())


@document_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, extent: Tensor, rows: int, kernel: str
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


def backward_pass(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    extent: Tensor,
    rows: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each of its shape; the other arguments are those and the results of the forward pass."""
    backward = _kernel(kernel, extent, rows).backward
    of_q, of_k, of_v = backward(grad.contiguous(), q, k, v, out, lse, _used(offsets, extent), extent)
    return of_q.contiguous(), of_k.contiguous(), of_v.contiguous()


document_attention_backward = library.custom_op("sft::document_attention_backward", backward_pass, mutates_args=())


@document_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets, extent, ctx.rows, ctx.kernel = inputs
    ctx.save_for_backward(q, k, v, *output, offsets, extent)


def _gradients(ctx: Any, grad: Tensor, _of_lse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = document_attention_backward(grad, *ctx.saved_tensors, ctx.rows, ctx.kernel)
    return (*gradients, None, None, None, None)


document_attention.register_autograd(_gradients, setup_context=_keep)


class DocumentAttention(torch.autograd.Function):
    """forward_pass without its denominators, and backward_pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out, lse = forward_pass(*inputs)
        _keep(ctx, inputs, (out, lse))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, offsets, extent = ctx.saved_tensors
        gradients = backward_pass(grad, q, k, v, out, lse, offsets, extent, ctx.rows, ctx.kernel)
        return (*gradients, None, None, None, None)


class Kernel(NamedTuple):
    """forward(q, k, v, offsets, extent) gives the mixed values (N, H, C) and N * H denominators; backward(grad, q, k,
    v, out, lse, offsets, extent) the gradients of q, k and v."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _kernel(name: str, extent: Tensor, rows: int) -> Kernel:
    if name == "varlen_whole_rows":  # no row is without a document
        name = "whole_rows" if int(extent[0]) == rows else "varlen"
    return KERNELS[name]


def _used(offsets: Tensor, extent: Tensor) -> Tensor:
    """The offsets that belong to documents."""
    return offsets[: int(extent[0]) + 1]


# The kernels are those that torch.nn.attention.varlen and scaled_dot_product_attention call, by the names that PyTorch
# 2.10 to 2.13 have for them; none repeats keys. FlashAttention 3 and 4 take the place of varlen's when activated.


def _varlen_forward(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    longest = int(extent[1])
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest, 0.0, True, False, scale=None
    )
    return out, lse


def _varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, extent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    longest = int(extent[1])
    state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    unused = torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, offsets, offsets, longest, longest, 0.0, True, state, unused, scale=None
    )


def _whole_rows_forward(q: Tensor, k: Tensor, v: Tensor, _offsets: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    """Each row is one document: cuDNN's kernel for equal lengths."""
    in_rows = (_in_rows(x, int(extent[0])) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*in_rows, None, True, 0.0, True, False)
    return out.transpose(1, 2).reshape(q.shape), lse


def _whole_rows_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, _offsets: Tensor, extent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, T = extent.tolist()
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, which there is none of
    of_q, of_k, of_v = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(_in_rows(x, rows) for x in (grad, q, k, v, out)), lse.view(rows, -1, T, 1), seed, seed, None, None, None,
        T, T, 0.0, True
    )  # fmt: skip
    return tuple(x.transpose(1, 2).flatten(0, 1) for x in (of_q, of_k, of_v))


def _in_rows(x: Tensor, rows: int) -> Tensor:
    """(N, heads, C) as (B, heads, T, C), without a copy."""
    return x.unflatten(0, (rows, -1)).transpose(1, 2)


def _by_document_forward(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, _extent: Tensor) -> tuple[Tensor, Tensor]:
    """One document after the other, on a CPU: the work follows their lengths."""
    mixed, denominators = [], []
    for query, key, value in _documents_of(offsets, q, k, v):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)
        mixed.append(out[0].transpose(0, 1))
        denominators.append(lse[0])  # (H, L)
    return torch.cat(mixed), torch.cat(denominators, dim=1)


def _by_document_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, _extent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = []
    for *of_one, denominators in _documents_of(offsets, grad, q, k, v, out, lse.T[:, :, None]):
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients.append([x[0].transpose(0, 1) for x in backward(*of_one, denominators[..., 0], 0.0, True)])
    return tuple(torch.cat(pieces) for pieces in zip(*gradients, strict=True))  # type: ignore[return-value]


def _documents_of(offsets: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of each document its part (1, heads, L, C) of every (N, heads, C)."""
    lengths = offsets.diff().tolist()
    for pieces in zip(*(x.split(lengths) for x in tensors), strict=True):
        yield tuple(piece.transpose(0, 1)[None] for piece in pieces)


KERNELS = {
    "by_document": Kernel(_by_document_forward, _by_document_backward),
    "varlen": Kernel(_varlen_forward, _varlen_backward),
    "whole_rows": Kernel(_whole_rows_forward, _whole_rows_backward),
}


def document_block_mask(ids: Tensor) -> BlockMask:
    """Which blocks of scores FlexAttention computes for rows of documents `ids` (B, T), found without waiting for them.

    Ids rise along a row, so that two blocks share a document exactly where the ranges of their ids meet.
    """
    from torch.nn.attention.flex_attention import BlockMask

    T = ids.shape[1]
    blocks = -(-T // FLEX_BLOCK)
    first = ids[:, ::FLEX_BLOCK]  # (B, blocks)
    ends = torch.arange(1, blocks + 1, device=ids.device) * FLEX_BLOCK - 1
    last = ids[:, ends.clamp(max=T - 1)]
    before = torch.ones(blocks, blocks, dtype=torch.bool, device=ids.device).tril(-1)
    diagonal = torch.eye(blocks, dtype=torch.bool, device=ids.device)
    # Rows are blocks of queries, columns blocks of keys; a block of one document is seen whole by later ones of it.
    shared = (first[:, :, None] <= last[:, None, :]) & before
    whole = (last[:, :, None] == first[:, None, :]) & before
    return BlockMask.from_kv_blocks(
        *_listed((shared & ~whole) | diagonal),
        *_listed(whole),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=_within_documents(ids),
        seq_lengths=(T, T),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, blocks) how many columns of each row are chosen, and (B, 1, blocks, blocks) which, these first."""
    order = chosen.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def _within_documents(ids: Tensor) -> Any:
    def seen(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (ids[b, q] == ids[b, k]) & (q >= k)

    return seen


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """(B, H, T, C): FlexAttention under a block mask; q is (B, H, T, C), k and v are (B, G, T, C)."""
    from torch.nn.attention.flex_attention import flex_attention

    # Outside a compiled block it would compute every score, and keep it.
    attend = flex_attention if torch.compiler.is_compiling() or not q.is_cuda else _compiled_flex_attention()
    return attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
