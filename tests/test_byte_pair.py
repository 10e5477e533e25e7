import gzip
import json
import re
import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from sft.byte_pair import (
    GPT2_PATTERN,
    QWEN3_PATTERN,
    RARE_BLANKS,
    TiktokenEncoder,
)
from sft.errors import UserError
from sft.nfc import MARKS_RUN, combining_planes, disputed, nfc
from sft.tokenizer import load_tokenizer
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
    assert tiny.decode(ids) == tiny.normalize(text) == normalized(text)


def normalized(text):
    """NFC (by the tables of the library) of each stretch between the added tokens that match."""
    parts = re.split(f"({'|'.join(OTHER)})", text)
    return "".join(normalizers.NFC().normalize_str(part) for part in parts)


BLANK = st.sampled_from([*" \t\v\f\r\n\x1c\x1f\x85\xa0\u1680\u2003\u200b\u2028\u202f\u3000\ufeff", "  ", "   ", "\n\n"])
AROUND_BLANKS = st.lists(BLANK | st.sampled_from([*"ab1.-'_é中", "'ll"]), max_size=14).map("".join)


@pytest.fixture(scope="session")
def merging_blanks(tmp_path_factory):
    """Its merges join blanks with each other and with what follows, so that ids tell where text was cut."""
    texts = [f"{blanks}{word}" for blanks in ("  ", "   ", " ", "\t\t", "\t", "\n ") for word in ("a", "b1", ".")]
    return load_tokenizer(save_tiny_tokenizer(tmp_path_factory.mktemp("blanks"), texts=texts * 3))


@given(text=AROUND_BLANKS)
@settings(max_examples=1000)
def test_cutting_text_in_white_space_replaces_the_look_ahead_of_the_pattern(merging_blanks, text):
    assert merging_blanks.backend == "tiktoken"
    assert merging_blanks.encode(text) == merging_blanks.encoder.reference.encode_batch([text])[0]


ODD = ["<think>", "a  <think> \x1c", "e\u0301  \u0301", "", "  </think>"]


@given(texts=st.lists(AROUND_BLANKS | st.sampled_from(ODD)))
def test_texts_have_the_ids_together_that_each_has_alone(tiny, merging_blanks, texts):
    for tokenizer in (tiny, merging_blanks):
        assert tokenizer.encode_batch(texts) == tokenizer.encoder.reference.encode_batch(texts)


def test_a_spelling_that_only_normalising_gives_is_no_added_token(tmp_path):
    path = save_tiny_tokenizer(tmp_path)
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        if token["content"] == "<think>":
            token["content"] = "<thinK>"
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(path)
    assert tokenizer.backend == "tiktoken"
    for text in ("<thinK>", "<thin\u212a>", "a <thin\u212a> é <thinK>"):  # a Kelvin sign, which NFC makes a K
        assert tokenizer.encode_batch([text, "b"]) == tokenizer.encoder.reference.encode_batch([text, "b"])


def test_the_blanks_at_which_text_is_cut_are_what_the_patterns_take_for_white_space():
    """But for line ends, and but for four control characters that only Python takes for white space."""
    blanks = {chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000 and chr(i).isspace()}
    assert {" ", *RARE_BLANKS} == blanks - set("\r\n\x1c\x1d\x1e\x1f")


@example(text="a\u0898\u0316")  # Python reorders these marks, the older tables of the library do not
@given(text=TEXT)
def test_both_libraries_give_the_same_ids(tiny, text):
    assert tiny.backend == "tiktoken"
    assert tiny.encode(text) == tiny.encoder.reference.encode_batch([text])[0]


@pytest.mark.parametrize(
    ("run", "length"), [(" ", 900_001), ("\n", 900_001), ("\u0315\u0316", 600)], ids=["spaces", "lines", "marks"]
)
def test_both_libraries_give_the_same_ids_for_runs_that_take_one_of_them_too_far(tiny, run, length):
    text = f"<think>a{run * length}é</think>"
    assert tiny.encode(text) == tiny.encoder.reference.encode_batch([text])[0]
    assert tiny.decode(tiny.encode(text)) == tiny.normalize(text) == normalized(text)


def test_a_hundred_thousand_unordered_marks_take_no_quadratic_time(tiny):
    started = time.perf_counter()
    tiny.encode("a" + "\u0315\u0316" * 50_000)
    assert time.perf_counter() - started < 3  # eight seconds by Python's code


@pytest.mark.slow
def test_nfc_is_the_librarys_for_every_character_next_to_marks_of_every_class():
    library = normalizers.NFC(), normalizers.NFD()
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000 and not disputed().match(chr(i))]
    marks = [character for character in characters if unicodedata.combining(character)]
    assert len(marks) > 600
    near = [character for character in combining_planes() if not disputed().match(character)]
    spelled_out = [library[1].normalize_str(c) for c in characters] + [unicodedata.normalize("NFD", c) for c in marks]
    for lines in (
        characters,
        spelled_out,
        *([f"a{mark}{c}" for c in near] for mark in "\u0327\u0301\u0345"),
        *([f"{c}{mark}" for c in near] for mark in "\u0300\u0334"),
        [f"e{a}{b}" for a in marks for b in marks],
    ):
        text = "\n".join(lines)
        assert disputed().search(text) is None
        assert nfc(text) == library[0].normalize_str(text)


def test_a_run_of_marks_is_found_whatever_marks_they_are():
    marks = [chr(i) for i in range(0x110000) if unicodedata.combining(chr(i))]
    assert [mark for mark in marks if not MARKS_RUN.match(mark * 100)] == []


@pytest.mark.slow
@pytest.mark.parametrize("characters", [r"\p{L}", r"\p{N}", r"\s", "(?i:[stremvld])"])
def test_the_classes_of_characters_in_the_patterns_mean_the_same_to_both_libraries(characters):
    encoder = TiktokenEncoder({bytes([i]): i for i in range(256)}, {}, pattern=characters, nfc=False)
    text = "\ue000".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    split = pre_tokenizers.Split(Regex(characters), "removed", invert=True)
    found = bytes(encoder.encode_batch([text])[0]).decode()
    assert found == "".join(piece for piece, _ in split.pre_tokenize_str(text))


@pytest.mark.oracle
@settings(max_examples=300)
@given(text=TEXT)
def test_both_published_files_and_both_libraries_give_the_same_ids(published, published_tiktoken, text):
    assert published.backend == published_tiktoken.backend == "tiktoken"
    assert (
        published.encode(text) == published_tiktoken.encode(text) == published.encoder.reference.encode_batch([text])[0]
    )
    assert published.normalize(text) == published.decode(published.encode(text))


@pytest.mark.oracle
def test_both_libraries_give_the_same_ids_for_published_conversations(shared, published):
    texts = []
    for file in sorted((shared / "data").rglob("*.json*")):
        content = file.read_text()
        whole = file.suffix == ".json"
        texts += list(strings(json.loads(content) if whole else [json.loads(line) for line in content.splitlines()]))
    with gzip.open(shared / "oracles/render/render_cases.jsonl.gz", "rt") as lines:
        texts = texts[::10] + [text for line in lines for text in strings(json.loads(line))]
    assert len(texts) > 3_000
    assert published.encode_batch(texts) == published.encoder.reference.encode_batch(texts)


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


@pytest.mark.oracle
def test_a_bare_tiktoken_file_refuses_the_white_space_that_it_cannot_encode(published_tiktoken):
    assert published_tiktoken.encode(" " * 899_999)
    with pytest.raises(UserError, match=r"900,000 white space characters in a row; .* use a tokenizer.json"):
        published_tiktoken.encode("a" + " " * 900_001)


def change_merges(change):
    """A change of the file by its vocabulary, in order of ids, and merges."""

    def spoil(content):
        model = content["model"]
        change(model["vocab"], model["merges"])

    return spoil


def add_merge(vocabulary, merges, *, first, second):
    vocabulary.setdefault(first + second, len(vocabulary) + 10)
    merges.append([first, second])


def merges_out_of_order(vocabulary, merges):
    merges[-1], merges[-2] = merges[-2], merges[-1]


def unreachable_token(vocabulary, merges):
    """x y is merged first, so that y z never is within xyz: tiktoken would join xy and z."""
    for first, second in (("x", "y"), ("y", "z"), ("x", "yz")):
        add_merge(vocabulary, merges, first=first, second=second)


def two_merges_of_one_product(vocabulary, merges):
    for first, second in (("x", "y"), ("y", "z"), ("xy", "z"), ("x", "yz")):
        add_merge(vocabulary, merges, first=first, second=second)


def change_added(**flags):
    def spoil(content):
        content["added_tokens"][-1].update(flags)

    return spoil


def other_pattern(content):
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {
        "Regex": QWEN3_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")
    }


def merged_with_next(content):
    content["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "MergedWithNext"


def ignore_merges(content):
    content["model"]["ignore_merges"] = True


def other_normalizer(content):
    content["normalizer"] = {"type": "NFKC"}


def overlapping_control_token(content):
    """The library finds `<|a<think>` and takes it for ordinary text, with the `<think>` that it holds."""
    control = {"id": 400, "content": "<|a<think>", "special": True}
    content["added_tokens"].append({**content["added_tokens"][-1], **control})


@pytest.mark.parametrize(
    "spoil",
    [
        change_merges(merges_out_of_order),
        change_merges(unreachable_token),
        change_merges(two_merges_of_one_product),
        change_added(lstrip=True),
        change_added(rstrip=True),
        change_added(single_word=True),
        change_added(normalized=True),
        other_pattern,
        merged_with_next,
        ignore_merges,
        other_normalizer,
        overlapping_control_token,
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_tiktoken_cannot_express_runs_through_tokenizers(tmp_path, spoil):
    path = save_tiny_tokenizer(tmp_path)
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    library = Tokenizer.from_file(str(path))
    for token in content["added_tokens"]:  # which come after the vocabulary, now a longer one
        token["id"] = library.token_to_id(token["content"])
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(path)
    assert tokenizer.backend == "tokenizers"
    library = Tokenizer.from_file(str(path))
    library.encode_special_tokens = True
    for text in ("xyz the cat", " </think> a</think>b >\u0338", "12345 e\u0301 ①", "<|a<think>"):
        ids = tokenizer.encode(text)
        assert ids == library.encode(text).ids
        assert tokenizer.normalize(text) == tokenizer.decode(ids)


def gpt2_pattern(library):
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def gpt2_pattern_written_out(library):
    split = pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def no_normalizer(library):
    library.normalizer = None


@pytest.mark.parametrize("change", [gpt2_pattern, gpt2_pattern_written_out, no_normalizer])
@given(text=TEXT)
def test_gpt2s_pattern_and_text_as_it_is_run_through_tiktoken(tmp_path_factory, change, text):
    library = tiny_library_tokenizer()
    change(library)
    path = tmp_path_factory.getbasetemp() / f"{change.__name__}.json"
    library.save(str(path))
    tokenizer = load_tokenizer(path)
    assert tokenizer.backend == "tiktoken"
    assert tokenizer.encode(text) == tokenizer.encoder.reference.encode_batch([text])[0]
    assert tokenizer.normalize(text) == tokenizer.decode(tokenizer.encode(text))


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
