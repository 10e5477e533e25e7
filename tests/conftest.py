import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of other people's data and expected results; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("SFT_SHARED") or ROOT.parent / "shared")
    if not (folder / "oracles").is_dir():
        pytest.skip(f"no expected results at {folder}; set SFT_SHARED")
    return folder
