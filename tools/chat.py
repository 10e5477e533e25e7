"""Talk to a checkpoint: python tools/chat.py out/mine/ckpt.pt [--prompt="one question"] [--name=value ...]"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from model_builder import ConfigurableGPT, load_pretrained
from sft import hub
from sft.chatml import prompt_ids
from sft.checkpoint import read_checkpoint
from sft.config import load_settings
from sft.conversation import BadRecord, Message, text_of
from sft.ema import Weights
from sft.errors import UserError, run_program
from sft.generate import stream
from sft.pretrained import checkpoint_file, is_model_folder
from sft.templates import TemplateName, template_in
from sft.tokenizer import Tokenizer, load_tokenizer

USAGE = "python tools/chat.py CKPT [--name=value ...]"


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    prompt: str | None = None  # one question, answered and done; None = a dialogue until Ctrl-D
    system: str | None = None  # what a system message tells the model first
    tokenizer: str | None = None  # tokenizer.json, *.tiktoken or their folder; None = beside the checkpoint
    thinking: bool = False  # let a model trained with --template=qwen3 reason before it answers
    weights: Weights | None = None  # of a run with ema_decay: model or ema; None = what its evaluations saw, ema
    temperature: float | None = 0.7  # below 1 keeps to likelier tokens; None = always the likeliest
    top_k: int | None = None  # draw among the k likeliest tokens
    top_p: float | None = 0.95  # draw among the likeliest tokens that together reach this probability
    max_new_tokens: int = 512  # the longest answer
    seed: int = 0  # of the drawn tokens
    device: str | None = None  # cpu, cuda, cuda:1 ...; None = cuda where there is one
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None = bfloat16 on cuda, float32 on the CPU

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.temperature is not None and self.temperature <= 0:
            yield "temperature", f"temperature must be above 0, not {self.temperature}; None always takes the likeliest"
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield "top_p", f"top_p must be above 0 and at most 1, not {self.top_p}"
        for name, value in (("top_k", self.top_k), ("max_new_tokens", self.max_new_tokens)):
            if value is not None and value < 1:
                yield name, f"{name} must be at least 1, not {value}"
        if not 0 <= self.seed < 2**63:
            yield "seed", f"seed must be at least 0 and below 2**63, not {self.seed}"
        for name, text in (("prompt", self.prompt), ("system", self.system)):
            try:
                text_of(text or "", name)
            except BadRecord as error:
                yield name, str(error)


def main(argv: list[str]) -> None:
    is_help = bool({"--help", "-h"} & set(argv))
    if not is_help and (not argv or argv[0].startswith("--")):
        raise UserError(f"which checkpoint? {USAGE}")
    settings = load_settings(ChatSettings, argv if is_help else argv[1:], usage=USAGE).settings
    be_lenient_with_encodings()
    path = hub.local(argv[0], setting="checkpoint", files=hub.MODEL_FILES)
    model, tokenizer = load_model_and_tokenizer(path, settings)
    template = template_in(tokenizer.path.parent)
    opening = [] if settings.system is None else [Message("system", settings.system)]
    if settings.prompt is not None:
        answer(model, tokenizer, [*opening, Message("user", settings.prompt)], settings, template)
        return
    history = list(opening)
    for question in questions():
        try:
            history.append(Message("user", text_of(question, "the line")))
            history.append(Message("assistant", answer(model, tokenizer, history, settings, template)))
        except BadRecord as error:
            print(error)
        except UserError as error:  # more than the model has positions for
            print(f"{error}\n[the dialogue begins again]")
            history = list(opening)


def load_model_and_tokenizer(path: Path, settings: ChatSettings) -> tuple[ConfigurableGPT, Tokenizer]:
    """The model of a checkpoint and the tokenizer it was trained with; UserError where they do not belong together."""
    trained_with, evaluated = None, None  # a Hugging Face folder does not say
    if not is_model_folder(path):
        content = read_checkpoint(checkpoint_file(path), verify=False)  # load_pretrained will
        trained_with, evaluated = content.get("tokenizer_fingerprint"), content.get("eval_weights")
    beside = path if path.is_dir() else path.parent
    named = settings.tokenizer and hub.local(settings.tokenizer, setting="tokenizer", files=hub.TOKENIZER_FILES)
    tokenizer = load_tokenizer(named or beside)
    if trained_with not in (None, tokenizer.fingerprint):
        raise UserError(f"{tokenizer.path}: not the tokenizer that {path} was trained with; see --tokenizer=")
    device = usable_device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    weights = settings.weights or ("ema" if evaluated == "ema" else "model")
    model = load_pretrained(path, device=device, dtype=getattr(torch, dtype), weights=weights)
    if tokenizer.vocab_size > model.vocab_size:
        sizes = f"{tokenizer.vocab_size:,} ids, the model {model.vocab_size:,}"
        raise UserError(f"{tokenizer.path}: not this model's tokenizer: it has {sizes}")
    return model, tokenizer


def usable_device(name: str) -> torch.device:
    """The device of that name; UserError where this machine has none that computes."""
    try:
        number = torch.zeros((), device=name)
        number.item()  # which the meta device has not
        return number.device
    except (RuntimeError, AssertionError, ImportError) as error:  # PyTorch raises any, by how it was built
        raise UserError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def be_lenient_with_encodings() -> None:
    """Let no byte that is typed and no character that cannot be shown end the dialogue."""
    for file, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors=errors)


def questions() -> Iterator[str]:
    """What the person types, line by line, until the input ends."""
    while sys.stdin is not None:  # None = closed by who started this
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def answer(
    model: ConfigurableGPT,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    settings: ChatSettings,
    template: TemplateName = "chatml",
) -> str:
    """Print the model's next message as it comes, and return it."""
    stops = {tokenizer.im_end, tokenizer.pad}  # a base model ends its documents with the latter
    ids: list[int] = []

    def growing() -> Iterator[str]:
        for token in stream(
            model,
            prompt_ids(messages, tokenizer, template=template, thinking=settings.thinking),
            max_new_tokens=settings.max_new_tokens,
            stop_ids=stops,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=settings.seed + len(messages),  # another draw for each turn
        ):
            ids.append(token)
            yield tokenizer.decode(ids)

    text = print_as_it_grows(growing())
    if ids[-1] not in stops:
        used_up = "max_new_tokens" if len(ids) == settings.max_new_tokens else "the model's positions"
        print(f"[cut: {used_up} used up]")
    return text


def print_as_it_grows(texts: Iterable[str]) -> str:
    """Print each text's new end, a character only once all its bytes are there; returns the last text."""
    text = shown = ""
    for text in texts:
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(text[len(shown) :], flush=True)
    return text


if __name__ == "__main__":
    run_program(main)
