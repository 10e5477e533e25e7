"""What a run makes sure of before its first step, told in one message; and that looking changes nothing."""

import errno
import json
import math
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

import train_sft
from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from sft import dry_run, start_checks, startup
from sft.errors import EXIT_BAD_INPUT, EXIT_FAILED, UserError
from sft.findings import Findings, Missing
from tests.conftest import ROOT, SHAPE
from tests.launch import torchrun
from tests.test_startup import put_weights, retell
from tests.test_train import assert_equal_trees, losses, run_log
from tests.tiny import CPU_WORLD


@pytest.fixture
def data(prepared, tmp_path):
    """A copy of the prepared data, to be changed."""
    return shutil.copytree(prepared, tmp_path / "data")


@pytest.fixture
def model(prepared):
    """One that knows nothing, with a row for each id of the data."""
    torch.manual_seed(0)
    vocabulary = json.loads((prepared / "meta.json").read_text())["vocab_size"]
    return ConfigurableGPT(ModelArchitectureConfig.from_dict({**SHAPE, "vocab_size": vocabulary, "block_size": 64}))


@pytest.fixture
def base(model, tmp_path):
    """A model in a file, and what is in it."""
    content = {"model": dict(model.state_dict()), "model_args": model.config.to_dict()}
    torch.save(content, tmp_path / "base.pt")
    return tmp_path / "base.pt", content


def flip_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def refusal(arguments):
    with pytest.raises(UserError) as caught:
        train_sft.main(arguments)
    return caught.value


class TestAtOnce:
    def test_one_message_tells_of_the_data_the_out_dir_and_the_base(self, arguments, data, tmp_path):
        flip_last_bit(data / "val_origins.npy")
        (tmp_path / "file").write_text("in the way")
        (tmp_path / "base.pt").write_bytes(b"no checkpoint")
        wrong = {"out_dir": tmp_path / "file" / "out", "model": "none", "checkpoint_path": tmp_path / "base.pt"}
        error = refusal(arguments(sft_data_dir=data, **wrong))
        headline, *problems = str(error).splitlines()
        assert headline == "the run cannot start:"
        assert [line for line in problems if not line.startswith("    ")] == [
            f"  {data}: this run cannot use it:",
            f"  out_dir {tmp_path / 'file' / 'out'}: cannot be written (Not a directory); choose another --out_dir",
            f"  {tmp_path / 'base.pt'}: damaged or cut short, or no PyTorch checkpoint at all; use another one",
        ]
        assert (
            problems[1]
            == "    val_origins.npy does not have the checksum that meta.json gives; run prepare_sft.py again"
        )
        assert error.exit_status == EXIT_BAD_INPUT
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base.pt", "data", "file"]

    @pytest.mark.slow
    def test_of_two_processes_one_speaks_once(self, arguments, data, tmp_path):
        flip_last_bit(data / "val_origins.npy")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "ckpt.pt").touch()
        done = torchrun(2, ROOT / "train_sft.py", *arguments(sft_data_dir=data), check=False)
        assert done.stderr.count("val_origins.npy does not have the checksum") == 1
        assert done.stderr.count("error: the run cannot start:") == 1
        assert done.stderr.count("holds ckpt.pt of another run") == 1
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ckpt.pt"]

    def test_a_check_that_needs_a_failed_one_is_left_out(self):
        found, ran = Findings(CPU_WORLD), []

        def fail():
            raise UserError("broken", exit_status=EXIT_FAILED)

        one, two = found.together(fail), found.on_main(lambda: 2)
        three = found.on_main(lambda: ran.append(one()))
        assert two() == 2
        for result in (one, three):
            with pytest.raises(Missing):
                result()
        assert not ran
        with pytest.raises(UserError, match=r"^broken$") as caught:
            found.settle()
        assert caught.value.exit_status == EXIT_FAILED
        found.together(fail)
        with pytest.raises(UserError, match=r"^broken$"):
            found.settle()

        def refuse():
            raise UserError("wrong\nhere")

        found.on_main(refuse)
        with pytest.raises(UserError, match=r"^the run cannot start:\n  broken\n  wrong\n  here$") as caught:
            found.settle()
        assert caught.value.exit_status == EXIT_BAD_INPUT

    def test_nothing_that_was_found_is_no_error(self):
        Findings(CPU_WORLD).settle()


class TestData:
    @pytest.mark.parametrize("name", ["input_ids", "labels", "offsets", "targets", "origins"])
    def test_a_flipped_bit_in_an_array_is_found(self, arguments, data, tmp_path, name):
        flip_last_bit(data / f"train_{name}.npy")
        message = str(refusal(arguments(sft_data_dir=data)))
        assert f"train_{name}.npy does not have the checksum" in message or "damaged" in message
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["input_ids", "labels"])
    def test_an_id_outside_the_vocabulary_is_found_whatever_the_checksums_say(self, arguments, data, name):
        path = data / f"train_{name}.npy"
        array = np.load(path)
        array[-1] = json.loads((data / "meta.json").read_text())["vocab_size"]
        np.save(path, array)
        retell(data, path.name)
        message = "ids that are not from 0 to max_id" if name == "input_ids" else "neither their token nor -100"
        assert message in str(refusal(arguments(sft_data_dir=data)))

    def test_a_long_verification_says_how_long(self, arguments, prepared, monkeypatch, capsys):
        startup.open_training_data(prepared, block_size=64)
        assert capsys.readouterr().out == ""
        monkeypatch.setattr(startup, "LONG_SECONDS", 0)
        startup.open_training_data(prepared, block_size=64)
        assert "GB of prepared data, " in capsys.readouterr().out


class TestOutDir:
    @pytest.mark.parametrize("operation", ["fsync", "replace"])
    def test_a_disk_that_refuses_what_a_save_does_is_found(self, arguments, tmp_path, monkeypatch, operation):
        original = getattr(os, operation)

        def refuse(first, *others):
            name = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            if "write_probe" in name:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(first, *others)

        monkeypatch.setattr(os, operation, refuse)
        assert "cannot be written (Input/output error)" in str(refusal(arguments()))
        assert not (tmp_path / "out").exists()

    def test_a_copy_of_the_tokenizer_that_breaks_off_leaves_none(self, arguments, tmp_path, monkeypatch):
        def break_off(source, target, size):
            target.write(source.read(100))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copyfileobj", break_off)
            assert "cannot be copied" in str(refusal(arguments()))
        assert not (tmp_path / "out").exists()
        train_sft.main(arguments())


Usage = namedtuple("Usage", "free")


class TestDisk:
    @pytest.fixture
    def size(self, model):
        """Of a checkpoint."""
        return dry_run.checkpoint_bytes(model)

    @pytest.fixture
    def free(self, monkeypatch):
        def leave(size):
            monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda folder: Usage(int(size)))

        return leave

    def test_a_disk_without_room_for_two_checkpoints_is_refused(self, arguments, tmp_path, size, free, capsys):
        free(1.9 * size)
        error = refusal(arguments())
        assert "a checkpoint takes 0.00 GiB, and a good one stays while the next is written" in str(error)
        assert error.exit_status == EXIT_FAILED
        assert not (tmp_path / "out").exists()
        free(2.1 * size)
        train_sft.main(arguments(eval_interval="none"))
        assert "will not fit" not in capsys.readouterr().out

    def test_less_than_was_promised_is_warned_of(self, arguments, tmp_path, size, free, capsys):
        free(3.5 * size)
        options = {"keep_checkpoints": 3, "save_interval": 1, "eval_interval": "none"}
        train_sft.main(arguments(**options))
        assert "GiB for 3 kept and one being written will not fit" in capsys.readouterr().out
        train_sft.main(arguments(**{**options, "keep_checkpoints": 2}, out_dir=tmp_path / "fewer"))
        assert "will not fit" not in capsys.readouterr().out

    def test_checkpoints_that_are_there_have_their_room_already(self, arguments, size, free):
        options = {"resume": "auto", "lr_decay_iters": 4, "save_interval": 2, "eval_interval": "none"}
        train_sft.main(arguments(**options))
        free(0.9 * size)  # beside the two that are there
        assert "make room" in str(refusal(arguments(**options, max_iters=6)))
        train_sft.main(arguments(**options))  # which has nothing left to save
        free(1.1 * size)
        train_sft.main(arguments(**options, max_iters=6))


class TestBase:
    def start(self, base, **changes):
        return {"model": "none", "checkpoint_path": base, **changes}

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_base_with_a_number_that_is_not_finite_is_refused_by_name(self, arguments, base, tmp_path, value):
        path, content = base
        content["model"]["blocks.1.norm1.weight"][7] = value
        torch.save(content, path)
        error = refusal(arguments(**self.start(path)))
        assert str(error) == f"{path}: holds numbers that are not finite, in blocks.1.norm1.weight; " + (
            "start from another checkpoint"
        )
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_finite_is_what_torch_calls_finite(self, dtype):
        numbers = torch.linspace(-3, 3, 1001).to(dtype)
        assert start_checks.is_finite(numbers)
        assert start_checks.is_finite(torch.full((3,), torch.finfo(dtype).max, dtype=dtype))
        assert start_checks.is_finite(numbers[:0])
        for value in (math.nan, math.inf, -math.inf):
            for place in (0, 500, 1000):
                odd = numbers.clone()
                odd[place] = value
                assert not start_checks.is_finite(odd)

    def test_a_base_that_is_worse_than_knowing_nothing_is_warned_of(self, arguments, base, tmp_path, capsys):
        path, content = base
        train_sft.main(arguments(**self.start(path), max_iters=1))
        assert "knows nothing" not in capsys.readouterr().out
        content["model"]["final_norm.weight"].mul_(-300)
        torch.save(content, path)
        train_sft.main(arguments(**self.start(path), max_iters=1, out_dir=tmp_path / "strange"))
        (event,) = [event for event in run_log(tmp_path / "strange")["events"] if event["kind"] == "strange_base"]
        vocabulary = content["model_args"]["vocab_size"]
        assert event["limit"] == pytest.approx(math.log(vocabulary) + 1)
        assert event["loss"] > event["limit"]
        assert f"warning  the loss of {path} on the first rows is {event['loss']:.2f}" in capsys.readouterr().out

    @pytest.mark.parametrize("weighted", [False, True])
    def test_the_loss_in_question_is_that_of_the_first_micro_batch(
        self, arguments, base, data, tmp_path, monkeypatch, weighted
    ):
        if weighted:
            for split in ("train", "val"):
                count = len(np.load(data / f"{split}_labels.npy"))
                put_weights(data, split, np.random.default_rng(0).uniform(0.1, 3, count))
        seen = []
        monkeypatch.setattr(start_checks, "doubt_base", lambda run, _: seen.append(start_checks.first_loss(run)))
        options = {"sft_data_dir": data, "max_iters": 1, "gradient_accumulation_steps": 1, "dtype": "float64"}
        train_sft.main(arguments(**self.start(base[0]), **options))
        assert seen == [pytest.approx(losses(run_log(tmp_path / "out"))[1], rel=1e-12)]

    def test_it_is_computed_as_in_an_evaluation_and_leaves_the_run_as_it_was(self, arguments, base, monkeypatch):
        found = []

        def look(settings, run, *, steps):
            run.loss_module.train()
            run.local_loss.register_forward_hook(lambda module, _, loss: found.append(loss.requires_grad))
            before = torch.manual_seed(5).get_state()
            found.append(start_checks.first_loss(run))
            assert all(module.training for module in run.loss_module.modules())
            assert torch.equal(torch.get_rng_state(), before)

        monkeypatch.setattr(train_sft, "loop", look)
        for dropout, out_dir in ((0, "without"), (0.5, "with")):
            train_sft.main(arguments(**self.start(base[0]), dropout=dropout, out_dir=base[0].parent / out_dir))
        assert found == [False, found[1], False, found[1]]

    def test_looking_changes_no_bit_of_what_is_trained(self, arguments, base, tmp_path, monkeypatch):
        options = {**self.start(base[0]), "dropout": 0.1, "max_iters": 6, "eval_interval": "none"}
        looked = []
        first_loss = start_checks.first_loss
        monkeypatch.setattr(start_checks, "first_loss", lambda run: looked.append(first_loss(run)) or looked[0])
        train_sft.main(arguments(**options, out_dir=tmp_path / "looked"))
        monkeypatch.setattr(start_checks, "doubt_base", lambda *_: None)
        train_sft.main(arguments(**options, out_dir=tmp_path / "blind"))
        assert len(looked) == 1
        one, two = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("looked", "blind"))
        for key in ("model", "optimizer", "rows_seen", "order"):
            assert_equal_trees(one[key], two[key], key)
        assert losses(run_log(tmp_path / "looked")) == losses(run_log(tmp_path / "blind"))

    def test_a_new_model_and_a_resumed_run_are_not_doubted(self, arguments, base, tmp_path, monkeypatch):
        monkeypatch.setattr(start_checks, "doubt_base", lambda *_: pytest.fail("doubted"))
        train_sft.main(arguments(model=SHAPE))
        train_sft.main(arguments(resume="required", max_iters=5, lr_decay_iters=4))
