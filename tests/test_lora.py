"""The mathematics of adapters, and which parameters of a model are trained."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_builder import ConfigurableGPT
from sft.adapting import (
    ADAPTERS_OF,
    adapt,
    chosen_places,
    freeze,
    keep_frozen_in,
    kept_state,
    make_trainable,
    merge_adapters,
    places,
)
from sft.batches import make_batch
from sft.errors import UserError
from sft.huggingface import name_table
from sft.lora import LoRA
from sft.loss import Loss
from sft.memory import Workload, estimate
from sft.optim import make_optimizer
from sft.step import SummedLoss
from tests.tiny import CPU_WORLD, random_documents, tiny_model

IDS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
SHAPES = {
    "grouped": {},
    "fused": {"num_key_value_heads": 4, "bias": True},
    "gpt2": {
        "num_key_value_heads": 4,
        "ffn_type": "standard",
        "activation": "gelu_tanh",
        "position_encoding": "learned_absolute",
        "normalization": "layernorm",
        "qk_norm": False,
        "bias": True,
    },
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def settings(**changes: object) -> SimpleNamespace:
    values = {"lora_rank": 3, "lora_alpha": 5.0, "lora_dropout": 0.0, "lora_targets": ("*",), "lora_dora": False}
    values |= {"lora_scaling": "standard", "train_embeddings": False, "freeze": (), "seed": 1}
    return SimpleNamespace(**{**values, **changes})


def adapted(*, dtype: torch.dtype = torch.float64, shape: dict | None = None, moved: bool = True, **changes: object):
    """A tiny model with adapters, which have learned something if `moved`."""
    model = tiny_model(dtype=dtype, **(shape or {}))
    make_trainable(model, settings(**changes), base=None, half=False, grew=False, say=pytest.fail)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if moved and ADAPTERS_OF in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def loss_of(model: ConfigurableGPT) -> Tensor:
    return F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@each_shape
def test_gradients_are_those_of_full_fine_tuning_projected(shape: dict):
    """With G the gradient of the whole weight W + s B A: s B' G for A, and s G A' for B."""
    model, merged = adapted(shape=shape), adapted(shape=shape)
    merge_adapters(merged)
    loss_of(model).backward()
    loss_of(merged).backward()
    scale, count = 5.0 / 3, 0
    for place in places(model):
        of_whole = merged.get_parameter(f"{place.layer}.weight").grad[place.rows.start : place.rows.stop]
        a, b = (model.get_parameter(f"{place.prefix}{kind}") for kind in "AB")
        torch.testing.assert_close(a.grad, scale * b.detach().T @ of_whole, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(b.grad, scale * of_whole @ a.detach().T, rtol=1e-10, atol=1e-14)
        count += int(of_whole.abs().max() > 0)
    assert count == len(places(model)) == (4 if "ffn_type" in shape else 7) * 2
    assert all(p.grad is None for name, p in model.named_parameters() if ADAPTERS_OF not in name)


@each_shape
@pytest.mark.parametrize("changes", [{}, {"lora_scaling": "rank_stabilized"}, {"lora_dora": True}], ids=str)
def test_a_merged_model_computes_the_same(shape: dict, changes: dict):
    some = ("c_attn", "c_fc") if "ffn_type" in shape else ("v_proj", "c_proj", "down_proj")
    model = adapted(shape=shape, **changes, lora_targets=some)
    logits, plain = model(IDS), tiny_model(dtype=torch.float64, **shape)(IDS)
    assert (logits - plain).abs().max() > 0.01
    merge_adapters(model)
    assert not [name for name, _ in model.named_parameters() if ADAPTERS_OF in name]
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(IDS), logits, rtol=0, atol=1e-12)


def test_merging_rounds_once():
    model = adapted(dtype=torch.float32, lora_targets=("k_proj",))
    layer = model.blocks[0].attn.c_kv
    adapter = layer.adapters["k_proj"]
    exact = layer.weight.detach().to(torch.bfloat16).float()
    exact[: len(adapter.B)] += (5.0 / 3) * (adapter.B @ adapter.A).detach()
    keep_frozen_in(model, torch.bfloat16)
    merge_adapters(model)
    assert torch.equal(model.blocks[0].attn.c_kv.weight, exact.to(torch.bfloat16))


@pytest.mark.parametrize("dora", [False, True])
def test_new_adapters_change_nothing_and_are_drawn_from_the_seed(dora: bool):
    one, same, other = (adapted(moved=False, seed=seed, lora_dora=dora) for seed in (1, 1, 2))
    assert torch.equal(one(IDS), tiny_model(dtype=torch.float64)(IDS))
    tensors = [kept_state(model) for model in (one, same, other)]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    assert not any(torch.equal(tensors[0][name], tensors[2][name]) for name in tensors[0] if name.endswith(".A"))


@pytest.mark.parametrize("recomputing", ["selective", "full"])
def test_dropout_of_adapters_is_the_same_where_it_is_computed_again(recomputing: str):
    gradients = []
    for mode in ("none", recomputing):
        model = adapted(lora_dropout=0.5).train()
        model.activation_checkpointing = mode
        torch.manual_seed(3)
        loss_of(model).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_dropout_is_of_what_adapters_read_each_by_itself_and_not_in_evaluation():
    model = adapted(lora_dropout=0.5)
    layer, x = model.blocks[0].attn.c_kv, torch.ones(1, 1, 32, dtype=torch.float64)
    key, value = layer.adapters["k_proj"], layer.adapters["v_proj"]
    with torch.no_grad():
        for each in (key, value):
            each.A.fill_(0.0)[0] = 2.0 ** torch.arange(32)  # the sum tells what was dropped
            each.B.fill_(0.0)[0, 0] = 1.0
        plain = F.linear(x, layer.weight)
        full = 5.0 / 3 * float(2**32 - 1)
        added = (layer.eval()(x) - plain)[0, 0]
        assert added[0].item() == pytest.approx(full, rel=1e-12)
        masks = [(layer.train()(x) - plain)[0, 0] for _ in range(3)]
    assert len({mask[at].item() for mask in masks for at in (0, 16)}) == 6
    assert all(0 < mask[0] < 2 * full for mask in masks)


def test_targets_are_patterns_of_either_sides_names():
    model = tiny_model()

    def ends(*patterns: str) -> list[str]:
        return [place.name.removeprefix("model.layers.") for place in chosen_places(model, patterns)]

    assert ends("q_proj", "1.*.v_proj") == ["0.self_attn.q_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"]
    assert ends("blocks.0.attn.c_kv") == ["0.self_attn.k_proj", "0.self_attn.v_proj"]
    assert ends("model.layers.1.mlp.up_proj") == ["1.mlp.up_proj"]
    assert len(ends("*")) == 14
    with pytest.raises(UserError, match=r"'query' names no linear layer of the blocks; there are q_proj, k_proj, "):
        ends("q_proj", "query")


@each_shape
def test_the_parts_have_the_names_and_rows_of_hugging_faces_tensors(shape: dict):
    model = tiny_model(**shape)
    table = name_table({**model.config.to_dict(), "head_dim": 8, "d_ff": model.config.ffn_width})
    pieces = {piece.name: piece.rows for ours, made in table.items() if ours.startswith("blocks.") for piece in made}
    found = {f"{place.name}.weight": len(place.rows) for place in places(model)}
    assert found == {name: pieces[name] for name in found}
    matrices = [name for name in pieces if name.endswith("weight") and "norm" not in name and "ln_" not in name]
    assert found.keys() == set(matrices)


def test_frozen_is_what_a_pattern_names_and_nothing_else():
    model = tiny_model(weight_tying=False)
    freeze(model, ("token_embeddings", "blocks.0", "blocks.1.ffn.w_*", "*.norm2.weight"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    attention = {f"blocks.1.attn.{name}.weight" for name in ("c_q", "c_kv", "c_proj", "q_norm", "k_norm")}
    assert trained == {"lm_head.weight", "final_norm.weight", "blocks.1.norm1.weight", *attention}
    optimizer = make_optimizer(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)


def test_a_pattern_that_freezes_nothing_or_everything_is_refused():
    with pytest.raises(UserError, match=r"freeze: 'block.0' names no parameter that would be trained; near it are bl"):
        freeze(tiny_model(), ("block.0",))
    with pytest.raises(UserError, match="'lm_head' names no parameter that would be trained"):
        freeze(tiny_model(weight_tying=True), ("lm_head",))
    with pytest.raises(UserError, match="freeze: nothing is left to be trained after blocks, \\*"):
        freeze(tiny_model(), ("blocks", "*"))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_are_trained_on_request(tied: bool):
    model = adapted(shape={"weight_tying": tied}, train_embeddings=True)
    whole = {name for name, p in model.named_parameters() if p.requires_grad and ADAPTERS_OF not in name}
    assert whole == {"token_embeddings.weight"} | (set() if tied else {"lm_head.weight"})
    assert whole < kept_state(model).keys()
    loss_of(model).backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


def test_new_tokens_in_a_frozen_embedding_are_warned_of():
    said: list[str] = []
    for frozen in (False, True):
        changes = {"lora_rank": 2, "train_embeddings": not frozen}
        make_trainable(tiny_model(), settings(**changes), base=None, half=False, grew=True, say=said.append)
    (sentence,) = said
    assert "rows are the mean of the old ones and stay so" in sentence
    assert "train_embeddings=true" in sentence


def workload(model: ConfigurableGPT, *, half: bool = False) -> Workload:
    batch = make_batch([random_documents([40, 20, 4])] * 2, block_size=64, pad_id=0)
    dtype = torch.bfloat16 if half else None
    return Workload(
        model=model, batch=batch, loss=Loss("torch", ""), autocast_dtype=dtype, micro_steps=2, world=CPU_WORLD
    )


def test_a_base_kept_in_bfloat16_computes_what_one_in_fp32_does_under_autocast():
    losses = []
    for half in (False, True):
        model = tiny_model()
        for parameter in model.parameters():  # as the file of a base has them
            parameter.data = parameter.data.bfloat16().float()
        make_trainable(model, settings(), base=None, half=half, grew=False, say=pytest.fail)
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert dtypes["blocks.0.attn.c_q.weight"] == (torch.bfloat16 if half else torch.float32)
        assert dtypes["token_embeddings.weight"] == dtypes["blocks.0.attn.c_q.weight"]
        assert {dtypes["blocks.0.norm1.weight"], dtypes["blocks.0.attn.c_q.adapters.q_proj.A"]} == {torch.float32}
        work = workload(model, half=True)
        loss = SummedLoss(model, autocast_dtype=work.autocast_dtype, loss=work.loss)(work.batch)
        loss.backward()
        losses.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(one, other) for one, other in zip(*losses, strict=True))


def test_memory_is_of_the_base_the_adapters_and_their_moments_alone():
    model = adapted(dtype=torch.float32, moved=False)
    own = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    base = sum(parameter.nbytes for parameter in tiny_model().parameters())
    parts = estimate(workload(model), "none").parts
    assert (parts["parameters"], parts["gradients"]) == (base + own, own)
    assert parts["optimizer moments"] == pytest.approx(2 * own, rel=0.05)  # and a step count for each
    keep_frozen_in(model, torch.bfloat16)
    parts = estimate(workload(model, half=True), "none").parts
    assert base / 2 < parts["parameters"] - own < 0.52 * base  # norms stay in fp32


def test_a_mixture_of_experts_has_adapters_in_its_attention_and_stays_frozen_itself():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "expert_d_ff": 16, "dense_layers": [0]}
    model = adapted(dtype=torch.float32, shape=experts)
    names = {place.name.removeprefix("model.layers.1.") for place in places(model) if ".1." in place.name}
    assert names == {f"self_attn.{letter}_proj" for letter in "qkvo"}
    keep_frozen_in(model, torch.bfloat16)
    assert model.blocks[1].ffn.w_gate.dtype == torch.bfloat16
    work = workload(model, half=True)
    SummedLoss(model.train(), autocast_dtype=work.autocast_dtype, loss=work.loss)(work.batch).backward()
    assert all(p.grad.any() if p.requires_grad else p.grad is None for p in model.parameters())


def test_adapters_can_be_for_a_few_parts_alone():
    model = tiny_model()
    lora = LoRA(rank=2, alpha=4, targets=("model.layers.1.self_attn.v_proj",))
    adapt(model, lora, base=None, seed=0)
    assert [name for name, _ in model.named_parameters() if ADAPTERS_OF in name] == [
        "blocks.1.attn.c_kv.adapters.v_proj.A",
        "blocks.1.attn.c_kv.adapters.v_proj.B",
    ]
