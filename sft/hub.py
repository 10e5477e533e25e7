"""Models and tokenizers by their names on the Hugging Face hub: owner/name, or owner/name@revision."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from sft.errors import UserError

NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(@[\w./-]+)?", re.ASCII)
OF_FILES = (".pt", ".json", ".tiktoken", ".safetensors", ".jinja")  # no repository's name ends so
TOKENIZER_FILES = ("*.json", "*.tiktoken", "*.jinja", "merges.txt")  # JSON is the config's, the weights' index, too
MODEL_FILES = ("*.safetensors", *TOKENIZER_FILES)
# In sub-folders are the same weights for other programs, and so they are in Mistral's consolidated files.
ELSEWHERE = ("*/*", "consolidated*")
COMMIT = re.compile(r"[0-9a-f]{40}")
LONGEST_REASON = 200  # characters


def is_name(text: str) -> bool:
    """Whether a setting names a repository: owner/name, unless something of that path, or a folder `owner`, is here."""
    path, owner = text.partition("@")[0], text.partition("/")[0]
    looks_so = NAME.fullmatch(text) is not None and not path.endswith(OF_FILES)
    return looks_so and not os.path.lexists(text) and not os.path.isdir(owner)


def fetch(text: str, *, setting: str, files: Sequence[str], only_cached: bool = False) -> Path:
    """The folder of a repository in the hub's cache, fetched as far as it is not there; progress is shown on stderr.

    `setting` is what names it. Raises UserError with what to do where the hub cannot be reached.
    """
    name, _, revision = text.partition("@")
    try:
        import huggingface_hub
    except ImportError as error:
        remedy = "install it with: pip install 'huggingface_hub>=0.34' (the extra `hub`)"
        raise unreachable(text, setting, f"huggingface_hub is not installed; {remedy}") from error
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=list(files),
            ignore_patterns=list(ELSEWHERE),
            local_files_only=only_cached,
        )
    except Exception as error:  # of whatever library brings the bytes
        raise unreachable(text, setting, reason_of(error)) from error
    return Path(folder)


def local(text: str, *, setting: str, files: Sequence[str]) -> Path:
    """The path that a setting names: of something here, or of what was fetched from the hub."""
    return fetch(text, setting=setting, files=files) if is_name(text) else Path(text)


def reason_of(error: Exception) -> str:
    """Why something cannot be fetched, in words; errors of a kind are known by their names."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "RevisionNotFoundError" in kinds:
        return "it has no such revision"
    if kinds & {"RepositoryNotFoundError", "GatedRepoError"}:
        return "it is not there, or asks for a login: accept its terms on the hub, then run hf auth login"
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return first if len(first) <= LONGEST_REASON else f"{first[: LONGEST_REASON - 3]}..."


def unreachable(text: str, setting: str, reason: str) -> UserError:
    name, _, revision = text.partition("@")
    folder = name.rpartition("/")[2]
    command = f"hf download {name}{f' --revision {revision}' if revision else ''} --local-dir {folder}"
    return UserError(
        f"{setting} {text!r}: there is no such file or folder here, and from the Hugging Face hub it cannot be fetched "
        f"({reason}). Where the hub can be reached, run: {command}; copy the folder {folder} to this machine, and "
        "give its path instead"
    )


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache holds; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name) else None


def pinned(text: str, folder: Path) -> str:
    """The same name with the commit that was fetched, which stays the same model for good."""
    commit = commit_of(folder)
    return text if commit is None else f"{text.partition('@')[0]}@{commit}"
