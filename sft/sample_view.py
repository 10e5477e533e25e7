"""What a reader sees of a sample: its tokens as pieces of text in which nothing is invisible."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

from sft.samples import NOT_TRAINED
from sft.tokenizer import Tokenizer

# Controls, halves of pairs (which stand for bytes that are no character), what turns the direction of writing around,
# and what has no width; but not the joiners U+200C and U+200D, which many scripts and emoji are written with.
INVISIBLE = re.compile(
    "([\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f])"
)
STAND_INS = {"\n": "↵\n", "\t": "⇥\t"}  # each with the character itself: lines end and columns align as written
TRAINED, FAINT, REVERSED = "32", "2", "7"  # colours of a terminal; 32 is green


class Piece(NamedTuple):
    """The tokens, mostly one, that make whole characters together and are trained alike."""

    ids: tuple[int, ...]
    runs: tuple[str, ...]  # plain text at even places, at odd ones what stands for something invisible
    trained: bool
    weight: float
    is_control: bool


def pieces(
    ids: Sequence[int], labels: Sequence[int], weights: Sequence[float] | None, tokenizer: Tokenizer
) -> Iterator[Piece]:
    """A sample from its first token to its last; bytes that are no whole character are shown as <0xNN>."""
    names = {i: name for name, i in tokenizer.control.items()}
    alone = names.keys() | {i for i in ids if i not in tokenizer.token_bytes}
    told = [1.0] * len(ids) if weights is None else weights
    tokens = [
        (i, label != NOT_TRAINED, float(weight) if label != NOT_TRAINED else 0.0, i in alone)
        for i, label, weight in zip(ids, labels, told, strict=True)
    ]
    for (trained, weight, is_alone), group in groupby(tokens, key=lambda token: token[1:]):
        stretch = [token[0] for token in group]
        if is_alone:
            for i in stretch:
                runs = (on_one_line(names[i]),) if i in names else ("", f"<no token {i}>")
                yield Piece((i,), runs, trained, weight, i in names)
        else:
            for together, text in whole_characters(stretch, tokenizer):
                yield Piece(together, tuple(visible_runs(text)), trained, weight, False)


def whole_characters(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[tuple[tuple[int, ...], str]]:
    """The ids in the smallest groups that do not divide a character, and the text of each."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    group: list[int] = []
    text = ""
    for i in ids:
        group.append(i)
        text += decoder.decode(tokenizer.token_bytes[i])
        if not decoder.getstate()[0]:  # no byte waits for the rest of its character
            yield tuple(group), text
            group, text = [], ""
    if group:
        yield tuple(group), text + decoder.decode(b"", final=True)


def visible_runs(text: str) -> list[str]:
    """The text divided: plain runs at even places, at odd ones what stands for something invisible."""
    runs = INVISIBLE.split(text)
    runs[1::2] = map(stand_in, runs[1::2])
    return runs


def stand_in(character: str) -> str:
    code = ord(character)
    if character in STAND_INS:
        return STAND_INS[character]
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is no character
        return f"<0x{code - 0xDC00:02X}>"
    return f"<0x{code:02X}>" if code < 0x80 else f"<U+{code:04X}>"


def on_one_line(text: str) -> str:
    return "".join(run.strip("\n\t") for run in visible_runs(text))


def spelled(token: int, tokenizer: Tokenizer) -> str:
    """The token as a quoted text, or its bytes in hexadecimal where they are no whole characters."""
    found = tokenizer.token_bytes.get(token)
    if found is None:
        return "not in the vocabulary"
    try:
        return repr(found.decode())
    except UnicodeDecodeError:
        return "bytes " + found.hex(" ").upper()


def shortened(sample: Sequence[Piece], most: int | None) -> list[Piece]:
    """The first and the last pieces of about `most` characters, and between them a mark for what is left out."""
    lengths = [sum(map(len, piece.runs)) for piece in sample]
    if most is None or sum(lengths) <= most:
        return list(sample)
    first = sum(end <= most // 2 for end in accumulate(lengths))
    last = len(sample) - sum(end <= most // 2 for end in accumulate(reversed(lengths)))
    tokens = sum(len(piece.ids) for piece in sample[first:last])
    return [*sample[:first], Piece((), ("", f"[... {tokens:,} tokens ...]"), False, 0.0, False), *sample[last:]]


def painted(sample: Sequence[Piece]) -> Iterator[str]:
    """The sample for a terminal with colours: trained tokens green, control tokens and line ends faint."""
    for code, runs in groupby(coded_runs(sample), key=lambda run: run[0]):
        text = "".join(text for _, text in runs)
        yield f"\x1b[{code}m{text}\x1b[0m" if code else text


def coded_runs(sample: Sequence[Piece]) -> Iterator[tuple[str, str]]:
    """(code of the colour, text), line ends without one, because pagers begin each line without."""
    for (trained, _), stretch in alike(sample):
        base = TRAINED if trained else ""
        if weight := weight_mark(stretch[0]):
            yield joined(base, REVERSED), weight
        for piece in stretch:
            if piece.is_control:
                yield joined(base, FAINT), chip(piece)
                continue
            for place, run in enumerate(piece.runs):
                mark = run.rstrip("\n\t")
                code = FAINT if mark != run else REVERSED if place % 2 else ""
                yield from ((code, text) for code, text in ((joined(base, code), mark), ("", run[len(mark) :])) if text)


def joined(*codes: str) -> str:
    return ";".join(filter(None, codes))


def bracketed(sample: Sequence[Piece]) -> Iterator[str]:
    """The sample for anything else: trained tokens in brackets."""
    for (trained, _), stretch in alike(sample):
        text = "".join(chip(piece) if piece.is_control else "".join(piece.runs) for piece in stretch)
        yield f"⟦{weight_mark(stretch[0])}{text}⟧" if trained else text


def alike(sample: Sequence[Piece]) -> Iterator[tuple[tuple[bool, float], list[Piece]]]:
    for key, group in groupby(sample, key=lambda piece: (piece.trained, piece.weight)):
        yield key, list(group)


def chip(piece: Piece) -> str:
    """A control token so that no text looks like one: not <|im_end|> but ⟨im_end⟩."""
    return "⟨" + piece.runs[0].removeprefix("<|").removesuffix("|>") + "⟩"


def weight_mark(piece: Piece) -> str:
    return f"x{piece.weight:g} " if piece.trained and piece.weight != 1 else ""
