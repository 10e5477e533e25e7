from pathlib import Path

import pytest
import torch

from model_builder import load_pretrained
from sft import saved_adapters
from sft.adapting import Base, adapt, chosen_places, kept_state
from sft.checkpoint import save_checkpoint
from sft.export_adapters import refuse_other_adapters
from sft.lora import LoRA
from sft.pretrained import open_pretrained
from tests.test_export import IDS, export, make_run, random_model, refused
from tests.test_export_config import GPT2

TARGETS = ["q_proj", "v_proj", "o_proj", "w_gate"]
BASES = {
    "half": {},
    "interleaved": {"rope_layout": "interleaved"},
    "interleaved, one matrix": {"rope_layout": "interleaved", "num_key_value_heads": 4, "qk_norm": False},
    "GPT-2": {**GPT2, "bias": True},
}
SLOW = ("half", "interleaved, one matrix", "GPT-2")


def make_adapters(folder: Path, base: Path, targets: list[str], *, dora: bool = False) -> Path:
    """A checkpoint of adapters, all of whose tensors matter, in a run's folder of their own."""
    checkpoint = make_run(folder)
    model = load_pretrained(base)
    places = tuple(place.name for place in chosen_places(model, targets))
    of = Base(str(base), saved_adapters.sha256_of(open_pretrained(base)))
    adapt(model, LoRA(rank=3, alpha=6.0, dora=dora, targets=places), base=of, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".adapters." in name)
        if name.endswith((".B", ".magnitude")):
            parameter.data += torch.randn(parameter.shape, generator=generator) / 10
    content = torch.load(checkpoint, weights_only=True)
    content |= {"model": kept_state(model), "model_args": model.config.to_dict()}
    content |= saved_adapters.constants(model, folder)
    return save_checkpoint(folder, content, iter_num=7, best=False, keep=None)


@pytest.mark.parametrize("name", ["interleaved", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_adapters_are_the_same_model_in_peft_and_merged(tmp_path: Path, monkeypatch, capsys, name: str):
    pytest.importorskip("peft")
    monkeypatch.setattr("sft.export_proof.MOST_NEW_TOKENS", 6)
    base = make_run(tmp_path / "base", random_model(vocab_size=315, **BASES[name]))
    targets = ["c_attn", "fc2"] if name == "GPT-2" else TARGETS
    adapters = make_adapters(tmp_path / "run", base, targets, dora=name == "interleaved")
    export(base, tmp_path / "base_out", "--dtype=fp32")
    capsys.readouterr()
    export(adapters, tmp_path / "apart", "--lora=apart", f"--base={tmp_path / 'base_out'}", "--verify")
    assert capsys.readouterr().out.count("verified") == 3
    export(adapters, tmp_path / "merged", "--dtype=fp32", "--verify")
    told = capsys.readouterr().out
    assert told.count("verified") == 3
    assert "adapters are merged with their base" in told
    expected = load_pretrained(adapters)(IDS)
    assert (load_pretrained(base)(IDS) - expected).abs().max() > 0.1
    for folder in ("apart", "merged"):
        assert (load_pretrained(tmp_path / folder)(IDS) - expected).abs().max() <= 5e-5
    assert not (tmp_path / "apart" / "config.json").exists()
    assert "Adapters in PEFT's format" in (tmp_path / "apart" / "README.md").read_text()


def test_adapters_are_merged_in_fp32_and_rounded_once(tmp_path: Path):
    base = make_run(tmp_path / "base", random_model(vocab_size=315))
    adapters = make_adapters(tmp_path / "run", base, TARGETS)
    export(adapters, tmp_path / "fp32", "--dtype=fp32")
    export(adapters, tmp_path / "bf16")
    wide, rounded = (load_pretrained(tmp_path / name).state_dict() for name in ("fp32", "bf16"))
    for name, tensor in wide.items():
        assert torch.equal(tensor.bfloat16().float(), rounded[name]), name


def test_adapters_without_a_base_for_peft_are_refused(tmp_path: Path):
    base = make_run(tmp_path / "base", random_model(vocab_size=315))
    adapters = make_adapters(tmp_path / "run", base, TARGETS)
    message = refused(adapters, tmp_path / "out", "--lora=apart")
    assert f"the base is {base}, which is no Hugging Face folder; export it first, and name that folder" in message
    assert "the checkpoint holds no adapters" in refused(base, tmp_path / "out", "--lora=apart")
    assert "base is told to PEFT: it needs lora=apart" in refused(adapters, tmp_path / "out", "--base=x")
    assert not [*tmp_path.glob("out*")]
    export(base, tmp_path / "exported")
    trained = make_adapters(tmp_path / "again", tmp_path / "exported", TARGETS)
    export(trained, tmp_path / "out", "--lora=apart")
    assert str(tmp_path / "exported") in (tmp_path / "out" / "adapter_config.json").read_text()


def test_adapters_with_more_ids_than_their_base_are_merged_only(tmp_path: Path):
    base = make_run(tmp_path / "base", random_model(vocab_size=315))
    adapters = make_adapters(tmp_path / "run", base, TARGETS)
    content = torch.load(adapters, weights_only=True)
    content["model_args"]["vocab_size"] = 320
    save_checkpoint(tmp_path / "run", content, iter_num=7, best=False, keep=None)
    message = refused(adapters, tmp_path / "out", "--lora=apart", "--base=somewhere")
    assert "training grew the vocabulary from 315 to 320 ids, which PEFT cannot do; use --lora=merged" in message
    export(adapters, tmp_path / "out")
    assert load_pretrained(tmp_path / "out").vocab_size == 320


def test_a_flipped_bit_in_written_adapters_is_found(tmp_path: Path):
    base = make_run(tmp_path / "base", random_model(vocab_size=315))
    adapters = make_adapters(tmp_path / "run", base, TARGETS)
    export(adapters, tmp_path / "out", "--lora=apart", "--base=Qwen/Qwen3")
    model = load_pretrained(adapters)
    refuse_other_adapters(tmp_path / "out", model, kept_state(model))
    file = tmp_path / "out" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Exception, match=r"does not hold what was exported:\n  \S+$"):
        refuse_other_adapters(tmp_path / "out", model, kept_state(model))
