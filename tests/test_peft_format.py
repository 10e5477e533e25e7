"""Adapters that PEFT has saved, read here, and ours, read by PEFT; what cannot be expressed on either side."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_builder import ConfigurableGPT, load_pretrained
from sft import hub
from sft.adapting import ADAPTERS_OF, make_trainable, merge_adapters
from sft.errors import UserError
from sft.saved_adapters import write_peft

IDS = torch.randint(120, (3, 20), generator=torch.Generator().manual_seed(1))
QWEN = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def in_transformers(folder: Path, **changes: object):
    """A small random model of Transformers, saved in a folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if changes.pop("family", None) == "gpt2":
        sizes = {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        config = transformers.GPT2Config(**sizes, **ends, initializer_range=0.2)
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**QWEN, **changes}))
    model.save_pretrained(folder)
    return model.eval()


def with_their_adapters(model, folder: Path, **options: object) -> Tensor:
    """The logits of a model with PEFT's adapters, which have learned something and are saved in a folder."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **options})
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    adapted.eval().save_pretrained(folder)
    change(folder, base_model_name_or_path="../base")
    return adapted(IDS).logits.detach()


def change(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def read_by_peft(base, folder: Path) -> Tensor:
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(base, folder).eval()(IDS).logits.detach()


KINDS = {
    "grouped": ({"num_key_value_heads": 2, "tie_word_embeddings": True}, {"target_modules": ["q_proj", "v_proj"]}),
    "fused, rsLoRA": (
        {"num_key_value_heads": 4, "tie_word_embeddings": False},
        {"target_modules": "all-linear", "use_rslora": True, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "DoRA, some layers": (
        {"num_key_value_heads": 2, "tie_word_embeddings": False},
        {"target_modules": ["k_proj", "down_proj"], "use_dora": True, "layers_to_transform": [1]},
    ),
    "tied embeddings": (
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "gpt2": ({"family": "gpt2"}, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize(("shape", "options"), KINDS.values(), ids=KINDS)
def test_adapters_of_peft_give_its_logits_here_and_go_back_to_it(tmp_path, shape: dict, options: dict):
    base = in_transformers(tmp_path / "base", **shape)
    plain = base(IDS).logits.detach()
    expected = with_their_adapters(base, tmp_path / "theirs", **options)
    assert (expected - plain).abs().max() > 0.1
    ours = load_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(ours(IDS), expected, rtol=0, atol=1e-5)
    write_peft(tmp_path / "ours", ours, base=str(tmp_path / "base"))
    again = read_by_peft(in_transformers(tmp_path / "base", **shape), tmp_path / "ours")
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)
    merge_adapters(ours)
    torch.testing.assert_close(ours(IDS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_our_adapters_give_our_logits_in_peft(tmp_path, tied: bool, dora: bool):
    shape = {"num_key_value_heads": 4, "tie_word_embeddings": tied}
    in_transformers(tmp_path / "base", **shape)
    ours = load_pretrained(tmp_path / "base")
    values = {"lora_rank": 3, "lora_alpha": 5.0, "lora_dropout": 0.1, "lora_targets": ("0.*.v_proj", "gate_proj")}
    values |= {"lora_scaling": "rank_stabilized", "lora_dora": dora, "train_embeddings": True, "freeze": (), "seed": 1}
    make_trainable(ours, SimpleNamespace(**values), base=None, half=False, grew=False, say=pytest.fail)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    write_peft(tmp_path / "ours", ours, base=str(tmp_path / "base"))
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    modules = ["model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.gate_proj"]
    assert (config["target_modules"], config["use_rslora"], config["lora_dropout"]) == (modules, True, 0.1)
    base = in_transformers(tmp_path / "base", **shape)
    torch.testing.assert_close(read_by_peft(base, tmp_path / "ours"), ours(IDS).detach(), rtol=0, atol=1e-5)
    again = load_pretrained(tmp_path / "ours")
    for name, parameter in ours.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
        assert again.get_parameter(name).requires_grad == parameter.requires_grad


@pytest.fixture
def theirs(tmp_path) -> Path:
    """A folder of PEFT's with adapters for the base beside it."""
    base = in_transformers(tmp_path / "base", num_key_value_heads=2, tie_word_embeddings=True)
    with_their_adapters(base, tmp_path / "theirs", target_modules=["q_proj", "down_proj"])
    return tmp_path / "theirs"


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_pretrained(folder)
    assert str(caught.value).startswith(str(folder))
    return str(caught.value)


def test_options_that_cannot_be_expressed_are_refused_all_at_once(theirs):
    change(
        theirs,
        bias="all",
        modules_to_save=["score"],
        rank_pattern={"q_proj": 8},
        alpha_pattern={"q_proj": 8},
        r="4",
        target_parameters=["experts.gate_up_proj"],
        layer_replication=[[0, 2]],
        something_new=3,
        init_lora_weights="pissa",
    )
    said = refusal(theirs)
    for name in ("bias 'all'", "modules_to_save holds 'score'", "rank_pattern", "alpha_pattern", "r must be a number"):
        assert name in said
    assert "init_lora_weights 'pissa' has changed the base" in said
    for name in ("target_parameters", "layer_replication", "something_new 3 is not supported"):
        assert name in said
    change(theirs, peft_type="IA3")
    assert "peft_type is 'IA3'; only 'LORA' is known" in refusal(theirs)
    (theirs / "adapter_config.json").write_text("[3]")
    assert "holds a list, not an object" in refusal(theirs)
    (theirs / "adapter_config.json").write_text("{")
    assert "cannot be read as JSON" in refusal(theirs)


def rewrite(folder: Path, act) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    act(tensors)
    save_file(tensors, path)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def test_tensors_that_do_not_fit_are_refused_by_name(theirs):
    whole = load_file(theirs / "adapter_model.safetensors")

    def said(**changes: Tensor | None) -> str:
        tensors = {**whole, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
        kept = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, theirs / "adapter_model.safetensors")
        return refusal(theirs)

    assert f"missing: B of {Q0.removeprefix('base_model.model.')}" in said(**{f"{Q0}.lora_B.weight": None})
    wrong = said(**{f"{Q0}.lora_A.weight": torch.zeros(5, 32)})
    assert "wrong shape: blocks.0.attn.c_q.adapters.q_proj.A is (5, 32), must be (4, 32)" in wrong
    odd = said(**{f"{Q0}.lora_embedding_A": torch.zeros(4, 32)})
    assert "is neither of a linear layer's adapter nor of embeddings or head" in odd
    integers = said(**{f"{Q0}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)})
    assert "wrong type: blocks.0.attn.c_q.adapters.q_proj.A is I8" in integers
    beyond = {f"{Q0.replace('.0.', '.7.')}.lora_{half}.weight": whole[f"{Q0}.lora_{half}.weight"] for half in "AB"}
    assert "adapters of another base, which has these linear layers:\n  model.layers.7.self" in said(**beyond)
    save_file({n: t for n, t in whole.items() if "down_proj" not in n}, theirs / "adapter_model.safetensors")
    assert "missing: adapters of 'down_proj', a target module" in refusal(theirs)
    (theirs / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "damaged or cut short" in refusal(theirs)
    (theirs / "adapter_model.safetensors").unlink()
    assert "holds adapter_config.json but no adapter_model.safetensors" in refusal(theirs)


def test_a_base_that_is_not_on_this_machine_is_asked_for(theirs, tmp_path):
    change(theirs, base_model_name_or_path="Qwen/Qwen3-0.6B")
    remedy = f"put the base back, or a link to it under the name {theirs / 'base'}"
    assert refusal(theirs) == f"{theirs}: its adapters belong to the base Qwen/Qwen3-0.6B, which is not there; {remedy}"
    change(theirs, base_model_name_or_path=None)
    assert "does not tell which base its adapters belong to" in refusal(theirs)
    (theirs / "base").symlink_to(tmp_path / "base")
    change(theirs, base_model_name_or_path="Qwen/Qwen3-0.6B")
    assert load_pretrained(theirs).adapted is not None
    change(theirs, base_model_name_or_path=str(theirs))
    (theirs / "base").unlink()
    assert "its base has a base, and so on" in refusal(theirs)


def test_a_base_in_the_cache_of_the_hub_is_found_by_its_name(theirs, tmp_path, monkeypatch):
    expected = load_pretrained(theirs)(IDS)
    change(theirs, base_model_name_or_path="Qwen/Qwen3-0.6B")

    def fetch(name: str, *, only_cached: bool, **_: object) -> Path:
        assert (name, only_cached) == ("Qwen/Qwen3-0.6B", True)  # a load never waits for the network
        return tmp_path / "base"

    monkeypatch.setattr(hub, "fetch", fetch)
    assert torch.equal(load_pretrained(theirs)(IDS), expected)


def test_adapters_for_another_base_are_refused(theirs, tmp_path):
    in_transformers(tmp_path / "other", num_key_value_heads=2, hidden_size=48)
    change(theirs, base_model_name_or_path="../other")
    assert "wrong shape: blocks.0.attn.c_q.adapters.q_proj.A is (4, 32), must be (4, 48)" in refusal(theirs)


@pytest.mark.parametrize("whole", ["embed_tokens", "lm_head"])
def test_a_tied_head_that_peft_has_untied_is_refused(tmp_path, whole: str):
    base = in_transformers(tmp_path / "base", num_key_value_heads=2, tie_word_embeddings=True)
    with_their_adapters(base, tmp_path / "theirs", target_modules=["q_proj"], modules_to_save=[whole])
    assert "its base has a tied head, of which it makes another than the embedding" in refusal(tmp_path / "theirs")


def test_what_peft_cannot_express_is_not_written(tmp_path):
    in_transformers(tmp_path / "base", num_key_value_heads=2)
    ours = load_pretrained(tmp_path / "base")
    values = {"lora_rank": 3, "lora_alpha": 5.0, "lora_dropout": 0.0, "lora_targets": ("*",), "lora_dora": False}
    values |= {"lora_scaling": "standard", "train_embeddings": False, "freeze": (), "seed": 1}
    make_trainable(ours, SimpleNamespace(**values), base=None, half=False, grew=False, say=pytest.fail)
    ours.final_norm.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"PEFT cannot express what was trained beside adapters:\n  final_norm.weight"):
        write_peft(tmp_path / "ours", ours, base="base")
    assert not (tmp_path / "ours").exists()


def test_a_loaded_adapter_is_all_that_is_trained(theirs):
    model: ConfigurableGPT = load_pretrained(theirs)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(ADAPTERS_OF in name for name in trained)
