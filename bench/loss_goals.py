"""What the masked cross-entropy is to reach, and whether a run of bench/loss.py reached it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bench.loss_providers import CCE, EAGER, EAGER_FP32, HEAD, LIGER, LOGITS, OURS, QUACK, TORCH_LINEAR, TRL

MEASURED = "measured"
FLOOR, SPEED, MEMORY, MEMORY_SHARE, SYNCS = (
    "over the floor",
    "times as fast as",
    "GB beyond the head's gradient in fp32",
    "of the memory of",
    "host syncs",
)
AT_MOST = (FLOOR, MEMORY, MEMORY_SHARE, SYNCS)


class Goal(NamedTuple):
    """One number to be reached in every configuration that fits; the worst of them counts."""

    workloads: tuple[str, ...]
    measure: str
    limit: float
    against: str | None = None
    share: float | None = None
    tokens: int | None = None


GOALS: Mapping[str, Sequence[Goal]] = {
    "cuda": (
        Goal((LOGITS,), FLOOR, 1.12, share=1.0, tokens=16384),
        Goal((LOGITS,), SPEED, 1.6, LIGER, share=1.0, tokens=16384),
        Goal((LOGITS,), SPEED, 6.0, EAGER_FP32, share=1.0, tokens=16384),
        Goal((LOGITS,), FLOOR, 1.15, share=0.3, tokens=16384),
        Goal((LOGITS,), SPEED, 1.35, LIGER, share=0.3, tokens=16384),
        Goal((HEAD,), FLOOR, 1.10, share=1.0),
        Goal((HEAD,), SPEED, 1.3, LIGER, share=1.0),
        Goal((HEAD,), SPEED, 1.35, TRL, share=1.0),
        Goal((HEAD,), SPEED, 1.1, CCE, share=1.0),
        Goal((HEAD,), SPEED, 0.95, QUACK, share=1.0),
        Goal((HEAD,), FLOOR, 1.12, share=0.3),
        Goal((HEAD,), SPEED, 4.0, LIGER, share=0.3),
        Goal((HEAD,), SPEED, 1.35, TRL, share=0.3),
        Goal((HEAD,), SPEED, 1.1, CCE, share=0.3),
        Goal((HEAD,), FLOOR, 1.20, share=0.1),
        Goal((HEAD,), SPEED, 10.0, LIGER, share=0.1),
        Goal((HEAD,), MEMORY, 1.3),
        Goal((HEAD,), MEMORY_SHARE, 0.2, EAGER_FP32),
        Goal((HEAD, LOGITS), SYNCS, 0),
    ),
    "cpu": (
        Goal((HEAD,), SPEED, 1.0, TORCH_LINEAR),
        Goal((HEAD,), SPEED, 1.0, EAGER),
    ),
}


def sentence(goal: Goal) -> str:
    """A goal as one line of a table."""
    where = [" and ".join(goal.workloads)]
    where += [] if goal.share is None else [f"share {goal.share:g}"]
    where += ["any N" if goal.tokens is None else f"N {goal.tokens:,}"]
    what = f"{'<=' if goal.measure in AT_MOST else '>='} {goal.limit:g} {goal.measure}"
    return f"{', '.join(where)}: {what}{f' {goal.against}' if goal.against else ''}"


def reached_in(goal: Goal, configuration: Mapping[str, Any]) -> float:
    """The number that one configuration reached. KeyError, with a sentence, where it cannot be told."""
    ours = counted(configuration, OURS)
    if goal.measure == FLOOR:
        return ours["milliseconds"] / configuration["floor"]["milliseconds"]
    if goal.measure == SYNCS:
        return ours["host_syncs"]
    if goal.measure == MEMORY:
        return (ours["extra_bytes"] - configuration["head_gradient_bytes"]) / 1e9
    assert goal.against is not None
    other = counted(configuration, goal.against)
    if goal.measure == MEMORY_SHARE:
        return ours["extra_bytes"] / other["extra_bytes"]
    return other["milliseconds"] / ours["milliseconds"]


def counted(configuration: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The result of a provider that was measured and right; a wrong one is no one to be compared with."""
    result = configuration["providers"].get(name, {"status": "missing", "reason": "not in this run"})
    if result["status"] != MEASURED:
        raise KeyError(f"{name} is {result['status']}: {result.get('reason')}")
    return result


def judged(goal: Goal, configurations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A goal with the worst that was reached; `met` is None where some configuration cannot tell."""
    fitting = [
        configuration
        for configuration in configurations
        if configuration["workload"] in goal.workloads
        and goal.share in (None, configuration["share"])
        and goal.tokens in (None, configuration["tokens"])
    ]
    row: dict[str, Any] = {"goal": sentence(goal), "limit": goal.limit, "reached": None, "met": None}
    try:
        numbers = [(reached_in(goal, fit), fit) for fit in fitting]
    except KeyError as error:
        return {**row, "why": error.args[0]}
    if not numbers:
        return {**row, "why": "no such configuration in this run"}
    worst, where = (max if goal.measure in AT_MOST else min)(numbers, key=lambda pair: pair[0])
    met = worst <= goal.limit if goal.measure in AT_MOST else worst >= goal.limit
    place = {name: where[name] for name in ("workload", "tokens", "share")}
    return {**row, "reached": worst, "met": met, "worst_at": place, "configurations": len(numbers)}


def judge(device: str, configurations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [judged(goal, configurations) for goal in GOALS[device]]


def goal_lines(goals: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in goals:
        verdict = {True: "met", False: "NOT MET", None: "unknown"}[row["met"]]
        reached = f"{row['reached']:.3f}" if row["reached"] is not None else row["why"]
        lines.append(f"  {verdict:<8} {row['goal']:<75} {reached}")
    return lines
