import json
import pickle

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from sft.errors import UserError
from sft.tokenizer import load_tokenizer
from tests.tiny_tokenizer import save_tiny_tokenizer, tiny_library_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return load_tokenizer(save_tiny_tokenizer(tmp_path_factory.mktemp("tiny")))


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
    library.model = models.WordLevel(library.get_vocab(with_added_tokens=False), unk_token="A")


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


def test_a_pickled_tokenizer_is_the_same_one(tiny):
    copy = pickle.loads(pickle.dumps(tiny))
    assert (copy.fingerprint, copy.path, copy.backend) == (tiny.fingerprint, tiny.path, tiny.backend)
    assert copy.encode("the cat") == tiny.encode("the cat")


def test_a_tokenizer_file_of_any_name_is_found_again_in_the_folder_it_is_copied_to(tmp_path):
    named = save_tiny_tokenizer(tmp_path).rename(tmp_path / "mine.json")
    tokenizer = load_tokenizer(named)
    (tmp_path / "copy").mkdir()
    assert tokenizer.copy_to(tmp_path / "copy") == ["tokenizer.json"]
    assert load_tokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint
