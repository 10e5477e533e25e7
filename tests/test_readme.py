"""Every command of the README runs, on stand-ins of what it names and at a reduced size."""

import gzip
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import prepare_sft
from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from sft.tokenizer import load_tokenizer
from tests.conftest import ROOT, SHAPE
from tests.launch import torchrun
from tests.test_house import readme, readme_commands
from tests.tiny_tokenizer import save_tiny_tokenizer

pytestmark = pytest.mark.slow

SMALL = ["--max_iters=2", "--max_epochs=none", "--warmup_iters=1", "--eval_interval=1", "--log_interval=1"]
SMALL += ["--device=cpu", "--dtype=float32", "--compile=false"]
NAMED_LOG = "run_20250101_120000.json"


def conversations(name: str) -> list[dict[str, Any]]:
    return [
        {"question": f"what is the cat {n} of {name}", "answer": f"the cat sat on {n}", "meta": {"book": n // 4}}
        for n in range(40)
    ]


def write_conversations() -> None:
    """Every input that the commands name."""
    for name in ("conversations.jsonl", "first.jsonl"):
        Path(name).write_text("\n".join(map(json.dumps, conversations(name))))
    Path("second.json").write_text(json.dumps(conversations("second")))
    with gzip.open("more.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, conversations("more"))))
    Path("raw").mkdir()
    Path("raw/mixed.jsonl").write_text("\n".join(["this is not JSON", *map(json.dumps, conversations("raw"))]))


def write_table() -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"ask": record["question"], "reply": record["answer"]} for record in conversations("table")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), "table.parquet")


def save_base(path: Path, vocab_size: int) -> None:
    config = ModelArchitectureConfig.from_dict({**SHAPE, "vocab_size": vocab_size, "block_size": 2048})
    path.parent.mkdir(parents=True)
    torch.save({"model": ConfigurableGPT(config).state_dict(), "model_args": config.to_dict()}, path)


def save_published(folder: Path, vocab_size: int) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Qwen3Config(**shape, num_key_value_heads=1, head_dim=16, vocab_size=vocab_size)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A current folder with everything that the README's commands name."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    pytest.importorskip("datasketch")
    write_conversations()
    write_table()
    vocab_size = load_tokenizer(save_tiny_tokenizer(tmp_path)).vocab_size
    save_base(Path("out/qwen3-1.8b-base/ckpt.pt"), vocab_size)
    save_base(Path("out/demo-base/ckpt.pt"), vocab_size)
    save_published(Path("checkpoints/Qwen3-0.6B"), vocab_size)
    for out_dir in ("data/demo-sft", "data/sft-qwen3"):
        arguments = ["--input=conversations.jsonl", "--tokenizer=tokenizer.json", f"--out_dir={out_dir}"]
        prepare_sft.main([*arguments, "--block_size=64", "--val_fraction=0.2"])


def out_dir_of(argv: list[str]) -> Path:
    from sft.config import load_settings
    from train_sft import TrainSettings

    return Path(load_settings(TrainSettings, argv).settings.out_dir)


def train(command: list[str], argv: list[str]) -> None:
    """Run a training command with fewer steps and at most two processes; a plain start finds no out_dir."""
    resumes = any(word.startswith("--resume") for word in argv)
    argv = [*argv, *SMALL, *(["--max_iters=3", "--lr_decay_iters=2"] if resumes else [])]
    out_dir = out_dir_of(argv)
    if not resumes:
        shutil.rmtree(out_dir, ignore_errors=True)
    if command[0] == "torchrun":
        torchrun(2, ROOT / "train_sft.py", *argv, cwd=Path.cwd())
    else:
        importlib.import_module("train_sft").main(argv)
    if "--dry_run" in argv:
        assert not out_dir.exists()
        return
    log = max(out_dir.glob("run_*.json"), key=lambda path: path.stat().st_mtime)
    assert json.loads(log.read_text())["status"] == "finished"
    if not (out_dir / NAMED_LOG).exists():
        shutil.copyfile(log, out_dir / NAMED_LOG)
    for name in ("mine", "a", "b"):  # for chat, exports and averages
        shutil.copytree(out_dir, f"out/{name}", dirs_exist_ok=True)


def run(command: list[str]) -> None:
    script = next(place for place, word in enumerate(command) if word.endswith(".py"))
    argv = command[script + 1 :]
    if command[script] == "train_sft.py":
        train(command, argv)
        return
    if command[script] in ("tools/verify_resume.py", "tools/show_step.py"):
        argv = [*argv, *(each for each in SMALL if not each.startswith(("--max_iters", "--log_interval")))]
        argv.append("--max_iters=12")
    if command[script] == "tools/average_checkpoints.py":
        argv = ["--last=1" if word == "--last=3" else word for word in argv]
    if command[script] == "tools/chat.py":
        argv = [*argv, "--prompt=what is the cat", "--max_new_tokens=8"]
    importlib.import_module(command[script].removesuffix(".py").replace("/", ".")).main(argv)


@pytest.mark.usefixtures("workplace")
def test_the_pipes_of_the_readme_run():
    pipes = re.findall(r"^zcat .* \| python .*$", readme(), flags=re.MULTILINE)
    assert pipes
    for pipe in pipes:
        here = pipe.replace("python prepare_sft.py", f"{sys.executable} {ROOT / 'prepare_sft.py'}")
        subprocess.run(["bash", "-euo", "pipefail", "-c", here], check=True, timeout=120)
        meta = json.loads(Path("data/mixed/meta.json").read_text())
        sources = {source["path"]: (source["weight"], source["records"]) for source in meta["sources"]}
        assert sources == {"first.jsonl": (0.7, 40), "second.json": (2.0, 40), "standard input": (1.0, 40)}


@pytest.mark.usefixtures("workplace")
def test_the_commands_of_the_readme_run_in_their_order():
    """One test, since each command builds on those before it."""
    for command in readme_commands():
        if command[0] != "make":
            print("$", *command)
            run(command)
    (block,) = re.findall(r"^```python\n(.*?)^```", readme(), flags=re.DOTALL | re.MULTILINE)
    names: dict = {"ids": torch.zeros(1, 3, dtype=torch.long)}
    exec(block, names)
    assert names["logits"].shape == (1, 3, names["model"].vocab_size)
