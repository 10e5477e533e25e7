"""The benchmark of the loss: that it runs, calls wrong what is wrong, and judges its goals by what was measured."""

import importlib
import json

import pytest
import torch

from bench import loss_inputs, loss_measure
from bench.loss import LossBenchmark, main, resolved
from bench.loss_goals import GOALS, goal_lines, judge
from bench.loss_inputs import draws_of, expected_of, make_head, make_pool
from bench.loss_measure import Contestant, Copy, Times, extra_bytes, host_syncs, take_turns
from bench.loss_providers import (
    EAGER,
    EVALUATION,
    HEAD,
    LOGITS,
    OURS,
    OURS_TUNED,
    PROVIDERS,
    Provider,
    eager_head,
    eager_logits,
)
from bench.loss_task import COPY, Task, entrant, floor_of
from sft.errors import UserError
from tests.conftest import ROOT
from tests.devices import gpu_test

CPU = torch.device("cpu")
TOKENS, HIDDEN, VOCABULARY = 24, 16, 331
RESULTS = sorted((ROOT / "bench" / "results").glob("loss_*.json"))


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setitem(loss_measure.COPIED, "cpu", 1 << 16)


def small_task(workload, share=0.5):
    head = make_head(VOCABULARY, HIDDEN, device=CPU, dtype=torch.float32)
    pool = make_pool(head, TOKENS, size=2)
    draws = draws_of(pool, share)
    expected = expected_of(head, draws[0])
    return Task(workload=workload, pool=pool, share=share, draws=draws, copy=Copy(CPU), expected=expected)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("loss")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss_measure.COPIED, "cpu", 1 << 16)
        patch.setattr(loss_measure, "ROUNDS_AT_MOST", 3)
        sizes = [f"--tokens={TOKENS}", f"--hidden_size={HIDDEN}", f"--vocabulary={VOCABULARY}", "--shares=1.0,0.3"]
        main([*sizes, "--device=cpu", "--leave_out=torch.compile;TRL", f"--out_dir={out_dir}"])
    return json.loads((out_dir / "loss_cpu.json").read_text())


def test_a_run_tells_everything_that_was_promised(report):
    assert report["status"] == "finished"
    assert {"command", "processor", "versions", "settings", "grid", "clocks_before", "clocks_after"} <= report.keys()
    plan = [(row["workload"], row["share"]) for row in report["configurations"]]
    assert plan == [(HEAD, 1), (LOGITS, 1), (EVALUATION, 1), (HEAD, 0.3), (LOGITS, 0.3)]
    for configuration in report["configurations"]:
        assert configuration["trained"] == round(TOKENS * configuration["share"])
        assert 0 < configuration["top_probability"] < 1
        assert {"milliseconds", "bytes", "gigabytes_per_second"} <= configuration["floor"].keys()
        for name in {OURS, EAGER} if configuration["workload"] != LOGITS else {EAGER}:
            row = configuration["providers"][name]
            assert row["status"] == "measured", row
            assert row["rounds"] >= 3
            fields = {"wall_milliseconds", "option", "options", "errors", "extra_bytes", "host_syncs"}
            assert fields <= row.keys()
    assert len(report["goals"]) == len(GOALS["cpu"])


def test_who_cannot_take_part_is_listed_with_the_reason(report):
    providers = report["configurations"][0]["providers"]
    assert providers.keys() == {row.name for row in PROVIDERS if HEAD in row.workloads} - {"eager, fp32 logits"}
    assert providers["TRL"] == {"status": "missing", "reason": "left out on request"}
    assert providers["Liger-Kernel"] == {"status": "missing", "reason": "needs a CUDA GPU"}


def test_a_provider_that_cannot_be_imported_is_missing_and_says_why():
    def load():
        import no_such_library  # noqa: F401

    contestant, row = entrant(small_task(HEAD), Provider("none", (HEAD,), load))
    assert contestant is None
    assert row == {"status": "missing", "reason": "ModuleNotFoundError: No module named 'no_such_library'"}


def half(hidden, head, draw):
    loss = eager_head(hidden, head, draw, fp32_logits=False)
    return loss / 2 + loss.detach() / 2  # the right loss with half of its gradient


def test_a_provider_with_a_wrong_gradient_is_called_wrong():
    contestant, row = entrant(small_task(HEAD), Provider("half", (HEAD,), lambda: half))
    assert contestant is not None
    assert row["status"] == "wrong"
    assert "the head gradient is off by 5.0e-01" in row["reason"]
    assert row["errors"]["loss"] < 1e-5


def test_a_gradient_that_is_not_finite_is_wrong():
    def infinite(logits, draw):
        return eager_logits(logits, draw, fp32_logits=False) * float("nan")

    _, row = entrant(small_task(LOGITS), Provider("infinite", (LOGITS,), lambda: infinite))
    assert row["status"] == "wrong"


def test_masked_rows_with_a_gradient_are_wrong():
    def unmasked(logits, draw):
        masked = logits[draw.labels == -100]
        return eager_logits(logits, draw, fp32_logits=False) + 1e-3 * (masked - masked.detach()).sum()

    _, row = entrant(small_task(LOGITS, 0.1), Provider("unmasked", (LOGITS,), lambda: unmasked))
    assert row["status"] == "wrong"


def test_an_option_that_is_wrong_or_fails_is_not_chosen_however_quick_it_is():
    def loss(hidden, head, draw, *, option):
        if option == "failing":
            raise RuntimeError("no")
        if option == "wrong":
            return hidden.sum() + head.sum()
        return eager_head(hidden, head, draw, fp32_logits=False)

    grid = [{"option": option} for option in ("wrong", "failing", "right", "right too")]
    _, row = entrant(small_task(HEAD), Provider("choosy", (HEAD,), lambda: loss, grid))
    assert row["status"] == "measured"
    assert row["option"] in ("option=right", "option=right too")
    assert row["options"]["option=failing"] == "RuntimeError: no"
    assert "off by" in row["options"]["option=wrong"]


def test_a_wrong_result_of_ours_fails_the_program(monkeypatch, tmp_path):
    monkeypatch.setattr("bench.loss_task.providers_of", lambda *_: [Provider(OURS, (HEAD,), lambda: half)])
    monkeypatch.setattr(loss_measure, "ROUNDS_AT_MOST", 3)
    sizes = [f"--tokens={TOKENS}", f"--hidden_size={HIDDEN}", f"--vocabulary={VOCABULARY}", "--shares=1.0"]
    with pytest.raises(UserError, match="ours is wrong or failed in 1 of 1"):
        main([*sizes, "--device=cpu", "--workloads=head", f"--out_dir={tmp_path}"])
    assert json.loads((tmp_path / "loss_cpu.json").read_text())["status"] == "finished"


def test_a_run_that_stops_leaves_what_it_has_measured(monkeypatch, tmp_path):
    def run_all(*_):
        yield {"workload": HEAD, "tokens": 1, "share": 1.0, "providers": {}}
        raise RuntimeError("broken")

    monkeypatch.setattr("bench.loss.run_all", run_all)
    monkeypatch.setattr("bench.loss.print_configuration", lambda _: None)
    with pytest.raises(RuntimeError):
        main(["--device=cpu", f"--out_dir={tmp_path}"])
    left = json.loads((tmp_path / "loss_cpu.json").read_text())
    assert (left["status"], len(left["configurations"])) == ("stopped: RuntimeError: broken", 1)


def test_the_logits_are_as_peaked_as_a_language_models():
    head = make_head(50_000, 512, device=CPU, dtype=torch.float32)
    pool = make_pool(head, 128, size=1)
    assert 1.0 < pool.entropy < 2.0
    assert 0.55 < pool.top_probability < 0.75
    loss = expected_of(head, draws_of(pool, 1.0)[0]).loss
    assert loss == pytest.approx(pool.entropy, abs=0.4), "labels are drawn from the softmax itself"


def test_a_draw_trains_exactly_its_share_and_our_rows_are_those_of_the_labels():
    pool = small_task(HEAD).pool
    first, second = draws_of(pool, 0.3)
    for draw in (first, second):
        trained = (draw.labels != -100).nonzero().squeeze(1)
        assert len(trained) == draw.trained == round(0.3 * TOKENS)
        assert torch.equal(draw.rows, trained)
        assert torch.equal(draw.row_labels, draw.labels[trained])
    assert not torch.equal(first.labels, second.labels)


def test_the_definition_does_not_depend_on_how_many_rows_it_takes_at_once(monkeypatch):
    task = small_task(HEAD, 0.7)
    monkeypatch.setattr(loss_inputs, "ROWS_AT_ONCE", 5)
    pieces = expected_of(task.pool.head, task.draws[0])
    assert pieces.loss == pytest.approx(task.expected.loss, rel=1e-6)
    torch.testing.assert_close(pieces.hidden_gradient, task.expected.hidden_gradient)
    torch.testing.assert_close(pieces.head_gradient, task.expected.head_gradient)


def test_everyone_takes_a_turn_in_each_round_and_who_fails_is_named():
    order = []

    def fail(_):
        raise ValueError("once")

    contestants = {name: Contestant(lambda k: k, lambda _, name=name: order.append(name)) for name in "abcd"}
    times, failed = take_turns({**contestants, "e": Contestant(lambda k: k, fail)}, CPU, seconds=0, pool=2)
    assert failed == {"e": "ValueError: once"}
    assert {name: len(taken.device) for name, taken in times.items()} == dict.fromkeys("abcd", 3)
    rounds = [order[i : i + 4] for i in range(0, 12, 4)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert rounds[0] != rounds[1]


def test_every_configuration_of_the_kernel_is_tried():
    pytest.importorskip("triton")
    importlib.import_module("tests.interpreted")
    configurations = importlib.import_module("sft.kernels.masked_cross_entropy").CONFIGURATIONS
    (tuned,) = (provider for provider in PROVIDERS if provider.name == OURS_TUNED)
    assert [option["configuration"] for option in tuned.grid] == list(range(len(configurations)))


@pytest.mark.parametrize(("workload", "bytes_a_number"), [(HEAD, 8), (LOGITS, 8), (EVALUATION, 4)])
def test_the_floor_is_the_bare_products_and_the_bytes_at_the_speed_of_a_copy(workload, bytes_a_number):
    task = small_task(workload)
    times = {COPY: Times([2.0], [2.0]), "floor: logits": Times([0.5], [0.5]), "ours": Times([9.0], [9.0])}
    floor = floor_of(task, times, {"logits": "whole"})
    gigabytes_per_second = 2 * (1 << 16) / 2.0 / 1e6  # read and written in two milliseconds
    trained, tokens = task.draws[0].trained, len(task.draws[0].labels)
    size = bytes_a_number * trained * VOCABULARY  # in fp32; half of it in bf16
    size += 4 * (tokens - trained) * VOCABULARY * (workload == LOGITS)  # zeros
    assert floor["bytes"] == size
    assert floor["gigabytes_per_second"] == pytest.approx(gigabytes_per_second)
    assert floor["milliseconds"] == pytest.approx(0.5 + size / gigabytes_per_second / 1e6)


def made_up(workload, tokens, share, milliseconds, **changes):
    ours = {"extra_bytes": 1.5e9, "host_syncs": 0, **changes}
    providers = {
        name: {"status": "measured", "milliseconds": taken, "extra_bytes": 20e9, "host_syncs": 2}
        for name, taken in milliseconds.items()
    }
    providers[OURS] |= ours
    return {
        "workload": workload,
        "tokens": tokens,
        "share": share,
        "floor": {"milliseconds": 10.0},
        "head_gradient_bytes": 0.6e9,
        "providers": providers,
    }


def verdicts(configurations):
    return {row["goal"]: (row["met"], row["reached"]) for row in judge("cuda", configurations)}


def test_goals_are_judged_by_the_worst_configuration_that_fits():
    fast = {OURS: 10.5, "Liger-Kernel": 21.0, "TRL": 15.0, "cut-cross-entropy": 11.0, "QuACK": 10.5}
    fast["eager, fp32 logits"] = 63.0
    found = verdicts(
        [
            made_up(HEAD, 16384, 1.0, fast),
            made_up(HEAD, 8192, 1.0, {**fast, OURS: 11.5}, extra_bytes=2e9),
            made_up(LOGITS, 16384, 1.0, fast),
            made_up(LOGITS, 8192, 1.0, {**fast, OURS: 99.0}, host_syncs=1),
        ]
    )
    assert found["head, share 1, any N: <= 1.1 over the floor"] == (False, pytest.approx(1.15))
    assert found["head, share 1, any N: >= 1.3 times as fast as Liger-Kernel"] == (True, pytest.approx(21 / 11.5))
    assert found["head, share 1, any N: >= 1.35 times as fast as TRL"] == (False, pytest.approx(15 / 11.5))
    assert found["head, share 1, any N: >= 0.95 times as fast as QuACK"] == (False, pytest.approx(10.5 / 11.5))
    assert found["logits, share 1, N 16,384: <= 1.12 over the floor"] == (True, pytest.approx(1.05))
    assert found["logits, share 1, N 16,384: >= 6 times as fast as eager, fp32 logits"] == (True, pytest.approx(6))
    assert found["head, any N: <= 1.3 GB beyond the head's gradient in fp32"] == (False, pytest.approx(1.4))
    assert found["head, any N: <= 0.2 of the memory of eager, fp32 logits"] == (True, pytest.approx(0.1))
    assert found["head and logits, any N: <= 0 host syncs"] == (False, 1)
    assert found["head, share 0.3, any N: <= 1.12 over the floor"] == (None, None)


@pytest.mark.parametrize("status", ["wrong", "missing", "failed"])
def test_a_goal_against_who_was_not_right_is_neither_met_nor_missed(status):
    configuration = made_up(HEAD, 8192, 1.0, {OURS: 10.0, "TRL": 99.0})
    configuration["providers"]["TRL"] |= {"status": status, "reason": "because"}
    (row,) = (
        row for row in judge("cuda", [configuration]) if row["goal"].endswith("TRL") and "share 1," in row["goal"]
    )
    assert (row["met"], row["why"]) == (None, f"TRL is {status}: because")
    assert goal_lines([row])[0].startswith("  unknown  head, share 1, any N: >= 1.35 times as fast as TRL")


def test_every_number_of_the_table_of_goals_is_judged():
    limits = [(goal.workloads[0], goal.share, goal.limit) for goal in GOALS["cuda"]]
    assert [limit for workload, share, limit in limits if (workload, share) == (HEAD, 0.3)] == [1.12, 4, 1.35, 1.1]
    assert [limit for workload, share, limit in limits if (workload, share) == (HEAD, 0.1)] == [1.2, 10]
    assert [limit for workload, share, limit in limits if (workload, share) == (LOGITS, 0.3)] == [1.15, 1.35]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workloads": "head,legs"}, "unknown: legs; there are head, logits, evaluation"),
        ({"leave_out": "Tiger"}, "unknown: Tiger; .*Liger-Kernel"),
    ],
)
def test_unknown_names_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        resolved(LossBenchmark(**given, device="cpu"))


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU; use --device=cpu"):
        resolved(LossBenchmark(device="cuda"))


def test_the_plot_is_drawn_from_a_result(report, tmp_path):
    pytest.importorskip("matplotlib")
    plot = importlib.import_module("bench.plot_loss").main
    result = tmp_path / "loss_cpu.json"
    result.write_text(json.dumps(report))
    plot([f"--result={result}"])
    assert (tmp_path / "loss_cpu.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "loss_cpu.svg").read_text()[:2000]
    with pytest.raises(UserError, match="no N of 7; it has 24"):
        plot([f"--result={result}", "--tokens=7"])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_committed_result_is_whole_and_its_goals_follow_from_it(path):
    result = json.loads(path.read_text())
    assert result["status"] == "finished"
    device = result["settings"]["device"]
    assert result["settings"]["vocabulary"] == 151_936
    assert result["goals"] == judge(device, result["configurations"])
    assert {row["share"] for row in result["configurations"]} == {0.1, 0.3, 0.5, 1.0}
    for configuration in result["configurations"]:
        if device == "cuda" or configuration["workload"] != LOGITS:
            assert configuration["providers"][OURS]["status"] == "measured"
        assert 1 < configuration["loss"] < 2
        assert 0.55 < configuration["top_probability"] < 0.8
    if device == "cuda":
        assert {row["tokens"] for row in result["configurations"]} == {8192, 16384, 32768}
        assert result["clocks_before"]
        assert result["clocks_after"]


@gpu_test
def test_memory_and_waiting_of_a_call_are_counted_on_a_gpu():
    device = torch.device("cuda", 0)

    def prepare(_):
        return torch.ones(1 << 20, device=device)  # 4 MiB

    assert extra_bytes(Contestant(prepare, lambda x: x + x), device) == 1 << 22
    assert extra_bytes(Contestant(prepare, lambda x: x.add_(x)), device) == 0
    assert host_syncs(Contestant(prepare, lambda x: x.add_(x)), device) == 0
    assert host_syncs(Contestant(prepare, lambda x: (x[0].item(), x.sum().item())), device) == 2
    weight = torch.ones((), device=device, requires_grad=True)

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient.item()  # on the engine's own thread
            return gradient

    assert host_syncs(Contestant(lambda _: weight, lambda x: Waits.apply(x).backward()), device) == 1
