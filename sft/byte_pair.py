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

import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Protocol

import tiktoken
import tokenizers

from sft.errors import UserError

Backend = Literal["tiktoken", "tokenizers"]

QWEN3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# A look-ahead keeps tiktoken from its fast regular expressions. This one matters only to white space other than line
# ends: of two or more such characters before something else it leaves the last to what follows. Where text is cut there
# beforehand, and encoded part by part, the pattern without it finds the same pieces.
LOOK_AHEAD = r"|\s+(?!\S)"
RARE_BLANKS = "\t\v\f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
RARE_BLANK = re.compile(f"[{RARE_BLANKS}]")
BLANKS = re.compile(f"[ {RARE_BLANKS}]{{2,}}")
SPACES = re.compile(" {2,}")  # the same where no other blanks are, and much faster

NEVER_WRITTEN = "\U0010fffd never written \U0010fffd"
NOTHING: Set[str] = frozenset()

# Texts of fewer characters cannot hold what takes tiktoken's or Python's code long, and are not searched for it.
SHORT = 1_000
# tiktoken's regular expressions overflow a stack at a million white space characters in a row.
WHITE_SPACE_RUN = re.compile(r"\s(?<!\s\s)\s{899999}")
# Python sorts combining marks, of which some text has thousands in a row, in quadratic time. None is a \w or a \s.
MARKS_RUN = re.compile(r"[^\w\s][^\w\s]{99}")


class Encoder(Protocol):
    """Text -> ids; control tokens are ordinary text, other added tokens match."""

    name: Backend

    def packed(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text as int32 after int32: an object for each token would take longer than the rest."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def normalize(self, text: str) -> str | None:
        """What the ids of the text stand for; None where only decoding them can tell."""


class LibraryEncoder:
    """The tokenizers library, for any tokenizer.json: the definition."""

    name: Backend = "tokenizers"

    def __init__(self, library: tokenizers.Tokenizer):
        self.wrapped = library

    def packed(self, texts: Sequence[str]) -> list[bytes]:
        return [array("i", ids).tobytes() for ids in self.encode_batch(texts)]

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
        # Where there is a special token to look for, tiktoken does so once, and not at each character.
        special = {NEVER_WRITTEN: max(ranks.values()) + 1}
        self.encoding = tiktoken.Encoding("ranks", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=special)
        self.matched = {token: array("i", [i]).tobytes() for token, i in matched.items()}
        longest_first = sorted(self.matched, key=len, reverse=True)
        self.added = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self.first_characters = {token[0] for token in self.matched}
        self.nfc = nfc
        self.reference = reference

    def packed(self, texts: Sequence[str]) -> list[bytes]:
        return [self.packed_text(text) for text in texts]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [array("i", ids).tolist() for ids in self.packed(texts)]

    def packed_text(self, text: str) -> bytes:
        if len(text) >= SHORT and WHITE_SPACE_RUN.search(text):
            return self.by_reference(text)
        if not self.may_match(text):
            return self.packed_stretch(text)
        parts = enumerate(self.added.split(text))  # odd ones: what the parentheses caught
        return b"".join([self.matched[part] if i % 2 else self.packed_stretch(part) for i, part in parts])

    def may_match(self, text: str) -> bool:
        """Whether an added token is in the text; most texts lack even the character with which they begin."""
        for first in self.first_characters:
            if first in text:
                return self.added.search(text) is not None
        return False

    def packed_stretch(self, text: str) -> bytes:
        is_ascii = text.isascii()
        if self.nfc and not is_ascii:
            text = nfc(text)
        if not self.cuts:
            return self.pack(text)
        is_rare = ("\t" in text or "\v" in text or "\f" in text) if is_ascii else RARE_BLANK.search(text) is not None
        if not is_rare and "  " not in text:
            return self.pack(text)
        parts = []
        start = 0
        for run in (BLANKS if is_rare else SPACES).finditer(text):
            cut = run.end() - 1
            if text[cut + 1 : cut + 2] not in ("", "\r", "\n"):
                parts.append(self.pack(text[start:cut]))
                start = cut
        return b"".join([*parts, self.pack(text[start:])])

    def pack(self, text: str) -> bytes:
        return self.encoding.encode_to_numpy(text, allowed_special=NOTHING, disallowed_special=NOTHING).tobytes()

    def by_reference(self, text: str) -> bytes:
        if self.reference is None:
            raise UserError("900,000 white space characters in a row; remove them, or use a tokenizer.json")
        return self.reference.packed([text])[0]

    def normalize(self, text: str) -> str:
        if text.isascii() or not self.nfc:
            return text
        return "".join(part if i % 2 else nfc(part) for i, part in enumerate(self.added.split(text)))


def nfc(text: str) -> str:
    """The text in NFC by the tables of tokenizers, which are older than Python's, mostly by Python's faster code."""
    if disputed().search(text) or (len(text) >= SHORT and MARKS_RUN.search(text)):
        return tokenizers.normalizers.NFC().normalize_str(text)
    return unicodedata.normalize("NFC", text)


@cache
def disputed() -> re.Pattern[str]:
    """The characters that Python and tokenizers normalise differently, and any others in other planes between those.

    Characters that one of the two does not know are starters without a decomposition to it: all else never changes
    from version to version. After U+0345, whose combining class is the highest, every other mark moves.
    """
    lines = [f"\u0345{character}" for character in combining_planes()]
    probe = "\n".join(lines)
    found = set()
    for ours, theirs in (
        (unicodedata.normalize("NFC", probe), tokenizers.normalizers.NFC().normalize_str(probe)),
        (unicodedata.normalize("NFD", probe), tokenizers.normalizers.NFD().normalize_str(probe)),
    ):
        lists = zip(lines, ours.split("\n"), theirs.split("\n"), strict=True)
        found |= {part for line, a, b in lists if a != b for part in line + a + b}  # parts compose, too
    found -= {"\u0345"}
    near = "".join(sorted(character for character in found if character <= "\uffff"))
    far = sorted(found - set(near))
    # A class of ranges above U+FFFF is searched one by one, several times slower than a single one.
    return re.compile(f"[{re.escape(near)}{f'{far[0]}-{far[-1]}' if far else ''}]" if found else "(?!)")


def combining_planes() -> Iterator[str]:
    """All characters from U+0300 but ideographs, Hangul, private use and planes without characters that combine."""
    for first, last in ((0x300, 0x33FF), (0xA000, 0xABFF), (0xF900, 0x1FFFF), (0xE0000, 0xE0FFF)):
        yield from map(chr, range(first, last + 1))


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
    if any(i >= j for i, j in pairwise(order)):
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
