import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sft.errors import UserError
from sft.templates import JINJA_NAME, jinja_file
from sft.tokenizer import load_tokenizer
from tests.conftest import ROOT
from tests.learned import FIRST, SECOND, learned_run
from tests.tiny import tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer
from tools import chat


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learned_run(tmp_path_factory.mktemp("run"))


def test_one_prompt_gets_one_answer_that_stops_by_itself(run: Path, capsys: pytest.CaptureFixture[str]):
    for path in (run / "ckpt.pt", run):
        chat.main([str(path), "--prompt=hi", "--temperature=none"])
        assert capsys.readouterr().out == f"{FIRST}\n"


def test_the_weights_that_evaluations_saw_answer_unless_others_are_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copy(run / "tokenizer.json", tmp_path)
    content = torch.load(run / "ckpt.pt", weights_only=True)
    drawn = tiny_model(vocab_size=content["model_args"]["vocab_size"], block_size=128).state_dict()
    torch.save({**content, "model": drawn, "ema": content["model"], "eval_weights": "ema"}, tmp_path / "ckpt.pt")
    answers = []
    for choice in ([], ["--weights=ema"], ["--weights=model"]):
        chat.main([str(tmp_path), "--prompt=hi", "--temperature=none", "--max_new_tokens=20", *choice])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == f"{FIRST}\n" != answers[2]


def test_a_dialogue_remembers_and_ends_with_the_input(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\ngo\n"))
    chat.main([str(run / "ckpt.pt"), "--temperature=none"])
    assert capsys.readouterr().out == f"{FIRST}\n{SECOND}\n\n"


def test_a_line_that_is_not_utf_8_is_refused_and_the_dialogue_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n\xff\ngo\n"), encoding="utf-8"))
    chat.main([str(run), "--temperature=none"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [FIRST, "the line holds half a character (\\udcff at 0); mend or remove it", SECOND, ""]


def test_a_closed_input_is_one_that_has_ended(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "stdin", None)
    chat.main([str(run)])
    assert capsys.readouterr().out == ""


def test_a_character_that_the_terminal_cannot_show_becomes_a_question_mark(run: Path, monkeypatch: pytest.MonkeyPatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    chat.main([str(run), "--prompt=hi", "--temperature=none"])
    assert shown.getvalue() == FIRST.encode("ascii", "replace") + b"\n"


def test_a_system_message_goes_first(run: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[list[str]] = []

    def prompt_ids(messages, tokenizer, **choices):
        seen.append([message.role for message in messages])
        return tokenizer.encode("x")

    monkeypatch.setattr(chat, "prompt_ids", prompt_ids)
    chat.main([str(run), "--system=Be brief.", "--prompt=hi", "--max_new_tokens=1"])
    assert seen == [["system", "user"]]


def test_an_answer_cut_short_says_by_what(run: Path, capsys: pytest.CaptureFixture[str]):
    chat.main([str(run), "--prompt=hi", "--temperature=none", "--max_new_tokens=3"])
    assert capsys.readouterr().out == "Gr\ufffd\n[cut: max_new_tokens used up]\n"


def test_a_character_is_shown_once_its_bytes_are_complete(capsys: pytest.CaptureFixture[str]):
    chunks: list[str] = []

    def growing():
        for text in ("a", "a\ufffd", "aé", "aéb"):
            yield text
            chunks.append(capsys.readouterr().out)

    assert chat.print_as_it_grows(growing()) == "aéb"
    assert chunks == ["a", "", "é", "b"]


def test_another_tokenizer_is_refused(run: Path, tmp_path: Path):
    other = save_tiny_tokenizer(tmp_path, control=["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    with pytest.raises(UserError, match=f"not the tokenizer that {run / 'ckpt.pt'} was trained with"):
        chat.main([str(run / "ckpt.pt"), "--prompt=hi", f"--tokenizer={other}"])


def test_bad_settings_and_files_are_refused_before_the_model_is_read(tmp_path: Path):
    with pytest.raises(UserError, match="which checkpoint"):
        chat.main(["--prompt=hi"])
    with pytest.raises(UserError, match=r"did you mean 'temperature'[\s\S]*top_p must be above 0"):
        chat.main(["ckpt.pt", "--temprature=1", "--top_p=0"])
    with pytest.raises(
        UserError, match=r"seed must be at least 0[\s\S]*prompt holds half a character[\s\S]*system hol"
    ):
        chat.main(["ckpt.pt", f"--seed={2**64}", "--prompt=caf\udce9", "--system=\udcff"])
    with pytest.raises(UserError, match="no such checkpoint"):
        chat.main([str(tmp_path / "ckpt.pt")])


@pytest.mark.parametrize("device", ["abacus", "meta", "privateuseone"])
def test_a_device_that_is_not_there_or_cannot_compute_is_refused(run: Path, device: str):
    with pytest.raises(UserError, match=f"device '{device}' cannot be used here"):
        chat.main([str(run), "--prompt=hi", f"--device={device}"])


def test_the_program_exits_with_2_and_one_message(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "chat.py"), str(tmp_path / "ckpt.pt")],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'ckpt.pt'}: no such checkpoint; name a ckpt_*.pt file\n"


@pytest.mark.parametrize("thinking", [False, True])
def test_the_template_beside_the_checkpoint_makes_the_prompt(run: Path, tmp_path: Path, monkeypatch, thinking: bool):
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.copyfile(jinja_file("qwen3"), folder / JINJA_NAME)
    prompts = []
    monkeypatch.setattr(chat, "stream", lambda model, ids, **choices: prompts.append(ids) or iter([stop]))
    tokenizer = load_tokenizer(folder)
    stop = tokenizer.im_end
    chat.main([str(folder), "--prompt=hi", f"--thinking={thinking}"])
    block = "" if thinking else "<think>\n\n</think>\n\n"
    expected = f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{block}"
    assert [tokenizer.decode(ids, skip_control=False) for ids in prompts] == [expected]
