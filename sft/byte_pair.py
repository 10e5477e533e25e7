"""Byte-level BPE: text -> ids through tiktoken, with the ids that tokenizers gives and three times as fast.

Why the ids are equal. tokenizers merges the pair that is first in the file's list of merges; tiktoken merges any two
neighbours whose bytes together are a token, the lowest rank first; both take the leftmost of equals. Let the ranks be
the 256 bytes and the products of merges, where every product comes from one merge, the merges are in the order of
their products' ids, and tokenizers makes of each token's bytes that token and nothing else (`reachable`). As long as
both have taken the same steps, no symbol crosses the bounds of two neighbours x, y that tiktoken is about to join to
the token T, so the steps within them were those that tokenizers takes on the bytes of T alone. There it ends with T,
hence by the merge of x and y: the only one that gives T. So tiktoken joins no pair that is not a merge, and the lowest
rank is the first merge. A whole piece that is a token, tiktoken's short cut, is `reachable` itself.

The rest is checked as well: the pattern that cuts text into pieces means the same to both (their classes of characters
agree, by a test over all of Unicode), added tokens match on the raw text, the normaliser is NFC or none.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import tiktoken
import tokenizers
from numpy.typing import NDArray

from sft.errors import UserError
from sft.nfc import nfc

Backend = Literal["tiktoken", "tokenizers"]

QWEN3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Texts are encoded many at a time, with this character, which hardly any text has, as a special token between them: a
# call of its own for each would take a third as long as the encoding.
SEPARATOR = "\x1c"
BETWEEN: Set[str] = frozenset({SEPARATOR})
NOTHING: Set[str] = frozenset()

# A look-ahead keeps tiktoken from its fast regular expressions. This one matters only to white space other than line
# ends: of two or more such characters before something else it leaves the last to what follows. Where text is cut there
# beforehand, and encoded part by part, the pattern without it finds the same pieces.
LOOK_AHEAD = r"|\s+(?!\S)"
RARE_BLANKS = "\t\v\f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
RARE_BLANK = re.compile(f"[{RARE_BLANKS}]")
BLANKS = frozenset(f" {RARE_BLANKS}")
AFTER_LAST = BLANKS | {"\r", "\n", SEPARATOR, ""}  # what follows blanks that stay together
LAST_SPACES = re.compile(f"  (?![ {RARE_BLANKS}\r\n{SEPARATOR}]|\\Z)")

# tiktoken's regular expressions overflow a stack at a million white space characters in a row.
LONGEST_WHITE_SPACE = 900_000
WHITE_SPACE_RUN = re.compile(rf"\s(?<!\s\s)\s{{{LONGEST_WHITE_SPACE - 1}}}")


class Packed(NamedTuple):
    """The ids of N texts, in whatever order: an object for each token would take longer than the rest."""

    ids: NDArray[np.int32]  # (T,)
    starts: NDArray[np.int64]  # (N,) where those of each text begin
    lengths: NDArray[np.int64]  # (N,) tokens of each text

    def listed(self) -> list[NDArray[np.int32]]:
        spans = zip(self.starts.tolist(), (self.starts + self.lengths).tolist(), strict=True)
        return [self.ids[start:end] for start, end in spans]


class Encoder(Protocol):
    """Text -> ids; control tokens are ordinary text, other added tokens match."""

    name: Backend

    def packed(self, texts: Sequence[str]) -> Packed: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def normalize(self, text: str) -> str | None:
        """What the ids of the text stand for; None where only decoding them can tell."""


class LibraryEncoder:
    """The tokenizers library, for any tokenizer.json: the definition."""

    name: Backend = "tokenizers"

    def __init__(self, library: tokenizers.Tokenizer):
        self.wrapped = library

    def packed(self, texts: Sequence[str]) -> Packed:
        encoded = self.encode_batch(texts)
        ids = np.fromiter(itertools.chain.from_iterable(encoded), np.int32)
        return end_to_end(ids, [len(ids) for ids in encoded])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # Fast: without offsets, which take longer than the rest.
        return [encoding.ids for encoding in self.wrapped.encode_batch_fast(list(texts), add_special_tokens=False)]

    def normalize(self, text: str) -> str | None:
        return text if self.wrapped.normalizer is None else None


class TiktokenEncoder:
    """tiktoken, working as tokenizers does: added tokens are matched first, then each stretch between them is
    normalised and encoded."""

    name: Backend = "tiktoken"

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        matched: Mapping[str, int],
        *,
        pattern: str,
        nfc: bool,
        reference: Encoder | None = None,  # for the few texts that tiktoken cannot encode
    ):
        self.cuts = pattern == QWEN3_PATTERN
        pattern = pattern.replace(LOOK_AHEAD, "") if self.cuts else pattern
        self.separator = max([*ranks.values(), *matched.values()]) + 1
        special = {SEPARATOR: self.separator}
        self.encoding = tiktoken.Encoding("ranks", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=special)
        self.matched = dict(matched)
        longest_first = sorted(self.matched, key=len, reverse=True)
        self.added = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self.first_characters = {token[0] for token in self.matched}
        self.nfc = nfc
        self.reference = reference

    def packed(self, texts: Sequence[str]) -> Packed:
        is_ascii = np.fromiter(map(str.isascii, texts), bool, len(texts))
        if is_ascii.all() or not is_ascii.any():
            return self.packed_together(texts)
        # One character that is none makes strings of wide ones, which take longer, of all others.
        parts = [(which, self.packed_together([*itertools.compress(texts, which)])) for which in (is_ascii, ~is_ascii)]
        starts, lengths = np.empty((2, len(texts)), np.int64)
        for which, part in parts:
            lengths[which] = part.lengths
            starts[which] = part.starts
        starts[~is_ascii] += len(parts[0][1].ids)
        return Packed(np.concatenate([part.ids for _, part in parts]), starts, lengths)

    def packed_together(self, texts: Sequence[str]) -> Packed:
        whole = SEPARATOR.join(texts)
        if not texts or whole.count(SEPARATOR) >= len(texts) or may_overflow(whole):
            return self.packed_apart(texts)
        only_spaces = not any(map(has_rare_blank, texts))
        if self.nfc and not whole.isascii():
            normal = [self.normalize(text) for text in texts]
            changed = [pair for pair in zip(texts, normal, strict=True) if pair[0] != pair[1]]
            if any(self.added.findall(before) != self.added.findall(after) for before, after in changed):
                return self.packed_apart(texts)  # a spelling that is new there is no added token
            whole = SEPARATOR.join(normal)
        pieces, joints = self.cut(whole, only_spaces=only_spaces)
        ids = self.numbers(SEPARATOR.join(pieces), BETWEEN)
        ends = np.flatnonzero(ids == self.separator)
        if joints:
            places = np.cumsum([piece.count(SEPARATOR) + 1 for piece in pieces[:-1]]) - 1
            ids = ids.copy()
            ids[ends[places]] = joints
            ends = np.delete(ends, places)
        stays = ids != self.separator
        so_far = np.cumsum(stays)
        return end_to_end(ids[stays], np.diff(so_far[ends], prepend=0, append=np.count_nonzero(stays)))

    def packed_apart(self, texts: Sequence[str]) -> Packed:
        found = [self.ids_of(text) for text in texts]
        return end_to_end([i for ids in found for i in ids], [len(ids) for ids in found])

    def ids_of(self, text: str) -> list[int]:
        """The ids of a text that has the separator in it, too many blanks for tiktoken, or a new spelling in NFC."""
        if may_overflow(text):
            if self.reference is None:
                raise UserError("900,000 white space characters in a row; remove them, or use a tokenizer.json")
            return self.reference.encode_batch([text])[0]
        ids: list[int] = []
        for i, part in enumerate(self.added.split(text)):
            if i % 2:
                ids.append(self.matched[part])
                continue
            normal = nfc(part) if self.nfc and not part.isascii() else part
            for piece in cut_at(normal, cuts(normal.replace(SEPARATOR, ".")) if self.cuts else []):  # no end of a text
                ids += self.numbers(piece, NOTHING).tolist()
        return ids

    def cut(self, text: str, *, only_spaces: bool) -> tuple[list[str], list[int]]:
        """The pieces of a text, and between each two the id of the added token there, or the separator's."""
        pieces: list[str] = []
        joints: list[int] = []
        for i, part in enumerate(self.added.split(text) if self.may_match(text) else [text]):
            if i % 2:  # what the parentheses caught
                joints.append(self.matched[part])
            else:
                found = cut_at(part, cuts(part, only_spaces=only_spaces)) if self.cuts else [part]
                joints += [self.separator] * (len(found) - 1)
                pieces += found
        return pieces, joints

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self.packed(texts).listed()]

    def numbers(self, text: str, special: Set[str]) -> NDArray[np.int32]:
        return self.encoding.encode_to_numpy(text, allowed_special=special, disallowed_special=NOTHING).view(np.int32)

    def may_match(self, text: str) -> bool:
        """Whether an added token is in the text; most texts lack even the character with which they begin."""
        for first in self.first_characters:
            if first in text:
                return self.added.search(text) is not None
        return False

    def normalize(self, text: str) -> str:
        if text.isascii() or not self.nfc:
            return text
        return "".join(part if i % 2 else nfc(part) for i, part in enumerate(self.added.split(text)))


def cuts(text: str, *, only_spaces: bool = False) -> list[int]:
    """Where the look-ahead cuts: before the last of several blanks, unless a line or the text ends after it.

    `only_spaces`: there are no other blanks, so that none need be looked for.
    """
    found = [match.start() + 1 for match in LAST_SPACES.finditer(text)] if "  " in text else []
    if not only_spaces:
        for match in RARE_BLANK.finditer(text):
            at = match.start()
            if text[at + 1 : at + 2] == " ":
                at += 1
            elif at == 0 or text[at - 1] not in BLANKS:
                continue
            if text[at + 1 : at + 2] not in AFTER_LAST:
                found.append(at)
        found.sort()
    return found


def has_rare_blank(text: str) -> bool:
    if text.isascii():
        return "\t" in text or "\v" in text or "\f" in text
    return RARE_BLANK.search(text) is not None


def cut_at(text: str, places: Sequence[int]) -> list[str]:
    return [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])] if places else [text]


def may_overflow(text: str) -> bool:
    return len(text) >= LONGEST_WHITE_SPACE and WHITE_SPACE_RUN.search(text) is not None


def end_to_end(ids: Sequence[int] | NDArray[np.int32], lengths: Sequence[int] | NDArray[np.int64]) -> Packed:
    sizes = np.asarray(lengths, np.int64)
    return Packed(np.asarray(ids, np.int32), np.cumsum(sizes) - sizes, sizes)


def tiktoken_encoder(content: Mapping[str, Any], library: tokenizers.Tokenizer) -> TiktokenEncoder | None:
    """The encoder of a tokenizer.json (its content, and it loaded); None where tiktoken might give other ids."""
    normalizer = content.get("normalizer")
    pattern = known_pattern(content.get("pre_tokenizer") or {})
    matched = matched_tokens(content.get("added_tokens") or [])
    if pattern is None or matched is None or (normalizer and normalizer != {"type": "NFC"}):
        return None
    ranks = mergeable_ranks(content["model"], library.model.tokenize)
    if ranks is None:
        return None
    return TiktokenEncoder(
        ranks, matched, pattern=pattern, nfc=normalizer is not None, reference=LibraryEncoder(library)
    )


def known_pattern(pre_tokenizer: Mapping[str, Any]) -> str | None:
    if pre_tokenizer.get("type") == "ByteLevel" and pre_tokenizer.get("use_regex", True):
        return None if pre_tokenizer.get("add_prefix_space", True) else GPT2_PATTERN
    match pre_tokenizer:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if pattern in (QWEN3_PATTERN, GPT2_PATTERN):
            return pattern
    return None


def matched_tokens(added: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """The added tokens that text can yield; None where they match in another way than by their spelling alone."""
    matched = {token["content"]: token["id"] for token in added if not token["special"]}
    control = [token["content"] for token in added if token["special"]]
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    if any(token[flag] for token in added if not token["special"] for flag in flags):
        return None
    # The library finds a control token first, and then goes on after it, though it takes it for ordinary text.
    return None if any(overlap(a, b) for a in matched for b in control) else matched


def overlap(a: str, b: str) -> bool:
    """Whether one holds the other, or one ends as the other begins."""
    ends = any(a.endswith(b[:i]) or b.endswith(a[:i]) for i in range(1, min(len(a), len(b))))
    return ends or a in b or b in a


def mergeable_ranks(
    model: Mapping[str, Any], tokenize: Callable[[str], Sequence[tokenizers.Token]]
) -> dict[bytes, int] | None:
    """The ranks of what tokens the merges can give; None where the argument above does not hold.

    Other entries of the vocabulary, such as control tokens among the first ids, come of no text.
    """
    other = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    if model.get("type") != "BPE" or any(map(model.get, other)):
        return None
    vocabulary, byte_of = model["vocab"], byte_of_character()
    products = ["".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    order = [vocabulary[product] for product in products]
    if not set("".join(products)) <= byte_of.keys() <= vocabulary.keys():
        return None
    if any(i >= j for i, j in itertools.pairwise(order)):
        return None
    if not all(reachable(product, i, tokenize) for product, i in zip(products, order, strict=True)):
        return None
    translation = str.maketrans({character: chr(byte) for character, byte in byte_of.items()})
    ranks = {bytes([byte]): vocabulary[character] for character, byte in byte_of.items()}
    ranks |= {product.translate(translation).encode("latin-1"): i for product, i in zip(products, order, strict=True)}
    return ranks


def reachable(token: str, i: int, tokenize: Callable[[str], Sequence[tokenizers.Token]]) -> bool:
    found = tokenize(token)
    return len(found) == 1 and found[0].id == i


def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
