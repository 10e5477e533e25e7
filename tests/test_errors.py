"""How a program ends: its exit status, and what people read on stderr."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from sft.errors import UserError, listed, run_program
from tests.conftest import ROOT


def ends(main: Callable[[list[str]], None]) -> int:
    """The exit status that run_program asks for."""
    with pytest.raises(SystemExit) as stopped:
        run_program(main)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def raises(error: BaseException) -> Callable[[list[str]], None]:
    def main(argv: list[str]) -> None:
        raise error

    return main


@pytest.fixture(autouse=True)
def the_only_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_a_program_that_returns_was_given_its_arguments_and_ends_with_0(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["program.py", "config.py", "--seed=1"])
    given: list[str] = []
    assert ends(given.extend) == 0
    assert given == ["config.py", "--seed=1"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("no such model"), 2, "error: no such model\n"),
        (UserError("the disk is full", exit_status=1), 1, "error: the disk is full\n"),
        (listed("it cannot be:", ["a is wrong", "b too"]), 2, "error: it cannot be:\n  a is wrong\n  b too\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (PermissionError(13, "Permission denied", "data/a.npy"), 1, "error: data/a.npy: Permission denied\n"),
        (OSError(28, "No space left on device"), 1, "error: the operating system: No space left on device\n"),
    ],
)
def test_what_ends_a_program_is_one_message_and_a_status(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, message: str
):
    assert ends(raises(error)) == status
    assert capsys.readouterr() == ("", message)


def test_a_mistake_of_the_programmer_keeps_its_traceback():
    with pytest.raises(AssertionError, match="never"):
        run_program(raises(AssertionError("never")))


def with_place(error: Exception) -> Exception:
    error.__dict__["place"] = "rank 1 failed in step 3 (batch)"
    return error


def test_an_error_that_knows_its_place_tells_it(capsys: pytest.CaptureFixture[str]):
    assert ends(raises(with_place(OSError(5, "Input/output error", "data/a.npy")))) == 1
    assert capsys.readouterr().err == "error: rank 1 failed in step 3 (batch): data/a.npy: Input/output error\n"


def test_a_mistake_whose_place_is_known_is_told_to_torchrun_and_under_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert ends(raises(with_place(KeyError("never")))) == 1
    told = "rank 1 failed in step 3 (batch): KeyError: 'never'"
    assert capsys.readouterr().err.endswith(f"KeyError: 'never'\nerror: {told}\n")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    assert failure.message["extraInfo"]["py_callstack"] == told
    assert abs(failure.timestamp - time.time()) < 60


def test_a_reader_that_leaves_early_is_no_reason_to_complain():
    program = (
        "from sft.errors import run_program\n"
        "def main(argv):\n"
        "    print('a line', flush=True)\n"
        "    input()\n"
        "    print('another', flush=True)\n"  # stays in the buffer, and is not to fail again at the exit
        "run_program(main)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes) as process:
        assert process.stdout.readline() == b"a line\n"
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
