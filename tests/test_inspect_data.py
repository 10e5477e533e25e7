import json
import re
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sft.data_summary import bar_edges
from sft.errors import UserError
from sft.samples import NOT_TRAINED
from tests.conftest import ROOT
from tests.made_data import HOSTILE, MadeData
from tools import inspect_data


@pytest.fixture
def made(tmp_path: Path) -> MadeData:
    return MadeData(tmp_path / "data")


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs the tool and returns what it prints, to a terminal with colours where `terminal` is given."""

    def run(*argv: object, terminal: bool = False, no_color: str = "") -> str:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setenv("TERM", "xterm")
        inspect_data.main([str(word) for word in argv])
        return capsys.readouterr().out

    return run


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]+m", "", text)


def samples_of(page: Path) -> list[dict[str, Any]]:
    return data_of(page)["parts"]


def data_of(page: Path) -> dict[str, Any]:
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(content)


def shown_text(sample: dict[str, Any]) -> str:
    return "".join(run for _, runs, *_ in sample["pieces"] for run in runs)


def test_without_colours_brackets_hold_what_is_trained_and_control_tokens_have_names(made, show):
    made.add("cat?", "the\that\n\nsat", origin=(1, 37, 3))
    out = show(made.write())
    assert "⟨im_start⟩user↵\ncat?⟨im_end⟩↵\n⟨im_start⟩assistant↵\n⟦the⇥\that↵\n↵\nsat⟨im_end⟩⟧↵\n" in out
    tokens = len(made.samples["train"][0][0])
    assert f"train:0  raw/more/cats.jsonl record 37, turn 3  {tokens} tokens, " in out
    assert "\x1b" not in out


def test_on_a_terminal_trained_tokens_are_green_and_control_tokens_faint(made, show):
    made.add("cat?", "hat\nsat")
    out = show(made.write(), terminal=True)
    assert "assistant\x1b[2m↵\x1b[0m\n\x1b[32mhat\x1b[0m\x1b[32;2m↵\x1b[0m\n\x1b[32msat\x1b[0m" in out
    assert "\x1b[32msat\x1b[0m\x1b[32;2m⟨im_end⟩\x1b[0m\x1b[2m↵\x1b[0m\n" in out
    assert "\x1b[2m⟨im_start⟩\x1b[0muser" in out


def test_no_color_is_obeyed(made, show):
    made.add("cat?", "hat")
    assert "\x1b" not in show(made.write(), terminal=True, no_color="1")


@pytest.mark.parametrize("terminal", [False, True])
def test_no_control_character_of_the_data_reaches_the_terminal(terminal, made, show):
    made.add(HOSTILE, HOSTILE)
    path = "raw/\x1b[2Jcats.jsonl"
    out = without_colours(show(made.write(sources=[{"path": path}], template="\x1b]0;x"), terminal=terminal))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]", out)
    assert "<0x1B>[31mred<0x1B>]0;title<0x07><U+2028><U+202E>evil<U+009B>2J<|im_end|>" in out
    assert "raw/<0x1B>[2Jcats.jsonl" in out


@pytest.mark.parametrize("arguments", ["--sample=\x1b[2Jcats.jsonl:9", "--source=dogs.jsonl"])
def test_no_control_character_of_a_path_reaches_the_terminal_in_an_error(arguments, made):
    made.add("one", "cat")
    with pytest.raises(UserError) as refused:
        inspect_data.main([str(made.write(sources=[{"path": "raw/\x1b[2Jcats.jsonl"}])), arguments])
    assert "raw/<0x1B>[2Jcats.jsonl" in str(refused.value)
    assert "\x1b" not in str(refused.value)


def test_bytes_that_are_no_character_are_shown_and_a_divided_character_is_whole(made, show):
    made.add("?", "né 你".encode() + b"\xff \xe4\xbd")
    assert "⟦né 你<0xFF> <0xE4><0xBD>⟨im_end⟩⟧" in show(made.write())


def test_weights_are_told_where_they_are_not_1(made, show):
    made.add("one", "cat")
    made.add("two", "hat", weight=0.25)
    out = show(made.write())
    assert "⟦cat⟨im_end⟩⟧" in out
    assert "⟦x0.25 hat⟨im_end⟩⟧" in out


def test_an_id_outside_the_vocabulary_is_told(made, show):
    made.add("one", "cat")
    made.samples["train"][0][0][1] = 99_999
    assert "⟨im_start⟩<no token 99999>" in show(made.write())


@pytest.fixture
def many(made) -> Path:
    for i in range(40):
        made.add(f"q{i}", "cat", origin=(i // 20, i % 20 + 1, -1))
    for turn in range(2):
        made.add(f"v{turn}", "cat", split="val", origin=(2, 7, turn))
    return made.write()


def names(out: str) -> list[str]:
    return re.findall(r"^(train:\d+|val:\d+)  ", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sample=train:12"], ["train:12"]),
        (["--sample=12"], ["train:12"]),
        (["--sample=1", "--split=val"], ["val:1"]),
        (["--sample=val:0"], ["val:0"]),
        (["--sample=raw/cats.jsonl:20"], ["train:19"]),
        (["--sample=more/cats.jsonl:1"], ["train:20"]),
        (["--sample=<b>dogs</b>.jsonl:7"], ["val:0", "val:1"]),  # a sample for each turn
        (["--n=0"], []),
        (["--split=val"], ["val:0", "val:1"]),
        (["--n=100", "--source=more/cats.jsonl"], [f"train:{i}" for i in range(20, 40)]),
        (["--source=raw/cats.jsonl", "--split=val"], []),
    ],
)
def test_samples_are_found_by_their_names_splits_and_sources(arguments, expected, many, show):
    assert names(show(many, *arguments)) == expected


def test_the_choice_is_spread_over_the_data_repeatable_and_told(many, show):
    first = show(many, "--n=6")
    chosen = names(first)
    place = [int(name.split(":")[1]) + 40 * name.startswith("val") for name in chosen]
    assert [7 * i <= at < 7 * (i + 1) for i, at in enumerate(place)] == [True] * 6
    assert "6 of 42 samples, drawn from 6 equal parts of the data (seed 0);" in first
    assert "1 of 42 samples, drawn from all of the data (seed 0);" in show(many, "--n=1")
    assert "0 of 42 samples;" in show(many, "--n=0")
    assert names(show(many, "--n=6")) == chosen
    assert names(show(many, "--n=6", "--seed=1")) != chosen
    assert len(names(show(many))) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample=train:40"], "no sample train:40; there are train:0 to train:39"),
        (["--sample=val:2"], "no sample val:2; there are val:0 to val:1"),
        (["--sample=first"], "sample 'first' is none of train:12, 12 and file.jsonl:37"),
        (["--sample=train:-1"], "is none of train:12"),
        (["--sample=raw/cats.jsonl:21"], "no sample comes from record 21 of raw/cats.jsonl; it is bad, was dropped"),
        (
            ["--sample=cats.jsonl:1"],
            "'cats.jsonl' names several sources; there are raw/cats.jsonl, raw/more/cats.jsonl",
        ),
        (["--source=birds.jsonl"], "no source is called 'birds.jsonl'; there are raw/cats.jsonl, raw/more"),
        (["--sample=train:1", "--split=val"], "'train:1' is not of the split and the source that are asked for"),
        (["--sample=train:1", "--source=more/cats.jsonl"], "'train:1' is not of the split and the source"),
        (["--n=-1"], "n must be at least 0, not -1"),
        (["--html="], "html is empty"),
    ],
)
def test_what_cannot_be_shown_is_one_error_that_says_what_can(arguments, message, many):
    with pytest.raises(UserError, match=re.escape(message)):
        inspect_data.main([str(many), *arguments])


def test_a_folder_without_prepared_data_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no prepared data here; make it with prepare_sft"):
        inspect_data.main([str(tmp_path)])
    with pytest.raises(UserError, match="which prepared data"):
        inspect_data.main(["--n=3"])


def test_labels_that_are_not_the_tokens_are_an_error(made):
    made.add("one", "cat")
    made.samples["train"][0][1][-2] = 5
    with pytest.raises(UserError, match="train:0 has labels that are not its tokens; run prepare_sft"):
        inspect_data.main([str(made.write())])


def test_the_summary_tells_the_ledger_the_lengths_the_oddities_and_the_audit(many, show):
    out = show(many, "--n=0")
    ledger = json.loads((many / "meta.json").read_text())["ledger"]["tokens"]
    total, trained = ledger["total"], ledger["trained"]
    rows = [line.split() for line in out.splitlines()]
    assert ["total", f"{total:,}", "100.0%"] in rows
    assert ["trained", f"{trained:,}", f"{trained / total:.1%}"] in rows
    assert ["masked", "user", f"{total - trained:,}", f"{1 - trained / total:.1%}"] in rows
    assert ["bad", "bytes", "77"] in rows
    assert ["spells", "control", "1", "raw/cats.jsonl:37"] in rows
    assert not any(row[:2] == ["empty", "turn"] for row in rows)
    assert f"audit passed: conversations 42, trained tokens {trained:,}" in out
    assert "raw/cats.jsonl:9: not valid JSON; <0x1B>mend it" in out
    assert "template chatml, block_size 1,234" in out


def test_validation_conversations_that_are_in_training_are_told_with_their_places(made, show, tmp_path):
    made.add("one", "cat")
    places = {"validation": "raw/cats.jsonl, record 37", "training": "raw/\x1b[2Jdogs.jsonl, record 2"}
    folder = made.write(leaks={"conversations": 1234, "exact": 56, "first": [{**places, "similarity": 0.875}]})
    out = show(folder, "--n=0")
    assert "dropped from validation for being in training: 1,234, 56 of them exactly\n" in out
    assert re.search(r"^  raw/cats.jsonl, record 37 +raw/<0x1B>\[2Jdogs.jsonl, record 2 +87.5%$", out, re.MULTILINE)
    show(folder, f"--html={tmp_path / 'page.html'}")
    (table,) = [table for table in data_of(tmp_path / "page.html")["facts"]["tables"] if "dropped" in table["title"]]
    assert table["rows"] == [[*places.values(), "87.5%"]]
    without = made.write(leaks={"conversations": 0, "exact": 0, "first": []})
    assert "from validation" not in show(without, "--n=0")


@pytest.mark.parametrize(
    ("audit", "line"),
    [(None, "audit none: the trainer refuses this data"), ({"passed": False, "samples": 3}, "audit not passed: the")],
)
def test_data_without_a_passed_audit_is_told(audit, line, made, show):
    made.add("one", "cat")
    assert line in show(made.write(audit=audit))


def test_a_split_without_samples_is_no_obstacle(made, show, tmp_path):
    made.add("one", "cat")
    folder = made.write()
    assert "0 of 0 samples" in show(folder, "--split=val")
    show(folder, "--split=val", f"--html={tmp_path / 'page.html'}")
    assert samples_of(tmp_path / "page.html") == []


def test_looking_at_data_needs_no_torch(made):
    made.add("one", "cat")
    code = "import sys; from tools import inspect_data as it; it.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, str(made.write())]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def hostile_page(made: MadeData, tmp_path: Path, show: Any) -> Path:
    made.add(HOSTILE, HOSTILE)
    hostile_settings = {"input": "</script><script>alert(1)</script><img src=x onerror=alert(1)><!--\u2028"}
    show(made.write(settings=hostile_settings), f"--html={tmp_path / 'page.html'}")
    return tmp_path / "page.html"


def test_content_cannot_leave_the_element_that_holds_it(made, show, tmp_path):
    page = hostile_page(made, tmp_path, show).read_text()
    template = inspect_data.TEMPLATE.read_text()
    for tag in ("<script", "</script", "<img", "<!--"):
        assert page.count(tag) == template.count(tag)
    assert "\u2028" not in page
    assert HOSTILE.partition("\x1b")[0] in shown_text(samples_of(tmp_path / "page.html")[0])


def test_the_page_refers_to_nothing_outside_and_only_its_own_script_may_run(made, show, tmp_path):
    page = hostile_page(made, tmp_path, show).read_text()
    assert not re.findall(r"""(?:src|href|action)\s*=|url\(|@import|<link|<iframe""", page.split('id="data"')[0])
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp", script)
    assert "default-src 'none'" in page
    assert "SCRIPT-HASH" not in page


def test_the_page_holds_ids_weights_and_spellings(made, show, tmp_path):
    made.add("cat", "né".encode() + b"\xff", weight=0.5, origin=(0, 3, 1))
    show(made.write(), f"--html={tmp_path / 'page.html'}")
    data = data_of(tmp_path / "page.html")
    (sample,) = data["parts"]
    assert [i for ids, *_ in sample["pieces"] for i in ids] == made.samples["train"][0][0]
    trained = [piece for piece in sample["pieces"] if piece[2] & 1]
    assert [i for ids, *_ in trained for i in ids] == [i for i in made.samples["train"][0][1] if i != NOT_TRAINED]
    assert {piece[3] for piece in trained} == {"0.5"}
    assert [(len(ids), runs) for ids, runs, *_ in trained[:3]] == [(1, ["n"]), (2, ["é"]), (1, ["", "<0xFF>", ""])]
    assert [data["facts"]["spelled"][str(i)] for i in trained[1][0]] == ["bytes C3", "bytes A9"]
    assert (sample["origin"], data["facts"]["weighted"]) == ("raw/cats.jsonl record 3, turn 1", True)


def test_a_page_has_200_samples_unless_they_are_too_large(made, show, tmp_path, monkeypatch):
    for i in range(230):
        made.add("q", f"{i}", origin=(0, i + 1, -1))
    folder, page = made.write(), tmp_path / "page.html"
    assert "200 of 230 samples" in show(folder, f"--html={page}")
    assert len(samples_of(page)) == 200
    monkeypatch.setattr(inspect_data, "PAGE_BYTES", 10_000)
    assert "of them are here, since the page is full at 0.01 MB" in show(folder, f"--html={page}", "--n=230")
    indices = [sample["place"] for sample in samples_of(page)]
    assert 5 < len(indices) < 100
    assert indices == sorted(indices)
    assert indices[-1] > 115, "a full page shows samples from everywhere"
    monkeypatch.setattr(inspect_data, "PAGE_BYTES", 10)
    show(folder, f"--html={page}")
    assert len(samples_of(page)) == 1, "one sample is always there"


def test_the_histogram_counts_every_sample(made, show, tmp_path):
    for length in (1, 2, 3, 100, 3000):
        made.add("q", "cat " * length)
    show(made.write(), f"--html={tmp_path / 'page.html'}")
    found = data_of(tmp_path / "page.html")["facts"]["histogram"]
    assert sum(found["tokens"]) == sum(found["trained"]) == 5
    for values, counts in ((lengths(made.samples["train"]), "tokens"), (trained_of(made), "trained")):
        expected = [sum(low <= value < high for value in values) for low, high in pairwise(found["edges"])]
        assert found[counts] == expected


def lengths(samples: Iterable[tuple[list[int], list[int]]]) -> list[int]:
    return [len(ids) for ids, _ in samples]


def trained_of(made: MadeData) -> list[int]:
    return [len(labels) - labels.count(NOT_TRAINED) for _, labels in made.samples["train"]]


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (7, 7), (1, 32), (1, 33), (100, 799), (3, 131_072), (1, 9)])
def test_bars_grow_and_hold_the_shortest_and_the_longest(shortest, longest):
    edges = bar_edges(shortest, longest)
    assert edges == sorted(set(edges))
    assert edges[0] <= shortest <= longest < edges[-1]
    assert 2 <= len(edges) <= 40


@pytest.mark.parametrize(("shortest", "longest"), [(1, 32), (10, 45), (100, 799)])
def test_bars_are_of_one_width_where_lengths_are_alike(shortest, longest):
    edges = bar_edges(shortest, longest)
    assert len({high - low for low, high in pairwise(edges)}) == 1
    assert len(edges) > 16


def test_bars_double_every_other_time_where_lengths_differ_widely():
    edges = bar_edges(16, 5000)
    assert edges[::2] == [16 * 2**i for i in range(len(edges[::2]))]


def test_a_page_is_whole_or_absent_and_replaces_nothing_but_pages(many, show, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    show(many, f"--html={page}")
    show(many, f"--html={page}", "--n=1")
    assert len(samples_of(page)) == 1
    page.write_text("notes")
    with pytest.raises(UserError, match=r"page.html: was not written by this program and would be lost"):
        inspect_data.main([str(many), f"--html={page}"])
    for path in (tmp_path, many / "meta.json"):
        with pytest.raises(UserError, match="would be lost; choose another file"):
            inspect_data.main([str(many), f"--html={path}"])
    with pytest.raises(UserError, match=r"none/page.html: cannot be written \(No such file or directory\); choose"):
        inspect_data.main([str(many), f"--html={tmp_path / 'none' / 'page.html'}"])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sft.files.os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        inspect_data.main([str(many), f"--html={tmp_path / 'new.html'}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "page.html"]
