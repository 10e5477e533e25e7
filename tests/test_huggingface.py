import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_builder import ConfigurableGPT, load_pretrained
from model_config import PRESETS
from sft.attention import Documents
from sft.errors import UserError
from sft.families import architecture_fields
from sft.huggingface import name_table, read_config, stored_tensors, to_hugging_face

KINDS = {
    "tied_gqa": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "untied_mha": {"tie_word_embeddings": False, "num_key_value_heads": 4},
}


@pytest.fixture(params=KINDS)
def live(request: pytest.FixtureRequest, tmp_path: Path):
    """A small random Qwen3 in Transformers, and the folder that it was saved in."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.3,
        **KINDS[request.param],
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
    model.save_pretrained(tmp_path)
    return model.eval(), tmp_path


RECORDED = (
    *("qwen3_tied_gqa", "qwen3_untied_mha", "qwen3_sharded", "qwen3_yarn", "qwen3_moe_topknorm"),
    *("qwen2_bias_tied", "llama3_ropescaled_tied"),
)


def publish(folder: Path) -> None:
    """Rewrite a config.json of Transformers 5 in the style of the published models."""
    config = read_config(folder)
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")
    del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config))


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def our_gradients(model: ConfigurableGPT, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradients of the masked loss under Hugging Face's names."""
    loss_of(logits, labels).backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    fields = model.config.to_dict()
    return to_hugging_face(ours, name_table(fields))


def assert_gradients_match(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("style", ["published", "transformers 5"])
def test_a_saved_qwen3_has_transformers_logits_and_gradients(live, style: str):
    theirs, folder = live
    if style == "published":
        publish(folder)
    ours = load_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(120, (3, 40), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, -100)
    expected = theirs(ids).logits
    logits = ours(ids)
    assert expected.std() > 1
    assert (logits - expected).abs().max() <= 1e-4
    loss_of(expected, labels).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert_gradients_match(our_gradients(ours, logits, labels), gradients)


def test_names_and_tensors_survive_the_way_in_and_out(live):
    theirs, folder = live
    ours = load_pretrained(folder)
    table = name_table(architecture_fields(read_config(folder)))
    weights = dict(ours.named_parameters())
    assert table.keys() == weights.keys()
    back = to_hugging_face(weights, table)
    expected = dict(theirs.named_parameters())
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(back[name], tensor), name
    with pytest.raises(AssertionError, match="colour"):
        to_hugging_face({**weights, "colour": torch.zeros(1)}, table)


def test_shards_are_one_model_and_missing_ones_are_all_named(live):
    theirs, folder = live
    whole = load_pretrained(folder).state_dict()
    theirs.save_pretrained(folder / "sharded", max_shard_size="10KB")
    shards = sorted((folder / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 3
    for name, tensor in load_pretrained(folder / "sharded").state_dict().items():
        assert torch.equal(tensor, whole[name]), name
    for shard in shards[1:3]:
        shard.unlink()
    with pytest.raises(
        UserError, match=f"2 of {len(shards)} shards are missing:\n  {shards[1].name}\n  {shards[2].name}"
    ):
        load_pretrained(folder / "sharded")


def test_a_head_stored_beside_its_tied_embedding_is_accepted(live):
    theirs, folder = live
    if not theirs.config.tie_word_embeddings:
        pytest.skip("untied")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    ids = torch.arange(20)[None]
    assert (load_pretrained(folder)(ids) - theirs(ids).logits).abs().max() <= 1e-4


def test_a_refusal_lists_every_tensor_by_the_files_names(live):
    _, folder = live
    tensors = load_file(folder / "model.safetensors")
    rows = tensors.pop("model.layers.0.self_attn.k_proj.weight").shape[0]
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(32, 47)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_pretrained(folder)
    headline, *problems = str(caught.value).splitlines()
    assert headline == f"{folder}: its tensors do not fit the architecture it names:"
    assert sorted(problems) == [
        f"  missing: model.layers.0.self_attn.k_proj.weight ({rows}, 32)",
        "  unexpected: model.layers.0.self_attn.q_proj.bias (64,)",
        "  wrong shape: model.layers.1.mlp.down_proj.weight is (32, 47), must be (32, 48)",
        "  wrong type: model.norm.weight is I8, must hold floats of 16, 32 or 64 bits",
    ]


def test_damaged_files_are_refused_in_a_sentence(live):
    _, folder = live
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or cut short"):
        load_pretrained(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor"):
        load_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(UserError, match="'weight_map' must map"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read as JSON"):
        load_pretrained(folder)


def test_what_cannot_be_computed_here_is_refused_with_every_reason(live):
    _, folder = live
    config = read_config(folder)
    changes = {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6},
        "use_sliding_window": "yes",
        "layer_types": ["full_attention", "chunked_attention"],
        "attention_bias": 1,
        "hidden_act": "gelu",
        "hidden_size": "wide",
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError) as caught:
        load_pretrained(folder)
    for name in changes:
        assert name.replace("rope_parameters", "rope_scaling has the rope_type 'dynamic'") in str(caught.value)
    with pytest.raises(UserError, match=r"model_type is .qwen3_next.; known are qwen3, qwen3_moe, qwen2, llama"):
        architecture_fields({**config, "model_type": "qwen3_next"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer_types": [{}]}, "layer_types [{}] are not supported"),
        ({"layer_types": 3}, "layer_types 3 are not supported"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters has full_attention, which"),
        ({"rope_scaling": {"type": "default", "factor": 4.0}}, "rope_scaling has factor, which is not supported"),
    ],
)
def test_what_would_be_ignored_or_is_of_no_known_form_is_refused_by_name(live, change: dict, said: str):
    _, folder = live
    (folder / "config.json").write_text(json.dumps({**read_config(folder), **change}))
    with pytest.raises(UserError) as caught:
        load_pretrained(folder)
    assert str(folder / "config.json") in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.oracle
@pytest.mark.parametrize("style", ["config.json", "config.v5.json"])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_models_have_their_logits_gradients_and_packed_logits(
    shared: Path, tmp_path: Path, name: str, style: str
):
    source = shared / "oracles" / "models" / name
    expected = load_file(source / "expected.safetensors")
    folder = shutil.copytree(source, tmp_path / name)
    shutil.copyfile(source / style, folder / "config.json")
    model = load_pretrained(folder)
    ids, labels, real = expected["input_ids"], expected["labels"], expected["attention_mask"].bool()
    documents = Documents((~real).int())  # padding as a document of its own
    for logits in (model(ids), model(ids, documents=documents)):
        assert (logits - expected["logits"])[real].abs().max() <= 1e-4
    torch.testing.assert_close(loss_of(logits, labels), expected["loss"], rtol=1e-5, atol=0)
    gradients = {key.removeprefix("grad."): tensor for key, tensor in expected.items() if key.startswith("grad.")}
    assert_gradients_match(our_gradients(model, logits, labels), gradients)
    packed_documents = Documents(expected["packed_doc_ids"][None].int())
    packed = model(expected["packed_input_ids"][None], expected["packed_position_ids"][None], packed_documents)
    assert (packed[0] - expected["packed_logits"]).abs().max() <= 1e-4


@pytest.mark.oracle
def test_every_tensor_of_the_published_0_6b_is_in_the_table_with_its_shape(shared: Path):
    published = json.loads((shared / "oracles" / "qwen3_0.6b" / "param_shapes.json").read_text())
    fields = architecture_fields(read_config(shared / "oracles" / "qwen3_0.6b"))
    pieces = {piece.name: list(piece.shape) for row in name_table(fields).values() for piece in row}
    assert len(pieces) == 310
    assert pieces == published["shapes"]
    preset = PRESETS["qwen3-0.6b"].to_dict()
    assert {name: preset[name] for name in fields} == fields


@pytest.mark.oracle
def test_a_bf16_model_with_the_real_vocabulary_is_read_exactly(shared: Path):
    folder = shared / "oracles" / "models" / "qwen3_real_vocab"
    model = load_pretrained(folder)
    assert model.vocab_size == 151_936
    stored = stored_tensors(folder)["model.embed_tokens.weight"].read()
    assert stored.dtype == torch.bfloat16
    assert torch.equal(model.token_embeddings.weight, stored.float())
