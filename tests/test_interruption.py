import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft.interruption import descendants, run, run_until

COUNTS = """
import signal, sys, time
def stop(number, _):
    print("asked to stop", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
for number in range(1000):
    print("number", number, flush=True)
    time.sleep(0.01)
"""
HAS_A_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print("child", child.pid, flush=True)
time.sleep(60)
"""


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    """Within ten seconds: a process that has been killed is there until the kernel has freed its memory."""
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_alive(pid)


def test_a_program_runs_to_its_end_and_its_lines_are_kept():
    ended = run(python("import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(3)"))
    assert ended == (3, ["out", "err"], None)


def test_the_signal_comes_after_the_line_that_is_its_moment():
    ended = run_until(python(COUNTS), lambda line: line == "number 3\n", signal.SIGTERM)
    assert (ended.status, ended.signalled_at) == (75, "number 3")
    assert ended.output[:4] == [f"number {number}" for number in range(4)]
    assert ended.output[-1] == "asked to stop"
    assert len(ended.output) < 100


def test_a_kill_takes_the_processes_that_the_program_has_started_with_it():
    started = time.monotonic()
    ended = run_until(python(HAS_A_CHILD), lambda line: line.startswith("child"), signal.SIGKILL)
    assert ended.status == -signal.SIGKILL
    assert ends(int(ended.output[0].split()[1]))
    assert time.monotonic() - started < 30


def test_an_exception_leaves_no_process_behind():
    found = []

    def breaks(line: str) -> bool:
        found.append(int(line.split()[1]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_until(python(HAS_A_CHILD), breaks, signal.SIGTERM)
    assert ends(found[0])


def test_descendants_are_children_and_theirs():
    with subprocess.Popen(python(HAS_A_CHILD), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            child = int(process.stdout.readline().split()[1])
            assert descendants(process.pid) == [child]
        finally:
            for pid in (process.pid, *descendants(process.pid)):
                subprocess.run(["kill", "-9", str(pid)], check=False)
