"""tools/average_checkpoints.py: the mean it writes, and what it refuses before it writes anything."""

import re
from pathlib import Path

import pytest
import torch

import train_sft
from model_builder import load_pretrained
from sft import averaging
from sft.averaging import weighted_mean
from sft.checkpoint import read_checkpoint, save_checkpoint
from sft.errors import UserError
from sft.seal import MARK
from tests.test_hub import hugging_face_folder
from tests.tiny import tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer
from tools import average_checkpoints, chat


def save(folder: Path, number: int, *, tokenizer: str = "one", **changes: object) -> Path:
    """A checkpoint of a tiny model that is drawn anew for each number."""
    model = tiny_model(
        seed=number, **{name: changes.pop(name) for name in [*changes] if name not in ("ema", "template")}
    )
    told = {"tokenizer_fingerprint": tokenizer, "template": "chatml", "config": {"seed": 1}, **changes}
    content = {"model": model.state_dict(), "model_args": model.config.to_dict(), "iter_num": number, **told}
    return save_checkpoint(folder, content, iter_num=number, best=False, keep=None)


def average(*arguments: object) -> None:
    average_checkpoints.main([*map(str, arguments)])


def refused(message: str, *arguments: object) -> None:
    with pytest.raises(UserError, match=message):
        average(*arguments)


def by_hand(paths: list[Path], shares: list[float], name: str, *, weights: str = "model") -> torch.Tensor:
    tensors = [torch.load(path, weights_only=True)[weights][name].double() for path in paths]
    return sum(share * tensor for share, tensor in zip(shares, tensors, strict=True)).float()


@pytest.mark.parametrize("tying", [True, False])
def test_the_mean_opens_and_is_the_mean_of_every_tensor(tmp_path, tying):
    paths = [save(tmp_path, number, weight_tying=tying) for number in (1, 2, 3)]
    out = tmp_path / "mean.pt"
    average(out, f"--checkpoints={','.join(map(str, paths))}")
    model = load_pretrained(out)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, by_hand(paths, [1 / 3] * 3, name), rtol=1e-7, atol=1e-9)
    content = read_checkpoint(out)
    assert ("lm_head.weight" in content["model"]) != tying
    assert content["averaged"] == [
        {"path": str(path), "weight": 1 / 3, "iter_num": n + 1} for n, path in enumerate(paths)
    ]
    assert (content["iter_num"], content["tokenizer_fingerprint"], content["config"]) == (3, "one", {"seed": 1})
    assert "optimizer" not in content
    assert MARK in out.read_bytes()[-200:]


def test_shares_need_not_add_up_to_one(tmp_path, capsys):
    paths = [save(tmp_path, number) for number in (1, 2)]
    average(tmp_path / "mean.pt", f"--checkpoints={paths[0]}:3,{paths[1]}:1")
    value = load_pretrained(tmp_path / "mean.pt").token_embeddings.weight
    torch.testing.assert_close(value, by_hand(paths, [0.75, 0.25], "token_embeddings.weight"), rtol=1e-7, atol=1e-9)
    assert [each["weight"] for each in read_checkpoint(tmp_path / "mean.pt")["averaged"]] == [0.75, 0.25]
    assert re.search(r"0\.7500  .*ckpt_000001\.pt  step 1\n +0\.2500  .*ckpt_000002", capsys.readouterr().out)


def test_a_mean_of_one_is_that_one_and_can_be_its_moving_average(tmp_path):
    ema = tiny_model(seed=9).state_dict()
    path = save(tmp_path, 1, ema=ema)
    average(tmp_path / "same.pt", f"--checkpoints={path}")
    average(tmp_path / "ema.pt", f"--checkpoints={path}", "--weights=ema")
    for name, value in load_pretrained(tmp_path / "same.pt").state_dict().items():
        assert torch.equal(value, load_pretrained(path).state_dict()[name]), name
    for name, value in load_pretrained(tmp_path / "ema.pt").state_dict().items():
        assert torch.equal(value, ema[name]), name


def test_folders_of_hugging_face_are_averaged_too(tmp_path, capsys):
    models = [tiny_model(seed=seed, vocab_size=600) for seed in (1, 2)]
    for seed, model in enumerate(models, start=1):
        hugging_face_folder(tmp_path / f"{seed}", model)
        save_tiny_tokenizer(tmp_path / f"{seed}")
    out = tmp_path / "mean" / "ckpt.pt"
    average(out, f"--checkpoints={tmp_path / '1'}:3,{tmp_path / '2'}:1")
    one, two = (dict(model.named_parameters()) for model in models)
    for name, value in load_pretrained(out).named_parameters():
        torch.testing.assert_close(value, 0.75 * one[name] + 0.25 * two[name])
    chat.main([str(out), "--prompt=the cat", "--max_new_tokens=1", "--device=cpu"])


def test_the_last_of_a_run_are_the_newest_whatever_other_names_they_have(tmp_path):
    paths = [save(tmp_path, number) for number in (100, 200, 1_000_000)]
    average(tmp_path / "mean.pt", "--last=2", f"--out_dir={tmp_path}")
    averaged = read_checkpoint(tmp_path / "mean.pt")["averaged"]
    assert [(each["path"], each["iter_num"]) for each in averaged] == [(str(paths[1]), 200), (str(paths[2]), 1_000_000)]
    refused(r"holds 3 numbered checkpoints, not 4; lower last", tmp_path / "4.pt", "--last=4", f"--out_dir={tmp_path}")


def test_a_tensor_is_added_up_in_parts_in_float64_and_rounded_once(monkeypatch):
    monkeypatch.setattr(averaging, "AT_ONCE", 7)
    tensors = [torch.randn(5, 4, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3)]
    expected = (0.2 * tensors[0].double() + 0.2 * tensors[1].double() + 0.6 * tensors[2].double()) / 1
    assert torch.equal(weighted_mean(tensors, [1, 1, 3]), expected.bfloat16())
    wide = weighted_mean([tensors[0], tensors[1].float()], [1, 1])
    assert wide.dtype == torch.float32
    same = torch.randn(100, generator=torch.Generator().manual_seed(5))
    assert torch.equal(weighted_mean([same.t(), same, same], [1, 1, 1]), same)


def test_a_mean_can_be_trained_from_and_served_but_not_resumed(arguments, tmp_path, capsys):
    train_sft.main(arguments(save_interval=2, eval_interval="none"))
    out = tmp_path / "mean" / "ckpt.pt"
    average(out, "--last=2", f"--out_dir={tmp_path / 'out'}")
    assert f"train from it with --checkpoint_path={out}" in capsys.readouterr().out
    chat.main([str(out.parent), "--prompt=the cat", "--max_new_tokens=2", "--device=cpu"])
    start = {"model": "none", "checkpoint_path": out, "out_dir": tmp_path / "next", "max_iters": 1}
    train_sft.main(arguments(**start))
    with pytest.raises(
        UserError, match=r"ckpt\.pt: an average of checkpoints, which has no optimizer, .*checkpoint_path="
    ):
        train_sft.main(arguments(out_dir=out.parent, resume="required"))


class TestRefusals:
    """One clear message each, and nothing written."""

    @pytest.fixture(autouse=True)
    def nothing_is_written(self, tmp_path):
        yield
        assert {path.name for path in tmp_path.iterdir()} <= {"a", "b"}

    @pytest.fixture
    def first(self, tmp_path) -> Path:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        return save(tmp_path / "a", 1)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"d_ff": 32}, "d_ff is 32, in .*ckpt_000001.pt 64"),
            ({"qk_norm": False}, "qk_norm is False"),
            ({"tokenizer": "another"}, "its tokenizer is another, in .*ckpt_000001.pt one"),
            ({"template": "qwen3"}, "its template is qwen3"),
        ],
    )
    def test_checkpoints_that_do_not_belong_together(self, tmp_path, first, change, message):
        second = save(tmp_path / "b", 2, **change)
        refused(f"ckpt_000002.pt: {message}", tmp_path / "mean.pt", f"--checkpoints={first},{second}")

    def test_all_differences_are_told_at_once(self, tmp_path, first):
        second, third = save(tmp_path / "b", 2, d_ff=32, n_layer=1), save(tmp_path / "b", 3, tokenizer="another")
        message = r"(?s)2\.pt: d_ff.*2\.pt: n_layer.*3\.pt: its tokenizer"
        refused(message, tmp_path / "mean.pt", f"--checkpoints={first},{second},{third}")

    @pytest.mark.parametrize(
        ("shares", "message"),
        [
            ((":0", ":0"), "the shares of the mean add up to 0"),
            ((":-1", ":2"), "a share of the mean must be 0 or more and finite, not -1"),
            ((":nan", ""), "a share of the mean must be 0 or more and finite, not nan"),
            ((":much", ""), "'much' is no number"),
        ],
    )
    def test_shares_that_make_no_mean(self, tmp_path, first, shares, message):
        second = save(tmp_path / "b", 2)
        refused(message, tmp_path / "mean.pt", f"--checkpoints={first}{shares[0]},{second}{shares[1]}")

    def test_numbers_that_are_not_finite(self, tmp_path, first):
        content = torch.load(first, weights_only=True)
        content["model"]["final_norm.weight"] = torch.full_like(content["model"]["final_norm.weight"], float("inf"))
        torch.save(content, tmp_path / "b" / "inf.pt")
        message = r"not finite cannot be averaged; leave these checkpoints out:\n  .*inf\.pt: final_norm\.weight$"
        refused(message, tmp_path / "mean.pt", f"--checkpoints={first},{tmp_path / 'b' / 'inf.pt'}:0")

    def test_a_file_that_is_named_twice(self, tmp_path, first):
        both = f"{first},{first.with_name('ckpt.pt')}"
        refused(
            "is the same file as .*; name it once, with a larger share", tmp_path / "mean.pt", f"--checkpoints={both}"
        )

    def test_adapters(self, tmp_path, first):
        content = {**torch.load(first, weights_only=True), "lora": {"rank": 2}, "base": {"path": str(first)}}
        torch.save(content, tmp_path / "b" / "lora.pt")
        refused(
            r"lora\.pt: holds adapters .* merge each into its base with tools/export_hf",
            tmp_path / "mean.pt",
            f"--checkpoints={tmp_path / 'b' / 'lora.pt'}",
        )

    def test_a_damaged_one(self, tmp_path, first):
        content = bytearray(first.read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "b" / "damaged.pt").write_bytes(content)
        refused(r"damaged\.pt: damaged", tmp_path / "mean.pt", f"--checkpoints={tmp_path / 'b' / 'damaged.pt'}")

    def test_tensors_that_do_not_fit(self, tmp_path, first):
        content = torch.load(first, weights_only=True)
        del content["model"]["final_norm.weight"]
        torch.save(content, tmp_path / "b" / "less.pt")
        both = f"{first},{tmp_path / 'b' / 'less.pt'}"
        refused(
            r"less\.pt: its tensors do not fit.*\n.*missing: final_norm", tmp_path / "mean.pt", f"--checkpoints={both}"
        )

    def test_a_moving_average_that_is_not_there(self, tmp_path, first):
        refused("holds no moving average", tmp_path / "mean.pt", f"--checkpoints={first}", "--weights=ema")

    def test_places_that_are_taken(self, tmp_path, first):
        refused("exists already", first.with_name("ckpt.pt"), f"--checkpoints={first}")
        for name in ("ckpt_000009.pt", "ckpt_best.pt"):
            refused("a name that a run gives", first.with_name(name), f"--checkpoints={first}")
        save_tiny_tokenizer(tmp_path / "a")
        (tmp_path / "b" / "tokenizer.json").write_text("{}")
        refused(r"b/tokenizer\.json: is not that of", tmp_path / "b" / "mean.pt", f"--checkpoints={first}")

    def test_a_disk_that_is_full(self, tmp_path, first, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("sft.files.os.fsync", full)
        refused(r"mean\.pt: cannot be written \(No space left", tmp_path / "b" / "mean.pt", f"--checkpoints={first}")
        assert not [*(tmp_path / "b").iterdir()]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "set checkpoints or last: one of the two"),
            (["--last=2"], "last and out_dir go together"),
            (["--last=0", "--out_dir=x"], "last must be at least 1"),
            (["--checkpoints=nowhere.pt"], "nowhere.pt: no such checkpoint"),
        ],
    )
    def test_settings_that_say_too_little(self, tmp_path, arguments, message):
        refused(message, tmp_path / "mean.pt", *arguments)

    def test_no_place_to_write(self):
        refused("where to\\?", "--last=2")
