"""Answers from a model: batched generation with a KV cache, greedy or sampled, until a stop id."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.attention import Documents, KeyValueCache
from sft.errors import listed

# Shapes: B rows, T tokens of the longest prompt, S positions in the cache, V vocabulary.


class GeneratingModel(Protocol):
    """What generation needs of a model object."""

    training: bool

    @property
    def head_weight(self) -> Tensor: ...
    @property
    def position_limit(self) -> int | None: ...
    def new_cache(self) -> list[KeyValueCache]: ...
    def hidden_states(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        cache: Sequence[KeyValueCache] | None = None,
    ) -> Tensor: ...
    def train(self, mode: bool = True) -> Any: ...


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt."""

    ids: list[int]  # without the stop id
    stopped: bool  # by a stop id, rather than by a limit
    out_of_positions: bool = False  # the limit was the model's learned positions, not max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen: the likeliest without a temperature, else drawn."""

    temperature: float | None = None  # logits are divided by it; None = greedy
    top_k: int | None = None  # draw among the k likeliest
    top_p: float | None = None  # draw among the likeliest that together reach this probability

    def __post_init__(self) -> None:
        assert self.temperature is None or self.temperature > 0, "greedy is temperature None"
        assert self.top_k is None or self.top_k >= 1
        assert self.top_p is None or 0 < self.top_p <= 1

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """One id (B,) for each row of logits (B, V); uniform (B,), in [0, 1), is all the chance there is."""
        if self.temperature is None:
            return logits.argmax(dim=-1)
        scores, candidates = logits.float() / self.temperature, None
        if self.top_k is not None:
            scores, candidates = scores.topk(min(self.top_k, scores.shape[-1]))
        elif self.top_p is not None:
            scores, candidates = scores.sort(dim=-1, descending=True)
        shares = scores.softmax(dim=-1)
        if self.top_p is not None:
            shares = shares.where(shares.cumsum(dim=-1) - shares < self.top_p, 0.0)  # the first always stays
        reached = shares.double().cumsum(dim=-1)
        point = uniform.to(reached)[:, None] * reached[:, -1:]
        chosen = torch.searchsorted(reached, point, right=True).clamp(max=reached.shape[-1] - 1)
        return (chosen if candidates is None else candidates.gather(-1, chosen))[:, 0]


def generate(
    model: GeneratingModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    rows_at_once: int = 128,
) -> list[Generation]:
    """An answer to each prompt, in the prompts' order.

    The chance of each prompt's each token is fixed by the seed and the number of prompts, whatever is batched with it.
    Raises UserError for a prompt beyond the model's learned positions.
    """
    _check_lengths(model, prompts)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    chance = _chance(max_new_tokens, len(prompts), seed)
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: little padding
    for start in range(0, len(prompts), rows_at_once):
        chosen = by_length[start : start + rows_at_once]
        for rows, tokens in _decode(
            model,
            [prompts[i] for i in chosen],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampling=sampling,
            chance=chance[:, chosen],
        ):
            for row, token in zip(rows, tokens, strict=True):
                answers[chosen[row]].append(token)
    return [
        _generation(model, prompt, ids, max_new_tokens, stop_ids) for prompt, ids in zip(prompts, answers, strict=True)
    ]


def stream(
    model: GeneratingModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """The ids that generate gives for this one prompt, each as soon as it is chosen; a stop id, which ends it, too."""
    _check_lengths(model, [prompt])
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    chance = _chance(max_new_tokens, 1, seed)
    for _, tokens in _decode(
        model, [prompt], max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling, chance=chance
    ):
        yield tokens[0]


def _chance(steps: int, rows: int, seed: int) -> Tensor:
    """Uniform numbers (steps, rows), drawn apart from the global generator, which training uses."""
    return torch.rand((steps, rows), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _check_lengths(model: GeneratingModel, prompts: Sequence[Sequence[int]]) -> None:
    assert all(len(prompt) > 0 for prompt in prompts), "a prompt has at least one token"
    limit = model.position_limit
    if too_long := [len(prompt) for prompt in prompts if limit is not None and len(prompt) > limit]:
        raise listed(f"the model has {limit} positions:", [f"a prompt has {count} tokens" for count in too_long])


def _room(model: GeneratingModel, prompt: Sequence[int], max_new_tokens: int) -> int:
    """How many tokens may follow a prompt; the last of them needs no position, since nothing is read from it."""
    limit = model.position_limit
    return max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt) + 1)


def _generation(
    model: GeneratingModel, prompt: Sequence[int], ids: list[int], max_new_tokens: int, stop_ids: Collection[int]
) -> Generation:
    if ids and ids[-1] in stop_ids:
        return Generation(ids[:-1], stopped=True)
    return Generation(ids, stopped=False, out_of_positions=_room(model, prompt, max_new_tokens) < max_new_tokens)


@torch.inference_mode()
def _decode(
    model: GeneratingModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling,
    chance: Tensor,
) -> Iterator[tuple[list[int], list[int]]]:
    """At each step the prompts that still speak and what each says next."""
    room = [_room(model, prompt, max_new_tokens) for prompt in prompts]
    was_training = model.training
    model.train(False)
    try:
        batch = _Speaking(model, prompts)
        hidden = batch.read_prompts()
        for step in range(max_new_tokens):
            tokens = sampling.choose(F.linear(hidden, model.head_weight), chance[step, batch.rows])
            said = tokens.tolist()
            yield batch.rows, said
            going = [i for i, token in enumerate(said) if token not in stop_ids and step + 1 < room[batch.rows[i]]]
            if not going:
                break
            if len(going) < len(said):  # who has stopped costs nothing more
                tokens = tokens[going]
                batch.keep(going)
            hidden = batch.read(tokens)
    finally:
        model.train(was_training)


class _Speaking:
    """The rows of a batch that go on, with what the model remembers of them.

    Prompts end in the same column, so that what follows shares columns; what pads them before is another document.
    """

    def __init__(self, model: GeneratingModel, prompts: Sequence[Sequence[int]]):
        self.model, self.cache, self.rows = model, model.new_cache(), list(range(len(prompts)))
        device, longest = model.head_weight.device, max(map(len, prompts))
        self.prompts = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.padded = len({len(prompt) for prompt in prompts}) > 1
        self.documents = (torch.arange(longest, device=device) >= longest - self.lengths[:, None]).int()  # (B, S)

    def read_prompts(self) -> Tensor:
        """The state (B, D) after each prompt."""
        documents = Documents(self.documents) if self.padded else None
        return self.model.hidden_states(self.prompts, documents=documents, cache=self.cache)[:, -1]

    def read(self, tokens: Tensor) -> Tensor:
        """The state (B, D) after one more token (B,) of each row."""
        positions = self.lengths[:, None]
        self.lengths = self.lengths + 1
        self.documents = F.pad(self.documents, (0, 1), value=1)
        documents = Documents(self.documents, queries=1) if self.padded else None
        return self.model.hidden_states(tokens[:, None], positions, documents, self.cache)[:, -1]

    def keep(self, going: list[int]) -> None:
        """Forget every row but these."""
        kept = torch.tensor(going, device=self.lengths.device)
        self.rows = [self.rows[i] for i in going]
        self.lengths, self.documents = self.lengths[kept], self.documents[kept]
        for layer in self.cache:
            layer.keep(kept)
