"""What the step benchmark measures apart: the trainer's start, DDP beside a process alone, other people's versions."""

import sys

import pytest

from bench import step_extra
from bench.step_extra import STEP_LINE, first_step, measured_apart, peers_versions, quotients, ranks, stall

TINY = ("tiny", "tiny")


def test_the_first_step_is_known_from_the_announcement_of_its_size():
    assert STEP_LINE.match("step     1/400  loss 1.2841")
    assert not STEP_LINE.match("step     4 rows x 4 micro-steps x 8 GPUs = 128 rows = 262,144 tokens a step")


def test_a_part_that_fails_does_not_cost_the_others(monkeypatch):
    def broken(threads: int | None) -> dict:
        raise OSError("no room")

    monkeypatch.setattr(step_extra, "first_step", broken)
    monkeypatch.setattr(step_extra, "stall", lambda *_: {"stall_share": 0.001})
    turns = [{"alone": 2.0, "ranked": 2.5}, {"alone": 2.0, "ranked": 2.1}, {"alone": 2.0, "ranked": 2.2}]
    monkeypatch.setattr(step_extra, "ranks", lambda *_: turns)
    told = measured_apart(threads=1)
    assert told["why"] == "OSError: no room"
    assert told["ddp_overhead"] == pytest.approx(0.1)
    assert told["two_rank_efficiency"] == pytest.approx(1 / 1.1)


def test_ranks_that_tell_nothing_are_an_error():
    with pytest.raises(RuntimeError, match="the ranks told nothing"):
        quotients([])


def test_the_peers_versions_are_those_of_their_own_interpreter():
    assert peers_versions(sys.executable)["torch"] == peers_versions(None)["torch"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_ddp_and_a_process_alone_take_turns(count: int):
    turns = ranks(TINY, count, 2, 1)
    assert len(turns) == 2
    assert all(turn["alone"] > 0 and turn["ranked"] > 0 for turn in turns)


@pytest.mark.slow
def test_the_trainer_tells_what_share_of_its_steps_it_waits():
    told = stall(TINY, 1)
    assert 0 <= told["stall_share"] < 1


@pytest.mark.slow
def test_the_trainer_tells_of_its_first_step(monkeypatch):
    monkeypatch.setattr(step_extra, "STARTS", 1)
    assert first_step(1)["first_step_seconds"] > 0
