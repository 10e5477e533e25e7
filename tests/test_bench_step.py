"""The benchmark of whole steps: that it runs as on a GPU, and that all do the same work."""

import io
import json
import math

import numpy as np
import pytest
import torch

from bench import step_measure
from bench.plot_step import draw
from bench.step import StepBenchmark, main, resolved
from bench.step_goals import GOALS
from bench.step_inputs import DISTRIBUTIONS, drawn, fill_weights, load_samples, make_samples, save_samples
from bench.step_measure import agreement, flops_per_token
from bench.step_plain_model import PlainModel
from bench.step_processes import ProviderFailed, Session, Worker, Workers
from bench.step_providers_loops import laid_out, padded_steps, row_steps
from bench.step_providers_loops import train as train_loop
from bench.step_providers_ours import make_loader
from bench.step_providers_ours import train as train_ours
from bench.step_providers_trl import settings_of
from bench.step_table import table_lines
from bench.step_tasks import GROUPED, OURS, OURS_BF16, PADDED, PLAIN, PROVIDERS, SETS, TINY_TASKS, TRL, Task
from bench.step_worker import Gate, Step, Work
from model_builder import ConfigurableGPT
from model_config import parameter_count
from sft.errors import UserError
from sft.huggingface import name_table, to_hugging_face
from sft.samples import NOT_TRAINED
from tests.conftest import ROOT

CPU = torch.device("cpu")
TINY = TINY_TASKS[0]
RESULTS = sorted((ROOT / "bench" / "results").glob("step_*.json"))


def tiny_work(provider: str, **option: object) -> Work:
    samples = drawn(TINY.data, TINY.samples, TINY.row, TINY.config.vocab_size)
    return Work(TINY, provider, samples, CPU, option, None)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """As on a GPU: one process per provider; the first option of ours cannot be had here."""
    pytest.importorskip("transformers")
    out_dir = tmp_path_factory.mktemp("step")
    grids = {
        OURS: ({"rows": 1, "attention": "varlen"}, {"rows": 2}),
        TRL: ({"packing": True, "batch": 1},),
        PADDED: ({"batch": 4},),
        PLAIN: ({"block": 256, "batch": 1},),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(step_measure.GRIDS, "cpu", grids)
        chosen = [
            "--tasks=tiny",
            "--only=tiny",
            "--shares=true",
            "--shared=nowhere",
            f"--leave_out={OURS_BF16};{GROUPED}",
        ]
        sizes = ["--threads=1", "--steps=1", "--rounds=2", "--apart=false"]
        main([*chosen, *sizes, "--device=cpu", f"--out_dir={out_dir}"])
    return json.loads((out_dir / "step_cpu.json").read_text())


@pytest.mark.slow
def test_a_run_tells_everything_that_was_promised(report):
    assert report["status"] == "finished"
    assert {"command", "processor", "versions", "peers_versions", "settings", "grids", "goals"} <= report.keys()
    (result,) = report["tasks"]
    assert result["data"] == "gsm8k, drawn lengths and ids"
    for name in (OURS, PADDED, PLAIN):
        row = result["providers"][name]
        assert row["status"] == "measured", row
        assert len(row["rounds"]) == 2
        assert row["tokens_per_second"] > row["trained_tokens_per_second"] > 0
        assert row["peak_bytes"] > 0
        assert row["start_to_first_step_seconds"] > 0
    assert len(report["goals"]) >= len(GOALS["cpu"])


@pytest.mark.slow
def test_an_option_that_fails_is_told_and_the_next_one_is_taken(report):
    ours = report["tasks"][0]["providers"][OURS]
    assert ours["option"] == "rows=2"
    assert "needs a CUDA GPU" in ours["options"]["rows=1, attention=varlen"]


@pytest.mark.slow
def test_who_is_not_installed_is_told_with_the_reason(report):
    row = report["tasks"][0]["providers"][TRL]
    if row["status"] == "measured":
        pytest.skip("TRL is installed")
    assert (row["status"], "ModuleNotFoundError" in row["reason"]) == ("failed", True)


@pytest.mark.slow
def test_the_same_conversations_give_everyone_our_losses(report):
    told = report["tasks"][0]["agreement"]
    assert len(told["losses"][OURS]) == step_measure.PLANNED_STEPS >= 10
    assert told["losses"][OURS][-1] < told["losses"][OURS][0]
    assert {PADDED, PLAIN} <= told["agree"].keys()
    assert all(difference <= 1e-4 for difference in told["largest_relative_difference"].values())


@pytest.mark.slow
def test_the_table_and_the_plot_show_who_was_measured(report):
    lines = table_lines(report["tasks"][0])
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert len(widths) == 1
    assert sum(line.startswith((f"| {OURS}", f"| {PADDED}", f"| {PLAIN}", f"| {TRL}")) for line in lines) == 4
    pytest.importorskip("matplotlib")
    left, _ = draw(report).axes
    assert {label.get_text() for label in left.get_yticklabels()} >= {OURS, PADDED, PLAIN}


@pytest.mark.slow
def test_options_are_compiled_and_the_best_is_opened_again(tmp_path, monkeypatch):
    grids = {OURS: ({"rows": 1, "compile": True},), PLAIN: ({"block": 128, "batch": 1, "compile": True},)}
    monkeypatch.setitem(step_measure.GRIDS, "cpu", grids)
    chosen = ["--tasks=tiny", "--shares=true", "--shared=nowhere", f"--leave_out={OURS_BF16};{TRL};{PADDED};{GROUPED}"]
    chosen += ["--minutes=9", "--turn_seconds=200"]
    main([*chosen, "--threads=1", "--steps=1", "--rounds=2", "--apart=false", "--device=cpu", f"--out_dir={tmp_path}"])
    report = json.loads((tmp_path / "step_cpu.json").read_text())
    assert len(report["tasks"]) == len(TINY_TASKS)
    for result in report["tasks"]:
        for name in (OURS, PLAIN):
            row = result["providers"][name]
            assert len(row["rounds"]) == 2, row
            assert all(isinstance(told, dict) for told in row["options"].values()), row["options"]
        assert result["agreement"]["agree"][PLAIN]


def test_the_same_conversations_give_the_same_losses_in_this_process():
    """Fresh processes are compared by the slow tests, and by the benchmark itself."""
    pytest.importorskip("transformers")
    plan = [[0, 1, 2], [3, 4, 5], [6, 7, 8]] * 4
    curves = {}
    for name, train in ((OURS, train_ours), (PADDED, train_loop), (PLAIN, train_loop)):
        told: list[dict] = []
        work = Work(TINY, name, tiny_work(name).samples, CPU, {"rows": 1}, plan)
        train(work, Gate(CPU, len(plan), told.append, io.StringIO()))
        curves[name] = told[0]["losses"]
    assert curves[OURS][-1] < curves[OURS][0] - 0.01
    assert all(
        abs(a / b - 1) < 1e-4 for name in (PADDED, PLAIN) for a, b in zip(curves[OURS], curves[name], strict=True)
    )


def test_losses_that_differ_or_are_not_finite_do_not_agree():
    curves = {OURS: [1.0, 2.0], PADDED: [1.0, 2.01], PLAIN: [1.0, math.nan], OURS_BF16: [1.0, 2.01]}
    assert agreement(TINY, curves)["agree"] == {PADDED: False, PLAIN: False, OURS_BF16: True}


def hugging_face_model(task: Task) -> ConfigurableGPT:
    model = ConfigurableGPT(task.config)
    fill_weights(to_hugging_face(dict(model.named_parameters()), name_table(task.config.to_dict())))
    return model


def test_all_three_models_have_the_same_logits():
    pytest.importorskip("transformers")
    from bench.step_providers_trl import make_model

    ids = torch.randint(TINY.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    ours = hugging_face_model(TINY)(ids)
    plain = PlainModel(TINY.config)
    fill_weights(dict(plain.named_parameters()))
    theirs = make_model(tiny_work(PADDED))(ids).logits
    assert ours.std() > 0.01
    assert (plain(ids) - ours).abs().max() < 1e-5
    assert (theirs - ours).abs().max() < 1e-5


@pytest.mark.parametrize("task", [task for tasks in SETS.values() for task in tasks], ids=lambda task: task.name)
def test_every_task_has_a_model_of_its_size_and_a_step_that_everyone_can_take(task: Task):
    millions = parameter_count(task.config) / 1e6
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == Task.from_dict(task.to_dict())
    assert set(task.providers) <= set(PROVIDERS)
    low, high = {"tiny": (0, 1), "V": (20, 30), "1.7B": (1500, 2000)}[task.name.replace(",", " ").split()[0]]
    assert low < millions < high


@pytest.mark.parametrize(("tasks", "device"), [("cpu", "cpu"), ("tiny", "cpu"), ("cuda", "cuda")])
def test_everyone_has_a_grid_of_different_options(tasks: str, device: str):
    for name in {name for task in SETS[tasks] for name in task.providers}:
        options = [json.dumps(option, sort_keys=True) for option in step_measure.GRIDS[device][name]]
        assert len(options) == len(set(options)) >= 1


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_drawn_conversations_have_the_lengths_and_the_share_they_are_fitted_to(name: str):
    samples = drawn(name, 4000, 4096, 8192)
    fit = DISTRIBUTIONS[name]
    means = {"gsm8k": 191, "alpaca": 174, "documents": 600}
    assert samples.lengths.mean() == pytest.approx(means[name], rel=0.05)
    assert samples.targets.sum() / samples.lengths.sum() == pytest.approx(fit.share, abs=0.01)
    assert samples.input_ids.max() < 8192


def test_full_rows_are_trained_from_end_to_end():
    samples = drawn("full rows", 3, 128, 331)
    assert samples.lengths.tolist() == [128] * 3
    assert samples.targets.tolist() == [127] * 3


@pytest.mark.slow
def test_rendered_conversations_keep_lengths_and_trained_tokens_in_a_smaller_vocabulary(shared, tmp_path):
    task = Task.from_dict({**TINY.to_dict(), "samples": 20})
    small, words = make_samples(task, shared)
    assert words.endswith("ids modulo 331")
    large, words = make_samples(Task.from_dict({**task.to_dict(), "model": SETS["cpu"][0].model}), shared)
    assert words == "gsm8k, rendered by prepare_sft.py"
    assert small.lengths.tolist() == large.lengths.tolist()
    assert small.targets.tolist() == large.targets.tolist()
    assert (small.input_ids == large.input_ids % 331).all()
    assert ((small.labels == small.input_ids) | (small.labels == NOT_TRAINED)).all()
    save_samples(tmp_path / "a.npz", small)
    assert (load_samples(tmp_path / "a.npz").targets == small.targets).all()


def test_padding_is_neither_real_nor_trained():
    documents = [(np.arange(1, 6), np.array([NOT_TRAINED, NOT_TRAINED, 3, 4, 5])), (np.array([7, 8]), np.array([7, 8]))]
    micro = laid_out(documents, CPU)
    assert (micro.tokens, micro.trained) == (7, 4)
    assert micro.real.sum(dim=1).tolist() == [5, 2]
    assert micro.labels[1].tolist() == [7, 8, *[NOT_TRAINED] * 3]


def test_grouping_by_length_pads_less_and_leaves_the_work_as_it_is():
    def filled(provider: str) -> float:
        work = tiny_work(provider, batch=4)
        steps = padded_steps(work)
        micros = [micro for _ in range(4) for micro in next(steps)]
        assert sum(len(micro.real) for micro in micros) == 4 * work.documents_per_step
        return sum(micro.tokens for micro in micros) / sum(micro.real.numel() for micro in micros)

    assert filled(GROUPED) > filled(PADDED) + 0.05


def test_rows_in_nanogpts_manner_are_full_and_hold_a_step_of_tokens():
    micros = next(row_steps(tiny_work(PLAIN, block=256, batch=2)))
    assert [micro.input_ids.shape for micro in micros] == [(2, 256)] * 4
    assert sum(micro.tokens for micro in micros) == TINY.tokens_per_step


def test_the_flops_of_a_token_are_those_of_its_products():
    task = TINY_TASKS[1]
    samples = drawn(task.data, 4, task.row, task.config.vocab_size)
    config, T = task.config, task.row
    width, heads = config.n_embd, config.n_head * config.head_size
    matrices = config.n_layer * (2 * width * heads + 2 * width * 2 * 8 + 3 * width * config.ffn_width)
    attention = config.n_layer * 2 * heads * (T + 1) / 2
    head = config.vocab_size * width * (T - 1) / T
    assert flops_per_token(task, samples) == pytest.approx(6 * (matrices + attention + head), rel=0.01)


def test_shorter_rows_leave_the_step_as_large():
    whole, halves = (make_loader(tiny_work(OURS, rows=1, row=row)) for row in (1024, 512))
    assert (whole.rows_per_step, halves.rows_per_step) == (2, 4)
    assert halves.stream.block_size == 512


def test_a_gate_counts_a_turn_and_waits_for_the_next(tmp_path):
    commands = tmp_path / "commands"
    commands.write_text('{"do": "steps", "steps": 2}\n{"do": "stop"}\n')
    told: list[dict] = []
    with open(commands) as lines:
        gate = Gate(CPU, 1, told.append, lines)
        went_on = [gate(Step(torch.tensor(float(i)), 10, torch.tensor(i))) for i in range(3)]
    assert went_on == [True, True, False]
    assert [turn["losses"] for turn in told] == [[0.0], [1.0, 2.0]]
    assert (told[1]["tokens"], told[1]["trained"], told[1]["steps"]) == (20, 3, 2)


def provider(tmp_path, script: str) -> Worker:
    """A process that does what a shell script says in a provider's place."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return Worker(PADDED, python=str(python), device="cpu", threads=1)


READY = """echo '{"ready": true}'; read line;"""


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'no such thing' >&2; exit 1", "the process ended: no such thing"),
        ("exec sleep 60", "no answer within 1 s"),
        (READY + """echo '{"failed": "out of memory"}'; read line""", "out of memory"),
        ("""echo '{"missing": "No module named trl"}'""", "No module named trl"),
        (READY + "exit 3", "the process ended: it said nothing"),
    ],
)
def test_a_provider_that_dies_hangs_or_fails_is_given_up_with_the_reason(tmp_path, script: str, reason: str):
    worker = provider(tmp_path, script)
    session = Session(worker, {})
    with pytest.raises(ProviderFailed, match=reason):
        session.turn(1, 1.0 if "sleep" in script else 20.0)
    session.stop()
    worker.close()
    assert not worker.alive


def test_a_shared_process_that_is_gone_is_started_anew(monkeypatch, tmp_path):
    workers = Workers(device="cpu", shares=True, peers_python=None, threads=1)
    started: list[Worker] = []

    def new(name: str) -> Worker:
        started.append(provider(tmp_path, "exec sleep 60"))
        return started[-1]

    monkeypatch.setattr(workers, "new", new)
    workers.start([PADDED])
    first = workers.session(PADDED, {})
    assert workers.session(PADDED, {}).worker is first.worker
    first.worker.kill()
    second = workers.session(PADDED, {})
    assert second.worker is started[1]
    workers.resume(PADDED, first)
    assert first.worker is started[1]
    monkeypatch.setattr("bench.step_processes.PATIENCE", 0.1)
    workers.close()
    assert not any(worker.alive for worker in started)


@pytest.mark.parametrize("task", SETS["cpu"], ids=lambda task: task.name)
def test_loops_take_as_many_conversations_as_a_step_holds_or_up_to_three_more(task: Task):
    work = Work(task, PADDED, drawn(task.data, task.samples, task.row, task.config.vocab_size), CPU, {}, None)
    assert 20 <= work.documents_per_step <= 24
    for name in (TRL, PADDED, GROUPED):
        assert all(work.documents_per_step % option["batch"] == 0 for option in step_measure.GRIDS["cpu"][name])


def test_trl_has_shorter_rows_in_as_large_a_step():
    whole, halves = (settings_of(tiny_work(TRL, packing=True, batch=1, row=row)) for row in (TINY.row, TINY.row // 2))
    assert (whole["gradient_accumulation_steps"], halves["gradient_accumulation_steps"]) == (2, 4)
    assert halves["max_length"] == TINY.row // 2


@pytest.mark.parametrize(("slow", "asked"), [(10.0, ["train"]), (30.0, ["train", "steps"])])
def test_a_slow_first_step_is_the_look_at_an_option(slow: float, asked: list[str]):
    commands: list[str] = []

    class Told:
        def ask(self, command: dict, seconds: float) -> dict:
            commands.append(command["do"])
            return {"seconds": 25.0, "first_step_seconds": 20.0, "tokens": 40}

    turn = Session(Told(), {}).turn(1, 60.0, slow=slow)
    assert commands == asked
    assert turn["seconds"] == (20.0 if asked == ["train"] else 25.0)


def test_what_cannot_be_run_is_refused():
    with pytest.raises(UserError, match="no such task: none; there are V 151,936; V 8,192"):
        resolved(StepBenchmark(device="cpu", only="none"))
    with pytest.raises(UserError, match="is no program"):
        resolved(StepBenchmark(device="cpu", peers_python="/nowhere/python"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_whole(path):
    report = json.loads(path.read_text())
    assert report["status"] == "finished"
    assert report["command"].startswith("PYTHONPATH=. python bench/step.py")
    assert {row["met"] for row in report["goals"]} <= {True, False, None}
    for result in report["tasks"]:
        assert result["providers"][OURS]["status"] == "measured"
