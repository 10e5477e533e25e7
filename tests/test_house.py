"""The rules of the house, held by reading every file: imports, sizes, configs, and what the README promises."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sft.config import load_settings, read_sources
from sft.errors import UserError
from tests.conftest import ROOT

PROGRAMS = ("prepare_sft", "train_sft")
MODEL = ("model_config", "model_builder")
TOP_LEVEL = {*PROGRAMS, *MODEL, "tools", "demo", "bench", "tests"}

# The lowest layer works without torch; the highest is given a model object. All other files of sft/ are in between.
LOWEST = {
    *("errors", "heartbeat", "config", "settings_help", "settings_types", "elsewhere", "run_log", "out_dir_lock"),
    *(
        "conversation",
        "sources",
        "json_records",
        "messages",
        "records",
        "tokenizer",
        "byte_pair",
        "templates",
        "chatml",
        "samples",
        "nfc",
    ),
    *("duplicates", "workers", "preparation", "tally", "joining", "audit", "ledger", "packing", "arrays"),
    *("hub", "untrusted", "npy_header", "meta_shape", "safetensors_header", "interruption"),
    *("export_config", "export_folder", "export_readme", "export_tokenizer"),
    *("files", "seal", "prepared_writer", "data_summary", "data_report", "sample_view", "sample_choice", "page"),
}
HIGHEST = {
    "step",
    "evaluation",
    "document_losses",
    "generate",
    "journal",
    "step_watch",
    "start_checks",
    "start",
    "run",
    "announcement",
    "memory",
    "out_of_memory",
    "dry_run",
    "calibration",
    "export_proof",
}
LIBRARIES_OF_THE_LOWEST = {"numpy", "tokenizers", "tiktoken", "tqdm", "pyarrow", "datasketch", "huggingface_hub"}


def files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


SFT = files("sft/**/*.py")
SOURCES = files("*.py", "sft/**/*.py", "tools/*.py", "demo/*.py", "bench/**/*.py", "configs/*.py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_sft_file = pytest.mark.parametrize("path", SFT, ids=name_of)
each_source = pytest.mark.parametrize("path", SOURCES, ids=name_of)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere; `from sft import x` counts as sft.x."""
    modules = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: imports are absolute"
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


def tops(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def parts_of_sft(modules: set[str]) -> set[str]:
    return {module.split(".")[1] for module in modules if module.startswith("sft.")}


@each_sft_file
def test_sft_never_imports_a_top_level_file(path: Path):
    assert not tops(imported(path)) & TOP_LEVEL


@pytest.mark.parametrize("name", sorted(LOWEST))
def test_the_lowest_layer_needs_no_torch(name: str):
    modules = imported(ROOT / "sft" / f"{name}.py")
    foreign = tops(modules) - set(sys.stdlib_module_names) - LIBRARIES_OF_THE_LOWEST - {"sft"}
    assert not foreign
    assert parts_of_sft(modules) <= LOWEST


@pytest.mark.parametrize("path", [path for path in SFT if path.stem not in HIGHEST], ids=name_of)
def test_only_the_highest_layer_imports_from_itself(path: Path):
    assert not parts_of_sft(imported(path)) & HIGHEST


def test_the_model_is_built_from_the_parts_and_its_config_alone():
    assert not tops(imported(ROOT / "model_config.py")) & (TOP_LEVEL - {"model_config"})
    assert not tops(imported(ROOT / "model_builder.py")) & (TOP_LEVEL - set(MODEL))
    for name in MODEL:
        assert not parts_of_sft(imported(ROOT / f"{name}.py")) & HIGHEST


@pytest.mark.parametrize("path", files("prepare_sft.py", "train_sft.py", "demo/*.py"), ids=name_of)
def test_programs_import_no_tools_or_tests(path: Path):
    assert not tops(imported(path)) & {"tools", "bench", "tests"}


def at_import(body: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Every node that runs when a file is imported: not the bodies of functions, nor of `if __name__ == "__main__"`."""
    for node in body:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            yield from at_import(node.orelse)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from at_import([*node.decorator_list, node.args])
        elif not isinstance(node, ast.Lambda):
            yield node
            yield from at_import(list(ast.iter_child_nodes(node)))


@each_source
def test_no_file_reads_arguments_or_the_environment_while_it_is_imported(path: Path):
    reads = {"os.environ", "os.getenv", "sys.argv", "environ", "getenv", "argv"}
    found = [
        f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}"
        for node in at_import(parse(path).body)
        if isinstance(node, (ast.Attribute, ast.Name)) and ast.unparse(node) in reads
    ]
    assert not found


IMPORT_EACH = """
import importlib, os, sys
before = dict(os.environ)
for path in sys.argv[1:]:
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    sys.argv[:] = ["imported", "--no-such-argument"]
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":  # comes with CUDA builds of torch
            raise
import torch
assert not torch.cuda.is_initialized(), "CUDA is initialised"
assert dict(os.environ) == before, "the environment is changed"
"""


def test_every_file_imports_in_silence_and_leaves_the_process_alone():
    paths = [name_of(path) for path in SOURCES if path.parent.name != "configs"]
    command = [sys.executable, "-c", IMPORT_EACH, *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@each_source
def test_files_and_functions_are_short_enough_to_be_read(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 380, "divide it along a concept"
    long = [
        f"{name_of(path)}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(parse(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= 60
    ]
    assert not long


def test_no_file_names_a_place_on_one_machine():
    places = re.compile("|".join(f"/{name}/" for name in ("work", "root", "home")))
    texts = files("*.*", "Makefile", ".ci/*", ".gitignore", *(f"{name}/**/*" for name in ("sft", "configs", "demo")))
    texts += files(*(f"{name}/**/*" for name in ("tools", "tests", "bench")))
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in texts
        if path.is_file() and "__pycache__" not in path.parts
        for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), start=1)
        if places.search(line)
    ]
    assert not found


def resolve(program: Any, argv: list[str]) -> Any:
    """The settings of a program for argv, in the current folder, where each path that they name is made to exist."""
    for log in (Path(word) for word in argv if word.endswith(".json") and not word.startswith("--")):
        make(log)
        log.write_text(
            json.dumps({"config": {"sft_data_dir": "data/a", "out_dir": "out/a", "model": "gpt2", "max_iters": 9}})
        )
    for item in read_sources(argv, {})[0]:
        if isinstance(item.value, str) and item.name != "out_dir":
            for name in item.value.split(","):
                make(Path(name))
    return load_settings(settings_of(program), argv).settings


def settings_of(program: Any) -> Any:
    (cls,) = [
        value
        for name, value in vars(program).items()
        if name.endswith("Settings") and value.__module__ == program.__name__
    ]
    return cls


def make(path: Path) -> None:
    """A file or folder at a path, if the text looks like one."""
    if path.is_absolute() or path.exists() or not ("/" in str(path) or path.suffix):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch() if path.suffix[1:].isalpha() else path.mkdir()


@pytest.fixture
def empty_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder with the configs, whose data, checkpoints and outputs can be made up."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("empty_repository")
@pytest.mark.parametrize("path", files("configs/*.py"), ids=name_of)
def test_every_config_loads(path: Path):
    import train_sft

    argv = [name_of(path)]
    if "sft_data_dir" not in path.read_text():  # made to be laid over another
        argv.insert(0, "configs/sft_qwen3_0.6b.py")
    settings = resolve(train_sft, argv)
    assert settings.out_dir.startswith("out/")
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.usefixtures("empty_repository")
def test_the_flagship_config_takes_128_rows_a_step_on_eight_gpus():
    import train_sft

    settings = resolve(train_sft, ["configs/sft_qwen3_1.8b.py"])
    rows = settings.batch_size * settings.gradient_accumulation_steps * 8
    assert (rows, rows * settings.block_size) == (128, 262_144)


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def readme_commands() -> list[list[str]]:
    """Every command of the README's fenced blocks, as words."""
    commands = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", readme(), flags=re.DOTALL | re.MULTILINE):
        if language in ("", "sh", "bash", "shell", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # CUDA_VISIBLE_DEVICES=0 python ...
                    words.pop(0)
                if words and Path(words[0]).name in ("python", "torchrun", "make"):  # also .venv/bin/python
                    commands.append([Path(words[0]).name, *words[1:]])
    return commands


def test_the_readme_has_commands():
    starts = {" ".join(command[:2]) for command in readme_commands()}
    assert {"make demo", "make test", "python prepare_sft.py", "python train_sft.py"} <= starts
    assert any(command[0] == "torchrun" for command in readme_commands())


@pytest.mark.usefixtures("empty_repository")
@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_every_command_of_the_readme_can_be_given(command: list[str]):
    if command[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        assert set(command[1:]) <= targets
        return
    script = next(number for number, word in enumerate(command) if word.endswith(".py"))
    assert all(word.startswith("--") for word in command[1:script])
    argv = command[script + 1 :]
    module = importlib.import_module(command[script].removesuffix(".py").replace("/", "."))
    assert callable(module.main)
    if any(name.endswith("Settings") for name in vars(module)):
        while argv and command[script].startswith("tools/") and not argv[0].startswith("--"):
            argv = argv[1:]  # the checkpoint, folder or log that a tool is about
        resolve(module, argv)


def test_every_test_that_the_readme_points_to_exists():
    named = set(re.findall(r"tests/\w+\.py", readme()))
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_the_readmes_tables_of_settings_are_the_programs_own():
    from tools.update_readme import TABLES, with_tables

    assert with_tables(readme()) == readme(), "run: python tools/update_readme.py"
    assert set(re.findall(r"<!-- settings: (\w+) -->", readme())) == set(TABLES)


def test_a_mark_for_an_unknown_table_is_refused():
    from tools.update_readme import with_tables

    with pytest.raises(UserError, match=r"no table is called 'ChatSetings'; there are PrepareSettings, TrainSettings"):
        with_tables("<!-- settings: ChatSetings -->\n<!-- end -->")


def test_every_installed_library_has_one_exact_tested_version():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    assert pins["torch"] == "2.13.0"
    assert not [name for name, version in pins.items() if "+" in version]
    project = (ROOT / "pyproject.toml").read_text()
    wanted = [*re.findall(r'^\s+"([\w-]+)>=', project, flags=re.MULTILINE), "matplotlib"]
    assert not [name for name in wanted if name.lower() not in map(str.lower, pins)]
