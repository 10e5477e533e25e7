"""README.md of an exported model: what it is, how to use it, the figures and the settings of its run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from sft.run_log import LARGEST_PARENT, logs_of
from sft.untrusted import read_json

FRONT_MATTER = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---"
MEASURES = {  # of a record of the run log: how they are called, and how they are written
    "loss": ("training loss", ".4f"),
    "val_loss": ("validation loss", ".4f"),
    "tokens_per_second": ("tokens per second", ",.0f"),
}


class Facts(NamedTuple):
    """What the README tells of a model."""

    family: str
    parameters: int
    dtype: str
    adapters: bool  # alone, without the model that they change
    source: Path  # the checkpoint
    notes: Sequence[str]  # what was done to its tensors
    template: str | None
    stops: Sequence[str]
    content: Mapping[str, Any]  # of the checkpoint, without its tensors; of a Hugging Face folder nothing


def readme_text(facts: Facts, log: Mapping[str, Any]) -> str:
    """The text; `log` is that of the run, empty where there is none."""
    settings = _dict(facts.content.get("config")) or _dict(log.get("config"))
    name = settings.get("run_name") or log.get("run_name") or facts.source.resolve().parent.name
    base = settings.get("checkpoint_path")
    parts = [
        FRONT_MATTER,
        f"# {_cell(name)}",
        f"{_what(facts)}, exported from `{facts.source.name}`. "
        + (f"It was fine-tuned from {_cell(_shown(base))}." if base else "Its base is not on record."),
        *([f"On the way out: {'; '.join(facts.notes)}."] if facts.notes else []),
        _use(facts),
        *_section("Figures", ("figure", "value"), figures(facts.content, log)),
        *_section("Data and run", ("", "as the run told it"), _told(facts.content, log)),
        *_section("Settings", ("setting", "value"), [(name, _shown(value)) for name, value in settings.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _what(facts: Facts) -> str:
    if facts.adapters:
        return (
            f"Adapters in PEFT's format, for a {facts.family} model that has {facts.parameters:,} parameters with them"
        )
    return f"{facts.family}, {facts.parameters:,} parameters in {facts.dtype}"


def newest_log(folder: Path) -> dict[str, Any]:
    """The newest run log of a folder; empty where there is none that can be read."""
    for path, _ in reversed(logs_of(folder)):
        try:
            return _dict(read_json(path, most=LARGEST_PARENT))
        except (OSError, ValueError):
            continue
    return {}


def figures(content: Mapping[str, Any], log: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run had come to at the checkpoint's step, as names and values."""
    step = content.get("iter_num")
    found = [("step", f"{step:,}")] if isinstance(step, int) else []
    if isinstance(seen := content.get("trained_tokens_seen"), int):
        found.append(("trained tokens seen", f"{seen:,}"))
    measures = dict(_measures(log, step))
    for name in ("val_loss", "best_val_loss"):
        if isinstance(value := content.get(name), float):
            measures[name] = value
    for name, value in measures.items():
        told, form = MEASURES.get(name, (name.replace("_", " "), ".4f"))
        found.append((told, format(value, form)))
    return found


def _measures(log: Mapping[str, Any], step: object) -> Iterator[tuple[str, float]]:
    """The last records up to a step."""
    for section, names in (("training_iterations", ("loss", "tokens_per_second")), ("eval_steps", ("val_loss",))):
        records = [each for each in log.get(section) or [] if isinstance(each, dict)]
        known = [each for each in records if not isinstance(step, int) or each.get("iter", 0) <= step]
        for name in names:
            if known and isinstance(value := known[-1].get(name), (int, float)):
                yield name, float(value)


def _told(content: Mapping[str, Any], log: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run said of itself before its first step, and whose data it was."""
    startup = _dict(log.get("startup_info"))
    rows = [(str(name), str(sentence)) for name, sentence in _dict(startup.get("sentences")).items()]
    if version := startup.get("torch"):
        rows.append(("software", f"torch {version}, Python {startup.get('python')}"))
    if fingerprint := content.get("data_fingerprint"):
        rows.append(("data fingerprint", f"{fingerprint}"))
    return rows


def _use(facts: Facts) -> str:
    stops = ", ".join(f"`{stop}`" for stop in facts.stops)
    template = (
        f"Its chat template is `{facts.template}` (`chat_template.jinja`); an answer stops at {stops}."
        if facts.template
        else f"It has no chat template: it was not trained on conversations. A document stops at {stops}."
    )
    return f"""## Use

{template}

```
transformers serve --host 127.0.0.1 FOLDER
vllm serve FOLDER
```"""


def _section(title: str, head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    lines = [
        f"| {head[0]} | {head[1]} |",
        "|---|---|",
        *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows),
    ]
    return [f"## {title}", "\n".join(lines)]


def _shown(value: object) -> str:
    """A setting as one reads it; of a place on one machine only the last part."""
    text = str(value)
    return PurePath(text).name if isinstance(value, str) and PurePath(text).is_absolute() else text


def _cell(value: object) -> str:
    """Text that stays within a cell of a table and is no markup of a page."""
    text = "".join(each if each.isprintable() else " " for each in str(value))
    return text.replace("\\", "\\\\").replace("|", r"\|").replace("<", "&lt;")


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
