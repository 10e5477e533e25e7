"""Conversation -> token ids and labels in ChatML: `<|im_start|>role\\ncontent<|im_end|>\\n` for each message.

Trained are the content of assistant messages and the `<|im_end|>` after it, nothing else. Text between control tokens
is encoded as one string; assistant content is encoded apart from its header, because generation starts there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sft.conversation import Conversation, Message
from sft.tokenizer import Tokenizer

NOT_TRAINED = -100  # the label of a token that is not trained
ASSISTANT = "assistant"
ASSISTANT_HEADER = "assistant\n"


class Turn(NamedTuple):
    role: str
    end: int  # index just after the message's last token


@dataclass(frozen=True)
class Sample:
    """A rendered conversation; labels are not shifted: the id where trained, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]
    turns: tuple[Turn, ...] = ()  # none for plain text


class Segment(NamedTuple):
    """Text to encode, or the id of a control token."""

    content: str | int
    trained: bool = False
    completes: str | None = None  # the role of the message that ends here


def render(conversation: Conversation, tokenizer: Tokenizer) -> Sample:
    return render_batch([conversation], tokenizer)[0]


def render_batch(conversations: Sequence[Conversation], tokenizer: Tokenizer) -> list[Sample]:
    """The samples of many conversations, whose texts are encoded together and each distinct one once."""
    plans = [segments(conversation, tokenizer) for conversation in conversations]
    texts = list(dict.fromkeys(part.content for plan in plans for part in plan if isinstance(part.content, str)))
    ids_of = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    return [joined(plan, ids_of) for plan in plans]


def prompt_ids(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """What a model is given to answer: the messages, then the header that `render` puts before assistant content."""
    sample = render(Conversation(tuple(messages)), tokenizer)
    return [*sample.input_ids, tokenizer.im_start, *tokenizer.encode(ASSISTANT_HEADER)]


def segments(conversation: Conversation, tokenizer: Tokenizer) -> list[Segment]:
    if conversation.text is not None:
        # A document ends with a trained token, so that a base model learns that documents end.
        return [Segment(conversation.text, trained=True), Segment(tokenizer.pad, trained=True)]
    return [segment for message in conversation.messages for segment in message_segments(message, tokenizer)]


def message_segments(message: Message, tokenizer: Tokenizer) -> list[Segment]:
    trained = message.role == ASSISTANT
    text = (
        [Segment(ASSISTANT_HEADER), Segment(message.content, trained=True)]
        if trained
        else [Segment(f"{message.role}\n{message.content}")]
    )
    return [
        Segment(tokenizer.im_start),
        *text,
        Segment(tokenizer.im_end, trained),
        Segment("\n", completes=message.role),
    ]


def joined(plan: Sequence[Segment], ids_of: Mapping[str, list[int]]) -> Sample:
    input_ids: list[int] = []
    labels: list[int] = []
    turns: list[Turn] = []
    for segment in plan:
        ids = ids_of[segment.content] if isinstance(segment.content, str) else [segment.content]
        input_ids += ids
        labels += ids if segment.trained else [NOT_TRAINED] * len(ids)
        if segment.completes is not None:
            turns.append(Turn(segment.completes, len(input_ids)))
    labels[:1] = [NOT_TRAINED] * len(labels[:1])  # nothing predicts the first token; only plain text begins trained
    return Sample(input_ids, labels, tuple(turns))


def cut(sample: Sample, block_size: int) -> Sample | None:
    """The sample without turns at its end, so that it fits and ends on an assistant turn; None where nothing is left.

    Plain text, which has no turns, is cut inside.
    """
    if not sample.turns:
        return Sample(sample.input_ids[:block_size], sample.labels[:block_size])
    for count in range(len(sample.turns), 0, -1):
        role, end = sample.turns[count - 1]
        if role == ASSISTANT and end <= block_size:
            return Sample(sample.input_ids[:end], sample.labels[:end], sample.turns[:count])
    return None
