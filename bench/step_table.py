"""A task's result as a table in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.loss_goals import MEASURED
from bench.step_measure import ratio
from bench.step_tasks import OURS

COLUMNS = (
    *("", "tokens/s", "trained tokens/s", "ours is faster", "peak memory (beyond imports), GB", "first step", "MFU"),
    *("losses as ours", "option"),
)


def table_lines(result: Mapping[str, Any]) -> list[str]:
    """The heading of a task, then a row for each provider; who failed has its reason in the place of numbers."""
    task, providers = result["task"], result["providers"]
    lines = [
        f"{task['name']}: {result['data']}, {result['mean_length']:.0f} tokens on average, "
        f"{result['trained_share']:.2f} of them trained; {task['dtype']}; "
        f"{task['row'] * task['rows_per_step']:,} tokens a step",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    ranked = sorted(providers, key=lambda name: -providers[name].get("tokens_per_second", 0.0))
    return [*lines, *(row_line(name, result) for name in ranked), ""]


def row_line(name: str, result: Mapping[str, Any]) -> str:
    providers = result["providers"]
    row = providers[name]
    if row["status"] != MEASURED:
        return f"| {name} | {row['status']}: {row['reason']} |" + " |" * (len(COLUMNS) - 2)
    cells = [
        name,
        f"{row['tokens_per_second']:,.0f}",
        f"{row['trained_tokens_per_second']:,.0f}",
        times(providers, name),
        memory(row),
        f"{row['start_to_first_step_seconds']:.1f} s",
        "" if row.get("mfu") is None else f"{row['mfu']:.1%}",
        agrees(name, result["agreement"]),
        row["option"] + (f" (not tried: {'; '.join(row['untried'])})" if row.get("untried") else ""),
    ]
    return f"| {' | '.join(cells)} |"


def memory(row: Mapping[str, Any]) -> str:
    beyond = row["peak_bytes_beyond_imports"]
    return f"{row['peak_bytes'] / 1e9:.2f}" + ("" if beyond is None else f" ({beyond / 1e9:.2f})")


def times(providers: Mapping[str, Any], name: str) -> str:
    try:
        return "" if name == OURS else f"{ratio(providers, OURS, name, of='tokens_per_second'):.2f} x"
    except KeyError:
        return ""


def agrees(name: str, agreement: Mapping[str, Any]) -> str:
    if name not in agreement["agree"]:
        return ""
    words = "" if agreement["agree"][name] else "NO, "
    return f"{words}within {agreement['largest_relative_difference'][name]:.0e}"
