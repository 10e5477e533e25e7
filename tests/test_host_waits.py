"""Between log lines nothing reads what is on the device: neither a step of the trainer nor its loader."""

import contextlib
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train_sft
from sft.batches import on_device
from sft.prefetch import Ahead
from sft.run import Run
from tests.devices import gpu_test, on_gpu

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "_unique2", "masked_select")
# What these read is on the host by then: lengths of documents, and on the CPU alone a factor of the loss.
READERS = ("attention_backends.py", "linear_cross_entropy.py")


class Reads(TorchDispatchMode):
    """Counts the operators that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name in READS:
            callers = {Path(frame.filename).name for frame in traceback.extract_stack()}
            self.found[name] += not callers & set(READERS)
        return function(*arguments, **(options or {}))


def watch_updates(monkeypatch: pytest.MonkeyPatch, watched: contextlib.AbstractContextManager, *, skip: int) -> None:
    """Run each update but the first so many inside of a context."""
    update = Run.update

    def inside(run: Run, **options) -> None:
        with watched if run.iter_num >= skip else contextlib.nullcontext():
            update(run, **options)

    monkeypatch.setattr(Run, "update", inside)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1, "grad_clip": "none"}, {"weight_decay": 0.0}])
def test_an_update_reads_no_number_from_a_tensor(arguments, monkeypatch, changes):
    reads = Reads()
    watch_updates(monkeypatch, reads, skip=0)
    train_sft.main(arguments(**changes, eval_interval="none", log_interval=100))
    assert +reads.found == Counter()


def test_a_read_would_be_seen():
    with Reads() as reads:
        torch.ones(3).sum().item()
        torch.nn.utils.clip_grad_norm_([torch.nn.Parameter(torch.ones(1))], 1.0)
        assert reads.found == {"_local_scalar_dense": 1}
        bool(torch.ones(1) > 0)
        torch.ones(3).nonzero()
    assert sum(reads.found.values()) == 3


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Repeated:
    """A context manager that can be entered again."""

    def __enter__(self):
        self.inner = waiting_is_an_error()
        self.inner.__enter__()

    def __exit__(self, *error):
        return self.inner.__exit__(*error)


@pytest.mark.parametrize("compiled", [on_gpu(False), on_gpu(True)])
def test_no_update_waits_for_the_gpu(arguments, monkeypatch, compiled):
    """As the trainer runs by default, loader and all; the first steps try kernels out."""
    watch_updates(monkeypatch, Repeated(), skip=3)
    settings = {"device": "cuda", "compile": compiled, "batch_size": 2, "max_iters": 10, "log_interval": 100}
    train_sft.main(arguments(**settings, eval_interval="none"))


@dataclass(frozen=True)
class Numbers:
    on_gpu: Tensor
    on_host: Tensor


@gpu_test
def test_batches_made_ahead_are_whole_however_late_the_gpu_is():
    """The GPU is busy while they are copied and dropped; their memory is used again for others meanwhile."""
    device = torch.device("cuda", 0)

    def items():
        for number in range(100):
            host = torch.full((2**18,), number)
            yield Numbers(on_device(host, device), host)

    sums = []
    ahead = Ahead(items(), device=device)
    for numbers in ahead:
        torch.cuda._sleep(5_000_000)
        sums.append(numbers.on_gpu.sum())
        del numbers
    assert [int(each) for each in sums] == [2**18 * number for number in range(100)]


@gpu_test
def test_a_thread_works_on_the_gpu_of_its_rank():
    """A new thread begins on GPU 0."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    assert list(Ahead((torch.cuda.current_device() for _ in range(2)), device=device)) == [device.index] * 2
