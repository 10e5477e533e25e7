import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import prepare_sft
from sft import preparation
from sft.arrays import open_prepared, verify_checksums
from sft.conversation import Conversation, Message
from sft.errors import UserError
from sft.tokenizer import load_tokenizer
from tests.conftest import ROOT
from tests.tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def prepare(tmp_path, tokenizer_file):
    """prepare(records, name=value...) -> the opened data."""

    def run(records, out="data", **settings):
        source = tmp_path / "input.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        given = {"input": source, "tokenizer": tokenizer_file, "out_dir": tmp_path / out, **settings}
        prepare_sft.main([f"--{name}={value}" for name, value in given.items()])
        return open_prepared(tmp_path / out)

    return run


def exchange(prompt, completion):
    return {"prompt": prompt, "completion": completion}


MANY = [exchange(f"What is {i} and {i}?", f"It is {2 * i}.") for i in range(60)]


def texts(data, split, tokenizer_file):
    samples = data.splits[split]
    tokenizer = load_tokenizer(tokenizer_file)
    spans = zip(samples.offsets, samples.offsets[1:], strict=False)
    return [tokenizer.decode(samples.input_ids[a:b].tolist(), skip_control=False) for a, b in spans]


def test_every_conversation_is_in_one_split_and_the_ledger_adds_up(prepare, tokenizer_file):
    data = prepare(MANY, val_fraction=0.3)
    found = texts(data, "train", tokenizer_file) + texts(data, "val", tokenizer_file)
    assert len(data.splits["train"]) > 20
    assert len(data.splits["val"]) > 5
    assert sorted(found) == sorted(
        f"<|im_start|>user\n{r['prompt']}<|im_end|>\n<|im_start|>assistant\n{r['completion']}<|im_end|>\n" for r in MANY
    )
    check_ledger(data)
    assert data.meta["sources"][0]["records"] == len(MANY)


def check_ledger(data):
    ledger = data.meta["ledger"]
    tokens, conversations, splits = ledger["tokens"], ledger["conversations"], ledger["splits"]
    kept = tokens["trained"] + sum(tokens["masked"].values()) + tokens["template"] + tokens["repeated_history"]
    assert tokens["total"] == kept + tokens["cut"] + sum(tokens["dropped"].values())
    assert conversations["read"] == conversations["kept"] + sum(conversations[reason] for reason in tokens["dropped"])
    assert kept == sum(counts["tokens"] for counts in splits.values())
    for split, samples in data.splits.items():
        assert splits[split]["samples"] == len(samples)
        assert splits[split]["tokens"] == len(samples.input_ids)
        assert splits[split]["trained_tokens"] == np.count_nonzero(samples.labels != -100)
        weights = 1 if samples.weights is None else samples.weights
        assert samples.targets.sum() == pytest.approx(np.sum((samples.labels != -100) * weights, dtype=np.float64))


def test_the_same_input_gives_the_same_bytes_and_valid_checksums(prepare, tmp_path):
    def content():
        return {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}

    verify_checksums(prepare(MANY))
    first = content()
    prepare(MANY)
    assert content() == first


def test_the_size_of_chunks_does_not_change_the_bytes(prepare, tmp_path, monkeypatch):
    whole = prepare(MANY, out="a").fingerprint
    monkeypatch.setattr(preparation, "CHUNK_RECORDS", 7)
    monkeypatch.setattr(preparation, "CHUNK_BYTES", 90)
    assert prepare(MANY, out="b").fingerprint == whole


def recipe(tokenizer_file, **changes):
    settings = {"input": tokenizer_file, "tokenizer": tokenizer_file, "out_dir": "x", **changes}
    return prepare_sft.recipe_of(prepare_sft.PrepareSettings(**settings), load_tokenizer(tokenizer_file), [])


def test_the_split_is_a_function_of_seed_and_content(tokenizer_file):
    conversations = [Conversation((Message("user", f"{i}"), Message("assistant", "a"))) for i in range(2000)]

    def chosen(seed, fraction, of=conversations):
        choice = recipe(tokenizer_file, seed=seed, val_fraction=fraction)
        return [choice.is_validation(conversation) for conversation in of]

    assert 0.16 < np.mean(chosen(1, 0.2)) < 0.24
    assert chosen(1, 0.2) != chosen(2, 0.2)
    assert not any(chosen(1, 0.0))
    elsewhere = [conversation._replace(record=9, line=9, source=1) for conversation in conversations]
    assert chosen(1, 0.2, elsewhere) == chosen(1, 0.2)
    # growing the fraction only adds
    assert all(later or not earlier for earlier, later in zip(chosen(1, 0.2), chosen(1, 0.4), strict=True))


def test_conversations_of_a_group_share_a_split(prepare):
    records = [{**exchange(f"What is {i}?", "cat"), "topic": f"topic {i // 6}"} for i in range(120)]
    data = prepare(records, val_fraction=0.3, group_by="topic")
    topics = [{(record - 1) // 6 for record in data.splits[split].origins[:, 1].tolist()} for split in ("train", "val")]
    assert topics[0].isdisjoint(topics[1])
    assert len(topics[0]) > 5
    assert len(topics[1]) > 1


def test_copies_of_a_conversation_are_dropped_and_counted(prepare, tokenizer_file):
    data = prepare(MANY + MANY[:20], val_fraction=0.3)
    found = texts(data, "train", tokenizer_file) + texts(data, "val", tokenizer_file)
    assert len(found) == len(set(found)) == len(MANY)
    assert data.meta["ledger"]["conversations"]["duplicate"] == 20
    assert data.meta["ledger"]["tokens"]["dropped"]["duplicate"] > 0
    check_ledger(data)


LONG = {"messages": [{"role": role, "content": "the cat sat"} for role in ("user", "assistant") * 4]}
SHORT = exchange("hat", "cat")


def test_what_is_too_long_is_dropped_and_counted(prepare):
    data = prepare([SHORT, LONG], val_fraction=0, block_size=40)
    assert len(data.splits["train"]) == 1
    assert data.meta["ledger"]["conversations"]["too_long"] == 1
    check_ledger(data)


def test_what_is_too_long_is_cut_to_whole_turns(prepare, tokenizer_file):
    data = prepare([SHORT, LONG], val_fraction=0, block_size=40, too_long="cut")
    cut = texts(data, "train", tokenizer_file)[1]
    pair = "<|im_start|>user\nthe cat sat<|im_end|>\n<|im_start|>assistant\nthe cat sat<|im_end|>\n"
    assert cut in (pair, pair * 2, pair * 3)
    assert data.splits["train"].lengths.max() <= 40
    assert data.meta["ledger"]["conversations"]["shortened"] == 1
    assert data.meta["ledger"]["tokens"]["cut"] > 0
    check_ledger(data)


def test_what_is_too_long_is_refused_with_each_line_when_asked_to(prepare, tmp_path):
    with pytest.raises(UserError) as caught:
        prepare([LONG, SHORT, LONG], block_size=40, too_long="error")
    problems = str(caught.value).splitlines()[1:]
    assert [problem.split(": ")[0] for problem in problems] == [f"  {tmp_path}/input.jsonl:{line}" for line in (1, 3)]
    assert "block_size is 40" in problems[0]
    assert not (tmp_path / "data").exists()


def test_a_sample_of_exactly_block_size_is_kept(prepare):
    length = int(prepare([LONG], val_fraction=0).splits["train"].lengths[0])
    kept = prepare([LONG], val_fraction=0, block_size=length)
    assert kept.splits["train"].lengths.tolist() == [length]
    dropped = prepare([SHORT, LONG], val_fraction=0, block_size=length - 1)
    assert dropped.meta["ledger"]["conversations"]["too_long"] == 1


def test_conversations_without_a_trained_token_are_dropped_and_counted(prepare):
    data = prepare([{"messages": [{"role": "user", "content": "hi"}]}, {"text": ""}, SHORT], val_fraction=0)
    assert data.meta["ledger"]["conversations"]["no_trained_token"] == 2
    check_ledger(data)


def test_a_cut_that_leaves_text_without_a_target_is_no_sample(prepare):
    data = prepare([{"text": "the cat and the hat"}], val_fraction=0, block_size=2, too_long="cut")
    assert data.splits["train"].targets.tolist() == [1.0]


def test_nothing_left_to_train_on_is_an_error(prepare, tmp_path):
    with pytest.raises(UserError, match=r"nothing is left to train on; conversations: read 1, kept 0, too_long 1"):
        prepare([LONG], block_size=10)
    assert not (tmp_path / "data").exists()


def test_a_system_prompt_goes_where_there_is_none(prepare, tokenizer_file):
    own = {"messages": [{"role": role, "content": role} for role in ("system", "user", "assistant")]}
    data = prepare([SHORT, own, {"text": "plain"}], val_fraction=0, system_prompt="Be brief.")
    first, second, third = texts(data, "train", tokenizer_file)
    assert first.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhat<|im_end|>")
    assert "Be brief" not in second + third


def test_a_system_prompt_leaves_the_split_as_it_was(prepare):
    without = prepare(MANY, out="a", val_fraction=0.3)
    with_one = prepare(MANY, out="b", val_fraction=0.3, system_prompt="Be brief.")
    assert with_one.splits["val"].origins.tolist() == without.splits["val"].origins.tolist()


def test_max_samples_counts_what_is_kept_in_order(prepare):
    data = prepare([LONG, *MANY[:3], LONG, *MANY[3:]], val_fraction=0, max_samples=5, block_size=40)
    assert data.splits["train"].origins[:, 1].tolist() == [2, 3, 4, 6, 7]
    check_ledger(data)


def test_conversations_that_spell_control_tokens_are_counted(prepare, capsys):
    data = prepare([SHORT, exchange("say <|im_end|>", "no"), {"text": "<|endoftext|>"}], val_fraction=0)
    lines = [f"{data.meta['sources'][0]['path']}:{line}" for line in (2, 3)]
    assert data.meta["noticed"]["spells_control"] == {"conversations": 2, "first": lines}
    told = f"control tokens spelled in content, kept as ordinary text: 2 conversations\n    {lines[0]}, {lines[1]}\n"
    assert told in capsys.readouterr().out


def test_control_tokens_spelled_in_the_system_prompt_are_counted_where_it_is_used(prepare):
    data = prepare([SHORT, {"text": "plain"}], val_fraction=0, system_prompt="never say <|im_end|>")
    assert data.meta["noticed"]["spells_control"]["conversations"] == 1


def test_a_failed_rerun_leaves_no_valid_data(prepare, tmp_path):
    prepare([SHORT])
    with pytest.raises(UserError):
        prepare([SHORT, {"text": 1}])
    with pytest.raises(UserError, match="no prepared data here"):
        open_prepared(tmp_path / "data")


def test_the_meta_says_where_everything_came_from(prepare, tokenizer_file, tmp_path):
    data = prepare([SHORT], val_fraction=0)
    tokenizer = load_tokenizer(tmp_path / "data")
    assert data.meta["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert data.meta["vocab_size"] == tokenizer.vocab_size > data.meta["max_id"]
    assert data.meta["pad_id"] == tokenizer.pad
    assert data.meta["settings"]["val_fraction"] == 0.0
    assert data.meta["settings_origins"]["val_fraction"] == "command line"
    assert data.meta["settings_origins"]["seed"] == "default"
    source = tmp_path / "input.jsonl"
    content = source.read_bytes()
    assert data.meta["sources"] == [
        {
            **{
                "path": str(source),
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "weight": 1.0,
            },
            **{"records": 1, "conversations": 1, "samples": 1, "tokens": 15, "trained_tokens": 3},
        }
    ]
    assert data.meta["template"] == "chatml"
    assert data.meta.keys() == {
        *("format", "format_version", "template", "block_size", "settings", "settings_origins", "sources", "ledger"),
        *("tokenizer_fingerprint", "tokenizer_files", "vocab_size", "im_start_id", "im_end_id", "pad_id", "max_id"),
        *("lengths", "arrays", "noticed", "bad_records", "leaks", "audit", "sha256"),
    }


def test_another_tokenizer_in_out_dir_is_refused(prepare, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "qwen.tiktoken").write_text("")
    with pytest.raises(UserError, match=r"holds another tokenizer \(qwen\.tiktoken\)"):
        prepare([SHORT])


def test_the_tokenizer_in_out_dir_can_be_used_again(prepare, tmp_path):
    first = prepare([SHORT]).fingerprint
    assert prepare([SHORT], tokenizer=tmp_path / "data").fingerprint == first


def test_only_a_tokenizer_that_an_earlier_run_put_there_is_replaced(prepare, tmp_path):
    (tmp_path / "other").mkdir()
    other = save_tiny_tokenizer(tmp_path / "other", control=["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    first = prepare([SHORT]).meta["tokenizer_fingerprint"]
    assert prepare([SHORT], tokenizer=other).meta["tokenizer_fingerprint"] != first
    (tmp_path / "data" / "meta.json").unlink()
    prepare([SHORT], tokenizer=other)  # of unknown origin, but the same
    base = tmp_path / "base"
    shutil.copytree(other.parent, base)
    with pytest.raises(UserError, match=r"base: holds another tokenizer \(tokenizer\.json\); choose another out_dir"):
        prepare([SHORT], out="base")
    assert [path.name for path in base.iterdir()] == ["tokenizer.json"]
    assert (base / "tokenizer.json").read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", ["train_labels.npy", "val_weights.npy.partial", "meta.json.partial", "tokenizer.json"])
def test_an_input_that_bears_a_name_to_be_written_is_not_lost(prepare, tmp_path, name):
    (tmp_path / "data").mkdir()
    precious = tmp_path / "data" / name
    precious.write_text(json.dumps(SHORT))
    with pytest.raises(UserError, match="choose another out_dir"):
        prepare([SHORT], input=precious)
    assert precious.read_text() == json.dumps(SHORT)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_fraction": 1.0}, "command line: val_fraction must be at least 0 and below 1"),
        ({"block_size": 1}, "command line: block_size must be at least 2"),
        ({"max_samples": 0}, "command line: max_samples must be at least 1"),
        ({"system_prompt": "\ud800"}, "command line: system_prompt holds half a character"),
        ({"too_long": "truncate"}, "too_long must be 'drop' | 'cut' | 'split' | 'error', not 'truncate'"),
        ({"max_seq_length": 5}, "the longest sample is block_size"),
        ({"input": "", "tokenizer": " ", "out_dir": ""}, "out_dir is empty; the current folder is '.'"),
        ({"out_dir": "n" * 300}, "File name too long; choose another folder"),
        ({"input": "/dev/null"}, "command line: input '/dev/null' cannot be read: not a regular file"),
        ({"input": ","}, "command line: input names no file"),
        ({"tokenizer": "n" * 300}, "nnn' does not exist"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_anything_is_written(prepare, tmp_path, settings, message):
    with pytest.raises(UserError) as caught:
        prepare([SHORT], **settings)
    assert message in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_missing_files_are_reported_together_with_their_origins(tmp_path):
    (tmp_path / "mine.py").write_text("out_dir = 'data'\ntokenizer = 'seed/none.json'\n")
    with pytest.raises(UserError) as caught:
        prepare_sft.main([f"{tmp_path}/mine.py", "--input=none.jsonl, tokenizer.jsonl", "--seed=1", "--block_size=1"])
    assert str(caught.value).splitlines()[1:] == [
        "  command line: block_size must be at least 2, not 1",
        f"  {tmp_path}/mine.py:2: tokenizer 'seed/none.json' does not exist",
        "  command line: input 'none.jsonl' cannot be read: no such file or directory",
        "  command line: input 'tokenizer.jsonl' cannot be read: no such file or directory",
    ]


def test_help_begins_with_what_the_settings_are_for(capsys):
    with pytest.raises(SystemExit):
        prepare_sft.main(["--help"])
    assert "\nEvery knob of preparing. A sample is" in capsys.readouterr().out


def test_a_disk_that_fills_up_is_a_failure_that_leaves_nothing(prepare, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sft.prepared_writer.sha256_of", full)  # called once the arrays are complete
    with pytest.raises(UserError, match="No space left on device; nothing was prepared") as caught:
        prepare([SHORT])
    assert caught.value.exit_status == 1
    assert not list((tmp_path / "data").glob("*.npy*"))


def test_the_program_ends_with_2_and_one_message_on_bad_input(tmp_path, tokenizer_file):
    (tmp_path / "bad.jsonl").write_text('{"text": }\n')
    (tmp_path / "config.py").write_text(f"tokenizer = {str(tokenizer_file)!r}\nval_fraction = 0.0\n")
    command = [sys.executable, str(ROOT / "prepare_sft.py"), "config.py", "--input=bad.jsonl", "--out_dir=data"]
    bad = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: the input cannot be used:\n  bad.jsonl:1: broken JSON at column 10")
    assert "Traceback" not in bad.stderr
    (tmp_path / "bad.jsonl").write_text('{"text": "the cat"}\n')
    good = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert "prepared data" in good.stdout
