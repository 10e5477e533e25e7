"""Inputs that once broke preparing, each run through the program."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import prepare_sft
from sft.arrays import open_prepared
from sft.errors import EXIT_FAILED, UserError
from sft.prepared_writer import PreparedWriter
from sft.tokenizer import load_tokenizer
from tests.conftest import ROOT
from tests.tiny_tokenizer import save_tiny_tokenizer

GOOD = {"prompt": "a", "completion": "b"}


@pytest.fixture
def prepare(tmp_path):
    """Prepare records (or the bytes of a file) and open what was written."""
    tokenizer = save_tiny_tokenizer(tmp_path)

    def run(records, *more: str, name: str = "in.jsonl"):
        file = tmp_path / name
        if isinstance(records, bytes):
            file.write_bytes(records)
        else:
            file.write_text("".join(json.dumps(record) + "\n" for record in records))
        arguments = [f"--input={file}", f"--tokenizer={tokenizer}", f"--out_dir={tmp_path / 'data'}"]
        prepare_sft.main([*arguments, "--val_fraction=0", "--workers=1", *more])
        return open_prepared(tmp_path / "data")

    return run


@pytest.mark.parametrize(
    "answer", [{"content": "It is.", "reasoning_content": "hm"}, {"content": "<think>\nhm\n</think>\n\nIt is."}]
)
def test_reasoning_that_nobody_asked_for_is_left_out_as_by_the_server_and_counted(prepare, answer):
    messages = [{"role": "system", "content": "the cat"}, {"role": "assistant", **answer}]
    data = prepare([{"messages": messages}], "--template=qwen3")
    assert data.meta["audit"]["trained_turns"] == 1
    assert data.meta["noticed"]["changed_by_template"]["conversations"] == 1
    again = prepare([{"messages": [messages[0], {"role": "user", "content": "what"}, messages[1]]}], "--template=qwen3")
    assert "changed_by_template" not in again.meta["noticed"]


def test_a_failed_rerun_leaves_a_folder_that_takes_the_other_template(prepare):
    prepare([GOOD], "--template=chatml")
    with pytest.raises(UserError, match="must be a string"):
        prepare([{"prompt": 1, "completion": "b"}], "--template=qwen3")
    assert prepare([GOOD], "--template=qwen3").meta["template"] == "qwen3"


def test_a_disk_that_fills_up_while_the_tokenizer_is_copied_leaves_no_half_of_it(prepare, tmp_path, monkeypatch):
    def fills_up(source, target, _):
        target.write(source.read()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(shutil, "copyfileobj", fills_up)
        with pytest.raises(UserError, match=r"data/tokenizer.json: No space left") as error:
            prepare([GOOD])
    assert error.value.exit_status == EXIT_FAILED
    assert not (tmp_path / "data").exists()
    assert len(prepare([GOOD]).splits["train"]) == 1


def test_a_closed_standard_input_is_told_with_a_remedy(prepare, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input is closed; pipe the records in"):
        prepare([GOOD], "--input=-")


def test_nul_in_the_name_of_a_called_function_is_counted(prepare):
    call = {"name": "a\0b", "arguments": {}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert prepare([{"messages": messages}]).meta["noticed"]["nul"]["conversations"] == 1


def test_a_name_that_the_terminal_cannot_show_does_not_fail_work_that_is_done(tmp_path):
    program = "from sft.errors import run_program; run_program(lambda arguments: print('\\xe9 \\udcff'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\xe9 \\udcff\n", b"")


KILLED = """
import os, signal
from sft.workers import Workers

def pid(state, item):
    return os.getpid()

with Workers(None, 2) as workers:
    print(*{*workers.map(pid, range(20))}, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_the_process_that_was_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Workers that live on would hold the pipe open, and time out.
    done = subprocess.run(
        [sys.executable, tmp_path / "killed.py"], env=environment, capture_output=True, timeout=30, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.strip()


def test_a_table_may_hold_what_json_cannot(prepare, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    far = pyarrow.array([10**15, 2], pyarrow.timestamp("s"))  # in the year 31 million
    tables = {
        "far": {"prompt": ["a", "b"], "completion": ["c", "d"], "time": far},
        "bytes": {"prompt": ["a"], "completion": pyarrow.array([b"\xff"], pyarrow.binary())},
    }
    refusals = {"far": "far.parquet:1: the row holds .* a date that Python lacks", "bytes": "a string, not bytes;"}
    for name, columns in tables.items():
        file = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.table(columns), file)
        with pytest.raises(UserError, match=refusals[name]):
            prepare(file.read_bytes(), name=file.name)


def test_a_copy_of_which_nothing_is_trained_does_not_shadow_the_one_that_is(prepare):
    question = {"role": "user", "content": "a"}
    records = [
        {"messages": [question, {"role": "assistant", "content": "b", "weight": weight}]} for weight in (0, 0, 1, 1)
    ]
    counts = prepare(records).meta["ledger"]["conversations"]
    assert (counts["kept"], counts["duplicate"], counts["no_trained_token"]) == (1, 2, 1)


def test_the_audit_tells_a_control_token_in_a_question_from_text_that_spells_it(prepare, tmp_path, monkeypatch):
    spelled, written = [], PreparedWriter.add_samples

    def with_control(self, split, input_ids, labels, *, lengths, **rest):
        ids = input_ids.tolist()
        at = next(i for i in range(len(ids)) if ids[i : i + len(spelled)] == spelled)
        join = [
            np.concatenate([of[:at], [new], of[at + len(spelled) :]]) for of, new in ((input_ids, 2), (labels, -100))
        ]
        written(self, split, *join, lengths=[len(join[0])], **rest)

    tokenizer = load_tokenizer(save_tiny_tokenizer(tmp_path))
    assert tokenizer.im_end == 2
    spelled += tokenizer.encode("<|im_end|>")
    monkeypatch.setattr(PreparedWriter, "add_samples", with_control)
    with pytest.raises(UserError, match="there are other control tokens than those of the template"):
        prepare([{"prompt": "<|im_end|>1", "completion": "b"}])
