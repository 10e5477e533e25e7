import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from model_builder import ConfigurableGPT, load_pretrained
from model_config import ModelArchitectureConfig
from sft.checkpoint import save_checkpoint
from sft.errors import UserError
from sft.huggingface import name_table, to_hugging_face
from tests.conftest import ROOT
from tests.tiny import tiny_model

IDS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))


def save(path: Path, model: ConfigurableGPT, /, **changes: object) -> Path:
    """A checkpoint with what loading needs, and an optimizer's state, which it does not."""
    content = {
        "model": model.state_dict(),
        "model_args": model.config.to_dict(),
        "optimizer": {"state": {0: torch.zeros(3)}, "param_groups": []},
        "iter_num": 7,
    }
    torch.save({**content, **changes}, path)
    return path


def refusal(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_pretrained(path)
    assert str(path) in str(caught.value)
    return str(caught.value).splitlines()


POST_NORM = {"norm_position": "post", "normalization": "layernorm_nobias", "position_encoding": "learned_absolute"}


@pytest.mark.parametrize("changes", [{}, {"weight_tying": False}, {"position_encoding": "learned_absolute"}, POST_NORM])
def test_our_own_checkpoint_comes_back_bit_for_bit(tmp_path: Path, changes: dict):
    model = tiny_model(**changes)
    again = load_pretrained(save(tmp_path / "ckpt.pt", model))
    assert again.config == model.config
    assert not again.training
    assert torch.equal(again(IDS), model.eval()(IDS))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert (again.head_weight is again.token_embeddings.weight) == model.config.weight_tying
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(load_pretrained(tmp_path)(IDS), again(IDS))  # a run's folder means its newest


def test_weights_are_copied_not_mapped_and_have_the_dtype_asked_for(tmp_path: Path):
    path = save(tmp_path / "ckpt.pt", tiny_model())
    model = load_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        model.token_embeddings.weight.zero_()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert load_pretrained(path).token_embeddings.weight.abs().sum() > 0


def test_parameters_are_tensors_too(tmp_path: Path):
    model = tiny_model()
    path = save(tmp_path / "ckpt.pt", model, model=dict(model.named_parameters()))
    assert torch.equal(load_pretrained(path)(IDS), model(IDS))


def test_a_tied_checkpoint_may_leave_its_head_out(tmp_path: Path):
    model = tiny_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert torch.equal(load_pretrained(save(tmp_path / "a.pt", model, model=state))(IDS), model(IDS))


def test_a_tied_head_that_differs_is_not_used_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny_model()
    state = {**model.state_dict(), "lm_head.weight": torch.zeros(97, 32)}
    loaded = load_pretrained(save(tmp_path / "a.pt", model, model=state))
    assert torch.equal(loaded(IDS), model(IDS))
    assert "lm_head.weight, which differs from the embedding, is not used" in capsys.readouterr().err


def test_the_neighbours_prefixes_buffers_and_fields_are_understood(tmp_path: Path):
    model = tiny_model(rope_layout="interleaved", num_key_value_heads=4, bias=True)
    state = {f"_orig_mod.module.{name}": tensor for name, tensor in model.state_dict().items()}
    state["_orig_mod.module.blocks.0.attn.rope.cos_cached"] = torch.zeros(64, 4)
    state["_orig_mod.module.blocks.1.attn.bias"] = torch.ones(1, 1, 64, 64)
    fields = {**model.config.to_dict(), "attention_backend": "flash_attn_2", "ffn_expansion_ratio": None}
    del fields["rope_layout"]
    loaded = load_pretrained(save(tmp_path / "ckpt.pt", model, model=state, model_args=fields))
    assert loaded.config == model.config
    assert torch.equal(loaded(IDS), model(IDS))


def test_a_refusal_lists_every_tensor_that_does_not_fit(tmp_path: Path):
    model = tiny_model()
    state = model.state_dict()
    del state["blocks.0.attn.c_q.weight"], state["final_norm.weight"]
    state["blocks.1.ffn.w_out.weight"] = torch.zeros(32, 63)
    state["blocks.2.norm1.weight"] = torch.zeros(32)
    state["blocks.1.norm1.weight"] = torch.zeros(32, dtype=torch.int64)
    state["blocks.1.norm2.weight"] = torch.zeros(32, device="meta")
    state["blocks.1.attn.c_proj.weight"] = torch.zeros(32, 32).to_sparse()
    assert refusal(save(tmp_path / "ckpt.pt", model, model=state))[1:] == [
        "  missing: blocks.0.attn.c_q.weight (32, 32)",
        "  missing: final_norm.weight (32,)",
        "  wrong type: blocks.1.norm1.weight is torch.int64, must hold floats of 16, 32 or 64 bits",
        "  wrong type: blocks.1.attn.c_proj.weight is torch.sparse_coo on cpu, must hold floats of 16, 32 or 64 bits",
        "  wrong type: blocks.1.norm2.weight is torch.strided on meta, must hold floats of 16, 32 or 64 bits",
        "  wrong shape: blocks.1.ffn.w_out.weight is (32, 63), must be (32, 64)",
        "  unexpected: blocks.2.norm1.weight (32,)",
    ]


def test_files_that_are_no_model_are_refused(tmp_path: Path):
    model = tiny_model()
    assert "lacks 'model' or 'model_args'" in refusal(save(tmp_path / "a.pt", model, model_args=None))[0]
    assert (
        "final_norm.weight is of type int, not a plain tensor"
        in refusal(save(tmp_path / "b.pt", model, model={"final_norm.weight": 3}))[0]
    )
    twice = {**model.state_dict(), "module.final_norm.weight": torch.zeros(32)}
    assert "holds final_norm.weight twice" in refusal(save(tmp_path / "c.pt", model, model=twice))[0]
    fields = {**model.config.to_dict(), "n_layer": 0, "colour": "red"}
    said = refusal(save(tmp_path / "d.pt", model, model_args=fields))
    assert said[1:] == ["  unknown field 'colour'", "  n_layer must be above 0, not 0"]
    fields = {**model.config.to_dict(), "n_embd": 10**12}
    said = refusal(save(tmp_path / "e.pt", model, model_args=fields))
    assert "it has more than 1,000,000,000,000 parameters" in said[0]
    (tmp_path / "empty").mkdir()
    assert "holds neither" in refusal(tmp_path / "empty")[0]
    refusal(tmp_path / "absent.pt")


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["gpt2_style", "gqa_swiglu_rope"])
def test_the_neighbours_own_files_give_its_logits_and_loss(shared: Path, name: str):
    folder = shared / "oracles" / "seed_checkpoints"
    expected: dict[str, Tensor] = torch.load(folder / f"{name}.expected.pt", weights_only=True)
    logits = load_pretrained(folder / f"{name}.pt")(expected["input_ids"])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), expected["labels"][:, 1:].flatten())
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-6, atol=0)


PEAK = """
import re, sys, torch
from pathlib import Path
import train_sft
from model_builder import load_pretrained

def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = kilobytes("VmRSS")
model = load_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
size = sum(parameter.nbytes for parameter in model.parameters()) / 1024
print((kilobytes("VmHWM") - before) / size)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("pt", "float32"), ("folder", "float32"), ("folder", "bfloat16")])
def test_loading_takes_the_memory_of_the_model_and_a_tenth(tmp_path, kind, dtype):
    """As the kernel counts it, mapped pages of the file included."""
    shape = {"n_layer": 16, "n_head": 8, "n_embd": 768, "vocab_size": 4000, "block_size": 64, "head_dim": 96}
    model = ConfigurableGPT(ModelArchitectureConfig(**shape, d_ff=2048, qk_norm=True)).bfloat16()  # 120 million
    if kind == "pt":
        content = {"model": model.float().state_dict(), "model_args": model.config.to_dict()}
        path = save_checkpoint(tmp_path, content, iter_num=0, best=False, keep=None)
    else:
        path = tmp_path
        weights = to_hugging_face(dict(model.named_parameters()), name_table(model.config.to_dict()))
        save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
        sizes = {"num_hidden_layers": 16, "num_attention_heads": 8, "hidden_size": 768, "intermediate_size": 2048}
        others = {"vocab_size": 4000, "max_position_embeddings": 64, "head_dim": 96, "num_key_value_heads": 8}
        (path / "config.json").write_text(json.dumps({"model_type": "qwen3", **sizes, **others}))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, path, dtype], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 0.9 < float(done.stdout) <= 1.1
