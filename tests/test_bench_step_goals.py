"""What a whole step is to reach: that goals are judged by the best of the options, and only where losses agree."""

import pytest

from bench.step_goals import goal_lines, judge
from bench.step_measure import ratio
from bench.step_tasks import OURS, OURS_BF16, PADDED, PLAIN, TRL


def made_up(task: str, **speeds: float) -> dict:
    names = {"ours": OURS, "bf16": OURS_BF16, "trl": TRL, "padded": PADDED}
    rows = {
        names[key]: {"status": "measured", "tokens_per_second": speed, "rounds": [speed] * 3}
        | {"options": {}, **dict.fromkeys(("peak_bytes", "peak_bytes_beyond_imports"), 100 / speed)}
        for key, speed in speeds.items()
    }
    rows[PLAIN] = {"status": "failed", "reason": "it broke"}
    return {"task": {"name": task}, "providers": rows, "agreement": {"agree": dict.fromkeys(rows, True)}}


def test_goals_are_met_missed_or_unknown():
    results = [made_up("V 151,936", ours=10.0, trl=2.0, padded=3.0, bf16=15.0)]
    judged = {row["goal"]: row for row in judge("cpu", results, {"ddp_overhead": 0.02})}
    told = {goal: row["met"] for goal, row in judged.items()}
    assert told["V 151,936, ours: >= 3 times the tokens/s of TRL"] is True
    assert told["V 151,936, ours: >= 4.5 times the tokens/s of padded loop"] is False
    assert told["V 151,936, ours: <= 0.7 of the peak memory of TRL"] is True
    assert told["V 151,936, ours, bf16: >= 1.4 times the tokens/s of ours"] is True
    assert told["V 151,936, ours, bf16: loss curve as ours"] is True
    assert told["V 8,192, ours: >= 1.7 times the tokens/s of TRL"] is None
    assert told["DDP around a single rank, share of a step: <= 0.01"] is False
    assert told["two ranks over twice one rank, one thread each: >= 0.9"] is None


TRL_SPEED, TRL_MEMORY = (
    "V 151,936, ours: >= 3 times the tokens/s of TRL",
    "V 151,936, ours: <= 0.7 of the peak memory of TRL",
)
BF16_SPEED = "V 151,936, ours, bf16: >= 1.4 times the tokens/s of ours"


def judged_rows(result: dict, **options: bool) -> dict[str, dict]:
    return {row["goal"]: row for row in judge("cpu", [result], {}, **options)}


def test_an_option_that_was_not_tried_leaves_the_goal_open_where_it_could_change_it():
    result = made_up("V 151,936", ours=10.0, trl=2.0, padded=3.0)
    result["providers"][TRL]["untried"] = ["packing=True, row=1024"]
    rows = judged_rows(result)
    assert (rows[TRL_SPEED]["met"], rows[TRL_SPEED]["reached"]) == (None, 5.0)
    assert "not tried for lack of time: TRL packing=True, row=1024" in rows[TRL_SPEED]["why"]
    (line,) = (line for line in goal_lines([rows[TRL_SPEED]]))
    assert line.endswith("5.000, but not tried for lack of time: TRL packing=True, row=1024")
    result = made_up("V 151,936", ours=10.0, trl=2.0, padded=3.0)
    result["providers"][OURS]["untried"] = ["rows=2"]
    rows = judged_rows(result)
    assert rows[TRL_SPEED]["met"] is True
    assert rows[TRL_MEMORY]["met"] is None
    assert rows["V 151,936, ours: >= 4.5 times the tokens/s of padded loop"]["met"] is None


def test_speed_is_not_judged_against_other_losses():
    result = made_up("V 151,936", ours=10.0, trl=2.0, padded=3.0, bf16=15.0)
    result["agreement"]["agree"] = {TRL: False, OURS_BF16: True}
    rows = judged_rows(result)
    assert rows[TRL_SPEED]["why"] == "the losses of TRL do not agree with ours"
    assert rows["V 151,936, ours: >= 4.5 times the tokens/s of padded loop"]["why"].endswith("not compared with ours")
    assert (rows[TRL_SPEED]["met"], rows[TRL_MEMORY]["met"], rows[BF16_SPEED]["met"]) == (None, True, True)


def test_bf16_is_not_judged_on_a_cpu_without_instructions_for_it():
    result = made_up("V 151,936", ours=10.0, bf16=10.0)
    assert judged_rows(result)[BF16_SPEED]["met"] is False
    row = judged_rows(result, native_bf16=False)[BF16_SPEED]
    assert (row["met"], row["why"]) == (None, "this CPU has no instructions for bf16")


def test_memory_is_also_told_against_packing():
    result = made_up("V 151,936", ours=10.0, trl=2.0)
    packed = {"tokens_per_second": 1.0, "peak_bytes": 25.0, "resident_bytes": 5.0}
    result["providers"][TRL]["options"] = {"packing=True": packed, "packing=False": {}, "packing=True, row=9": "why"}
    rows = judged_rows(result)
    assert rows[TRL_MEMORY]["reached_against_packing"] == 10 / 25
    beyond = rows["V 151,936, ours: <= 0.7 beyond its imports, of the peak memory of TRL"]
    assert beyond["reached_against_packing"] == 10 / 20


def test_a_ratio_is_the_median_of_rounds_and_names_who_failed():
    providers = made_up("", ours=1.0, trl=1.0)["providers"]
    providers[OURS]["rounds"], providers[TRL]["rounds"] = [2.0, 6.0, 3.0], [1.0, 2.0, 3.0]
    assert ratio(providers, OURS, TRL, of="tokens_per_second") == 2.0
    with pytest.raises(KeyError, match="nanoGPT-style loop is failed: it broke"):
        ratio(providers, OURS, PLAIN, of="tokens_per_second")
