"""What only a CUDA GPU can show; run by make gpu."""

import copy
import json

import pytest
import torch

import train_sft
from sft.batches import make_batch
from sft.optim import make_optimizer
from sft.step import SummedLoss, train_step
from sft.world import World
from tests.conftest import SHAPE
from tests.tiny import random_documents, target_weight, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

LENGTHS = [40, 1, 9, 13]  # a one-token document among them, and a padded tail after them


def gpu_world() -> World:
    return World(rank=0, size=1, device=torch.device("cuda", 0))


def batch_on(device: str):
    return make_batch([random_documents(LENGTHS)], block_size=64, pad_id=0, device=device)


def test_hidden_states_and_gradients_equal_the_cpus_in_fp32():
    torch.backends.cuda.matmul.allow_tf32 = False
    on_cpu = tiny_model()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    losses = []
    for model, device in ((on_cpu, "cpu"), (on_gpu, "cuda")):
        loss = SummedLoss(model)(batch_on(device))
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, one), two in zip(on_cpu.named_parameters(), on_gpu.parameters(), strict=True):
        torch.testing.assert_close(two.grad.cpu(), one.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_changing_one_document_leaves_the_others_bit_identical(autocast_dtype):
    model = tiny_model().cuda()
    batch = batch_on("cuda")
    changed = batch.input_ids.clone()
    changed[0, 41:50] = (changed[0, 41:50] + 1) % 97  # the third document
    with torch.no_grad(), torch.autocast("cuda", autocast_dtype, enabled=autocast_dtype is not None):
        before = model.hidden_states(batch.input_ids, batch.positions, batch.documents)
        after = model.hidden_states(changed, batch.positions, batch.documents)
    same = (before == after).all(dim=-1)[0]
    assert same[:41].all()
    assert same[50:].all()
    assert not same[41:50].any()
    assert before.isfinite().all()


def test_bf16_with_compiled_blocks_follows_the_fp32_trajectory():
    documents = random_documents([60, 50])
    batch = make_batch([[d] for d in documents], block_size=64, pad_id=0, device="cuda")
    weight = target_weight(documents)

    def losses(autocast_dtype, compiled):
        model = tiny_model().cuda()
        if compiled:
            model.compile_blocks()
        optimizer = make_optimizer(model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        step = {"target_weight": weight, "learning_rate": 1e-2, "grad_clip": 1.0, "world": gpu_world()}
        loss_module = SummedLoss(model, autocast_dtype=autocast_dtype)
        return [train_step(loss_module, optimizer, [batch], **step).loss_sum.item() / weight for _ in range(10)]

    assert losses(torch.bfloat16, True) == pytest.approx(losses(None, False), rel=3e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_trainer_runs_with_its_defaults_and_resumes(arguments, tmp_path, compiled):
    options = {"device": "cuda", "compile": compiled, "dropout": 0.1, "batch_size": 2, "out_dir": tmp_path / "run"}
    train_sft.main(arguments(**options, max_iters=10))
    train_sft.main(arguments(**options, max_iters=20, resume="required"))
    first, second = (json.loads(path.read_text()) for path in sorted((tmp_path / "run").glob("run_*.json")))
    assert first["status"] == second["status"] == "finished"
    assert "bfloat16" in first["startup_info"]["sentences"]["compute"]
    assert [record["iter"] for record in second["training_iterations"]] == list(range(11, 21))
    assert second["eval_steps"][-1]["val_loss"] < first["eval_steps"][0]["val_loss"]


def test_memory_falls_with_activation_checkpointing(arguments, tmp_path):
    peaks = []
    for recompute in ("none", "full"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        shape = {**SHAPE, "n_layer": 8, "n_embd": 256}
        out_dir = tmp_path / recompute
        settings = {"model": shape, "batch_size": 16, "device": "cuda", "compile": False, "out_dir": out_dir}
        train_sft.main(arguments(**settings, activation_checkpointing=recompute, max_iters=2, eval_interval="none"))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]
