"""The same faults for other trainers' savers: Hugging Face's Trainer, TRL's SFTTrainer, and nanoGPT's way.

PYTHONPATH=. OMP_NUM_THREADS=1 python bench/faults_peers.py --python=ENVIRONMENT/bin/python

(an environment with the extra `bench`: torch, transformers, trl, datasets; without TRL it says so and does nothing)

Each trains a model of a few hundred weights for a few steps on the CPU, with dropout, and saves after every step, as
bench/faults_files.py lets ours do. A run is disturbed at one file operation, then started again in the documented way:
`trainer.train(resume_from_checkpoint=get_last_checkpoint(output_dir))`, and torch.load of ckpt.pt. If that raises, a
person helps by deleting the newest checkpoint, until it starts. nanoGPT's way is its train.py's: torch.save in place to
one ckpt.pt. Its batches are made a function of the step, so that its saver alone is measured.

Their C++ and Rust cannot be watched. So torch.save and safetensors' save_file are brought to make their bytes in memory
and write them through Python, by the calls that strace shows for them: torch.save opens the very name and writes some
pieces; save_file writes a temporary file in one piece and renames it. Neither calls fsync.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import json
import logging
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from bench.faults_bytes import (
    flips,
    garbage,
    spans_of_archive,
    spans_of_safetensors,
    truncations,
    zeroed_pages,
)
from bench.faults_fork import Ended, Operation, Pair, disturbed, in_child, operations_of, spread
from sft.config import load_settings
from sft.errors import UserError, run_program

STEPS = 4  # a checkpoint after each
PAIRS = 60  # so many (operation, mode) pairs are tried of each saver
PIECES = 4  # in which torch.save writes a small file
SAVED, BEGAN = re.compile(r"^saved (\d+)$", re.MULTILINE), re.compile(r"^began (\d+)$", re.MULTILINE)
RESULT = re.compile(r"^result (\S+) (\S+)$", re.MULTILINE)
IN_RECORDS, ELSEWHERE = 20, 2  # flipped bits in tensors, of which a large model consists; and in each kind of place


@dataclass(frozen=True, kw_only=True)
class PeersBenchmark:
    """Every knob of this program."""

    python: str | None = None  # of the environment where TRL is installed; None = this one
    only: tuple[str, ...] = ()  # names of savers; none = all
    pairs: int = PAIRS  # (operation, mode) pairs of each
    out: str = "bench/results/faults_peers.json"  # where the result goes


class Peer(NamedTuple):
    """Another saver: train(folder) goes on from what is in the folder, and says `began`, `saved` and `result`."""

    name: str
    train: Callable[[Path], None]
    newest: Callable[[Path], Path | None]  # the checkpoint that a restart would take


def digest(tree: Any) -> str:
    import torch

    found = hashlib.sha256()

    def add(value: Any, where: str) -> None:
        if isinstance(value, torch.Tensor):
            found.update(where.encode() + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, (dict, list, tuple)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                add(item, f"{where}.{key!r}")
        else:
            found.update(f"{where}={value!r}".encode())

    add(tree, "")
    return found.hexdigest()


def write_through_python() -> None:
    """torch.save to a path and safetensors' save_file write by calls that can be watched, the same as their own."""
    import safetensors.torch
    import torch
    import transformers.modeling_utils

    real_save = torch.save

    def save(content: Any, file: Any, *arguments: Any, **options: Any) -> None:
        if not isinstance(file, (str, os.PathLike)):
            return real_save(content, file, *arguments, **options)
        buffer = io.BytesIO()
        real_save(content, buffer, *arguments, **options)
        data = buffer.getbuffer()
        with open(file, "wb", buffering=0) as written:
            for i in range(PIECES):
                written.write(data[i * len(data) // PIECES : (i + 1) * len(data) // PIECES])
        return None

    def save_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
        data, partial = safetensors.torch.save(tensors, metadata), Path(filename).with_name(".tmp")
        try:
            with open(partial, "w+b", buffering=0) as written:
                os.ftruncate(written.fileno(), len(data))
                written.write(data)
                os.rename(partial, filename)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    torch.save = save  # type: ignore[assignment]
    safetensors.torch.save_file = transformers.modeling_utils.safe_save_file = save_file


def told(callback: type) -> Any:
    """A callback of Trainer that says where training began, and each save that has been done."""

    class Teller(callback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            print("began", state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            print("saved", state.global_step)

    return Teller()


def trainer_settings(out: Path) -> dict[str, Any]:
    return {
        **{"output_dir": str(out), "max_steps": STEPS, "per_device_train_batch_size": 1, "learning_rate": 1e-2},
        **{"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "logging_strategy": "no", "seed": 1},
        **{"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "bf16": False},
    }


@functools.cache
def rows() -> list[dict[str, list[int]]]:
    draw = random.Random(0)
    ids = [[draw.randrange(3, 32) for _ in range(12)] for _ in range(12)]
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids]


def tiny_gpt2() -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=2)
    )


def resume(trainer: Any, out: Path) -> None:
    """As transformers' examples do it."""
    from transformers.trainer_utils import get_last_checkpoint

    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)
    print("result", digest(trainer.model.state_dict()), digest(trainer.optimizer.state_dict()))


def train_with_trainer(out: Path) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

    trainer = Trainer(
        model=tiny_gpt2(),
        args=TrainingArguments(**trainer_settings(out)),
        train_dataset=rows(),
        data_collator=default_data_collator,
        callbacks=[told(TrainerCallback)],
    )
    resume(trainer, out)


def train_with_trl(out: Path) -> None:
    import datasets  # type: ignore[import-not-found]
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 32)}}
    library = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="</s>", pad_token="</s>")
    more = {"max_length": 16, "dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False}
    trainer = SFTTrainer(
        model=tiny_gpt2(),
        args=SFTConfig(**trainer_settings(out), **more),
        train_dataset=datasets.Dataset.from_list(rows()),
        processing_class=tokenizer,
        callbacks=[told(TrainerCallback)],
    )
    resume(trainer, out)


def train_as_nanogpt(out: Path) -> None:
    import torch

    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    model = torch.nn.Sequential(torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step, path = 0, out / "ckpt.pt"
    if path.exists():
        checkpoint = torch.load(path, map_location="cpu")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["iter_num"]
    print("began", step)
    while step < STEPS:
        ids = torch.tensor(rows()[step]["input_ids"])
        torch.nn.functional.cross_entropy(model(ids[:-1]), ids[1:]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "iter_num": step, "best_val_loss": 1e9, "config": {"learning_rate": 1e-2}}, path)
        print("saved", step)
    print("result", digest(model.state_dict()), digest(optimizer.state_dict()))


def newest_folder(out: Path) -> Path | None:
    found = [path for path in out.glob("checkpoint-*") if path.is_dir()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def newest_file(out: Path) -> Path | None:
    path = out / "ckpt.pt"
    return path if path.exists() else None


PEERS = (
    Peer("Hugging Face Trainer", train_with_trainer, newest_folder),
    Peer("TRL SFTTrainer", train_with_trl, newest_folder),
    Peer("nanoGPT's way", train_as_nanogpt, newest_file),
)


class Restart(NamedTuple):
    """What starting again came to: the helps that it took, and how the last attempt ended."""

    helps: int
    ended: Ended
    complaint: str  # of the first attempt, where it failed

    @property
    def began(self) -> int:
        return int(found[0]) if (found := BEGAN.findall(self.ended.output)) else 0


def result_of(ended: Ended) -> tuple[str, ...]:
    """Digests of weights and optimizer; () where it did not come to an end."""
    return found[0] if (found := RESULT.findall(ended.output)) else ()


def start_again(peer: Peer, out: Path, work: Path) -> Restart:
    """As often as it takes, the newest checkpoint being deleted where it cannot be resumed from."""
    helps, complaint = 0, ""
    while True:
        ended = in_child(lambda: peer.train(out), work / "output.txt", seconds=60)
        if ended.status == 0 or (newest := peer.newest(out)) is None:
            return Restart(helps, ended, complaint)
        complaint = complaint or ended.output.strip().splitlines()[-1]
        shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
        helps += 1


def what_became(restart: Restart, expected: tuple[str, ...], *, saved: int) -> list[str]:
    """The names of all that went wrong. Where nothing was left to train, nobody needs the optimizer."""
    found = []
    if restart.helps:
        found.append("needed help")
    if restart.began < saved or restart.ended.status != 0:
        found.append("lost a finished save")
    count = 1 if restart.began == STEPS else 2
    if restart.ended.status == 0 and result_of(restart.ended)[:count] != expected[:count]:
        found.append("ended with other weights without a word")
    return found or ["resumed exactly"]


def faults_of(
    peer: Peer, out: Path, work: Path, expected: tuple[str, ...], count: int
) -> Iterator[tuple[str, list[str]]]:
    """Each case, and what became of it."""
    shutil.rmtree(out, ignore_errors=True)
    operations = operations_of(lambda: peer.train(out), out, work)
    for pair in spread(operations, count):
        shutil.rmtree(out, ignore_errors=True)
        ended = disturbed(lambda: peer.train(out), pair, out, work)
        saved = max(map(int, SAVED.findall(ended.output)), default=0)
        found = what_became(start_again(peer, out, work), expected, saved=saved) if ended.status else []
        if ended.status == 0 and result_of(ended) != expected:
            found.append("ended with other weights without a word")
        if pair.mode.endswith("once") and ended.status != 0:
            found.append("a passing error ended the run")
        yield str(pair), found or ["went on"]


def damages_of(peer: Peer, out: Path, work: Path, expected: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Damage in each file with tensors of the newest checkpoint, in a run that was killed before its last save."""
    state, draw = work / "state", random.Random(0)
    killed_before_last_save(peer, out, work)
    shutil.copytree(out, state)
    newest = peer.newest(out)
    assert newest is not None
    paths = sorted(newest.iterdir()) if newest.is_dir() else [newest]
    paths = [path for path in paths if path.name in ("model.safetensors", "optimizer.pt", "ckpt.pt")]
    has_older = newest.is_dir()
    for path in paths:
        content = path.read_bytes()
        spans = spans_of_safetensors(content) if path.suffix == ".safetensors" else spans_of_archive(content)
        records = {"record": spans["record"]}
        damages = [*flips(records, IN_RECORDS // len(paths), draw), *flips(spans, ELSEWHERE, draw)]
        damages += [*zeroed_pages(content, 2), *truncations(content, 4, draw), *garbage(content, 2, draw)]
        for damage in damages:
            shutil.rmtree(out)
            shutil.copytree(state, out)
            path.write_bytes(damage.change(content))
            restart = start_again(peer, out, work)
            yield f"{damage} of {path.name}", what_became(restart, expected, saved=STEPS - 2 if has_older else 1)


def killed_before_last_save(peer: Peer, out: Path, work: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    operations = operations_of(lambda: peer.train(out), out, work)
    starts = [each for each in operations if is_start_of_save(each)]
    shutil.rmtree(out)
    disturbed(lambda: peer.train(out), Pair(starts[-1], "kill"), out, work)


def is_start_of_save(operation: Operation) -> bool:
    return operation.kind == ("create" if operation.role == "ckpt.pt" else "mkdir") and operation.role != "."


def measure(peer: Peer, work: Path, count: int) -> dict[str, Any]:
    started, out = time.monotonic(), work / "case" / "out"
    work.mkdir(parents=True)
    whole = result_of(start_again(peer, out, work).ended)
    assert whole, f"{peer.name} does not train here"
    killed_before_last_save(peer, out, work)
    resumed = start_again(peer, out, work)
    assert resumed.began == STEPS - 1, resumed
    found: dict[str, Any] = {"resumes exactly where nothing went wrong": result_of(resumed.ended) == whole}
    for what, cases in (
        ("faults", list(faults_of(peer, out, work, whole, count))),
        ("damage", list(damages_of(peer, out, work, whole))),
    ):
        found[what] = {"cases": len(cases), **Counter(name for _, names in cases for name in names)}
        if what == "faults":
            without_power = [names for case, names in cases if not case.startswith("power cut")]
            found["faults but power cuts"] = {
                "cases": len(without_power),
                **Counter(name for names in without_power for name in names),
            }
        found[f"examples of {what}"] = examples(cases)
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def examples(cases: list[tuple[str, list[str]]], each: int = 3) -> dict[str, list[str]]:
    shown: dict[str, list[str]] = {}
    for case, names in cases:
        for name in names:
            shown.setdefault(name, []).append(case)
    return {name: found[:each] for name, found in shown.items()}


def main(argv: list[str]) -> None:
    settings = load_settings(PeersBenchmark, argv).settings
    if settings.python is not None and os.path.abspath(settings.python) != sys.executable:
        rest = [word for word in argv if not word.startswith("--python=")]
        raise SystemExit(subprocess.run([settings.python, __file__, *rest], check=False).returncode)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    try:
        import transformers

        for name in ("torch._dynamo", "trl", "trl.trainer.sft_trainer"):  # children are forked with all of it
            importlib.import_module(name)
    except ImportError as error:
        print(f"skipped: {error.name} is not installed here; name an environment that has it with --python")
        return
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    chosen = [peer for peer in PEERS if not settings.only or peer.name in settings.only]
    if not chosen:
        raise UserError(f"only: names of {', '.join(peer.name for peer in PEERS)}")
    write_through_python()
    report: dict[str, Any] = {
        "command": " ".join(["PYTHONPATH=. OMP_NUM_THREADS=1 python bench/faults_peers.py", *argv]),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "datasets", "safetensors")},
        "steps": STEPS,
        "savers": {},
    }
    for peer in chosen:
        with tempfile.TemporaryDirectory() as folder:
            report["savers"][peer.name] = found = measure(peer, Path(folder) / "work", settings.pairs)
        print(peer.name, json.dumps(found, indent=1), flush=True)
    Path(settings.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
