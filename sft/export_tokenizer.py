"""A tokenizer in the files that Transformers reads, and where generation stops."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from sft.byte_pair import QWEN3_PATTERN, byte_of_character
from sft.errors import UserError
from sft.tokenizer import END_OF_TEXT, Tokenizer, read_ranks
from sft.untrusted import strict_json

# What a tokenizer.json may say and is not to: ids would depend on chance, or be cut and padded.
DROPPED = ("truncation", "padding")


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The content of tokenizer.json: the file itself where it is one, without chance, truncation and padding; else
    built from a *.tiktoken, with the ids that this gives."""
    if tokenizer.path.suffix == ".tiktoken":
        ranks = read_ranks(tokenizer.path)
        others = {i: token.decode() for i, token in tokenizer.token_bytes.items() if i >= len(ranks)}
        return library_of_ranks(ranks, others, control=set(tokenizer.control)).to_str(pretty=False).encode()
    given = tokenizer.path.read_bytes()
    content = strict_json(given)
    model = content["model"]
    if not any(content.get(name) for name in DROPPED) and not model.get("dropout"):
        return given
    content = {**content, **dict.fromkeys(DROPPED), "model": {**model, "dropout": None}}
    return json.dumps(content, ensure_ascii=False).encode()


def library_of_ranks(ranks: Mapping[bytes, int], added: Mapping[int, str], *, control: set[str]) -> Library:
    """The tokenizers library's form of Qwen's ranks and the tokens that follow them."""
    character_of = {byte: character for character, byte in byte_of_character().items()}

    def spelled(token: bytes) -> str:
        return "".join(character_of[byte] for byte in token)

    ordered = sorted(ranks.items(), key=lambda pair: pair[1])
    merges = [merge_of(token, ranks) for token, _ in ordered if len(token) > 1]
    library = Library(
        models.BPE(
            vocab={spelled(token): rank for token, rank in ordered},
            merges=[(spelled(left), spelled(right)) for left, right in merges],
        )
    )
    library.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN3_PATTERN), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    for i, token in sorted(added.items()):
        library.add_tokens([AddedToken(token, normalized=False, special=token in control)])
        assert library.token_to_id(token) == i, (token, i)
    return library


def merge_of(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that were joined to this one, at a time when only lower ranks were tokens."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, ranks[token]) for left, right in itertools.pairwise(parts)]
        lowest = min(joined)
        if lowest == ranks[token]:
            raise UserError(f"the token {token!r} of a *.tiktoken is made of no two others; use tokenizer.json")
        i = joined.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def tokenizer_config(tokenizer: Tokenizer, written: bytes, *, block_size: int, ends_with: str) -> dict[str, Any]:
    """The content of tokenizer_config.json, which every version of Transformers understands alike; `written` is that
    of the tokenizer.json beside it."""
    added = sorted(strict_json(written)["added_tokens"], key=lambda token: token["id"])
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it is; a family's own class rebuilds it
        "added_tokens_decoder": {str(token["id"]): without_id(token) for token in added},
        "additional_special_tokens": list(tokenizer.control),
        "bos_token": None,
        "eos_token": ends_with,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": block_size,
        "split_special_tokens": False,
    }


def without_id(token: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in token.items() if name != "id"}


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of generation_config.json: an answer stops at its end, and at that of a document, as in our chat."""
    return {
        "bos_token_id": None,
        "eos_token_id": [tokenizer.im_end, tokenizer.pad],
        "pad_token_id": tokenizer.pad,
    }
