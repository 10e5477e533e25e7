"""The benchmark of the loss keeps to its minutes, and what they do not suffice for is the least important."""

import json
import time

import pytest
import torch

from bench import loss_measure
from bench.loss import LossBenchmark, configurations, main, resolved
from bench.loss_measure import Contestant, OutOfTime, take_turns
from bench.loss_providers import EVALUATION, HEAD, LOGITS, OURS, Provider, eager_head

CPU = torch.device("cpu")


def test_the_configuration_of_the_least_importance_comes_last():
    plan = configurations(resolved(LossBenchmark(device="cpu", tokens="16384,8192,32768")))
    assert plan[:3] == [(HEAD, 16384, 1.0), (LOGITS, 16384, 1.0), (EVALUATION, 16384, 1.0)]
    assert plan[-2:] == [(HEAD, 32768, 0.5), (LOGITS, 32768, 0.5)]
    assert len(plan) == 27


def test_three_rounds_are_all_or_nothing():
    contestants = {"a": Contestant(lambda k: k, lambda k: None)}
    begin = time.perf_counter()
    times, _ = take_turns(contestants, CPU, seconds=0, pool=1, end=begin + 60)
    assert len(times["a"].device) == 3
    with pytest.raises(OutOfTime):
        take_turns(contestants, CPU, seconds=60, pool=1, end=begin)


def test_when_the_minutes_are_over_the_run_ends_with_what_is_whole(monkeypatch, tmp_path):
    monkeypatch.setitem(loss_measure.COPIED, "cpu", 1 << 16)
    monkeypatch.setattr(loss_measure, "ROUNDS_AT_MOST", 3)

    def slow(hidden, head, draw):
        time.sleep(0.1)
        return eager_head(hidden, head, draw, fp32_logits=False)

    monkeypatch.setattr("bench.loss_task.providers_of", lambda *_: [Provider(OURS, (HEAD,), lambda: slow)])
    sizes = ["--tokens=24", "--hidden_size=16", "--vocabulary=331", "--shares=1.0,0.9,0.8,0.7,0.6,0.5,0.4,0.3"]
    begin = time.perf_counter()
    main([*sizes, "--device=cpu", "--workloads=head", "--minutes=0.02", f"--out_dir={tmp_path}"])
    left = json.loads((tmp_path / "loss_cpu.json").read_text())
    assert (left["status"], left["planned"]) == ("out of time", 8)
    assert 1 <= len(left["configurations"]) <= 3, "half a second each"
    assert all(row["providers"][OURS]["rounds"] == 3 for row in left["configurations"])
    assert time.perf_counter() - begin < 6
