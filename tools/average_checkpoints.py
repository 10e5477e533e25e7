"""Average checkpoints into one, that can be trained from and served.

python tools/average_checkpoints.py averaged.pt --last=3 --out_dir=out/mine
python tools/average_checkpoints.py soup.pt --checkpoints=a.pt:0.7,b.pt:0.3
python tools/average_checkpoints.py averaged/ckpt.pt --checkpoints=out/mine/ckpt_best.pt --weights=ema
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from sft.averaging import Member, mean_weights, open_member, parse_share, refuse_strangers, told
from sft.checkpoint import BEST, NUMBERED, numbered_checkpoints, write_checkpoint
from sft.config import load_settings
from sft.ema import Weights
from sft.errors import EXIT_FAILED, UserError, listed, run_program
from sft.files import copy_whole
from sft.startup import tokenizer_files
from sft.templates import JINJA_NAME

USAGE = "python tools/average_checkpoints.py OUT.pt [--name=value ...]"


@dataclass(frozen=True, kw_only=True)
class AverageSettings:
    """Which checkpoints, all of one architecture and one tokenizer, become one."""

    checkpoints: tuple[str, ...] = ()  # files or Hugging Face folders, each with its share of the mean: a.pt:2,b.pt:1
    last: int | None = None  # or the newest so many of the run in out_dir, with equal shares
    out_dir: str | None = None  # where last looks for them
    weights: Weights = "model"  # of each checkpoint: model = those that were trained, ema = their moving average

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if bool(self.checkpoints) == (self.last is not None):
            yield "checkpoints", "set checkpoints or last: one of the two"
        if (self.last is None) != (self.out_dir is None):
            yield "out_dir", "last and out_dir go together: the newest so many of that folder"
        if self.last is not None and self.last < 1:
            yield "last", f"last must be at least 1, not {self.last}"
        shares = []
        for text in self.checkpoints:
            try:
                shares.append(parse_share(text)[1])
            except ValueError as error:
                yield "checkpoints", str(error)
        if shares and not any(shares):
            yield "checkpoints", "the shares of the mean add up to 0; give one checkpoint a share above 0"


def main(argv: list[str]) -> None:
    is_help = bool({"--help", "-h"} & set(argv))
    if not is_help and (not argv or argv[0].startswith("--")):
        raise UserError(f"where to? {USAGE}")
    settings = load_settings(AverageSettings, argv if is_help else argv[1:], usage=USAGE).settings
    out = Path(argv[0])
    refuse_place(out)
    members = open_members(chosen(settings), settings.weights)
    architectures = [architecture(member) for member in members]
    refuse_strangers(members, [config.to_dict() for config in architectures])
    tokenizers = tokenizers_to_copy(members[0].path, out.parent)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in ConfigurableGPT(architectures[0]).named_parameters()}
    for member in members:
        member.pretrained.weights(shapes, "meta", torch.float32)  # refuses what does not fit
    content = {"model": mean_weights(members, shapes), "model_args": architectures[0].to_dict(), **told(members)}
    write(out, content, tokenizers)
    for each in content["averaged"]:
        print(f"{each['weight']:9.4f}  {each['path']}" + (f"  step {each['iter_num']}" if each["iter_num"] else ""))
    size = sum(tensor.numel() for tensor in content["model"].values())
    print(f"written    {out}: {size:,} parameters, the mean of {len(members)} ({settings.weights} weights)")
    print(f"to go on   train from it with --checkpoint_path={out}; without an optimizer it cannot be resumed")


def refuse_place(out: Path) -> None:
    """Raise UserError where the average would replace a file, or be taken for a checkpoint of a run."""
    if NUMBERED.fullmatch(out.name) or out.name == BEST:
        raise UserError(f"{out}: is a name that a run gives to its own checkpoints; choose another one")
    if out.exists():
        raise UserError(f"{out}: exists already; choose another name, or remove it")


def chosen(settings: AverageSettings) -> list[tuple[Path, float]]:
    """The files and their shares."""
    if settings.last is None:
        return [parse_share(text) for text in settings.checkpoints]
    assert settings.out_dir is not None
    found = numbered_checkpoints(settings.out_dir)
    if len(found) < settings.last:
        raise UserError(
            f"out_dir {settings.out_dir}: holds {len(found)} numbered checkpoints, not {settings.last}; lower last, or "
            "train with a larger keep_checkpoints"
        )
    return [(path, 1.0) for _, path in reversed(found[: settings.last])]


def open_members(files: Sequence[tuple[Path, float]], weights: Weights) -> list[Member]:
    """All of them; UserError with everything that cannot be used."""
    members, problems = [], []
    for path, share in files:
        try:
            members.append(open_member(path, share, weights=weights))
        except UserError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise listed("these checkpoints cannot be averaged:", [str(error) for error in problems])
    return members


def architecture(member: Member) -> ModelArchitectureConfig:
    try:
        return ModelArchitectureConfig.from_dict(member.fields)
    except UserError as error:
        raise UserError(f"{member.path}: {error}") from error


def tokenizers_to_copy(source: Path, folder: Path) -> list[tuple[Path, Path]]:
    """(from, to) of the files beside a checkpoint that chat and export look for; UserError where others are there."""
    beside = source if source.is_dir() else source.parent
    named = [*tokenizer_files(beside), *(path for path in (beside / JINJA_NAME,) if path.is_file())]
    theirs = {path.name for path in tokenizer_files(folder)} if folder.is_dir() else set()
    copies = []
    for path in named:
        copy = folder / path.name
        if copy.exists() and not filecmp.cmp(path, copy, shallow=False):
            raise UserError(f"{copy}: is not that of {source}; choose another folder")
        theirs.discard(path.name)
        copies += [] if copy.exists() else [(path, copy)]
    if named and theirs:
        raise UserError(f"{folder / min(theirs)}: is of another tokenizer than that of {source}; choose another folder")
    return copies


def write(out: Path, content: dict[str, object], copies: Sequence[tuple[Path, Path]]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, copy in copies:
            copy_whole(path, copy)
        write_checkpoint(out, content)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})", exit_status=EXIT_FAILED) from error


if __name__ == "__main__":
    run_program(main)
