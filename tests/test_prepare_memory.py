import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.preparing import tokenizer_file

PROGRAM = """
import resource, sys
import prepare_sft
prepare_sft.main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak(tmp_path, conversations):
    """Bytes resident at most while so many short conversations are prepared, in one process."""
    source = tmp_path / f"{conversations}.jsonl"
    with open(source, "w") as file:
        for number in range(conversations):
            file.write(f'{{"prompt": "What is {number}?", "completion": "the cat"}}\n')
    command = [sys.executable, "-c", PROGRAM, f"--input={source}", f"--tokenizer={tokenizer_file(tmp_path)}"]
    command += [f"--out_dir={tmp_path / str(conversations)}", "--workers=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split("peak ")[1])


@pytest.mark.slow
def test_a_conversation_more_takes_64_bytes_of_memory_at_most(tmp_path):
    few, many = 30_000, 300_000
    assert (peak(tmp_path, many) - peak(tmp_path, few)) / (many - few) <= 64
