"""What a whole step is to reach, and whether a run of bench/step.py reached it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bench.loss_goals import MEASURED
from bench.step_measure import ratio
from bench.step_tasks import OURS, OURS_BF16, PADDED, TRL

SPEED = "times the tokens/s of"
MEMORY, MEMORY_BEYOND = "of the peak memory of", "beyond its imports, of the peak memory of"
FIELDS = {SPEED: "tokens_per_second", MEMORY: "peak_bytes", MEMORY_BEYOND: "peak_bytes_beyond_imports"}
TOKENS, MFU = "tokens/s", "of the peak of the GPU (MFU)"
AGREES, EXTRA = "loss curve as", "apart"
AT_MOST = (MEMORY, MEMORY_BEYOND)


class Goal(NamedTuple):
    """One number to be reached in one task."""

    task: str
    measure: str
    limit: float
    against: str | None = None
    provider: str = OURS
    stretch: bool = False


class ExtraGoal(NamedTuple):
    """One number that is measured apart from the tasks."""

    name: str
    field: str
    limit: float
    at_most: bool


PACKED, CAUSAL, ALPACA = "1.7B, packed documents, share 0.3", "1.7B, causal 4096, share 1", "1.7B, Alpaca lengths"
LARGE, SMALL = "V 151,936", "V 8,192"
GOALS: Mapping[str, Sequence[Goal]] = {
    "cuda": (
        Goal(PACKED, TOKENS, 48_000),
        Goal(PACKED, TOKENS, 55_000, stretch=True),
        Goal(CAUSAL, TOKENS, 41_000),
        Goal(CAUSAL, MFU, 0.48),
        Goal(CAUSAL, MFU, 0.53, stretch=True),
        Goal(PACKED, SPEED, 1.4, TRL),
        Goal(CAUSAL, SPEED, 1.4, TRL),
        Goal(ALPACA, SPEED, 5.0, PADDED),
        Goal(PACKED, MEMORY, 0.7, TRL),
        Goal(CAUSAL, MEMORY, 0.7, TRL),
    ),
    "cpu": (
        Goal(LARGE, SPEED, 3.0, TRL),
        Goal(LARGE, SPEED, 4.5, PADDED),
        Goal(SMALL, SPEED, 1.7, TRL),
        Goal(SMALL, SPEED, 2.2, PADDED),
        Goal(LARGE, MEMORY, 0.7, TRL),
        Goal(SMALL, MEMORY, 0.7, TRL),
        Goal(LARGE, MEMORY_BEYOND, 0.7, TRL),
        Goal(SMALL, MEMORY_BEYOND, 0.7, TRL),
        Goal(LARGE, SPEED, 1.4, OURS, provider=OURS_BF16),
        Goal(SMALL, SPEED, 1.4, OURS, provider=OURS_BF16),
        Goal(LARGE, AGREES, 1, OURS, provider=OURS_BF16),
        Goal(SMALL, AGREES, 1, OURS, provider=OURS_BF16),
    ),
}
EXTRA_GOALS = (
    ExtraGoal("start of train_sft.py to its first step, demo's model", "first_step_seconds", 5.0, at_most=True),
    ExtraGoal("DDP around a single rank, share of a step", "ddp_overhead", 0.01, at_most=True),
    ExtraGoal("waiting for the loader and the log, share of a step", "stall_share", 0.005, at_most=True),
    ExtraGoal("two ranks over twice one rank, one thread each", "two_rank_efficiency", 0.9, at_most=False),
)


def sentence(goal: Goal) -> str:
    """A goal as one line of a table."""
    what = f"{goal.limit:g} {goal.measure}{f' {goal.against}' if goal.against else ''}"
    if goal.measure == AGREES:
        what = f"{AGREES} {goal.against}"
    else:
        what = f"{'<=' if goal.measure in AT_MOST else '>='} {what}"
    return f"{goal.task}, {goal.provider}: {what}{' (stretch)' if goal.stretch else ''}"


def reached(goal: Goal, result: Mapping[str, Any]) -> float:
    """The number that a task's result reached. KeyError, with a sentence, where it cannot be told."""
    providers = result["providers"]
    if goal.measure == AGREES:
        agrees = result["agreement"]["agree"].get(goal.provider)
        if agrees is None:
            raise KeyError(f"the losses of {goal.provider} were not compared")
        return float(agrees)
    if goal.measure == SPEED:
        for name in (goal.provider, goal.against):
            agrees = name == OURS or result["agreement"]["agree"].get(name)
            if not agrees and providers.get(name, {}).get("status") == MEASURED:
                why = "were not compared with ours" if agrees is None else "do not agree with ours"
                raise KeyError(f"the losses of {name} {why}")
    if goal.against is not None:
        return ratio(providers, goal.provider, goal.against, of=FIELDS[goal.measure])
    row = providers[goal.provider]
    if row["status"] != MEASURED:
        raise KeyError(f"{goal.provider} is {row['status']}: {row.get('reason')}")
    if goal.measure == TOKENS:
        return row["tokens_per_second"]
    if row.get("mfu") is None:
        raise KeyError("the peak of this device is not known")
    return row["mfu"]


def untried(goal: Goal, result: Mapping[str, Any], *, met: bool) -> str | None:
    """Who may have a better option that was not tried, where that could change the judgement."""
    if goal.measure == AGREES:
        return None
    speed_is_met = met and goal.measure not in AT_MOST  # with a better option it is met all the more
    asked = [name for name in (None if speed_is_met else goal.provider, goal.against) if name is not None]
    told = [f"{name} {'; '.join(left)}" for name in asked if (left := result["providers"][name].get("untried"))]
    return f"not tried for lack of time: {', '.join(told)}" if told else None


def over_packing(goal: Goal, result: Mapping[str, Any]) -> dict[str, float]:
    """Our peak memory over that of TRL's quickest packing option, where TRL is quicker without packing."""
    if goal.measure not in AT_MOST or goal.against != TRL:
        return {}
    ours, trl = (result["providers"][name] for name in (goal.provider, TRL))
    options = {name: told for name, told in trl["options"].items() if "packing=True" in name and isinstance(told, dict)}
    if not options:
        return {}
    told = max(options.values(), key=lambda told: told["tokens_per_second"])
    imports = told["resident_bytes"] if goal.measure == MEMORY_BEYOND else 0
    return {"reached_against_packing": ours[FIELDS[goal.measure]] / (told["peak_bytes"] - imports)}


def judge(
    device: str, results: Sequence[Mapping[str, Any]], extra: Mapping[str, Any], *, native_bf16: bool = True
) -> list[dict[str, Any]]:
    """Every goal of a device; `met` is None where this run cannot tell, with the reason."""
    judged = []
    for goal in GOALS[device]:
        row: dict[str, Any] = {"goal": sentence(goal), "limit": goal.limit, "reached": None, "met": None}
        fitting = [result for result in results if result["task"]["name"] == goal.task]
        try:
            if not fitting:
                raise KeyError("not in this run")
            row["reached"] = reached(goal, fitting[0])
            met = meets(row["reached"], goal.limit, at_most=goal.measure in AT_MOST)
            row |= over_packing(goal, fitting[0])
            if goal.provider == OURS_BF16 and goal.measure == SPEED and device == "cpu" and not native_bf16:
                raise KeyError("this CPU has no instructions for bf16")
            if why := untried(goal, fitting[0], met=met):
                raise KeyError(why)
            row["met"] = met
        except KeyError as error:
            row["why"] = error.args[0]
        judged.append(row)
    for apart in EXTRA_GOALS if device == "cpu" else ():
        number = extra.get(apart.field)
        words = f"{apart.name}: {'<=' if apart.at_most else '>='} {apart.limit:g}"
        row = {"goal": words, "limit": apart.limit, "reached": number, "met": None}
        row |= (
            {"why": extra.get("why", "not in this run")}
            if number is None
            else {"met": meets(number, apart.limit, at_most=apart.at_most)}
        )
        judged.append(row)
    return judged


def meets(number: float, limit: float, *, at_most: bool) -> bool:
    return number <= limit if at_most else number >= limit


def goal_lines(goals: Sequence[Mapping[str, Any]]) -> list[str]:
    words = {True: "met", False: "missed", None: "unknown"}

    def number(row: Mapping[str, Any]) -> str:
        if row["reached"] is None:
            return row["why"]
        reached = f"{row['reached']:,.0f}" if row["reached"] >= 100 else f"{row['reached']:.3f}"
        packing = row.get("reached_against_packing")
        against = "" if packing is None else f" ({packing:.3f} of its packing)"
        return f"{reached}{against}{', but ' + row['why'] if row['met'] is None else ''}"

    return [f"  {words[row['met']]:<8} {row['goal']}: {number(row)}" for row in goals]
