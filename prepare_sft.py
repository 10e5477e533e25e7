"""Raw conversations -> token and label arrays that train_sft.py reads, with a ledger of every token and an audit.

python prepare_sft.py --input=conversations.jsonl --tokenizer=tokenizer.json --out_dir=data/mine
"""

from __future__ import annotations

import filecmp
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from sft import elsewhere, hub
from sft.arrays import SPLITS, replaced_files, sha256_of
from sft.audit import COUNTS, audit_chunk, with_written
from sft.chatml import TrainOn
from sft.config import Resolved, load_settings, to_dict
from sft.conversation import BadRecord, Conversation, text_of
from sft.data_report import summary
from sft.duplicates import Leak, find_leaks
from sft.errors import EXIT_FAILED, UserError, listed, run_program
from sft.files import copy_whole
from sft.joining import BadRecords, BadRecordsChoice, Joining
from sft.preparation import Recipe, TooLong, chunks, default_workers, render_chunk
from sft.prepared_writer import PreparedWriter, earlier_meta
from sft.records import Format, ReadOptions, parse_fields
from sft.sources import Source, find_sources, spool_standard_input
from sft.templates import JINJA_NAME, TemplateName, jinja_file
from sft.tokenizer import Tokenizer, load_tokenizer
from sft.workers import Workers

SPOOL = "standard_input.partial"


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Every knob of preparing. A sample is a rendered conversation, or one trained turn of it, or a piece of text."""

    input: str  # files, folders, globs or - (standard input), separated by commas; a.jsonl:0.7 = 0.7 epochs per pass
    tokenizer: str  # tokenizer.json, *.tiktoken, a folder that holds one, or a hub name
    out_dir: str  # folder for the arrays and meta.json; what was prepared there before is replaced
    format: Format = "auto"  # of the records; auto = recognised record by record
    fields: str | None = None  # columns under other names: prompt:their_name,completion:their_other_name
    block_size: int = 2048  # tokens of the longest sample that is kept
    too_long: TooLong = "drop"  # cut: turns from the end, plain text inside; split: the same, but all of a text
    template: TemplateName = "chatml"  # how a conversation becomes text; qwen3 has a think block for reasoning
    train_on: TrainOn = "assistant"  # all assistant turns, the last one only, or all tokens but tool results
    system_prompt: str | None = None  # put in front of conversations that have no system turn
    val_fraction: float = 0.05  # share of the conversations for validation, chosen by their content; 0 = none
    group_by: str | None = None  # a key of the records; those with the same value are in the same split
    near_duplicates: bool = False  # drop validation conversations that nearly equal a training one (MinHash)
    seed: int = 1337  # of the choice of validation conversations
    bad_records: BadRecordsChoice = "error"  # skip = leave them out, count them and tell the first
    max_bad_fraction: float = 0.01  # share of records that may be skipped before it is an error all the same
    max_samples: int | None = None  # stop with the conversation that makes it so many; None = read everything
    workers: int | None = None  # processes; None = one per processor; the output is the same for any number

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """(setting, what is wrong with it) for every value that cannot be used."""
        if not 0 <= self.val_fraction < 1:
            yield "val_fraction", f"val_fraction must be at least 0 and below 1, not {self.val_fraction}"
        if not 0 <= self.max_bad_fraction <= 1:
            yield "max_bad_fraction", f"max_bad_fraction must be from 0 to 1, not {self.max_bad_fraction}"
        if self.block_size < 2:
            yield "block_size", f"block_size must be at least 2, not {self.block_size}"
        if not -(2**63) <= self.seed < 2**63:
            yield "seed", f"seed must be from -2**63 to 2**63 - 1, not {self.seed}"
        for name, count in (("max_samples", self.max_samples), ("workers", self.workers)):
            if count is not None and count < 1:
                yield name, f"{name} must be at least 1 or None, not {count}"
        for name, look in (("system_prompt", self.look_at_system_prompt), ("fields", self.read_options)):
            try:
                look()
            except (BadRecord, UserError) as error:
                yield name, str(error)
        if not self.out_dir.strip():
            yield "out_dir", "out_dir is empty; the current folder is '.'"
        if not self.tokenizer.strip():
            yield "tokenizer", "tokenizer is empty; the current folder is '.'"
        elif not os.path.exists(self.tokenizer) and not hub.is_name(self.tokenizer):
            yield "tokenizer", f"tokenizer {self.tokenizer!r} does not exist"
        yield from (("input", problem) for problem in find_sources(self.input).problems)

    def look_at_system_prompt(self) -> None:
        text_of(self.system_prompt or "", "system_prompt")

    def read_options(self) -> ReadOptions:
        return ReadOptions(self.format, parse_fields(self.fields), self.group_by)


def main(argv: list[str]) -> None:
    phases = Phases()
    with phases.phase("start-up"):
        resolved = load_settings(PrepareSettings, argv, elsewhere=elsewhere.PREPARE)
        settings, out_dir = resolved.settings, Path(resolved.settings.out_dir)
        found = hub.local(settings.tokenizer, setting="tokenizer", files=hub.TOKENIZER_FILES)
        tokenizer, recorded = load_tokenizer(found), replace(settings, tokenizer=hub.pinned(settings.tokenizer, found))
        resolved = resolved._replace(settings=recorded)
        sources = find_sources(settings.input).sources
        refuse_other_tokenizer(out_dir, tokenizer, settings.template)
        refuse_to_lose([*(source.path for source in sources), *tokenizer.files.values()], out_dir)
    try:
        with PreparedWriter(out_dir) as writer, spool_standard_input(sources, out_dir / SPOOL) as sources:
            recipe = recipe_of(settings, tokenizer, sources)
            with Workers(recipe, settings.workers or default_workers()) as workers:
                meta = prepare(resolved, recipe, writer, workers, phases)
    except OSError as error:
        where = error.filename or out_dir
        raise UserError(f"{where}: {error.strerror or error}; nothing was prepared", exit_status=EXIT_FAILED) from error
    print(summary(settings.out_dir, meta))
    print(phases)


def recipe_of(settings: PrepareSettings, tokenizer: Tokenizer, sources: Sequence[Source]) -> Recipe:
    return Recipe(
        sources=sources,
        tokenizer=tokenizer,
        options=settings.read_options(),
        template=settings.template,
        train_on=settings.train_on,
        block_size=settings.block_size,
        too_long=settings.too_long,
        system_prompt=settings.system_prompt,
        seed=settings.seed,
        val_fraction=settings.val_fraction,
    )


def prepare(
    resolved: Resolved[PrepareSettings], recipe: Recipe, writer: PreparedWriter, workers: Workers, phases: Phases
) -> dict[str, Any]:
    """Search for leaks, render and write, audit what was written; the whole meta.json."""
    settings = resolved.settings
    stamps = [stamp_of(source) for source in recipe.sources]
    bad_records = BadRecords(settings.bad_records, settings.max_bad_fraction)
    leaks: dict[tuple[int, int], Leak] = {}
    if settings.near_duplicates or settings.group_by is not None:
        with phases.phase("comparing"):
            leaks = find_leaks(lambda: with_split(recipe), near=settings.near_duplicates)
    joining = Joining(recipe, writer, bad_records=bad_records, leaked=leaks, max_samples=settings.max_samples)
    with phases.phase("preparing"), progress(recipe, "preparing") as advance:
        for rendered in workers.map(render_chunk, chunks(recipe.sources, advance)):
            joining.take(rendered)
            if joining.is_full:
                break
        joining.complain()
        writer.close()
    with phases.phase("audit"), progress(recipe, "auditing") as advance:
        audit = audited(recipe, writer.folder, workers, joining, advance)
    with phases.phase("closing"):
        if changed := [
            each.name for each, stamp in zip(recipe.sources, stamps, strict=True) if stamp_of(each) != stamp
        ]:
            raise UserError(f"{', '.join(changed)}: changed while it was read, nothing was prepared; start again")
        copy_tokenizer(recipe, writer.folder)
        return writer.finish(facts(resolved, recipe, joining, leaks=leaks, audit=audit))


def stamp_of(source: Source) -> tuple[int, int]:
    """What changes with a file: its size and the time of its last change."""
    status = source.path.stat()
    return status.st_size, status.st_mtime_ns


def with_split(recipe: Recipe) -> Iterator[tuple[Conversation, bool]]:
    """Every conversation that can be read, and whether it falls to validation."""
    for chunk in chunks(recipe.sources):
        for raw in chunk.records:
            try:
                conversation = recipe.read(raw, chunk.source)
            except BadRecord:
                continue
            yield conversation, recipe.is_validation(conversation)


def audited(
    recipe: Recipe, folder: Path, workers: Workers, joining: Joining, advance: Callable[[int], object]
) -> dict[str, Any]:
    """What the audit counted. UserError where anything written is not what was meant."""
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    problems: list[str] = []
    for findings in workers.map(audit_chunk, with_written(chunks(recipe.sources, advance), folder, SPLITS)):
        counts.update(findings.counts)
        problems += findings.problems
        if len(problems) >= BadRecords.FIRST or counts["samples"] == joining.kept:
            break
    told = {
        name: sum(split[name] for split in joining.ledger.splits.values()) for name in joining.ledger.splits["train"]
    }
    problems += [
        f"{name}: written {told[name]:,}, found {counts[name]:,}" for name in told if told[name] != counts[name]
    ]
    if problems:
        headline = "the audit did not pass, nothing was prepared; if no input has changed meanwhile, this is a defect:"
        raise listed(headline, problems[: BadRecords.FIRST])
    return {"passed": True, **counts}


class Phases:
    """How long each phase took, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def __str__(self) -> str:
        return "phases  " + "  ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())


@contextmanager
def progress(recipe: Recipe, what: str) -> Iterator[Callable[[int], object]]:
    """A bar over the bytes of all sources, on a terminal."""
    size = sum(source.path.stat().st_size for source in recipe.sources)
    with tqdm(total=size, unit="B", unit_scale=True, desc=what, disable=None) as bar:
        yield bar.update


def tokenizer_files(tokenizer: Tokenizer, template: TemplateName) -> dict[str, Path]:
    """What a folder gets, by name, so that others find the tokenizer and the template in it."""
    return {**tokenizer.files, JINJA_NAME: jinja_file(template)}


def refuse_other_tokenizer(out_dir: Path, tokenizer: Tokenizer, template: TemplateName) -> None:
    """UserError where out_dir holds files of a tokenizer that are not this one's and that no earlier run put there.

    Those under other names count too: load_tokenizer(out_dir) might find them.
    """
    told = earlier_meta(out_dir).get("tokenizer_files")
    earlier = told if isinstance(told, list) else []
    ours = {out_dir / name: file for name, file in tokenizer_files(tokenizer, template).items()}
    found = {path for path in [out_dir / "tokenizer.json", *out_dir.glob("*.tiktoken"), *ours] if path.exists()}
    ours_too = [jinja_file(name) for name in get_args(TemplateName)]  # left by a run whose meta.json is gone
    fine = {path for path in found & ours.keys() if path.name in earlier or is_one_of(path, [ours[path], *ours_too])}
    if other := sorted(path.name for path in found - fine):
        raise UserError(f"{out_dir}: holds another tokenizer ({', '.join(other)}); choose another out_dir or remove it")


def is_one_of(path: Path, others: Sequence[Path]) -> bool:
    return any(filecmp.cmp(path, other, shallow=False) for other in others)


def refuse_to_lose(paths: Sequence[Path], out_dir: Path) -> None:
    """UserError where one of the files that are read would be replaced by what is written."""
    replaced = [path for path in [*replaced_files(out_dir), out_dir / SPOOL] if path.exists()]
    for path in paths:
        if path.exists() and any(path.samefile(target) for target in replaced):
            raise UserError(f"{path}: would be lost, since out_dir gets a file of that name; choose another out_dir")


def copy_tokenizer(recipe: Recipe, out_dir: Path) -> None:
    recipe.tokenizer.copy_to(out_dir)
    copy_whole(jinja_file(recipe.template), out_dir / JINJA_NAME)


def facts(
    resolved: Resolved[PrepareSettings],
    recipe: Recipe,
    joining: Joining,
    *,
    leaks: Mapping[tuple[int, int], Leak],
    audit: Mapping[str, Any],
) -> dict[str, Any]:
    """What meta.json says beside what follows from the arrays."""
    tokenizer, ledger = recipe.tokenizer, joining.ledger
    # workers changes nothing that is written, and must not be what makes two folders differ
    settings = {name: value for name, value in to_dict(resolved.settings).items() if name != "workers"}
    return {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "tokenizer_files": list(tokenizer_files(tokenizer, recipe.template)),
        "vocab_size": tokenizer.vocab_size,
        "im_start_id": tokenizer.im_start,
        "im_end_id": tokenizer.im_end,
        "pad_id": tokenizer.pad,
        "template": recipe.template,
        "block_size": recipe.block_size,
        "settings": settings,
        "settings_origins": {name: resolved.origins[name] for name in settings},
        "sources": [
            {
                "path": source.name,
                "bytes": source.path.stat().st_size,
                "sha256": sha256_of(source.path),
                "weight": source.weight,
                **counts,
            }
            for source, counts in zip(recipe.sources, ledger.sources, strict=True)
        ],
        "ledger": ledger.to_dict(),
        "noticed": joining.noticed,
        "bad_records": joining.bad_records.first,
        "leaks": told_leaks(recipe, leaks),
        "audit": audit,
    }


def told_leaks(recipe: Recipe, leaks: Mapping[tuple[int, int], Leak]) -> dict[str, Any]:
    """How many validation conversations are in training too, and where the first ones are."""

    def place(source: int, record: int) -> str:
        return f"{recipe.sources[source].name}, record {record}"

    first = [
        {"validation": place(*found), "training": place(*leak.place), "similarity": round(leak.similarity, 3)}
        for found, leak in islice(leaks.items(), BadRecords.FIRST)
    ]
    return {"conversations": len(leaks), "exact": sum(leak.exact for leak in leaks.values()), "first": first}


if __name__ == "__main__":
    run_program(main)
