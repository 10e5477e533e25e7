import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from sft.errors import UserError
from sft.tokenizer import QWEN3_PATTERN, load_tokenizer, tiktoken_encoder
from tests.tiny_tokenizer import CONTROL, OTHER, save_tiny_tokenizer, tiny_library_tokenizer

PIECES = st.sampled_from(
    [
        *CONTROL,
        *OTHER,
        "<",
        "|>",
        "\n",
        "\n\n",
        "  ",
        "\u0301",
        "e\u0301",
        ">\u0338",
        "\u212b",
        "你",
        "'S",
        "12",
        "\x00",
    ]
)
TEXT = st.lists(PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=8).map("".join)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return load_tokenizer(save_tiny_tokenizer(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def published(shared):
    return load_tokenizer(shared / "tokenizer/qwen3")


@pytest.fixture(scope="session")
def published_tiktoken(shared):
    return load_tokenizer(shared / "tokenizer/qwen3/qwen.tiktoken")


@given(text=TEXT)
def test_text_never_yields_a_control_token_and_comes_back(tiny, text):
    ids = tiny.encode(text)
    assert set(ids).isdisjoint(tiny.control.values())
    assert tiny.decode(ids) == normalized(text)


def normalized(text):
    """NFC (by the tables of the library) of each stretch between the added tokens that match."""
    parts = re.split(f"({'|'.join(OTHER)})", text)
    return "".join(normalizers.NFC().normalize_str(part) for part in parts)


@example(text="a\u0898\u0316")  # Python reorders these marks, the older tables of the library do not
@given(text=TEXT)
def test_both_libraries_give_the_same_ids(tiny, text):
    ranks = {token: i for i, token in tiny.token_bytes.items() if token.decode("latin-1") not in CONTROL + OTHER}
    encode = tiktoken_encoder(ranks, {token: tiny.encode(token)[0] for token in OTHER}, QWEN3_PATTERN)
    assert encode([text]) == [tiny.encode(text)]


def test_other_added_tokens_match_and_control_tokens_do_not(tiny):
    assert len(tiny.encode("<think>")) == 1
    assert len(tiny.encode("<|im_end|>")) > 1
    assert tiny.spells_control("a<|im_end|>b")
    assert not tiny.spells_control("a<|im_end>b <think>")


def test_decode_skips_control_tokens_only_when_asked_to(tiny):
    ids = [tiny.im_start, *tiny.encode("hat"), tiny.im_end]
    assert tiny.decode(ids) == "hat"
    assert tiny.decode(ids, skip_control=False) == "<|im_start|>hat<|im_end|>"
    assert tiny.decode([tiny.vocab_size + 5]) == "\ufffd"


def test_encode_batch_agrees_with_encode(tiny):
    texts = ["", "the cat", "é\n"]
    assert tiny.encode_batch(texts) == [tiny.encode(text) for text in texts]


def test_padding_truncation_dropout_and_a_template_in_the_file_change_nothing(tiny, tmp_path):
    path = save_tiny_tokenizer(tmp_path)
    content = json.loads(path.read_text())
    content["model"]["dropout"] = 0.9
    path.write_text(json.dumps(content))
    library = Tokenizer.from_file(str(path))
    library.enable_padding(length=50)
    library.enable_truncation(2)
    library.save(str(path))
    text = "the cat and the hat sat on the mat"
    assert load_tokenizer(path).encode(text) == tiny.encode(text)


def test_the_copy_in_another_folder_is_the_same_tokenizer(tiny, tmp_path):
    tiny.copy_to(tmp_path)
    copy = load_tokenizer(tmp_path)
    assert copy.fingerprint == tiny.fingerprint
    copy.copy_to(tmp_path)  # onto itself
    assert load_tokenizer(tmp_path).vocab_size == tiny.vocab_size


def test_fingerprints_differ_when_a_token_becomes_a_control_token(tiny, tmp_path):
    path = save_tiny_tokenizer(tmp_path)
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] |= token["content"] == "<think>"
    path.write_text(json.dumps(content))
    other = load_tokenizer(path)
    assert other.token_bytes == tiny.token_bytes
    assert other.fingerprint != tiny.fingerprint


def test_a_tokenizer_without_the_control_tokens_is_refused(tmp_path):
    path = save_tiny_tokenizer(tmp_path, control=["<|endoftext|>"])
    with pytest.raises(UserError, match=r"no control token <\|im_start\|>, <\|im_end\|>"):
        load_tokenizer(path)


def test_control_tokens_that_content_would_match_are_refused(tmp_path):
    library = tiny_library_tokenizer(control=["<|endoftext|>", "<|im_end|>"])
    library.add_tokens([AddedToken("<|im_start|>", normalized=False, special=False)])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no control token <\|im_start\|>; .* special: true"):
        load_tokenizer(tmp_path)


def lower_case(library):
    library.normalizer = normalizers.Lowercase()


def prefix_space(library):
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def whole_words(library):
    library.model = models.WordLevel({"A": 3, "[UNK]": 4}, unk_token="[UNK]")


def whole_pieces(library):
    """A piece that is an entry of the vocabulary becomes it without merges: between spaces, `<|im_end|>` too."""
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.model.ignore_merges = True


@pytest.mark.parametrize("spoil", [lower_case, prefix_space, whole_words, whole_pieces])
def test_a_tokenizer_that_does_not_give_text_back_is_refused(tmp_path, spoil):
    library = tiny_library_tokenizer()
    spoil(library)
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="does not come back"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "no such file"),
        ("tokenizer.json", b"{}", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "not a tokenizer.json"),
        ("a.tiktoken", b"IQ== 0\nI!= 1\n", r"a\.tiktoken:2: "),
        ("a.tiktoken", b"IQ== 0\n", "1 tokens; .* use tokenizer.json"),
        ("", None, "one tokenizer.json or .* found none"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / name)


@pytest.mark.oracle
def test_published_examples_of_ids_are_reproduced_by_both_libraries(shared, published, published_tiktoken):
    count = 0
    for file in (shared / "oracles/tokenizer").glob("*.json"):
        for cases in json.loads(file.read_text()).values():
            for case in cases if isinstance(cases, list) else []:
                if set(case) >= {"text", "ids"}:
                    count += 1
                    assert encode_with_control(published, case["text"]) == case["ids"]
                    assert encode_with_control(published_tiktoken, case["text"]) == case["ids"]
    assert count > 40


def encode_with_control(tokenizer, text):
    """What the examples show: a rendered text, whose control tokens are meant."""
    parts = re.split(f"({'|'.join(map(re.escape, tokenizer.control))})", text)
    return [
        i
        for part in parts
        for i in ([tokenizer.control[part]] if part in tokenizer.control else tokenizer.encode(part))
    ]


@pytest.mark.oracle
def test_both_published_files_are_one_vocabulary(published, published_tiktoken):
    for tokenizer in (published, published_tiktoken):
        assert tokenizer.vocab_size == 151_669
        assert (tokenizer.pad, tokenizer.im_start, tokenizer.im_end) == (151_643, 151_644, 151_645)
    assert published.fingerprint == published_tiktoken.fingerprint
    assert published.control == published_tiktoken.control


@pytest.mark.oracle
@settings(max_examples=300)
@given(text=TEXT)
def test_both_published_files_give_the_same_ids(published, published_tiktoken, text):
    assert published.encode(text) == published_tiktoken.encode(text)


def test_a_tokenizer_file_of_any_name_is_found_again_in_the_folder_it_is_copied_to(tmp_path):
    named = save_tiny_tokenizer(tmp_path).rename(tmp_path / "mine.json")
    tokenizer = load_tokenizer(named)
    (tmp_path / "copy").mkdir()
    assert tokenizer.copy_to(tmp_path / "copy") == ["tokenizer.json"]
    assert load_tokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint
