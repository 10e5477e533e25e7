import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from sft.config import fingerprint, help_text, load_settings, markdown_table, to_dict
from sft.errors import UserError
from sft.settings_help import field_comments
from sft.settings_types import checked, read_text, type_name
from tests.conftest import ROOT


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Knobs of a small machine."""

    sft_data_dir: str  # the prepared data
    learning_rate: float = 2e-5  # at the peak
    min_lr: float = 2e-6  # at the end
    max_iters: int | None = None  # steps; or give max_epochs
    max_epochs: float | None = None  # passes; or give max_iters
    batch_size: int = 4  # rows per micro-step
    compile: bool = False  # of the model | its graph
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"  # shape
    model: str | dict[str, Any] | None = None  # a preset or its fields
    betas: tuple[float, float] = (0.9, 0.95)
    sources: tuple[str, ...] = ()  # files
    tags: list[str] = field(default_factory=list)  # free words

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.min_lr > self.learning_rate:
            yield "min_lr", f"min_lr {self.min_lr:g} is above learning_rate {self.learning_rate:g}"
        if self.max_iters is not None and self.max_epochs is not None:
            yield "max_epochs", "max_epochs and max_iters are both given; leave one of them out"
        if not self.sft_data_dir:
            yield "sft_data_dir", "sft_data_dir is empty"
        if self.sft_data_dir.startswith("no/"):
            yield "sft_data_dir", f"sft_data_dir {self.sft_data_dir!r} does not exist"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def complaint(argv: list[str], **options: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_settings(Knobs, argv, **options)
    assert caught.value.exit_status == 2
    headline, *problems = str(caught.value).split("\n  ")
    assert headline == "the settings cannot be used:"
    return problems


def test_sources_apply_in_order_and_every_value_knows_its_origin():
    Path("a.py").write_text('sft_data_dir = "a"\nbatch_size = 1\nlearning_rate = 1\n')
    Path("run_b.json").write_text(json.dumps({"config": {"batch_size": 2, "betas": [0.5, 1]}, "status": "finished"}))
    Path("c.py").write_text("import math\n_rows = 2\nbatch_size = 9\nbatch_size = (\n    _rows + 1\n)\n")
    settings, origins = load_settings(Knobs, ["--max_iters=7", "a.py", "run_b.json", "c.py", "--min_lr=1e-7"])
    assert settings == Knobs(
        sft_data_dir="a", batch_size=3, learning_rate=1.0, betas=(0.5, 1.0), max_iters=7, min_lr=1e-7
    )
    assert isinstance(settings.learning_rate, float)
    assert origins == {
        **dict.fromkeys(Knobs.__dataclass_fields__, "default"),
        "sft_data_dir": "a.py:1",
        "learning_rate": "a.py:3",
        "betas": "run_b.json",
        "batch_size": "c.py:4",
        "max_iters": "command line",
        "min_lr": "command line",
    }


def test_every_problem_is_reported_at_once_with_file_and_line():
    Path("mine.py").write_text('learing_rate = 1e-5\nsft_data_dir = "x"\nbatch_size = 2.5\n')
    problems = complaint(
        ["mine.py", "gone.py", "--compile=flase", "--max_iters=3", "--max_epochs=1", "word", "--nope=1"]
    )
    assert problems == [
        "gone.py: no such file or directory",
        "command line: 'word' is no config file (*.py), run log (*.json) or --name=value",
        "mine.py:1: unknown setting 'learing_rate'; did you mean 'learning_rate'?",
        "mine.py:3: batch_size must be int, not 2.5",
        "command line: compile must be bool, not 'flase'",
        "command line: unknown setting 'nope'; --help lists the settings",
        "command line: max_epochs and max_iters are both given; leave one of them out (max_iters: command line)",
    ]


def test_a_contradiction_names_where_each_of_its_values_comes_from():
    Path("slow.py").write_text('sft_data_dir = "x"\n\nlearning_rate = 1e-7\n')
    assert complaint(["slow.py"]) == ["default: min_lr 2e-06 is above learning_rate 1e-07 (learning_rate: slow.py:3)"]


def test_what_may_only_follow_from_another_problem_is_not_reported():
    assert complaint(["--sft_data_dir=x", "--min_lr=1", "--learing_rate=2"]) == [
        "command line: unknown setting 'learing_rate'; did you mean 'learning_rate'?"
    ]
    assert complaint(["gone.py", "--min_lr=1"]) == ["gone.py: no such file or directory"]


def test_a_missing_setting_is_named_with_its_comment_beside_contradictions():
    assert complaint(["--min_lr=1"]) == [
        "missing setting 'sft_data_dir': the prepared data",
        "command line: min_lr 1 is above learning_rate 2e-05",
    ]
    assert complaint(["--sft_data_dri=x"]) == [
        "command line: unknown setting 'sft_data_dri'; did you mean 'sft_data_dir'?"
    ]


def test_an_error_inside_contradictions_is_not_swallowed():
    @dataclass(frozen=True, kw_only=True)
    class Broken:
        size: int = 1  # size

        def contradictions(self) -> Iterator[tuple[str, str]]:
            yield "size", self.no_such_thing

    with pytest.raises(AttributeError):
        load_settings(Broken, [])


def test_names_from_elsewhere_are_answered_with_what_to_do_instead():
    Path("old.py").write_text("sft_data_dir = 'x'\nignore_index = -1\n")
    sentence = "trained tokens are marked in the prepared data; remove the line"
    assert complaint(["old.py"], elsewhere={"ignore_index": sentence}) == [
        f"old.py:2: unknown setting 'ignore_index'; {sentence}"
    ]


def test_values_after_a_space_and_bare_switches_get_a_sentence():
    assert complaint(["--sft_data_dir", "x", "--learning_rate", "-1", "--batch_size"]) == [
        "command line: write --sft_data_dir=x with an equals sign, not --sft_data_dir x",
        "command line: write --learning_rate=-1 with an equals sign, not --learning_rate -1",
        "command line: --batch_size needs a value: --batch_size=...",
    ]


def test_a_switch_alone_is_true_and_one_that_may_be_none_needs_its_value():
    assert load_settings(Knobs, ["--sft_data_dir=x", "--compile"]).settings.compile is True
    assert complaint(["--sft_data_dir=x", "--compile", "false"]) == [
        "command line: write --compile=false with an equals sign, not --compile false"
    ]

    @dataclass(frozen=True, kw_only=True)
    class ThreeWays:
        compile: bool | None = None  # None = where it helps

    with pytest.raises(UserError, match="--compile needs a value: --compile=true or --compile=false"):
        load_settings(ThreeWays, ["--compile"])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (b"batch_size = 1\nlearning_rate = = 2\n", "bad.py:2: invalid syntax"),
        (b"batch_size = 1\n\nlearning_rate = 1 / 0\n", "bad.py:3: ZeroDivisionError: division by zero"),
        (b"batch_size = 1\nraise SystemExit\n", "bad.py:2: SystemExit: "),
        (b"batch_size = " + b"-" * 20_000 + b"1\n", "bad.py: an expression is nested too deeply"),
        (b"batch_size = " + b"1 + " * 20_000 + b"1\n", "bad.py: an expression is nested too deeply"),
        (b"learning_rate = batch_size\n", "bad.py:1: NameError: name 'batch_size' is not defined"),
        (b"from math import pi\n", "bad.py:1: unknown setting 'pi'; the name of a helper begins with _"),
        (b"\ndef rows(): return 3\n", "bad.py:2: unknown setting 'rows'; the name of a helper begins with _"),
        (b"batch_size = True\n", "bad.py:1: batch_size must be int, not True"),
        (b"learning_rate = float('nan')\n", "bad.py:1: learning_rate must be float, not nan"),
        (b"compile = 1\n", "bad.py:1: compile must be bool, not 1"),
        (b"tags = ['a', 2]\n", "bad.py:1: tags must be list[str], not ['a', 2]"),
        (b"model = {'n_layer': {1}}\n", "bad.py:1: model must be str | dict[str, Any] | None, not {'n_layer': {1}}"),
        (b"lr_schedule = 'step'\n", "bad.py:1: lr_schedule must be 'cosine' | 'linear' | 'constant', not 'step'"),
        (b"tags = 100 * [1]\n", "bad.py:1: tags must be list[str], not [" + "1, " * 32 + "..."),
    ],
)
def test_a_bad_config_file_is_refused_with_its_line(source: bytes, expected: str):
    Path("good.py").write_text('sft_data_dir = "x"\nbatch_size = 3\n')  # of which a later file sees nothing
    Path("bad.py").write_bytes(source)
    assert complaint(["good.py", "bad.py"]) == [expected]


@pytest.mark.parametrize("source", [b"batch_size = '\xff'\n", b"batch_size = 1\0\n", b"(" * 300])
def test_a_config_file_that_is_no_text_is_refused(source: bytes):
    Path("bad.py").write_bytes(source)
    (problem,) = complaint(["bad.py"])
    assert problem.startswith("bad.py:1: ")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('{"config":\n {"batch_size": 1,}}', "run.json:2: not valid JSON: "),
        ("\xff", "run.json: not valid JSON: "),
        ("[" * 100_000, "run.json: not valid JSON: JSON nested too deeply"),
        ('{"config": {"batch_size": ' + "9" * 5000 + "}}", "run.json: not valid JSON: Exceeds the limit"),
        ('{"config": {"learning_rate": 1' + "0" * 400 + "}}", "run.json: learning_rate must be float, not 1000"),
        ("[1]", "run.json: holds no 'config' object; a run log (run_*.json) has one"),
        ('{"config": {"bach_size": 1}}', "run.json: unknown setting 'bach_size'; did you mean 'batch_size'?"),
        ('{"config": {"learning_rate": NaN}}', "run.json: not valid JSON: NaN is not JSON; write null"),
    ],
)
def test_a_bad_run_log_is_refused(source: str, expected: str):
    Path("run.json").write_text(source, encoding="latin-1")
    (problem,) = complaint(["run.json", "--sft_data_dir=x"])
    assert problem.startswith(expected)


def test_a_run_log_with_every_setting_repeats_a_run():
    settings = Knobs(sft_data_dir="x", model={"n_layer": 2}, sources=("a", "b"), tags=["t"], max_epochs=1.5)
    Path("run.json").write_text(json.dumps({"config": to_dict(settings)}))
    assert load_settings(Knobs, ["run.json"]).settings == settings


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("1_000", int, 1000),
        ("1e3", int, 1000),
        ("-7", int, -7),
        ("1", float, 1.0),
        ("1e-5", float, 1e-5),
        ("TRUE", bool, True),
        ("false", bool, False),
        ("none", int | None, None),
        ("None", str | None, None),
        ("nonesuch", str | None, "nonesuch"),
        ("1", str, "1"),
        ("a=b", str, "a=b"),
        ("", str, ""),
        ("bf16", Literal["bf16", 32, None], "bf16"),
        ("32", Literal["bf16", 32, None], 32),
        ("none", Literal["bf16", 32, None], None),
        ("[1, 2]", list[int], [1, 2]),
        ("0.9,1", tuple[float, float], (0.9, 1.0)),
        ("a.jsonl:2.0,b.jsonl", tuple[str, ...], ("a.jsonl:2.0", "b.jsonl")),
        ("['a,b']", list[str], ["a,b"]),
        ("qwen3-0.6b", str | dict[str, Any] | None, "qwen3-0.6b"),
        ("{'n_layer': 2}", str | dict[str, Any] | None, {"n_layer": 2}),
        ("{'a': 1}", dict[str, float], {"a": 1.0}),
        ("[]", list, []),
    ],
)
def test_text_is_read_by_the_declared_type(text: str, hint: Any, value: Any):
    result = read_text(text, hint)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("1.5", int),
        ("1e-3", int),
        ("inf", int),
        ("nan", float),
        ("-" * 20_000 + "1", list[int]),
        ("inf", float | None),
        ("1", bool),
        ("yes", bool),
        ("none", int),
        ("", int | None),
        ("64", Literal["bf16", 32]),
        ("1,2,3", tuple[float, float]),
        ("3", list[int]),
        ("1,x", list[int]),
        ("{1: 2}", dict[str, int]),
        ("{[]: 2}", dict[str, int]),
        ("__import__('os')", dict),
    ],
)
def test_text_of_another_type_is_refused(text: str, hint: Any):
    with pytest.raises(ValueError):  # noqa: PT011 the caller makes the message
        read_text(text, hint)


def test_a_type_that_no_setting_may_have_is_the_programmers_mistake():
    with pytest.raises(AssertionError, match="no settings of type"):
        checked("x", set[str])


def test_a_setting_named_in_a_quoted_path_has_no_part_in_the_problem():
    assert complaint(["--sft_data_dir=no/model/batch_size", "--model=gpt2", "--batch_size=x"]) == [
        "command line: batch_size must be int, not 'x'",
        "command line: sft_data_dir 'no/model/batch_size' does not exist",
    ]


def test_help_shows_every_setting_with_type_default_and_comment(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        load_settings(Knobs, ["gone.py", "--help"], usage="machine [config.py ...]")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown == help_text(Knobs, "machine [config.py ...]") + "\n"
    assert shown.startswith("usage: machine [config.py ...]\n\nKnobs of a small machine.\n")
    assert "  --sft_data_dir=str  (required)\n        the prepared data\n" in shown
    assert "  --max_iters=int | None  [None]\n        steps; or give max_epochs\n" in shown
    assert "  --betas=tuple[float, float]  [(0.9, 0.95)]\n  --sources=tuple[str, ...]  [()]\n" in shown
    assert [line.split("=")[0].strip(" -") for line in shown.splitlines() if "--" in line[:4]] == list(
        Knobs.__dataclass_fields__
    )


def test_help_works_in_the_file_that_is_the_program(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(
        "from __future__ import annotations\nimport sys\nfrom dataclasses import dataclass\n"
        "from sft.config import load_settings\n\n@dataclass(frozen=True, kw_only=True)\nclass Settings:\n"
        "    size: int = 3  # how much\n\nload_settings(Settings, sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, str(program), "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "  --size=int  [3]\n        how much\n" in done.stdout
    assert "Settings(" not in done.stdout  # the docstring that dataclass makes up


@dataclass(frozen=True, kw_only=True)
class Wrapped:
    gradient_accumulation_steps: int | None = (  # micro-steps;
        None  # or as rows_per_step needs
    )
    rows_per_step: int = 1


def test_a_setting_that_a_formatter_wrapped_keeps_its_comments():
    assert "steps=int | None  [None]\n        micro-steps; or as rows_per_step needs\n" in help_text(Wrapped, "")
    assert help_text(Wrapped, "").endswith("--rows_per_step=int  [1]")


def test_every_setting_of_every_program_says_what_it_is():
    from demo.run import DemoSettings
    from prepare_sft import PrepareSettings
    from tools.chat import ChatSettings
    from train_sft import TrainSettings

    for cls in (PrepareSettings, TrainSettings, ChatSettings, DemoSettings):
        assert not [f"{cls.__name__}.{name}" for name, comment in field_comments(cls).items() if not comment]


def test_the_markdown_table_escapes_what_would_divide_its_cells():
    table = markdown_table(Knobs).splitlines()
    assert table[2] == "| `sft_data_dir` | `str` | required | the prepared data |"
    assert r"| `compile` | `bool` | `False` | of the model \| its graph |" in table
    assert len(table) == 2 + len(Knobs.__dataclass_fields__)


def test_types_are_named_as_one_writes_them():
    assert type_name(str | dict[str, Any] | None) == "str | dict[str, Any] | None"
    assert type_name(Literal["a", 1] | None) == "'a' | 1 | None"
    assert type_name(Any) == "Any"


def test_the_fingerprint_is_equal_exactly_where_the_values_are():
    one = Knobs(sft_data_dir="x", model={"a": 1, "b": 2})
    assert fingerprint(one) == fingerprint(replace(one, model={"b": 2, "a": 1}))
    assert len(fingerprint(one)) == 64
    assert fingerprint(one) != fingerprint(replace(one, learning_rate=2.0000001e-5))
    assert json.loads(json.dumps(to_dict(one))) == to_dict(one)
