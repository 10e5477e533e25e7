"""Each family as Transformers builds it: logits, gradients, packed rows, windows and caches."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_builder import ConfigurableGPT, load_pretrained
from sft.attention import Documents
from sft.errors import UserError
from sft.families import architecture_fields
from sft.huggingface import name_table, read_config, to_hugging_face

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    **{"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3},
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
GPT2 = {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("Llama", {**SIZES, "num_key_value_heads": 4}),
    "llama 3.x": ("Llama", {**SIZES, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
    "llama with all biases": ("Llama", {**SIZES, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama, linear": ("Llama", {**SIZES, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "smollm": ("Llama", {**SIZES, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 7}),
    "mistral without a window": ("Mistral", {**SIZES, "sliding_window": None}),
    "qwen 2": ("Qwen2", {**SIZES, "tie_word_embeddings": True}),
    "qwen 2, windows": ("Qwen2", {**SIZES, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen 3, biases and yarn": (
        "Qwen3",
        {
            **SIZES,
            "head_dim": 16,
            "attention_bias": True,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
        },
    ),
    "qwen 3, yarn untruncated": (
        "Qwen3",
        {**SIZES, "head_dim": 16, "rope_parameters": {**YARN, "truncate": False, "beta_fast": 8.0}},
    ),
    "qwen 3 moe": ("Qwen3Moe", {**SIZES, **EXPERTS}),
    "qwen 3 moe, some dense": (
        "Qwen3Moe",
        {
            **SIZES,
            **EXPERTS,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "gpt-2": ("GPT2", GPT2),
    "gpt-2, untied": ("GPT2", {**GPT2, "tie_word_embeddings": False, "activation_function": "relu", "n_inner": 40}),
}


@pytest.fixture(scope="module", params=MODELS)
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small random model in Transformers, with nothing left at 0 or 1, and the folder that it was saved in."""
    kind, choices = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**choices, attn_implementation="eager")
    model = getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.3)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model.eval(), folder


def of_theirs(ours: ConfigurableGPT, tensors: dict[str, Any]) -> dict[str, Any]:
    return to_hugging_face(tensors, name_table(ours.config.to_dict()))


def test_logits_and_gradients_are_those_of_transformers(live):
    theirs, folder = live
    ours = load_pretrained(folder)
    ids = torch.randint(120, (3, 40), generator=torch.Generator().manual_seed(1))
    expected, logits = theirs(ids).logits, ours(ids)
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() <= 1e-4
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    theirs.zero_grad()
    (expected * upstream).sum().backward()
    (logits * upstream).sum().backward()
    gradients = of_theirs(ours, {name: parameter.grad for name, parameter in ours.named_parameters()})
    wanted = split_experts({name: parameter.grad for name, parameter in theirs.named_parameters()})
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def split_experts(tensors: dict[str, Any]) -> dict[str, Any]:
    """As they are saved: Transformers 5 keeps all experts of a layer in two tensors."""
    split = {}
    for name, tensor in tensors.items():
        place, _, kind = name.rpartition(".experts.")
        if not place:
            split[name] = tensor
        for j in range(len(tensor) if place else 0):
            parts = tensor[j].chunk(2) if kind == "gate_up_proj" else [tensor[j]]
            for part, letter in zip(parts, ("gate", "up") if kind == "gate_up_proj" else ("down",), strict=True):
                split[f"{place}.experts.{j}.{letter}_proj.weight"] = part
    return split


def test_a_document_in_a_packed_row_has_the_logits_that_transformers_gives_it_alone(live):
    theirs, folder = live
    ours = load_pretrained(folder)
    ids = torch.randint(120, (1, 50), generator=torch.Generator().manual_seed(3))
    lengths = [3, 28, 19]
    documents = Documents(torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(lengths))[None])
    packed = ours(ids, documents=documents)[0].split(lengths)
    for document, logits in zip(ids[0].split(lengths), packed, strict=True):
        assert (logits - theirs(document[None]).logits[0]).abs().max() <= 1e-4


def test_tokens_that_come_one_by_one_have_the_same_logits(live):
    _, folder = live
    ours = load_pretrained(folder)
    ids = torch.randint(120, (2, 24), generator=torch.Generator().manual_seed(4))
    cache = ours.new_cache()
    with torch.no_grad():
        parts = [ours.hidden_states(part, cache=cache) for part in (ids[:, :13], *ids[:, 13:].split(1, dim=1))]
        assert (torch.cat(parts, dim=1) - ours.hidden_states(ids)).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_saved_in_16_bits_comes_as_it_is(live, tmp_path: Path, dtype: torch.dtype):
    copy.deepcopy(live[0]).to(dtype).save_pretrained(tmp_path)
    ours, saved = load_pretrained(tmp_path), load_file(tmp_path / "model.safetensors")
    weights = of_theirs(ours, dict(ours.named_parameters()))
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], tensor.float()) for name, tensor in saved.items())


def of_kind(name: str, folder: Path) -> Any:
    kind, choices = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**choices))
    model.save_pretrained(folder)
    return model.eval()


IDS = torch.arange(30)[None]


def test_a_head_that_differs_from_the_embedding_is_the_head_though_the_config_ties_them(tmp_path: Path, capsys):
    of_kind("smollm", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.randn(120, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    ours = load_pretrained(tmp_path)
    assert not ours.config.weight_tying
    assert "the file wins, as in Transformers 5, and the head is not tied" in capsys.readouterr().err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (ours(IDS) - theirs(IDS).logits).abs().max() <= 1e-4


def test_experts_that_are_stored_as_one_tensor_are_cut(tmp_path: Path):
    theirs = of_kind("qwen 3 moe", tmp_path)
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any("gate_up_proj" in name for name in load_file(tmp_path / "fused" / "model.safetensors"))
    fused, split = (load_pretrained(folder).state_dict() for folder in (tmp_path / "fused", tmp_path))
    assert all(torch.equal(fused[name], split[name]) for name in split)


def test_a_bare_model_with_a_tied_head_is_read(tmp_path: Path):
    theirs = of_kind("smollm", tmp_path / "whole")
    theirs.model.save_pretrained(tmp_path / "bare")
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "bare" / "model.safetensors"))
    assert torch.equal(load_pretrained(tmp_path / "bare")(IDS), load_pretrained(tmp_path / "whole")(IDS))


def gpt2_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).save_pretrained(tmp_path)
    return tmp_path


def test_gpt2_is_read_as_it_was_published_without_a_prefix_and_with_its_masks(tmp_path: Path):
    folder = gpt2_folder(tmp_path)
    expected = load_pretrained(folder).state_dict()
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}
    save_file({**tensors, **masks, "h.0.attn.masked_bias": torch.tensor(-1e4)}, folder / "model.safetensors")
    found = load_pretrained(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not supported"),
        ({"activation_function": "mish"}, "activation_function 'mish' is not supported"),
        ({"quantization_config": {"bits": 4}}, "its weights are quantized"),
        ({"n_head": 0}, "n_head must be a whole number above 0, not 0"),
    ],
)
def test_what_gpt2_cannot_be_here_is_refused(tmp_path: Path, changes: dict[str, Any], said: str):
    folder = gpt2_folder(tmp_path)
    (folder / "config.json").write_text(json.dumps({**read_config(folder), **changes}))
    with pytest.raises(UserError, match=said):
        load_pretrained(folder)


QWEN2 = {**SIZES, "model_type": "qwen2", "hidden_act": "silu"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gemma3"}, "model_type is 'gemma3'; known are qwen3"),
        ({"model_type": None}, "model_type is None"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope'; known are linear, llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling linear lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1.0}}, "factor must be a number above 0, not -1.0"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, "low_freq_factor must be below its high_freq_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": "no"}}, "truncate must be true or false"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters say different things",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be a whole number above 0"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types .* are not supported, only 'full_attention'"),
        ({"vocab_size": True}, "vocab_size must be a whole number above 0, not True"),
        ({"model_type": "qwen3_moe", **EXPERTS, "num_experts": None}, "num_experts must be a whole number above 0"),
        ({"model_type": "qwen3_moe", **EXPERTS, "num_local_experts": 8}, "num_experts is 6, num_local_experts 8"),
        ({"model_type": "qwen3_moe", **EXPERTS, "mlp_only_layers": "1"}, "mlp_only_layers must be numbers of blocks"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused_by_name(changes: dict[str, Any], said: str):
    assert architecture_fields(QWEN2)["qkv_bias"]
    with pytest.raises(UserError, match=said):
        architecture_fields({**QWEN2, **changes})


def test_both_ways_to_say_yarn_are_one(tmp_path: Path):
    old = {**QWEN2, "rope_theta": 1e4, "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 16}}
    new = {**QWEN2, "rope_parameters": YARN}
    fields = architecture_fields(old)
    assert fields == architecture_fields(new)
    assert fields["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def test_windows_begin_where_the_published_config_says():
    qwen2 = {**QWEN2, "use_sliding_window": True, "sliding_window": 5}
    assert architecture_fields({**qwen2, "max_window_layers": 1})["sliding_layers"] == (1, 2)
    assert architecture_fields(qwen2)["sliding_window"] is None  # the 29th layer would be the first
    assert architecture_fields({**qwen2, "model_type": "mistral"})["sliding_layers"] is None
    assert architecture_fields({**QWEN2, "model_type": "mistral"})["sliding_window"] == 4096


def test_a_balance_is_weighted_only_where_the_router_is_asked_for_its_logits():
    moe = {**QWEN2, **EXPERTS, "model_type": "qwen3_moe", "router_aux_loss_coef": 0.02}
    assert architecture_fields(moe)["router_aux_loss_coef"] == 0
    assert architecture_fields({**moe, "output_router_logits": True})["router_aux_loss_coef"] == 0.02
    assert architecture_fields({**moe, "decoder_sparse_step": 2})["dense_layers"] == (0, 2)


def test_a_window_is_not_computed_where_no_document_is_longer():
    documents = Documents.of_lengths([[5, 7]], block_size=16, place=torch.from_numpy)
    assert documents.within(7) is documents
    assert documents.within(16) is documents
    assert documents.within(6).window == 6
    assert documents.within(6).mask[0, 0, 11].tolist() == [slot in range(6, 12) for slot in range(16)]
