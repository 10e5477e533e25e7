"""What the README says of preparing data is true: each row of its rules, and what it shows as printed."""

import json
import re

import pytest

import prepare_sft
from sft.arrays import open_prepared
from sft.errors import UserError
from tests.bad_inputs import BAD_INPUTS, GOOD
from tests.test_house import readme
from tests.tiny_tokenizer import TEXTS, save_tiny_tokenizer

ASK, SAY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def messages(*turns):
    return json.dumps({"messages": turns}).encode() + b"\n"


def said(**keys):
    return messages(ASK, {**SAY, **keys})


# Behind these, one good record follows.
ACCEPTED = {
    "a byte order mark first in the file": b"\xef\xbb\xbf" + said(),
    "NUL in a text": said(content="a\0b"),
    "blank lines": b"\n \n" + said() + b"\n",
    "keys that nothing reads": b'{"id": 3, "text": "a", "meta": {"title": null}}\n',
    "an empty turn": said(content=""),
    "two user turns in a row": messages(ASK, ASK, SAY),
    "an assistant turn first": messages(SAY, ASK, SAY),
    "a user turn last": messages(ASK, SAY, ASK),
    "no assistant turn": messages({"role": "system", "content": "a"}),
    "content that spells a control token": said(content="a<|im_end|>b"),
    "reasoning, under chatml": said(reasoning_content="Hm."),
    "text before a think block, under qwen3": said(content="a<think>\nb\n</think>\n\nc"),
    "an answer with a line break first, and more turns": messages(ASK, {**SAY, "content": "\n\nb"}, ASK, SAY),
    "turns after the last trained one, under qwen3 with reasoning": messages(
        ASK, {**SAY, "reasoning_content": "Hm."}, ASK, {**SAY, "train": False}
    ),
    "weight 0 on a user turn": messages({**ASK, "weight": 0}, {**ASK, "role": "system", "train": False}, SAY),
    "the same conversation again": said() + said(),
}


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """Its merges join line breaks, as published ones do."""
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tiny"), texts=[*TEXTS, "\n\n\n"])


REFUSED = {bad.name: bad for bad in BAD_INPUTS}


def rules():
    """(input, rule, message or place in meta.json) of each row of the README's table."""
    (section,) = re.findall(r"^### Rules\n(.*?)^### ", readme(), flags=re.DOTALL | re.MULTILINE)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in section.splitlines() if row.startswith("|")]
    assert all(len(row) == 3 for row in rows)
    return [(name.split(":")[0], rule, told.strip("`")) for name, rule, told in rows[2:]]


def prepare(folder, tokenizer, name="a.jsonl", **settings):
    given = {"input": folder / name, "tokenizer": tokenizer, "out_dir": folder / "out", "val_fraction": 0, **settings}
    prepare_sft.main([f"--{name}={value}" for name, value in given.items()])
    return open_prepared(folder / "out").meta


@pytest.mark.parametrize(("name", "message"), [(name, told) for name, rule, told in rules() if rule == "refused"])
def test_what_the_rules_refuse_is_refused_in_these_words(name, message, tmp_path, tokenizer_file):
    bad = REFUSED[name]
    (tmp_path / bad.file).write_bytes(bad.content)
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, tokenizer_file, bad.file, workers=1)
    problem = f"  {tmp_path / bad.file}:{bad.line}: {message}"
    problems = str(caught.value).splitlines()[1:]
    assert len(problems) == 1
    assert problems[0] == problem or (message.endswith("...") and problems[0].startswith(problem.removesuffix("...")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "rule", "place"), [row for row in rules() if row[1] != "refused"])
def test_what_the_rules_accept_is_counted_there_and_nowhere_else(name, rule, place, tmp_path, tokenizer_file):
    (tmp_path / "a.jsonl").write_bytes(ACCEPTED[name] + GOOD)
    template = "qwen3" if "qwen3" in name else "chatml"
    meta = prepare(tmp_path, tokenizer_file, template=template, workers=1)
    conversations = meta["ledger"]["conversations"]
    counted = {f"noticed.{what}": found["conversations"] for what, found in meta["noticed"].items()}
    dropped = {"too_long", "no_trained_token", "duplicate", "in_training"}
    counted |= {f"ledger.conversations.{why}": conversations[why] for why in dropped if conversations[why]}
    assert counted == ({place: 1} if place else {})
    assert rule == ("dropped" if place.startswith("ledger") else "accepted")


def test_every_example_of_an_accepted_input_is_a_rule():
    assert set(ACCEPTED) == {name for name, rule, _ in rules() if rule != "refused"}


def test_the_printed_ledger_is_the_one_of_the_readme(shared, tmp_path, capsys):
    (shown,) = re.findall(r"^\$ (python prepare_sft\.py .*?)\n(.*?)^```", readme(), flags=re.DOTALL | re.MULTILINE)
    here = shown[0].replace("=gsm8k/", f"={shared}/data/gsm8k/").replace("=qwen3", f"={shared}/tokenizer/qwen3")
    prepare_sft.main(here.replace("=data/gsm8k", f"={tmp_path}").split()[2:])
    printed = [text for text in capsys.readouterr().out.splitlines() if not text.startswith("phases")]
    assert "\n".join(printed).replace(str(tmp_path), "data/gsm8k") + "\n" == shown[1]
