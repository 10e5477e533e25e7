"""Models and tokenizers by their hub names, with a hub that is a folder here."""

import json
import shutil
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

import prepare_sft
import train_sft
from model_builder import ConfigurableGPT, load_pretrained
from sft import fetching, hub
from sft.errors import UserError
from sft.world import World
from tests.launch import torchrun
from tests.tiny import CPU_WORLD, tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer
from tools import chat

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Has one model, which it puts into a cache of the real one's layout: files are links to blobs."""

    def __init__(self, cache: Path):
        self.calls: list[dict] = []
        self.folder = cache / "models--owner--tiny" / "snapshots" / COMMIT
        self.cache = cache

    def __call__(self, repo_id: str, **options: object) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        if repo_id != "owner/tiny":
            raise errors.LocalEntryNotFoundError("An error happened\nPlease check your connection")
        if not self.folder.exists():
            if options["local_files_only"]:
                raise errors.LocalEntryNotFoundError("nothing is cached")
            self.fill()
        return str(self.folder)

    def fill(self) -> None:
        blobs = self.folder.parent.parent / "blobs"
        blobs.mkdir(parents=True)
        self.folder.mkdir(parents=True)
        tokenizer = save_tiny_tokenizer(self.cache)
        model = hugging_face_folder(self.cache / "made", tiny_model(vocab_size=600))
        for number, path in enumerate([tokenizer, *sorted(model.iterdir())]):
            shutil.copy(path, blobs / f"{number:040d}")
            (self.folder / path.name).symlink_to(Path("../../blobs") / f"{number:040d}")


def hugging_face_folder(folder: Path, model: ConfigurableGPT) -> Path:
    """A tiny Qwen3 as they are published."""
    from safetensors.torch import save_file

    from sft.huggingface import name_table

    folder.mkdir()
    shape = model.config
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": shape.n_embd,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.key_heads,
        "head_dim": shape.head_size,
        "intermediate_size": shape.ffn_width,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.block_size,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    state, tensors = model.state_dict(), {}
    for ours, pieces in name_table(shape.to_dict() | {"head_dim": shape.head_size, "d_ff": shape.ffn_width}).items():
        parts = state[ours].split([piece.shape[0] for piece in pieces])
        tensors |= {piece.name: part.contiguous() for piece, part in zip(pieces, parts, strict=True)}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeHub:
    made = FakeHub(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made)
    return made


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("Qwen/Qwen3-0.6B@v1.0", True),
        ("owner/name@refs/pr/3", True),
        ("folder/Qwen3", False),  # folder is here
        ("folder/there", False),
        ("./Qwen3", False),
        ("../a/b", False),
        ("a/b/c", False),
        ("gpt2", False),
        ("a/b.pt", False),
        ("a/tokenizer.json", False),
        ("a/b c", False),
        ("", False),
    ],
)
def test_a_name_of_the_hub_is_no_path_nor_a_misspelt_one(text, is_one, tmp_path, monkeypatch):
    (tmp_path / "folder" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.is_name(text) == is_one


def test_a_run_starts_from_a_name_and_records_the_commit(arguments, tmp_path, fake, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_sft.main(arguments(model="none", checkpoint_path="owner/tiny", max_iters=1))
    (call,) = fake.calls
    assert (call["repo_id"], call["revision"], call["local_files_only"]) == ("owner/tiny", None, False)
    assert {"*.safetensors", "*.json"} <= {*call["allow_patterns"]}
    assert not any(pattern in call["allow_patterns"] for pattern in ("*", "*.bin", "*.py"))
    log = json.loads(next((tmp_path / "out").glob("run_*.json")).read_text())
    assert log["config"]["checkpoint_path"] == f"owner/tiny@{COMMIT}"
    assert f"owner/tiny@{COMMIT}" in log["startup_info"]["sentences"]["model"]
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["config"]["checkpoint_path"].endswith(COMMIT)
    assert f"hub      owner/tiny@{COMMIT} in {fake.folder}" in capsys.readouterr().out

    repeat = next((tmp_path / "out").glob("run_*.json"))
    train_sft.main([str(repeat), f"--out_dir={tmp_path / 'again'}"])
    assert fake.calls[-1]["revision"] == COMMIT
    one, two = (load_pretrained(tmp_path / name / "ckpt.pt").state_dict() for name in ("out", "again"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_run_that_goes_on_asks_nobody(arguments, tmp_path, fake, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"model": "none", "checkpoint_path": "owner/tiny", "resume": "auto", "lr_decay_iters": 2}
    train_sft.main(arguments(**options, max_iters=2))
    assert len(fake.calls) == 1
    train_sft.main(arguments(**options, max_iters=3))
    assert len(fake.calls) == 1


def test_prepare_and_chat_take_names_too(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("raw.jsonl").write_text(json.dumps({"prompt": "the cat", "completion": "sat"}) + "\n")
    names = ["--input=raw.jsonl", "--tokenizer=owner/tiny", "--out_dir=data", "--val_fraction=0"]
    prepare_sft.main([*names, "--workers=1"])
    assert "*.safetensors" not in fake.calls[0]["allow_patterns"]
    assert json.loads(Path("data/meta.json").read_text())["settings"]["tokenizer"] == f"owner/tiny@{COMMIT}"
    chat.main(["owner/tiny", "--prompt=the cat", "--max_new_tokens=1", "--device=cpu"])
    assert "*.safetensors" in fake.calls[1]["allow_patterns"]


def response(status: int):
    class Response:
        status_code, headers, request, url, text = status, {}, None, "", ""

    return Response()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.LocalEntryNotFoundError("Cannot find it.\nMore."), r"\(Cannot find it\.\)"),
        (ConnectionError("no route to host"), r"\(no route to host\)"),
        (OSError(28, "No space left on device"), r"No space left on device"),
        (errors.RepositoryNotFoundError("404", response=response(404)), "is not there, or asks for a login"),
        (errors.RevisionNotFoundError("404", response=response(404)), "it has no such revision"),
    ],
)
def test_where_the_hub_cannot_be_reached_the_remedy_is_told(arguments, tmp_path, monkeypatch, error, reason):
    def fails(*_, **__):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(UserError, match=reason) as caught:
        train_sft.main(arguments(model="none", checkpoint_path="Qwen/Qwen3-0.6B@v2"))
    message = str(caught.value)
    assert message.startswith("checkpoint_path 'Qwen/Qwen3-0.6B@v2': there is no such file or folder here")
    assert "run: hf download Qwen/Qwen3-0.6B --revision v2 --local-dir Qwen3-0.6B; copy the folder" in message
    assert not (tmp_path / "out").exists()


def test_without_the_library_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        UserError, match=r"huggingface_hub is not installed; install it with: pip install .*extra `hub`"
    ):
        hub.fetch("Qwen/Qwen3-0.6B", setting="tokenizer", files=hub.TOKENIZER_FILES)


def test_a_heart_beats_while_a_long_download_goes_on(tmp_path, fake, monkeypatch):
    beats = []
    monkeypatch.setattr(fetching, "LOOKS_EVERY", 0.01)
    monkeypatch.setattr(fetching.heart, "beat", lambda *_: beats.append(1))
    fill = fake.fill
    monkeypatch.setattr(fake, "fill", lambda: (time.sleep(0.2), fill()))
    assert fetching.fetched("owner/tiny", CPU_WORLD) == fake.folder
    assert len(beats) > 5


def test_the_second_rank_of_a_machine_takes_what_the_first_has_fetched(fake, monkeypatch):
    fake.fill()
    monkeypatch.setenv("LOCAL_RANK", "1")
    fetching.fetched("owner/tiny", World(rank=1, size=1, device=torch.device("cpu")))
    assert [call["local_files_only"] for call in fake.calls] == [True]


ON_TWO_RANKS = """
import sys, time
import huggingface_hub
from sft.fetching import fetched
from sft.world import join_world
from tests.test_hub import FakeHub
from pathlib import Path

class Slow(FakeHub):
    def fill(self):
        time.sleep(1)
        super().fill()

with join_world("cpu", timeout=60) as world:
    fake = huggingface_hub.snapshot_download = Slow(Path(sys.argv[1]))
    folder = fetched(sys.argv[2], world)
    print(f"rank {world.rank}: {(folder / 'config.json').is_file()} {[c['local_files_only'] for c in fake.calls]}")
"""


@pytest.mark.slow
def test_of_two_ranks_one_fetches_and_both_fail_together(tmp_path):
    (tmp_path / "cache").mkdir()
    program = tmp_path / "program.py"
    program.write_text(ON_TWO_RANKS)
    done = torchrun(2, program, tmp_path / "cache", "owner/tiny")
    assert "rank 0: True [False]" in done.stdout
    assert "rank 1: True [True]" in done.stdout
    done = torchrun(2, program, tmp_path / "cache", "owner/other", check=False)
    assert done.returncode != 0
    assert done.stderr.count("UserError: checkpoint_path 'owner/other'") == 2
