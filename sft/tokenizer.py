"""Byte-level vocabularies with ChatML's control tokens, from tokenizer.json or *.tiktoken.

Control tokens are the added tokens with special: true. Text never yields one, whatever it spells: `encode` takes them
for ordinary text, while other added tokens (`<think>`, `<tool_call>`) match as usual.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import reprlib
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import tokenizers

from sft.byte_pair import (
    QWEN3_PATTERN,
    Backend,
    Encoder,
    LibraryEncoder,
    TiktokenEncoder,
    byte_of_character,
    tiktoken_encoder,
)
from sft.errors import UserError
from sft.files import copy_whole
from sft.untrusted import MEBIBYTE, MOST_IDS, read_bytes, strict_json

LONGEST_REASON = 300  # characters of what a library says
LARGEST_FILE = 128 * MEBIBYTE  # the largest published tokenizer.json has 34

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

# Qwen3 publishes *.tiktoken without the tokens that follow it: these, in this order.
QWEN3_BASE_SIZE = 151_643
QWEN3_CONTROL = [
    *(END_OF_TEXT, IM_START, IM_END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>"),
    "<|video_pad|>",
]
QWEN3_OTHER = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]


class Tokenizer:
    """Text <-> ids; whichever library does the work, equal vocabularies give equal ids."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        token_bytes: Mapping[int, bytes],
        control: Mapping[str, int],
        files: Mapping[str, Path],
    ):
        """`token_bytes` covers every id, added tokens included; `files` is what a folder needs, by name, to hold it."""
        self.encoder = encoder
        self.backend: Backend = encoder.name  # the library that does the work
        self.encode_batch, self.packed = encoder.encode_batch, encoder.packed
        self.token_bytes = dict(token_bytes)
        self.control = dict(control)
        self.files = dict(files)
        self.path = next(iter(self.files.values()))  # as it was named by who loaded it
        self.vocab_size = max(self.token_bytes, default=-1) + 1
        if self.vocab_size > MOST_IDS:
            raise UserError(
                f"{self.path}: has the id {self.vocab_size - 1:,}, no vocabulary has more than {MOST_IDS:,}"
            )
        self.check()
        self.im_start, self.im_end, self.pad = (self.control[name] for name in (IM_START, IM_END, END_OF_TEXT))
        self.fingerprint = fingerprint_of(self.token_bytes, set(self.control.values()))

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def check(self) -> None:
        """UserError unless the control tokens are there and any text comes back from its ids."""
        missing = [name for name in (IM_START, IM_END, END_OF_TEXT) if name not in self.control]
        if missing:
            raise UserError(
                f"{self.path}: no control token {', '.join(missing)}; "
                "ChatML needs each as an added token with special: true"
            )
        # Prefix spaces, lower case, missing bytes and an unknown token all show here.
        probe = "A b\n\n  c\té 你好 🦙\x00" + "".join(f"{name} " for name in self.control)
        ids = self.encode(probe)
        if self.decode(ids, skip_control=False) != probe or not set(self.control.values()).isdisjoint(ids):
            raise UserError(
                f"{self.path}: text does not come back from its ids unchanged; "
                "only byte-level BPE vocabularies with all 256 bytes (Qwen, Llama 3, GPT-2) can be used"
            )

    def __reduce__(self) -> tuple[Callable[[Path], Tokenizer], tuple[Path]]:
        return load_tokenizer, (self.path,)  # a process that is started anew reads the file

    def normalize(self, text: str) -> str:
        """What decode(encode(text)) gives: NFC between the added tokens that match, or the text itself."""
        normalized = self.encoder.normalize(text)
        return self.decode(self.encode(text)) if normalized is None else normalized

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """The text; bytes that are not UTF-8 and ids that are not in the vocabulary become U+FFFD."""
        skipped = set(self.control.values()) if skip_control else set()
        unknown = "\ufffd".encode()
        return b"".join(self.token_bytes.get(i, unknown) for i in ids if i not in skipped).decode("utf-8", "replace")

    def spells_control(self, text: str) -> bool:
        """Whether the text contains the spelling of a control token."""
        return self._control_spelling.search(text) is not None

    @cached_property
    def _control_spelling(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.control)))

    def copy_to(self, folder: str | Path) -> list[str]:
        """Copy the files into the folder, where load_tokenizer(folder) finds this tokenizer; their names."""
        for name, file in self.files.items():
            target = Path(folder) / name
            if not (target.exists() and target.samefile(file)):
                copy_whole(file, target)
        return list(self.files)


def fingerprint_of(token_bytes: Mapping[int, bytes], control: Set[int]) -> str:
    """sha256 (hex) over (id, bytes, is control) in order of id: the same for every file of one vocabulary."""
    pack = struct.Struct("<IIB").pack
    tokens = sorted(token_bytes.items(), key=itemgetter(0))
    return hashlib.sha256(b"".join([pack(i, len(token), i in control) + token for i, token in tokens])).hexdigest()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, a *.tiktoken or a folder that holds one (tokenizer.json goes first)."""
    path = Path(path)
    if path.is_dir():
        found = [path / "tokenizer.json"] if (path / "tokenizer.json").exists() else sorted(path.glob("*.tiktoken"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise UserError(f"{path}: one tokenizer.json or *.tiktoken expected, found {names}; name the file itself")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such file; --tokenizer= takes a tokenizer.json, a *.tiktoken or their folder")
    return tiktoken_tokenizer(path) if path.suffix == ".tiktoken" else json_tokenizer(path)


def json_tokenizer(path: Path) -> Tokenizer:
    try:
        return read_json_tokenizer(path)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # what the libraries raise is nothing more particular, a panic not even an Exception
        raise UserError(f"{path}: not a tokenizer.json: {str(error)[:LONGEST_REASON]}") from error


def read_json_tokenizer(path: Path) -> Tokenizer:
    text = read_bytes(path, most=LARGEST_FILE)
    content = strict_json(text)
    library = tokenizers.Tokenizer.from_str(text.decode())
    library.encode_special_tokens = True  # special: true tokens are ordinary text
    library.no_padding()
    library.no_truncation()
    if hasattr(library.model, "dropout"):
        library.model.dropout = None  # a regulariser that would make ids random
    added = library.get_added_tokens_decoder()
    refuse_other_ids(path, content, added)
    byte_of = byte_of_character()
    token_bytes = {i: token_to_bytes(token, byte_of) for token, i in library.get_vocab().items()}
    token_bytes |= {i: token.content.encode() for i, token in added.items()}
    files = {"tokenizer.json": path}
    config = path.with_name("tokenizer_config.json")
    if path.name == "tokenizer.json" and config.exists():  # beside a file of another name it may be another's
        files[config.name] = config
    return Tokenizer(
        tiktoken_encoder(content, library) or LibraryEncoder(library),
        token_bytes=token_bytes,
        control={token.content: i for i, token in sorted(added.items()) if token.special},
        files=files,
    )


def refuse_other_ids(path: Path, content: Mapping[str, Any], added: Mapping[int, tokenizers.AddedToken]) -> None:
    """UserError where the ids that the file gives are not those that the library makes of them."""
    told = Counter((token["content"], token["id"]) for token in content.get("added_tokens") or [])
    made = Counter((token.content, i) for i, token in added.items())
    if odd := (told - made) + (made - told):
        name, _ = min(odd)
        raise UserError(f"{path}: the added token {reprlib.repr(name)} occurs twice, or gets another id than it says")
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict) and len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{path}: its vocabulary has two tokens of one id")


def tiktoken_tokenizer(path: Path) -> Tokenizer:
    ranks = read_ranks(path)
    if len(ranks) != QWEN3_BASE_SIZE or set(ranks.values()) != set(range(QWEN3_BASE_SIZE)):
        raise UserError(
            f"{path}: {len(ranks):,} tokens; a *.tiktoken lacks the added tokens, and they are known only for Qwen3's "
            f"{QWEN3_BASE_SIZE:,}; use tokenizer.json"
        )
    added = {token: QWEN3_BASE_SIZE + i for i, token in enumerate(QWEN3_CONTROL + QWEN3_OTHER)}
    return Tokenizer(
        TiktokenEncoder(ranks, {token: added[token] for token in QWEN3_OTHER}, pattern=QWEN3_PATTERN, nfc=True),
        token_bytes={i: token for token, i in ranks.items()} | {i: token.encode() for token, i in added.items()},
        control={token: added[token] for token in QWEN3_CONTROL},
        files={path.name: path},
    )


def read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        content = read_bytes(path, most=LARGEST_FILE)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(f"{path}:{number}: 'base64-of-a-token rank' expected; is this a *.tiktoken?") from error
    return ranks


def token_to_bytes(token: str, byte_of: Mapping[str, int]) -> bytes:
    try:
        return bytes([byte_of[character] for character in token])
    except KeyError:  # an entry outside the alphabet can only stand for itself
        return token.encode()
