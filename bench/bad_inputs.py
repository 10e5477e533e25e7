"""What prepare_sft.py and TRL do with inputs in which one thing is wrong, as a table.

PYTHONPATH=. OMP_NUM_THREADS=1 python bench/bad_inputs.py --tokenizer=qwen3

(needs the extra `bench`, trl and datasets: pip install -e '.[bench]', best in an environment of its own)

Each input is one of the list that the tests hold us to: a file in which one thing is wrong, mostly between two good
records, which for TRL are of the bad one's format, since it cannot mix them. Ours is the program itself, run on that
file. TRL reads it as its users do: datasets.load_dataset, then SFTTrainer over a model of a few weights, which prepares
the data and no more. An input is
refused with its place   where the message names the line or row; of ours, the file and the very line that is wrong,
refused                  where there is an exception without it, or the process dies,
accepted                 where there would be data to train on.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

import prepare_sft
from sft.config import load_settings
from sft.errors import UserError, run_program
from tests.bad_inputs import BAD_INPUTS, GOOD, BadInput

BUILDERS = {".json": "json", ".jsonl": "json", ".gz": "json", ".parquet": "parquet", ".txt": "text"}
NAMES_A_PLACE = re.compile(r"\b(?:row|line|record) #?\d+(?!\d* column)")  # a column is one within a text
GOOD_MESSAGES = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
GOOD_TURNS = [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat"}]
GOOD_RECORDS = {"messages": GOOD_MESSAGES, "conversations": GOOD_TURNS, "text": "the cat sat"}
REFUSED_WITH_PLACE, REFUSED, ACCEPTED = "refused with its place", "refused", "accepted"
OUTCOMES = (REFUSED_WITH_PLACE, REFUSED, ACCEPTED)


@dataclass(frozen=True, kw_only=True)
class BadInputsBenchmark:
    """Every knob of this benchmark."""

    tokenizer: str  # folder with a tokenizer.json and its chat template
    seconds: int = 120  # of TRL's for an input
    out: str = "bench/results/bad_inputs.json"  # where the result goes


def what_ours_does(bad: BadInput, tokenizer_path: str) -> tuple[str, str]:
    """What prepare_sft.py does, and the first problem it tells of that line, else whatever it says first."""
    with tempfile.TemporaryDirectory() as folder:
        path, out_dir = Path(folder) / bad.file, Path(folder) / "prepared"
        path.write_bytes(bad.content)
        try:
            given = {"input": path, "tokenizer": tokenizer_path, "out_dir": out_dir, "val_fraction": 0, "workers": 1}
            prepare_sft.main([f"--{name}={value}" for name, value in given.items()])
        except UserError as error:
            told = str(error).splitlines()
        else:
            return ACCEPTED, f"{len(np.load(out_dir / 'train_offsets.npy')) - 1} samples"
    place = f"  {path}:{bad.line}: "
    problem = next((line for line in told if line.startswith(place)), None)
    shown = (problem or told[0]).replace(f"{folder}/", "").strip()
    return REFUSED if problem is None else REFUSED_WITH_PLACE, shown


def trl_prepares(tokenizer_path: str) -> Callable[[Path], int]:
    """Samples of a file that TRL would train on. Raises whatever it raises."""
    import datasets
    import transformers
    import trl

    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_path)
    shape = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 1}
    config = transformers.Qwen3Config(hidden_size=8, intermediate_size=8, vocab_size=len(tokenizer), **shape)
    model = transformers.Qwen3ForCausalLM(config)

    def prepare(path: Path) -> int:
        folder = path.parent
        dataset = datasets.load_dataset(
            BUILDERS[path.suffix], data_files=str(path), split="train", cache_dir=str(folder / "cache")
        )
        arguments = trl.SFTConfig(output_dir=str(folder / "out"), report_to="none", use_cpu=True, bf16=False)
        trainer = trl.SFTTrainer(model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
        return len(trainer.train_dataset)

    return prepare


def answer(connection: Connection, prepare: Callable[[Path], int], path: Path) -> None:
    try:
        connection.send((ACCEPTED, f"{prepare(path)} samples"))
    except Exception as error:  # whatever the other project raises is its answer
        causes = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        told = " <- ".join(f"{type(cause).__name__}: {cause}" for cause in causes)
        place = NAMES_A_PLACE.search(told.replace(str(path), ""))
        connection.send((REFUSED_WITH_PLACE if place else REFUSED, short(told)))


def content_for_trl(bad: BadInput) -> bytes:
    """The input with the good records around the bad one in its format."""
    rest = bad.content.replace(GOOD, b"")
    for key, value in GOOD_RECORDS.items():
        if f'"{key}":'.encode() in rest:
            return bad.content.replace(GOOD, json.dumps({key: value}).encode() + b"\n")
    return bad.content


def short(text: str) -> str:
    """One printable line of it."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 160 else line[:157] + "..."


def what_trl_does(bad: BadInput, prepare: Callable[[Path], int], *, seconds: int) -> tuple[str, str]:
    """Its outcome and words, from a process of its own: one input may bring it down."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / bad.file
        path.write_bytes(content_for_trl(bad))
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=answer, args=(sender, prepare, path))
        process.start()
        sender.close()
        try:
            outcome = receiver.recv() if receiver.poll(seconds) else (REFUSED, f"no end within {seconds} s")
            outcome = (outcome[0], outcome[1].replace(folder, ""))
        except EOFError:
            process.join()
            outcome = (REFUSED, f"the process died with status {process.exitcode}")
        process.kill()
        process.join()
    return outcome


def main(argv: list[str]) -> None:
    settings = load_settings(BadInputsBenchmark, argv).settings
    try:
        prepare = trl_prepares(settings.tokenizer)
    except ImportError as error:
        raise UserError(
            f"{error.name} is missing; pip install -e '.[bench]', best in an environment of its own"
        ) from error
    answers = [what_ours_does(bad, settings.tokenizer) for bad in BAD_INPUTS]
    table: list[dict[str, str]] = []
    for bad, (ours, ours_says) in zip(BAD_INPUTS, answers, strict=True):
        trl, trl_says = what_trl_does(bad, prepare, seconds=settings.seconds)
        table.append({"input": bad.name, "ours": ours, "ours_says": ours_says, "trl": trl, "trl_says": trl_says})
        print(f"{bad.name:<34} ours {ours:<24} TRL {trl:<24} {trl_says}", flush=True)
    counts = {who: Counter(row[who] for row in table) for who in ("ours", "trl")}
    report = {
        "command": " ".join(["PYTHONPATH=. OMP_NUM_THREADS=1 python bench/bad_inputs.py", *argv]),
        "python": platform.python_version(),
        **{name: version(name) for name in ("trl", "datasets", "transformers", "pyarrow", "torch")},
        "inputs": len(table),
        **{f"{who}_does": {name: found[name] for name in OUTCOMES} for who, found in counts.items()},
        "table": table,
    }
    print(f"of {len(table)} inputs, ours: {report['ours_does']}, TRL: {report['trl_does']}")
    Path(settings.out).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
