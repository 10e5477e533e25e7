"""The plot of a result of bench/step.py: tokens per second and peak memory of everyone, task by task.

PYTHONPATH=. python bench/plot_step.py --result=bench/results/step_h200.json

It needs the extra `report` and writes a .png and a .svg beside the result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.loss_goals import MEASURED
from bench.step_tasks import PROVIDERS
from sft.config import load_settings
from sft.errors import UserError, run_program


@dataclass(frozen=True, kw_only=True)
class StepPlot:
    """Every knob of this plot."""

    result: str  # the JSON of bench/step.py; the pictures go beside it


def draw_task(left: Any, right: Any, result: Mapping[str, Any]) -> None:
    """Bars of the providers that were measured, in the order of PROVIDERS; slowest and fastest round as error bars."""
    rows = {
        name: result["providers"][name]
        for name in PROVIDERS
        if result["providers"].get(name, {}).get("status") == MEASURED
    }
    names, colours = list(rows), [f"C{PROVIDERS.index(name)}" for name in rows]
    speeds = [row["tokens_per_second"] for row in rows.values()]
    spread = [
        [speed - min(row["rounds"]) for speed, row in zip(speeds, rows.values(), strict=True)],
        [max(row["rounds"]) - speed for speed, row in zip(speeds, rows.values(), strict=True)],
    ]
    memory = [row["peak_bytes"] / 1e9 for row in rows.values()]
    drawn = left.barh(names, speeds, xerr=spread, color=colours, ecolor="0.4")
    left.bar_label(drawn, labels=[f"{speed:,.0f}" for speed in speeds], fontsize=8, padding=8)
    left.set_title(f"{result['task']['name']}: real tokens per second", fontsize=10)
    drawn = right.barh(names, memory, color=colours)
    right.bar_label(drawn, fmt="%.2f", fontsize=8, padding=2)
    right.set_title("peak memory, GB", fontsize=10)
    right.set_yticklabels([])
    for axes in (left, right):
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)


def draw(report: Mapping[str, Any]) -> Any:
    """A figure with a row of axes for each task."""
    from matplotlib.figure import Figure

    tasks = report["tasks"]
    if not tasks:
        raise UserError("the result holds no task")
    figure = Figure(figsize=(12, 2.4 * len(tasks) + 0.6), layout="constrained")
    for (left, right), result in zip(figure.subplots(len(tasks), 2, squeeze=False), tasks, strict=True):
        draw_task(left, right, result)
    where = report.get("gpu") or f"{report['processor']}, {report['settings']['threads']} threads"
    precisions = ", ".join(dict.fromkeys(result["task"]["dtype"] for result in tasks))
    figure.suptitle(f"{where}, torch {report['versions']['torch']}, {precisions}", fontsize=11)
    return figure


def main(argv: list[str]) -> None:
    path = Path(load_settings(StepPlot, argv).settings.result)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    try:
        figure = draw(report)
    except ImportError as error:
        raise UserError(f"{error.name} is missing; pip install -e '.[report]'") from error
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
        print(path.with_suffix(suffix))


if __name__ == "__main__":
    run_program(main)
