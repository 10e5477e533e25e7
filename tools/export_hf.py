"""Export a checkpoint for Transformers and vLLM: python tools/export_hf.py CKPT OUT_DIR [--name=value ...]"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from model_builder import ConfigurableGPT, load_pretrained
from model_config import ModelArchitectureConfig, parameter_count
from sft import export_tokenizer
from sft.adapting import merge_adapters
from sft.checkpoint import read_checkpoint
from sft.config import load_settings
from sft.ema import Weights
from sft.errors import EXIT_FAILED, UserError, listed, run_program
from sft.export_adapters import base_for_peft, write_adapters
from sft.export_config import Expression, complete, config_json, expressed, meaning
from sft.export_folder import refuse_folder, whole_folder
from sft.export_proof import refuse_other_bits, transformers_differ
from sft.export_readme import Facts, newest_log, readme_text
from sft.export_weights import converted, plan_shards, write_json, write_shards
from sft.files import write_whole
from sft.huggingface import name_table
from sft.peft_format import is_peft_folder
from sft.pretrained import checkpoint_file, is_hugging_face_folder, open_pretrained
from sft.templates import JINJA_NAME, TemplateName, jinja_file
from sft.tokenizer import END_OF_TEXT, IM_END, Tokenizer, load_tokenizer
from sft.untrusted import MEBIBYTE, read_bytes

USAGE = "python tools/export_hf.py CKPT OUT_DIR [--name=value ...]"
AVERAGED = "the weights are the moving average of the trained ones"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the weights
    lora: Literal["merged", "apart"] = "merged"  # adapters: within the weights, or alone in PEFT's format, in fp32
    base: str | None = None  # with lora=apart, what PEFT loads beneath; None = the base, if it is a Hugging Face folder
    shard_gb: float = 5.0  # the largest file of weights, in 10**9 bytes
    weights: Weights | None = None  # of a run with ema_decay: model or ema; None = what its evaluations saw, ema
    tokenizer: str | None = None  # tokenizer.json, *.tiktoken or their folder; None = beside the checkpoint
    template: TemplateName | None = None  # chat template; None = the one beside the checkpoint, if there is one
    verify: bool = False  # load the result in Transformers, too, and compare logits, answers and rendered ids
    overwrite: bool = False  # replace an earlier export at OUT_DIR

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if not self.shard_gb > 0:
            yield "shard_gb", f"shard_gb must be above 0, not {self.shard_gb}"
        if self.base is not None and self.lora == "merged":
            yield "base", "base is told to PEFT: it needs lora=apart"


class Source(NamedTuple):
    """What is exported: a checkpoint file or a Hugging Face folder, and what lies beside it."""

    path: Path
    folder: Path
    content: dict[str, Any]  # of a checkpoint file, its tensors mapped
    weights: Weights
    fields: dict[str, Any]  # of the architecture, complete
    parameters: int
    tokenizer: Tokenizer
    template: TemplateName | None

    @property
    def end(self) -> str:
        """The token after which there is nothing more: of an answer, or of a document."""
        return IM_END if self.template else END_OF_TEXT


def main(argv: list[str]) -> None:
    is_help = bool({"--help", "-h"} & set(argv))
    if not is_help and (len(argv) < 2 or argv[0].startswith("--") or argv[1].startswith("--")):
        raise UserError(f"which checkpoint, and which folder to write? {USAGE}")
    settings = load_settings(ExportSettings, argv if is_help else argv[2:], usage=USAGE).settings
    out = Path(os.path.abspath(argv[1]))
    refuse_folder(out, overwrite=settings.overwrite)
    source = open_source(Path(argv[0]), settings)
    if source.folder.resolve() == out.resolve():
        raise UserError(f"{out}: is where the checkpoint lies; choose another folder")
    expression = expressed(source.fields)
    say(f"family    {expression.family.name} ({expression.family.architecture}), {source.parameters:,} parameters")
    for note in expression.notes:
        say(f"change    {note}")
    if source.weights == "ema":
        say(f"weights   {AVERAGED}")
    if source.template is None:
        say(f"template  none: there is no {JINJA_NAME} beside the checkpoint; --template= adds one")
    model = load_model(source, settings)
    with whole_folder(out) as folder:
        if settings.lora == "apart":
            base = base_for_peft(model, settings.base)
            size = write_adapters(folder, model, base=base, fields=source.fields, expression=expression)
        else:
            size = write_model(folder, source, expression, model, settings)
        write_beside(folder, source, expression, settings)
        if settings.verify:
            prove_in_transformers(folder, source)
    dtype = "fp32" if settings.lora == "apart" else settings.dtype
    say(f"written   {out}: {size / 1e9:.3g} GB of weights in {dtype}, read back bit for bit")


def open_source(path: Path, settings: ExportSettings) -> Source:
    """What is known before any weight is read; UserError where the parts do not belong together."""
    content: dict[str, Any] = {}
    if not (is_hugging_face_folder(path) or is_peft_folder(path)):
        path = checkpoint_file(path)
        content = read_checkpoint(path, verify=False)  # load_pretrained will
    folder = path if path.is_dir() else path.parent
    weights: Weights = settings.weights or ("ema" if content.get("eval_weights") == "ema" else "model")
    config = architecture_of(path, weights)
    tokenizer = load_tokenizer(settings.tokenizer or folder)
    if content.get("tokenizer_fingerprint") not in (None, tokenizer.fingerprint):
        raise UserError(f"{tokenizer.path}: not the tokenizer that {path} was trained with; see --tokenizer=")
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size:,} ids, the model {config.vocab_size:,}"
        raise UserError(f"{tokenizer.path}: not this model's tokenizer: it has {sizes}")
    template = settings.template or template_beside(folder)
    return Source(path, folder, content, weights, all_fields(config), parameter_count(config), tokenizer, template)


def architecture_of(path: Path, weights: Weights) -> ModelArchitectureConfig:
    source = open_pretrained(path, verify=False, weights=weights)
    if source.adapters is not None:  # which may leave it to their base
        return load_pretrained(path, device="meta", verify=False, weights=weights).config
    try:
        return ModelArchitectureConfig.from_dict(source.fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def load_model(source: Source, settings: ExportSettings) -> ConfigurableGPT:
    """The model in the dtype that is written; adapters are merged in float32 and rounded once, or stay apart."""
    dtype = DTYPES[settings.dtype]
    if open_pretrained(source.path, verify=False, weights=source.weights).adapters is None:
        return load_pretrained(source.path, dtype=dtype, weights=source.weights)
    model = load_pretrained(source.path, dtype=torch.float32, weights=source.weights)
    if settings.lora == "apart":
        return model
    say(f"lora      {len(model.adapted.lora.targets) if model.adapted else 0} adapters are merged with their base")
    merge_adapters(model)
    return model.to(dtype)


def all_fields(config: ModelArchitectureConfig) -> dict[str, Any]:
    return complete(
        config.to_dict(), key_heads=config.key_heads, head_size=config.head_size, ffn_width=config.ffn_width
    )


def template_beside(folder: Path) -> TemplateName | None:
    """The template that the data was prepared with, which the trainer has put beside the checkpoint."""
    path = folder / JINJA_NAME
    if not path.exists():
        return None
    try:
        found = read_bytes(path, most=MEBIBYTE)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); see --template=") from error
    names: tuple[TemplateName, ...] = ("chatml", "qwen3")
    for name in names:
        if found == jinja_file(name).read_bytes():
            return name
    raise UserError(f"{path}: is none of {', '.join(names)}; say with --template= which one the model was trained with")


def write_model(
    folder: Path, source: Source, expression: Expression, model: ConfigurableGPT, settings: ExportSettings
) -> int:
    """Write the config and the weights, and read them back; the bytes of the weights."""
    tokenizer, dtype = source.tokenizer, DTYPES[settings.dtype]
    ids = {"eos_id": tokenizer.control[source.end], "pad_id": tokenizer.pad}
    write_json(folder / "config.json", config_json(expression, dtype=str(dtype).removeprefix("torch."), **ids))
    table = name_table(expression.fields)
    tensor_of = converted(dict(model.named_parameters()), source.fields, expression, table)
    shards = plan_shards(table, dtype=dtype, most_bytes=settings.shard_gb * 1e9)
    size = write_shards(folder, shards, table, tensor_of, dtype=dtype)
    refuse_another_model(folder, expression, tensor_of)
    return size


def write_beside(folder: Path, source: Source, expression: Expression, settings: ExportSettings) -> None:
    """Write what is no weight: the tokenizer, its chat template, where to stop, and the README."""
    write_tokenizer(folder, source)
    facts = Facts(
        family=expression.family.name,
        parameters=source.parameters,
        dtype=settings.dtype,
        adapters=settings.lora == "apart",
        source=source.path,
        notes=[*expression.notes, *([AVERAGED] if source.weights == "ema" else [])],
        template=source.template,
        stops=[IM_END, END_OF_TEXT],
        content=source.content,
    )
    write_text(folder / "README.md", readme_text(facts, newest_log(source.folder)))


def write_tokenizer(folder: Path, source: Source) -> None:
    tokenizer = source.tokenizer
    written = export_tokenizer.tokenizer_json(tokenizer)
    write_whole(folder / "tokenizer.json", lambda file: file.write(written))
    config = export_tokenizer.tokenizer_config(
        tokenizer, written, block_size=source.fields["block_size"], ends_with=source.end
    )
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", export_tokenizer.generation_config(tokenizer))
    if source.template is not None:
        write_text(folder / JINJA_NAME, jinja_file(source.template).read_text(encoding="utf-8"))
    if load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{folder}: its tokenizer.json is another vocabulary than {tokenizer.path}")


def refuse_another_model(folder: Path, expression: Expression, tensor_of: Callable[[str], Tensor]) -> None:
    """UserError unless our importer sees the very architecture and the very bits in the folder."""
    with torch.device("meta"):
        read = load_pretrained(folder, device="meta")
    found, wanted = meaning(all_fields(read.config)), meaning(expression.fields)
    if other := [name for name in wanted if found.get(name) != wanted[name]]:
        told = [f"{name} is {found.get(name)!r}, must be {wanted[name]!r}" for name in other]
        raise listed(f"{folder}: is read as another architecture:", told)
    shapes = {name: tuple(parameter.shape) for name, parameter in read.named_parameters()}
    refuse_other_bits(folder, tensor_of, shapes)


def prove_in_transformers(folder: Path, source: Source) -> None:
    ours = load_pretrained(folder)
    try:
        transformers_differ(folder, ours, source.tokenizer, source.template, say=say)
    except UserError as error:
        raise UserError(f"{error}\nnothing was written", exit_status=EXIT_FAILED) from error


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    run_program(main)
