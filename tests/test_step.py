import contextlib
import gzip
import json
import shutil

import numpy as np
import pytest
import torch

from model_builder import load_pretrained
from sft.batches import Document, make_batch
from sft.optim import make_optimizer
from sft.step import SummedLoss, accumulate_gradients, train_step
from tests.tiny import CPU_WORLD, random_documents, target_weight, tiny_model


def recorded_batches(folder):
    """The micro-batches of a recorded run, step by step: padded rows of ids and labels, with the step's normaliser."""
    with gzip.open(folder / "microbatches.jsonl.gz", "rt") as lines:
        for line in lines:
            micro = json.loads(line)
            rows = [
                [Document(np.array(ids), np.array(labels))]
                for ids, labels in zip(micro["ids"], micro["labels"], strict=True)
            ]
            yield make_batch(rows, block_size=len(micro["ids"][0]), pad_id=0), micro["num_items_in_batch"]


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("curve_name", "model_name"),
    [
        ("F_tied_cosine", "model_tied"),
        ("G_untied_linear_accum", "model_untied"),
        ("I_moe_cosine_noaux", "model_moe"),
    ],
)
def test_a_recorded_run_of_another_trainer_is_replayed(shared, tmp_path, curve_name, model_name):
    folder = shared / "oracles" / "loss_curve"
    curve = json.loads((folder / curve_name / "curve.json").read_text())
    config = curve["config"]
    model = load_pretrained(folder / model_name)
    optimizer = make_optimizer(
        model, learning_rate=0.0, betas=tuple(config["betas"]), weight_decay=config["weight_decay"]
    )
    loss_module = SummedLoss(model)
    micro_batches = recorded_batches(folder / curve_name)
    for expected in curve["steps"]:
        batches, counts = zip(*(next(micro_batches) for _ in range(config["grad_accum"])), strict=True)
        result = train_step(
            loss_module,
            optimizer,
            batches,
            target_weight=counts[0],
            learning_rate=expected["lr"],
            grad_clip=config["max_grad_norm"],
            world=CPU_WORLD,
        )
        assert result.loss_sum.item() / counts[0] == pytest.approx(expected["loss"], abs=1e-5), expected["step"]
        assert result.grad_norm.item() == pytest.approx(expected["grad_norm"], abs=1e-5), expected["step"]
    if not (weights := folder / curve_name / "final_weights.safetensors").exists():
        assert curve_name == "I_moe_cosine_noaux"  # which was recorded without them
        return
    shutil.copytree(folder / model_name, tmp_path / "final")
    shutil.copyfile(weights, tmp_path / "final" / "model.safetensors")
    final = load_pretrained(tmp_path / "final").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, final[name], rtol=0, atol=1e-4, msg=name)


def step_once(model, batches, weight, **options):
    optimizer = make_optimizer(model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    options = {"learning_rate": 1e-2, "grad_clip": 1.0, "world": CPU_WORLD, **options}
    return train_step(SummedLoss(model), optimizer, batches, target_weight=weight, **options)


def test_the_step_divides_by_its_trained_tokens_once_however_they_are_spread():
    """A long answer and a short one, in one micro-batch or in two: the mean of two means would be another update."""
    documents = random_documents([60], trained_share=0.9) + random_documents([60], seed=1, trained_share=0.1)
    together, apart = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    weight = target_weight(documents)
    step_once(together, [make_batch([[d] for d in documents], block_size=64, pad_id=0)], weight)
    step_once(apart, [make_batch([[d]], block_size=64, pad_id=0) for d in documents], weight)
    for (name, one), two in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-14, msg=name)


def test_a_weighted_step_is_the_gradient_of_the_weighted_mean():
    documents = random_documents([60, 41, 17], weighted=True)
    model, reference = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    batches = [
        make_batch([documents[:1]], block_size=64, pad_id=0),
        make_batch([documents[1:]], block_size=64, pad_id=0),
    ]
    weight = target_weight(documents)
    loss_sum = accumulate_gradients(SummedLoss(model), batches, target_weight=weight, world=CPU_WORLD)
    weighted_sum = weight_sum = 0.0
    for ids, labels, weights in documents:
        logits = reference(torch.from_numpy(ids)[None])[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)[1:], reduction="none")
        weighted_sum = weighted_sum + (losses * torch.from_numpy(weights)[1:]).sum()
        weight_sum += weights[1:].astype(np.float64).sum()
    (weighted_sum / weight_sum).backward()
    assert (loss_sum / weight).item() == pytest.approx((weighted_sum / weight_sum).item(), rel=1e-12)
    for (name, one), two in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_gradients_are_clipped_to_the_global_norm_and_the_norm_before_is_reported():
    documents = random_documents([60])
    batch = make_batch([documents], block_size=64, pad_id=0)
    model = tiny_model()
    accumulate_gradients(SummedLoss(model), [batch], target_weight=target_weight(documents), world=CPU_WORLD)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    result = step_once(tiny_model(), [batch], target_weight(documents), grad_clip=1e-3)
    assert result.grad_norm.item() == pytest.approx(expected, rel=1e-5)
    assert step_once(tiny_model(), [batch], target_weight(documents), grad_clip=None).grad_norm.item() == pytest.approx(
        expected, rel=1e-5
    )


def test_dropout_depends_on_the_batch_seed_and_on_nothing_else():
    model = tiny_model(dropout=0.5)
    documents = random_documents([60])

    def loss(seed):
        return SummedLoss(model)(make_batch([documents], block_size=64, pad_id=0, dropout_seed=seed)).item()

    first = loss(1)
    torch.manual_seed(99)
    assert loss(1) == first
    assert loss(2) != first


def test_bf16_autocast_keeps_fp32_weights_and_an_fp32_loss():
    model = tiny_model()
    documents = random_documents([60])
    batch = make_batch([documents], block_size=64, pad_id=0)
    loss = SummedLoss(model, autocast_dtype=torch.bfloat16)(batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(SummedLoss(model)(batch).item(), rel=2e-2)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


class Synchronised(SummedLoss):
    """Notes for each micro-batch whether its backward would all-reduce, as DDP decides it: by the forward's context."""

    def __init__(self, model):
        super().__init__(model)
        self.syncs, self.notes = True, []

    @contextlib.contextmanager
    def no_sync(self):
        self.syncs = False
        yield
        self.syncs = True

    def forward(self, batch, **options):
        self.notes.append(self.syncs)
        return super().forward(batch, **options)


def test_only_the_last_micro_batch_is_all_reduced():
    documents = random_documents([20, 30, 40])
    batches = [make_batch([[document]], block_size=64, pad_id=0) for document in documents]
    loss_module = Synchronised(tiny_model())
    accumulate_gradients(loss_module, iter(batches), target_weight=target_weight(documents), world=CPU_WORLD)
    assert loss_module.notes == [False, False, True]
