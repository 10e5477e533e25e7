"""Write the tables of settings into README.md, between their marks, from the programs' own dataclasses.

python tools/update_readme.py
"""

from __future__ import annotations

import re
from pathlib import Path

from prepare_sft import PrepareSettings
from sft.config import markdown_table
from sft.errors import UserError, run_program
from train_sft import TrainSettings

README = Path(__file__).resolve().parent.parent / "README.md"
TABLES = {cls.__name__: cls for cls in (PrepareSettings, TrainSettings)}


def with_tables(text: str) -> str:
    """The text with a fresh table between each `<!-- settings: NAME -->` and the `<!-- end -->` that follows it."""

    def fill(match: re.Match[str]) -> str:
        mark, name = match.group(1), match.group(2)
        if name not in TABLES:
            raise UserError(f"{README.name}: no table is called {name!r}; there are {', '.join(TABLES)}")
        return f"{mark}\n{markdown_table(TABLES[name])}\n<!-- end -->"

    return re.sub(r"(<!-- settings: (\w+) -->).*?<!-- end -->", fill, text, flags=re.DOTALL)


def main(argv: list[str]) -> None:
    if argv:
        raise UserError(f"no arguments are needed, not {' '.join(argv)}")
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
