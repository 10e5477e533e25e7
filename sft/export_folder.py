"""A folder that is whole or absent: filled under another name beside its own, forced to the disk, then renamed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sft.errors import EXIT_FAILED, UserError
from sft.files import partial_of, sync_folder

WRITTEN = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|chat_template\.jinja|README\.md|adapter_config\.json"
    r"|adapter_model\.safetensors|[\w.-]+\.partial"
)


def refuse_folder(out: Path, *, overwrite: bool) -> None:
    """UserError where an export to `out` would replace what is there, unless that is an earlier export and replacing
    it was asked for."""
    if not (out.exists() or out.is_symlink()):
        return
    if not out.is_dir() or out.is_symlink():
        raise UserError(f"{out}: is no folder; choose another one")
    names = sorted(os.listdir(out))
    if not names:
        return
    if not overwrite:
        raise UserError(f"{out}: is not empty; choose another folder, or replace an export with --overwrite")
    _refuse_foreign(out)


def _refuse_foreign(folder: Path) -> None:
    """UserError where a folder holds what is nobody's to delete."""
    names = sorted(os.listdir(folder)) if folder.exists() else []
    if odd := [name for name in names if not WRITTEN.fullmatch(name) or not (folder / name).is_file()]:
        raise UserError(f"{folder}: holds {odd[0]!r}, which no export writes; choose another folder")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends without an error; otherwise nothing is left of it.

    What was at `out` stays until then. An OSError becomes a UserError that names the place.
    """
    partial, old = partial_of(out), out.with_name(out.name + ".replaced")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in (partial, old):  # by a kill
            _refuse_foreign(left)
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            sync_folder(partial)
            if out.exists() and any(out.iterdir()):
                os.replace(out, old)
            os.replace(partial, out)
            sync_folder(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if old.exists() and not out.exists():
                os.replace(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        place = error.filename or out
        raise UserError(f"{place}: cannot be written ({error.strerror or error})", exit_status=EXIT_FAILED) from error
