"""Hidden states, a head and labels whose logits are as peaked as a language model's, and what the definition makes of
them.

The recipe. The head's rows are random and of length about 1. A token has eight candidates, one from each eighth of the
logarithmic scale of ids, so that small ids are common, as words are. Its hidden state is the sum of the candidates'
rows, each times the logit that it shall have, and of noise that gives all other ids normal logits with standard
deviation 2. The logit of the first candidate lies above the log-sum-exp of that background by a normal margin (mean 4,
standard deviation 2), the next ones follow at exponential distances (mean 1.2). Labels are drawn from the softmax
itself, so that the mean loss is its mean entropy: about 1.5 nats, with a most likely token of probability 0.65 on
average. Random logits would be nearly flat and flatter whatever skips small probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.batches import bucket
from sft.kernels.reference import masked_cross_entropy, masked_linear_cross_entropy
from sft.samples import NOT_TRAINED

CANDIDATES = 8
BACKGROUND = 2.0  # standard deviation of the logits of everything that is no candidate
MARGIN, MARGIN_SPREAD = 4.0, 2.0
DISTANCE = 1.2
ROWS_AT_ONCE = 1024  # of logits in fp32: 0.6 GB with Qwen3's vocabulary


class Draw(NamedTuple):
    """One batch of N tokens, n of them trained."""

    hidden: Tensor  # (N, D)
    labels: Tensor  # (N,) int64, -100 where not trained
    rows: Tensor  # (n, on a GPU filled up to a bucket as in a batch) int64: the trained tokens
    row_labels: Tensor  # the same length: their labels, -100 in the filling
    trained: int


class Pool(NamedTuple):
    """Several batches of hidden states of which every token has a label, under one head."""

    head: Tensor  # (V, D)
    hidden: list[Tensor]  # each (N, D)
    labels: list[Tensor]  # each (N,)
    entropy: float  # of the predicted distribution in nats, the mean over the first batch
    top_probability: float  # of the most likely token, the mean over the first batch


def make_head(vocabulary: int, hidden_size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    head = torch.randn(vocabulary, hidden_size, generator=generator, device=device) / math.sqrt(hidden_size)
    return head.to(dtype)


def make_hidden(head: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """Hidden states (N, D) whose logits follow the recipe of this file."""
    vocabulary, hidden_size = head.shape
    on = {"generator": generator, "device": head.device}
    stretches = torch.rand(tokens, CANDIDATES, **on).argsort(dim=1)
    places = (stretches + torch.rand(tokens, CANDIDATES, **on)) / CANDIDATES
    ids = (vocabulary**places).long().clamp_(max=vocabulary - 1)  # (N, K)
    distances = torch.empty(tokens, CANDIDATES - 1, device=head.device)
    distances = F.pad(distances.exponential_(1 / DISTANCE, generator=generator), (1, 0)).cumsum(dim=1)
    margins = MARGIN + MARGIN_SPREAD * torch.randn(tokens, 1, **on)
    logits = math.log(vocabulary) + BACKGROUND**2 / 2 + margins - distances  # (N, K)
    hidden = torch.zeros(tokens, hidden_size, device=head.device)
    for k in range(CANDIDATES):
        hidden += logits[:, k : k + 1] * head[ids[:, k]].float()
    noise = (BACKGROUND**2 - logits.square().sum(dim=1, keepdim=True) / hidden_size).clamp_(min=0).sqrt()
    return (hidden + noise * torch.randn(tokens, hidden_size, **on)).to(head.dtype)


def sample_labels(head: Tensor, hidden: Tensor, generator: torch.Generator) -> tuple[Tensor, float, float]:
    """Labels (N,) drawn from softmax(hidden @ head.T); its mean entropy and its mean greatest probability."""
    labels, entropies, tops = [], [], []
    for chunk in hidden.split(ROWS_AT_ONCE):
        probabilities = F.linear(chunk, head).float().softmax(dim=-1)
        entropies.append(torch.special.entr(probabilities).sum(dim=-1))
        tops.append(probabilities.amax(dim=-1))
        cumulative = probabilities.cumsum_(dim=-1)
        drawn = torch.rand(len(chunk), 1, generator=generator, device=head.device) * cumulative[:, -1:]
        labels.append(torch.searchsorted(cumulative, drawn).squeeze(1).clamp_(max=len(head) - 1))
    return torch.cat(labels), torch.cat(entropies).mean().item(), torch.cat(tops).mean().item()


def make_pool(head: Tensor, tokens: int, *, size: int) -> Pool:
    """`size` batches of `tokens` tokens, always the same ones."""
    generator = torch.Generator(head.device).manual_seed(tokens)
    hidden = [make_hidden(head, tokens, generator) for _ in range(size)]
    sampled = [sample_labels(head, states, generator) for states in hidden]
    return Pool(head, hidden, [labels for labels, _, _ in sampled], *sampled[0][1:])


def draws_of(pool: Pool, share: float) -> list[Draw]:
    """The pool's batches with a share of their tokens trained, at random places."""
    draws = []
    for number, (hidden, labels) in enumerate(zip(pool.hidden, pool.labels, strict=True)):
        trained = max(1, round(share * len(labels)))
        places = torch.randperm(len(labels), generator=torch.Generator().manual_seed(number))[:trained].sort().values
        rows = places.to(labels.device)
        masked = torch.full_like(labels, NOT_TRAINED)
        masked[rows] = labels[rows]
        filling = (0, bucket(trained) - trained if labels.is_cuda else 0)
        row_labels = F.pad(labels[rows], filling, value=NOT_TRAINED)
        draws.append(Draw(hidden, masked, F.pad(rows, filling), row_labels, trained))
    return draws


class Expected(NamedTuple):
    """The mean loss of a draw's trained tokens and its gradients, all in fp32 from inputs as they are."""

    loss: float
    hidden_gradient: Tensor  # (N, D)
    head_gradient: Tensor  # (V, D)


def expected_of(head: Tensor, draw: Draw) -> Expected:
    """What the definition says, computed in fp32 a few rows at a time."""
    wide_head = head.detach().float().requires_grad_()
    hidden_gradient = torch.zeros(draw.hidden.shape, device=head.device)
    loss = torch.zeros((), dtype=torch.float64, device=head.device)
    for rows in draw.rows[: draw.trained].split(ROWS_AT_ONCE):
        states = draw.hidden[rows].detach().float().requires_grad_()
        part = masked_linear_cross_entropy(states, wide_head, draw.labels[rows]).loss_sum / draw.trained
        part.backward()
        hidden_gradient[rows] = states.grad
        loss += part.detach()
    return Expected(loss.item(), hidden_gradient, wide_head.grad)


def logits_gradients(logits: Tensor, draw: Draw) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For a few rows at a time: which, their part of the mean loss, and the gradient of their logits in fp32."""
    for start in range(0, len(logits), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        wide = logits[rows].detach().float().requires_grad_()
        loss = masked_cross_entropy(wide, draw.labels[rows]).loss_sum / draw.trained
        yield rows, loss.detach(), torch.autograd.grad(loss, wide)[0]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over the norm of what is wanted; not a number where something is not finite."""
    return (torch.linalg.vector_norm(got.float() - wanted) / torch.linalg.vector_norm(wanted)).item()
