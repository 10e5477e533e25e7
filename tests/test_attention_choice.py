"""Which back end a run gets, and why; on a CPU, with stand-ins for what needs a GPU."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import train_sft
from sft import attention_backends, attention_choice
from sft.attention_choice import Attention, Heads, Outcome, choose_attention, unsupported, wrong_numbers
from sft.errors import UserError
from sft.world import World
from tests.tiny import CPU_WORLD

HEADS = Heads(query=4, key=2, size=16)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GPU_WORLD = World(rank=0, size=1, device=GPU)  # no GPU is touched before a trial
DOCUMENTS = attention_choice.documents_of([[100, 20], [128]], 128, CPU)


def choose(choice, *, world=GPU_WORLD, dropout=0.0) -> Attention:
    return choose_attention(
        choice, heads=HEADS, dtype=torch.bfloat16, dropout=dropout, loader=SimpleNamespace(), world=world
    )


@pytest.fixture
def trial(monkeypatch):
    """Outcomes by name in the place of a trial; who is tried on whole rows is told by their number of documents."""

    def install(**outcomes: Outcome) -> list[tuple[str, int]]:
        tried = []

        def try_out(name, heads, dtype, documents):
            tried.append((name, len(documents.spans.lengths)))
            return outcomes.get(name, Outcome(problem="is not installed"))

        monkeypatch.setattr(attention_choice, "try_out", try_out)
        monkeypatch.setattr(attention_choice, "first_documents", lambda loader: DOCUMENTS)
        monkeypatch.setattr(attention_choice, "wrong_numbers", lambda *others: None)
        return tried

    return install


def test_a_cpu_goes_through_the_documents_and_refuses_what_needs_a_gpu():
    assert str(choose("auto", world=CPU_WORLD)) == (
        "PyTorch's attention, one document after the other: this is the CPU"
    )
    assert choose("sdpa", world=CPU_WORLD).back_end == "sdpa"
    assert choose("definition", world=CPU_WORLD).back_end == "definition"
    for choice in ("varlen", "flex", "flash3", "flash4"):
        with pytest.raises(UserError, match=f"attention={choice} needs a CUDA GPU, and this is the CPU; use attention"):
            choose(choice, world=CPU_WORLD)


def test_dropout_is_left_to_what_has_it():
    assert choose("auto", dropout=0.1).name == "sdpa"
    assert "dropout=0.1" in choose("auto", dropout=0.1).reason
    assert choose("definition", dropout=0.1).name == "definition"
    with pytest.raises(UserError, match=r"attention=varlen has no dropout; set dropout=0, or use attention=sdpa"):
        choose("varlen", dropout=0.1)


def test_auto_takes_the_fastest_that_works_and_tells_of_all(trial):
    tried = trial(varlen=Outcome(2.0), flex=Outcome(1.5), sdpa=Outcome(9.0))
    chosen = choose("auto")
    assert (chosen.name, chosen.back_end) == ("flex", "flex")
    assert chosen.reason == (
        "fastest here: varlen 2.00 ms a layer; flash3 is not installed; flash4 is not installed; "
        "flex 1.50 ms a layer; sdpa 9.00 ms a layer"
    )
    assert {count for _, count in tried} == {4}  # the run's own documents, padding included
    trial(varlen=Outcome(1.0), flex=Outcome(1.0), varlen_whole_rows=Outcome(problem="gives wrong values"))
    assert choose("auto").name == "varlen"


def test_rows_of_one_document_go_to_the_kernel_for_them_where_it_is_faster(trial):
    tried = trial(varlen=Outcome(2.0), varlen_whole_rows=Outcome(1.2))
    chosen = choose("varlen")
    assert chosen.back_end == "varlen_whole_rows"
    assert "with whole rows cuDNN 1.20 ms, varlen 2.00 ms" in chosen.reason
    assert tried == [("varlen", 4), ("varlen", 2), ("varlen_whole_rows", 2)]


def test_what_is_asked_for_and_does_not_work_is_refused(trial):
    trial(varlen=Outcome(1.0))
    with pytest.raises(UserError, match=r"attention=flash3 is not installed; use attention=auto, or sdpa"):
        choose("flash3")
    trial()
    chosen = choose("auto")
    assert chosen.back_end == "sdpa"
    assert chosen.reason.startswith("nothing else works here: varlen is not installed; ")


def test_what_works_on_the_main_rank_alone_is_refused(trial, monkeypatch):
    trial(flex=Outcome(1.0))
    monkeypatch.setattr(attention_choice, "wrong_numbers", lambda *others: "gives wrong values (error 5.0e-01)")
    with pytest.raises(UserError, match=r"attention=flex works on the main rank, but here it gives wrong values"):
        choose("auto")


def test_what_raises_is_told_in_one_line():
    def fail():
        raise RuntimeError("no kernel image\nfor this device")

    assert attention_choice._outcome_of(fail) == Outcome(math.inf, "does not work here (RuntimeError: no kernel image)")
    assert attention_choice._outcome_of(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("so full"))) == Outcome(
        problem="is out of memory"
    )


def test_what_a_back_end_cannot_compute_is_known_without_a_trial():
    assert unsupported("varlen", HEADS, torch.float32, DOCUMENTS) == "has no float32"
    assert unsupported("varlen", HEADS._replace(size=20), torch.bfloat16, DOCUMENTS) == "has no heads of 20"
    assert unsupported("varlen", HEADS, torch.bfloat16, DOCUMENTS) is None
    assert unsupported("flash3", HEADS, torch.bfloat16, DOCUMENTS) == "is not installed"
    assert unsupported("flash4", HEADS, torch.bfloat16, DOCUMENTS) == "is not installed"
    assert unsupported("flex", HEADS, torch.float64, DOCUMENTS) == "has no float64"
    assert unsupported("flex", HEADS, torch.float32, DOCUMENTS) is None
    long = SimpleNamespace(ids=torch.empty(4, 2**15, device="meta"))
    assert unsupported("sdpa", HEADS, torch.bfloat16, long) == "has a mask of 12.0 GiB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_numbers_pass_the_trial_and_wrong_ones_do_not(dtype, monkeypatch):
    right = attention_backends.KERNELS["by_document"]

    def problem(**changes) -> str | None:
        monkeypatch.setitem(attention_backends.KERNELS, "varlen", right._replace(**changes))
        return wrong_numbers("varlen", HEADS, dtype, CPU)

    def ignores_documents(q, k, v, offsets, extent):
        return right.forward(q, k, v, offsets[[0, -1]], extent)

    def forgets_a_group(*inputs):
        of_q, of_k, of_v = right.backward(*inputs)
        return of_q, of_k * 0.9, of_v

    def is_not_finite(*inputs):
        return [gradient * math.nan for gradient in right.backward(*inputs)]

    assert problem() is None
    assert problem(forward=ignores_documents).startswith("gives wrong values")
    assert problem(backward=forgets_a_group).startswith("gives wrong gradients of k")
    assert problem(backward=is_not_finite).startswith("gives wrong gradients of q (error nan)")
    assert wrong_numbers("sdpa", HEADS, dtype, CPU) is None


def test_the_choice_moves_no_generator():
    state = torch.get_rng_state()
    wrong_numbers("sdpa", HEADS, torch.float32, CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_says_what_computes_attention_and_takes_the_definition_if_told_to(arguments, tmp_path, capsys):
    losses = []
    for choice, words in (
        ("auto", "one document after the other: this is the CPU"),
        ("definition", "(the definition)"),
    ):
        train_sft.main(arguments(attention=choice, max_iters=2, out_dir=tmp_path / choice))
        (path,) = (tmp_path / choice).glob("run_*.json")
        log = json.loads(path.read_text())
        assert words in log["startup_info"]["sentences"]["attention"]
        assert words in capsys.readouterr().out
        losses.append([record["loss"] for record in log["training_iterations"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
