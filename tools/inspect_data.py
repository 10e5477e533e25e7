"""Look at prepared data: python tools/inspect_data.py DIR [--n=5] [--sample=train:12] [--html=FILE] [--name=value]"""

from __future__ import annotations

import io
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sft.arrays import PreparedData, open_prepared
from sft.config import load_settings
from sft.data_summary import Table, audit_line, histogram, settings_table, tables
from sft.errors import UserError, run_program
from sft.page import as_json, as_page, save_page
from sft.sample_choice import SampleView, choose, named, view
from sft.sample_view import bracketed, on_one_line, painted, spelled
from sft.tokenizer import Tokenizer, load_tokenizer

USAGE = "python tools/inspect_data.py DIR [--name=value ...]"
TEMPLATE = Path(__file__).with_suffix(".html")
GENERATOR = b'<meta name="generator" content="inspect_data">'
PAGE_BYTES = 8_000_000  # of samples; what a browser still searches at the speed of typing
DEFAULT_N, DEFAULT_N_OF_A_PAGE = 5, 200


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    n: int | None = None  # samples to show; None = 5, or 200 on a page
    sample: str | None = None  # the one to show: train:12, 12 (of train) or file.jsonl:37 (record 37 of that source)
    split: Literal["train", "val"] | None = None  # show samples of this split only
    source: str | None = None  # show samples of this source only: its path, or how that ends
    html: str | None = None  # write a page that needs no network to this file instead
    seed: int = 0  # of the choice of samples

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.n is not None and self.n < 0:
            yield "n", f"n must be at least 0, not {self.n}"
        if self.html is not None and not self.html.strip():
            yield "html", "html is empty; name the file to write"


def main(argv: list[str]) -> None:
    is_help = bool({"--help", "-h"} & set(argv))
    if not is_help and (not argv or argv[0].startswith("--")):
        raise UserError(f"which prepared data? {USAGE}")
    settings = load_settings(InspectSettings, argv if is_help else argv[1:], usage=USAGE).settings
    data = open_prepared(argv[0])
    default = DEFAULT_N if settings.html is None else DEFAULT_N_OF_A_PAGE
    count = default if settings.n is None else settings.n
    if settings.sample is not None:
        places = named(data, settings.sample, split=settings.split, source=settings.source)
        choice = f"asked for: {settings.sample}"
    else:
        places, among = choose(data, count, split=settings.split, source=settings.source, seed=settings.seed)
        choice = f"{len(places):,} of {among:,} samples"
        if 0 < len(places) < among:
            parts = "all" if len(places) == 1 else f"{len(places):,} equal parts"
            choice += f", drawn from {parts} of the data (seed {settings.seed})"
    tokenizer = load_tokenizer(data.folder)
    if settings.html is None:
        print_samples(data, (view(data, *place, tokenizer) for place in places), choice, tokenizer)
    else:
        random.Random(settings.seed).shuffle(places)  # so that a full page, too, shows samples from everywhere
        write_page(Path(settings.html), data, places, choice, tokenizer)


def print_samples(data: PreparedData, samples: Iterator[SampleView], choice: str, tokenizer: Tokenizer) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    legend = "trained tokens are green" if coloured else "trained tokens are in ⟦ ⟧"
    print(f"{choice}; {legend}, control tokens in ⟨ ⟩, lines end at ↵\n")
    for sample in samples:
        print(headline(sample))
        print("".join((painted if coloured else bracketed)(sample.pieces)), end="\n\n")
    print(on_one_line(f"{data.folder}: {about(data.meta)}"))
    print(f"audit {audit_line(data.meta)[1]}")
    for table in tables(data):
        print("\n" + "\n".join(table_lines(table)))


def about(meta: Mapping[str, Any]) -> str:
    told = {"template": meta.get("template"), "block_size": meta.get("block_size"), "vocabulary": meta["vocab_size"]}
    return ", ".join(f"{name} {value:,}" if type(value) is int else f"{name} {value}" for name, value in told.items())


def headline(sample: SampleView) -> str:
    counts = f"{sample.tokens:,} tokens, {sample.trained:,} trained ({sample.trained / sample.tokens:.0%})"
    return f"{sample.name}  {on_one_line(sample.origin)}  {counts}"


def table_lines(table: Table) -> Iterator[str]:
    """A title, and below it the columns aligned: numbers to the right."""
    rows = [table.head, *(tuple(map(on_one_line, row)) for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield table.title
    for row in rows:
        cells = zip(row, widths, numeric_columns(table), strict=True)
        yield "  " + "  ".join(f"{cell:>{w}}" if right else f"{cell:<{w}}" for cell, w, right in cells).rstrip()


def numeric_columns(table: Table) -> list[bool]:
    columns = zip(*table.rows, strict=True)
    return [all(re.fullmatch(r"[\d,.]*%?", cell) for cell in column) for column in columns]


def write_page(
    path: Path, data: PreparedData, places: Sequence[tuple[str, int]], choice: str, tokenizer: Tokenizer
) -> None:
    """Write the page, with as many of the samples as it may hold."""
    texts: dict[tuple[str, int], str] = {}
    ids: set[int] = set()
    size = 0
    for place in places:
        sample = view(data, *place, tokenizer)
        text = as_json(page_sample(sample))
        size += len(text)
        if texts and size > PAGE_BYTES:
            choice += f"; {len(texts):,} of them are here, since the page is full at {PAGE_BYTES / 1e6:g} MB"
            break
        texts[place] = text
        ids.update(i for piece in sample.pieces for i in piece.ids)
    facts = {**page_facts(data, choice), "spelled": {i: spelled(i, tokenizer) for i in sorted(ids)}}
    page = as_page(TEMPLATE.read_text(encoding="utf-8"), facts, [texts[place] for place in sorted(texts)])
    save_page(path, page, mark=GENERATOR)
    print(f"wrote {path}: {choice}; {len(page) / 1e6:.1f} MB")


def page_facts(data: PreparedData, choice: str) -> dict[str, Any]:
    passed, sentence = audit_line(data.meta)
    found = [*tables(data), settings_table(data.meta)]
    return {
        "folder": str(data.folder),
        "about": about(data.meta),
        "choice": choice,
        "audit": {"passed": passed, "sentence": sentence},
        "tables": [{**table._asdict(), "numeric": numeric_columns(table)} for table in found if table.rows],
        "histogram": histogram(data)._asdict(),
        "weighted": any(split.weights is not None for split in data.splits.values()),
        "sources": [source["path"] for source in data.meta.get("sources", [])],
    }


def page_sample(sample: SampleView) -> dict[str, Any]:
    """Of each piece: ids, runs, kind (1 trained + 2 control) and, where it is not 1, the weight of what is trained."""
    told = []
    for piece in sample.pieces:
        weight = [f"{piece.weight:g}"] if piece.trained and piece.weight != 1 else []
        told.append([piece.ids, piece.runs, piece.trained + 2 * piece.is_control, *weight])
    return {**{name: value for name, value in sample._asdict().items() if name != "pieces"}, "pieces": told}


if __name__ == "__main__":
    run_program(main)
