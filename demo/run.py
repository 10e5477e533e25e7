"""The whole pipeline on a small world: write it, read it, learn to answer, and judge the answers.

python -m demo.run [--name=value ...]
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from demo.materials import Materials, write_lines, write_materials
from demo.score import Report, examine, messages, missed_marks, say, table
from demo.world import KINDS, Exchange
from model_builder import ConfigurableGPT, load_pretrained
from sft.chatml import prompt_ids
from sft.config import load_settings
from sft.conversation import Message
from sft.errors import EXIT_FAILED, UserError, listed, run_program
from sft.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CURVES = (("training", "training_iterations", "loss"), ("validation", "eval_steps", "val_loss"))
MADE_HERE = ".made_by_demo"  # in every folder that the demo may delete


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    folder: str = str(ROOT)  # data/demo*, out/demo and out/demo-base are made in it
    seed: int = 0  # of the island and all that is written and asked about it
    papers: int = 20_000  # texts for the base model
    per_kind: int = 1500  # conversations of each of the four kinds for fine-tuning
    held_out_per_kind: int = 100  # and for the examination
    processes: int = 2  # ranks that train
    base_steps: int | None = None  # None = as configs/demo_base.py says
    sft_steps: int | None = None  # None = as configs/sft_demo.py says


@dataclass(frozen=True)
class Folders:
    """Where the demo writes, below DemoSettings.folder; the two configs name the same places."""

    root: Path

    @property
    def raw(self) -> Path:
        return self.root / "data/demo"

    @property
    def base_data(self) -> Path:
        return self.root / "data/demo-base"

    @property
    def sft_data(self) -> Path:
        return self.root / "data/demo-sft"

    @property
    def base(self) -> Path:
        return self.root / "out/demo-base"

    @property
    def tuned(self) -> Path:
        return self.root / "out/demo"

    def all(self) -> list[Path]:
        return [self.raw, self.base_data, self.sft_data, self.base, self.tuned]


class Phases:
    """Announces each phase, and knows how long each took."""

    def __init__(self) -> None:
        self.began = self.started = time.perf_counter()
        self.current: str | None = None
        self.seconds: dict[str, float] = {}

    def begin(self, name: str) -> None:
        self.end()
        self.current, self.started = name, time.perf_counter()
        print(f"\n=== {name}", flush=True)

    def end(self) -> None:
        if self.current is not None:
            self.seconds[self.current] = time.perf_counter() - self.started
        self.current = None

    def summary(self) -> str:
        self.end()
        total = time.perf_counter() - self.began
        return "\n".join(f"{name:<60}{seconds:>7.1f} s" for name, seconds in [*self.seconds.items(), ("total", total)])


def main(argv: list[str]) -> None:
    settings = load_settings(DemoSettings, argv, usage="python -m demo.run [--name=value ...]").settings
    if find_spec("matplotlib") is None:
        raise UserError("the demo draws its loss curve with matplotlib: pip install -e '.[report]'")
    folders = Folders(Path(settings.folder).resolve())
    make_clean(folders)
    phases = Phases()

    phases.begin("the island of Little Wicket: papers, conversations and a tokenizer")
    materials = write_materials(
        folders.raw,
        seed=settings.seed,
        paper_count=settings.papers,
        per_kind=settings.per_kind,
        held_out_per_kind=settings.held_out_per_kind,
    )
    print(introduction(materials))
    phases.begin("a base model reads the papers")
    prepare({materials.papers: 1}, materials, folders.base_data, folders)
    train("configs/demo_base.py", folders.base, settings.base_steps, settings, folders)
    phases.begin("fine-tuning teaches it to answer")
    spoken = {materials.training: 1, materials.recall: materials.recall_weight}
    prepare(spoken, materials, folders.sft_data, folders)
    train("configs/sft_demo.py", folders.tuned, settings.sft_steps, settings, folders)
    phases.begin("the examination: questions on what fine-tuning never mentioned")
    base, tuned = examination(materials.questions, folders)
    draw_losses([folders.base, folders.tuned], folders.tuned / "loss.png")
    phases.end()
    results = {
        "command": "make demo",
        **machine(),
        "seconds": phases.seconds,
        "base": base.shares(),
        "tuned": tuned.shares(),
    }
    (folders.tuned / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    print(f"\n{phases.summary()}\n\nwritten to {folders.root}:\n{written(folders)}")
    if missed := missed_marks(base, tuned):
        raise UserError(str(listed("the demo misses its marks:", missed)), exit_status=EXIT_FAILED)
    print("\nAll marks are reached. Talk to it: python tools/chat.py out/demo/ckpt.pt")


def make_clean(folders: Folders) -> None:
    """New, empty folders; those of an earlier demo go, and anything else in their place is an error."""
    foreign = [str(path) for path in folders.all() if path.exists() and not (path / MADE_HERE).exists()]
    if foreign:
        raise listed("the demo would replace what it has not made; move it away first:", foreign)
    for path in folders.all():
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        (path / MADE_HERE).touch()


def introduction(materials: Materials) -> str:
    """What the world looks like, by example."""
    with open(materials.papers, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(4), strict=False)]
    counted = (materials.papers, materials.training, materials.recall)
    papers, training, recall = (len(path.read_bytes().splitlines()) for path in counted)
    first = next(question for question in materials.questions if question.kind == "recall")
    return "\n".join(
        [
            f"{papers:,} papers to read, {training + recall:,} conversations to learn from, "
            f"{len(materials.questions)} held-out ones to be examined on. Some papers:",
            *(f"  | {' / '.join(text.splitlines())}" for text in texts),
            f"and a held-out question: {first.turns[0]} {first.answer}",
        ]
    )


def prepare(weights: Mapping[Path, float], materials: Materials, out_dir: Path, folders: Folders) -> None:
    """prepare_sft.py on files and how often each is seen per pass."""
    sources = (f"{path.relative_to(folders.root)}:{weight}" for path, weight in weights.items())
    words = [
        f"--input={','.join(sources)}",
        f"--tokenizer={materials.tokenizer.relative_to(folders.root)}",
        f"--out_dir={out_dir.relative_to(folders.root)}",
    ]
    call([sys.executable, program("prepare_sft.py", folders), *words, "--block_size=256"], folders)


def train(config: str, out_dir: Path, steps: int | None, settings: DemoSettings, folders: Folders) -> None:
    """The trainer under torchrun. The demo's own out_dir leaves the config's free for whoever tries it by hand."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [
        program("train_sft.py", folders),
        program(config, folders),
        f"--out_dir={out_dir.relative_to(folders.root)}",
        "--device=cpu",  # several processes cannot share the one GPU that a laptop may have
    ]
    if steps is not None:
        words.append(f"--max_iters={steps}")
    call([*launcher, f"--nproc_per_node={settings.processes}", *words], folders)


def program(name: str, folders: Folders) -> str:
    return name if folders.root == ROOT else str(ROOT / name)


def call(command: Sequence[str], folders: Folders) -> None:
    """Run one of the project's programs and show what it prints; UserError where it fails."""
    print("$", *("python", *command[1:]), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a core for each rank
    finished = subprocess.run(command, cwd=folders.root, env=environment, check=False)
    if finished.returncode != 0:
        raise UserError(f"{' '.join(command[1:])} ended with status {finished.returncode}", exit_status=EXIT_FAILED)


def examination(questions: list[Exchange], folders: Folders) -> tuple[Report, Report]:
    """Both models answer the same questions; prints the table and a dialogue of each kind, writes all answers down."""
    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = load_tokenizer(folders.tuned)
    models = {"base": load_pretrained(folders.base / "ckpt.pt"), "tuned": load_pretrained(folders.tuned / "ckpt.pt")}
    base, tuned = (examine(model, tokenizer, questions) for model in models.values())
    print(table(base, tuned))
    for kind in KINDS:
        print(f"\n{kind}\n{dialogue(models, tokenizer, next(q for q in questions if q.kind == kind))}")
    write_lines(
        folders.tuned / "answers.jsonl",
        (
            {"kind": b.exchange.kind, "messages": b.exchange.messages, "base": b.text, "tuned": t.text}
            for b, t in zip(base.answers, tuned.answers, strict=True)
        ),
    )
    return base, tuned


def dialogue(models: Mapping[str, ConfigurableGPT], tokenizer: Tokenizer, exchange: Exchange) -> str:
    """The exchange's questions, answered by each model itself from the first turn on."""
    lines, histories = [], {name: list[Message]() for name in models}
    for question in messages(exchange)[::2]:
        lines.append(f"{'you':>8} > {question.content}")
        for name, model in models.items():
            histories[name].append(question)
            (answer,) = say(model, tokenizer, [prompt_ids(histories[name], tokenizer)])
            text = tokenizer.decode(answer.ids)
            histories[name].append(Message("assistant", text))
            lines.append(
                f"{name:>8} > {' / '.join(text.splitlines())}{'' if answer.stopped else ' ... (goes on and on)'}"
            )
    return "\n".join(lines)


def machine() -> dict[str, str | int | None]:
    """What a measured figure has to be read with."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def draw_losses(run_folders: Sequence[Path], picture: Path) -> None:
    """Training and validation loss of each run side by side, read from their run logs."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(run_folders), figsize=(5 * len(run_folders), 3.5), layout="constrained")
    for panel, folder in zip(panels, run_folders, strict=True):
        log = json.loads(max(folder.glob("run_*.json")).read_text(encoding="utf-8"))
        for label, records, name in CURVES:
            panel.plot([r["iter"] for r in log[records]], [r[name] for r in log[records]], label=label, marker=".")
        panel.set(title=folder.name, xlabel="step", ylabel="loss per trained token")
        panel.legend()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def written(folders: Folders) -> str:
    purposes = {
        folders.raw: "papers, conversations, held-out questions, tokenizer",
        folders.base / "ckpt.pt": "the base model",
        folders.tuned / "ckpt.pt": "the fine-tuned model",
        folders.tuned / "answers.jsonl": "every held-out question and both models' answers",
        folders.tuned / "loss.png": "the loss curves",
        folders.tuned / "results.json": "the table above, for programs",
        max(folders.tuned.glob("run_*.json")): "the log of the fine-tuning run",
    }
    return "\n".join(f"  {path.relative_to(folders.root)!s:<40}{purpose}" for path, purpose in purposes.items())


if __name__ == "__main__":
    run_program(main)
