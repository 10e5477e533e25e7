"""Several real processes: gradients, sums and errors that do not depend on how many they are."""

import itertools
import json
import os
import sys

import pytest
import torch

from sft.errors import UserError
from sft.world import World, join_world
from tests.conftest import ROOT
from tests.launch import torchrun
from tests.ranks import run_ranks
from tests.spread_worker import DTYPES, LAYOUTS, gradients, validation_loss
from tests.tiny import CPU_WORLD


@pytest.fixture(scope="module")
def reference():
    """The gradients of one process, one micro-batch and a row for each document, by dtype and whether weighted."""
    return {
        (dtype, weighted): gradients(CPU_WORLD, DTYPES[dtype], accumulation=1, layout="alone", weighted=weighted)
        for dtype, weighted in itertools.product(DTYPES, [False, True])
    }


def assert_same_gradients(got, expected, dtype):
    bound = 1e-12 if dtype == "float64" else 1e-6
    for name, gradient in expected.items():
        distance = (got[name] - gradient).norm() / gradient.norm()
        assert distance <= bound, (name, distance)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "accumulation", "layout"), list(itertools.product(DTYPES, [1, 2, 4], LAYOUTS)))
def test_one_process_gives_the_same_gradient_for_any_accumulation_and_packing(
    reference, dtype, accumulation, layout, weighted
):
    got = gradients(CPU_WORLD, DTYPES[dtype], accumulation=accumulation, layout=layout, weighted=weighted)
    assert_same_gradients(got, reference[dtype, weighted], dtype)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_give_the_gradient_and_the_validation_loss_of_one(reference, tmp_path, processes):
    torchrun(processes, ROOT / "tests" / "spread_worker.py", tmp_path / "results.pt")
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert len(results["validation_losses"]) == 3 * 2
    for (_, weighted), got in results["validation_losses"].items():
        loss, trained_tokens = validation_loss(CPU_WORLD, batch_size=1, weighted=weighted)
        assert got == (pytest.approx(loss, rel=1e-6), trained_tokens)
    assert len(results["gradients"]) == 2 * 3 * len(LAYOUTS) * 2
    for (dtype, _, _, weighted), got in results["gradients"].items():
        assert_same_gradients(got, reference[dtype, weighted], dtype)


def test_an_error_on_one_rank_ends_all_ranks_with_one_message(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "from sft.errors import UserError, run_program\n"
        "from sft.world import join_world\n"
        "def main(argv):\n"
        "    with join_world('cpu') as world:\n"
        "        def act():\n"
        "            if world.rank == 1:\n"
        "                raise UserError('disk of rank 1 is full; empty it')\n"
        "        world.together(act)\n"
        "        print('went on')\n"
        "run_program(main)\n"
    )
    done = torchrun(2, worker, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: disk of rank 1 is full; empty it") == 1
    assert "went on" not in done.stdout
    assert "exitcode  : 2" in done.stderr.replace("\t", " ")


@pytest.mark.parametrize("who", ["0, 1", pytest.param("1", marks=pytest.mark.slow)])
def test_one_message_comes_through_whichever_rank_is_late_or_alone(tmp_path, who):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, time\n"
        "from sft.errors import UserError, run_program\n"
        "def main(argv):\n"
        "    rank = int(os.environ['RANK'])\n"
        "    if rank == 0:\n"
        "        time.sleep(1)\n"
        f"    if rank in [{who}]:\n"
        "        raise UserError('a typo; correct it')\n"
        "    time.sleep(60)\n"
        "run_program(main)\n"
    )
    done = torchrun(2, worker, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: a typo; correct it") == 1


@pytest.mark.slow
def test_ranks_with_other_settings_are_refused_by_number(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "from sft.errors import run_program\n"
        "from sft.world import join_world\n"
        "def main(argv):\n"
        "    with join_world('cpu') as world:\n"
        "        world.agree('settings', 'same')\n"
        "        assert world.on_main(lambda: world.rank) == 0\n"
        "        world.agree('settings', f'{world.rank == 1}')\n"
        "run_program(main)\n"
    )
    done = torchrun(3, worker, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: settings differ between ranks: rank(s) 1") == 1


@pytest.mark.slow
def test_all_ranks_take_one_loss_kernel_though_another_would_work_on_some(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import torch\n"
        "from sft import loss\n"
        "from sft.errors import run_program\n"
        "from sft.world import join_world\n"
        "def main(argv):\n"
        "    with join_world('cpu') as world:\n"
        "        loss._trial = lambda device, dtype: 'Triton gives wrong numbers here' if world.rank == 1 else None\n"
        "        on = {'device': torch.device('cuda', 0), 'dtype': torch.bfloat16, 'world': world}\n"
        "        chosen = loss.choose_loss('auto', **on)\n"
        "        assert chosen == loss.Loss('torch', 'rank 1: Triton gives wrong numbers here'), chosen\n"
        "        loss.choose_loss('triton', **on)\n"
        "run_program(main)\n"
    )
    done = torchrun(3, worker, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: loss_kernel=triton: rank 1: Triton gives wrong numbers here; use") == 1
    assert "AssertionError" not in done.stderr


def test_a_world_of_one_needs_no_process_group():
    with join_world("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.sum(torch.tensor([1.5])).tolist() == [1.5]
        assert world.on_main(lambda: json.loads("[1]")) == [1]
        world.agree("settings", "any")
        module = torch.nn.Linear(2, 2)
        assert world.wrap(module) is module


def test_torchrun_with_one_process_pays_for_no_wrapper_and_no_process_group(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join_world("cpu") as world:
        assert not torch.distributed.is_initialized()
        module = torch.nn.Linear(2, 2)
        assert world.wrap(module, bucket_mb=1, compression="bf16") is module


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_step_reduces_its_gradients_once_and_bf16_changes_their_rounding_alone(tmp_path, processes):
    torchrun(processes, ROOT / "tests" / "reduce_worker.py", tmp_path / "results.pt")
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    *_, buckets = results["reductions of 1"]
    assert buckets > 1
    assert results["reductions of 3"] == results["reductions of 1"]  # with the last micro-step only
    for compression in ("none", "bf16"):
        assert results[f"{compression} is the same on all ranks"]
    (losses, norms), (rounded, rounded_norms) = results["none"], results["bf16"]
    assert rounded_norms[0] == pytest.approx(norms[0], rel=1e-3)  # the same scale: divided after the sum
    assert rounded != losses
    assert rounded == pytest.approx(losses, rel=0.01)
    assert rounded_norms == pytest.approx(norms, rel=0.05)
    assert losses[-1] < 0.1 * losses[0]


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU"), join_world("cuda"):
        pass


def test_only_the_main_rank_prints(capsys):
    World(rank=1, size=2, device=torch.device("cpu")).print("hidden")
    CPU_WORLD.print("shown")
    assert capsys.readouterr().out == "shown\n"


def print_to_nobody(argv: list[str]) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    CPU_WORLD.print("a full disk")
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    CPU_WORLD.print("nobody reads")
    CPU_WORLD.print("nobody reads")


def test_a_console_that_has_gone_or_is_full_ends_no_run():
    assert run_ranks(1, [], main=print_to_nobody) == [0]
