"""Conversations that occur more than once: exactly, by a digest of the content, or nearly, by the phrases they share.

Memory: `Seen` holds at most 32 bytes a digest. `find_leaks` holds 76 bytes a validation conversation while it works and
about 300 for each that it finds, nothing of the other training ones; with `near` about 7 KB a validation conversation
besides (a hundred words; 8 bytes a word beyond).
"""

from __future__ import annotations

import mmap
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from sft.conversation import Conversation
from sft.errors import UserError

if TYPE_CHECKING:
    from datasketch import MinHash

DIGEST_BYTES = 16

Digests = NDArray[np.uint64]  # (n, 2); a digest's 16 bytes as two numbers
Shingles = NDArray[np.uint64]  # sorted, each once
Place = tuple[int, int]  # source and record of a conversation


def said(conversation: Conversation) -> bytes:
    """What is said in a conversation, in NFC: without system turns, tools and reasoning, and whatever it weighs.

    Conversations in which the same is said are copies as far as validation goes, however they are rendered.
    """
    parts = []  # each begins with a role or a mark of its own and says how long it is: no two contents read alike
    for role, content, _, tool_calls, _ in conversation.messages:
        if role == "system":
            continue
        text = content if content.isascii() else normalize("NFC", content)
        parts.append(f"{role} {len(text)}:{text}")
        for name, arguments in tool_calls:
            parts.append(f"@{len(name)},{len(arguments)}:{name}{arguments}")
    if conversation.text is not None:
        parts.append(f"${normalize('NFC', conversation.text)}")
    return "".join(parts).encode()


def content_digest(conversation: Conversation) -> bytes:
    """16 bytes that are equal where the same is said."""
    return blake2b(said(conversation), digest_size=DIGEST_BYTES).digest()


SLOTS = 8  # of a bucket; compared at once
FULL = 0.8  # of a table's slots: beyond that too many buckets overflow
GROWTH = 1.5  # times the slots, when full: at worst 1.5 x 16 / 0.8 = 30 bytes a digest
FIRST_BUCKETS = 1 << 13
MOVED_AT_ONCE = 1 << 13  # buckets, whose 128 bytes each make whole pages


class Table:
    """A hash table of digests that never grows: buckets of slots, a full one continued in the next."""

    def __init__(self, buckets: int):
        self.pages = mmap.mmap(-1, buckets * SLOTS * DIGEST_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.digests = np.frombuffer(self.pages, np.uint64).reshape(buckets, 2, SLOTS)  # a half of all, then the other
        self.used = np.zeros(buckets, np.uint8)  # slots of each bucket
        self.room = int(buckets * SLOTS * FULL)

    def home(self, digests: Digests) -> NDArray[np.int64]:
        """The bucket in which the search for each digest begins."""
        return ((digests[:, 0] >> np.uint64(32)) * np.uint64(len(self.used)) >> np.uint64(32)).astype(np.int64)

    def holds(self, digests: Digests) -> NDArray[np.bool_]:
        found = np.zeros(len(digests), bool)
        sought, bucket = np.arange(len(digests)), self.home(digests)
        while len(sought):
            used = self.used[bucket]
            hits = self.digests[bucket, 0] == digests[sought, :1]
            hits &= np.arange(SLOTS) < used[:, None]
            rows = np.flatnonzero(hits.any(axis=1))
            same = self.digests[bucket[rows], 1] == digests[sought[rows], 1:]
            found[sought[rows]] = (hits[rows] & same).any(axis=1)
            more = (used == SLOTS) & ~found[sought]
            sought, bucket = sought[more], (bucket[more] + 1) % len(self.used)
        return found

    def insert(self, digests: Digests) -> None:
        """Keep digests that are not here yet, each once, no more than there is room for."""
        assert len(digests) <= self.room
        self.room -= len(digests)
        bucket = self.home(digests)
        while len(digests):
            order = np.argsort(bucket, kind="stable")
            digests, bucket = digests[order], bucket[order]
            slot = self.used[bucket] + np.arange(len(bucket)) - np.searchsorted(bucket, bucket)
            fits = slot < SLOTS
            self.digests[bucket[fits], :, slot[fits]] = digests[fits]
            np.add.at(self.used, bucket[fits], 1)
            digests, bucket = digests[~fits], (bucket[~fits] + 1) % len(self.used)

    def grown(self) -> Table:
        """A larger table with the same digests; this one's memory goes as that one's comes, and it is used up."""
        larger = Table(int(len(self.used) * GROWTH))
        for begin in range(0, len(self.used), MOVED_AT_ONCE):
            bucket, slot = np.nonzero(np.arange(SLOTS) < self.used[begin : begin + MOVED_AT_ONCE, None])
            larger.insert(self.digests[begin + bucket, :, slot])
            if hasattr(mmap, "MADV_DONTNEED"):
                size = SLOTS * DIGEST_BYTES
                end = min(begin + MOVED_AT_ONCE, len(self.used))
                self.pages.madvise(mmap.MADV_DONTNEED, begin * size, (end - begin) * size)
        return larger


class Seen:
    """An exact set of digests."""

    def __init__(self) -> None:
        self.table = Table(FIRST_BUCKETS)
        self.count = 0

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        return self.table.digests.nbytes + self.table.used.nbytes

    def add(self, digests: NDArray[np.uint8] | Digests) -> NDArray[np.bool_]:
        """Which digests of (n, 16) bytes or (n, 2) numbers are new: neither added before nor earlier in the array."""
        digests = as_numbers(digests)
        order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: of equal ones the first stays first
        ordered = digests[order]
        first = np.ones(len(order), bool)
        first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        unknown = order[first]
        unknown = unknown[~self.table.holds(digests[unknown])]
        while len(unknown) > self.table.room:
            self.table = self.table.grown()
        self.table.insert(digests[unknown])
        self.count += len(unknown)
        new = np.zeros(len(digests), bool)
        new[unknown] = True
        return new


def as_numbers(digests: NDArray[np.uint8] | Digests) -> Digests:
    numbers: Digests = np.ascontiguousarray(digests).view("<u8")
    assert numbers.shape == (len(digests), 2)
    return numbers


class Leak(NamedTuple):
    """Where the content of a validation conversation occurs in training."""

    place: Place  # of the training conversation: of those with the same content the first, else the first that is near
    similarity: float  # Jaccard similarity of the two sets of shingles; 1 for the same content
    exact: bool  # the same content, to the letter


TRAINING_BATCH = 4096


def find_leaks(
    conversations: Callable[[], Iterable[tuple[Conversation, bool]]], *, near: bool, threshold: float = 0.8
) -> dict[Place, Leak]:
    """The validation conversations, in their order, whose content occurs in training, each with where it does.

    `conversations()` gives every conversation and whether it falls to validation, the same ones each time; it is called
    twice. With `near`, conversations of a similarity of at least `threshold` count too; a pair just there is missed
    once in a hundred times, a more similar one hardly ever.
    """
    places = array("q")
    digests = bytearray()
    nearly = NearIndex(threshold) if near else None
    for conversation, validation in conversations():
        if validation:
            if nearly is not None:
                nearly.add(len(places) // 2, conversation)
            places.extend((conversation.source, conversation.record))
            digests += content_digest(conversation)
    if not places:
        return {}
    exactly = ExactIndex(digests)
    del digests
    exact: dict[int, Leak] = {}
    similar: dict[int, Leak] = {}
    for batch in batches(conversation for conversation, validation in conversations() if not validation):
        for row, conversation in exactly.matches(batch):
            exact.setdefault(row, Leak((conversation.source, conversation.record), similarity=1.0, exact=True))
        if nearly is not None:
            for conversation in batch:
                for row, similarity in nearly.take(conversation):
                    similar[row] = Leak((conversation.source, conversation.record), similarity, exact=False)
    found = {**similar, **exact}
    return {(places[2 * row], places[2 * row + 1]): found[row] for row in sorted(found)}


def batches(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    batch = []
    for conversation in conversations:
        batch.append(conversation)
        if len(batch) == TRAINING_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


class ExactIndex:
    """Digests, to be found by what they are."""

    def __init__(self, digests: bytearray):
        known = np.frombuffer(digests, "<u8").reshape(-1, 2)
        self.rows = np.lexsort((known[:, 1], known[:, 0]))
        self.digests = known[self.rows]

    def matches(self, conversations: list[Conversation]) -> Iterator[tuple[int, Conversation]]:
        """The row of a digest and a conversation that has it, for every such pair."""
        sought = np.frombuffer(b"".join(map(content_digest, conversations)), "<u8").reshape(-1, 2)
        begin, end = (np.searchsorted(self.digests[:, 0], sought[:, 0], side) for side in ("left", "right"))
        for i in np.flatnonzero(begin < end).tolist():
            for at in range(begin[i], end[i]):
                if self.digests[at, 1] == sought[i, 1]:
                    yield int(self.rows[at]), conversations[i]


PERMUTATIONS = 128
SEED = 1
RECALL = 0.99  # of the pairs whose similarity is just the threshold


class NearIndex:
    """Conversations, to be found by the shingles they share; MinHash proposes, the shingles themselves decide."""

    def __init__(self, threshold: float):
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise UserError(
                "near duplicates need datasketch; to have it: pip install -e '.[near-duplicates]'"
            ) from error
        assert 0 < threshold <= 1
        self.threshold = threshold
        self.nothing = MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=int)
        self.index = MinHashLSH(num_perm=PERMUTATIONS, params=bands_and_rows(threshold))
        self.shingles: dict[int, Shingles] = {}

    def sketch(self, shingles: Shingles) -> MinHash:
        sketch = self.nothing.copy()
        sketch.update_batch((shingles >> np.uint64(32)).tolist())
        return sketch

    def add(self, row: int, conversation: Conversation) -> None:
        self.shingles[row] = shingles_of(conversation)
        self.index.insert(row, self.sketch(self.shingles[row]))

    def take(self, conversation: Conversation) -> list[tuple[int, float]]:
        """The rows that are similar to the conversation, with their similarities; they are not found again."""
        if not self.shingles:
            return []
        shingles = shingles_of(conversation)
        rows = sorted(self.index.query(self.sketch(shingles)))
        if not rows:
            return []
        similarities = jaccard(shingles, [self.shingles[row] for row in rows])
        taken = [(row, s) for row, s in zip(rows, similarities, strict=True) if s >= self.threshold]
        for row, _ in taken:
            self.index.remove(row)
            del self.shingles[row]
        return taken


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """Of the divisions of a sketch that propose enough of the pairs at the threshold the one that proposes least."""
    divisions = [(PERMUTATIONS // rows, rows) for rows in range(1, PERMUTATIONS + 1)]
    enough = [(bands, rows) for bands, rows in divisions if 1 - (1 - threshold**rows) ** bands >= RECALL]
    return enough[-1] if enough else divisions[0]


def jaccard(one: Shingles, others: list[Shingles]) -> list[float]:
    """The shared part of the union of one set and each of the others; no set is empty."""
    sizes = np.array([len(other) for other in others])
    joined = np.concatenate(others)
    shared = one[np.minimum(np.searchsorted(one, joined), len(one) - 1)] == joined
    common = np.add.reduceat(shared, np.cumsum(sizes) - sizes, dtype=np.int64)
    similarities: list[float] = (common / (len(one) + sizes - common)).tolist()
    return similarities


WORDS_OF_A_SHINGLE = 5
# Scripts without spaces between words (Thai and its neighbours, Japanese, Chinese): there a character is a word.
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    r"\u3040-\u30fa\u30fc-\u312f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def shingles_of(conversation: Conversation) -> Shingles:
    """Hashes of all runs of five words, whatever their case and punctuation; a shorter text is one shingle.

    System turns and tools are left out: whole data sets share them, which says nothing about the conversations.
    """
    text = compared_text(conversation)
    words = WORD.findall(text.lower()) or [text]
    hashes = np.fromiter(map(word_hash, words), np.uint64, len(words))
    size = min(WORDS_OF_A_SHINGLE, len(words))
    shingles = np.zeros(len(words) - size + 1, np.uint64)
    for i in range(size):
        shingles = shingles * MULTIPLIER + hashes[i : i + len(shingles)]
    return np.unique(shingles)


def compared_text(conversation: Conversation) -> str:
    if conversation.text is not None:
        return conversation.text
    parts: list[str] = []
    for role, content, reasoning, tool_calls, _ in conversation.messages:
        if role != "system":
            parts += (reasoning or "", content, *(part for call in tool_calls for part in call))
    return "\n".join(parts)


@lru_cache(maxsize=1 << 16)
def word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
