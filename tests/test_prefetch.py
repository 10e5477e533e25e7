import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from sft.prefetch import Ahead, tensors_of
from tests.conftest import ROOT
from tests.test_batches import loader

CPU = torch.device("cpu")


def threads() -> int:
    return sum(thread.name == "batches ahead" for thread in threading.enumerate())


@dataclass
class Counted:
    """0, 1, 2 ...; `made` of them so far, in `makers`."""

    made: int = 0
    makers: set[int] = field(default_factory=set)

    def items(self, end: int = 10**9) -> Iterator[tuple[int]]:
        for number in range(end):
            self.made += 1
            self.makers.add(threading.get_ident())
            yield (number,)


def wait_until(holds) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [1, 2])
def test_another_thread_makes_as_many_as_allowed_ahead_and_no_more(depth: int):
    counted = Counted()
    ahead = Ahead(counted.items(), device=CPU, depth=depth)
    for asked in range(5):
        wait_until(lambda asked=asked: counted.made == asked + depth)
        time.sleep(0.01)
        assert counted.made == asked + depth
        assert next(ahead) == (asked,)
    assert threading.get_ident() not in counted.makers
    ahead.close()
    assert threads() == 0


def test_the_end_comes_where_the_items_end_and_the_thread_with_it():
    ahead = Ahead(Counted().items(3), device=CPU)
    assert list(ahead) == [(0,), (1,), (2,)]
    assert threads() == 0
    assert list(ahead) == []
    ahead.close()


class Broken(Exception):
    pass


def test_an_error_comes_where_its_item_would_have_come():
    def items():
        yield from [(0,), (1,)]
        raise Broken("the disk is gone")

    ahead = Ahead(items(), device=CPU)
    assert [next(ahead), next(ahead)] == [(0,), (1,)]
    with pytest.raises(Broken, match="the disk is gone"):
        next(ahead)
    assert threads() == 0


def test_closing_ends_a_thread_that_waits_for_room_and_one_that_is_at_work():
    waiting = Ahead(Counted().items(), device=CPU)
    started = threading.Event()

    def slow():
        started.set()
        time.sleep(0.05)
        yield (0,)

    working = Ahead(slow(), device=CPU)
    started.wait()
    for ahead in (waiting, working):
        ahead.close()
        ahead.close()
    assert threads() == 0


def test_waiting_for_an_item_can_be_interrupted():
    release = threading.Event()
    ahead = Ahead((release.wait(30) for _ in range(1)), device=CPU)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(ahead)
    assert time.monotonic() - begin < 10
    release.set()
    ahead.close()


@pytest.mark.slow
def test_a_process_that_ends_without_closing_is_not_kept_alive():
    program = (
        "import itertools, torch\n"
        "from sft.prefetch import Ahead\n"
        "Ahead(itertools.repeat(1), device=torch.device('cpu'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_batches_of_several_steps_are_those_of_each_step_in_their_order():
    """From the middle of a run on, over an epoch's end, for both ranks."""
    for rank in range(2):
        mine = loader(rank, 2, rows_per_step=4)
        ahead = Ahead(mine.steps(3, rows_seen=12, end=9), device=CPU)
        for step in range(3, 9):
            batches, target_weight, _ = mine.step(step, rows_seen=4 * step)
            expected = list(batches)
            got = list(itertools.islice(ahead, mine.micro_steps))
            assert len(got) == len(expected) == 2
            for one, two in zip(got, expected, strict=True):
                assert one.target_weight == target_weight
                assert one.batch.dropout_seed == two.dropout_seed
                assert len(list(tensors_of(one))) >= 5
                for mine_too, tensor in zip(tensors_of(one.batch), tensors_of(two), strict=True):
                    assert torch.equal(mine_too, tensor)
        assert list(ahead) == []


def test_the_tensors_of_a_batch_are_found_wherever_they_are():
    @dataclass(frozen=True)
    class Inner:
        ids: torch.Tensor

    @dataclass(frozen=True)
    class Outer:
        inner: Inner
        several: tuple
        number: int = 3

    outer = Outer(Inner(torch.zeros(1)), (torch.zeros(2), [torch.zeros(3)], {"a": torch.zeros(4)}))
    outer.inner.__dict__["cached"] = torch.zeros(5)  # as functools.cached_property does
    assert sorted(len(tensor) for tensor in tensors_of(outer)) == [1, 2, 3, 4, 5]
