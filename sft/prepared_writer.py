"""Writing a prepared folder: arrays that grow on disk, then meta.json, which makes the folder valid."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.arrays import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    LARGEST_META,
    SPLITS,
    WRITTEN,
    ArrayReader,
    file_name,
    meta_text,
    replaced_files,
    row_shape,
    sha256_of,
)
from sft.errors import UserError
from sft.files import into_place, partial_of, sync_folder, write_whole
from sft.samples import NOT_TRAINED
from sft.untrusted import read_json


class GrowingArray:
    """A .npy file that grows row by row under the name `path`.partial, so that no more than a row is held."""

    def __init__(self, path: Path, dtype: str, row_shape: tuple[int, ...] = ()):
        self.path, self.dtype, self.row_shape = path, np.dtype(dtype), row_shape
        self.partial = partial_of(path)
        self.length = 0
        self.file = open(self.partial, "wb")  # noqa: SIM115  # close or discard ends it
        self._write_header()

    def _write_header(self) -> None:
        shape = (self.length, *self.row_shape)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, rows: Any) -> None:
        values = np.asarray(rows, self.dtype).reshape(-1, *self.row_shape)
        self.file.write(np.ascontiguousarray(values).data)
        self.length += len(values)

    def close(self) -> None:
        """Complete the file and give it its name."""
        start = self.file.tell() - self.length * self.dtype.itemsize * int(np.prod(self.row_shape, dtype=int))
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() == start, "numpy leaves room in the header for any length"
        into_place(self.file, self.partial, self.path)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses what is still in the buffer
            self.file.close()
        self.partial.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


class PreparedWriter:
    """Writes a prepared folder; a context manager that leaves nothing behind unless `finish` was reached."""

    def __init__(self, folder: str | Path):
        """UserError where the folder cannot be written or holds somebody else's meta.json; an earlier data set goes."""
        self.folder = Path(folder)
        earlier_meta(self.folder)
        self.made_folder = not self.folder.exists()
        self.arrays: dict[tuple[str, str], GrowingArray] = {}
        self.max_id = -1
        self.finished = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in replaced_files(self.folder):
                path.unlink(missing_ok=True)
            sync_folder(self.folder)  # an old meta.json is gone for good before there are new arrays
            for split in SPLITS:
                for part in WRITTEN:
                    path = self.folder / file_name(split, part)
                    self.arrays[split, part] = GrowingArray(path, DTYPES[part], row_shape(part))
                self.arrays[split, "offsets"].append(0)
        except OSError as error:
            self.discard()
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error

    def add_samples(
        self,
        split: str,
        input_ids: NDArray[np.int32],
        labels: NDArray[np.int32],
        *,
        lengths: Sequence[int] | NDArray[np.integer],
        targets: Sequence[float] | NDArray[np.floating],
        origins: Sequence[tuple[int, int, int]] | NDArray[np.integer],
        weights: NDArray[np.float32] | None = None,
    ) -> None:
        """Append samples end to end; `weights` (tokens,) are 0 where the label is -100, None = 1 where trained."""
        assert len(input_ids) == len(labels) == int(np.sum(lengths)) > 0
        assert len(lengths) == len(targets) == len(origins)
        parts = {name: self.arrays[split, name] for name in WRITTEN}
        start = parts["input_ids"].length
        if weights is not None and (split, "weights") not in self.arrays:
            self._begin_weights(split)
        if (split, "weights") in self.arrays:
            filled = weights if weights is not None else labels != NOT_TRAINED
            self.arrays[split, "weights"].append(filled)
        parts["input_ids"].append(input_ids)
        parts["labels"].append(labels)
        parts["offsets"].append(start + np.cumsum(lengths))
        parts["targets"].append(targets)
        parts["origins"].append(origins)
        self.max_id = max(self.max_id, int(input_ids.max()))

    def _begin_weights(self, split: str) -> None:
        """The weights of what was written so far, which are 1 where trained."""
        array = self.arrays[split, "weights"] = GrowingArray(
            self.folder / file_name(split, "weights"), DTYPES["weights"]
        )
        labels = self.arrays[split, "labels"]
        labels.file.flush()
        with ArrayReader(labels.partial) as reader:
            while len(block := reader.take(1 << 20)):
                array.append(block != NOT_TRAINED)

    def close(self) -> None:
        """Complete the arrays and give them their names."""
        for array in self.arrays.values():
            array.close()

    def finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write meta.json, which makes the folder valid: `facts` and what follows from the arrays, which are closed.

        The whole meta.
        """
        names = [array.path.name for array in self.arrays.values()]
        with ThreadPoolExecutor() as pool:  # hashing holds no lock
            described = list(pool.map(description, self.arrays.values()))
        lengths = {split: np.diff(np.load(self.arrays[split, "offsets"].path)) for split in SPLITS}
        meta = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **facts,
            "lengths": {
                "all": length_statistics(np.concatenate(list(lengths.values()))),
                **{split: length_statistics(lengths[split]) for split in SPLITS},
            },
            "max_id": self.max_id,
            "arrays": dict(zip(names, described, strict=True)),
        }
        write_whole(self.folder / "meta.json", lambda file: file.write(meta_text(meta).encode()))
        self.finished = True
        return meta

    def discard(self) -> None:
        """Remove what this writer wrote: meta.json first, which is what makes a folder valid."""
        if self.arrays:
            (self.folder / "meta.json").unlink(missing_ok=True)
            partial_of(self.folder / "meta.json").unlink(missing_ok=True)
        for array in self.arrays.values():
            array.discard()
        if self.made_folder and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def __enter__(self) -> PreparedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.finished:
            self.discard()


def description(array: GrowingArray) -> dict[str, Any]:
    shape = [array.length, *array.row_shape]
    return {"dtype": array.dtype.str, "shape": shape, "sha256": sha256_of(array.path)}


def length_statistics(lengths: np.ndarray) -> dict[str, float] | None:
    """Tokens per sample; None where there is no sample."""
    if len(lengths) == 0:
        return None
    return {
        "min": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": round(float(lengths.mean()), 2),
        "p95": float(np.percentile(lengths, 95, method="inverted_cdf")),
        "max": int(lengths.max()),
    }


def earlier_meta(folder: Path) -> dict[str, Any]:
    """The meta.json that a writer would replace, {} where there is none; UserError where it is somebody else's."""
    path = folder / "meta.json"
    try:
        meta = read_json(path, most=LARGEST_META)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; choose another folder") from error
    except ValueError:
        meta = None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{path}: not written by prepare_sft.py and would be lost; choose another folder")
    return meta
