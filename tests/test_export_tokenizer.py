import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library

from sft.byte_pair import QWEN3_PATTERN, TiktokenEncoder, mergeable_ranks
from sft.errors import UserError
from sft.export_tokenizer import library_of_ranks, merge_of, tokenizer_config, tokenizer_json
from sft.tokenizer import load_tokenizer
from tests.tiny_tokenizer import CONTROL, OTHER, save_tiny_tokenizer, tiny_library_tokenizer

TEXTS = [
    "What is the capital of France? It is Paris.\n\n  the cat\tand the hat's",
    "Grüße! \u0041\u030a 你好 🦙 \uff11\uff12 <think>e\u0301</think>",
    " ",
    "",
]


def own_ids(library: Library, text: str) -> list[int]:
    library.encode_special_tokens = True
    return library.encode(text, add_special_tokens=False).ids


def without_control(library: Library) -> dict[bytes, int]:
    """The ranks of a vocabulary whose ids begin with the control tokens, from 0 on."""
    ranks = mergeable_ranks(json.loads(library.to_str())["model"], library.model.tokenize)
    assert ranks is not None
    return {token: rank - len(CONTROL) for token, rank in ranks.items()}


def test_ranks_become_a_library_that_gives_their_ids():
    ranks = without_control(tiny_library_tokenizer())
    added = {len(ranks) + i: token for i, token in enumerate([*CONTROL, *OTHER])}
    library = library_of_ranks(ranks, added, control=set(CONTROL))
    other = {token: i for i, token in added.items() if token in OTHER}
    encoder = TiktokenEncoder(ranks, other, pattern=QWEN3_PATTERN, nfc=True)
    assert [own_ids(library, text) for text in TEXTS] == encoder.encode_batch(TEXTS)
    told = {i: (token.content, token.special) for i, token in library.get_added_tokens_decoder().items()}
    assert told == {i: (token, token in CONTROL) for i, token in added.items()}


def test_a_rank_that_no_two_lower_ones_make_is_refused():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"abc": 3, b"ab": 4}
    with pytest.raises(UserError, match=r"b'abc' of a \*\.tiktoken is made of no two others"):
        merge_of(b"abc", ranks)
    assert merge_of(b"abc", {**ranks, b"abc": 5}) == (b"ab", b"c")


def test_a_tokenizer_json_is_copied_unless_it_would_cut_or_draw(tmp_path: Path):
    path = save_tiny_tokenizer(tmp_path)
    assert tokenizer_json(load_tokenizer(path)) == path.read_bytes()
    library = Library.from_file(str(path))
    library.enable_truncation(3)
    library.enable_padding(length=9)
    library.model.dropout = 0.5
    library.save(str(path))
    written = json.loads(tokenizer_json(load_tokenizer(path)))
    assert (written["truncation"], written["padding"], written["model"]["dropout"]) == (None, None, None)
    for text in TEXTS:
        assert own_ids(Library.from_str(json.dumps(written)), text) == own_ids(tiny_library_tokenizer(), text)


def test_older_versions_find_the_added_tokens_and_what_they_are(tmp_path: Path):
    tokenizer = load_tokenizer(save_tiny_tokenizer(tmp_path))
    config = tokenizer_config(tokenizer, tokenizer_json(tokenizer), block_size=64, ends_with="<|im_end|>")
    told = {token["content"]: token["special"] for token in config["added_tokens_decoder"].values()}
    assert told == dict.fromkeys(CONTROL, True) | dict.fromkeys(OTHER, False)
    assert {int(i) for i in config["added_tokens_decoder"]} == {0, 1, 2, 313, 314}
    assert (config["eos_token"], config["pad_token"], config["bos_token"]) == ("<|im_end|>", "<|endoftext|>", None)


@pytest.mark.slow
@pytest.mark.oracle
def test_qwens_tiktoken_file_becomes_its_published_tokenizer_json(shared: Path, tmp_path: Path):
    folder = shared / "tokenizer" / "qwen3"
    written = tokenizer_json(load_tokenizer(folder / "qwen.tiktoken"))
    made, published = json.loads(written), json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert made["model"]["vocab"] == published["model"]["vocab"]
    assert [list(merge) for merge in made["model"]["merges"]] == [
        merge.split(" ") if isinstance(merge, str) else list(merge) for merge in published["model"]["merges"]
    ]
    assert made["added_tokens"] == published["added_tokens"]
    assert made["normalizer"] == published["normalizer"]
    (tmp_path / "tokenizer.json").write_bytes(written)
    ours, theirs = load_tokenizer(tmp_path), load_tokenizer(folder / "tokenizer.json")
    assert ours.fingerprint == theirs.fingerprint
    assert ours.encode_batch(TEXTS) == theirs.encode_batch(TEXTS)
