"""The demo: what is held out is held out, the marks are judged, and the pipeline runs, at reduced size."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from demo.materials import write_materials
from demo.run import Folders, make_clean
from demo.score import Answer, Report, Score, missed_marks, table
from demo.world import (
    ANIMALS,
    ANSWERED,
    CRAFTS,
    FACTS,
    KINDS,
    NAMES,
    TOLD,
    VILLAGES,
    Exchange,
    Island,
    conversations,
    papers,
    settle,
)
from sft.errors import UserError
from sft.tokenizer import load_tokenizer
from tests.conftest import ROOT

# The sizes that `make demo` uses.
PAPERS, PER_KIND, HELD_OUT_PER_KIND = 20_000, 1500, 100


@pytest.fixture(scope="module")
def island() -> Island:
    return settle(0)


@pytest.fixture(scope="module")
def sides(island: Island) -> tuple[list[Exchange], list[Exchange]]:
    """(training, held out), as the demo has them."""
    return conversations(island, per_kind=PER_KIND, held_out_per_kind=HELD_OUT_PER_KIND, seed=0)


def told(exchange: Exchange) -> str:
    return " ".join(exchange.turns)


def facts_told(island: Island, exchange: Exchange) -> set[tuple[str, str]]:
    """Every (name, fact) that a conversation's answers state, found in its words alone."""
    sentences = {
        ANSWERED[fact].format(**vars(person)): (person.name, fact) for person in island.people for fact in FACTS
    }
    return {sentences[turn] for turn in exchange.turns if turn in sentences}


def lists_of_names(exchange: Exchange) -> set[frozenset[str]]:
    """Every set of names that stands in a conversation as a list."""
    name = "|".join(NAMES)
    return {frozenset(found.split(", ")) for found in re.findall(rf"(?:(?:{name}), )+(?:{name})(?=\.)", told(exchange))}


def test_there_are_enough_conversations_of_each_kind(sides):
    training, held_out = sides
    assert len(training) >= 2000
    assert len(held_out) >= 300
    assert len(KINDS) >= 4
    for kind in KINDS:
        assert sum(exchange.kind == kind for exchange in training) == PER_KIND
        assert sum(exchange.kind == kind for exchange in held_out) == HELD_OUT_PER_KIND


def test_no_key_and_no_question_is_on_both_sides(sides):
    training, held_out = sides
    assert not {exchange.key for exchange in training} & {exchange.key for exchange in held_out}
    assert not {exchange.turns[0] for exchange in training} & {exchange.turns[0] for exchange in held_out}
    questions = [exchange.turns[:-1] for exchange in held_out]
    assert len(set(questions)) == len(questions)


def test_no_fact_of_a_stranger_is_asked_or_told_in_fine_tuning(island, sides):
    training, held_out = sides
    strangers = {person.name for person in island.strangers}
    assert len(strangers) >= 20
    in_training = set().union(*(facts_told(island, exchange) for exchange in training))
    in_held_out = set().union(*(facts_told(island, exchange) for exchange in held_out))
    assert in_held_out
    assert {name for name, _ in in_held_out} <= strangers
    assert not {name for name, _ in in_training} & strangers
    for exchange in training:
        if exchange.kind == "recall":
            assert not strangers & set(re.findall(r"\w+", told(exchange)))


def test_no_set_of_names_is_on_both_sides(sides):
    training, held_out = sides
    in_training = set().union(*(lists_of_names(exchange) for exchange in training))
    in_held_out = set().union(*(lists_of_names(exchange) for exchange in held_out))
    assert in_held_out
    assert not in_training & in_held_out


def test_held_out_questions_are_no_shorter_than_the_others(sides):
    for kind in KINDS:
        in_training, in_held_out = (
            [len(told(exchange).split()) for exchange in side if exchange.kind == kind] for side in sides
        )
        assert statistics.mean(in_held_out) == pytest.approx(statistics.mean(in_training), rel=0.1)


def test_the_papers_tell_every_fact_and_ask_nothing(island):
    text = "\n".join(papers(island, 3000, 0))
    for person in island.people:
        for fact in FACTS:
            assert any(wording.format(**vars(person)) in text for wording in TOLD[fact])
    assert "?" not in text


def test_a_follow_up_says_nothing_without_its_first_question(sides):
    for exchange in (exchange for side in sides for exchange in side if exchange.kind == "follow-up"):
        question, answer = exchange.turns[-2:]
        wanted = set(re.findall(r"\w+", answer)) & {*NAMES, *VILLAGES, *CRAFTS, *ANIMALS}
        assert len(exchange.turns) == 4
        assert wanted
        assert not wanted <= set(re.findall(r"\w+", question))


def test_the_materials_are_a_function_of_the_seed(tmp_path):
    contents = []
    for number, seed in enumerate((3, 3, 4)):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_materials(folder, seed=seed, paper_count=600, per_kind=30, held_out_per_kind=20)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    assert all(contents[0][name] != contents[2][name] for name in ("papers.jsonl", "training.jsonl", "held_out.jsonl"))


def test_no_conversation_is_written_twice_and_facts_weigh_as_much_as_other_kinds(tmp_path):
    materials = write_materials(tmp_path, seed=0, paper_count=600, per_kind=900, held_out_per_kind=20)
    for path in (materials.papers, materials.training, materials.recall):
        lines = path.read_text().splitlines()
        assert len(lines) == len(set(lines))
    facts = len(materials.recall.read_text().splitlines())
    assert facts < 450
    assert materials.recall_weight * facts == pytest.approx(900, rel=0.01)


def test_the_tokenizer_has_every_name_and_ids_of_its_own_for_the_control_tokens(tmp_path):
    materials = write_materials(tmp_path, seed=0, paper_count=PAPERS, per_kind=PER_KIND, held_out_per_kind=20)
    tokenizer = load_tokenizer(materials.tokenizer)
    assert tokenizer.vocab_size <= 1024
    assert (tokenizer.pad, tokenizer.im_start, tokenizer.im_end) == (0, 1, 2)
    assert not [name for name in NAMES if len(tokenizer.encode(f" {name}")) > 1]  # none begins a line


def a_report(*, exact: float, stopped: float = 1.0, worst: float | None = None) -> Report:
    """What a model would be found to be, with these shares of 100 questions in each kind."""

    def score(share: float) -> Score:
        counts = {"exact": round(100 * share), "stopped": round(100 * stopped)}
        return Score(questions=100, loss_sum=20.0, trained_tokens=10, **counts)

    kinds = {kind: score(exact) for kind in KINDS}
    if worst is not None:
        kinds[KINDS[0]] = score(worst)
    return Report([], kinds)


def test_a_model_that_reaches_every_mark_just_so_is_accepted():
    assert missed_marks(a_report(exact=0.05), a_report(exact=0.87, worst=0.60, stopped=0.99)) == []


@pytest.mark.parametrize(
    ("base", "tuned", "sentence"),
    [
        (a_report(exact=0.06), a_report(exact=1), "before: 6.0% exact answers, more than 5%"),
        (a_report(exact=0), a_report(exact=0.79), "after: 79.0% exact answers, less than 80%"),
        (a_report(exact=0), a_report(exact=1, worst=0.59), f"after: 59.0% exact {KINDS[0]}, less than 60%"),
        (a_report(exact=0), a_report(exact=1, stopped=0.98), "after: 98.0% of the answers stop, less than 99%"),
    ],
)
def test_each_missed_mark_is_named(base, tuned, sentence):
    assert missed_marks(base, tuned) == [sentence]


def test_an_answer_counts_only_word_for_word(sides):
    exchange = sides[1][0]
    assert Answer(exchange, f" {exchange.answer}\n", True).is_exact
    assert not Answer(exchange, f"{exchange.answer} And more.", True).is_exact
    assert not Answer(exchange, exchange.answer.lower(), True).is_exact


def test_the_table_has_a_line_for_each_kind_and_one_for_all():
    lines = table(a_report(exact=0.01), a_report(exact=0.9)).splitlines()
    assert [line.split()[0] for line in lines[2:]] == [*KINDS, "overall"]
    assert lines[-1].split()[1:] == ["400", "2.000", "2.000", "1.0%", "90.0%", "100.0%", "100.0%"]


def demo(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    sizes = ["--papers=300", "--per_kind=20", "--held_out_per_kind=4", "--base_steps=2", "--sft_steps=2"]
    command = [sys.executable, "-m", "demo.run", f"--folder={folder}", *sizes, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_pipeline_runs_from_papers_to_answers_and_judges_them(tmp_path):
    finished = demo(tmp_path)
    assert finished.returncode == 1, finished.stdout + finished.stderr  # two steps teach nothing
    assert "the demo misses its marks:\n  after: 0.0% exact answers, less than 80%" in finished.stderr
    for kind in [*KINDS, "overall"]:
        assert re.search(rf"^{kind} +\d+ ", finished.stdout, flags=re.MULTILINE)
    tuned = tmp_path / "out/demo"
    assert {"ckpt.pt", "tokenizer.json", "loss.png", "answers.jsonl"} <= {path.name for path in tuned.iterdir()}
    assert (tuned / "loss.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tuned / "results.json").read_text())
    assert results["tuned"]["overall"]["questions"] == 4 * len(KINDS)
    assert results["tuned"]["overall"]["exact"] < 0.8
    answers = [json.loads(line) for line in (tuned / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 * len(KINDS)
    assert all(word in finished.stdout for word in ("out/demo/loss.png", "out/demo-base/ckpt.pt", "total"))


def test_a_demo_replaces_what_an_earlier_one_has_made(tmp_path):
    folders = Folders(tmp_path)
    make_clean(folders)
    (folders.tuned / "leftover").touch()
    make_clean(folders)
    assert not (folders.tuned / "leftover").exists()


def test_a_demo_deletes_nothing_that_no_demo_has_made(tmp_path):
    mine = tmp_path / "out/demo/ckpt.pt"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(UserError, match=r"move it away first:\n  .*/out/demo$"):
        make_clean(Folders(tmp_path))
    assert mine.exists()


def test_the_readme_tells_what_the_committed_demo_measured():
    tuned = json.loads((ROOT / "bench/results/demo_cpu.json").read_text())["tuned"]
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| [\w -]+ \| 0 % \| (\d+) % \| 0 % \| (\d+) % \|$", readme, flags=re.MULTILINE)
    assert rows == [(f"{tuned[k]['exact']:.0%}"[:-1], f"{tuned[k]['stopped']:.0%}"[:-1]) for k in KINDS]
