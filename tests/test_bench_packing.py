"""What of the packing benchmark can be held without TRL."""

import json
import sys

import numpy as np
import pytest

from bench.packing import alpaca_lengths, large_run, main, our_plan, our_plan_and_tokens
from sft.errors import UserError
from tests.conftest import ROOT


def test_the_committed_result_reaches_what_was_promised():
    report = json.loads((ROOT / "bench" / "results" / "packing_cpu.json").read_text())
    assert report["samples"] >= 200_000
    for result in report["block_sizes"].values():
        compared, alone = result["compared"], result["ours_alone"]
        assert compared["TRL"]["times_as_long_as_our_plan"] >= 15
        assert compared["TRL, all at once"]["times_as_long_as_our_plan"] >= 15
        assert compared["ours, the plan"]["samples_per_second"] >= 1_000_000
        assert alone["samples"] >= 1_000_000
        assert alone["samples_per_second"] >= 1_000_000
        assert alone["fill"] >= 0.999


def test_the_lengths_are_those_of_alpaca_conversations():
    lengths = alpaca_lengths(100_000, longest=2048)
    assert (lengths.min(), lengths.max() <= 2048) == (18, True)
    assert np.log(lengths).mean() == pytest.approx(4.755, abs=0.01)
    assert lengths.mean() == pytest.approx(154, rel=0.05)


def test_moving_the_tokens_too_moves_all_of_them():
    lengths = np.array([3, 1, 4, 2])
    assert our_plan_and_tokens(lengths, np.arange(10), 5) == our_plan(lengths, 5) == (2, 10)


def test_a_run_of_our_own_says_what_it_measured():
    result = large_run(np.full(100, 5), 10, repeats=1)
    assert (result["samples"], result["fill"]) == (100, 1.0)


def test_without_trl_it_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match=r"missing; pip install -e '\.\[bench\]'"):
        main([])
