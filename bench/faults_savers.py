"""Other trainers, in small: Hugging Face's Trainer, TRL's SFTTrainer, and nanoGPT's way, as their users have them.

Their C++ and Rust cannot be watched. So torch.save and safetensors' save_file are brought to make their bytes in memory
and write them through Python, by the calls that strace shows for them: torch.save opens the very name and writes some
pieces; save_file writes a temporary file in one piece and renames it. Neither calls fsync.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

STEPS = 4  # a checkpoint after each
PIECES = 4  # in which torch.save writes a small file
# what a saver says: the step that it went on from, each save that is done, and digests of weights and optimizer
BEGAN, SAVED = re.compile(r"^began (\d+)$", re.MULTILINE), re.compile(r"^saved (\d+)$", re.MULTILINE)
RESULT = re.compile(r"^result (\S+) (\S+)$", re.MULTILINE)


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

    torch.save = through_python(torch.save)
    safetensors.torch.save_file = transformers.modeling_utils.safe_save_file = save_file_through_python


def through_python(save: Callable[..., None]) -> Callable[..., None]:
    """torch.save, with its file written by Python."""

    def save_through_python(content: Any, file: Any, *arguments: Any, **options: Any) -> None:
        if not isinstance(file, (str, os.PathLike)):
            return save(content, file, *arguments, **options)
        buffer = io.BytesIO()
        save(content, buffer, *arguments, **options)
        data = buffer.getbuffer()
        with open(file, "wb", buffering=0) as written:
            for i in range(PIECES):
                written.write(data[i * len(data) // PIECES : (i + 1) * len(data) // PIECES])
        return None

    return save_through_python


def save_file_through_python(tensors: Any, filename: Any, metadata: Any = None) -> None:
    import safetensors.torch

    data, partial = safetensors.torch.save(tensors, metadata), Path(filename).with_name(".tmp")
    try:
        with open(partial, "w+b", buffering=0) as written:
            os.ftruncate(written.fileno(), len(data))
            written.write(data)
            os.rename(partial, filename)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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
