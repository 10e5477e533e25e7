"""Inputs that once broke preparing, each run through the program."""

import json

import pytest

import prepare_sft
from sft.arrays import open_prepared
from tests.tiny_tokenizer import save_tiny_tokenizer


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
