"""What a run makes sure of about its data, and what weights in it come to."""

import shutil

import numpy as np
import pytest
import torch

import train_sft
from model_builder import load_pretrained
from sft.arrays import PreparedData, open_prepared, sha256_of
from sft.checkpoint import newest_checkpoint
from sft.errors import UserError
from sft.packing import PACKING_VERSION, RowStream
from sft.samples import NOT_TRAINED
from sft.startup import open_training_data
from tests.preparing import change_meta
from tests.test_train import losses, run_log


@pytest.fixture
def data(prepared, tmp_path):
    """A copy of the prepared data, to be changed."""
    return shutil.copytree(prepared, tmp_path / "data")


def without_audit(meta):
    del meta["audit"]


def with_failed_audit(meta):
    meta["audit"]["passed"] = False


def with_a_token_too_many(meta):
    meta["ledger"]["tokens"]["total"] += 1


def with_another_source(meta):
    meta["sources"][0]["samples"] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_audit, "it has no audit; run prepare_sft.py again"),
        (with_failed_audit, "its audit did not pass; run prepare_sft.py again"),
        (with_a_token_too_many, r"its ledger does not add up: tokens\.total is [\d,]+, its parts come to"),
        (with_another_source, "its sources have 61 samples, the splits 60"),
    ],
)
def test_data_that_is_not_proved_is_refused(data, arguments, tmp_path, change, message):
    change_meta(data, change)
    with pytest.raises(UserError, match=message) as caught:
        train_sft.main(arguments(sft_data_dir=data))
    assert caught.value.exit_status == 2
    assert not (tmp_path / "out").exists()
    assert open_training_data(data, block_size=64, proves=False)  # as a rank beside the main one opens it


def test_a_label_that_was_masked_later_is_noticed(data):
    labels = np.load(data / "train_labels.npy")
    labels[np.flatnonzero(labels != NOT_TRAINED)[5]] = NOT_TRAINED
    np.save(data / "train_labels.npy", labels)
    with pytest.raises(UserError, match=r"its ledger's splits\.train\.trained_tokens is [\d,]+, the arrays hold"):
        open_training_data(data, block_size=64)


def test_all_that_is_wrong_is_listed_at_once(data):
    change_meta(data, without_audit)
    with pytest.raises(UserError, match=r"(?s)it has no audit.*the longest sample of train has \d+ tokens"):
        open_training_data(data, block_size=16)


def with_weight(weight):
    return lambda meta: meta["sources"][0].update(weight=weight)


def test_the_weight_of_a_source_is_applied_to_training_and_not_to_validation(data, arguments, tmp_path):
    options = {"max_iters": "none", "max_epochs": 2, "eval_interval": 100}
    train_sft.main(arguments(**options, sft_data_dir=data, out_dir=tmp_path / "once"))
    change_meta(data, with_weight(2.5))
    train_sft.main(arguments(**options, sft_data_dir=data, out_dir=tmp_path / "more"))
    once, more = run_log(tmp_path / "once"), run_log(tmp_path / "more")
    tokens = [sum(record["tokens"] for record in log["training_iterations"]) for log in (once, more)]
    stream = RowStream(open_prepared(data).splits["train"].lengths, block_size=64, seed=1337)
    assert tokens[0] == pytest.approx(2 * stream.lengths.sum(), abs=64)  # the last step may reach into a third epoch
    assert tokens[1] == pytest.approx(5 * stream.lengths.sum(), abs=64)
    assert more["summary"]["rows_seen"] >= 2.4 * once["summary"]["rows_seen"]
    assert more["eval_steps"][0]["val_loss"] == once["eval_steps"][0]["val_loss"]


def test_a_resume_with_other_weights_of_the_sources_is_refused(data, arguments):
    train_sft.main(arguments(sft_data_dir=data))
    change_meta(data, with_weight(0.5))
    with pytest.raises(UserError, match=r"data: .* holds other data than the run was started with"):
        train_sft.main(arguments(sft_data_dir=data, resume="required"))


@pytest.mark.parametrize(("kept", "told"), [(None, 1), (1, 1), (PACKING_VERSION + 1, PACKING_VERSION + 1)])
def test_a_resume_across_a_change_of_the_packing_is_refused(arguments, tmp_path, kept, told):
    train_sft.main(arguments(max_iters=2))
    path = newest_checkpoint(tmp_path / "out", warn=print)
    saved = torch.load(path, weights_only=True)
    assert saved["packing_version"] == PACKING_VERSION == 2
    del saved["packing_version"]
    torch.save(saved if kept is None else {**saved, "packing_version": kept}, path)
    with pytest.raises(UserError, match=f"packed by version {told} of the packing, this program has version 2"):
        train_sft.main(arguments(max_iters=4, resume="required"))


def test_only_weights_other_than_one_change_the_fingerprint(prepared):
    prepared = open_prepared(prepared)

    def fingerprint(**source):
        return PreparedData(prepared.folder, {**prepared.meta, "sources": [source]}, prepared.splits).fingerprint

    assert fingerprint() == fingerprint(weight=1) == fingerprint(weight=1.0) == prepared.fingerprint
    assert len({fingerprint(), fingerprint(weight=2), fingerprint(weight=3)}) == 3


def put_weights(folder, split, weights):
    """Write a split's weights as prepare_sft.py does: the array, its entry in meta.json, and the targets."""
    samples = open_prepared(folder).splits[split]
    weights = np.where(samples.labels == NOT_TRAINED, 0, weights).astype(np.float32)
    np.save(folder / f"{split}_weights.npy", weights)
    ends = zip(samples.offsets[:-1], samples.offsets[1:], strict=True)
    targets = [weights[start + 1 : end].sum(dtype=np.float64) for start, end in ends]
    np.save(folder / f"{split}_targets.npy", np.array(targets))
    change_meta(folder, lambda meta: meta["arrays"].update({f"{split}_weights.npy": {}}))
    retell(folder, f"{split}_weights.npy", f"{split}_targets.npy")


def retell(folder, *names):
    """Let meta.json say of arrays what they are now."""
    arrays = {name: np.load(folder / name) for name in names}
    told = {
        name: {"dtype": array.dtype.str, "shape": list(array.shape), "sha256": sha256_of(folder / name)}
        for name, array in arrays.items()
    }
    change_meta(folder, lambda meta: meta["arrays"].update(told))


def expected_loss(model, samples, chosen):
    """The weighted mean over the chosen samples, each alone; and their trained tokens."""
    loss = weight_sum = tokens = 0.0
    for sample in chosen:
        span = slice(samples.offsets[sample], samples.offsets[sample + 1])
        ids, labels, weights = (np.array(part[span]) for part in (samples.input_ids, samples.labels, samples.weights))
        logits = model(torch.from_numpy(ids).long()[None])[0, :-1]
        targets = torch.from_numpy(labels).long()[1:]
        each = torch.nn.functional.cross_entropy(logits, targets, ignore_index=NOT_TRAINED, reduction="none")
        loss += (each * torch.from_numpy(weights)[1:]).sum().item()
        weight_sum += weights[1:].astype(np.float64).sum()
        tokens += (labels[1:] != NOT_TRAINED).sum()
    return loss / weight_sum, tokens


def test_a_run_on_weighted_tokens_reports_the_weighted_mean_and_counts_tokens(data, arguments, tmp_path):
    for split, seed in (("train", 0), ("val", 1)):
        count = len(np.load(data / f"{split}_labels.npy"))
        put_weights(data, split, np.random.default_rng(seed).uniform(0.1, 3, count))
    options = {"sft_data_dir": data, "dtype": "float64", "max_iters": 1, "gradient_accumulation_steps": "none"}
    train_sft.main(arguments(**options, rows_per_step=4, save_interval=1, learning_rate=1e-30, min_lr=0))
    log, model = run_log(tmp_path / "out"), load_pretrained(tmp_path / "out" / "ckpt.pt", dtype=torch.float64)
    splits = open_prepared(data).splits
    stream = RowStream(splits["train"].lengths, block_size=64, seed=1337)
    loss, tokens = expected_loss(model, splits["train"], np.concatenate([stream.row(r) for r in range(4)]))
    (record,) = log["training_iterations"]
    assert (record["loss"], record["trained_tokens"]) == (pytest.approx(loss, rel=1e-9), tokens)
    loss, tokens = expected_loss(model, splits["val"], range(len(splits["val"])))
    assert log["eval_steps"][0]["val_loss"] == pytest.approx(loss, rel=1e-9)
    assert log["eval_steps"][0]["trained_tokens"] == tokens

    train_sft.main(arguments(**options, rows_per_step=4, batch_size=4, out_dir=tmp_path / "at_once"))
    assert losses(run_log(tmp_path / "at_once")) == pytest.approx(losses(log), rel=1e-12)
