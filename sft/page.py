"""A self-contained web page: a template, and the data that its script shows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft.errors import UserError
from sft.files import write_whole


def as_json(value: Any) -> str:
    """ASCII without < > &, which therefore cannot end the element that holds it nor begin another."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def as_page(template: str, facts: Mapping[str, Any], parts: Sequence[str]) -> bytes:
    """The template with {"facts": facts, "parts": [...]} for PAGE-DATA and the hash of its script for SCRIPT-HASH.

    `parts` are results of `as_json`. Under a policy that allows that hash nothing but the template's own script runs.
    """
    head, script, tail = re.split(r"(?<=<script>)(.*)(?=</script>)", template, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    head = head.replace("SCRIPT-HASH", f"sha256-{digest}")
    head = head.replace("PAGE-DATA", f'{{"facts":{as_json(facts)},"parts":[{",".join(parts)}]}}')
    return (head + script + tail).encode()


def save_page(path: Path, page: bytes, *, mark: bytes) -> None:
    """Write the page whole or not at all; UserError where it cannot be, or would replace a file without the mark."""
    try:
        if path.exists() and not (path.is_file() and mark in path.read_bytes()[:1000]):
            raise UserError(f"{path}: was not written by this program and would be lost; choose another file")
        write_whole(path, lambda file: file.write(page))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another file") from error
