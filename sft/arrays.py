"""The prepared data set on disk: little-endian .npy arrays per split and a meta.json, which makes the folder valid.

For each split `train` and `val`: input_ids and labels int32 [tokens] (all samples end to end, labels not shifted, -100
where not trained), offsets int64 [samples + 1], targets float64 [samples] (the sum of the target weights after the
shift), origins int64 [samples, 3] (source, 1-based record, turn or -1 for all) and, only where some weight is not 1,
weights float32 [tokens]. `meta.json` is deleted before anything is written, and written last.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.errors import UserError, listed
from sft.files import partial_of
from sft.meta_shape import misfits
from sft.npy_header import read_npy_header
from sft.untrusted import MEBIBYTE, MOST_IDS, is_plain_name, leads_out, read_bytes, read_json

FORMAT = "prepared conversations"
FORMAT_VERSION = 2
SPLITS = ("train", "val")
DTYPES = {"input_ids": "<i4", "labels": "<i4", "offsets": "<i8", "targets": "<f8", "origins": "<i8", "weights": "<f4"}
WRITTEN = ("input_ids", "labels", "offsets", "targets", "origins")
AGAIN = "run prepare_sft.py again"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # and *.tiktoken
MOST_NAMED = 10  # problems in one message
SEALED = re.compile(rb'(.*),\n "sha256": "([0-9a-f]{64})"\n}\n', re.DOTALL)  # meta.json as it is written now
LEFT_OF_SEAL = re.compile(rb'\n "sha256": |"[0-9a-f]{64}"\s*}\s*\Z')  # one damaged bit leaves one of the two
LARGEST_META = 64 * MEBIBYTE  # it has a few hundred bytes for each source


def file_name(split: str, part: str) -> str:
    return f"{split}_{part}.npy"


def row_shape(part: str) -> tuple[int, ...]:
    return (3,) if part == "origins" else ()


def replaced_files(folder: Path) -> list[Path]:
    """Every file that a writer may replace or remove; meta.json first, which is what makes the folder valid."""
    names = ["meta.json", *(file_name(split, part) for split in SPLITS for part in DTYPES)]
    return [path for name in names for path in (folder / name, partial_of(folder / name))]


class ArrayReader:
    """The rows of a .npy file from first to last, as many at a time as are asked for; the file is not mapped."""

    def __init__(self, path: Path):
        self.file = open(path, "rb")  # noqa: SIM115  # __exit__ closes it
        self.dtype, shape, _ = read_npy_header(self.file)
        self.row_shape = shape[1:]

    def take(self, rows: int) -> NDArray[Any]:
        """The next rows; fewer at the end."""
        values = np.fromfile(self.file, self.dtype, rows * math.prod(self.row_shape))
        return values.reshape(-1, *self.row_shape)

    def __enter__(self) -> ArrayReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Samples:
    """One split, memory-mapped: sample i is input_ids[offsets[i]:offsets[i + 1]], and labels likewise."""

    input_ids: np.ndarray  # int32 (tokens,)
    labels: np.ndarray  # int32 (tokens,), not shifted
    offsets: np.ndarray  # int64 (samples + 1,)
    targets: np.ndarray  # float64 (samples,)
    origins: np.ndarray  # int64 (samples, 3): source, record, turn
    weights: np.ndarray | None  # float32 (tokens,); None = all 1

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class PreparedData:
    folder: Path
    meta: dict[str, Any]
    splits: dict[str, Samples]  # "train" and "val"

    @property
    def source_weights(self) -> list[float]:
        """How many epochs of each source make one epoch of the whole, by the index that `origins` gives."""
        return [source.get("weight", 1) for source in self.meta.get("sources", [])]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) that is the same for the same arrays, vocabulary and weights of the sources."""
        facts = {key: self.meta.get(key) for key in ("arrays", "tokenizer_fingerprint")}
        if any(weight != 1 for weight in self.source_weights):
            facts["source_weights"] = self.source_weights
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def open_prepared(folder: str | Path) -> PreparedData:
    """The prepared data of a folder, memory-mapped; UserError where it is missing, incomplete or of another version."""
    folder = Path(folder)
    meta = read_meta(folder)
    problems: list[str] = []
    splits = {}
    for split in SPLITS:
        arrays = {part: open_array(folder / file_name(split, part), part, meta["arrays"], problems) for part in DTYPES}
        splits[split] = Samples(**arrays)  # type: ignore[arg-type]  # where one is None that may not, problems are found
    if not problems:
        problems = [f"{split}: {problem}" for split, samples in splits.items() for problem in inconsistencies(samples)]
    if problems:
        raise listed(f"{folder}: the prepared data is damaged; {AGAIN}:", problems)
    return PreparedData(folder, meta, splits)


def read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = read_json(path, most=LARGEST_META)
    except FileNotFoundError as error:
        if any(path.exists() for path in replaced_files(folder)):
            raise UserError(f"{folder}: no meta.json, so preparing it was interrupted; {AGAIN}") from error
        raise UserError(f"{folder}: no prepared data here; make it with prepare_sft.py --out_dir={folder}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); {AGAIN}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{path}: not written by prepare_sft.py")
    if meta.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {reprlib.repr(meta.get('format_version'))}, "
            f"this program reads {FORMAT_VERSION}; {AGAIN}"
        )
    if problems := list(meta_problems(meta, folder)):
        raise listed(f"{path}: damaged; {AGAIN}:", problems)
    return meta


def meta_problems(meta: Mapping[str, Any], folder: Path) -> Iterable[str]:
    """What in meta.json cannot be relied upon."""
    if wrong := list(misfits(meta)):
        yield from wrong[:MOST_NAMED]
        return
    if meta["vocab_size"] > MOST_IDS:
        yield f"vocab_size is {meta['vocab_size']:,}, no vocabulary has more than {MOST_IDS:,}"
    if not 0 <= meta["pad_id"] < meta["vocab_size"]:
        yield f"pad_id {meta['pad_id']} is outside the vocabulary of {meta['vocab_size']}"
    for name in meta["tokenizer_files"]:  # which are copied to the checkpoints: nothing else may be, nor from elsewhere
        if not is_tokenizer_file(name) or not os.path.isfile(folder / name) or leads_out(folder, folder / name):
            yield f"tokenizer_files names {reprlib.repr(name)}, which is no tokenizer's file of this folder"


def is_tokenizer_file(name: str) -> bool:
    """Whether a preparation writes files of that name for the tokenizer."""
    return name in TOKENIZER_FILES or (is_plain_name(name) and name.endswith(".tiktoken"))


def open_array(path: Path, part: str, arrays: Mapping[str, Any], problems: list[str]) -> np.ndarray | None:
    """The array as a memory map; None where meta.json leaves it out, and None and a problem where it is bad."""
    told = arrays.get(path.name)
    if told is None:
        if part in WRITTEN:
            problems.append(f"meta.json does not list {path.name}")
        return None
    try:
        array = map_array(path)
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return None
    found = {"dtype": array.dtype.str, "shape": list(array.shape)}
    shape = (array.size // math.prod(row_shape(part)), *row_shape(part))
    if found != {key: told.get(key) for key in found}:
        problems.append(f"{path.name} holds {found}, meta.json says {told}")
    elif (array.dtype.str, array.shape) != (DTYPES[part], shape):
        problems.append(f"{path.name} holds {found}, must be {DTYPES[part]} of shape {list(shape)}")
    else:
        return array
    return None


def map_array(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped; OSError, or ValueError where header and file do not fit each other."""
    if not path.is_file():
        raise FileNotFoundError(path)
    with open(path, "rb") as file:
        dtype, shape, start = read_npy_header(file)
        held = os.fstat(file.fileno()).st_size - start
        if held != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"it holds {held:,} bytes, an array of {list(shape)} {dtype.str} has another size")
        return np.memmap(file, dtype, "r", start, shape)


def inconsistencies(samples: Samples) -> Iterable[str]:
    """What does not fit together although each array alone is as announced."""
    tokens, count = len(samples.input_ids), len(samples.targets)
    if len(samples.labels) != tokens or (samples.weights is not None and len(samples.weights) != tokens):
        yield "input_ids, labels and weights differ in length"
    if len(samples.offsets) != count + 1 or samples.origins.shape != (count, 3):
        yield "offsets, targets and origins differ in length"
    elif samples.offsets[0] != 0 or samples.offsets[-1] != tokens or (samples.lengths <= 0).any():
        yield "offsets do not divide the tokens"


def meta_text(meta: Mapping[str, Any]) -> str:
    """The text of meta.json, with a checksum of all before it at its end."""
    before = json.dumps(meta, indent=1, allow_nan=False).removesuffix("\n}")
    return f'{before},\n "sha256": "{hashlib.sha256(before.encode()).hexdigest()}"\n}}\n'


def is_as_written(content: bytes) -> bool:
    """Whether meta.json ends with the checksum of what stands before it; True for an older one, which has none."""
    if sealed := SEALED.fullmatch(content):
        return hashlib.sha256(sealed[1]).hexdigest().encode() == sealed[2]
    return not LEFT_OF_SEAL.search(content)


def damaged_files(prepared: PreparedData) -> list[str]:
    """The files whose bytes are not those that were written, as problems; reads all arrays, several at a time."""
    if not is_as_written(read_bytes(prepared.folder / "meta.json", most=LARGEST_META)):
        return ["meta.json does not have the checksum that it gives at its end"]
    told = prepared.meta["arrays"]
    known = [file_name(split, part) for split in SPLITS for part in DTYPES]
    if odd := [reprlib.repr(name) for name in told if name not in known]:  # /dev/zero would never be read to its end
        return [f"meta.json lists {', '.join(odd)}, no array of such a folder"]
    with ThreadPoolExecutor() as pool:  # hashing needs no interpreter
        found = pool.map(sha256_of, [prepared.folder / name for name in told])
        return [
            f"{name} does not have the checksum that meta.json gives"
            for name, checksum in zip(told, found, strict=True)
            if checksum != told[name].get("sha256")
        ]


def verify_checksums(prepared: PreparedData) -> None:
    """UserError that lists the files whose bytes are not those that were written."""
    if damaged := damaged_files(prepared):
        raise listed(f"{prepared.folder}: the prepared data is damaged; {AGAIN}:", damaged)
