"""Causal attention within each document of a packed row: one function, its definition, and what it needs to know."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sft import attention_backends

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Shapes: B rows, T tokens that ask, S positions that may be seen, H query heads, G key heads, C head size.

# sdpa is PyTorch's scaled_dot_product_attention, on a CPU document by document, on a GPU under a mask; varlen is
# FlashAttention, varlen_whole_rows the same beside cuDNN where each row is one document.
BackEnd = Literal["definition", "sdpa", "varlen", "varlen_whole_rows", "flex"]


@dataclass(frozen=True, eq=False)
class Spans:
    """Where the documents of a batch lie when its rows are laid end to end. N = B * S positions."""

    lengths: Sequence[int]  # tokens of each document, row after row
    offsets: Tensor  # (N + 1,) int32 on the device: where each begins and the last one ends, then N
    extent: Tensor  # (2,) int32 on the host: the number of documents, the tokens of the longest


def spans_of(lengths: Sequence[int], place: Callable[[NDArray[np.int32]], Tensor]) -> Spans:
    """The spans of documents of these lengths; `place` brings an array to the device."""
    total = sum(lengths)
    offsets = np.full(total + 1, total, dtype=np.int32)
    offsets[0] = 0
    offsets[1 : len(lengths) + 1] = np.cumsum(lengths)
    extent = torch.tensor([len(lengths), max(lengths)], dtype=torch.int32)
    return Spans(lengths, place(offsets), extent)


@dataclass(frozen=True, eq=False)
class Documents:
    """Which document each position of a row belongs to, with what follows from it computed once for all layers.

    Equal ids are contiguous in a row and rise; padding at a row's end is a document of its own, so that every position
    sees at least itself and no softmax is empty.
    """

    ids: Tensor  # (B, S) whole numbers
    queries: int | None = None  # only the last so many positions ask, the others are in a cache; None = all
    known_spans: Spans | None = None  # where whoever made the ids has them, so that nothing waits for the device
    window: int | None = None  # a query sees so many positions at most, its own included; None = all before it
    ends: Tensor | None = None  # (B,): where the padding of each row begins; None = nothing is known of any

    @classmethod
    def of_lengths(
        cls, rows: Sequence[Sequence[int]], *, block_size: int, place: Callable[[NDArray[np.int32]], Tensor]
    ) -> Documents:
        """Documents of these lengths in rows of block_size positions; what they leave of a row is one more."""
        filled = [[*row, block_size - sum(row)] if sum(row) < block_size else list(row) for row in rows]
        ids = np.stack([np.repeat(np.arange(len(row), dtype=np.int32), row) for row in filled])
        ends = place(np.array([sum(row) for row in rows], dtype=np.int32))
        return cls(place(ids), known_spans=spans_of([length for row in filled for length in row], place), ends=ends)

    def within(self, window: int | None) -> Documents:
        """The same under a sliding window: the very same where no document is longer than it."""
        if window is None or self.ids.shape[1] <= window:
            return self
        if self.queries is None and int(self.spans.extent[1]) <= window:
            return self
        return dataclasses.replace(self, window=window)

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, T, S): True where the query may look, at its own document up to itself."""
        S = self.ids.shape[1]
        T = S if self.queries is None else self.queries
        slots = torch.arange(S, device=self.ids.device)
        causal = slots[S - T :, None] >= slots
        if self.window is not None:
            causal = causal & (slots[S - T :, None] - slots < self.window)
        same = self.ids[:, S - T :, None] == self.ids[:, None, :]
        return (same & causal)[:, None]

    @cached_property
    def real(self) -> Tensor | None:
        """(B, S): False for padding; None where nothing is known of any."""
        if self.ends is None:
            return None
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.ends[:, None]

    @cached_property
    def spans(self) -> Spans:
        """Where the documents lie; read from the ids where nobody knew, which on a GPU is waited for."""
        if self.known_spans is not None:
            return self.known_spans
        begins = torch.ones_like(self.ids, dtype=torch.bool)
        begins[:, 1:] = self.ids[:, 1:] != self.ids[:, :-1]
        starts = begins.flatten().nonzero()[:, 0]
        lengths = torch.diff(starts, append=starts.new_tensor([self.ids.numel()])).tolist()
        return spans_of(lengths, lambda array: torch.from_numpy(array).to(self.ids.device))

    @cached_property
    def block_mask(self) -> BlockMask:
        """What FlexAttention needs to leave out the blocks of scores that no document has."""
        return attention_backends.document_block_mask(self.ids)

    def prepare(self, back_end: BackEnd, *, dropout: float = 0.0, compiled: bool = False, routed: bool = False) -> None:
        """Compute what the layers share now: inside torch.compile the first access would break the graph."""
        if routed:  # to experts, but not what is padding
            _ = self.real
        way = self.way(back_end, dropout=dropout, compiled=compiled)
        if way == "flex":
            _ = self.block_mask
        elif way in ("mask", "definition"):
            _ = self.mask
        else:
            _ = self.spans

    def way(self, back_end: BackEnd, *, dropout: float, compiled: bool) -> str:
        """How a back end computes attention for these documents: a kernel of attention_backends, or another word."""
        if back_end == "definition":
            return back_end
        if self.queries is not None or self.window is not None:
            return "mask"
        if back_end != "sdpa":
            assert dropout == 0.0, f"attention={back_end} has no dropout"
            return back_end
        if self.ids.is_cuda or (dropout > 0 and compiled):
            return "mask"
        return "one by one" if dropout > 0 else "by_document"

    @cached_property
    def positions(self) -> Tensor:
        """(B, T): each asking token's place in its own document, from 0."""
        B, S = self.ids.shape
        slots = torch.arange(S, device=self.ids.device).expand(B, S)
        begins = torch.ones_like(self.ids, dtype=torch.bool)
        begins[:, 1:] = self.ids[:, 1:] != self.ids[:, :-1]
        first = torch.where(begins, slots, 0).cummax(dim=1).values
        return (slots - first)[:, S - (self.queries or S) :]


def under_window(documents: Documents | None, ids: Tensor, window: int | None, *, past: int) -> Documents | None:
    """The documents of rows of ids (B, T), behind `past` positions in a cache, as a layer with this window sees them.

    documents None = each row is one, which the result is, too, where the window is too wide to matter.
    """
    B, T = ids.shape
    if documents is None and window is not None and window < past + T:
        one = torch.zeros(B, past + T, dtype=torch.int32, device=ids.device)
        documents = Documents(one, queries=T if past else None)
    return None if documents is None else documents.within(window)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, documents: Documents | None, dropout: float, back_end: BackEnd = "sdpa"
) -> Tensor:
    """(B, H, T, C): for each query the mix of the values it may see, scores scaled by 1 / sqrt(C).

    q is (B, H, T, C), k and v are (B, G, S, C) with H a multiple of G; query head h uses key head h // (H / G). The
    queries are the last T of the S positions. A query sees its own document up to itself; None = a row is one document.
    Rows without documents, and queries whose keys are in a cache, go to PyTorch's own attention whatever the back end.
    """
    if documents is None:
        T, S = q.shape[2], k.shape[2]
        mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return attention_under_a_mask(q, k, v, mask, dropout=dropout)
    way = documents.way(back_end, dropout=dropout, compiled=torch.compiler.is_compiling())
    if way == "definition":
        return attention_by_definition(q, k, v, documents.mask, dropout=dropout)
    if way == "mask":
        return attention_under_a_mask(q, k, v, documents.mask, dropout=dropout)
    if way == "one by one":
        return attention_one_by_one(q, k, v, documents.spans.lengths, dropout=dropout)
    if way == "flex" and not attention_backends.is_without_content(q):
        return attention_backends.flex(q, k, v, documents.block_mask)
    B, H, T, C = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (N, heads, C): no document crosses rows
    spans = documents.spans
    mixed = attention_backends.attend(q, k, v, spans.offsets, spans.extent, B, way)
    return mixed.view(B, T, H, C).transpose(1, 2)


def attention_by_definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, dropout: float = 0.0) -> Tensor:
    """What every back end is to equal: softmax(q k^T / sqrt(C)) v over what the mask lets a query see, in at least
    fp32."""
    group, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = q.to(wide), *(x.to(wide).repeat_interleave(group, dim=1) for x in (k, v))
        scores = queries @ keys.transpose(2, 3) / math.sqrt(q.shape[3])  # (B, H, T, S)
        shares = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)
        return (F.dropout(shares, dropout) @ values).to(q.dtype)


def attention_under_a_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float) -> Tensor:
    """The same by PyTorch's attention; None = causal. Its cost follows the square of the row."""
    group, causal = q.shape[1] // k.shape[1], mask is None and q.shape[2] > 1
    if mask is not None and q.is_cuda and group > 1:
        # The only CUDA kernel that takes a mask without writing T x S scores takes no groups of query heads: one call
        # for each query head of the groups repeats no keys.
        heads = q.unflatten(1, (-1, group)).unbind(2)  # each (B, G, T, C)
        mixed = [F.scaled_dot_product_attention(head, k, v, attn_mask=mask, dropout_p=dropout) for head in heads]
        return torch.stack(mixed, dim=2).flatten(1, 2)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=group > 1
    )


def attention_one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, dropout: float) -> Tensor:
    """The same on a CPU with dropout, which the kernel of attention_backends has not."""
    B, H, T, C = q.shape
    pieces = (x.transpose(1, 2).flatten(0, 1).split(list(lengths)) for x in (q, k, v))  # each (L, heads, C)
    mixed = []
    for of_one in zip(*pieces, strict=True):
        query, key, value = (piece.transpose(0, 1)[None] for piece in of_one)
        seen = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=k.shape[1] != H
        )
        mixed.append(seen[0].transpose(0, 1))
    return torch.cat(mixed).view(B, T, H, C).transpose(1, 2)


class KeyValueCache:
    """The keys and values that one layer has computed so far, so that a new token attends to them for free."""

    def __init__(self) -> None:
        self.length = 0  # positions held
        self._held: Tensor | None = None  # (2, B, G, capacity, C), keys then values

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values (B, G, S, C) once those of T new positions are added."""
        end = self.length + k.shape[2]
        if self._held is None or end > self._held.shape[3]:
            B, G, _, C = k.shape
            roomier = k.new_empty(2, B, G, 2 * end, C)  # doubling: a token is copied a constant number of times
            if self._held is not None:
                roomier[:, :, :, : self.length] = self._held[:, :, :, : self.length]
            self._held = roomier
        self._held[0, :, :, self.length : end] = k
        self._held[1, :, :, self.length : end] = v
        self.length = end
        return self._held[0, :, :, :end], self._held[1, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Forget every row but these."""
        if self._held is not None:
            self._held = self._held[:, rows]
