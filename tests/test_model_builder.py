import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from model_builder import ConfigurableGPT
from model_config import parameter_count
from sft.attention import Documents
from sft.recompute import LEAST_FIRST
from tests.tiny import tiny_model

KINDS = {
    "qwen3": {},
    "mha_interleaved": {"num_key_value_heads": 4, "rope_layout": "interleaved", "qk_norm": False},
    "gpt2": {
        "normalization": "layernorm",
        "ffn_type": "standard",
        "activation": "gelu_tanh",
        "position_encoding": "learned_absolute",
        "bias": True,
        "num_key_value_heads": 4,
        "qk_norm": False,
    },
    "post_norm": {
        "normalization": "layernorm_nobias",
        "norm_position": "post",
        "position_encoding": "learned_absolute",
        "ffn_type": "standard",
        "activation": "gelu",
    },
    "no_positions_mqa": {"position_encoding": "none", "num_key_value_heads": 1, "weight_tying": False, "head_dim": 6},
}
# A one-token document, others of uneven lengths, a padded tail.
LENGTHS = [1, 13, 7, 20, 5]
ROW = torch.repeat_interleave(torch.arange(len(LENGTHS), dtype=torch.int32), torch.tensor(LENGTHS))[None]
IDS = torch.randint(97, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(3))


def lively(**changes: object) -> ConfigurableGPT:
    """A tiny model whose weights are large enough for every part to show in the logits."""
    model = tiny_model(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.3 if parameter.ndim == 1 else 2.0 / math.sqrt(parameter.shape[-1])))
    return model


def documents() -> Documents:
    return Documents(ROW.expand(2, -1))


def gradients(model: ConfigurableGPT, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_gives_each_document_the_logits_and_gradients_it_has_alone(kind: str):
    model = lively(**KINDS[kind])
    weights = torch.randn(2, sum(LENGTHS), 97, generator=torch.Generator().manual_seed(5))
    packed = model(IDS, documents=documents())
    alone = torch.cat([model(part) for part in IDS.split(LENGTHS, dim=1)], dim=1)
    assert packed.std() > 0.5
    assert (packed - alone).abs().max() <= 3e-5
    in_row, by_itself = gradients(model, (packed * weights).sum()), gradients(model, (alone * weights).sum())
    for name, gradient in in_row.items():
        assert (gradient - by_itself[name]).norm() <= 1e-4 * by_itself[name].norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_changing_one_document_leaves_the_others_logits_bit_identical(kind: str):
    model = lively(**KINDS[kind]).eval()
    before = model(IDS, documents=documents())
    changed = IDS.clone()
    changed[:, 1:14] = (changed[:, 1:14] + 1) % 97
    after = model(changed, documents=documents())
    assert after.isfinite().all()
    assert not torch.equal(before[:, 1:14], after[:, 1:14])
    assert torch.equal(before[:, :1], after[:, :1])
    assert torch.equal(before[:, 14:], after[:, 14:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_sees_nothing_that_follows(kind: str):
    model = lively(**KINDS[kind]).eval()
    changed = IDS.clone()
    changed[:, 20:] = 0
    torch.testing.assert_close(model(IDS)[:, :20], model(changed)[:, :20], rtol=0, atol=1e-6)
    assert not torch.equal(model(IDS)[:, 20:], model(changed)[:, 20:])


def test_positions_that_nobody_gives_are_those_of_the_documents():
    model = lively()
    given = torch.cat([torch.arange(n) for n in LENGTHS])[None].expand(2, -1)
    assert torch.equal(model(IDS, documents=documents()), model(IDS, given, documents()))
    assert not torch.equal(model(IDS, documents=documents()), model(IDS, given + 1 + given // 2, documents()))


def test_interleaved_and_half_rotations_differ_only_in_the_order_of_rows():
    half, interleaved = lively(qk_norm=False), lively(qk_norm=False, rope_layout="interleaved")
    order = torch.arange(8).view(2, 4).T.flatten()  # 0 4 1 5 2 6 3 7: where half keeps each pair
    rows = (torch.arange(4)[:, None] * 8 + order).flatten()
    with torch.no_grad():
        for block in interleaved.blocks:
            block.attn.c_q.weight.copy_(block.attn.c_q.weight[rows])
            block.attn.c_kv.weight[:16] = block.attn.c_kv.weight[rows[:16]].clone()
    torch.testing.assert_close(half(IDS), interleaved(IDS), rtol=1e-4, atol=1e-4)
    assert (half(IDS) - lively(qk_norm=False, rope_layout="interleaved")(IDS)).abs().max() > 0.1


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_both_residual_orders_are_what_their_formulas_say(norm_position: str):
    model = lively(norm_position=norm_position, n_layer=1).eval()
    block, x = model.blocks[0], torch.randn(1, 6, 32)

    def attention(y: Tensor) -> Tensor:
        return block.attn(y, None, None, None)

    if norm_position == "pre":
        middle = x + attention(block.norm1(x))
        expected = middle + block.ffn(block.norm2(middle))
    else:
        middle = block.norm1(x + attention(x))
        expected = block.norm2(middle + block.ffn(middle))
    assert torch.equal(block(x, None, None, None)[0], expected)
    assert isinstance(model.final_norm, type(block.norm1))


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
        ("relu", lambda x: x.clamp(min=0)),
        ("leaky_relu", lambda x: torch.where(x > 0, x, 0.01 * x)),
    ],
)
def test_a_standard_feed_forward_uses_the_named_activation(activation: str, formula):
    ffn = lively(ffn_type="standard", activation=activation, bias=True).double().blocks[0].ffn
    x = torch.randn(5, 32, dtype=torch.float64)
    inner = formula(x @ ffn.fc1.weight.T + ffn.fc1.bias)
    torch.testing.assert_close(ffn(x), inner @ ffn.fc2.weight.T + ffn.fc2.bias)


def test_each_dropout_rate_reaches_its_place_in_training_only():
    torch.manual_seed(0)
    for name in ("dropout", "attention_dropout", "residual_dropout"):
        rates = {"dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0, name: 0.5}
        model = lively(**rates)
        assert not torch.equal(model.train()(IDS), model(IDS)), name
        assert torch.equal(model.eval()(IDS), model(IDS)), name
    model = lively(dropout=0.5, attention_dropout=0.0, residual_dropout=0.0)
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(IDS)
    assert 0.4 < (seen[0] == 0).float().mean() < 0.6  # of the embeddings


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_both_halves_of_a_block_pass_through_the_residual_dropout(norm_position: str):
    block = lively(norm_position=norm_position).blocks[0]
    dropped: list[Tensor] = []
    block.residual_dropout.register_forward_pre_hook(lambda module, inputs: dropped.append(inputs[0]))
    halves: list[Tensor] = []
    for half in (block.attn, block.ffn):
        half.register_forward_hook(lambda module, inputs, output: halves.append(output))
    block(torch.randn(1, 6, 32), None, None, None)
    assert [id(x) for x in dropped] == [id(x) for x in halves]


def test_set_dropout_changes_all_three_rates_and_the_config():
    model = lively(dropout=0.5, attention_dropout=0.3, residual_dropout=0.1).train()
    model.set_dropout(0.0)
    assert torch.equal(model(IDS), model(IDS))
    model.set_dropout(0.2)
    assert (model.config.dropout, model.config.attention_dropout_rate, model.config.residual_dropout_rate) == (0.2,) * 3
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.2}
    assert {block.attn.dropout for block in model.blocks} == {0.2}


def test_a_seed_fixes_the_first_weights_and_they_have_gpt2s_spread():
    first, again, other = tiny_model(seed=1), tiny_model(seed=1), tiny_model(seed=2)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert not torch.equal(first.token_embeddings.weight, other.token_embeddings.weight)
    large = tiny_model(n_embd=128, d_ff=512, bias=True, normalization="layernorm", n_layer=8)
    attention, ffn = large.blocks[3].attn, large.blocks[3].ffn
    for matrix, spread in (
        (large.token_embeddings.weight, 0.02),
        (attention.c_q.weight, 0.02),
        (ffn.w_gate.weight, 0.02),
        (attention.c_proj.weight, 0.02 / 4),
        (ffn.w_out.weight, 0.02 / 4),
    ):
        assert matrix.std().item() == pytest.approx(spread, rel=0.05)
    assert torch.equal(large.final_norm.weight, torch.ones(128))
    assert torch.equal(large.final_norm.bias, torch.zeros(128))
    assert torch.equal(attention.c_kv.bias, torch.zeros(128))


def test_a_tied_head_is_the_embedding_under_a_second_name():
    tied, untied = tiny_model(), tiny_model(weight_tying=False)
    assert tied.head_weight is tied.token_embeddings.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    state = tied.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["token_embeddings.weight"].data_ptr()
    assert not torch.equal(untied.head_weight, untied.token_embeddings.weight)


def test_the_state_holds_parameters_only_under_the_contracts_names():
    grouped = set(tiny_model(weight_tying=False, n_layer=1).state_dict())
    assert grouped == {
        "token_embeddings.weight",
        *(f"blocks.0.{name}.weight" for name in ("norm1", "norm2")),
        *(f"blocks.0.attn.{name}.weight" for name in ("c_q", "c_kv", "c_proj", "q_norm", "k_norm")),
        *(f"blocks.0.ffn.{name}.weight" for name in ("w_gate", "w_value", "w_out")),
        "final_norm.weight",
        "lm_head.weight",
    }
    others = set(lively(**KINDS["gpt2"], n_layer=1).state_dict())
    assert {"pos_encoding.wpe.weight", "blocks.0.attn.c_attn.bias", "blocks.0.ffn.fc1.weight"} <= others
    assert not list(tiny_model().buffers())


@pytest.mark.parametrize("tied", [True, False])
def test_growing_adds_mean_rows_and_says_both_parameter_counts(tied: bool, capsys: pytest.CaptureFixture[str]):
    model = lively(weight_tying=tied)
    before, old = model(IDS), model.config
    model.grow_vocabulary(103)
    logits = model(IDS)
    assert torch.equal(logits[..., :97], before)
    torch.testing.assert_close(logits[..., 97:], before.mean(dim=-1, keepdim=True).expand(-1, -1, 6))
    for weight in (model.token_embeddings.weight, model.head_weight):
        torch.testing.assert_close(weight[97:], weight[:97].mean(dim=0).expand(6, -1))
        assert weight.requires_grad
    assert (model.head_weight is model.token_embeddings.weight) == tied
    assert model.vocab_size == 103
    assert parameter_count(model.config) == sum(parameter.numel() for parameter in model.parameters())
    said = capsys.readouterr().out
    assert f"{parameter_count(old):,} -> {parameter_count(model.config):,} parameters" in said
    with pytest.raises(AssertionError):
        model.grow_vocabulary(50)


def test_activation_checkpointing_changes_no_bit_of_the_gradients():
    model = lively(dropout=0.2).train()
    results = []
    for model.activation_checkpointing in LEAST_FIRST:
        torch.manual_seed(7)
        results.append(gradients(model, model(IDS, documents=documents()).square().mean()))
    for name, gradient in results[0].items():
        assert all(torch.equal(gradient, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_runs_in_float64_and_under_bf16_autocast(kind: str):
    model = lively(**KINDS[kind]).eval()
    single = model(IDS, documents=documents())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(IDS, documents=documents())
    assert mixed.dtype == torch.bfloat16
    assert (mixed - single).norm() < 0.05 * single.norm()
    double = model.double()(IDS, documents=documents())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-3, atol=1e-4)


def test_rotation_keeps_far_positions_apart_in_bf16():
    # Angles of two neighbours at 40,000 would be equal, were they computed in bf16.
    model = lively(qk_norm=False).bfloat16().eval()
    far = torch.arange(40_000, 40_000 + IDS.shape[1])[None]
    near, moved = model(IDS).float(), model(IDS, far).float()
    assert (near - moved).norm() < 0.1 * near.norm()  # attention depends on distances only


def test_all_blocks_and_steps_share_one_graph_without_breaks():
    torch._dynamo.reset()
    counters.clear()
    model = lively(n_layer=3, dropout=0.1).train()
    model.compile_blocks(backend="eager")
    for _ in range(3):
        model(IDS, documents=documents()).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]


@pytest.mark.slow
def test_compiled_blocks_compute_the_same():
    model = lively()
    plain = model(IDS, documents=documents())
    model.compile_blocks()
    torch.testing.assert_close(model(IDS, documents=documents()), plain, rtol=1e-4, atol=1e-4)


def test_logits_are_the_head_applied_to_the_hidden_states():
    model = lively(weight_tying=False)
    assert torch.equal(model(IDS), F.linear(model.hidden_states(IDS), model.head_weight))


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_of_some_places_are_those_of_all_places_there(kind: str):
    model = lively(**KINDS[kind])
    places = torch.tensor([1, 2, 40, 45, 90, 1])  # one of them twice, as where a GPU's batches are filled up
    upstream = torch.randn(len(places), model.config.n_embd, generator=torch.Generator().manual_seed(2))
    chosen = model.hidden_states(IDS, documents=documents(), places=places)
    everywhere = model.hidden_states(IDS, documents=documents()).flatten(0, 1)[places]
    torch.testing.assert_close(chosen, everywhere)
    expected = gradients_of(model, (everywhere * upstream).sum())
    for name, gradient in gradients_of(model, (chosen * upstream).sum()).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def gradients_of(model: ConfigurableGPT, value: Tensor) -> dict[str, Tensor]:
    """Those of the parameters that it depends on: an untied head has none."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {name: each for name, each in zip(parameters, found, strict=True) if each is not None}


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_compiled_blocks_stay_whole_although_ddp_fills_several_buckets_with_one():
    torch._dynamo.reset()
    model = lively(n_embd=256, d_ff=1024).train()  # 2 MiB for each matrix of the feed-forward part
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph

    model.compile_blocks(backend=backend)
    DistributedDataParallel(model, bucket_cap_mb=1)(IDS, None, documents()).sum().backward()
    assert len(compiled) == 1
