import json
import os
import random
from pathlib import Path

import pytest

import prepare_sft
from tests.tiny_tokenizer import save_tiny_tokenizer

try:
    import hypothesis
except ImportError:  # a machine that runs the tests of a GPU alone
    pass
else:
    hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no counterexample
    hypothesis.settings.load_profile("unhurried")

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "normalization": "rmsnorm", "position_encoding": "rope"}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of other people's data and expected results; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("SFT_SHARED") or ROOT.parent / "shared")
    if not (folder / "oracles").is_dir():
        pytest.skip(f"no expected results at {folder}; set SFT_SHARED")
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A prepared folder of 60 short conversations, 48 tokens at most."""
    return prepare(tmp_path_factory.mktemp("prepared"), conversations=60, val_fraction=0.2)


@pytest.fixture(scope="session")
def long_validation(tmp_path_factory) -> Path:
    """The same with 38 rows of 64 tokens for validation."""
    return prepare(tmp_path_factory.mktemp("long_validation"), conversations=300, val_fraction=0.4)


def prepare(folder: Path, *, conversations: int, val_fraction: float) -> Path:
    words = ["the", "cat", "and", "hat", "sat", "on", "mat", "Paris", "France", "capital", "what", "is", "of"]
    draw = random.Random(0)
    with open(folder / "conversations.jsonl", "w") as file:
        for _ in range(conversations):
            prompt, completion = (" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(2))
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    tokenizer = save_tiny_tokenizer(folder)
    prepare_sft.main(
        [
            f"--input={folder / 'conversations.jsonl'}",
            f"--tokenizer={tokenizer}",
            f"--out_dir={folder / 'data'}",
            "--block_size=64",
            f"--val_fraction={val_fraction}",
        ]
    )
    return folder / "data"


@pytest.fixture
def arguments(prepared, tmp_path):
    """Arguments of a short run from scratch, later ones winning over earlier ones."""

    def make(**changes: object) -> list[str]:
        settings = {
            "sft_data_dir": prepared,
            "out_dir": tmp_path / "out",
            "model": SHAPE,
            "block_size": 64,
            "batch_size": 1,
            "gradient_accumulation_steps": 2,
            "max_iters": 4,
            "learning_rate": 1e-2,
            "min_lr": 1e-3,
            "warmup_iters": 2,
            "eval_interval": 5,
            "log_interval": 1,
            "save_interval": 10,
            "device": "cpu",
        }
        return [f"--{name}={value}" for name, value in {**settings, **changes}.items()]

    return make
