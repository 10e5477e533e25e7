"""The proof that what was written is what was meant: the arrays are read again and held against the raw records.

For every sample: the ids decode to the text of the template; labels are the id or -100; and the trained stretches are,
one for one and in order, the answers of the trained turns with their end token, each right after the header of an
assistant message. The answers are taken from the messages, not from what was rendered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.arrays import ArrayReader, file_name
from sft.chatml import message_weights
from sft.conversation import BadRecord, Conversation
from sft.preparation import Chunk, Recipe
from sft.samples import NOT_TRAINED
from sft.templates import (
    ASSISTANT,
    HEADER,
    NO_THOUGHT,
    Block,
    blocks_of,
    blocks_of_turn,
    calls_text,
    content_of,
    is_question,
    reasoning_of,
    text_of_blocks,
)
from sft.tokenizer import Tokenizer

OTHER_CONTROL = "there are other control tokens than those of the template"
COUNTS = ("conversations", "samples", "tokens", "trained_tokens", "trained_turns", "normalised_turns")


class Written(NamedTuple):
    """S samples of a split as they are on the disk, T tokens."""

    origins: NDArray[np.int64]  # (S, 3)
    lengths: NDArray[np.int64]  # (S,)
    input_ids: NDArray[np.int32]  # (T,)
    labels: NDArray[np.int32]  # (T,)
    weights: NDArray[np.float32] | None  # (T,)


class WrittenSample(NamedTuple):
    turn: int
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    weights: NDArray[np.float32] | None


class Findings(NamedTuple):
    counts: Counter[str]  # of COUNTS
    problems: list[str]  # what is not as it should be, with file and line


class Discrepancy(Exception):
    """What is not as it should be about a sample."""


class WrittenSplit:
    """The samples of a split from first to last, in bounded memory."""

    BLOCK = 4096  # origins that are read at once

    def __init__(self, folder: Path, split: str, files: ExitStack):
        def reader(part: str) -> ArrayReader:
            return files.enter_context(ArrayReader(folder / file_name(split, part)))

        self.origins_file, self.offsets_file = reader("origins"), reader("offsets")
        self.input_ids, self.labels = reader("input_ids"), reader("labels")
        self.weights = reader("weights") if (folder / file_name(split, "weights")).exists() else None
        self.origins = self.origins_file.take(0)
        self.ends = self.offsets_file.take(0)
        self.start = int(self.offsets_file.take(1)[0])

    def up_to(self, source: int, record: int) -> Written:
        """The samples that are left of all records up to this one."""
        while len(block := self.origins_file.take(self.BLOCK)):
            self.origins = np.concatenate([self.origins, block])
            self.ends = np.concatenate([self.ends, self.offsets_file.take(len(block))])
            if tuple(self.origins[-1, :2]) > (source, record):
                break
        sources, records = self.origins[:, 0], self.origins[:, 1]
        count = int(np.count_nonzero((sources < source) | ((sources == source) & (records <= record))))
        origins, ends = self.origins[:count], self.ends[:count]
        self.origins, self.ends = self.origins[count:], self.ends[count:]
        lengths = np.diff(ends, prepend=self.start)
        tokens = int(lengths.sum())
        self.start += tokens
        weights = None if self.weights is None else self.weights.take(tokens)
        return Written(origins, lengths, self.input_ids.take(tokens), self.labels.take(tokens), weights)


def with_written(chunks: Iterable[Chunk], folder: Path, splits: Sequence[str]) -> Iterator[tuple[Chunk, list[Written]]]:
    """Each chunk of raw records beside what was written of it in each split."""
    with ExitStack() as files:
        written = [WrittenSplit(folder, split, files) for split in splits]
        for chunk in chunks:
            last = chunk.records[-1].record
            yield chunk, [split.up_to(chunk.source, last) for split in written]


def audit_chunk(recipe: Recipe, item: tuple[Chunk, list[Written]]) -> Findings:
    """Hold a chunk's records against its samples."""
    chunk, written = item
    name = recipe.sources[chunk.source].name
    of_split = [by_record(split) for split in written]
    counts: Counter[str] = Counter()
    problems: list[str] = []
    for raw in chunk.records:
        samples = [sample for split in of_split for sample in split.get(raw.record, [])]
        try:
            if sum(raw.record in split for split in of_split) > 1:
                raise Discrepancy("it is in more than one split")
            conversation = recipe.shown(recipe.read(raw, chunk.source))
            counts["conversations"] += bool(samples)
            counts.update(audit_conversation(conversation, samples, recipe))
        except BadRecord:
            if samples:
                problems.append(f"{name}:{raw.line}: it was written, but cannot be read again")
        except Discrepancy as error:
            problems.append(f"{name}:{raw.line}: {error}")
    known = {raw.record for raw in chunk.records}
    problems += [
        f"{name}: there is no record {record}" for split in of_split for record in split if record not in known
    ]
    return Findings(counts, problems)


def by_record(split: Written) -> dict[int, list[WrittenSample]]:
    samples: dict[int, list[WrittenSample]] = {}
    start = 0
    for (_, record, turn), length in zip(split.origins.tolist(), split.lengths.tolist(), strict=True):
        span = slice(start, start + length)
        start += length
        weights = None if split.weights is None else split.weights[span]
        samples.setdefault(record, []).append(WrittenSample(turn, split.input_ids[span], split.labels[span], weights))
    return samples


def audit_conversation(
    conversation: Conversation, samples: Sequence[WrittenSample], recipe: Recipe
) -> Mapping[str, int]:
    """What a conversation adds to the counts. Raises Discrepancy."""
    counts: Counter[str] = Counter()
    if len({sample.turn for sample in samples}) < len(samples):
        raise Discrepancy("a turn is there twice")
    for sample in samples:
        trained = sample.labels != NOT_TRAINED
        if (sample.labels[trained] != sample.input_ids[trained]).any():
            raise Discrepancy("a label is neither its token nor -100")
        if trained[0] or not trained.any():
            raise Discrepancy("the first token is trained, or none")
        if sample.weights is not None and ((sample.weights > 0) != trained).any():
            raise Discrepancy("a weight is 0 where a token is trained, or the other way round")
        counts.update(samples=1, tokens=len(trained), trained_tokens=int(np.count_nonzero(trained)))
        if conversation.text is None:
            turns, normalised = audit_messages(conversation, sample, trained, recipe)
            counts.update(trained_turns=turns, normalised_turns=normalised)
        elif not trained[1:].all():
            raise Discrepancy("a token of the text is not trained")
    if conversation.text is not None:
        audit_text(conversation.text, samples, recipe)
    return counts


def audit_text(text: str, samples: Sequence[WrittenSample], recipe: Recipe) -> None:
    """The pieces, one after the other, are the text and its end, or its beginning where it was cut."""
    tokenizer = recipe.tokenizer
    expected = tokenizer.normalize(text).encode() + tokenizer.token_bytes[tokenizer.pad]
    at = 0
    for sample in samples:
        found = b"".join(map(tokenizer.token_bytes.__getitem__, sample.input_ids.tolist()))
        if expected[at : at + len(found)] != found:
            raise Discrepancy("the ids do not decode to the text")
        at += len(found)
    left = expected[at:]
    if samples and left and recipe.too_long != "cut":
        is_one_token = recipe.too_long == "split" and left in tokenizer.token_bytes.values()  # which nothing predicts
        if not is_one_token:
            raise Discrepancy("the end of the text is missing")


def audit_messages(
    conversation: Conversation, sample: WrittenSample, trained: NDArray[np.bool_], recipe: Recipe
) -> tuple[int, int]:
    """(trained turns, how many of them the tokenizer's normalisation has changed)."""
    tokenizer, ids = recipe.tokenizer, sample.input_ids
    messages, tools = conversation.messages, conversation.tools
    if sample.turn < 0:
        blocks = blocks_of(messages, tools, recipe.template)
    else:
        blocks = blocks_of_turn(messages, tools, recipe.template, sample.turn)
    starts = np.flatnonzero(ids == tokenizer.im_start)
    shown = blocks[: len(starts)]
    is_cut = recipe.too_long in ("cut", "split") and bool(shown) and shown[-1].role == ASSISTANT
    if len(shown) < len(blocks) and not is_cut:
        raise Discrepancy("turns are missing")
    same_text(decoded(ids.tolist(), tokenizer), text_of_blocks(shown), tokenizer)
    if len(starts) > len(shown):
        raise Discrepancy(OTHER_CONTROL)
    weights = message_weights(conversation.messages, recipe.train_on)
    earlier = [
        i for i in range(sample.turn) if weights[i] and messages[i].role == ASSISTANT
    ]  # trained in other samples
    weights[: earlier[-1] + 1 if earlier else 0] = [0.0] * (earlier[-1] + 1 if earlier else 0)
    turns = normalised = 0
    for block, start, end in zip(shown, starts, [*starts[1:], len(ids)], strict=True):
        weight = expected_weight(block, sample, weights, recipe)
        where = np.flatnonzero(trained[start:end]) + start
        if not weight:
            if len(where):
                raise Discrepancy(f"tokens of a {block.role} message that is not trained are trained")
            continue
        found = np.ones(1, np.float32) if sample.weights is None else sample.weights[where]
        if (found != np.float32(weight)).any():
            raise Discrepancy(f"tokens have another weight than {weight}")
        turns += 1
        if recipe.train_on == "all":
            if len(where) < end - max(start, 1):
                raise Discrepancy(f"tokens of a {block.role} message are not trained")
            continue
        if not len(where) or where[-1] - where[0] + 1 != len(where):
            raise Discrepancy("an answer is not trained as one stretch")
        check_place(ids[start : where[0]].tolist(), ids[where].tolist(), tokenizer)
        answers = answers_of(conversation, block, sample, recipe)
        normalised += same_answer(decoded(ids[where[:-1]].tolist(), tokenizer), answers, tokenizer)
    if control_in(ids, tokenizer) != [tokenizer.im_start, tokenizer.im_end] * len(shown):
        raise Discrepancy(OTHER_CONTROL)
    return turns, normalised


def expected_weight(block: Block, sample: WrittenSample, weights: Sequence[float], recipe: Recipe) -> float:
    """The weight that a block's content must have: that of its message, unless an earlier sample has trained it."""
    if block.end == 0:  # tools without a system message
        return float(recipe.train_on == "all" and sample.turn < 0)
    return weights[block.end - 1]


def check_place(before: list[int], answer: list[int], tokenizer: Tokenizer) -> None:
    """The stretch comes right after the header of an assistant message and ends with the end token, its only one."""
    if before[:1] != [tokenizer.im_start] or before[1:] not in headers(tokenizer):
        raise Discrepancy("a trained stretch does not begin right after the header of an assistant message")
    if answer[-1] != tokenizer.im_end or not control_ids(tokenizer).isdisjoint(answer[:-1]):
        raise Discrepancy("a trained stretch does not end with its one end token")


@lru_cache(maxsize=1)
def headers(tokenizer: Tokenizer) -> list[list[int]]:
    """What a server puts before an answer."""
    header = HEADER[ASSISTANT]
    return [tokenizer.encode(header), tokenizer.encode(header + NO_THOUGHT)]


def control_in(ids: NDArray[np.int32], tokenizer: Tokenizer) -> list[int]:
    """The control tokens among the ids, in order; their text alone does not tell them from content that spells them."""
    control = control_ids(tokenizer)
    return [i for i in ids[ids >= min(control)].tolist() if i in control]


@lru_cache(maxsize=1)
def control_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(tokenizer.control.values())


def answers_of(conversation: Conversation, block: Block, sample: WrittenSample, recipe: Recipe) -> list[str]:
    """What a model should have said in a turn; twice where the template may leave out newlines at its beginning."""
    message = conversation.messages[block.end - 1]
    content = content_of(message, recipe.template)
    said = content + calls_text(message, has_content=bool(content))
    if recipe.template == "chatml":
        return [said]
    bare = content.lstrip("\n") + calls_text(message, has_content=bool(content))
    asked = any(map(is_question, conversation.messages[: block.end]))  # if not, the template leaves reasoning out
    if sample.turn >= 0 and asked and (reasoning := reasoning_of(message)):
        return [f"<think>\n{reasoning}\n</think>\n\n{bare}"]
    return [said, bare]


def decoded(ids: list[int], tokenizer: Tokenizer) -> str:
    """What tokenizer.decode gives, in half the time. Raises Discrepancy where an id is none of the vocabulary's."""
    try:
        return b"".join(map(tokenizer.token_bytes.__getitem__, ids)).decode("utf-8", "replace")
    except KeyError as error:
        raise Discrepancy(f"the id {error} is outside the vocabulary") from error


def same_answer(found: str, answers: Sequence[str], tokenizer: Tokenizer) -> bool:
    """Whether only normalisation makes the answer one of these. Raises Discrepancy where nothing does."""
    if found in answers:
        return False
    if found in [tokenizer.normalize(answer) for answer in answers]:
        return True
    raise Discrepancy("a trained stretch is not the answer of its turn")


def same_text(found: str, text: str, tokenizer: Tokenizer) -> None:
    if found != text and found != tokenizer.normalize(text):
        raise Discrepancy("the ids do not decode to the text of the template")
