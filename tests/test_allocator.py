import subprocess
import sys

import pytest

from tests.conftest import ROOT

# prints the page faults of ten tensors of 64 MB that are made and thrown away, after twenty
SCRIPT = """
import resource, sys, torch
from sft.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("no glibc")
    raise SystemExit
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.empty(2**24).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(20)
print(faults(10))
"""


def test_memory_that_was_freed_is_used_again_without_a_page_fault():
    faults = {}
    for choice in ("keep", "default"):
        command = [sys.executable, "-c", SCRIPT, choice]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True).stdout.strip()
        if told == "no glibc":
            pytest.skip("the C library is not glibc")
        faults[choice] = int(told)
    assert faults["keep"] < faults["default"] / 5
