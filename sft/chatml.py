"""Conversation -> samples: token ids, and for each stretch of them whose it is and whether it is trained.

Trained are the content of assistant messages and the `<|im_end|>` after it, nothing else, unless all tokens are asked
for. Text between control tokens is encoded as one string; trained content is encoded apart from what precedes it,
because generation starts there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sft.conversation import Conversation, Message
from sft.templates import (
    ASSISTANT,
    Block,
    TemplateName,
    blocks_of,
    blocks_of_turn,
    each_turn_stands_alone,
    generation_prompt,
)
from sft.tokenizer import Tokenizer

NOT_TRAINED = -100  # the label of a token that is not trained

TrainOn = Literal["assistant", "last", "all"]

# Whose a token is: trained, masked content by role, what the template adds, or history that another sample has trained.
KINDS = ("trained", "system", "user", "assistant", "tool", "text", "template", "repeated_history")
TRAINED, TEMPLATE, REPEATED = (KINDS.index(name) for name in ("trained", "template", "repeated_history"))
MASKED = {name: KINDS.index(name) for name in ("system", "user", "assistant", "tool", "text")}


class Span(NamedTuple):
    """A stretch of tokens that are of one kind; the weight is that of trained tokens in the loss."""

    kind: int  # index in KINDS
    length: int
    weight: float = 1.0


class End(NamedTuple):
    """Where a block of the template ends."""

    role: str
    tokens: int  # tokens of the sample up to here
    spans: int  # spans up to here


@dataclass(frozen=True)
class Sample:
    """A rendered conversation, or one trained turn of it with its history, or a piece of plain text."""

    input_ids: list[int]
    spans: tuple[Span, ...]  # they cover the ids from the first to the last
    ends: tuple[End, ...] = ()  # none for plain text
    turn: int = -1  # -1 = the whole; else the index of the message that is trained, or of the piece

    @property
    def labels(self) -> list[int]:
        """The id where trained, -100 elsewhere; not shifted."""
        labels: list[int] = []
        for kind, length, _ in self.spans:
            start = len(labels)
            labels += self.input_ids[start : start + length] if kind == TRAINED else [NOT_TRAINED] * length
        return labels

    def count(self, kind: int) -> int:
        return sum(span.length for span in self.spans if span.kind == kind)


class Plan(NamedTuple):
    """What a sample will consist of, as text."""

    blocks: Sequence[Block]
    weights: Sequence[float]  # of each block's content and end; 0 = not trained
    turn: int
    known: int  # so many messages at the beginning have been in an earlier sample
    everything: bool = False  # the template's own tokens are trained too


def render(
    conversation: Conversation,
    tokenizer: Tokenizer,
    *,
    template: TemplateName = "chatml",
    train_on: TrainOn = "assistant",
) -> list[Sample]:
    """The samples of a conversation: one, or one per trained turn where the template drops earlier reasoning."""
    return render_batch([conversation], tokenizer, template=template, train_on=train_on)[0]


def render_batch(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    *,
    template: TemplateName = "chatml",
    train_on: TrainOn = "assistant",
) -> list[list[Sample]]:
    """The samples of many conversations, whose texts are encoded together and each distinct one once."""
    plans = [plans_of(conversation, template, train_on) for conversation in conversations]
    texts: dict[str, None] = dict.fromkeys(["\n"])
    for conversation, of_one in zip(conversations, plans, strict=True):
        if conversation.text is not None:
            texts[conversation.text] = None
        for plan in of_one:
            for block, weight in zip(plan.blocks, plan.weights, strict=True):
                texts.update(dict.fromkeys(parts(block, weight)))
    ids_of = dict(zip(texts, tokenizer.encode_batch(list(texts)), strict=True))
    return [
        [text_sample(ids_of[conversation.text], tokenizer)]
        if conversation.text is not None
        else [joined(plan, ids_of, tokenizer) for plan in of_one]
        for conversation, of_one in zip(conversations, plans, strict=True)
    ]


def prompt_ids(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    template: TemplateName = "chatml",
    tools: Sequence[str] = (),
    thinking: bool = False,
) -> list[int]:
    """What a server gives a model to answer: the messages, then the beginning of an assistant message.

    `thinking` leaves it to the model, in the template that knows reasoning, to open the think block.
    """
    blocks = blocks_of(messages, tools, template)
    untrained = Plan(blocks, [0.0] * len(blocks), turn=-1, known=0)
    texts = dict.fromkeys(["\n", *(text for block in blocks for text in parts(block, 0))])
    ids_of = dict(zip(texts, tokenizer.encode_batch(list(texts)), strict=True))
    history = joined(untrained, ids_of, tokenizer).input_ids
    return [*history, tokenizer.im_start, *tokenizer.encode(generation_prompt(template, thinking=thinking))]


def plans_of(conversation: Conversation, template: TemplateName, train_on: TrainOn) -> list[Plan]:
    messages, tools = conversation.messages, conversation.tools
    if conversation.text is not None:
        return []
    weights = message_weights(messages, train_on)
    everything = train_on == "all"
    if each_turn_stands_alone(messages, template):
        turns = [i for i, message in enumerate(messages) if message.role == ASSISTANT and weights[i] > 0]
        plans = []
        for known, turn in zip([0, *(turn + 1 for turn in turns)], turns, strict=False):
            blocks = blocks_of_turn(messages, tools, template, turn)
            new = [weights[block.end - 1] if block.end > known else 0.0 for block in blocks]
            plans.append(Plan(blocks, new, turn, known, everything))
        if plans:
            return plans
    blocks = blocks_of(messages, tools, template)
    of_block = [weights[block.end - 1] if block.end else float(everything) for block in blocks]
    return [Plan(blocks, of_block, -1, 0, everything)]


def message_weights(messages: Sequence[Message], train_on: TrainOn) -> list[float]:
    """The weight of each message's content in the loss; tool results are never trained."""
    if train_on == "all":
        return [message.weight if message.role != "tool" else 0.0 for message in messages]
    weights = [message.weight if message.role == ASSISTANT else 0.0 for message in messages]
    if train_on == "last":
        last = max((i for i, message in enumerate(messages) if message.role == ASSISTANT), default=-1)
        weights = [weight if i == last else 0.0 for i, weight in enumerate(weights)]
    return weights


def parts(block: Block, weight: float) -> tuple[str, ...]:
    """The strings of a block whose ids are needed; the first ones, joined, are the block."""
    if is_encoded_apart(block, weight):
        return block.opening, block.content
    return block.opening + block.content, block.opening


def is_encoded_apart(block: Block, weight: float) -> bool:
    return weight > 0 and block.role == ASSISTANT


def joined(plan: Plan, ids_of: Mapping[str, list[int]], tokenizer: Tokenizer) -> Sample:
    input_ids: list[int] = []
    spans: list[Span] = []
    ends: list[End] = []
    newline = ids_of["\n"]
    for block, weight in zip(plan.blocks, plan.weights, strict=True):
        start, opening = len(input_ids), ids_of[block.opening]
        input_ids.append(tokenizer.im_start)
        if is_encoded_apart(block, weight):
            input_ids += opening
            input_ids += ids_of[block.content]
            header = len(opening)
        else:
            together = ids_of[block.opening + block.content]
            input_ids += together
            header = common_prefix(opening, together)
        content = len(input_ids) - start - 1 - header
        input_ids.append(tokenizer.im_end)
        input_ids += newline
        if block.end <= plan.known and plan.known:
            spans.append(Span(REPEATED, len(input_ids) - start))
        elif not weight:
            spans += Span(TEMPLATE, 1 + header), Span(MASKED[block.role], content), Span(TEMPLATE, 1 + len(newline))
        elif not plan.everything:
            spans += Span(TEMPLATE, 1 + header), Span(TRAINED, content + 1, weight), Span(TEMPLATE, len(newline))
        else:
            first = int(start == 0)  # nothing predicts it
            spans += Span(TEMPLATE, first), Span(TRAINED, len(input_ids) - start - first, weight)
        ends.append(End(block.role, len(input_ids), len(spans)))
    return Sample(input_ids, tuple(spans), tuple(ends), plan.turn)


def common_prefix(opening: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens of a block are its opening alone: all of them, unless content merges with the end of it."""
    if ids[: len(opening)] == opening:
        return len(opening)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(opening, ids, strict=False)))


def text_sample(ids: Sequence[int], tokenizer: Tokenizer) -> Sample:
    """Plain text, all trained, and a trained end, so that a base model learns that documents end."""
    return text_piece([*ids, tokenizer.pad])


def text_piece(ids: list[int], turn: int = -1) -> Sample:
    first = min(1, len(ids))  # nothing predicts it
    return Sample(ids, (Span(MASKED["text"], first), Span(TRAINED, len(ids) - first)), turn=turn)


def cut(sample: Sample, block_size: int) -> Sample | None:
    """The sample without turns at its end, so that it fits and ends on an assistant turn; None where nothing is left.

    Plain text, which has no turns, is cut inside.
    """
    if not sample.ends:
        return text_piece(sample.input_ids[:block_size], sample.turn)
    for count in range(len(sample.ends), 0, -1):
        role, tokens, spans = sample.ends[count - 1]
        if role == ASSISTANT and tokens <= block_size:
            return Sample(sample.input_ids[:tokens], sample.spans[:spans], sample.ends[:count], sample.turn)
    return None


def split_text(sample: Sample, block_size: int) -> list[Sample]:
    """Plain text as consecutive pieces of block_size tokens, the last one shorter."""
    ids = sample.input_ids
    starts = range(0, len(ids), block_size)
    return [text_piece(ids[start : start + block_size], turn) for turn, start in enumerate(starts)]
