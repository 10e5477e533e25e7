import gzip
import json
import re
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tests.conftest import ROOT

TEMPLATES = ("chatml", "qwen3")
PUBLISHED = {"chatml": "qwen3_instruct_2507.jinja", "qwen3": "qwen3.jinja"}

each_template = pytest.mark.parametrize("name", TEMPLATES)


@cache
def compiled(path: Path, *, trim: bool = True):
    """The template as servers compile it: sandboxed, and `tojson` without HTML's escapes."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=trim, lstrip_blocks=trim)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(path.read_text(encoding="utf-8"))


def ours(name: str, *, trim: bool = True):
    return compiled(ROOT / "sft" / "chat_templates" / f"{name}.jinja", trim=trim)


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"city": "Köln & <b>"}}}
SIGNATURES = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "clock", "parameters": {"city": "Köln & <b>"}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""

LATE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How late?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [call("clock", {"city": "Köln"}), call("clock", '{"a":1}')],
    },
    {"role": "tool", "content": "9"},
    {"role": "tool", "content": "10"},
    {"role": "assistant", "reasoning_content": "\nIt is nine there.\n", "content": "\nNine."},
]
LATE_IN_CHATML = f"""<|im_start|>system
Be brief.

{SIGNATURES}<|im_end|>
<|im_start|>user
How late?<|im_end|>
<|im_start|>assistant
I look.
<tool_call>
{{"name": "clock", "arguments": {{"city": "Köln"}}}}
</tool_call>
<tool_call>
{{"name": "clock", "arguments": {{"a":1}}}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
9
</tool_response>
<tool_response>
10
</tool_response><|im_end|>
<|im_start|>assistant

Nine.<|im_end|>
"""
THOUGHT = "<think>\nIt is nine there.\n</think>\n\nNine.<|im_end|>\n"


def test_tools_their_calls_and_their_results_stand_where_a_server_puts_them():
    assert ours("chatml").render(messages=LATE, tools=[TOOL]) == LATE_IN_CHATML
    expected = LATE_IN_CHATML.replace("\nNine.<|im_end|>\n", THOUGHT)
    assert ours("qwen3").render(messages=LATE, tools=[TOOL]) == expected


def test_qwen3_shows_the_reasoning_of_the_last_query_only():
    messages = [
        *LATE,
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "<think>?</think>Ten."},
    ]
    text = ours("qwen3").render(messages=messages)
    assert "It is nine there." not in text
    assert text.endswith(
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n<think>\n?\n</think>\n\nTen.<|im_end|>\n"
    )


def test_in_qwen3_a_users_text_is_a_tools_result_only_with_both_of_its_tags():
    def shown(content):
        answer = {"role": "assistant", "reasoning_content": "Hm.", "content": "A"}
        messages = [{"role": "user", "content": "Q"}, answer, {"role": "user", "content": content}, answer]
        return ours("qwen3").render(messages=messages).count("Hm.")

    assert shown("<tool_response>9</tool_response>") == 2
    assert shown("<tool_response>9") == shown("9</tool_response>") == 1


@each_template
def test_the_prompt_of_an_answer_ends_with_its_header(name):
    prompt = ours(name).render(messages=LATE[:2], add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow late?<|im_end|>\n<|im_start|>assistant\n"
    )
    without_thinking = ours(name).render(messages=LATE[:2], add_generation_prompt=True, enable_thinking=False)
    assert without_thinking == prompt + ("<think>\n\n</think>\n\n" if name == "qwen3" else "")


@each_template
def test_transformers_renders_it_as_we_do(name):
    from transformers import PreTrainedTokenizerFast

    from tests.tiny_tokenizer import tiny_library_tokenizer

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_library_tokenizer())
    tokenizer.chat_template = (ROOT / "sft" / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    text = tokenizer.apply_chat_template(LATE, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert text == ours(name).render(messages=LATE, tools=[TOOL], add_generation_prompt=True)


# Small engines know neither all of Jinja's filters nor how it treats white space: what they are not sure to have, or
# to read alike, does not occur.
FILTERS = {"length", "tojson"}
METHODS = {"split", "strip", "lstrip", "startswith", "endswith"}
STATEMENTS = {"macro", "endmacro", "set", "for", "endfor", "if", "elif", "else", "endif"}


@each_template
def test_nothing_is_used_that_a_small_engine_lacks(name):
    source = (ROOT / "sft" / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    assert set(re.findall(r"\| *(\w+)", re.sub(r"'[^']*'", "''", source))) <= FILTERS
    assert set(re.findall(r"\.(\w+)\(", source)) <= METHODS
    assert set(re.findall(r"{%-? *(\w+)", source)) == STATEMENTS
    opened, closed = re.findall(r"{[{%#]-?", source), re.findall(r"-?[}%#]}(?=\s*(?:{[{%#]|\Z))", source)
    assert {*map(len, opened), *map(len, closed)} == {3}, "white space around every tag is dropped by the tag itself"


TEXT = st.lists(
    st.sampled_from(["<think>", "</think>", "<tool_response>", "</tool_response>", "<|im_end|>", "\n", " ", "é", '"'])
    | st.text(max_size=4),
    max_size=6,
).map("".join)
RESULT = st.tuples(TEXT, st.sampled_from(["", "</tool_response>"])).map(
    lambda parts: "<tool_response>" + "".join(parts)
)
VALUE = st.recursive(st.none() | st.booleans() | st.integers() | TEXT, lambda v: st.lists(v, max_size=2), max_leaves=3)
OBJECT = st.dictionaries(TEXT, VALUE, max_size=3)
FUNCTION = st.fixed_dictionaries({"name": TEXT, "arguments": TEXT | OBJECT})
CALL = FUNCTION | FUNCTION.map(lambda function: {"type": "function", "function": function})
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(
            ["system", "user", "user", "assistant", "assistant", "assistant", "tool", "tool", "other"]
        ),
        "content": TEXT | RESULT,
    },
    optional={
        "reasoning_content": TEXT | st.none(),
        "tool_calls": st.lists(CALL, max_size=3) | st.none(),
        "name": TEXT,
    },
)
# A system turn of content that is no string comes first nowhere: on that the published templates fail.
LATER = (
    MESSAGE | MESSAGE.map(lambda message: {**message, "content": None}) | MESSAGE.map(lambda m: {**m, "content": [{}]})
)
MESSAGES = st.tuples(MESSAGE, st.lists(LATER, max_size=7)).map(lambda pair: [pair[0], *pair[1]])


@pytest.mark.oracle
@each_template
@settings(max_examples=300, deadline=None)
@given(
    messages=MESSAGES,
    tools=st.none() | st.lists(OBJECT, max_size=2),
    flags=st.fixed_dictionaries(
        {}, optional={"add_generation_prompt": st.booleans(), "enable_thinking": st.booleans()}
    ),
)
@example(messages=LATE, tools=[TOOL], flags={"add_generation_prompt": True, "enable_thinking": False})
def test_every_conversation_gives_the_text_of_the_published_template(shared, name, messages, tools, flags):
    expected = compiled(shared / "templates" / PUBLISHED[name]).render(messages=messages, tools=tools, **flags)
    for trim in (True, False):
        assert ours(name, trim=trim).render(messages=messages, tools=tools, **flags) == expected


@pytest.mark.oracle
def test_every_published_case_is_met(shared):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared / "tokenizer" / "qwen3" / "tokenizer.json"))
    with gzip.open(shared / "oracles" / "render" / "render_cases.jsonl.gz", "rt", encoding="utf-8") as file:
        cases = [json.loads(line) for line in file]
    assert cases
    for case in cases:
        conversation = {"messages": case["messages"], "tools": case.get("tools")}
        for name in TEMPLATES:
            assert ours(name).render(**conversation) == case["expected"][name]["text"], case["id"]
        for prompt, thinking in (("gen", True), ("gen_nothink", False)):
            if prompt in case["expected"]:
                text = ours("qwen3").render(**conversation, add_generation_prompt=True, enable_thinking=thinking)
                assert text == tokenizer.decode(case["expected"][prompt], skip_special_tokens=False), case["id"]
