import gzip
import json

import pytest

import train_sft
from sft import tracing


def run_log(folder) -> dict:
    return json.loads(max(folder.glob("run_*.json")).read_text())


@pytest.mark.slow
def test_a_profile_shows_the_phases_of_three_steps_and_does_not_change_them(arguments, tmp_path):
    train_sft.main(arguments(max_iters=12, eval_interval="none", out_dir=tmp_path / "traced", profile=True))
    trace = json.loads(gzip.decompress((tmp_path / "traced" / "trace_rank0.json.gz").read_bytes()))
    phases = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    counts = {name: phases.count(name) for name in ("batch", "forward", "backward", "optimizer")}
    assert counts == {"batch": 6, "forward": 6, "backward": 6, "optimizer": 3}  # two micro-steps a step
    assert sum(name.startswith("ProfilerStep#") for name in phases) == tracing.TRACED
    table = (tmp_path / "traced" / "trace_rank0.txt").read_text()
    assert "aten::" in table
    assert "Self CPU" in table
    log = run_log(tmp_path / "traced")
    (event,) = log["events"]
    assert (event["kind"], event["iter"]) == ("traced", tracing.SKIPPED + tracing.PREPARED + tracing.TRACED)
    assert "trace_rank0.json.gz" in event["sentence"]

    times = [record["time_ms"] for record in log["training_iterations"]]
    assert min(times[-5:]) < 3 * min(times[:2]), "the steps after the trace are slower than those before it"

    train_sft.main(arguments(max_iters=12, eval_interval="none", out_dir=tmp_path / "plain"))
    assert not list((tmp_path / "plain").glob("trace*"))
    plain = run_log(tmp_path / "plain")["training_iterations"]
    assert [record["loss"] for record in log["training_iterations"]] == [record["loss"] for record in plain]


@pytest.mark.parametrize(("steps", "traced"), [(2, 0), (4, 1)])
def test_a_short_run_traces_what_there_is_or_says_that_there_was_nothing(arguments, tmp_path, capsys, steps, traced):
    train_sft.main(arguments(max_iters=steps, eval_interval="none", profile=True))
    path = tmp_path / "out" / "trace_rank0.json.gz"
    assert path.exists() is bool(traced)
    assert ("nothing is traced: the run ended within its first 3 steps" in capsys.readouterr().out) is not traced
    if traced:
        assert json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
