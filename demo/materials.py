"""The files that the demo begins with: papers, conversations and a tokenizer made for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.world import Exchange, conversations, papers, settle
from sft.tokenizer import END_OF_TEXT, IM_END, IM_START, QWEN3_PATTERN

VOCABULARY = 1024  # at most: the island has words for fewer


class Materials(NamedTuple):
    papers: Path  # {"text": ...} a line: what the base model reads
    training: Path  # {"messages": ...} a line: what fine-tuning teaches, but for recall
    recall: Path  # the same for recall: the island has few facts, which are told more often
    recall_weight: float  # how often, per pass over all others
    held_out: Path  # {"messages": ..., "kind": ..., "key": ...} a line: what nothing is trained on
    tokenizer: Path
    questions: list[Exchange]  # the held-out ones


def write_materials(folder: Path, *, seed: int, paper_count: int, per_kind: int, held_out_per_kind: int) -> Materials:
    """Everything that is decided before the first program runs; equal arguments give equal bytes."""
    island = settle(seed)
    texts = list(dict.fromkeys(papers(island, paper_count, seed)))
    training, held_out = conversations(island, per_kind=per_kind, held_out_per_kind=held_out_per_kind, seed=seed)
    facts = distinct(exchange for exchange in training if exchange.kind == "recall")
    others = distinct(exchange for exchange in training if exchange.kind != "recall")
    files = Materials(
        papers=folder / "papers.jsonl",
        training=folder / "training.jsonl",
        recall=folder / "recall.jsonl",
        recall_weight=round(per_kind / len(facts), 2),
        held_out=folder / "held_out.jsonl",
        tokenizer=folder / "tokenizer.json",
        questions=held_out,
    )
    write_lines(files.papers, ({"text": text} for text in texts))
    for path, exchanges in ((files.training, others), (files.recall, facts)):
        write_lines(path, ({"messages": exchange.messages} for exchange in exchanges))
    write_lines(files.held_out, ({"messages": e.messages, "kind": e.kind, "key": e.key} for e in held_out))
    train_tokenizer([*texts, *spoken(training)]).save(str(files.tokenizer))
    return files


def distinct(exchanges: Iterable[Exchange]) -> list[Exchange]:
    return list({exchange.turns: exchange for exchange in exchanges}.values())


def spoken(exchanges: Sequence[Exchange]) -> Iterator[str]:
    """Each message with its role, so that the role's name becomes a token as well."""
    for exchange in exchanges:
        for message in exchange.messages:
            yield f"{message['role']}\n{message['content']}"


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level vocabulary built like Qwen's, with ChatML's control tokens at ids of its own."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN3_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
