"""Whether a base knows the tokens that open and end a turn, by the lengths of their rows; and what to do if not.

A row that pre-training never saw keeps the length that it was made with, or is worn down by weight decay, while those
of other tokens grow alike: its length tells an untrained token (Land and Bartolo, arXiv:2405.05417). By the reports
beside that paper (github.com/cohere-ai/magikarp) the embeddings of Qwen2.5-7B have lengths, from the mean of unused
rows, of 0.79 +- 0.21, and those of tokens that it cannot repeat are below 0.085; for Qwen3-32B 1.28 +- 0.31, and 0.18.
So a quarter of the median is three deviations below it, and about twice what an untrained row has. Concerned are
Qwen-7B and Qwen-14B, whose pre-training knew <|endoftext|> alone (their authors: github.com/QwenLM/Qwen/issues/158 and
622), and any base whose vocabulary has to grow. Untrained rows of a usual length are not found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

STRANGE = 4.0  # times the median, or this part of it
UntrainedRows = Literal["keep", "mean"]


class Row(NamedTuple):
    """A control token's row that is out of the ordinary."""

    token: str
    part: str  # embedding or head
    length: float
    median: float  # over all tokens of the tokenizer


def control_tokens(meta: Mapping[str, Any]) -> dict[str, int]:
    """The tokens that every prepared conversation has, and their ids."""
    return {"<|im_start|>": meta["im_start_id"], "<|im_end|>": meta["im_end_id"]}


def parts_of(model: Any) -> dict[str, Tensor]:
    """The matrices (V, D) with a row for each token; a tied head is the embedding."""
    embedding, head = model.token_embeddings.weight, model.head_weight
    return {"embedding": embedding} if head is embedding else {"embedding": embedding, "head": head}


@torch.no_grad()
def strange_rows(model: Any, meta: Mapping[str, Any]) -> list[Row]:
    """The rows of control tokens that are far shorter or longer than the median of all tokens' rows.

    `meta` is the prepared data's. Rows beyond the tokenizer's ids, which belong to no token, do not count.
    """
    found = []
    for part, weight in parts_of(model).items():
        rows = weight[: meta["vocab_size"]]
        wide = torch.promote_types(rows.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=wide)
        median = float(lengths.median())
        for token, i in control_tokens(meta).items():
            if not median / STRANGE <= float(lengths[i]) <= median * STRANGE:
                found.append(Row(token, part, float(lengths[i]), median))
    return found


@torch.no_grad()
def begin_with_mean(model: Any, meta: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Give each of these rows the mean of the rows of all tokens that are no control tokens."""
    ids = control_tokens(meta)
    for part, weight in parts_of(model).items():
        wide = torch.promote_types(weight.dtype, torch.float32)
        others = torch.ones(meta["vocab_size"], dtype=torch.bool, device=weight.device)
        others[list(ids.values())] = False
        mean = weight[: meta["vocab_size"]][others].mean(dim=0, dtype=wide)
        for row in rows:
            if row.part == part:
                weight[ids[row.token]] = mean.to(weight.dtype)


def told(rows: Sequence[Row], *, source: str, begins_with_mean: bool, are_trained: bool) -> str:
    """What is found and what can be done, in a sentence."""
    which = ", ".join(f"{row.part} of {row.token} ({row.length:.3g}, the median is {row.median:.3g})" for row in rows)
    sentence = f"{source} seems not to know the tokens of a conversation, by the lengths of their rows: {which}; "
    if begins_with_mean:
        return sentence + "they begin as the mean of all others"
    other = "another base knows them, as the chat variant of this one may"
    if are_trained:
        return (
            sentence + f"they are trained from there; --untrained_rows=mean begins with the mean of all others; {other}"
        )
    return sentence + f"they are not trained either, so answers may not end; --train_embeddings trains them; {other}"
