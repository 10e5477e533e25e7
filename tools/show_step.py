"""Show the very rows of a training step, decoded, with their losses.

python tools/show_step.py configs/mine.py --step=253 [--checkpoint=...] [--name=value ...]
python tools/show_step.py out/mine/run_20260102_030405.json --row=1012,1013
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import train_sft
from sft import elsewhere, startup
from sft.arrays import PreparedData, open_prepared
from sft.attention_choice import Heads, choose_attention
from sft.batches import TrainLoader
from sft.checkpoint import numbered_checkpoints
from sft.config import load_settings, words_of
from sft.course import chart_course
from sft.document_losses import DocumentLoss, badness, documents_of
from sft.errors import UserError, run_program
from sft.loss import choose_loss
from sft.past_steps import PastSteps
from sft.sample_choice import SampleView, view
from sft.sample_view import bracketed, on_one_line, painted, shortened
from sft.step import SummedLoss
from sft.tokenizer import load_tokenizer
from sft.world import World, join_world

USAGE = "python tools/show_step.py CONFIG --step=N [--name=value ...]"


@dataclass(frozen=True, kw_only=True)
class ShowSettings:
    """Shows the rows of a step of CONFIG's run. All other names are settings of train_sft.py."""

    step: int | None = None  # as the log counts: step 1 is the first
    row: int | tuple[int, ...] | None = None  # or rows by their numbers in the stream, as odd_step events name them
    losses: bool = True  # False = no model is read
    checkpoint: str | None = (
        None  # whose losses; None = the last in out_dir before the step, else what the run began with
    )
    worst_first: bool = False  # the documents with the highest mean loss first, of all rows
    limit: int | None = 20  # documents to show; None = all
    characters: int | None = 1000  # of the text of a document; None = all
    world_size: int = 1  # ranks of the run, where neither its logs nor rows_per_step tell how many rows a step has

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if (self.step is None) == (self.row is None):
            yield "step", "set step or row: one of the two"
        if self.step is not None and self.step < 1:
            yield "step", f"step must be at least 1, not {self.step}"
        if min(self.rows, default=0) < 0:
            yield "row", f"row must be 0 or more, not {min(self.rows)}"
        for name, value in (("limit", self.limit), ("characters", self.characters), ("world_size", self.world_size)):
            if value is not None and value < 1:
                yield name, f"{name} must be at least 1, not {value}"
        if self.worst_first and not self.losses:
            yield "worst_first", "worst_first needs losses"

    @property
    def rows(self) -> Sequence[int]:
        return (self.row,) if isinstance(self.row, int) else self.row or ()


def main(argv: list[str]) -> None:
    is_help = bool({"--help", "-h"} & set(argv))
    own, theirs = (argv, []) if is_help else words_of(ShowSettings, argv)
    if not theirs and not is_help:
        raise UserError(f"which configuration? {USAGE}")
    settings = load_settings(ShowSettings, own, usage=USAGE).settings
    trained = load_settings(train_sft.TrainSettings, theirs, elsewhere=elsewhere.TRAIN).settings
    trained = dataclasses.replace(trained, dropout=0.0, compile=False, dry_run=False)
    with join_world(trained.device if settings.losses else "cpu") as world:
        show(settings, trained, open_prepared(trained.sft_data_dir), world)


def show(settings: ShowSettings, trained: train_sft.TrainSettings, data: PreparedData, world: World) -> None:
    of_the_run = dataclasses.replace(world, size=settings.world_size)
    loader = chart_course(trained, of_the_run, data, None, None).loader
    past = PastSteps.of(Path(trained.out_dir), rows_per_step=loader.rows_per_step)
    rows, sentences = chosen_rows(settings, past, data, loader)
    module = None
    if settings.losses:
        module, sentence = module_of(settings, trained, data, loader, world)
        sentences.append(sentence)
    is_terminal = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    sentences.append(
        f"trained tokens are {'green' if is_terminal else 'in ⟦ ⟧'}, control tokens in ⟨ ⟩, lines end at ↵"
    )
    print("\n".join(sentences), end="\n\n")

    documents = documents_of(rows, loader, module)
    if settings.worst_first:
        documents = iter(sorted(documents, key=badness, reverse=True))
    tokenizer = load_tokenizer(data.folder)
    told = list(itertools.islice(documents, settings.limit))
    for document in told:
        sample = view(data, "train", document.sample, tokenizer)
        print(headline(document, sample))
        pieces = shortened(sample.pieces, settings.characters)
        print("".join((painted if is_terminal else bracketed)(pieces)), end="\n\n")
    print(summary(told, sum(len(loader.stream.row(row)) for row in rows)))


def chosen_rows(
    settings: ShowSettings, past: PastSteps, data: PreparedData, loader: TrainLoader
) -> tuple[list[int], list[str]]:
    """The numbers of the rows in the order in which they are shown, and what there is to say of them."""
    if settings.step is None:
        return list(settings.rows), []
    rows = list(past.rows_of(settings.step))
    proof = past.prove(settings.step, loader.stream, at_first=bytes.fromhex(data.fingerprint)[:16])
    told = "its log does not tell of them yet" if proof is None else f"proven by the order hash of step {proof:,}"
    sentences = [f"step {settings.step:,}: rows {rows[0]:,} to {rows[-1]:,} of the stream, {told}"]
    if (odd := past.odd.get(settings.step)) is not None:
        sentences.append(f"the log: {'skipped' if odd['skipped'] else 'odd'}, since {odd['reason']}")
        named = [row for row in odd["rows"] if row in rows]
        if len(named) < len(rows):
            sentences.append(f"it names rows {', '.join(f'{row:,}' for row in named)}: these come first")
            rows.sort(key=lambda row: row not in named)
    return rows, sentences


def module_of(
    settings: ShowSettings, trained: train_sft.TrainSettings, data: PreparedData, loader: TrainLoader, world: World
) -> tuple[SummedLoss, str]:
    """A model with its loss, computed as the trainer does, and a sentence that names it."""
    source, sentence = model_before(settings, trained)
    if source is not None:
        startup.refuse_other_tokenizer(source, data)
        trained = dataclasses.replace(trained, checkpoint_path=str(source), model=None)
    base = None if source is None else train_sft.load_base(trained, world, source)
    model = train_sft.build_model(trained, world, data, base).eval()
    autocast = trained.autocast_dtype(world.device)
    dtype = autocast or model.head_weight.dtype
    heads = Heads(model.config.n_head, model.config.key_heads, model.config.head_size)
    attention = choose_attention(trained.attention, heads=heads, dtype=dtype, dropout=0.0, loader=loader, world=world)
    model.set_attention(attention.back_end)
    loss = choose_loss(trained.loss_kernel, device=world.device, dtype=dtype, world=world)
    return SummedLoss(model, autocast_dtype=autocast, loss=loss), sentence


def model_before(settings: ShowSettings, trained: train_sft.TrainSettings) -> tuple[Path | None, str]:
    """The checkpoint whose losses are shown, None for a new model; and a sentence."""
    if settings.checkpoint is not None:
        return Path(settings.checkpoint), f"losses by {settings.checkpoint}, without dropout"
    for number, path in numbered_checkpoints(trained.out_dir):
        if settings.step is None or number < settings.step:
            later = "" if settings.step in (None, number + 1) else f", which is not that of step {settings.step:,}"
            return path, f"losses by {path}, the model after step {number:,}{later}; without dropout"
    began = None if trained.checkpoint_path is None else Path(trained.checkpoint_path)
    later = "" if settings.step in (None, 1) else ", since no checkpoint of an earlier step is there"
    named = began or "a new model"
    return began, f"losses by {named}, with which the run begins{later}; without dropout"


def headline(document: DocumentLoss, sample: SampleView) -> str:
    told = f"row {document.row:,}  {sample.name}  {on_one_line(sample.origin)}  {sample.tokens:,} tokens, "
    told += f"{sample.trained:,} trained"
    if document.loss_sum is None:
        return told
    return f"{told}  loss {document.loss_sum / document.weight:.4f} = {document.loss_sum:.4f} / {document.weight:g}"


def summary(told: Sequence[DocumentLoss], documents: int) -> str:
    """The last line: how many of the documents were shown, and their loss."""
    counts = f"{len(told):,} of {documents:,} documents" + (
        "" if len(told) == documents else "; --limit=none shows all"
    )
    if any(document.loss_sum is None for document in told):
        return counts
    loss, weight = (sum(getattr(document, name) for document in told) for name in ("loss_sum", "weight"))
    return f"{counts}; their loss is {loss / weight:.6f} = {loss:.6f} / {weight:g}"


if __name__ == "__main__":
    run_program(main)
