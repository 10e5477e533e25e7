import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import train_sft
from model_builder import ConfigurableGPT, load_pretrained
from model_config import ModelArchitectureConfig
from sft import experts
from sft.attention import Documents
from sft.batches import Document, make_batch
from sft.errors import UserError
from sft.experts import MixtureOfExperts, RouterLoad, Routing, balance_weight, load_balancing_loss
from sft.huggingface import name_table, to_hugging_face
from sft.loss import Loss
from sft.step import SummedLoss, accumulate_gradients
from tests.launch import torchrun
from tests.tiny import CPU_WORLD

SHAPE: dict[str, Any] = {
    **{"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 100, "block_size": 64, "num_key_value_heads": 2},
    **{"num_experts": 6, "num_experts_per_tok": 2, "expert_d_ff": 24},
}


def mixture(*, normalized: bool = True, chosen: int = 2, count: int = 6) -> MixtureOfExperts:
    torch.manual_seed(0)
    module = MixtureOfExperts(16, experts=count, chosen=chosen, inner_width=24, normalized=normalized).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return module


def model_of(**changes: Any) -> ConfigurableGPT:
    torch.manual_seed(0)
    model = ConfigurableGPT(ModelArchitectureConfig(**{**SHAPE, **changes})).double()
    for name, parameter in model.named_parameters():
        if "router" in name:
            torch.nn.init.normal_(parameter, 0, 1)
    return model


def by_definition(module: MixtureOfExperts, x: Tensor) -> Tensor:
    """Token by token: the weighted sum of the chosen experts."""
    rows = []
    for token in x:
        probabilities = F.softmax(module.router(token), dim=-1)
        weights, chosen = probabilities.topk(module.chosen)
        if module.normalized:
            weights = weights / weights.sum()
        parts = [
            weight * (module.w_out[e] @ (F.silu(module.w_gate[e] @ token) * (module.w_value[e] @ token)))
            for weight, e in zip(weights, chosen.tolist(), strict=True)
        ]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("chosen", [1, 2, 6])
def test_a_token_gets_the_weighted_sum_of_its_experts(normalized, chosen):
    module = mixture(normalized=normalized, chosen=chosen)
    x = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(module(x.view(2, 20, 16))[0].view(40, 16), by_definition(module, x))
    upstream = torch.randn(40, 16, dtype=torch.float64)
    inputs = [x, *module.parameters()]
    ours = torch.autograd.grad(module(x)[0], inputs, upstream)
    for mine, exact in zip(ours, torch.autograd.grad(by_definition(module, x), inputs, upstream), strict=True):
        torch.testing.assert_close(mine, exact)


def test_padding_is_not_routed_and_comes_out_as_zero():
    module, x = mixture(), torch.randn(3, 8, 16, dtype=torch.float64)
    real = torch.arange(8) < torch.tensor([[8], [3], [0]])
    out, routing = module(x, real)
    assert torch.equal(out[real], module(x[real])[0])
    assert not out[~real].any()
    alone = module(x[real])[1]
    assert routing.tokens == 11
    assert torch.equal(routing.chosen, alone.chosen)
    torch.testing.assert_close(routing.probability, alone.probability)


def test_an_idle_expert_costs_nothing(monkeypatch):
    """Each product is one of an expert that has tokens."""
    module = mixture(chosen=1)
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[4, 0] = 5.0
    x = torch.randn(7, 16, dtype=torch.float64)
    x[:, 0] = 1.0
    products = []

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        products.append(rows.shape[0])
        return rows @ weight.t()

    monkeypatch.setattr(experts.F, "linear", linear)
    routing = module(x)[1]
    assert routing.chosen.tolist() == [0, 0, 0, 0, 7, 0]
    assert products == [7, *[7] * 3]  # the router, then one expert's three


class UndefinedBehind(torch.autograd.Function):
    """x, whose gradient has anything behind row `end`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, end: int) -> Tensor:
        ctx.end = end
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        behind = torch.full_like(gradient[ctx.end :], float("nan"))
        return torch.cat([gradient[: ctx.end], behind]), None


def grouped_by_hand(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
    """What F.grouped_mm promises: rows behind the last offset are undefined, here as bad as can be."""
    x = UndefinedBehind.apply(x, int(offs[-1]))
    out = torch.full((len(x), weight.shape[2]), float("nan"), dtype=x.dtype)
    for group, (start, end) in enumerate(zip([0, *offs.tolist()], offs.tolist(), strict=False)):
        out = torch.cat([out[:start], x[start:end] @ weight[group], out[end:]])
    return out


def test_nothing_undefined_comes_through_the_grouped_product(monkeypatch):
    """Forward and backward, with padding, whose rows lie behind the last expert's."""
    module = mixture().bfloat16()
    monkeypatch.setattr(experts.F, "grouped_mm", grouped_by_hand)
    x = torch.randn(2, 12, 16).bfloat16().requires_grad_()
    real = torch.arange(12) < torch.tensor([[12], [5]])
    results = []
    for can_group in (True, False):
        monkeypatch.setattr(experts, "can_group", lambda *_, can=can_group: can)
        out, _ = module(x, real)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])])
    for grouped, one_by_one in zip(*results, strict=True):
        assert grouped.isfinite().all()
        torch.testing.assert_close(grouped, one_by_one, rtol=0.05, atol=0.05)


def test_rows_that_fill_up_a_step_have_gradients_of_0_for_all_ranks_wait_for_them():
    batch = make_batch([[]], block_size=64, pad_id=0)
    model = model_of().train()
    loss = SummedLoss(model, loss=Loss("reference", ""), balance_weight=0.3)(batch)
    loss.backward()
    assert loss == 0
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if ".ffn." in name}
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())


BALANCED = """
import sys, torch
from sft.errors import run_program
from sft.world import join_world
from sft.loss import Loss
from sft.step import SummedLoss, accumulate_gradients
from sft.batches import make_batch
from tests.test_experts import documents_of, model_of

def main(argv):
    with join_world("cpu") as world:
        model = model_of().train()
        module = SummedLoss(model, loss=Loss("reference", ""), balance_weight=0.3 / 2)
        mine = {0: ((9, 20), (40,)), 1: ((64,), (5, 6, 7))}[world.rank]
        batches = [make_batch([documents_of(*lengths)], block_size=64, pad_id=0) for lengths in mine]
        wrapped = world.wrap(module, bucket_mb=1, compression="none")
        accumulate_gradients(wrapped, batches, target_weight=100.0, world=world)
        if world.is_main:
            torch.save([parameter.grad for parameter in model.parameters()], argv[0])
run_program(main)
"""


@pytest.mark.slow
def test_the_balance_is_averaged_over_the_micro_batches_of_all_ranks(tmp_path: Path):
    (tmp_path / "worker.py").write_text(BALANCED)
    torchrun(2, tmp_path / "worker.py", tmp_path / "gradients.pt")
    model = model_of().train()
    module = SummedLoss(model, loss=Loss("reference", ""), balance_weight=0.3 / 4)
    rows = ((9, 20), (40,), (64,), (5, 6, 7))
    batches = [make_batch([documents_of(*lengths)], block_size=64, pad_id=0) for lengths in rows]
    accumulate_gradients(module, batches, target_weight=100.0, world=CPU_WORLD)
    for gradient, parameter in zip(torch.load(tmp_path / "gradients.pt"), model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.gpu
def test_the_grouped_product_of_a_gpu_gives_what_one_expert_after_the_other_gives():
    torch.manual_seed(0)
    module = MixtureOfExperts(64, experts=8, chosen=2, inner_width=96, normalized=True)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    module = module.to("cuda", torch.bfloat16)
    with torch.no_grad():
        module.router.weight[3] = -100 * module.router.weight[:3].sum(0)  # often idle
    x = torch.randn(2, 40, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    real = torch.arange(40, device="cuda") < torch.tensor([[40], [11]], device="cuda")
    upstream = torch.randn(2, 40, 64, device="cuda")
    assert experts.can_group(x, module.w_gate)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = x.detach().to(dtype).requires_grad_()
        copied = copy.deepcopy(module).to(dtype)
        out, _ = copied(inputs, real)
        results.append([out, *torch.autograd.grad((out * upstream).sum(), [inputs, *copied.parameters()])])
    for grouped, exact in zip(*results, strict=True):
        assert grouped.isfinite().all()
        assert (grouped - exact).norm() <= 0.03 * exact.norm()


def test_even_routes_have_the_least_balancing_loss():
    even = Routing(torch.full((4,), 6.0), torch.full((4,), 3.0), torch.tensor(12.0))
    assert load_balancing_loss([even, even]) == pytest.approx(2)  # two experts a token
    skewed = Routing(torch.tensor([12.0, 12, 0, 0]), torch.tensor([6.0, 6, 0, 0]), torch.tensor(12.0))
    assert load_balancing_loss([even, skewed]) == pytest.approx(4 * (2 * 0.75 * 0.375 + 2 * 0.25 * 0.125))


def documents_of(*lengths: int) -> list[Document]:
    generator = torch.Generator().manual_seed(sum(lengths))
    drawn = [torch.randint(100, (length,), generator=generator).numpy() for length in lengths]
    return [Document(ids, ids.copy()) for ids in drawn]


def test_the_loss_stays_and_its_gradient_has_the_balance_of_real_tokens():
    """Averaged over the micro-batches of a step and then weighted, whatever the step's loss is divided by."""
    rows = [[documents_of(9, 20)], [documents_of(40)]]
    batches = [make_batch(each, block_size=64, pad_id=0) for each in rows]
    model = model_of().train()
    weight, coefficient = 67.0, 0.3
    plain = SummedLoss(model, loss=Loss("reference", ""))
    module = SummedLoss(model, loss=Loss("reference", ""), balance_weight=coefficient / len(batches))
    loss_sum = accumulate_gradients(module, batches, target_weight=weight, world=CPU_WORLD)
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    assert accumulate_gradients(plain, batches, target_weight=weight, world=CPU_WORLD) == loss_sum
    balances = []
    for batch in batches:
        real, routings = batch.input_ids[:, : batch.tokens], []
        ids = torch.zeros(1, batch.tokens, dtype=torch.int32)
        if batch is batches[0]:
            ids[:, 9:] = 1
        model.hidden_states(real, documents=Documents(ids), routings=routings)
        balances.append(load_balancing_loss(routings))
    (coefficient * torch.stack(balances).mean()).backward()
    for ours, exact in zip(gradients, [parameter.grad for parameter in model.parameters()], strict=True):
        torch.testing.assert_close(ours, exact)
    assert plain.router_load is not None
    sums = plain.router_load.take().tolist()
    assert sums[-2:] == pytest.approx([torch.stack(balances).sum().item(), 2])
    assert sum(sums[:-2]) == 2 * 2 * (29 + 40)  # layers, experts a token, real tokens


def test_the_record_tells_of_even_and_idle_experts():
    load = RouterLoad(2, 4, torch.device("cpu"))
    told = load.record([3.0, 3, 3, 3, 0, 12, 0, 0, 7.5, 3])
    assert told == {"balance_loss": 2.5, "least_load": 0, "largest_load": 4, "idle_experts": 3}
    assert load.record([0.0] * 10)["balance_loss"] == 0


def test_a_block_without_experts_has_one_part_for_all():
    model = model_of(dense_layers=(1,), d_ff=48)
    assert [type(block.ffn).__name__ for block in model.blocks] == ["MixtureOfExperts", "GatedFeedForward"]
    routings: list[Routing] = []
    model.hidden_states(torch.zeros(1, 4, dtype=torch.int64), routings=routings)
    assert len(routings) == 1


def test_a_weight_without_experts_is_refused():
    assert balance_weight(None, model_of(router_aux_loss_coef=0.5)) == 0.5
    assert balance_weight(0.25, model_of(router_aux_loss_coef=0.5)) == 0.25
    dense = ConfigurableGPT(ModelArchitectureConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=10, block_size=8))
    assert balance_weight(None, dense) == 0
    with pytest.raises(UserError, match="router_aux_loss_coef is for a mixture of experts"):
        balance_weight(0.1, dense)


@pytest.mark.oracle
def test_the_recorded_mixture_has_the_recorded_balancing_loss(shared: Path):
    folder = shared / "oracles" / "models" / "qwen3_moe_topknorm"
    expected, model = load_file(folder / "expected.safetensors"), load_pretrained(folder).train()
    real = expected["attention_mask"].bool()
    coefficient = json.loads((folder / "config.json").read_text())["router_aux_loss_coef"]
    documents = Documents((~real).int(), ends=real.sum(1))
    routings: list[Routing] = []
    model.hidden_states(expected["input_ids"], documents=documents, routings=routings)
    balance = load_balancing_loss(routings)
    torch.testing.assert_close(balance, expected["aux_loss"], rtol=1e-5, atol=0)
    whole = expected["loss"] + coefficient * balance
    torch.testing.assert_close(whole, expected["loss_with_aux"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("activation_checkpointing", ["none", "selective", "full"])
def test_what_is_recomputed_changes_no_gradient(activation_checkpointing):
    batch = make_batch([documents_of(9, 20), documents_of(50)], block_size=64, pad_id=0)
    gradients = []
    for way in ("none", activation_checkpointing):
        model = model_of().train()
        model.activation_checkpointing = way
        SummedLoss(model, loss=Loss("reference", ""), balance_weight=0.3)(batch).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_memory_of_experts_is_estimated(arguments, capsys):
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "num_experts": 4, "num_experts_per_tok": 2, "expert_d_ff": 16}
    train_sft.main([*arguments(model=shape, activation_checkpointing="auto"), "--dry_run"])
    told = capsys.readouterr().out
    assert "estimated:" not in told
    assert "activation_checkpointing=full" in told


def test_every_tensor_has_a_name_of_hugging_faces():
    model = model_of(dense_layers=(0,), d_ff=48, head_dim=8, qk_norm=True)
    weights = dict(model.named_parameters())
    table = name_table(model.config.to_dict())
    assert table.keys() == weights.keys()
    theirs = to_hugging_face(weights, table)
    assert torch.equal(theirs["model.layers.1.mlp.experts.3.down_proj.weight"], model.blocks[1].ffn.w_out[3])
    assert all(theirs[piece.name].shape == piece.shape for row in table.values() for piece in row)
