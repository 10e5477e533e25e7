import numpy as np
import pytest
import torch

from sft.batches import Document, TrainLoader, bucket, dropout_seed, make_batch
from sft.packing import RowStream
from sft.samples import NOT_TRAINED
from tests.spread_worker import samples_of
from tests.tiny import random_documents


def batch_of(*documents, block_size=12, **options):
    return make_batch([list(documents)], block_size=block_size, pad_id=9, **options)


def test_the_target_of_a_position_is_the_label_of_the_next_token_of_its_document():
    first = Document(np.array([1, 2, 3]), np.array([1, NOT_TRAINED, 3]))
    second = Document(np.array([4, 5]), np.array([4, 5]))
    batch = batch_of(first, second)
    # the first token of a document is never a target: label 1 and label 4 are not predicted by anything
    assert batch.trained.tolist() == [1, 3]
    assert batch.targets.tolist() == [3, 5]
    assert batch.weights is None


def test_positions_restart_and_the_padding_is_a_document_of_its_own():
    batch = batch_of(*random_documents([3, 1, 4]))
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.documents.ids[0].tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert batch.input_ids[0, 8:].tolist() == [9] * 4
    assert batch.tokens == 8
    assert batch.attended_pairs == 6 + 1 + 10


def test_weights_travel_with_their_targets():
    weighted = Document(np.array([1, 2, 3]), np.array([NOT_TRAINED, 2, 3]), np.array([0.0, 0.5, 2.0], dtype=np.float32))
    plain = Document(np.array([4, 5]), np.array([NOT_TRAINED, 5]))
    batch = batch_of(weighted, plain)
    assert batch.weights is not None
    assert batch.weights.tolist() == [0.5, 2.0, 1.0]
    assert batch.targets.tolist() == [2, 3, 5]


def test_a_weight_belongs_to_the_token_at_its_place_which_the_position_before_it_predicts():
    """Shifted like the labels: the weight of a document's first token counts for nothing."""
    document = Document(np.arange(4), np.arange(4), np.array([8.0, 1.0, 0.5, 0.25], dtype=np.float32))
    batch = batch_of(*random_documents([3], trained_share=0.0, weighted=True), document)
    assert batch.trained.tolist() == [3, 4, 5]
    assert batch.targets.tolist() == [1, 2, 3]
    assert batch.weights.tolist() == [1.0, 0.5, 0.25]
    assert batch.trained_tokens == 3


def test_an_all_masked_batch_has_no_trained_positions():
    batch = batch_of(*random_documents([5, 7], trained_share=0.0))
    assert batch.trained_tokens == 0
    assert batch.trained.dtype == batch.targets.dtype == torch.int64


def test_dropout_seeds_differ_between_seeds_steps_and_micro_batches():
    seeds = {dropout_seed(seed, step, micro) for seed in range(3) for step in range(5) for micro in range(4)}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**63 for seed in seeds)


def loader(rank, world_size, *, rows_per_step=6, weighted=False):
    samples = samples_of(random_documents([7, 12, 3, 9, 12, 5, 8, 11, 4, 10], weighted=weighted))
    stream = RowStream(samples.lengths, block_size=12, seed=0)
    sizes = {"batch_size": 1, "rows_per_step": rows_per_step, "rank": rank, "world_size": world_size}
    return TrainLoader(samples, stream, **sizes, pad_id=0, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_share_the_rows_of_a_step_and_each_keeps_its_dropout(world_size):
    def content(batches):
        return [(batch.input_ids.tolist(), batch.dropout_seed) for batch in batches]

    alone = loader(0, 1).step(3, rows_seen=18)
    shared = [loader(rank, world_size).step(3, rows_seen=18) for rank in range(world_size)]
    assert {step.target_weight for step in shared} == {alone.target_weight}
    shares = [content(step.batches) for step in shared]
    assert [share[m] for m in range(6 // world_size) for share in shares] == content(alone.batches)


def test_the_normaliser_of_a_step_is_the_number_of_its_trained_tokens():
    step = loader(0, 1).step(0, rows_seen=0)
    assert step.target_weight == sum(batch.trained_tokens for batch in step.batches)


def test_the_normaliser_of_a_weighted_step_is_the_sum_of_its_target_weights():
    step = loader(0, 1, weighted=True).step(0, rows_seen=0)
    batches = list(step.batches)
    assert step.target_weight == pytest.approx(sum(batch.weights.double().sum().item() for batch in batches), rel=1e-12)
    assert step.target_weight != pytest.approx(sum(batch.trained_tokens for batch in batches), rel=1e-3)


def test_the_rows_of_a_step_follow_those_seen_whatever_the_step_is_called():
    big, small = loader(0, 1, rows_per_step=6), loader(0, 1, rows_per_step=3)
    whole = [batch.input_ids.tolist() for batch in big.step(1, rows_seen=6).batches]
    halves = [batch.input_ids.tolist() for seen in (6, 9) for batch in small.step(9, rows_seen=seen).batches]
    assert whole == halves


def test_buckets_hold_every_count_waste_little_and_are_few():
    sizes = {bucket(count) for count in range(32769)}
    for count in (0, 1, 127, 128, 129, 4096, 5000, 16384, 16385, 32768):
        assert count <= bucket(count) <= max(count + 128, count * 33 / 32)
        assert bucket(bucket(count)) == bucket(count)
    assert bucket(0) == 128
    assert len(sizes) <= 130


def test_on_a_gpu_a_batch_is_filled_up_to_a_bucket(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
    documents = random_documents([5, 7], weighted=True)
    plain, filled = batch_of(*documents), batch_of(*documents, device="cuda")
    n = plain.trained_tokens
    assert filled.trained_tokens == n > 0
    for name, fill in (("trained", 0), ("targets", NOT_TRAINED), ("weights", 0)):
        tensor = getattr(filled, name)
        assert torch.equal(tensor[:n], getattr(plain, name))
        assert tensor[n:].tolist() == [fill] * (128 - n)
