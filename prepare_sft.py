"""Raw conversations -> token and label arrays that train_sft.py reads, with a ledger of what became of them.

python prepare_sft.py --input=conversations.jsonl --tokenizer=tokenizer.json --out_dir=data/mine
"""

from __future__ import annotations

import dataclasses
import filecmp
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from sft import elsewhere
from sft.arrays import SPLITS, replaced_files, sha256_of
from sft.prepared_writer import PreparedWriter, earlier_meta
from sft.chatml import NOT_TRAINED, Sample, cut, render_batch
from sft.config import Resolved, load_settings, to_dict
from sft.conversation import BadRecord, Conversation, Message, text_of
from sft.errors import EXIT_FAILED, UserError, run_program
from sft.records import Problems, read_conversations
from sft.tokenizer import Tokenizer, load_tokenizer

# Conversations are rendered so many at a time, or fewer where they are long: what memory use is bounded by.
BATCH_CONVERSATIONS = 1_000
BATCH_CHARACTERS = 4_000_000

DROPPED = {"too_long": "too long", "no_trained_tokens": "no trained token"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Every knob of preparing. A sample is a rendered conversation; its length counts control tokens too."""

    input: str  # JSON lines or a JSON array of conversations; several files are separated by commas
    tokenizer: str  # tokenizer.json, *.tiktoken, or a folder that holds one
    out_dir: str  # folder for the arrays and meta.json; what was prepared there before is replaced
    block_size: int = 2048  # tokens of the longest sample that is kept
    val_fraction: float = 0.05  # share of the conversations for validation, chosen by their content; 0 = none
    template: Literal["chatml"] = "chatml"  # how a conversation becomes text
    too_long: Literal["drop", "cut", "error"] = "drop"  # longer than block_size; cut removes whole turns from the end
    seed: int = 1337  # of the choice of validation conversations
    system_prompt: str | None = None  # put in front of conversations that have no system turn
    max_samples: int | None = None  # stop once so many are kept; None = read everything

    @property
    def paths(self) -> list[Path]:
        """The files of input."""
        return [Path(name.strip()) for name in self.input.split(",") if name.strip()]

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """(setting, what is wrong with it) for every value that cannot be used."""
        if not 0 <= self.val_fraction < 1:
            yield "val_fraction", f"val_fraction must be at least 0 and below 1, not {self.val_fraction}"
        if self.block_size < 2:
            yield "block_size", f"block_size must be at least 2, not {self.block_size}"
        if self.max_samples is not None and self.max_samples < 1:
            yield "max_samples", f"max_samples must be at least 1 or None, not {self.max_samples}"
        try:
            text_of(self.system_prompt or "", "system_prompt")
        except BadRecord as error:
            yield "system_prompt", str(error)
        if not self.out_dir.strip():
            yield "out_dir", "out_dir is empty; the current folder is '.'"
        if not self.tokenizer.strip():
            yield "tokenizer", "tokenizer is empty; the current folder is '.'"
        elif not os.path.exists(self.tokenizer):
            yield "tokenizer", f"tokenizer {self.tokenizer!r} does not exist"
        if not self.paths:
            yield "input", "input names no file"
        for path in self.paths:
            if reason := why_unreadable(path):
                yield "input", f"input {str(path)!r} cannot be read: {reason}"


class Ledger:
    """What became of every conversation and of every rendered token: kept, cut and dropped add up to all of them."""

    def __init__(self) -> None:
        names = ("read", "kept", *DROPPED, "shortened", "spell_control")  # the last two are properties, not fates
        self.conversations = Counter(dict.fromkeys(names, 0))
        self.tokens = Counter(dict.fromkeys(("rendered", "kept", "cut", *DROPPED), 0))
        self.splits = {split: Counter(dict.fromkeys(("samples", "tokens", "trained_tokens"), 0)) for split in SPLITS}

    def enter(self, sample: Sample, *, spells_control: bool) -> None:
        self.conversations.update(read=1, spell_control=spells_control)
        self.tokens["rendered"] += len(sample.input_ids)

    def drop(self, sample: Sample, reason: str) -> None:
        self.conversations[reason] += 1
        self.tokens[reason] += len(sample.input_ids)

    def keep(self, fitted: Sample, split: str, *, removed: int) -> None:
        """Count what is kept of a sample, and how many of its tokens were removed."""
        self.conversations.update(kept=1, shortened=removed > 0)
        self.tokens.update(kept=len(fitted.input_ids), cut=removed)
        trained = len(fitted.labels) - fitted.labels.count(NOT_TRAINED)
        self.splits[split].update(samples=1, tokens=len(fitted.input_ids), trained_tokens=trained)

    def to_dict(self) -> dict[str, Any]:
        return {
            "conversations": dict(self.conversations),
            "tokens": dict(self.tokens),
            "splits": {split: dict(counts) for split, counts in self.splits.items()},
        }


def main(argv: list[str]) -> None:
    started = time.perf_counter()
    resolved = load_settings(PrepareSettings, argv, elsewhere=elsewhere.PREPARE)
    settings = resolved.settings
    tokenizer = load_tokenizer(settings.tokenizer)
    refuse_other_tokenizer(Path(settings.out_dir), tokenizer)
    refuse_to_lose([*settings.paths, *tokenizer.files.values()], Path(settings.out_dir))
    try:
        with PreparedWriter(settings.out_dir) as writer:
            preparation = Preparation(tokenizer, settings, writer)
            preparation.run()
            tokenizer.copy_to(settings.out_dir)
            meta = writer.finish(facts(resolved, preparation))
    except OSError as error:
        where = error.filename or settings.out_dir
        raise UserError(f"{where}: {error.strerror or error}; nothing was prepared", exit_status=EXIT_FAILED) from error
    print(summary(settings.out_dir, meta, seconds=time.perf_counter() - started))


def why_unreadable(path: Path) -> str | None:
    """What the operating system says against reading a file; None where it can be read."""
    try:
        with open(path, "rb"):
            return None
    except OSError as error:
        return (error.strerror or str(error)).lower()


def refuse_other_tokenizer(out_dir: Path, tokenizer: Tokenizer) -> None:
    """UserError where out_dir holds files of a tokenizer that are not this one's and that no earlier run put there.

    Those under other names count too: load_tokenizer(out_dir) might find them.
    """
    earlier = earlier_meta(out_dir).get("tokenizer_files", [])
    ours = {out_dir / name: file for name, file in tokenizer.files.items()}
    found = {path for path in [out_dir / "tokenizer.json", *out_dir.glob("*.tiktoken"), *ours] if path.exists()}
    fine = {
        path for path in found & ours.keys() if path.name in earlier or filecmp.cmp(path, ours[path], shallow=False)
    }
    if other := sorted(path.name for path in found - fine):
        raise UserError(f"{out_dir}: holds another tokenizer ({', '.join(other)}); choose another out_dir or remove it")


def refuse_to_lose(paths: Sequence[Path], out_dir: Path) -> None:
    """UserError where one of the files that are read would be replaced by what is written."""
    replaced = [path for path in replaced_files(out_dir) if path.exists()]
    for path in paths:
        if any(path.samefile(target) for target in replaced):
            raise UserError(f"{path}: would be lost, since out_dir gets a file of that name; choose another out_dir")


class Preparation:
    """One pass over the conversations: read, render, fit, write."""

    def __init__(self, tokenizer: Tokenizer, settings: PrepareSettings, writer: PreparedWriter):
        self.paths, self.tokenizer, self.settings, self.writer = settings.paths, tokenizer, settings, writer
        self.ledger, self.problems = Ledger(), Problems()
        self.records = [0] * len(self.paths)  # of each file

    def run(self) -> None:
        size = sum(path.stat().st_size for path in self.paths)
        with tqdm(total=size, unit="B", unit_scale=True, desc="preparing", disable=None) as bar:
            conversations = self.read_all(bar.update)
            while batch := next_batch(conversations, self.wanted()):
                if self.problems.found and self.settings.too_long != "error":
                    continue  # nothing will be written: look for more problems, at the speed of reading
                self.enter_batch(batch)
        self.problems.complain()
        if self.ledger.splits["train"]["samples"] == 0:
            counts = ", ".join(f"{name} {count:,}" for name, count in self.ledger.conversations.items())
            raise UserError(f"{self.settings.input}: nothing is left to train on; conversations: {counts}")

    def read_all(self, advance: Callable[[int], object]) -> Iterator[Conversation]:
        for source, path in enumerate(self.paths):
            yield from read_conversations(path, source, problems=self.problems, advance=advance)

    def wanted(self) -> int:
        """How many conversations may be read before max_samples could be reached."""
        if self.settings.max_samples is None:
            return BATCH_CONVERSATIONS
        return min(BATCH_CONVERSATIONS, self.settings.max_samples - self.ledger.conversations["kept"])

    def enter_batch(self, batch: list[Conversation]) -> None:
        to_render = [with_system_prompt(conversation, self.settings.system_prompt) for conversation in batch]
        samples = render_batch(to_render, self.tokenizer)
        for conversation, rendered, sample in zip(batch, to_render, samples, strict=True):
            self.records[conversation.source] += 1
            self.ledger.enter(sample, spells_control=any(map(self.tokenizer.spells_control, contents(rendered))))
            fitted = self.fit(conversation, sample)
            if fitted is None:
                self.ledger.drop(sample, "too_long")
            elif not any(label != NOT_TRAINED for label in fitted.labels):
                self.ledger.drop(sample, "no_trained_tokens")
            else:
                self.keep(conversation, sample, fitted)

    def fit(self, conversation: Conversation, sample: Sample) -> Sample | None:
        """The sample, or what is left of it, in block_size tokens; None where it is dropped."""
        length, block_size = len(sample.input_ids), self.settings.block_size
        if length <= block_size:
            return sample
        if self.settings.too_long == "error":
            self.problems.add(
                f"{self.paths[conversation.source]}:{conversation.line}: {length:,} tokens, block_size is "
                f"{block_size:,}; raise it, or --too_long=drop or cut"
            )
        return cut(sample, block_size) if self.settings.too_long == "cut" else None

    def keep(self, conversation: Conversation, sample: Sample, fitted: Sample) -> None:
        settings = self.settings
        split = "val" if is_validation(conversation, seed=settings.seed, fraction=settings.val_fraction) else "train"
        self.ledger.keep(fitted, split, removed=len(sample.input_ids) - len(fitted.input_ids))
        self.writer.add(split, fitted.input_ids, fitted.labels, (conversation.source, conversation.record, -1))


def next_batch(conversations: Iterator[Conversation], count: int) -> list[Conversation]:
    batch: list[Conversation] = []
    characters = 0
    while len(batch) < count and characters < BATCH_CHARACTERS:
        conversation = next(conversations, None)
        if conversation is None:
            break
        batch.append(conversation)
        characters += sum(map(len, contents(conversation)))
    return batch


def contents(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages] + [conversation.text or ""]


def with_system_prompt(conversation: Conversation, prompt: str | None) -> Conversation:
    has_one = any(message.role == "system" for message in conversation.messages)
    if prompt is None or conversation.text is not None or has_one:
        return conversation
    return dataclasses.replace(conversation, messages=(Message("system", prompt), *conversation.messages))


def is_validation(conversation: Conversation, *, seed: int, fraction: float) -> bool:
    """A function of seed and content alone, so that copies of a conversation are never in both splits."""
    content = json.dumps([seed, conversation.text, conversation.messages])
    digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def facts(resolved: Resolved[PrepareSettings], done: Preparation) -> dict[str, Any]:
    """What meta.json says beside what follows from the arrays."""
    tokenizer = done.tokenizer
    return {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "tokenizer_files": list(tokenizer.files),
        "vocab_size": tokenizer.vocab_size,
        "im_start_id": tokenizer.im_start,
        "im_end_id": tokenizer.im_end,
        "pad_id": tokenizer.pad,
        "template": resolved.settings.template,
        "block_size": resolved.settings.block_size,
        "settings": to_dict(resolved.settings),
        "settings_origins": resolved.origins,
        "sources": [
            {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of(path), "records": count}
            for path, count in zip(done.paths, done.records, strict=True)
        ],
        "ledger": done.ledger.to_dict(),
    }


def summary(out_dir: str, meta: Mapping[str, Any], *, seconds: float) -> str:
    ledger, lengths = meta["ledger"], meta["lengths"]["all"]
    conversations, tokens, splits = ledger["conversations"], ledger["tokens"], ledger["splits"]
    trained = sum(counts["trained_tokens"] for counts in splits.values())
    dropped = sum(conversations[reason] for reason in DROPPED)
    reasons = ", ".join(f"{name} {conversations[reason]:,}" for reason, name in DROPPED.items())
    lines = [
        f"prepared {out_dir} in {seconds:.1f} s: {conversations['read']:,} conversations, "
        f"{tokens['rendered']:,} tokens rendered",
        f"  kept     {conversations['kept']:>12,}  train {splits['train']['samples']:,}, "
        f"val {splits['val']['samples']:,}; {conversations['shortened']:,} of them cut to fit",
        f"  dropped  {dropped:>12,}  {reasons}",
        f"  tokens   {tokens['kept']:>12,}  trained {trained:,} ({trained / tokens['kept']:.1%})",
        f"  lengths  min {lengths['min']:,}  median {lengths['median']:,.0f}  mean {lengths['mean']:,.1f}  "
        f"p95 {lengths['p95']:,.0f}  max {lengths['max']:,} tokens",
        f"  control tokens spelled in the content of {conversations['spell_control']:,} conversations; "
        "kept as ordinary text",
    ]
    if meta["settings"]["val_fraction"] > 0 and splits["val"]["samples"] == 0:
        lines.append("  no conversation fell to validation; raise val_fraction to have some")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
