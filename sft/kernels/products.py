"""Matrix products of half precision whose sums are fp32, those over many calls too."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sft.linear import onednn, takes_onednn

HALF = (torch.bfloat16, torch.float16)
CPU_SUM = 2**13  # terms of a sum at once
CPU_ROWS = 2**11  # of a bf16 product at once


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: fp32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, a sum over the vocabulary that should not be one long one in its own dtype.

    On CUDA half precision gives fp32, since cuBLAS may add parts of a sum in the dtype of the result. On the CPU parts
    are added: BLAS goes from end to end, which costs 2e-4 instead of 3e-6 in a sum of 151,936.
    """
    if a.is_cuda:
        if a.dtype in HALF and half_precision_adds(a.device, a.dtype) is not add_widened:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a, b)
    if takes_onednn(a, b.t()):  # which adds parts, too
        return onednn(a, b.t())
    total = torch.mm(a[:, :CPU_SUM], b[:CPU_SUM]).to(accumulation_dtype(a.dtype))
    for start in range(CPU_SUM, a.shape[1], CPU_SUM):
        total += torch.mm(a[:, start : start + CPU_SUM], b[start : start + CPU_SUM])  # addmm would go on from the total
    return total


def add_product(total: Tensor, g: Tensor, h: Tensor, *, first: bool) -> None:
    """total (V, D) += g' h, or = where it is the first; in the dtype of total, which may be wider."""
    if total.dtype != g.dtype:
        if g.is_cuda:
            half_precision_adds(g.device, g.dtype)(total, g.t(), h, first)
        elif g.dtype == torch.bfloat16:
            add_rounded(total, g.t(), h, first)
        else:
            add_widened(total, g.t(), h, first)
    elif first:
        torch.mm(g.t(), h, out=total)
    else:
        torch.addmm(total, g.t(), h, out=total)


def add_in_epilogue(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """cuBLAS reads half precision and adds to the fp32 total as it writes: no pass over V x D of its own."""
    if first:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)


def add_apart(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    partial = torch.mm(a, b, out_dtype=torch.float32)
    total.copy_(partial) if first else total.add_(partial)


def add_widened(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1, out=total)


def add_rounded(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """For CPUs, which have bf16 products with bf16 results alone: a third of the time of fp32 ones, and one rounding.

    A few rows at once, whose product is still in the cache when it is added.
    """
    for rows in range(0, len(total), CPU_ROWS):
        part = slice(rows, rows + CPU_ROWS)
        partial = torch.mm(a[part], b)
        total[part].copy_(partial) if first else total[part].add_(partial)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was lacking: says nothing about what works."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


SLOWER: dict[Callable[[Tensor, Tensor, Tensor, bool], None], str] = {
    add_apart: "each chunk's weight gradient is added in a pass of its own, since cuBLAS does not add it here",
    add_widened: "the weight gradient's products are fp32, since those of half precision do not work here",
}


def slower_addition(device: torch.device, dtype: torch.dtype) -> str | None:
    """How the weight gradient's products are added up here, in words, unless it is the fast way."""
    if dtype not in HALF or device.type != "cuda" or not torch.cuda.is_available():
        return None
    return SLOWER.get(half_precision_adds(device, dtype))


@functools.cache
def half_precision_adds(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor, bool], None]:
    """How to add a product in half precision to an fp32 total: the fastest way that works here, tried once."""
    synchronous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        a = torch.arange(64 * 32, device=device).reshape(32, 64).remainder(7).to(dtype).t()  # as g' is laid out
        b = torch.arange(32 * 48, device=device).reshape(32, 48).remainder(5).to(dtype)
        expected = a.float().cpu() @ b.float().cpu()
        for add in (add_in_epilogue, add_apart):
            total = torch.full((64, 48), float("nan"), device=device)
            try:
                add(total, a, b, True)
                add(total, a, b, False)
            except (RuntimeError, AttributeError, TypeError) as error:  # refused, no such overload, no out_dtype
                if is_out_of_memory(error):
                    raise
                continue
            if torch.equal(total.cpu(), 2 * expected):  # small whole numbers: exact in any order
                return add
        return add_widened
    finally:
        torch.cuda.set_sync_debug_mode(synchronous)
