"""A chunk of raw records -> the arrays of its samples and what became of each conversation.

Each chunk is worked on by one process, and knows nothing of the others: whether a conversation has been seen before,
and which samples are written, is for the one that joins the chunks.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from operator import or_
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.chatml import (
    KINDS,
    NOT_TRAINED,
    TEMPLATE,
    TRAINED,
    Sample,
    Stretch,
    TrainOn,
    cut,
    message_weights,
    render_batch,
    split_text,
)
from sft.conversation import BadFile, BadRecord, Conversation, Message
from sft.duplicates import DIGEST_BYTES, said
from sft.records import ReadOptions, oddities, read_record
from sft.sources import RawRecord, Source, raw_records
from sft.templates import (
    HEADER,
    TemplateName,
    calls_text,
    content_of,
    each_turn_stands_alone,
    is_question,
    reasoning_of,
)
from sft.tokenizer import Tokenizer

TooLong = Literal["drop", "cut", "split", "error"]

# A chunk has so many records, or fewer where they are long: what memory is bounded by.
CHUNK_RECORDS = 500
CHUNK_BYTES = 1_000_000

MERGING = {" ", "\t", "\n", "\r"}  # what an answer may begin with, to merge with the line end of its header

KEPT = "kept"
FATES = (KEPT, "too_long", "no_trained_token")  # what rendering alone can tell of a sample


@dataclass(frozen=True)
class Recipe:
    """How raw records become samples; every worker process has it."""

    sources: Sequence[Source]
    tokenizer: Tokenizer
    options: ReadOptions
    template: TemplateName
    train_on: TrainOn
    block_size: int
    too_long: TooLong
    system_prompt: str | None
    seed: int
    val_fraction: float

    def read(self, raw: RawRecord, source: int) -> Conversation:
        """The conversation of a record. Raises BadRecord."""
        return read_record(raw, self.options, source)

    def shown(self, conversation: Conversation) -> Conversation:
        """The conversation as it is rendered: with the system prompt where it has none of its own."""
        has_one = any(message.role == "system" for message in conversation.messages)
        if self.system_prompt is None or conversation.text is not None or has_one:
            return conversation
        return conversation._replace(messages=(Message("system", self.system_prompt), *conversation.messages))

    def is_validation(self, conversation: Conversation) -> bool:
        """A function of the seed and the group, or of what is said, alone: copies are never in both splits."""
        if self.val_fraction == 0:
            return False
        key = said(conversation) if conversation.group is None else conversation.group.encode()
        return hashlib.blake2b(key, digest_size=8, salt=self.salt).digest() < self.limit

    @cached_property
    def salt(self) -> bytes:
        return self.seed.to_bytes(16, "big", signed=True)

    @cached_property
    def limit(self) -> bytes:
        """Below it fall the first val_fraction of all numbers of 8 bytes."""
        return int(self.val_fraction * 2**64).to_bytes(8, "big")


class Chunk(NamedTuple):
    source: int  # index in Recipe.sources
    records: Sequence[RawRecord]


class Bad(NamedTuple):
    """A record that cannot be used."""

    line: int
    message: str
    size: int  # bytes
    is_file: bool = False  # no record after it can be read


@dataclass(frozen=True)
class Rendered:
    """What came of a chunk: C conversations, S samples, T tokens of the samples that fit."""

    source: int
    read: int  # records, the bad ones included
    bad: list[Bad]
    too_long: list[Bad]  # where that is an error
    records: NDArray[np.int64]  # (C,) 1-based
    lines: NDArray[np.int64]  # (C,) 1-based
    digests: NDArray[np.uint8]  # (C, 16) equal where the same tokens are trained in the same way
    is_val: NDArray[np.bool_]  # (C,)
    noticed: list[tuple[int, str]]  # (index of a conversation, what is odd about it)

    conversation: NDArray[np.int64]  # (S,) index of its conversation
    turn: NDArray[np.int64]  # (S,)
    fate: NDArray[np.int8]  # (S,) index in FATES
    rendered: NDArray[np.int64]  # (S,) tokens before cutting
    kinds: NDArray[np.int64]  # (S, len(KINDS)) tokens of each kind that are left; 0 where the sample was dropped
    targets: NDArray[np.float64]  # (S,) sum of the target weights

    input_ids: NDArray[np.int32]  # (T,)
    labels: NDArray[np.int32]  # (T,)
    weights: NDArray[np.float32] | None  # (T,) None = 1 where trained


def chunks(sources: Sequence[Source], advance: Callable[[int], object] = lambda count: None) -> Iterator[Chunk]:
    """All records in order, a bounded number of them at a time."""
    for index, source in enumerate(sources):
        waiting: list[RawRecord] = []
        size = 0
        for raw in raw_records(source, advance=advance):
            waiting.append(raw)
            size += raw.size
            if len(waiting) == CHUNK_RECORDS or size >= CHUNK_BYTES:
                yield Chunk(index, waiting)
                waiting, size = [], 0
        if waiting:
            yield Chunk(index, waiting)


def render_chunk(recipe: Recipe, chunk: Chunk) -> Rendered:
    conversations: list[Conversation] = []
    bad: list[Bad] = []
    seen: list[tuple[int, str]] = []
    for raw in chunk.records:
        try:
            conversations.append(recipe.read(raw, chunk.source))
        except BadRecord as error:
            bad.append(Bad(raw.line, str(error), raw.size, isinstance(error, BadFile)))
        else:
            if raw.bom:
                seen.append((len(conversations) - 1, "byte_order_mark"))
    shown = [recipe.shown(conversation) for conversation in conversations]
    samples = render_batch(shown, recipe.tokenizer, template=recipe.template, train_on=recipe.train_on)
    fitted = Fitted()
    for index, of_one in enumerate(samples):
        for sample in of_one:
            fitted.add(index, sample, recipe)
    digests = [digest_of(*each, recipe.train_on) for each in zip(shown, samples, strict=True)]
    return Rendered(
        source=chunk.source,
        read=len(chunk.records),
        bad=bad,
        too_long=[too_long(conversations[index], length, recipe) for index, length in fitted.errors],
        records=np.array([conversation.record for conversation in conversations], np.int64),
        lines=np.array([conversation.line for conversation in conversations], np.int64),
        digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16),
        is_val=np.array([recipe.is_validation(conversation) for conversation in conversations], bool),
        noticed=seen
        + [(index, name) for index, conversation in enumerate(shown) for name in noticed(conversation, recipe)],
        **fitted.arrays(),
    )


@dataclass
class Fitted:
    """Collects samples that were made to fit, and what was dropped; `arrays` joins them."""

    conversation: list[int] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    fate: list[int] = field(default_factory=list)
    rendered: list[int] = field(default_factory=list)
    packed: list[bytes] = field(default_factory=list)  # ids of each sample that is kept
    stretches: list[Stretch] = field(default_factory=list)
    stretch_counts: list[int] = field(default_factory=list)  # of each sample
    errors: list[tuple[int, int]] = field(default_factory=list)  # conversation, its length

    def add(self, conversation: int, sample: Sample, recipe: Recipe) -> None:
        """Count a sample as what is left of it within block_size."""
        length, block_size = sample.tokens, recipe.block_size
        if not sample.is_trained:
            self._enter(conversation, sample, "no_trained_token", rendered=length)
        elif length <= block_size:
            self._enter(conversation, sample, KEPT, rendered=length)
        elif recipe.too_long == "split" and not sample.roles:
            for piece in split_text(sample, block_size):
                fate = KEPT if piece.is_trained else "no_trained_token"
                self._enter(conversation, piece, fate, rendered=piece.tokens)
        else:
            if recipe.too_long == "error":
                self.errors.append((conversation, length))
            shorter = cut(sample, block_size) if recipe.too_long in ("cut", "split") else None
            if shorter is not None and shorter.is_trained:
                self._enter(conversation, shorter, KEPT, rendered=length)
            else:
                self._enter(conversation, sample, "too_long", rendered=length)

    def _enter(self, conversation: int, sample: Sample, fate: str, *, rendered: int) -> None:
        self.conversation.append(conversation)
        self.turn.append(sample.turn)
        self.fate.append(FATES.index(fate))
        self.rendered.append(rendered)
        if fate == KEPT:
            self.stretch_counts.append(len(sample.stretches))
            self.stretches += sample.stretches
            self.packed.append(sample.packed)
        else:
            self.stretch_counts.append(0)

    def arrays(self) -> dict[str, Any]:
        """The fields of Rendered that tell of samples."""
        samples = len(self.turn)
        sample_of = np.repeat(np.arange(samples), np.array(self.stretch_counts, np.int64))
        table = np.array(self.stretches, np.float64).reshape(-1, len(Stretch._fields))
        kind, before, length, after = table[:, :4].astype(np.int64).T
        by_kind = np.bincount(sample_of * len(KINDS) + kind, length, samples * len(KINDS)).reshape(samples, len(KINDS))
        by_kind[:, TEMPLATE] += np.bincount(sample_of, before + after, samples)
        is_trained = kind == TRAINED
        weight = np.where(is_trained, table[:, 4], 0).astype(np.float32)
        # of the template, of the stretch, of the template
        parts = np.stack([before, length, after], axis=1).ravel()
        nothing = np.zeros_like(weight)
        weights = np.repeat(np.stack([nothing, weight, nothing], axis=1).ravel(), parts)
        ids = np.frombuffer(b"".join(self.packed), np.int32)
        return {
            "conversation": np.array(self.conversation, np.int64),
            "turn": np.array(self.turn, np.int64),
            "fate": np.array(self.fate, np.int8),
            "rendered": np.array(self.rendered, np.int64),
            "kinds": by_kind.astype(np.int64),
            "targets": np.bincount(sample_of, weight.astype(np.float64) * length, samples),
            "input_ids": ids,
            "labels": np.where(weights > 0, ids, np.int32(NOT_TRAINED)),
            "weights": weights if (weight[is_trained] != 1).any() else None,
        }


def digest_of(conversation: Conversation, samples: Sequence[Sample], train_on: TrainOn) -> bytes:
    """16 bytes that are equal for equal ids, labels and weights: given the ids, the weights decide about the others."""
    digest = hashlib.blake2b(samples[0].packed, digest_size=DIGEST_BYTES)
    for sample in samples[1:]:
        digest.update(sample.packed)
    digest.update(array("d", message_weights(conversation.messages, train_on)))
    return digest.digest()


def too_long(conversation: Conversation, length: int, recipe: Recipe) -> Bad:
    message = f"{length:,} tokens, block_size is {recipe.block_size:,}; raise it, or --too_long=drop, cut or split"
    return Bad(conversation.line, message, 0)


def noticed(conversation: Conversation, recipe: Recipe) -> Iterator[str]:
    """What is worth a word about a conversation that is used all the same."""
    yield from oddities(conversation)
    spells_control = recipe.tokenizer.spells_control
    for text in spoken(conversation):
        if spells_control(text):
            yield "spells_control"
            break
    messages, template = conversation.messages, recipe.template
    if template == "chatml" and not any(message.reasoning or message.content[:1] in MERGING for message in messages):
        return  # most are quickly done with
    answers = [message for message in messages if message.role == "assistant"]
    if template == "chatml" and any(message.reasoning for message in answers):
        yield "reasoning_not_in_template"
    if template == "qwen3":
        asked = accumulate(map(is_question, messages), or_)
        pairs = zip(messages, asked, strict=True)
        if any(message.role == "assistant" and loses_text(message, asked=so_far) for message, so_far in pairs):
            yield "changed_by_template"
    if each_turn_stands_alone(messages, template):
        weights = message_weights(messages, recipe.train_on)
        turns = [i for i, message in enumerate(messages) if message.role == "assistant" and weights[i]]
        if turns and turns[-1] < len(messages) - 1:
            yield "tail_left_out"
    elif any(merges_with_header(message, recipe) for message in answers if message is not messages[-1]):
        yield "answer_apart_in_history"


def merges_with_header(message: Message, recipe: Recipe) -> bool:
    """Whether an answer would have other ids together with its header, as a server has it in a later turn's history."""
    if not message.weight or message.content[:1] not in MERGING:
        return False
    content = content_of(message, recipe.template)
    answer = content + calls_text(message, has_content=bool(content))
    header, apart, together = recipe.tokenizer.packed([HEADER["assistant"], answer, HEADER["assistant"] + answer])
    return header + apart != together


def spoken(conversation: Conversation) -> list[str]:
    """Every text that comes from the record."""
    texts = [*conversation.tools]
    if conversation.text is not None:
        texts.append(conversation.text)
    for _, content, reasoning, tool_calls, _ in conversation.messages:
        texts.append(content)
        if reasoning:
            texts.append(reasoning)
        for call in tool_calls:
            texts += call
    return texts


def loses_text(message: Message, *, asked: bool) -> bool:
    """Whether the template qwen3 leaves out more of an answer than newlines around the reasoning: the reasoning where
    nobody has asked, and whatever stands around the think block of a content."""
    if not asked and reasoning_of(message):
        return True
    if message.reasoning is not None or "</think>" not in message.content:
        return False
    left = f"<think>{reasoning_of(message)}</think>{content_of(message, 'qwen3')}"
    return left.replace("\n", "") != message.content.replace("\n", "")


def default_workers() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
