"""Small files that are data, whose headers are mutated: a prepared folder, a tokenizer, a run log as a config."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
import typing
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import tokenizers

import prepare_sft
from bench.header_mutations import Mutant, Target, byte_mutants, in_turn, json_mutants
from bench.header_readings import demand, json_object, prepared_arrays
from sft import data_summary
from sft.arrays import file_name, open_prepared
from sft.config import load_settings, to_dict
from sft.errors import UserError
from sft.startup import open_training_data
from sft.tokenizer import QWEN3_PATTERN, load_tokenizer
from train_sft import TrainSettings

WORDS = ("the", "cat", "and", "hat", "sat", "on", "mat", "Paris", "France", "capital", "what", "is", "of")
TEXTS = ("the cat and the hat", "  What's\n\n<think>of</think> é你🦙 12<|im_end|>", "")
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def data_targets(work: Path) -> Iterator[Target]:
    """Every kind; `work` is a folder for making them."""
    files = prepared_files(work)
    yield from (prepared_target(files), tokenizer_target(files["tokenizer.json"]), run_log_target())


def library_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level vocabulary of some three hundred tokens, built like Qwen3's."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.normalizer = tokenizers.normalizers.NFC()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN3_PATTERN), "isolated")
    bytes_apart = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_apart])
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=list(CONTROL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    library.train_from_iterator([" ".join(WORDS)], trainer)
    library.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in ("<think>", "</think>")])
    return library


def prepared_files(work: Path) -> dict[str, bytes]:
    library_tokenizer().save(str(work / "tokenizer.json"))
    draw = Random(0)
    with open(work / "conversations.jsonl", "w", encoding="utf-8") as file:
        for _ in range(12):
            prompt, completion = (" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for _ in range(2))
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    with contextlib.redirect_stdout(None):
        prepare_sft.main(
            [
                f"--input={work / 'conversations.jsonl'}:2",
                f"--tokenizer={work / 'tokenizer.json'}",
                f"--out_dir={work / 'data'}",
                "--block_size=64",
                "--val_fraction=0.3",
                "--workers=1",
            ]
        )
    return {path.name: path.read_bytes() for path in (work / "data").iterdir()}


def load_prepared(folder: Path) -> Any:
    """What stands in the arrays and in meta.json, after all that a look at the data and a start make of it."""
    data = open_prepared(folder)
    for each in (data_summary.tables, data_summary.histogram):
        each(data)
    for of_meta in (data_summary.settings_table, data_summary.audit_line):
        of_meta(data.meta)
    assert data.fingerprint
    assert len(data.source_weights) == len(data.meta.get("sources", []))
    with contextlib.suppress(UserError):
        open_training_data(str(folder), block_size=64, say=lambda line: None)
    arrays = {
        file_name(split, field.name): (array.dtype.str, array.shape, array.tobytes())
        for split, samples in data.splits.items()
        for field in dataclasses.fields(samples)
        if (array := getattr(samples, field.name)) is not None
    }
    return data.meta, arrays


def read_prepared(folder: Path) -> Any:
    meta = json_object((folder / "meta.json").read_bytes())
    arrays = prepared_arrays(folder)
    return meta, {name: array for name, array in arrays.items() if name in meta["arrays"]}


def prepared_target(files: dict[str, bytes]) -> Target:
    arrays = tuple(name for name in sorted(files) if name.endswith(".npy"))

    def mutants(draw: Random) -> Iterator[Mutant]:
        meta_bytes = byte_mutants(files, lambda name: [range(len(files[name]))], ("meta.json",), draw)
        meta = (json_mutants(files, ("meta.json",), draw) for _ in range(3))
        yield from in_turn(npy_mutants(files, arrays, draw), npy_byte_mutants(files, arrays, draw), meta_bytes, *meta)

    return Target("prepared data: meta.json, .npy", files, mutants, load_prepared, read_prepared, 1300)


def npy_byte_mutants(files: dict[str, bytes], names: tuple[str, ...], draw: Random) -> Iterator[Mutant]:
    for each in byte_mutants(files, lambda name: [range(12), range(10, 90)], names, draw):
        ((name, content),) = each.files.items()
        if content is not None and (len(content) != len(files[name]) or content[:128] != files[name][:128]):
            yield each  # without the start, which hashes them, no change of the numbers would be seen


def npy_mutants(files: dict[str, bytes], names: tuple[str, ...], draw: Random) -> Iterator[Mutant]:
    """Headers that say something else, in the form that NumPy writes, and in others."""
    types = ("<i4", "<i8", "<f8", ">i4", "|O", "O", "<U9", "<M8[s]", "|V4", "<c16", "<f16", "i4", "<i3", "|b1", "<u4")
    shapes: tuple[str, ...] = (
        "(3,)",
        "(0,)",
        "()",
        "(2, 3)",
        "(10, 3)",
        "(99999999999999,)",
        "(-1,)",
        "3",
        "(3, )",
        "(True,)",
        "None",
    )
    shapes += ("(1.5,)", "(4611686018427387905, 4)", "(9" + "9" * 5000 + ",)", "(1," * 400, "(1, 1, 1, 1, 1, 1, 1, 1)")
    code = ("__import__('os').system('touch run')", "open('run', 'w')", "(lambda: 1)()", "[0] * 10**9", "9**9**9")
    while True:
        name = draw.choice(names)
        length = int.from_bytes(files[name][8:10], "little")
        old, data = files[name][10 : 10 + length].decode("ascii"), files[name][10 + length :]
        _, dtype, _, shape = old.split(": ")
        fields = [dtype.split(",")[0], "False", shape.rsplit(", }", 1)[0]]
        which, odd = draw.randrange(3), (map(repr, types), ("True", "0", "None", "'F'"), shapes)
        fields[which] = draw.choice((*odd[which], *code))
        text = f"{{'descr': {fields[0]}, 'fortran_order': {fields[1]}, 'shape': {fields[2]}, }}"
        if draw.random() < 0.2:
            text = draw.choice((text[:-1], text + "; 1", f"dict({text})", text.replace("'", '"'), f" {text}", "{}", ""))
        text = text.ljust(117) + "\n"
        version = draw.choice((*[b"\x01\x00"] * 5, b"\x02\x00", b"\x03\x00", b"\x00\x00", b"\xff\x00"))
        size = struct.pack("<H" if version[0] < 2 else "<I", draw.choice((*[len(text)] * 8, 0, 65_535)))
        yield Mutant(f"{name}: {text.strip()[:60]}", {name: b"\x93NUMPY" + version + size + text.encode() + data})


def tokenizer_target(content: bytes) -> Target:
    files = {"tokenizer.json": content}

    def mutants(draw: Random) -> Iterator[Mutant]:
        by_byte = byte_mutants(files, lambda name: [range(len(content)), range(2000)], ("tokenizer.json",), draw)
        yield from in_turn(json_mutants(files, ("tokenizer.json",), draw), by_byte)

    return Target("tokenizer.json", files, mutants, load_vocabulary, read_vocabulary, 500)


def load_vocabulary(folder: Path) -> Any:
    tokenizer = load_tokenizer(folder)
    return tokenizer.encode_batch(list(TEXTS)), tokenizer.token_bytes, tokenizer.control


def read_vocabulary(folder: Path) -> Any:
    """What the tokenizers library, which defines the format, makes of the file, and the tokens that the file lists."""
    text = (folder / "tokenizer.json").read_bytes()
    content = json_object(text)
    library = tokenizers.Tokenizer.from_str(text.decode())
    library.encode_special_tokens = True
    library.no_padding()
    library.no_truncation()
    ids = [library.encode(each, add_special_tokens=False).ids for each in TEXTS]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in printable)}
    tokens = {
        i: bytes(byte_of[each] for each in token) if set(token) <= byte_of.keys() else token.encode()
        for token, i in content["model"]["vocab"].items()
    }
    added = {token["content"]: token for token in content["added_tokens"]}
    demand(all(library.token_to_id(name) == token["id"] for name, token in added.items()), "ids that do not count")
    tokens |= {token["id"]: name.encode() for name, token in added.items()}
    return ids, tokens, {name: token["id"] for name, token in added.items() if token["special"]}


def run_log_target() -> Target:
    config = {
        "sft_data_dir": ".",
        "out_dir": "out",
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16},
        "block_size": 64,
        "max_iters": 9,
        "learning_rate": 1e-3,
        "min_lr": 1e-4,
        "beta1": 0.9,
        "grad_clip": 1.0,
        "warmup_iters": 2,
        "dtype": "float32",
        "seed": 3,
        "keep_checkpoints": None,
        "compile": False,
    }
    log = {"run_name": "x", "status": "finished", "config": config, "training_iterations": [{"iter": 0, "loss": 1.5}]}
    files = {"run_20260101_000000.json": json.dumps(log).encode()}

    def mutants(draw: Random) -> Iterator[Mutant]:
        by_byte = byte_mutants(files, lambda name: [range(len(files[name]))], tuple(files), draw)
        of_json = (json_mutants(files, tuple(files), draw) for _ in range(3))
        yield from in_turn(by_byte, *of_json)

    def load(folder: Path) -> dict[str, Any]:
        return to_dict(load_settings(TrainSettings, [str(folder / next(iter(files)))]).settings)

    def read(folder: Path) -> dict[str, Any]:
        told = json_object((folder / next(iter(files))).read_bytes())["config"]
        defaults = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
        demand(told.keys() <= defaults.keys())
        hints = typing.get_type_hints(TrainSettings)
        told = {name: float(value) if is_float(value, hints[name]) else value for name, value in told.items()}
        return json.loads(json.dumps({**defaults, **told}, default=list))

    return Target("run_*.json as a config", files, mutants, load, read, 400)


def is_float(value: Any, hint: Any) -> bool:
    """Whether it is a whole number where the setting takes any."""
    return type(value) is int and float in (hint, *typing.get_args(hint)) and abs(value) < 1e300
