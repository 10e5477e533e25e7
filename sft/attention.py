"""Causal attention within each document of a packed row: one function, and what it needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

# Shapes: B rows, T tokens that ask, S positions that may be seen, H query heads, G key heads, C head size.


@dataclass(frozen=True, eq=False)
class Documents:
    """Which document each position of a row belongs to, with what follows from it computed once for all layers.

    Equal ids are contiguous in a row; padding at a row's end is a document of its own, so that every position sees
    at least itself and no softmax is empty.
    """

    ids: Tensor  # (B, S) whole numbers
    queries: int | None = None  # only the last so many positions ask, the others are in a cache; None = all

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, T, S): True where the query may look, at its own document up to itself."""
        S = self.ids.shape[1]
        T = S if self.queries is None else self.queries
        slots = torch.arange(S, device=self.ids.device)
        causal = slots[S - T :, None] >= slots
        same = self.ids[:, S - T :, None] == self.ids[:, None, :]
        return (same & causal)[:, None]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document, row after row; they are read from the ids, which on a GPU would be waited for."""
        begins = torch.ones_like(self.ids, dtype=torch.bool)
        begins[:, 1:] = self.ids[:, 1:] != self.ids[:, :-1]
        starts = begins.flatten().nonzero()[:, 0]
        return torch.diff(starts, append=starts.new_tensor([self.ids.numel()])).tolist()

    def prepare(self, *, compiled: bool = False) -> None:
        """Compute what the layers share now: inside torch.compile the first access would break the graph."""
        _ = self.mask if compiled or not self.one_by_one else self.lengths

    @property
    def one_by_one(self) -> bool:
        """Whether attention goes through the documents one after the other: on a CPU, where that costs no launches."""
        return self.ids.device.type == "cpu" and self.queries is None and not torch.compiler.is_compiling()

    @cached_property
    def positions(self) -> Tensor:
        """(B, T): each asking token's place in its own document, from 0."""
        B, S = self.ids.shape
        slots = torch.arange(S, device=self.ids.device).expand(B, S)
        begins = torch.ones_like(self.ids, dtype=torch.bool)
        begins[:, 1:] = self.ids[:, 1:] != self.ids[:, :-1]
        first = torch.where(begins, slots, 0).cummax(dim=1).values
        return (slots - first)[:, S - (self.queries or S) :]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, documents: Documents | None, dropout: float) -> Tensor:
    """(B, H, T, C): for each query the mix of the values it may see, scores scaled by 1 / sqrt(C).

    q is (B, H, T, C), k and v are (B, G, S, C) with H a multiple of G; query head h uses key head h // (H / G). The
    queries are the last T of the S positions. A query sees its own document up to itself; None = a row is one document.
    """
    T, S = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    if documents is not None and documents.one_by_one:
        return attention_by_document(q, k, v, documents.lengths, dropout=dropout)
    if documents is not None:
        mask: Tensor | None = documents.mask
    else:
        mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask is not None and q.is_cuda and group > 1:
        # The only CUDA kernel that takes a mask without writing T x S scores takes no groups of query heads.
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        group = 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and T > 1, enable_gqa=group > 1
    )


def attention_by_document(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], *, dropout: float) -> Tensor:
    """The same with the documents of all rows one after the other: the work follows their lengths, without a mask."""
    B, H, T, C = q.shape
    # No document crosses rows, so that the rows are one long row.
    pieces = (x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q, k, v))  # each (L, heads, C)
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
