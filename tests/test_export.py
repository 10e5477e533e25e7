import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model_builder import ConfigurableGPT, load_pretrained
from sft import export_config, export_tokenizer
from sft.checkpoint import save_checkpoint
from sft.errors import UserError
from sft.export_proof import refuse_other_bits
from sft.export_weights import half_layout
from sft.templates import JINJA_NAME, jinja_file
from sft.tokenizer import load_tokenizer
from tests.test_export_config import EXPERTS, GPT2
from tests.tiny import tiny_config, tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer
from tools import export_hf

IDS = torch.arange(3, 43).reshape(2, 20)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {
    "Qwen3": {"rope_layout": "interleaved"},
    "Qwen3 untied, windows": {"weight_tying": False, "sliding_window": 9, "sliding_layers": (1,), "rope_scaling": YARN},
    "Qwen3-MoE": {**EXPERTS, "norm_topk_prob": True, "dense_layers": (0,)},
    "Qwen2": {"qk_norm": False, "qkv_bias": True, "rope_layout": "interleaved"},
    "Llama": {
        "qk_norm": False,
        "norm_eps": 1e-3,
        "rope_theta": 5e5,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32},
    },
    "Llama with biases": {"qk_norm": False, "bias": True, "num_key_value_heads": 4, "rope_layout": "interleaved"},
    "Mistral": {"qk_norm": False, "sliding_window": 9, "head_dim": 16, "weight_tying": False},
    "GPT-2": {**GPT2, "bias": True},
    "GPT-2 without biases": {**GPT2, "normalization": "layernorm_nobias", "activation": "gelu"},
}


def random_model(*, seed: int = 0, **changes: object) -> ConfigurableGPT:
    """A model whose every tensor matters: nothing is 0 or 1, and answers differ."""
    model = tiny_model(seed=seed, **{"block_size": 512, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return model


def make_run(folder: Path, model: ConfigurableGPT | None = None, *, template: str | None = "chatml", **changes) -> Path:
    """A run's folder, and in it the checkpoint that is returned."""
    folder.mkdir(exist_ok=True)
    tokenizer = load_tokenizer(save_tiny_tokenizer(folder))
    if template is not None:
        shutil.copyfile(jinja_file(template), folder / JINJA_NAME)
    model = model or random_model(**{"vocab_size": tokenizer.vocab_size, **changes})
    content = {"model": model.state_dict(), "model_args": model.config.to_dict()}
    content |= {"tokenizer_fingerprint": tokenizer.fingerprint, "iter_num": 7}
    return save_checkpoint(folder, content, iter_num=7, best=False, keep=None)


def export(*arguments: object) -> None:
    export_hf.main([str(each) for each in arguments])


def refused(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        export(*arguments)
    return str(caught.value)


def outcome(*arguments: object) -> UserError | None:
    try:
        export(*arguments)
    except UserError as error:
        return error
    return None


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs in a third of the time: models of random weights do not stop by themselves."""
    monkeypatch.setattr("sft.export_proof.MOST_NEW_TOKENS", 6)


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_the_same_model_in_transformers(tmp_path: Path, capsys, name: str):
    pytest.importorskip("transformers")
    checkpoint = make_run(tmp_path / "run", template="qwen3", **FAMILIES[name])
    export(checkpoint, tmp_path / "out", "--dtype=fp32", "--verify")
    told = capsys.readouterr().out
    assert f"family    {name.partition(' ')[0]} (" in told
    assert told.count("verified") == 3
    ours, theirs = load_pretrained(checkpoint), load_pretrained(tmp_path / "out")
    assert (ours(IDS) - theirs(IDS)).abs().max() <= 2e-5


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("template", ["chatml", None])
def test_other_templates_and_bf16_are_proven_too(tmp_path: Path, capsys, template: str | None):
    pytest.importorskip("transformers")
    checkpoint = make_run(tmp_path / "run", template=template)
    export(checkpoint, tmp_path / "out", "--verify")
    told = capsys.readouterr().out
    assert told.count("verified") == 3
    assert ("template  none" in told) == (template is None)
    assert (tmp_path / "out" / JINJA_NAME).exists() == (template is not None)
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = load_tokenizer(tmp_path / "out")
    assert stops == [tokenizer.im_end, tokenizer.pad]
    end = json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"]
    assert end == (tokenizer.pad if template is None else tokenizer.im_end)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "bias": True}, {"qk_norm": False, "head_dim": 16}])
def test_rotary_pairs_that_were_neighbours_keep_their_logits_in_the_other_layout(changes: dict):
    theirs = random_model(rope_layout="interleaved", **changes)
    fields = export_hf.all_fields(theirs.config)
    ours = ConfigurableGPT(tiny_config(block_size=512, rope_layout="half", **changes)).eval()
    ours.load_state_dict(theirs.state_dict())
    assert (ours(IDS) - theirs(IDS)).abs().max() > 0.1
    ours.load_state_dict({name: half_layout(name, each, fields) for name, each in theirs.state_dict().items()})
    assert (ours(IDS) - theirs(IDS)).abs().max() <= 2e-5


def test_weights_are_rounded_once_and_a_tied_head_is_not_written_twice(tmp_path: Path):
    checkpoint = make_run(tmp_path / "run")
    export(checkpoint, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    embedding = load_pretrained(checkpoint).token_embeddings.weight
    assert torch.equal(stored["model.embed_tokens.weight"], embedding.bfloat16())
    assert "lm_head.weight" not in stored
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    mode = os.stat(tmp_path / "out" / "config.json").st_mode
    assert os.stat(tmp_path / "out" / "model.safetensors").st_mode == mode


def test_what_evaluations_saw_is_exported_unless_other_weights_are_named(tmp_path: Path):
    averaged, trained = random_model(vocab_size=315), random_model(vocab_size=315, seed=1)
    checkpoint = make_run(tmp_path / "run", trained)
    content = torch.load(checkpoint, weights_only=True)
    content |= {"ema": averaged.state_dict(), "eval_weights": "ema"}
    save_checkpoint(tmp_path / "run", content, iter_num=7, best=False, keep=None)
    for name, model in (("ema", averaged), ("model", trained)):
        choice = [] if name == "ema" else ["--weights=model"]
        export(checkpoint, tmp_path / name, "--dtype=fp32", *choice)
        assert torch.equal(load_pretrained(tmp_path / name)(IDS), model.eval()(IDS))
        assert ("moving average" in (tmp_path / name / "README.md").read_text()) == (name == "ema")


def test_shards_are_as_large_as_asked_for_and_their_index_is_complete(tmp_path: Path):
    checkpoint = make_run(tmp_path / "run", **FAMILIES["Qwen3-MoE"])
    export(checkpoint, tmp_path / "out", "--dtype=fp32", "--shard_gb=2e-5")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {}
    for file in (tmp_path / "out").glob("model-*.safetensors"):
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
        found |= dict.fromkeys(tensors, file.name)
    assert found == index["weight_map"]
    assert len(set(found.values())) == len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert torch.equal(load_pretrained(tmp_path / "out")(IDS), load_pretrained(checkpoint)(IDS))


def test_a_flipped_bit_in_what_was_written_is_found(tmp_path: Path):
    checkpoint = make_run(tmp_path / "run")
    export(checkpoint, tmp_path / "out", "--dtype=fp32")
    model = load_pretrained(checkpoint)
    weights = dict(model.named_parameters())
    shapes = {name: tuple(each.shape) for name, each in weights.items()}
    refuse_other_bits(tmp_path / "out", weights.__getitem__, shapes)
    file = tmp_path / "out" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"does not hold what was exported:\n  \S+$"):
        refuse_other_bits(tmp_path / "out", weights.__getitem__, shapes)


def other_config(expression, **ids):
    return {**export_config.config_json(expression, **ids), "rms_norm_eps": 1e-3}


def test_a_config_that_is_read_as_another_model_is_found_and_nothing_is_written(tmp_path: Path, monkeypatch):
    checkpoint = make_run(tmp_path / "run")
    monkeypatch.setattr(export_hf, "config_json", other_config)
    assert "is read as another architecture:\n  norm_eps is 0.001, must be 1e-06" in refused(checkpoint, tmp_path / "o")
    assert not [*tmp_path.glob("o*")]


@pytest.mark.usefixtures("short_answers")
def test_what_transformers_does_otherwise_is_found_and_nothing_is_written(tmp_path: Path, monkeypatch):
    pytest.importorskip("transformers")
    checkpoint = make_run(tmp_path / "run")

    config_of = export_tokenizer.generation_config

    def one_stop(tokenizer):
        return {**config_of(tokenizer), "eos_token_id": tokenizer.pad}

    with monkeypatch.context() as patch:
        patch.setattr(export_tokenizer, "generation_config", one_stop)
        message = refused(checkpoint, tmp_path / "o", "--verify")
    assert "Transformers disagrees:\n  generation stops at 0, not at [0, 2]" in message
    with monkeypatch.context() as patch:
        patch.setattr(export_hf, "jinja_file", lambda name: jinja_file("qwen3"))
        message = refused(checkpoint, tmp_path / "o", "--verify", "--template=chatml")
    assert "apply_chat_template gives other ids for the whole of conversation" in message
    with monkeypatch.context() as patch:
        patch.setattr(
            export_tokenizer,
            "tokenizer_config",
            lambda *_, **__: {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": 3},
        )
        message = refused(checkpoint, tmp_path / "o", "--verify")
    assert "Transformers cannot load it (" in message
    with monkeypatch.context() as patch:  # an importer with the exporter's own mistake sees nothing
        patch.setattr(export_hf, "meaning", lambda fields: {})
        patch.setattr(export_hf, "config_json", other_config)
        patch.setattr("sft.export_proof.logits_apart", lambda *models, **_: (0.1, 1.0))
        message = refused(checkpoint, tmp_path / "o", "--verify")
    assert "logits differ by 1.0e-01, the largest is 1.0" in message
    assert message.endswith("nothing was written")
    assert not [*tmp_path.glob("o*")]


def test_what_is_not_finite_is_refused_by_name_and_nothing_is_written(tmp_path: Path):
    model = random_model(vocab_size=315)
    with torch.no_grad():
        model.blocks[1].norm2.weight[3] = torch.nan
    message = refused(make_run(tmp_path / "run", model), tmp_path / "out")
    assert message.startswith("blocks.1.norm2.weight holds NaN or infinity")
    assert not [*tmp_path.glob("out*")]


def test_a_folder_with_anything_in_it_is_replaced_only_on_request_and_only_if_it_is_an_export(tmp_path: Path):
    checkpoint, out = make_run(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    export(checkpoint, out)
    assert "is not empty; choose another folder, or replace an export with --overwrite" in refused(checkpoint, out)
    before = (out / "model.safetensors").read_bytes()
    export(checkpoint, out, "--overwrite", "--dtype=fp32")
    assert len((out / "model.safetensors").read_bytes()) > 1.5 * len(before)
    (out / "notes.txt").touch()
    assert "holds 'notes.txt', which no export writes" in refused(checkpoint, out, "--overwrite")
    assert "which no export writes" in refused(checkpoint, tmp_path / "run", "--overwrite")
    assert "is no folder" in refused(checkpoint, out / "notes.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_what_a_kill_has_left_is_replaced_but_nothing_else(tmp_path: Path):
    checkpoint = make_run(tmp_path / "run")
    for name in ("out.partial", "out.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-00001-of-00002.safetensors").touch()
        (tmp_path / name / "config.json.partial").touch()
    export(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "diary.txt").touch()
    assert "out.partial: holds 'diary.txt', which no export writes" in refused(
        checkpoint, tmp_path / "out", "--overwrite"
    )
    assert (tmp_path / "out.partial" / "diary.txt").exists()


@pytest.mark.parametrize("step", [pytest.param("os.fsync", marks=pytest.mark.slow), "os.replace", "shutil.copymode"])
def test_a_disk_that_refuses_leaves_the_earlier_export_as_it_was(tmp_path: Path, monkeypatch, step: str):
    checkpoint, out = make_run(tmp_path / "run"), tmp_path / "out"
    export(checkpoint, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    module, name = step.split(".")
    real, calls = getattr({"os": os, "shutil": shutil}[module], name), []
    for at in range(20):

        def failing(*arguments, at=at, **more):
            calls.append(arguments)
            if len(calls) == at + 1:
                raise OSError(28, "No space left on device", str(arguments[-1]))
            return real(*arguments, **more)

        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(step, failing)
            error = outcome(checkpoint, out, "--overwrite", "--dtype=fp32")
        if error is None:
            break
        assert "cannot be written" in str(error)
        assert error.exit_status == 1
        if (tmp_path / "out" / "model.safetensors").read_bytes() == before["model.safetensors"]:
            assert {path.name: path.read_bytes() for path in out.iterdir()} == before
            assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert at >= 1
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_a_damaged_checkpoint_is_refused_and_nothing_is_written(tmp_path: Path):
    checkpoint = make_run(tmp_path / "run")
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    assert "damaged" in refused(checkpoint, tmp_path / "out")
    assert not [*tmp_path.glob("out*")]


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path):
    small = make_run(tmp_path / "small", random_model(vocab_size=314))
    assert "not this model's tokenizer: it has 315 ids, the model 314" in refused(small, tmp_path / "out")
    large = make_run(tmp_path / "large", random_model(vocab_size=320))
    export(large, tmp_path / "out")
    assert load_pretrained(tmp_path / "out").vocab_size == 320
    other = tmp_path / "other"
    other.mkdir()
    save_tiny_tokenizer(other, control=["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
    message = refused(large, tmp_path / "out2", f"--tokenizer={other}")
    assert f"not the tokenizer that {large} was trained with" in message


def test_an_architecture_of_no_family_is_refused_before_anything_is_written(tmp_path: Path):
    checkpoint = make_run(tmp_path / "run", norm_position="post")
    assert "no model class of Transformers computes what this architecture does" in refused(
        checkpoint, tmp_path / "out"
    )
    assert not [*tmp_path.glob("out*")]


def test_a_template_that_is_not_ours_is_refused_unless_one_is_named(tmp_path: Path):
    checkpoint = make_run(tmp_path / "run")
    (tmp_path / "run" / JINJA_NAME).write_text("{{ messages }}")
    assert "is none of chatml, qwen3; say with --template=" in refused(checkpoint, tmp_path / "out")
    export(checkpoint, tmp_path / "out", "--template=qwen3")
    assert (tmp_path / "out" / JINJA_NAME).read_bytes() == jinja_file("qwen3").read_bytes()


def test_an_export_can_be_exported_again(tmp_path: Path):
    export(make_run(tmp_path / "run", **FAMILIES["GPT-2"]), tmp_path / "out", "--dtype=fp32")
    export(tmp_path / "out", tmp_path / "again", "--dtype=fp32")
    for path in (tmp_path / "out").iterdir():
        if path.name != "README.md":
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_readme_tells_the_run_but_no_place_on_its_machine(tmp_path: Path):
    checkpoint = make_run(tmp_path / "run")
    content = torch.load(checkpoint, weights_only=True)
    settings = {"checkpoint_path": "/data/mine/Base-0.6B", "run_name": "a|<b>", "learning_rate": 1e-5, "notes": "x\ny"}
    save_checkpoint(tmp_path / "run", {**content, "config": settings}, iter_num=7, best=False, keep=None)
    log = {
        "startup_info": {"sentences": {"data": "55 samples"}, "torch": "2.13", "python": "3.11"},
        "training_iterations": [{"iter": i, "loss": 10.0 - i, "tokens_per_second": 1000.0} for i in range(9)],
        "eval_steps": [{"iter": 5, "val_loss": 2.5}, {"iter": 8, "val_loss": 9.0}],
    }
    (tmp_path / "run" / "run_20260101_000000.json").write_text("{")
    (tmp_path / "run" / "run_20250101_000000.json").write_text(json.dumps(log))
    export(checkpoint, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    lines = text.splitlines()
    assert "It was fine-tuned from Base-0.6B." in text
    assert r"# a\|&lt;b>" in lines
    for line in (
        "| step | 7 |",
        "| training loss | 3.0000 |",
        "| validation loss | 2.5000 |",
        "| data | 55 samples |",
        "| learning_rate | 1e-05 |",
        "| notes | x y |",
        "| checkpoint_path | Base-0.6B |",
    ):
        assert line in lines
    assert "/data/mine" not in text


def test_what_is_missing_on_the_command_line_is_asked_for(tmp_path: Path):
    for arguments in ([], ["ckpt.pt"], ["ckpt.pt", "--verify"]):
        assert "which checkpoint, and which folder to write?" in refused(*arguments)
    assert "shard_gb must be above 0, not 0.0" in refused("ckpt.pt", tmp_path / "out", "--shard_gb=0")
    assert "no such checkpoint" in refused(tmp_path / "none.pt", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize(("file", "template"), [("tokenizer.json", "qwen3"), ("qwen.tiktoken", "chatml")])
def test_the_published_vocabulary_gives_a_server_our_ids(
    shared: Path, tmp_path: Path, capsys, file: str, template: str
):
    pytest.importorskip("transformers")
    tokenizer = shared / "tokenizer" / "qwen3" / file
    model = shared / "oracles" / "models" / "qwen3_real_vocab"
    export(model, tmp_path / "out", f"--tokenizer={tokenizer}", f"--template={template}", "--verify")
    assert capsys.readouterr().out.count("verified") == 3


@pytest.mark.slow
def test_a_run_as_the_trainer_leaves_it_is_exported(arguments, tmp_path: Path, capsys):
    pytest.importorskip("transformers")
    import train_sft

    train_sft.main(arguments(ema_decay=0.5, eval_interval=2))
    capsys.readouterr()
    export(tmp_path / "out", tmp_path / "exported", "--dtype=fp32", "--verify")
    told = capsys.readouterr().out
    assert told.count("verified") == 3
    assert "family    Llama" in told
    assert "weights   the weights are the moving average of the trained ones" in told
    assert (tmp_path / "exported" / JINJA_NAME).read_bytes() == jinja_file("chatml").read_bytes()
    text = (tmp_path / "exported" / "README.md").read_text()
    for part in ("| step | 4 |", "| training loss | ", "| validation loss | ", "| learning_rate | 0.01 |", "| data | "):
        assert part in text
    assert str(tmp_path) not in text
