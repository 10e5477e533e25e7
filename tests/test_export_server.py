"""An exported model behind `transformers serve`, asked as any client asks a server."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_builder import load_pretrained
from sft.chatml import prompt_ids
from sft.conversation import Message
from sft.generate import generate
from sft.tokenizer import load_tokenizer
from tests.learned import SECOND_QUESTION, learned_run
from tools import export_hf

READY_SECONDS = 120
SERVE = "from transformers.cli.transformers import main; main()"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_ready(process: subprocess.Popen, address: str, log: Path) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            assert answer.status == 200
            return
        time.sleep(0.2)
    raise AssertionError(f"not ready within {READY_SECONDS} s:\n{log.read_text()}")


@contextlib.contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """The address of a server of the folder's model, a group of processes of its own that is gone afterwards."""
    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(log.parent / "hub"), "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, "serve", str(folder), *options],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    assert not group_exists(process.pid)


@pytest.mark.slow
def test_a_real_server_answers_as_our_own_generation_does_and_stops_by_itself(tmp_path: Path):
    openai = pytest.importorskip("openai")
    run, folder = learned_run(tmp_path / "run"), tmp_path / "exported"
    export_hf.main([str(run / "ckpt.pt"), str(folder), "--dtype=fp32"])
    model, tokenizer = load_pretrained(run / "ckpt.pt"), load_tokenizer(run)
    dialogues = [
        [Message("user", "hi")],
        [Message("user", "hi"), Message("assistant", "Grüße!"), Message("user", SECOND_QUESTION)],
        [Message("system", "the cat"), Message("user", "hi")],
    ]
    expected = generate(
        model,
        [prompt_ids(messages, tokenizer) for messages in dialogues],
        max_new_tokens=40,
        stop_ids={tokenizer.im_end, tokenizer.pad},
    )
    assert [each.stopped for each in expected[:2]] == [True, True]
    with served(folder, tmp_path / "server.log") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
        for messages, own in zip(dialogues, expected, strict=True):
            asked = [{"role": message.role, "content": message.content} for message in messages]
            answer = client.chat.completions.create(
                model=str(folder), messages=asked, temperature=0, max_completion_tokens=40
            )
            choice = answer.choices[0]
            assert choice.message.content == tokenizer.decode(own.ids)
            assert choice.finish_reason == ("stop" if own.stopped else "length")
            assert answer.usage.completion_tokens == len(own.ids) + own.stopped
