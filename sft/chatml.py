"""Conversation -> samples: token ids, and for each stretch of them whose it is and whether it is trained.

Trained are the content of assistant messages and the `<|im_end|>` after it, nothing else, unless all tokens are asked
for. Text between control tokens is encoded as one string; trained content is encoded apart from what precedes it,
because generation starts there.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
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

ID_BYTES = array("i").itemsize
NOT_TRAINED = -100  # the label of a token that is not trained

TrainOn = Literal["assistant", "last", "all"]

# Whose a token is: trained, masked content by role, what the template adds, or history that another sample has trained.
KINDS = ("trained", "system", "user", "assistant", "tool", "text", "template", "repeated_history")
TRAINED, TEMPLATE, REPEATED = (KINDS.index(name) for name in ("trained", "template", "repeated_history"))
MASKED = {name: KINDS.index(name) for name in ("system", "user", "assistant", "tool", "text")}


class Stretch(NamedTuple):
    """The tokens of a block, or of plain text: those that are of one kind, and the template's before and after them."""

    kind: int  # index in KINDS
    before: int
    length: int
    after: int
    weight: float  # of trained tokens in the loss

    @property
    def tokens(self) -> int:
        return self.before + self.length + self.after


class Sample(NamedTuple):
    """A rendered conversation, or one trained turn of it with its history, or a piece of plain text."""

    packed: bytes  # the ids, int32 after int32
    stretches: list[Stretch]  # they cover the ids from the first to the last
    roles: Sequence[str] = ()  # of each block; none for plain text
    turn: int = -1  # -1 = the whole; else the index of the message that is trained, or of the piece

    @property
    def tokens(self) -> int:
        return len(self.packed) // ID_BYTES

    @property
    def input_ids(self) -> list[int]:
        return array("i", self.packed).tolist()

    @property
    def labels(self) -> list[int]:
        """The id where trained, -100 elsewhere; not shifted."""
        input_ids = self.input_ids
        labels = [NOT_TRAINED] * len(input_ids)
        start = 0
        for stretch in self.stretches:
            if stretch.kind == TRAINED:
                span = slice(start + stretch.before, start + stretch.before + stretch.length)
                labels[span] = input_ids[span]
            start += stretch.tokens
        return labels

    @property
    def is_trained(self) -> bool:
        return any(stretch[0] == TRAINED and stretch[2] for stretch in self.stretches)


class Plan(NamedTuple):
    """What a sample will consist of, as text."""

    blocks: Sequence[Block]
    weights: Sequence[float]  # of each block's content and end; 0 = not trained
    texts: Sequence[str]  # two a block: its opening, and its content or the whole, as it is encoded
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
    texts = [conversation.text for conversation in conversations if conversation.text is not None]
    for of_one in plans:
        for plan in of_one:
            texts += plan.texts
    ids_of = encoded(texts, tokenizer)
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
    untrained = plan_of(blocks, [0.0] * len(blocks))
    history = joined(untrained, encoded(untrained.texts, tokenizer), tokenizer).input_ids
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
            plans.append(plan_of(blocks, new, turn=turn, known=known, everything=everything))
        if plans:
            return plans
    blocks = blocks_of(messages, tools, template)
    of_block = [weights[block.end - 1] if block.end else float(everything) for block in blocks]
    return [plan_of(blocks, of_block, everything=everything)]


def message_weights(messages: Sequence[Message], train_on: TrainOn) -> list[float]:
    """The weight of each message's content in the loss; tool results are never trained."""
    if train_on == "all":
        return [message.weight if message.role != "tool" else 0.0 for message in messages]
    weights = [message.weight if message.role == ASSISTANT else 0.0 for message in messages]
    if train_on == "last":
        last = max((i for i, message in enumerate(messages) if message.role == ASSISTANT), default=-1)
        weights = [weight if i == last else 0.0 for i, weight in enumerate(weights)]
    return weights


def plan_of(
    blocks: Sequence[Block], weights: Sequence[float], *, turn: int = -1, known: int = 0, everything: bool = False
) -> Plan:
    texts: list[str] = []
    for block, weight in zip(blocks, weights, strict=True):
        _, opening, content, _ = block
        # What a model generates is encoded apart from what it is given.
        texts += (opening, content if is_generated(block, weight) else opening + content)
    return Plan(blocks, weights, texts, turn, known, everything)


def is_generated(block: Block, weight: float) -> bool:
    return weight > 0 and block.role == ASSISTANT


def encoded(texts: Iterable[str], tokenizer: Tokenizer) -> dict[str, bytes]:
    """The ids of each text, and of a newline."""
    distinct = list(dict.fromkeys(["\n", *texts]))
    return dict(zip(distinct, tokenizer.packed(distinct), strict=True))


def joined(plan: Plan, ids_of: Mapping[str, bytes], tokenizer: Tokenizer) -> Sample:
    parts: list[bytes] = []
    stretches: list[Stretch] = []
    start, newline = packed_id(tokenizer.im_start), ids_of["\n"]
    end = packed_id(tokenizer.im_end) + newline
    after = len(end) // ID_BYTES
    known = plan.known
    texts = iter(plan.texts)
    for block, weight in zip(plan.blocks, plan.weights, strict=True):
        opening, content = ids_of[next(texts)], ids_of[next(texts)]
        if is_generated(block, weight):
            parts += start, opening, content, end
            header, length = len(opening) // ID_BYTES, len(content) // ID_BYTES
        else:
            parts += start, content, end
            whole = content.startswith(opening)
            header = len(opening) // ID_BYTES if whole else common_prefix(opening, content)
            length = len(content) // ID_BYTES - header
        if known and block.end <= known:
            stretches.append(Stretch(REPEATED, 0, 1 + header + length + after, 0, 0.0))
        elif not weight:
            stretches.append(Stretch(MASKED[block.role], 1 + header, length, after, 0.0))
        elif not plan.everything:
            stretches.append(Stretch(TRAINED, 1 + header, length + 1, after - 1, weight))  # with its end token
        else:
            first = 0 if stretches else 1  # nothing predicts it
            stretches.append(Stretch(TRAINED, first, 1 + header + length + after - first, 0, weight))
    return Sample(b"".join(parts), stretches, [block.role for block in plan.blocks], plan.turn)


@cache
def packed_id(i: int) -> bytes:
    return array("i", [i]).tobytes()


def common_prefix(opening: bytes, ids: bytes) -> int:
    """How many tokens of a block are its opening alone, where content merges with the end of it."""
    pairs = zip(array("i", opening), array("i", ids), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def text_sample(packed: bytes, tokenizer: Tokenizer) -> Sample:
    """Plain text, all trained, and a trained end, so that a base model learns that documents end."""
    return text_piece(packed + packed_id(tokenizer.pad))


def text_piece(packed: bytes, turn: int = -1) -> Sample:
    length = len(packed) // ID_BYTES
    first = min(1, length)  # nothing predicts it
    parts = [Stretch(MASKED["text"], 0, first, 0, 0.0), Stretch(TRAINED, 0, length - first, 0, 1.0)]
    return Sample(packed, parts, turn=turn)


def cut(sample: Sample, block_size: int) -> Sample | None:
    """The sample without turns at its end, so that it fits and ends on an assistant turn; None where nothing is left.

    Plain text, which has no turns, is cut inside.
    """
    if not sample.roles:
        return text_piece(sample.packed[: block_size * ID_BYTES], sample.turn)
    ends = list(itertools.accumulate(stretch.tokens for stretch in sample.stretches))
    for count in range(len(ends), 0, -1):
        if sample.roles[count - 1] == ASSISTANT and ends[count - 1] <= block_size:
            packed = sample.packed[: ends[count - 1] * ID_BYTES]
            return Sample(packed, sample.stretches[:count], sample.roles[:count], sample.turn)
    return None


def split_text(sample: Sample, block_size: int) -> list[Sample]:
    """Plain text as consecutive pieces of block_size tokens, the last one shorter."""
    size = block_size * ID_BYTES
    starts = range(0, len(sample.packed), size)
    return [text_piece(sample.packed[start : start + size], turn) for turn, start in enumerate(starts)]
