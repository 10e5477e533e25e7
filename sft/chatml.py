"""Conversations -> samples.

Trained are the content of assistant messages and the `<|im_end|>` after it, nothing else, unless all tokens are asked
for. Text between control tokens is encoded as one string; trained content is encoded apart from what precedes it,
because generation starts there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sft.conversation import Conversation, Message
from sft.samples import MASKED, REPEATED, TRAINED, Sample, Samples, text_piece
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

TrainOn = Literal["assistant", "last", "all"]


def render(
    conversation: Conversation,
    tokenizer: Tokenizer,
    *,
    template: TemplateName = "chatml",
    train_on: TrainOn = "assistant",
) -> list[Sample]:
    """The samples of a conversation: one, or one per trained turn where the template drops earlier reasoning."""
    return rendered([conversation], tokenizer, template=template, train_on=train_on).listed()


def rendered(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    *,
    template: TemplateName = "chatml",
    train_on: TrainOn = "assistant",
) -> Samples:
    """The samples of many conversations, whose texts are encoded together and each distinct one once."""
    draft = Draft()
    texts: dict[int, str] = {}
    for index, conversation in enumerate(conversations):
        if conversation.text is not None:
            texts[index] = conversation.text
        else:
            add_conversation(draft, index, conversation, template, train_on)
    samples = draft.encoded(tokenizer)
    return with_texts(samples, texts, tokenizer) if texts else samples


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
    draft = Draft()
    draft.add_sample(0, blocks, [0.0] * len(blocks))
    return [
        *draft.encoded(tokenizer).ids.tolist(),
        tokenizer.im_start,
        *tokenizer.encode(generation_prompt(template, thinking=thinking)),
    ]


def add_conversation(
    draft: Draft, index: int, conversation: Conversation, template: TemplateName, train_on: TrainOn
) -> None:
    messages, tools = conversation.messages, conversation.tools
    weights = message_weights(messages, train_on)
    everything = train_on == "all"
    if each_turn_stands_alone(messages, template):
        known = 0
        for turn, message in enumerate(messages):
            if message.role == ASSISTANT and weights[turn] > 0:
                blocks = blocks_of_turn(messages, tools, template, turn)
                new = [weights[block.end - 1] if block.end > known else 0.0 for block in blocks]
                draft.add_sample(index, blocks, new, turn=turn, known=known, everything=everything)
                known = turn + 1
        if known:
            return
    blocks = blocks_of(messages, tools, template)
    of_block = [weights[block.end - 1] if block.end else float(everything) for block in blocks]
    draft.add_sample(index, blocks, of_block, everything=everything)


def message_weights(messages: Sequence[Message], train_on: TrainOn) -> list[float]:
    """The weight of each message's content in the loss; tool results are never trained."""
    if train_on == "all":
        return [message.weight if message.role != "tool" else 0.0 for message in messages]
    weights = [message.weight if message.role == ASSISTANT else 0.0 for message in messages]
    if train_on == "last":
        last = max((i for i, message in enumerate(messages) if message.role == ASSISTANT), default=-1)
        weights = [weight if i == last else 0.0 for i, weight in enumerate(weights)]
    return weights


class Draft:
    """Samples as text: of S samples with K blocks in all, which blocks they have and what becomes of each."""

    def __init__(self) -> None:
        self.index_of = {"\n": 0}  # the distinct texts
        self.conversation: list[int] = []  # (S)
        self.turn: list[int] = []  # (S)
        self.roles: list[Sequence[str]] = []  # (S)
        # (K) the texts: a block's opening, and its content or, as one text, both
        self.openings: list[int] = []
        self.contents: list[int] = []
        self.kinds: list[int] = []  # (K)
        self.weights: list[float] = []  # (K)
        self.is_generated: list[bool] = []  # (K) what a model generates is encoded apart from what it is given
        self.is_whole: list[bool] = []  # (K) the template's own tokens are of the block's kind too

    def add_sample(
        self,
        conversation: int,
        blocks: Sequence[Block],
        weights: Sequence[float],
        *,
        turn: int = -1,
        known: int = 0,
        everything: bool = False,
    ) -> None:
        """`weights` of each block's content and end, 0 where not trained; the first `known` messages have been in an
        earlier sample; `everything`: the template's own tokens are trained too."""
        index_of = self.index_of
        for (role, opening, content, end), weight in zip(blocks, weights, strict=True):
            generated = role == ASSISTANT and weight > 0
            repeated = known > 0 and end <= known
            self.openings.append(index_of.setdefault(opening, len(index_of)))
            self.contents.append(index_of.setdefault(content if generated else opening + content, len(index_of)))
            self.kinds.append(REPEATED if repeated else TRAINED if weight else MASKED[role])
            self.weights.append(weight)
            self.is_generated.append(generated)
            self.is_whole.append(repeated or (everything and weight > 0))
        self.conversation.append(conversation)
        self.turn.append(turn)
        self.roles.append([block.role for block in blocks])

    def encoded(self, tokenizer: Tokenizer) -> Samples:
        ids, starts, lengths = tokenizer.packed(list(self.index_of))
        opening, content = np.array(self.openings, np.int64), np.array(self.contents, np.int64)
        is_generated, is_whole = np.array(self.is_generated, bool), np.array(self.is_whole, bool)
        of_opening, of_content, newline = lengths[opening], lengths[content], lengths[0]
        shared = shared_prefix(ids, starts[opening], of_opening, starts[content], of_content)
        header = np.where(is_generated, of_opening, shared)
        alone = np.where(is_generated, of_opening, 0)

        kind = np.array(self.kinds, np.int64)
        with_end = kind == TRAINED
        first = first_of_each(sizes := np.array([len(roles) for roles in self.roles], np.int64))
        total = 2 + alone + of_content + newline
        before = np.where(is_whole, first & with_end, 1 + header)  # nothing predicts a sample's first token
        length = np.where(is_whole, total - before, of_content + alone - header + with_end)

        pool = np.concatenate([ids, [tokenizer.im_start, tokenizer.im_end]], dtype=np.int32)
        parts = np.empty((len(kind), 5, 2), np.int64)  # where in the pool, and how many ids
        parts[:, 0] = len(ids), 1
        parts[:, 1] = np.stack([starts[opening], alone], axis=1)
        parts[:, 2] = np.stack([starts[content], of_content], axis=1)
        parts[:, 3] = len(ids) + 1, 1
        parts[:, 4] = starts[0], newline
        return Samples(
            conversation=np.array(self.conversation, np.int64),
            turn=np.array(self.turn, np.int64),
            roles=self.roles,
            sizes=sizes,
            stretches=np.stack([kind, before, length, total - before - length], axis=1),
            weights=np.array(self.weights, np.float64),
            ids=gathered(pool, *parts.reshape(-1, 2).T),
        )


Whole = NDArray[np.int64]


def shared_prefix(
    ids: NDArray[np.int32], one: Whole, one_length: Whole, other: Whole, other_length: Whole
) -> NDArray[np.int64]:
    """How many ids at the beginning of two spans are the same: a block's content may merge with the end of its
    opening."""
    count = np.zeros_like(one)
    same = np.ones(len(one), bool)
    shorter = np.minimum(one_length, other_length)
    for place in range(int(shorter.max(initial=0))):
        same &= place < shorter
        if not same.any():
            break
        same[same] = ids[one[same] + place] == ids[other[same] + place]
        count += same
    return count


def first_of_each(sizes: Whole) -> NDArray[np.bool_]:
    """Whether each of sum(sizes) elements is the first of its group."""
    return np.arange(int(sizes.sum())) == np.repeat(np.cumsum(sizes) - sizes, sizes)


def gathered(pool: NDArray[np.int32], starts: Whole, lengths: Whole) -> NDArray[np.int32]:
    """The spans of the pool end to end."""
    shift = starts - (np.cumsum(lengths) - lengths)
    return pool[np.arange(int(lengths.sum())) + np.repeat(shift, lengths)]


def with_texts(samples: Samples, texts: Mapping[int, str], tokenizer: Tokenizer) -> Samples:
    """The samples, and in between plain text, all trained, with a trained end, so that a base model learns that
    documents end."""
    pad = np.int32(tokenizer.pad).tobytes()
    pieces = [text_piece(part.tobytes() + pad) for part in tokenizer.packed(list(texts.values())).listed()]
    found = [*zip(samples.conversation.tolist(), samples.listed(), strict=True), *zip(texts, pieces, strict=True)]
    found.sort(key=itemgetter(0))  # those of one conversation stay in order
    return Samples.of([index for index, _ in found], [sample for _, sample in found])
