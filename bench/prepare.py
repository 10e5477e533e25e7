"""How fast conversations become tokens and labels: beside TRL's way, and beside nothing but tiktoken, in one run.

PYTHONPATH=. OMP_NUM_THREADS=1 python bench/prepare.py --input=gsm8k/train.jsonl --tokenizer=qwen3

(needs the extra `bench`, trl and datasets: pip install -e '.[bench]', best in an environment of its own)

The input, JSON lines with question and answer, is repeated up to a size; each repeat's questions begin with its number,
since prepare_sft.py drops duplicates. All three work on that very file and have the same two cores:

ours   prepare_sft.py, from the file to arrays on disk: one process reads the file and writes the arrays, two workers
       render and encode; its start-up and its audit are told apart
TRL    datasets.map(num_proc=2) over apply_chat_template with return_assistant_tokens_mask, as TRL's trainer does it,
       with the template that TRL ships for training: two workers, and a process that waits for them; reading the file
       is not counted, nor are labels made of the masks
bare   tiktoken's encode_ordinary with the published pattern over the strings between control tokens: two processes,
       which have the strings in memory and make no use of the ids

Rates are in tokens of whole conversations for all three. Ids and labels are then compared: TRL's template trains the
line break after <|im_end|> too, which ours does not, so that it is taken out; conversations whose answer begins with a
line break differ by design (an answer is encoded apart from what precedes it), and are counted.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from bench.packing import processor
from sft.byte_pair import QWEN3_PATTERN
from sft.config import load_settings
from sft.errors import UserError, run_program
from sft.samples import NOT_TRAINED
from sft.tokenizer import IM_END, Tokenizer, load_tokenizer

PREPARE = Path(__file__).resolve().parent.parent / "prepare_sft.py"
TRL_TEMPLATE = "chat_templates/qwen3_instruct_2507_training.jinja"  # within the package
OURS, TRL, BARE = "ours", "TRL", "bare"
APART = ("start-up", "audit")  # phases of prepare_sft.py that are not the work compared
BLOCK_SIZE = 4096  # no conversation of GSM8K is longer


@dataclass(frozen=True, kw_only=True)
class PrepareBenchmark:
    """Every knob of this benchmark."""

    input: str  # JSON lines with question and answer
    tokenizer: str  # folder with Qwen3's tokenizer.json
    megabytes: float = 50  # the input is repeated up to so many
    processes: int = 2  # that encode, of each contestant, on so many cores
    repeats: int = 3  # of every contestant, taking turns; medians are told
    out: str = "bench/results/prepare_cpu.json"  # where the result goes


class Conversations(NamedTuple):
    """Token ids and labels of all conversations end to end."""

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray  # (conversations + 1,)


def write_repeated(source: Path, target: Path, size: int) -> None:
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    with open(target, "w", encoding="utf-8") as file:
        repeat = 0
        while file.tell() < size:
            repeat += 1
            for record in records:
                numbered = {"question": f"{repeat}. {record['question']}", "answer": record["answer"]}
                file.write(json.dumps(numbered, ensure_ascii=False) + "\n")


def read_records(path: Path) -> Iterator[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def run_ours(path: Path, tokenizer: str, out_dir: Path, processes: int) -> dict[str, float]:
    """The seconds of each phase that prepare_sft.py tells."""
    command = [sys.executable, str(PREPARE), f"--input={path}", f"--tokenizer={tokenizer}", f"--out_dir={out_dir}"]
    command += [f"--block_size={BLOCK_SIZE}", "--val_fraction=0", f"--workers={processes}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    phases = re.search(r"^phases(.*)$", done.stdout, re.MULTILINE)
    if done.returncode or phases is None:
        raise UserError(f"prepare_sft.py failed with status {done.returncode}: {done.stdout}{done.stderr}")
    return {name: float(seconds) for name, seconds in re.findall(r"  ([a-z-]+) ([\d.]+) s", phases[1])}


def our_conversations(out_dir: Path) -> Conversations:
    names = ("input_ids", "labels", "offsets")
    return Conversations(*(np.load(out_dir / f"train_{name}.npy", mmap_mode="r") for name in names))


class TrlMap:
    """What TRL's trainer does to a data set of conversations before it packs."""

    def __init__(self, path: Path, tokenizer: str, cache: Path, processes: int):
        import datasets
        import transformers
        import trl

        datasets.disable_caching()  # else a repeat reads the result of the first
        datasets.disable_progress_bars()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)
        self.template = (Path(trl.__file__).parent / TRL_TEMPLATE).read_text(encoding="utf-8")
        self.dataset = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
        self.processes = processes

    def tokenize(self, record: dict[str, str]) -> dict[str, Any]:
        messages = [
            {"role": "user", "content": record["question"]},
            {"role": "assistant", "content": record["answer"]},
        ]
        rendered = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": rendered["input_ids"], "assistant_masks": rendered["assistant_masks"]}

    def run(self) -> Any:
        columns = self.dataset.column_names
        return self.dataset.map(self.tokenize, num_proc=self.processes, remove_columns=columns)


def trl_conversations(dataset: Any, tokenizer: Tokenizer) -> Conversations:
    """Its conversations, with the line break after <|im_end|> taken out of what is trained."""
    columns = {name: dataset.data.column(name).combine_chunks() for name in ("input_ids", "assistant_masks")}
    input_ids, masks = (np.asarray(column.flatten()) for column in columns.values())
    offsets = np.concatenate([[0], np.cumsum(np.asarray(columns["input_ids"].value_lengths()))])
    (line_break,) = tokenizer.encode("\n")
    after_end = np.concatenate([[False], input_ids[:-1] == tokenizer.control[IM_END]])
    trained = (masks == 1) & ~(after_end & (input_ids == line_break))
    return Conversations(input_ids, np.where(trained, input_ids, NOT_TRAINED), offsets)


def bare_encoding(tokenizer: Tokenizer, strings: list[str]) -> tiktoken.Encoding:
    """tiktoken as its users have it. UserError where that is not this tokenizer."""
    ranks = {token: i for i, token in tokenizer.token_bytes.items() if i < min(tokenizer.control.values())}
    encoding = tiktoken.Encoding("bare", pat_str=QWEN3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    if any(encoding.encode_ordinary(text) != tokenizer.encode(text) for text in strings):
        raise UserError(f"{tokenizer.path}: not Qwen3's tokenizer, which this comparison is made for")
    return encoding


def bare_seconds(strings: list[str], encode: Callable[[str], list[int]], processes: int) -> float:
    """From the moment when all processes are ready until the last one is done."""
    context = multiprocessing.get_context("fork")  # which hands on the strings and the tokenizer
    ready = context.Barrier(processes + 1)

    def work(number: int) -> None:
        share = slice(len(strings) * number // processes, len(strings) * (number + 1) // processes)
        ready.wait()
        for text in strings[share]:
            encode(text)

    workers = [context.Process(target=work, args=(number,)) for number in range(processes)]
    for worker in workers:
        worker.start()
    ready.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise UserError("a process that only encodes has failed")
    return time.perf_counter() - start


def compared(ours: Conversations, theirs: Conversations, records: Iterator[dict[str, str]]) -> dict[str, int]:
    """How many conversations have equal ids and labels, and how many begin their answer with a line break."""
    if len(ours.offsets) != len(theirs.offsets):
        raise UserError(f"{len(ours.offsets) - 1:,} conversations of ours, {len(theirs.offsets) - 1:,} of TRL's")
    counts = {"conversations": len(ours.offsets) - 1, "equal": 0, "answer_begins_with_line_break": 0, "different": 0}
    for i, record in enumerate(records):
        a, b = (slice(*sides.offsets[i : i + 2]) for sides in (ours, theirs))
        equal = np.array_equal(ours.input_ids[a], theirs.input_ids[b])
        equal = equal and np.array_equal(ours.labels[a], theirs.labels[b])
        by_design = re.match(r"\s*[\r\n]", record["answer"]) is not None
        counts["equal" if equal else "answer_begins_with_line_break" if by_design else "different"] += 1
    return counts


def measure(settings: PrepareBenchmark, folder: Path) -> dict[str, Any]:
    path, out_dir = folder / "conversations.jsonl", folder / "prepared"
    write_repeated(Path(settings.input), path, int(settings.megabytes * 1e6))
    tokenizer = load_tokenizer(settings.tokenizer)
    strings = [text for record in read_records(path) for text in (f"user\n{record['question']}", record["answer"])]
    encode = bare_encoding(tokenizer, strings[:1000]).encode_ordinary
    trl_map = TrlMap(path, settings.tokenizer, folder / "cache", settings.processes)
    seconds: dict[str, list[float]] = {name: [] for name in (OURS, TRL, BARE, *APART)}
    for _ in range(settings.repeats):
        phases = run_ours(path, settings.tokenizer, out_dir, settings.processes)
        seconds[OURS].append(sum(taken for name, taken in phases.items() if name not in APART))
        for name in APART:
            seconds[name].append(phases.get(name, 0.0))
        seconds[BARE].append(bare_seconds(strings, encode, settings.processes))
        start = time.perf_counter()
        dataset = trl_map.run()
        seconds[TRL].append(time.perf_counter() - start)
        print("  ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items()), flush=True)
    ours = our_conversations(out_dir)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    tokens = int(ours.offsets[-1])
    return {
        "bytes": path.stat().st_size,
        "tokens": tokens,
        "seconds": {name: {"median": medians[name], "all": taken} for name, taken in seconds.items()},
        "tokens_per_second": {name: tokens / medians[name] for name in (OURS, TRL, BARE)},
        "ours_over_trl": medians[TRL] / medians[OURS],
        "ours_over_bare": medians[BARE] / medians[OURS],
        "compared": compared(ours, trl_conversations(dataset, tokenizer), read_records(path)),
    }


def main(argv: list[str]) -> None:
    settings = load_settings(PrepareBenchmark, argv).settings
    try:
        names = ("numpy", "tiktoken", "tokenizers", "trl", "datasets", "transformers", "pyarrow")
        versions = {name: version(name) for name in names}
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is missing; pip install -e '.[bench]', best in an environment of its own"
        ) from error
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: settings.processes]))
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(settings, Path(folder))
    report = {
        "command": " ".join(["PYTHONPATH=. OMP_NUM_THREADS=1 python bench/prepare.py", *argv]),
        "processor": processor(),
        "cores": settings.processes,
        "python": platform.python_version(),
        **versions,
        **measured,
    }
    rates = measured["tokens_per_second"]
    for name in (OURS, TRL, BARE):
        print(f"  {name:<5} {measured['seconds'][name]['median']:8.2f} s  {rates[name]:>12,.0f} tokens/s")
    print(f"  ours is {measured['ours_over_trl']:.1f} x TRL, {measured['ours_over_bare']:.2f} x bare encoding")
    print(f"  conversations: {measured['compared']}")
    Path(settings.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if measured["compared"]["different"]:
        raise UserError("ids or labels differ from TRL's")


if __name__ == "__main__":
    run_program(main)
