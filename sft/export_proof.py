"""The proof of an export: our importer reads the very bits back, Transformers computes, writes and renders alike."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.chatml import prompt_ids
from sft.conversation import Message, ToolCall
from sft.errors import UserError, listed
from sft.generate import GeneratingModel, generate
from sft.peft_format import CONFIG, is_peft_folder
from sft.pretrained import open_pretrained
from sft.templates import TemplateName, generation_prompt
from sft.tokenizer import Tokenizer

LARGEST_DIFFERENCE = 1e-4  # of two logits, for the largest of 1 and the logits themselves
ROWS, LONGEST_ROW = 2, 64  # of random ids
MOST_NEW_TOKENS = 32

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"city": "Köln"}}}
THOUGHT = "There is a tool for that."


class Case(NamedTuple):
    """A conversation in our words and in those of apply_chat_template."""

    ours: tuple[Message, ...]
    theirs: list[dict[str, Any]]
    tools: list[dict[str, Any]]


def _case(*turns: tuple[str, str], tools: bool = False, reasoning: bool = False) -> Case:
    """Turns of role and content; with tools the first answer is a call, with reasoning it tells what it thought."""
    ours: list[Message] = []
    theirs: list[dict[str, Any]] = []
    for role, content in turns:
        calls, more = tools and role == "assistant" and not any(each.role == role for each in ours), {}
        thought = THOUGHT if reasoning and calls else None
        made = (ToolCall("clock", json.dumps(CALL["function"]["arguments"], ensure_ascii=False)),) if calls else ()  # type: ignore[index]
        more = ({"tool_calls": [CALL]} if calls else {}) | ({"reasoning_content": thought} if thought else {})
        ours.append(Message(role, content, thought, made))
        theirs.append({"role": role, "content": content, **more})
    return Case(tuple(ours), theirs, [TOOL] if tools else [])


CASES = (
    _case(("user", "What is 2 + 2?")),
    _case(("system", "Be brief."), ("user", "Grüße, 你好 🦙!\n\n  Wie spät\tist es?")),
    _case(("user", "One"), ("assistant", "Two."), ("user", "Three"), ("assistant", "Four."), ("user", "Five")),
    _case(("user", "How late?"), ("assistant", "I look."), ("tool", "9"), ("tool", "10"), tools=True),
    _case(("user", "How late?"), ("assistant", ""), ("tool", "9"), tools=True, reasoning=True),
    _case(("user", "How late?"), ("assistant", "I look."), tools=True, reasoning=True),
    _case(("user", "What is 2 + 2?"), ("assistant", "It is 4.")),
)
PLAIN_PROMPTS = ("The capital of France is", "def f(x):\n", "1, 2, 3,")


def refuse_other_bits(folder: Path, tensor_of: Callable[[str], Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """UserError unless our importer makes of the folder the very tensors that it was written from, one at a time."""
    opened = open_pretrained(folder)
    assert opened.table is not None
    other = []
    for name, pieces in opened.table.items():
        alone = {piece.name: opened.tensors[piece.name] for piece in pieces}
        one = dataclasses.replace(opened, tensors=alone, table={name: pieces})
        tensor = tensor_of(name).detach().cpu()
        read = one.weights({name: shapes[name]}, "cpu", tensor.dtype)[name]
        if not torch.equal(read.view(torch.uint8), tensor.contiguous().view(torch.uint8)):
            other.append(name)
    if other:
        raise listed(f"{folder}: does not hold what was exported:", other)


def transformers_differ(
    folder: Path,
    ours: GeneratingModel,
    tokenizer: Tokenizer,
    template: TemplateName | None,
    *,
    say: Callable[[str], None],
) -> None:
    """Load the folder in Transformers and compare; UserError with all that differs.

    `ours` is the folder's model as our importer reads it, in float32, on the CPU.
    """
    try:
        library, theirs = in_transformers(folder)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever the libraries raise for a folder that they do not understand
        raise UserError(f"{folder}: Transformers cannot load it ({type(error).__name__}: {error})") from error
    problems = [*_other_ids(library, tokenizer, template)]
    say(f"verified  ids of {len(CASES) if template else len(PLAIN_PROMPTS)} texts in Transformers")
    difference, largest = logits_apart(ours, theirs, vocabulary=ours.head_weight.shape[0])
    if not difference <= LARGEST_DIFFERENCE * max(1.0, largest):
        problems.append(f"logits differ by {difference:.1e}, the largest is {largest:.1f}")
    say(f"verified  logits of {ROWS} x {LONGEST_ROW} random ids, largest difference {difference:.1e}")
    prompts = [each for each in _prompts(tokenizer, template) if _fits(ours, each)]
    problems += _other_texts(ours, theirs, prompts, tokenizer)
    say(f"verified  greedy answers to {len(prompts)} prompts")
    if problems:
        raise listed(f"{folder}: Transformers disagrees:", problems)


def in_transformers(folder: Path) -> tuple[Any, Any]:
    """The tokenizer and the model of a folder, in float32; of adapters the model that they make of their base."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(f"--verify needs transformers ({error}): pip install transformers") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    library = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not is_peft_folder(folder):
        return library, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(f"--verify of adapters needs peft ({error}): pip install peft") from error
    base = json.loads((folder / CONFIG).read_bytes())["base_model_name_or_path"]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    plain.generation_config = GenerationConfig.from_pretrained(folder)  # the base's may stop elsewhere
    return library, PeftModel.from_pretrained(plain, str(folder)).eval()


def _prompts(tokenizer: Tokenizer, template: TemplateName | None) -> list[list[int]]:
    if template is None:
        return [tokenizer.encode(text) for text in PLAIN_PROMPTS]
    return [prompt_ids(case.ours, tokenizer, template=template) for case in CASES[:3]]


def _fits(ours: GeneratingModel, prompt: Sequence[int]) -> bool:
    return ours.position_limit is None or len(prompt) + MOST_NEW_TOKENS <= ours.position_limit


def _other_ids(library: Any, tokenizer: Tokenizer, template: TemplateName | None) -> Iterator[str]:
    """What Transformers' tokenizer gives other ids for than ours."""
    if template is None:
        for text in PLAIN_PROMPTS:
            if library(text, add_special_tokens=False)["input_ids"] != tokenizer.encode(text):
                yield f"other ids for {text!r}"
        return
    for number, case in enumerate(CASES, 1):
        tools = [json.dumps(tool, ensure_ascii=False) for tool in case.tools]

        def applied(case: Case = case, **flags: bool) -> list[int]:
            told = {"tools": case.tools or None, "tokenize": True, "return_dict": False}
            return list(library.apply_chat_template(case.theirs, **told, **flags))

        for thinking in (False, True) if template == "qwen3" else (False,):
            prompt = prompt_ids(case.ours, tokenizer, template=template, tools=tools, thinking=thinking)
            if applied(add_generation_prompt=True, enable_thinking=thinking) != prompt:
                yield f"apply_chat_template gives other ids for the prompt of conversation {number}"
        beginning = [tokenizer.im_start, *tokenizer.encode(generation_prompt(template, thinking=True))]
        whole = prompt_ids(case.ours, tokenizer, template=template, tools=tools, thinking=True)[: -len(beginning)]
        if applied() != whole:
            yield f"apply_chat_template gives other ids for the whole of conversation {number}"


@torch.inference_mode()
def logits_apart(ours: GeneratingModel, theirs: Any, *, vocabulary: int) -> tuple[float, float]:
    """The largest difference of two models' logits on random ids, and the largest logit."""
    length = min(LONGEST_ROW, ours.position_limit or LONGEST_ROW)
    ids = torch.randint(vocabulary, (ROWS, length), generator=torch.Generator().manual_seed(0))
    expected = theirs(input_ids=ids).logits
    found = F.linear(ours.hidden_states(ids), ours.head_weight)
    return (found - expected).abs().max().item(), expected.abs().max().item()


def _other_texts(
    ours: GeneratingModel, theirs: Any, prompts: Sequence[list[int]], tokenizer: Tokenizer
) -> Iterator[str]:
    """The prompts that the two answer differently where the logits leave no choice."""
    stops = {tokenizer.im_end, tokenizer.pad}
    if set(theirs.generation_config.eos_token_id or []) != stops:
        yield f"generation stops at {theirs.generation_config.eos_token_id}, not at {sorted(stops)}"
        return
    for number, prompt in enumerate(prompts, 1):
        (found,) = generate(ours, [prompt], max_new_tokens=MOST_NEW_TOKENS, stop_ids=stops)
        answer = theirs.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=MOST_NEW_TOKENS)
        expected = answer[0, len(prompt) :].tolist()
        stopped = bool(expected) and expected[-1] in stops
        expected = expected[:-1] if stopped else expected
        if (found.ids, found.stopped) != (expected, stopped) and not _is_a_tie(ours, prompt, found.ids, expected):
            mine, other = tokenizer.decode(found.ids), tokenizer.decode(expected)
            yield f"prompt {number} is answered {mine!r} here and {other!r} there"


@torch.inference_mode()
def _is_a_tie(ours: GeneratingModel, prompt: list[int], found: list[int], expected: list[int]) -> bool:
    """Whether two answers part where two tokens are equally likely, as far as rounding lets one tell."""
    same = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
    if same is None:  # one has stopped where the other goes on
        same = min(len(found), len(expected))
    hidden = ours.hidden_states(torch.tensor([[*prompt, *found[:same]]]))[0, -1]
    first, second = F.linear(hidden, ours.head_weight).topk(2).values.tolist()
    return first - second <= 2 * LARGEST_DIFFERENCE * max(1.0, abs(first))
