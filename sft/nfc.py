"""Unicode's composed form, as the tokenizers library has it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache

import tokenizers

# Texts of fewer characters cannot hold what takes Python's code long, and are not searched for it.
SHORT = 1_000
# Python sorts combining marks, of which some text has thousands in a row, in quadratic time. None is a \w or a \s.
MARKS_RUN = re.compile(r"[^\w\s][^\w\s]{99}")


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
