"""tools/verify_resume.py on runs that are what they should be, and on runs that are not."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import sft.run
import train_sft
from sft import verification
from sft.config import load_settings
from sft.errors import UserError
from sft.optim import learning_rate_at
from sft.past_steps import read_logs
from sft.run import Run
from tests.conftest import ROOT
from tests.ranks import Main, run_program_until
from tools import verify_resume


def forgets_the_moments(argv: list[str]) -> None:
    sft.run.restore_optimizer = lambda *_: None
    train_sft.main(argv)


def skips_a_row(argv: list[str]) -> None:
    restore = Run.restore

    def restore_and_skip(run: Run, saved: dict) -> None:
        restore(run, saved)
        run.rows_seen += 1

    Run.restore = restore_and_skip  # type: ignore[method-assign]
    train_sft.main(argv)


def draws_noise(argv: list[str]) -> None:
    update = Run.update

    def update_and_shake(run: Run, **settings) -> None:
        update(run, **settings)
        with torch.no_grad():
            run.model.head_weight[0, 0] += 1e-6 * (1 + os.urandom(1)[0])

    Run.update = update_and_shake  # type: ignore[method-assign]
    train_sft.main(argv)


def hears_no_signal(argv: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sft.run.Run.milestone = lambda run, *, saves: run.save(is_best=False, must=True) if saves else None
    train_sft.StopSignals.__enter__ = lambda signals: signals
    train_sft.StopSignals.__exit__ = lambda *_: None
    train_sft.main(argv)


def breaks_when_resumed(argv: list[str]) -> None:
    Run.restore = lambda run, saved: exec("raise RuntimeError('torn to pieces')")
    train_sft.main(argv)


@pytest.fixture
def verify(arguments, tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Runs the tool, with the trainer or with a rogue one; what it prints."""

    def run_tool(*words: str, main: Main = train_sft.main, **changes: object) -> str:
        def run_until(command, is_moment, number):
            argv = command[command.index(str(verify_resume.TRAINER)) + 1 :]
            return run_program_until(main, argv, is_moment, number)

        monkeypatch.setattr(verification, "run_until", run_until)
        monkeypatch.setattr(verification, "run", lambda command: run_until(command, lambda _: False, signal.SIGTERM))
        given = {"max_iters": 100, "dropout": 0.1, "out_dir": tmp_path / "out" / "mine", **changes}
        verify_resume.main([*arguments(**given), *words])
        return capsys.readouterr().out

    return run_tool


def test_interrupted_runs_are_equal_to_an_uninterrupted_one(verify, tmp_path):
    printed = verify()
    assert "  SIGTERM after step 5, resumed from step " in printed
    assert "  SIGKILL after step 5, resumed from step 4  " in printed
    rows = {line[2:20].strip(): line[56:].split() for line in printed.splitlines() if line.startswith("  ")}
    parts = ("model", "optimizer", "rows seen", "order of the rows", "counters", "validation losses", "logged steps")
    for part in parts:
        assert rows[part] == ["equal", "equal"], part
    assert "equal: an interrupted run of these settings is the uninterrupted one, to the bit" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rogue", "blame", "differ", "equal"),
    [
        (forgets_the_moments, "two uninterrupted runs are equal, to the bit", "model", "order of the rows"),
        pytest.param(skips_a_row, "the rows seen differ", "order of the rows", None, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_resume_that_makes_another_run_is_blamed(verify, capsys, tmp_path, rogue, blame, differ, equal):
    with pytest.raises(
        UserError, match=f"resuming is at fault: interrupted runs are other runs, and {blame}"
    ) as caught:
        verify("--steps=4", main=rogue)
    assert caught.value.exit_status == 1
    printed = capsys.readouterr().out
    assert f"  SIGTERM: {differ}: " in printed
    assert f"  SIGKILL: {differ}: " in printed
    assert equal is None or f": {equal}: " not in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_settings_that_are_not_deterministic_are_told_from_a_resume_that_is_wrong(verify, capsys):
    told = r"(?s)not deterministic by themselves: .*\n  model: \d+ of \d+ differ, first token_embeddings.*same rows"
    with pytest.raises(UserError, match=told) as caught:
        verify("--steps=4", main=draws_noise)
    assert caught.value.exit_status == 1
    assert "  rows seen           8                                 equal     equal" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_breaks_is_shown(verify, tmp_path):
    with pytest.raises(
        UserError, match=r"(?s)SIGTERM after step \d: the run failed \(exit status 1\):.*torn to pieces"
    ):
        verify("--steps=4", main=breaks_when_resumed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_signal_that_always_comes_too_late_is_no_proof(verify):
    with pytest.raises(UserError, match="the runs are over before SIGTERM comes; ask for more: --steps=16"):
        verify("--steps=4", main=hears_no_signal)


def test_a_run_that_is_refused_is_shown(verify):
    with pytest.raises(UserError, match=r"(?s)uninterrupted: the run failed \(exit status 2\):.*block_size is 16"):
        verify(block_size=16)


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({"max_iters": 9}, 9),
        ({"max_iters": 100, "lr_decay_iters": 6}, 6),
        ({"max_iters": "none", "max_epochs": 3}, None),
        ({"max_iters": 20, "warmup_iters": 30}, 20),
    ],
)
def test_the_learning_rates_are_those_of_the_first_steps_of_the_real_run(arguments, tmp_path, changes, total):
    real = arguments(**changes, eval_interval="none")
    settings = load_settings(train_sft.TrainSettings, real).settings
    train_sft.main([*real, *verify_resume.changes(verify_resume.VerifySettings(steps=5), settings)])
    (log,) = read_logs(tmp_path / "out")
    total = total or math.ceil(3 * log["startup_info"]["rows_per_epoch"] / 2)
    warmup = changes.get("warmup_iters", 2)
    rates = [
        learning_rate_at(step, schedule="cosine", peak=1e-2, floor=1e-3, warmup=warmup, total=total)
        for step in range(5)
    ]
    assert [record["lr"] for record in log["training_iterations"]] == rates


def test_what_shall_be_kept_stays(verify, tmp_path):
    with pytest.raises(UserError, match="the run failed"):
        verify("--keep", f"--folder={tmp_path}", block_size=16)
    assert [path.name[:14] for path in tmp_path.iterdir()] == ["verify_resume_"]


def test_settings_that_cannot_be_used_are_refused_before_anything_is_written(arguments, tmp_path):
    for words, message in (
        ([], "which configuration?"),
        (["--steps=8"], "which configuration?"),
        ([*arguments(), "--steps=2"], "steps must be at least 4"),
        ([*arguments(), "--nproc_per_node=0"], "nproc_per_node must be at least 1"),
        ([*arguments(), "--learing_rate=1"], "unknown setting 'learing_rate'; did you mean 'learning_rate'"),
    ):
        with pytest.raises(UserError, match=message):
            verify_resume.main(words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, 2])
def test_the_program_itself_exits_with_0(arguments, tmp_path, ranks):
    words = [] if ranks is None else [f"--nproc_per_node={ranks}"]
    command = [sys.executable, ROOT / "tools" / "verify_resume.py", *arguments(max_iters=50, dropout=0.1), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("equal: ")
    assert list(tmp_path.iterdir()) == []
