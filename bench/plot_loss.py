"""The plot of a result of bench/loss.py: times over the floor by provider and share, and peak memory.

PYTHONPATH=. python bench/plot_loss.py --result=bench/results/loss_h200.json

It needs the extra `report` and writes a .png and a .svg beside the result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.loss_goals import MEASURED
from bench.loss_providers import PROVIDERS, WORKLOADS
from sft.config import load_settings
from sft.errors import UserError, run_program

NAMES = list(dict.fromkeys(provider.name for provider in PROVIDERS))  # a provider has one colour in every plot
TITLES = {"head": "fused head", "logits": "over logits", "evaluation": "loss alone"}
WIDTH = 0.85  # of a group of bars


@dataclass(frozen=True, kw_only=True)
class LossPlot:
    """Every knob of this plot."""

    result: str  # the JSON of bench/loss.py; the pictures go beside it
    tokens: int | None = None  # N to show; None: the first one of the result


def shown(report: Mapping[str, Any], tokens: int | None) -> list[dict[str, Any]]:
    """The configurations of one N."""
    configurations = report["configurations"]
    if not configurations:
        raise UserError("the result holds no configuration")
    wanted = configurations[0]["tokens"] if tokens is None else tokens
    fitting = [configuration for configuration in configurations if configuration["tokens"] == wanted]
    if not fitting:
        there = ", ".join(str(n) for n in dict.fromkeys(row["tokens"] for row in configurations))
        raise UserError(f"the result has no N of {wanted}; it has {there}")
    return fitting


def bars(configurations: Sequence[Mapping[str, Any]], of: str) -> dict[str, list[float | None]]:
    """For each provider that was right somewhere a number per configuration: times over the floor, or gigabytes."""
    rows: dict[str, list[float | None]] = {}
    for name in NAMES:
        numbers: list[float | None] = []
        for configuration in configurations:
            row = configuration["providers"].get(name, {})
            if row.get("status") != MEASURED:
                numbers.append(None)
            elif of == "time":
                numbers.append(row["milliseconds"] / configuration["floor"]["milliseconds"])
            else:
                numbers.append(row["extra_bytes"] / 1e9 if row["extra_bytes"] else None)
        if any(number is not None for number in numbers):
            rows[name] = numbers
    return rows


def draw_bars(axes: Any, configurations: Sequence[Mapping[str, Any]], of: str) -> None:
    rows = bars(configurations, of)
    width = WIDTH / max(1, len(rows))
    for place, (name, numbers) in enumerate(rows.items()):
        there = [(group, number) for group, number in enumerate(numbers) if number is not None]
        offset = (place - (len(rows) - 1) / 2) * width
        heights = [number for _, number in there]
        drawn = axes.bar(
            [group + offset for group, _ in there], heights, width, label=name, color=f"C{NAMES.index(name)}"
        )
        axes.bar_label(drawn, fmt="%.3g", fontsize=6, rotation=90, padding=2)
    axes.set_xticks(range(len(configurations)), [f"share {row['share']:g}" for row in configurations])
    if rows:
        axes.set_yscale("log")
    axes.margins(y=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def draw(report: Mapping[str, Any], tokens: int | None) -> Any:
    """A figure with a row of axes for each workload: times over the floor, and memory."""
    from matplotlib.figure import Figure

    configurations = shown(report, tokens)
    workloads = [name for name in WORKLOADS if any(row["workload"] == name for row in configurations)]
    figure = Figure(figsize=(14, 3.6 * len(workloads)), layout="constrained")
    grid = figure.subplots(len(workloads), 2, squeeze=False)
    for (left, right), workload in zip(grid, workloads, strict=True):
        rows = sorted(
            (row for row in configurations if row["workload"] == workload), key=lambda row: row["share"], reverse=True
        )
        draw_bars(left, rows, "time")
        left.axhline(1, color="black", linewidth=1)
        left.set_title(f"{TITLES[workload]}: time, as a multiple of the floor", fontsize=10)
        draw_bars(right, rows, "memory")
        right.set_title(f"{TITLES[workload]}: peak memory beyond the inputs, GB", fontsize=10)
    widest = max((axes for axes in grid[:, 0]), key=lambda axes: len(axes.containers))
    figure.legend(handles=widest.containers, loc="outside lower center", ncols=5, fontsize=8)
    sizes = f"N {configurations[0]['tokens']:,}, D {report['settings']['hidden_size']:,}"
    figure.suptitle(
        f"{report.get('gpu') or report['processor']}, torch {report['versions']['torch']}: {sizes}, "
        f"V {report['settings']['vocabulary']:,}, {report['settings']['dtype']}",
        fontsize=11,
    )
    return figure


def main(argv: list[str]) -> None:
    settings = load_settings(LossPlot, argv).settings
    path = Path(settings.result)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    try:
        figure = draw(report, settings.tokens)
    except ImportError as error:
        raise UserError(f"{error.name} is missing; pip install -e '.[report]'") from error
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
        print(path.with_suffix(suffix))


if __name__ == "__main__":
    run_program(main)
