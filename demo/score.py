"""How well a model answers held-out questions: exactly, by itself, and at what loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from demo.world import KINDS, Exchange, Kind
from model_builder import ConfigurableGPT
from sft.chatml import prompt_ids, render
from sft.conversation import Conversation, Message
from sft.generate import Generation, generate
from sft.samples import NOT_TRAINED
from sft.tokenizer import Tokenizer

LONGEST_ANSWER = 32  # tokens; the longest right one has 11

MOST_EXACT_BEFORE = 0.05
LEAST_EXACT_OVERALL = 0.80
LEAST_EXACT_PER_KIND = 0.60
LEAST_STOPPED = 0.99


@dataclass(frozen=True, kw_only=True)
class Score:
    """Sums over questions; what is shown and judged are their ratios."""

    questions: int
    exact: int
    stopped: int
    loss_sum: float
    trained_tokens: int

    @property
    def exact_share(self) -> float:
        return self.exact / self.questions

    @property
    def stopped_share(self) -> float:
        return self.stopped / self.questions

    @property
    def loss(self) -> float:
        """The mean over trained tokens, as in validation."""
        return self.loss_sum / self.trained_tokens


@dataclass(frozen=True)
class Answer:
    exchange: Exchange
    text: str
    stopped: bool  # the model ended its turn, rather than ran into the limit

    @property
    def is_exact(self) -> bool:
        return self.text.strip() == self.exchange.answer


@dataclass(frozen=True)
class Report:
    """What a model answered, and its score in each kind."""

    answers: list[Answer]
    kinds: dict[Kind, Score]

    @property
    def overall(self) -> Score:
        return total(list(self.kinds.values()))

    def shares(self) -> dict[str, dict[str, float]]:
        """What the table shows, as plain data."""
        return {
            name: {"questions": s.questions, "loss": s.loss, "exact": s.exact_share, "stopped": s.stopped_share}
            for name, s in [*self.kinds.items(), ("overall", self.overall)]
        }


def total(scores: Sequence[Score]) -> Score:
    return Score(
        questions=sum(score.questions for score in scores),
        exact=sum(score.exact for score in scores),
        stopped=sum(score.stopped for score in scores),
        loss_sum=sum(score.loss_sum for score in scores),
        trained_tokens=sum(score.trained_tokens for score in scores),
    )


def examine(model: ConfigurableGPT, tokenizer: Tokenizer, exchanges: Sequence[Exchange]) -> Report:
    """Ask the model every exchange's last question, after the right earlier turns, and compare word for word."""
    model.eval()
    prompts = [prompt_ids(messages(exchange)[:-1], tokenizer) for exchange in exchanges]
    answers = [
        Answer(exchange, tokenizer.decode(generation.ids), generation.stopped)
        for exchange, generation in zip(exchanges, say(model, tokenizer, prompts), strict=True)
    ]
    kinds: dict[Kind, Score] = {}
    for kind in KINDS:
        asked = [answer for answer in answers if answer.exchange.kind == kind]
        losses = [loss_of(model, tokenizer, answer.exchange) for answer in asked]
        kinds[kind] = Score(
            questions=len(asked),
            exact=sum(answer.is_exact for answer in asked),
            stopped=sum(answer.stopped for answer in asked),
            loss_sum=sum(loss_sum for loss_sum, _ in losses),
            trained_tokens=sum(tokens for _, tokens in losses),
        )
    return Report(answers, kinds)


def say(model: ConfigurableGPT, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> list[Generation]:
    """The likeliest answers. Only <|im_end|> ends a turn: who ends a document has not stopped talking."""
    return generate(model, prompts, max_new_tokens=LONGEST_ANSWER, stop_ids={tokenizer.im_end})


@torch.inference_mode()
def loss_of(model: ConfigurableGPT, tokenizer: Tokenizer, exchange: Exchange) -> tuple[float, int]:
    """(sum of token losses, number of trained tokens) of one conversation, computed in the plainest way."""
    (sample,) = render(Conversation(tuple(messages(exchange))), tokenizer)
    logits, labels = model(torch.tensor([sample.input_ids]))[0, :-1], torch.tensor(sample.labels[1:])
    loss_sum = F.cross_entropy(logits, labels, ignore_index=NOT_TRAINED, reduction="sum")
    return loss_sum.item(), int((labels != NOT_TRAINED).sum())


def messages(exchange: Exchange) -> list[Message]:
    return [Message(message["role"], message["content"]) for message in exchange.messages]


def missed_marks(base: Report, tuned: Report) -> list[str]:
    """What falls short of the demo's marks, in words; nothing where all are reached."""
    missed = []
    if base.overall.exact_share > MOST_EXACT_BEFORE:
        missed.append(f"before: {base.overall.exact_share:.1%} exact answers, more than {MOST_EXACT_BEFORE:.0%}")
    if tuned.overall.exact_share < LEAST_EXACT_OVERALL:
        missed.append(f"after: {tuned.overall.exact_share:.1%} exact answers, less than {LEAST_EXACT_OVERALL:.0%}")
    for kind, score in tuned.kinds.items():
        if score.exact_share < LEAST_EXACT_PER_KIND:
            missed.append(f"after: {score.exact_share:.1%} exact {kind}, less than {LEAST_EXACT_PER_KIND:.0%}")
    if tuned.overall.stopped_share < LEAST_STOPPED:
        missed.append(f"after: {tuned.overall.stopped_share:.1%} of the answers stop, less than {LEAST_STOPPED:.0%}")
    return missed


def table(base: Report, tuned: Report) -> str:
    """Base against fine-tuned, a line for each kind."""
    rows: Mapping[str, tuple[Score, Score]] = {
        **{kind: (base.kinds[kind], tuned.kinds[kind]) for kind in KINDS},
        "overall": (base.overall, tuned.overall),
    }
    lines = [
        f"{'':<16}{'questions':>9}{'loss':>16}{'exact answers':>20}{'stops by itself':>20}",
        f"{'':<25}{'base':>8}{'tuned':>8}{'base':>10}{'tuned':>10}{'base':>10}{'tuned':>10}",
    ]
    for name, (before, after) in rows.items():
        lines.append(
            f"{name:<16}{before.questions:>9}{before.loss:>8.3f}{after.loss:>8.3f}"
            f"{before.exact_share:>10.1%}{after.exact_share:>10.1%}"
            f"{before.stopped_share:>10.1%}{after.stopped_share:>10.1%}"
        )
    return "\n".join(lines)
