"""A chunk of raw records -> the arrays of its samples and what became of each conversation.

Each chunk is worked on by one process, and knows nothing of the others: whether a conversation has been seen before,
and which samples are written, is for the one that joins the chunks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import or_
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.chatml import TrainOn, message_weights, rendered
from sft.conversation import BadFile, BadRecord, Conversation, Message
from sft.duplicates import DIGEST_BYTES, said
from sft.records import ReadOptions, oddities, read_record
from sft.samples import KINDS, NOT_TRAINED, TEMPLATE, TRAINED, Sample, Samples, cut, split_text
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

FATES = ("kept", "too_long", "no_trained_token")  # what rendering alone can tell of a sample
KEPT, TOO_LONG, NO_TRAINED_TOKEN = range(len(FATES))


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
    samples = rendered(shown, recipe.tokenizer, template=recipe.template, train_on=recipe.train_on)
    return Rendered(
        source=chunk.source,
        read=len(chunk.records),
        bad=bad,
        too_long=[too_long(conversations[i], length, recipe) for i, length in refused(samples, recipe)],
        records=np.array([conversation.record for conversation in conversations], np.int64),
        lines=np.array([conversation.line for conversation in conversations], np.int64),
        digests=digests_of(samples, len(conversations)),
        is_val=np.array([recipe.is_validation(conversation) for conversation in conversations], bool),
        noticed=seen
        + [(index, name) for index, conversation in enumerate(shown) for name in noticed(conversation, recipe)],
        **arrays_of(samples, recipe),
    )


def refused(samples: Samples, recipe: Recipe) -> list[tuple[int, int]]:
    """Conversation and length of each sample that is an error."""
    if recipe.too_long != "error":
        return []
    is_long = (samples.lengths > recipe.block_size) & (samples.trained > 0)
    return list(zip(samples.conversation[is_long].tolist(), samples.lengths[is_long].tolist(), strict=True))


def arrays_of(samples: Samples, recipe: Recipe) -> dict[str, Any]:
    """The fields of Rendered that tell of samples."""
    lengths = samples.lengths
    if (lengths > recipe.block_size).any() and recipe.too_long in ("cut", "split"):
        samples, lengths = shortened(samples, recipe)
    fits = samples.lengths <= recipe.block_size
    is_trained = samples.trained > 0
    kept = samples.chosen(is_kept := fits & is_trained)
    kind, before, length, after = kept.stretches.T
    of_kept = np.bincount(kept.of_stretch * len(KINDS) + kind, length, len(kept) * len(KINDS))
    kinds = np.zeros((len(samples), len(KINDS)), np.int64)
    kinds[is_kept] = of_kept.reshape(-1, len(KINDS))
    kinds[is_kept, TEMPLATE] += kept.summed(before + after)
    weight = np.where(kind == TRAINED, kept.weights, 0).astype(np.float32)
    targets = np.zeros(len(samples))
    targets[is_kept] = np.bincount(kept.of_stretch, weight.astype(np.float64) * length, len(kept))
    # of the template, of the stretch, of the template
    nothing = np.zeros_like(weight)
    weights = np.repeat(np.stack([nothing, weight, nothing], axis=1).ravel(), kept.stretches[:, 1:].ravel())
    return {
        "conversation": samples.conversation,
        "turn": samples.turn,
        "fate": np.where(is_kept, KEPT, np.where(is_trained, TOO_LONG, NO_TRAINED_TOKEN)).astype(np.int8),
        "rendered": lengths,
        "kinds": kinds,
        "targets": targets,
        "input_ids": kept.ids,
        "labels": np.where(weights > 0, kept.ids, np.int32(NOT_TRAINED)),
        "weights": weights if (kept.weights[kind == TRAINED] != 1).any() else None,
    }


def shortened(samples: Samples, recipe: Recipe) -> tuple[Samples, NDArray[np.int64]]:
    """The samples, those that are too long cut or split where something is left; and how long each was before."""
    fitted: list[tuple[int, Sample, int]] = []
    for conversation, sample in zip(samples.conversation.tolist(), samples.listed(), strict=True):
        fitted += [(conversation, piece, length) for piece, length in fit(sample, recipe)]
    conversations, pieces, lengths = zip(*fitted, strict=True)
    return Samples.of(conversations, pieces), np.array(lengths, np.int64)


def fit(sample: Sample, recipe: Recipe) -> list[tuple[Sample, int]]:
    """A sample as what is left of it within block_size, and the tokens that each part had before it was cut."""
    length, block_size = sample.tokens, recipe.block_size
    if length <= block_size or not sample.is_trained:
        return [(sample, length)]
    if recipe.too_long == "split" and not sample.roles:
        return [(piece, piece.tokens) for piece in split_text(sample, block_size)]
    shorter = cut(sample, block_size)
    return [(shorter if shorter is not None and shorter.is_trained else sample, length)]


def digests_of(samples: Samples, conversations: int) -> NDArray[np.uint8]:
    """(C, 16) equal for equal ids, labels and weights: given the ids, the weights decide about the others."""
    ends = np.searchsorted(samples.conversation, np.arange(conversations), "right")
    tokens, stretches = (
        np.concatenate([[0], np.cumsum(sizes)])[np.concatenate([[0], ends])].tolist()
        for sizes in (samples.lengths * samples.ids.itemsize, samples.sizes * samples.weights.itemsize)
    )
    ids, weights = samples.ids.data.cast("B"), samples.weights.data.cast("B")
    digests = []
    for i in range(conversations):
        digest = hashlib.blake2b(ids[tokens[i] : tokens[i + 1]], digest_size=DIGEST_BYTES)
        digest.update(weights[stretches[i] : stretches[i + 1]])
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)


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
    header, apart, together = recipe.tokenizer.encode_batch([HEADER["assistant"], answer, HEADER["assistant"] + answer])
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
