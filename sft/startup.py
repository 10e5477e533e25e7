"""What a run makes sure of before its first step: data to train on, a folder to write, a checkpoint that fits."""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sft import ledger
from sft.arrays import PreparedData, open_prepared
from sft.checkpoint import newest_checkpoint, numbered_checkpoints, read_checkpoint, remove_partial_files
from sft.continuity import differences
from sft.errors import UserError, listed
from sft.pretrained import checkpoint_file, is_hugging_face_folder
from sft.tokenizer import load_tokenizer

ResumeChoice = Literal["auto", "never", "required"]
NEEDED_TO_RESUME = (
    *("optimizer", "iter_num", "rows_seen", "trained_tokens_seen", "val_loss", "best_val_loss"),
    *("config", "data_fingerprint", "progress"),
)


def open_training_data(folder: str, *, block_size: int, proves: bool = True) -> PreparedData:
    """The prepared data of a folder; UserError where a run with this block_size could not train on all of it.

    `proves`: refuse it also where its ledger or its audit does not prove it. One rank is enough, since that reads all
    labels.
    """
    data = open_prepared(folder)
    problems = ledger.problems(data.meta, data.splits) if proves else []
    if data.meta["max_id"] >= data.meta["vocab_size"]:
        problems.append(
            f"it holds id {data.meta['max_id']}, outside its vocabulary of {data.meta['vocab_size']}; prepare it again"
        )
    if len(data.splits["train"]) == 0:
        problems.append("the train split is empty; prepare more conversations")
    for name, split in data.splits.items():
        if len(split) and not split.targets.min() > 0:
            problems.append(f"{name} holds samples without a trained token; prepare it again")
        if len(split) and (longest := int(split.lengths.max())) > block_size:
            problems.append(
                f"the longest sample of {name} has {longest} tokens, block_size is {block_size}; raise block_size, or "
                "prepare again with a smaller --block_size"
            )
    if problems:
        raise listed(f"{folder}: this run cannot use it:", problems)
    return data


def prepare_out_dir(out_dir: Path, *, resume: ResumeChoice, writes: bool = True) -> Path | None:
    """Make out_dir, try writing to it, and find the checkpoint to go on from (None = a fresh start).

    Without `writes` everything stays as it is, and what can be seen from outside is refused all the same.
    """
    try:
        if writes:
            out_dir.mkdir(parents=True, exist_ok=True)
            probe = out_dir / ".write_probe"
            probe.write_bytes(b"")
            probe.unlink()
            remove_partial_files(out_dir)
        else:
            _refuse_unwritable(out_dir)
    except OSError as error:
        raise UserError(f"out_dir {out_dir}: cannot be written ({error.strerror}); choose another --out_dir") from error
    numbered = [path for _, path in numbered_checkpoints(out_dir)]
    if resume == "never" and numbered:
        raise UserError(
            f"out_dir {out_dir} already holds checkpoints, the newest is {numbered[0].name}; go on from it with "
            "--resume=auto, choose another --out_dir, or remove the old run"
        )
    if not numbered and (others := sorted(path.name for path in out_dir.glob("ckpt*.pt"))):
        raise UserError(f"out_dir {out_dir} holds {', '.join(others)} of another run; choose another --out_dir")
    if not numbered and resume == "required":
        raise UserError(f"out_dir {out_dir} holds no checkpoint to resume from; --resume=auto starts afresh")
    return newest_checkpoint(out_dir, warn=lambda line: print(line, flush=True)) if numbered else None


def _refuse_unwritable(folder: Path) -> None:
    """Raise OSError where a folder could not be made or written, as far as permissions tell."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def read_saved_state(path: Path) -> dict[str, Any]:
    """The checkpoint to resume from; UserError where it lacks what that needs."""
    saved = read_checkpoint(path)
    if missing := [key for key in NEEDED_TO_RESUME if key not in saved]:
        raise UserError(
            f"{path}: has no {', '.join(missing)}, so it cannot be resumed; start from it with --checkpoint_path={path}"
        )
    if odd := [key for key in ("optimizer", "config", "progress") if not isinstance(saved[key], dict)]:
        raise UserError(f"{path}: its {', '.join(odd)} cannot be understood; use an earlier checkpoint")
    return saved


def refuse_another_run(path: Path, saved: Mapping[str, Any], settings: Any, identity: Mapping[str, Any]) -> None:
    """Raise UserError where this run would not be the continuation of the one that wrote the checkpoint.

    `identity` is this run's, see sft/continuity.py; settings.allow_change names what may differ.
    """
    if problems := list(differences(saved, settings, identity, allowed=settings.allow_change)):
        problems.append("what is meant to change: --allow_change=NAME,NAME (the names before the colons)")
        raise listed(f"{path}: cannot be resumed, since it would not be the same run:", problems)


def refuse_other_tokenizer(source: Path, data: PreparedData) -> None:
    """Raise UserError where a checkpoint or a folder tells of another tokenizer than the data's."""
    theirs = None
    if not is_hugging_face_folder(source):
        theirs = read_checkpoint(checkpoint_file(source)).get("tokenizer_fingerprint")
    elif (source / "tokenizer.json").is_file():
        theirs = load_tokenizer(source).fingerprint
    ours = data.meta["tokenizer_fingerprint"]
    if theirs not in (None, ours):
        raise UserError(
            f"{data.folder}: prepared with another tokenizer ({ours[:12]}) than {source} was trained with "
            f"({str(theirs)[:12]}); prepare it again with the tokenizer files beside that checkpoint"
        )


def copy_tokenizer(data: PreparedData, out_dir: Path, *, resumes: bool, writes: bool = True) -> None:
    """Put the tokenizer's files beside the checkpoints, where chat and export look for them.

    Raises UserError where that would replace somebody else's.
    """
    found = [path for path in (out_dir / "tokenizer.json", *out_dir.glob("*.tiktoken")) if path.exists()]
    foreign = [path for path in found if not _is_copy(path, data.folder / path.name)]
    if foreign and not resumes:
        raise UserError(f"{foreign[0]}: another tokenizer than that of {data.folder}; choose another --out_dir")
    for name in data.meta["tokenizer_files"] if writes else ():
        try:
            if not _is_copy(out_dir / name, data.folder / name):
                shutil.copyfile(data.folder / name, out_dir / name)
        except OSError as error:
            raise UserError(f"{data.folder / name}: cannot be copied to {out_dir} ({error.strerror})") from error


def _is_copy(path: Path, original: Path) -> bool:
    return path.exists() and original.exists() and filecmp.cmp(path, original, shallow=False)
