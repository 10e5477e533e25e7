"""What a model is shown of a conversation: the chat templates of Qwen3, as text.

`chatml` is the one of Qwen3-Instruct-2507: every message stands as it is, and reasoning has no place. `qwen3` is the
one of the thinking models: reasoning stands in a think block, but only in the turns after the last question.
`sft/chat_templates/` has the same two in Jinja, for those who serve the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from sft.conversation import Message
from sft.untrusted import MEBIBYTE, read_bytes

TemplateName = Literal["chatml", "qwen3"]

JINJA_NAME = "chat_template.jinja"
ASSISTANT = "assistant"
HEADER = {"system": "system\n", "user": "user\n", "assistant": "assistant\n", "tool": "user\n"}
NO_THOUGHT = "<think>\n\n</think>\n\n"  # what a server puts before an answer without reasoning

BEFORE_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
AFTER_TOOLS = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


class Block(NamedTuple):
    """`<|im_start|>` opening content `<|im_end|>` and a newline: one message, or successive tool results together."""

    role: str  # of the messages that it stands for
    opening: str  # the header, and whatever else a server writes before the model goes on
    content: str
    end: int  # how many messages of the conversation stand up to here


def blocks_of(messages: Sequence[Message], tools: Sequence[str], template: TemplateName) -> list[Block]:
    """The conversation as the template prints it."""
    last_question = last_question_of(messages) if template == "qwen3" else -1
    blocks: list[Block] = []
    if tools and not (messages and messages[0].role == "system"):
        blocks.append(Block("system", HEADER["system"], tools_text(tools), 0))
    for index, message in enumerate(messages):
        role, content = message.role, message.content
        opening = HEADER[role]
        if role == ASSISTANT:
            if template == "qwen3":
                is_last = index == len(messages) - 1
                opening, content = with_thought(message, after_question=index > last_question, is_last=is_last)
            if message.tool_calls:
                content += calls_text(message, has_content=bool(content_of(message, template)))
        elif role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if blocks and index and messages[index - 1].role == "tool":
                content = f"{blocks.pop().content}\n{content}"
        elif index == 0 and role == "system" and tools:
            content = f"{content}\n\n{tools_text(tools)}"
        blocks.append(Block(role, opening, content, index + 1))
    return blocks


def blocks_of_turn(messages: Sequence[Message], tools: Sequence[str], template: TemplateName, turn: int) -> list[Block]:
    """What a server sends before the assistant message `turn`, and that message."""
    answer = blocks_of(messages[: turn + 1], tools, template)[-1]
    return [*blocks_of(messages[:turn], tools, template), answer]


def each_turn_stands_alone(messages: Sequence[Message], template: TemplateName) -> bool:
    """Whether no text holds every turn as it is generated: earlier reasoning is left out, and a think block is written
    into the last message of a history."""
    if template == "chatml":
        return False
    roles = [message.role for message in messages]
    return any(message.role == ASSISTANT and reasoning_of(message) for message in messages) or any(
        pair == (ASSISTANT, ASSISTANT) for pair in itertools.pairwise(roles)
    )


def text_of_blocks(blocks: Sequence[Block]) -> str:
    return "".join(f"<|im_start|>{block.opening}{block.content}<|im_end|>\n" for block in blocks)


def generation_prompt(template: TemplateName, *, thinking: bool) -> str:
    """What follows the `<|im_start|>` after which the model goes on."""
    return HEADER[ASSISTANT] + (NO_THOUGHT if template == "qwen3" and not thinking else "")


def tools_text(tools: Sequence[str]) -> str:
    return BEFORE_TOOLS + "".join(f"\n{tool}" for tool in tools) + AFTER_TOOLS


def calls_text(message: Message, *, has_content: bool) -> str:
    calls = [
        f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>'
        for call in message.tool_calls
    ]
    return ("\n" if has_content and calls else "") + "\n".join(calls)


def last_question_of(messages: Sequence[Message]) -> int:
    """Index of the last thing that a user asked; the last message where nobody asked. Tool results sent as user
    messages are none."""
    for index in range(len(messages) - 1, -1, -1):
        if is_question(messages[index]):
            return index
    return len(messages) - 1


def is_question(message: Message) -> bool:
    role, content = message[:2]
    return role == "user" and not (content.startswith("<tool_response>") and content.endswith("</tool_response>"))


def reasoning_of(message: Message) -> str:
    """The reasoning as the template qwen3 understands it, given apart or inside the content; '' where there is none."""
    if message.reasoning is not None:
        return message.reasoning.strip("\n")
    if "</think>" not in message.content:
        return ""
    return message.content.split("</think>")[0].rstrip("\n").split("<think>")[-1].strip("\n")


def content_of(message: Message, template: TemplateName) -> str:
    """The content without the reasoning that may stand in it."""
    if template == "chatml" or message.reasoning is not None or "</think>" not in message.content:
        return message.content
    return message.content.split("</think>")[-1].lstrip("\n")


def with_thought(message: Message, *, after_question: bool, is_last: bool) -> tuple[str, str]:
    """Opening and content of an assistant message in the template qwen3, tool calls not included."""
    header, content, reasoning = HEADER[ASSISTANT], content_of(message, "qwen3"), reasoning_of(message)
    if not after_question or not (is_last or reasoning or message.reasoning):  # newlines alone count as reasoning
        return header, content
    content = content.lstrip("\n")
    return (header, f"<think>\n{reasoning}\n</think>\n\n{content}") if reasoning else (header + NO_THOUGHT, content)


def jinja_file(template: TemplateName) -> Path:
    """The same template in Jinja, as servers read it from a file chat_template.jinja."""
    return Path(__file__).parent / "chat_templates" / f"{template}.jinja"


def template_in(folder: Path) -> TemplateName:
    """The template of a folder whose chat_template.jinja is one of ours; chatml where there is none or another."""
    try:
        found = read_bytes(folder / JINJA_NAME, most=MEBIBYTE)
    except (OSError, ValueError):
        return "chatml"
    return "qwen3" if found == jinja_file("qwen3").read_bytes() else "chatml"
