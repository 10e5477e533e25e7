"""Which samples of prepared data to look at: by name, or a spread choice; and each as a reader sees it."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np

from sft.arrays import AGAIN, SPLITS, PreparedData
from sft.errors import UserError
from sft.sample_view import Piece, on_one_line, pieces
from sft.samples import NOT_TRAINED
from sft.tokenizer import Tokenizer

Place = tuple[str, int]  # a split and the 0-based index of a sample in it


class SampleView(NamedTuple):
    name: str  # train:12
    split: str
    place: int  # 0-based
    source: int
    origin: str  # the file, the record and, where a conversation became several samples, the turn
    tokens: int
    trained: int
    pieces: list[Piece]


def view(data: PreparedData, split: str, index: int, tokenizer: Tokenizer) -> SampleView:
    """One sample, the only one that is read; UserError where its labels cannot be shown as trained or masked."""
    samples = data.splits[split]
    span = slice(int(samples.offsets[index]), int(samples.offsets[index + 1]))
    ids, labels = samples.input_ids[span], samples.labels[span]
    if ((labels != ids) & (labels != NOT_TRAINED)).any():
        raise UserError(f"{data.folder}: {split}:{index} has labels that are not its tokens; {AGAIN}")
    weights = None if samples.weights is None else samples.weights[span].tolist()
    source, record, turn = (int(number) for number in samples.origins[index])
    return SampleView(
        name=f"{split}:{index}",
        split=split,
        place=index,
        source=source,
        origin=f"{source_name(data, source)} record {record:,}" + ("" if turn < 0 else f", turn {turn}"),
        tokens=len(ids),
        trained=int(np.count_nonzero(labels != NOT_TRAINED)),
        pieces=list(pieces(ids.tolist(), labels.tolist(), weights, tokenizer)),
    )


def choose(
    data: PreparedData, count: int, *, split: str | None, source: str | None, seed: int
) -> tuple[list[Place], int]:
    """One sample from each count-th part of the candidates (all of them if they are fewer), and how many those are."""
    wanted = None if source is None else source_index(data, source)
    candidates: list[tuple[str, range | np.ndarray]] = []
    for name in [split] if split else SPLITS:
        samples = data.splits[name]
        every = range(len(samples))
        candidates.append((name, every if wanted is None else np.flatnonzero(samples.origins[:, 0] == wanted)))
    total = sum(len(indices) for _, indices in candidates)
    count = min(count, total)
    draw = random.Random(seed)
    positions = [draw.randrange(i * total // count, (i + 1) * total // count) for i in range(count)]
    places = []
    start = 0
    for name, indices in candidates:
        places += [(name, int(indices[at - start])) for at in positions if start <= at < start + len(indices)]
        start += len(indices)
    return places, total


def named(data: PreparedData, name: str, *, split: str | None, source: str | None) -> list[Place]:
    """The samples that `train:12`, `12` (of split, else of train) or `file.jsonl:37` (record 37) stands for."""
    where, _, number = name.rpartition(":")
    if not (number.isascii() and number.isdigit()):
        raise UserError(f"sample {name!r} is none of train:12, 12 and file.jsonl:37")
    wanted = int(number)
    if where in ("", *SPLITS):
        chosen = where or split or "train"
        if wanted >= len(data.splits[chosen]):
            held = len(data.splits[chosen])
            range_of = f"there are {chosen}:0 to {chosen}:{held - 1}" if held else f"{chosen} has no sample"
            raise UserError(f"{data.folder}: no sample {chosen}:{wanted}; {range_of}")
        found = [(chosen, wanted)]
    else:
        index = source_index(data, where)
        found = [(key, i) for key, samples in data.splits.items() for i in of_record(samples.origins, index, wanted)]
        if not found:
            path = on_one_line(source_name(data, index))
            raise UserError(
                f"{data.folder}: no sample comes from record {wanted} of {path}; "
                "it is bad, was dropped, or the file is shorter: see the ledger"
            )
    only = None if source is None else source_index(data, source)
    kept = [
        (key, i) for key, i in found if split in (None, key) and only in (None, int(data.splits[key].origins[i, 0]))
    ]
    if not kept:
        raise UserError(f"sample {name!r} is not of the split and the source that are asked for; leave those out")
    return kept


def of_record(origins: np.ndarray, source: int, record: int) -> list[int]:
    return [int(i) for i in np.flatnonzero((origins[:, 0] == source) & (origins[:, 1] == record))]


def source_name(data: PreparedData, index: int) -> str:
    sources = data.meta.get("sources", [])
    return sources[index]["path"] if 0 <= index < len(sources) else f"source {index}"


def source_index(data: PreparedData, name: str) -> int:
    """The source of that path, or the only one whose path ends so."""
    paths = [source["path"] for source in data.meta.get("sources", [])]
    if name in paths:
        return paths.index(name)
    ending = [i for i, path in enumerate(paths) if path.endswith(f"/{name}")]
    if len(ending) == 1:
        return ending[0]
    told = on_one_line(", ".join(paths[i] for i in ending or range(len(paths))))
    cause = f"{name!r} names several sources" if ending else f"no source is called {name!r}"
    raise UserError(f"{data.folder}: {cause}; there are {told or 'none'}")
