"""Small data prepared by the program, for tests that look at what came of it."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import prepare_sft
from sft.arrays import PreparedData, meta_text, open_prepared
from sft.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_tokenizer import tiny_library_tokenizer


def exchange(prompt: str, completion: str, **keys) -> dict:
    return {"prompt": prompt, "completion": completion, **keys}


def dialogue(*turns: tuple, **keys) -> dict:
    """A record of messages: (role, content) or (role, content, what else the message has)."""
    messages = [{"role": role, "content": content, **dict(*more)} for role, content, *more in turns]
    return {"messages": messages, **keys}


def prepare(folder: Path, records: list | None = None, out: str = "data", **settings) -> PreparedData:
    """The data that the program makes of the records, or of settings['input']; lines of a file are given as bytes."""
    if records is not None:
        write_lines(folder / "input.jsonl", records)
    given = {"input": folder / "input.jsonl", "tokenizer": tokenizer_file(folder), "out_dir": folder / out, **settings}
    prepare_sft.main([f"--{name}={value}" for name, value in given.items()])
    return open_prepared(folder / out)


def change_meta(folder: Path, change: Callable[[dict], object]) -> None:
    """A meta.json that says something else, as if prepare_sft.py had written it."""
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    del meta["sha256"]
    change(meta)
    path.write_text(meta_text(meta))


def write_lines(path: Path, records: list) -> Path:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@lru_cache(maxsize=1)
def tokenizer_json() -> str:
    return tiny_library_tokenizer().to_str()


def tokenizer_file(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    if not path.exists():
        path.write_text(tokenizer_json())
    return path


def tokenizer_of(data: PreparedData) -> Tokenizer:
    return load_tokenizer(data.folder)


def texts(data: PreparedData, split: str = "train") -> list[str]:
    """The text of each sample, control tokens spelled out."""
    return decoded(data, split, trained=False)


def trained_texts(data: PreparedData, split: str = "train") -> list[str]:
    """The trained tokens of each sample, decoded."""
    return decoded(data, split, trained=True)


def decoded(data: PreparedData, split: str, *, trained: bool) -> list[str]:
    samples, tokenizer = data.splits[split], tokenizer_of(data)
    found = []
    for start, end in zip(samples.offsets, samples.offsets[1:], strict=False):
        ids, labels = samples.input_ids[start:end], samples.labels[start:end]
        found.append(tokenizer.decode((ids[labels >= 0] if trained else ids).tolist(), skip_control=False))
    return found
