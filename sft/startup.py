"""What a run makes sure of before its first step: data to train on, a folder to write, a checkpoint that fits."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from sft import ledger
from sft.arrays import AGAIN, PreparedData, damaged_files, open_prepared
from sft.checkpoint import newest_checkpoint, numbered_checkpoints, read_checkpoint
from sft.continuity import differences
from sft.errors import EXIT_BAD_INPUT, UserError, listed, status_of
from sft.files import copy_whole, remove_partials, write_whole
from sft.out_dir_lock import OutDirLock
from sft.pretrained import checkpoint_file, is_model_folder
from sft.progress import Totals
from sft.tokenizer import load_tokenizer

ResumeChoice = Literal["auto", "never", "required"]
PROBE = ".write_probe"
TOKENIZERS = ("tokenizer.json", "*.tiktoken")
LONG_SECONDS = 5.0  # after which a check says what it has taken
NEEDED_TO_RESUME = (
    *("optimizer", "iter_num", "rows_seen", "trained_tokens_seen", "val_loss", "best_val_loss"),
    *("config", "data_fingerprint", "progress"),
)


def _counts(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_loss(value: Any) -> bool:
    return value is None or type(value) is float


# What a checkpoint may tell of how far it came. A sealed file with anything else was made by hand.
SOUND: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("iter_num", "rows_seen", "trained_tokens_seen"), _counts),
    **dict.fromkeys(("val_loss", "best_val_loss"), _is_loss),
    **dict.fromkeys(("optimizer", "config", "watch"), lambda value: isinstance(value, dict)),
    "progress": lambda value: isinstance(value, dict) and value.keys() <= {each.name for each in fields(Totals)},
    "order": lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None,
}


def open_training_data(
    folder: str, *, block_size: int, proves: bool = True, say: Callable[[str], None] = print
) -> PreparedData:
    """The prepared data of a folder; UserError where a run with this block_size could not train on all of it.

    `proves`: refuse it also where its checksums, its ledger or its audit do not prove it. One rank is enough, since
    that reads all of it; `say` how long that took, where it took long.
    """
    data = open_prepared(folder)
    problems = unproved(data, say=say) if proves else []
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


def unproved(data: PreparedData, *, say: Callable[[str], None]) -> list[str]:
    """What is wrong with the bytes of prepared data, and with the account that it gives of them."""
    started = time.monotonic()
    with ThreadPoolExecutor(1) as beside:
        damaged = beside.submit(damaged_files, data)
        problems = ledger.problems(data.meta, data.splits)
        problems = [*(f"{problem}; {AGAIN}" for problem in damaged.result()), *problems]
    if (seconds := time.monotonic() - started) > LONG_SECONDS:
        size = sum((data.folder / name).stat().st_size for name in data.meta["arrays"]) / 1e9
        say(f"data     {seconds:.0f} s to verify {size:.1f} GB of prepared data, {seconds / size:.2f} s a GB")
    return problems


def enter_out_dir(lock: OutDirLock, *, say: Callable[[str], None], writes: bool = True) -> None:
    """Take the lock of out_dir; UserError where another run has it. Without `writes`, only say so.

    Where out_dir cannot be written at all, prepare_out_dir will tell, beside what else is wrong.
    """
    if writes:
        with contextlib.suppress(OSError):
            lock.take(say=say)
    elif holder := lock.holder():
        say(f"lock      a run is at work in {lock.out_dir}: {holder}")


def prepare_out_dir(
    lock: OutDirLock, *, resume: ResumeChoice, say: Callable[[str], None] = print, writes: bool = True
) -> Path | None:
    """Try writing to out_dir, which is locked and made, and find the checkpoint to go on from (None = a fresh start).

    Without `writes` everything stays as it is, and what can be seen from outside is refused all the same.
    """
    out_dir = lock.out_dir
    try:
        if writes:
            lock.take(say=say)
            probe_writing(out_dir)
            remove_partials(out_dir, "ckpt*.pt", *TOKENIZERS, PROBE)
        else:
            _refuse_unwritable(out_dir)
    except OSError as error:
        remedy = "choose another --out_dir" if status_of(error) == EXIT_BAD_INPUT else "make room, or repair it"
        sentence = f"out_dir {out_dir}: cannot be written ({error.strerror}); {remedy}"
        raise UserError(sentence, exit_status=status_of(error)) from error
    numbered = [path for _, path in numbered_checkpoints(out_dir)]
    others = sorted(path.name for path in out_dir.glob("ckpt*.pt") if path not in numbered)
    if resume == "never" and numbered:
        raise UserError(
            f"out_dir {out_dir} already holds checkpoints, the newest is {numbered[0].name}; go on from it with "
            "--resume=auto, choose another --out_dir, or remove the old run"
        )
    found = newest_checkpoint(out_dir, warn=say, sets_aside=writes) if resume != "never" else None
    if found is None and others:
        raise UserError(f"out_dir {out_dir} holds {', '.join(others)} of another run; choose another --out_dir")
    if found is None and resume == "required":
        raise UserError(f"out_dir {out_dir} holds no checkpoint to resume from; --resume=auto starts afresh")
    return found


def probe_writing(folder: Path) -> None:
    """Do once what every save does, with a small file; OSError where that cannot be done."""
    probe = folder / PROBE
    try:
        write_whole(probe, lambda file: file.write(bytes(4096)))
    finally:
        probe.unlink(missing_ok=True)


def _refuse_unwritable(folder: Path) -> None:
    """Raise OSError where a folder could not be made or written, as far as permissions tell."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def read_saved_state(path: Path) -> dict[str, Any]:
    """The checkpoint to resume from, which newest_checkpoint has verified; UserError where it lacks what that needs."""
    saved = read_checkpoint(path, verify=False)
    if missing := [key for key in NEEDED_TO_RESUME if key not in saved]:
        kind = "an average of checkpoints, which " if "averaged" in saved else ""
        raise UserError(
            f"{path}: {kind}has no {', '.join(missing)}, so it cannot be resumed; start from it with "
            f"--checkpoint_path={path}"
        )
    if odd := [key for key, is_sound in SOUND.items() if key in saved and not is_sound(saved[key])]:
        raise UserError(f"{path}: its {', '.join(odd)} cannot be understood; use an earlier checkpoint")
    return saved


def refuse_another_run(path: Path, saved: Mapping[str, Any], settings: Any, identity: Mapping[str, Any]) -> None:
    """Raise UserError where this run would not be the continuation of the one that wrote the checkpoint.

    `identity` is this run's, see sft/continuity.py; settings.allow_change names what may differ.
    """
    if problems := list(differences(saved, settings, identity, allowed=settings.allow_change)):
        problems.append("what is meant to change: --allow_change=NAME,NAME (the names before the colons)")
        raise listed(f"{path}: cannot be resumed, since it would not be the same run:", problems)


def refuse_other_tokenizer(source: Path | None, data: PreparedData, *, allowed: Collection[str] = ()) -> None:
    """Raise UserError where a checkpoint or a folder, if there is one, tells of another tokenizer than the data's."""
    theirs = None
    if source is None or "tokenizer" in allowed:
        return
    if not is_model_folder(source):
        theirs = read_checkpoint(checkpoint_file(source), verify=False).get("tokenizer_fingerprint")
    elif (source / "tokenizer.json").is_file():
        theirs = load_tokenizer(source).fingerprint
    ours = data.meta["tokenizer_fingerprint"]
    if theirs not in (None, ours):
        raise UserError(
            f"{data.folder}: prepared with another tokenizer ({ours[:12]}) than {source} was trained with "
            f"({str(theirs)[:12]}); prepare it again with the tokenizer files beside that checkpoint, or say that the "
            "change is meant: --allow_change=tokenizer"
        )


def refuse_swapped_tokenizer(data: PreparedData) -> None:
    """Raise UserError where the tokenizer in the folder of prepared data, which a run copies, did not prepare it."""
    found, told = load_tokenizer(data.folder).fingerprint, data.meta["tokenizer_fingerprint"]
    if found != told:
        raise UserError(
            f"{data.folder}: its tokenizer is not the one that it was prepared with ({found[:12]}, not {told[:12]}); "
            f"{AGAIN}"
        )


def refuse_to_grow(model: Any, resume_path: Path | None, data: PreparedData) -> None:
    """Raise UserError where a resumed model is too small for the data: moments of the optimizer cannot grow."""
    needed = data.meta["vocab_size"]
    if resume_path is not None and model.vocab_size < needed:
        raise UserError(
            f"tokenizer: {data.folder} has {needed:,} ids, the model of {resume_path} has {model.vocab_size:,}; a "
            f"resumed run cannot grow: begin one in another --out_dir from it, with --checkpoint_path={resume_path}"
        )


def refuse_foreign_tokenizer(data: PreparedData, out_dir: Path, *, resumes: bool) -> None:
    """Raise UserError where copy_tokenizer would replace the tokenizer of another run than the one that it resumes."""
    if resumes:
        return
    if foreign := [path for path in tokenizer_files(out_dir) if not _is_copy(path, data.folder / path.name)]:
        raise UserError(f"{foreign[0]}: another tokenizer than that of {data.folder}; choose another --out_dir")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a vocabulary in a folder."""
    return [path for pattern in TOKENIZERS for path in folder.glob(pattern)]


def copy_tokenizer(data: PreparedData, out_dir: Path) -> None:
    """Put the tokenizer's files beside the checkpoints, where chat and export look for them; each whole or absent.

    Of a run that goes on with another tokenizer, the files of the old one are removed.
    """
    for path in tokenizer_files(out_dir):
        if path.name not in data.meta["tokenizer_files"]:
            path.unlink(missing_ok=True)
    for name in data.meta["tokenizer_files"]:
        try:
            if not _is_copy(out_dir / name, data.folder / name):
                copy_whole(data.folder / name, out_dir / name)
        except OSError as error:
            sentence = f"{data.folder / name}: cannot be copied to {out_dir} ({error.strerror})"
            raise UserError(sentence, exit_status=status_of(error)) from error


def _is_copy(path: Path, original: Path) -> bool:
    return path.exists() and original.exists() and filecmp.cmp(path, original, shallow=False)
