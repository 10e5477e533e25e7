"""tools/show_step.py against what the trainer logs and reads."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train_sft
from sft import batches
from sft.errors import UserError
from sft.sample_view import Piece, shortened
from tests.conftest import ROOT
from tests.preparing import change_meta
from tools import show_step

STEPS = 6
OPTIONS = {"max_iters": STEPS, "save_interval": 2, "keep_checkpoints": "none", "dtype": "float64", "eval_interval": 5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trained") / "out"


@pytest.fixture
def run(arguments, trained, tmp_path) -> dict[str, Any]:
    """The log of a run of six steps of two rows, with checkpoints after 2, 4, 5 and 6."""
    if not trained.exists():
        train_sft.main(arguments(**OPTIONS, out_dir=trained))
    shutil.copytree(trained, tmp_path / "out")
    return json.loads(log_path(tmp_path).read_text())


def log_path(folder: Path) -> Path:
    return max((folder / "out").glob("run_*.json"))


@pytest.fixture
def show(arguments, capsys, monkeypatch) -> Callable[..., str]:
    """Runs the tool on the configuration of the run; what it prints."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)

    def run_tool(*words: str, **changes: object) -> str:
        capsys.readouterr()
        show_step.main([*arguments(**{**OPTIONS, **changes}), *words])
        return capsys.readouterr().out

    return run_tool


def rows_shown(printed: str) -> list[tuple[int, str]]:
    """(number of the row, name of the sample) of each document."""
    return [
        (int(row.replace(",", "")), name) for row, name in re.findall(r"^row ([\d,]+)  (train:\d+)  ", printed, re.M)
    ]


def loss_of(printed: str) -> float:
    (loss,) = re.findall(r"their loss is ([\d.]+) = ", printed.splitlines()[-1])
    return float(loss)


@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_the_losses_by_the_model_before_a_step_are_what_the_log_tells_of_it(run, show, step):
    printed = show(f"--step={step}", "--limit=none")
    assert loss_of(printed) == pytest.approx(run["training_iterations"][step - 1]["loss"], abs=1e-6)
    before = f"out/ckpt_{step - 1:06d}.pt, the model after step {step - 1};" if step > 1 else "a new model, with which"
    assert before in printed
    sums = [float(each) for each in re.findall(r"^row .* = ([\d.]+) / \d+$", printed, re.M)]
    weights = [float(each) for each in re.findall(r"^row .* / (\d+)$", printed, re.M)]
    assert sum(sums) / sum(weights) == pytest.approx(loss_of(printed), abs=1e-4)


def test_the_rows_are_those_that_the_trainer_reads_for_that_step(arguments, show, monkeypatch):
    read: list[list[str]] = []
    make = batches.order_hash

    def note(order, rows):
        read.append([f"train:{sample}" for row in rows for sample in row.tolist()])
        return make(order, rows)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "order_hash", note)
        train_sft.main(arguments(**OPTIONS))
    for step in (1, 4, STEPS):
        printed = show(f"--step={step}", "--limit=none", "--losses=false")
        shown = rows_shown(printed)
        assert [name for _, name in shown] == read[step - 1]
        assert {row for row, _ in shown} == {2 * step - 2, 2 * step - 1}
        told = (
            f"step {step}: rows {2 * step - 2} to {2 * step - 1} of the stream, proven by the order hash of step {step}"
        )
        assert told in printed


def test_a_document_is_shown_with_its_source_its_counts_and_what_is_trained(run, show, prepared):
    printed = show("--step=2", "--losses=false", "--limit=1")
    records = [json.loads(line) for line in (prepared.parent / "conversations.jsonl").read_text().splitlines()]
    told = re.search(
        r"^row 2  train:\d+  \S*conversations\.jsonl record (\d+)  \d+ tokens, \d+ trained$", printed, re.M
    )
    assert told is not None
    record = records[int(told[1]) - 1]
    assert (
        f"⟨im_start⟩user↵\n{record['prompt']}⟨im_end⟩↵\n⟨im_start⟩assistant↵\n⟦{record['completion']}⟨im_end⟩⟧"
        in printed
    )
    assert re.search(r"^1 of \d+ documents; --limit=none shows all$", printed, re.M)


def test_the_last_checkpoint_before_the_step_is_taken_unless_another_is_named(run, show, tmp_path):
    assert "out/ckpt_000002.pt, the model after step 2, which is not that of step 4; without" in show("--step=4")
    named = show("--step=4", f"--checkpoint={tmp_path / 'out' / 'ckpt_000006.pt'}", "--limit=none")
    assert "ckpt_000006.pt, without dropout" in named
    assert loss_of(named) != loss_of(show("--step=4", "--limit=none"))
    for path in (tmp_path / "out").glob("ckpt*.pt"):
        path.unlink()
    printed = show("--step=4")
    assert (
        "losses by a new model, with which the run begins, since no checkpoint of an earlier step is there" in printed
    )


def test_the_model_that_a_run_began_with_is_the_one_before_its_first_step(run, show, arguments, tmp_path):
    base = tmp_path / "out" / "ckpt_000006.pt"
    began = {"model": "none", "checkpoint_path": base, "out_dir": tmp_path / "further"}
    train_sft.main(arguments(**{**OPTIONS, **began}))
    printed = show("--step=1", "--limit=none", **began)
    assert f"losses by {base}, with which the run begins; without dropout" in printed
    log = json.loads(max((tmp_path / "further").glob("run_*.json")).read_text())
    assert loss_of(printed) == pytest.approx(log["training_iterations"][0]["loss"], abs=1e-6)


def test_without_losses_no_model_is_read(run, show, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("a model was read")

    monkeypatch.setattr(train_sft, "load_base", fail)
    monkeypatch.setattr(train_sft, "build_model", fail)
    assert "loss" not in show("--step=3", "--losses=false")


def test_rows_can_be_asked_for_by_their_numbers(run, show):
    printed = show("--row=11,4", "--limit=none")
    assert list(dict.fromkeys(row for row, _ in rows_shown(printed))) == [11, 4]
    assert "out/ckpt_000006.pt, the model after step 6; without dropout" in printed
    assert {row for row, _ in rows_shown(show("--row=3"))} == {3}


def test_the_worst_documents_come_first_on_request(run, show):
    everything = show("--step=3", "--limit=none")
    losses = [float(each) for each in re.findall(r"^row .*  loss ([\d.]+) = ", everything, re.M)]
    printed = show("--step=3", "--limit=2", "--worst_first")
    assert losses != sorted(losses, reverse=True)
    assert [float(each) for each in re.findall(r"^row .*  loss ([\d.]+) = ", printed, re.M)] == sorted(losses)[:-3:-1]


def test_a_long_text_is_cut_in_its_middle_and_says_so(run, show):
    whole, cut = (
        show("--step=3", "--limit=1", "--losses=false"),
        show("--step=3", "--limit=1", "--losses=false", "--characters=40"),
    )
    (left_out,) = re.findall(r"\[\.\.\. (\d+) tokens \.\.\.\]", cut)
    assert 0 < int(left_out) < 40
    begin, end = (part.strip("⟦⟧\n") for part in cut.split("\n\n")[1].split(f"[... {left_out} tokens ...]"))
    assert begin in whole
    assert end in whole
    assert len(cut) < len(whole)


def test_both_ends_of_a_long_text_are_shown_as_far_as_half_of_it_reaches():
    texts = ["aaaa", "b", "c", "dd", "e" * 20, "f", "g", "hh"]
    sample = [Piece((1, 2), (text,), True, 1.0, False) for text in texts]
    shown = ["".join(piece.runs) for piece in shortened(sample, 10)]
    assert shown == ["aaaa", "b", "[... 6 tokens ...]", "f", "g", "hh"]
    assert shortened(sample, 32) == shortened(sample, None) == sample


def test_a_step_that_is_to_come_is_shown_as_it_will_be(run, show):
    assert "step 9: rows 16 to 17 of the stream, its log does not tell of them yet" in show(
        "--step=9", "--losses=false"
    )


def test_without_a_log_the_number_of_ranks_says_how_many_rows_a_step_has(show):
    assert "step 2: rows 6 to 11 of the stream" in show("--step=2", "--losses=false", "--world_size=3")
    assert "step 2: rows 7 to 13 of the stream" in show(
        "--step=2", "--losses=false", "--world_size=3", gradient_accumulation_steps="none", rows_per_step=7
    )


def test_a_resumed_run_with_other_rows_per_step_is_followed_by_its_logs(run, arguments, show):
    changes = {"max_iters": 9, "lr_decay_iters": STEPS, "gradient_accumulation_steps": 3}
    train_sft.main(arguments(**{**OPTIONS, **changes}, resume="required", allow_change="rows_per_step"))
    assert "step 8: rows 15 to 17 of the stream, proven by the order hash of step 8" in show(
        "--step=8", "--losses=false"
    )
    assert "step 3: rows 4 to 5 of the stream, proven by" in show("--step=3", "--losses=false")


def test_the_log_of_a_run_is_a_configuration(run, tmp_path, capsys):
    capsys.readouterr()
    show_step.main([str(log_path(tmp_path)), "--step=3", "--losses=false"])
    assert "step 3: rows 4 to 5 of the stream, proven by the order hash of step 3" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"seed": 7}, {"block_size": 80}])
def test_another_order_than_the_logs_is_refused(run, show, change):
    with pytest.raises(UserError, match="its logs tell that steps 3 to 3 saw other rows than these settings give"):
        show("--step=3", "--losses=false", **change)


def test_other_data_than_the_runs_are_refused(run, show, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "other")
    change_meta(tmp_path / "other", lambda meta: meta["sources"][0].update(weight=0.5))
    with pytest.raises(UserError, match="its logs tell that steps 1 to 1 saw other rows"):
        show("--step=1", "--losses=false", sft_data_dir=tmp_path / "other")


def test_an_odd_step_is_told_of_and_the_rows_that_its_event_names_come_first(run, show, tmp_path):
    event = {"kind": "odd_step", "iter": 3, "rows": [5], "reason": "the loss on rank 1 is nan", "skipped": True}
    log_path(tmp_path).write_text(json.dumps({**run, "events": [event]}))
    printed = show("--step=3", "--limit=none")
    assert "\nthe log: skipped, since the loss on rank 1 is nan\nit names rows 5: these come first\n" in printed
    assert list(dict.fromkeys(row for row, _ in rows_shown(printed))) == [5, 4]
    event.update(rows=[4, 5], reason="the loss is 9.0 sigma above its mean", skipped=False)
    log_path(tmp_path).write_text(json.dumps({**run, "events": [event]}))
    printed = show("--step=3", "--limit=none")
    assert "\nthe log: odd, since the loss is 9.0 sigma above its mean\n" in printed
    assert "these come first" not in printed


def test_what_a_run_calls_odd_can_be_shown(arguments, show, tmp_path):
    """The event as the trainer writes it."""
    train_sft.main(arguments(**{**OPTIONS, "max_iters": 24, "spike_sigma": 0.01}))
    events = [event for event in json.loads(log_path(tmp_path).read_text())["events"] if event["kind"] == "odd_step"]
    assert events
    printed = show(f"--step={events[0]['iter']}", "--losses=false", "--limit=none")
    assert f"\nthe log: odd, since {events[0]['reason']}\n" in printed
    assert {row for row, _ in rows_shown(printed)} == set(events[0]["rows"])


def test_settings_that_cannot_be_used_are_refused(arguments):
    for words, message in (
        ([], "which configuration?"),
        (["--step=3"], "which configuration?"),
        (arguments(), "set step or row: one of the two"),
        ([*arguments(), "--step=3", "--row=3"], "set step or row: one of the two"),
        ([*arguments(), "--step=0"], "step must be at least 1, not 0"),
        ([*arguments(), "--row=4,-1"], "row must be 0 or more, not -1"),
        ([*arguments(), "--step=1", "--limit=0"], "limit must be at least 1, not 0"),
        ([*arguments(), "--step=1", "--losses=false", "--worst_first"], "worst_first needs losses"),
        ([*arguments(), "--step=1", "--sede=3"], "unknown setting 'sede'; did you mean 'seed'"),
        ([*arguments(), "--step=1", "--checkpoint=nowhere.pt"], r"nowhere\.pt: no such checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            show_step.main(words)


def test_a_checkpoint_of_another_tokenizer_is_refused(run, show, tmp_path):
    import torch

    path = tmp_path / "out" / "ckpt_000002.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "tokenizer_fingerprint": "f" * 64}, path)
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        show("--step=3")


@pytest.mark.slow
def test_the_program_itself_exits_with_0(run, arguments):
    command = [sys.executable, ROOT / "tools" / "show_step.py", *arguments(**OPTIONS), "--step=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 3: rows 4 to 5" in done.stdout
