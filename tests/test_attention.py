import math

import pytest
import torch
from torch import Tensor

from sft.attention import Documents, KeyValueCache, causal_attention

# A one-token document, one that fills most of the row, and a padded tail.
IDS = torch.tensor([[0] + [1] * 9 + [2] * 3 + [3] * 3, [0] * 4 + [1] + [2] * 2 + [3] * 9], dtype=torch.int32)


def definition(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Softmax attention one query at a time, over a list of the keys that it may see."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = [s for s in range(t + 1) if ids[row, s] == ids[row, t]]
                keys, values = k[row, head // group, seen], v[row, head // group, seen]
                shares = torch.softmax(keys @ q[row, head, t] / math.sqrt(q.shape[3]), dim=0)
                out[row, head, t] = shares @ values
    return out


def random_heads(key_heads: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (4, key_heads, key_heads)
    q, k, v = (torch.randn(2, n, 16, 8, generator=generator, dtype=dtype) * 2 for n in heads)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("ids", [IDS, None])
def test_attention_is_the_definition_in_value_and_gradient(key_heads: int, ids: Tensor | None):
    inputs = random_heads(key_heads)
    documents = None if ids is None else Documents(ids)
    ours = causal_attention(*inputs, documents=documents, dropout=0.0)
    theirs = definition(*inputs, torch.zeros_like(IDS) if ids is None else ids)
    weights = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, reference in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_one_document_leaves_the_others_bit_identical(dtype: torch.dtype):
    q, k, v = (x.detach() for x in random_heads(2, dtype))
    before = causal_attention(q, k, v, documents=Documents(IDS), dropout=0.0)
    inside = slice(1, 10)  # the second document of the first row
    for x in (q, k, v):
        x[0, :, inside] = x[0, :, inside] * 100 + 3
    after = causal_attention(q, k, v, documents=Documents(IDS), dropout=0.0)
    assert not torch.equal(before[0, :, inside], after[0, :, inside])
    assert torch.equal(before[0, :, :1], after[0, :, :1])
    assert torch.equal(before[0, :, 10:], after[0, :, 10:])
    assert torch.equal(before[1], after[1])
    assert after.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_a_gpu_computes_the_definition(key_heads: int, dtype: torch.dtype, tolerance: float):
    inputs = random_heads(key_heads)
    expected = definition(*inputs, IDS)
    on_gpu = (x.detach().to("cuda", dtype) for x in inputs)
    ours = causal_attention(*on_gpu, documents=Documents(IDS.cuda()), dropout=0.0)
    torch.testing.assert_close(ours.double().cpu(), expected.detach(), rtol=tolerance, atol=tolerance)


def test_queries_may_be_the_last_of_the_positions():
    q, k, v = random_heads(2)
    for ids in (IDS, None):
        whole = causal_attention(q, k, v, documents=None if ids is None else Documents(ids), dropout=0.0)
        for count in (1, 5):
            documents = None if ids is None else Documents(ids, queries=count)
            last = causal_attention(q[:, :, -count:], k, v, documents=documents, dropout=0.0)
            torch.testing.assert_close(last, whole[:, :, -count:])


@pytest.mark.parametrize("key_heads", [4, 2])
def test_all_ways_on_a_cpu_equal_the_definition_in_value_and_gradient(key_heads: int, monkeypatch):
    inputs, found = random_heads(key_heads), []
    for way in ("definition", "by_document", "one by one", "mask"):
        monkeypatch.setattr(Documents, "way", lambda *_, way=way, **__: way)
        documents = Documents(IDS)
        mixed = causal_attention(*inputs, documents=documents, dropout=0.0)
        found.append([mixed, *torch.autograd.grad(mixed.square().sum(), inputs)])
        assert ("mask" in vars(documents)) == (way in ("definition", "mask"))
    for others in found[1:]:
        for one, two in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


def test_lengths_are_those_of_the_documents_of_all_rows():
    assert Documents(IDS).spans.lengths == [1, 9, 3, 3, 4, 1, 2, 9]
    assert Documents(torch.zeros(2, 3, dtype=torch.int32)).spans.lengths == [3, 3]


def test_positions_restart_in_each_document():
    assert Documents(IDS).positions[0].tolist() == [0, *range(9), 0, 1, 2, 0, 1, 2]
    assert Documents(IDS, queries=4).positions[1].tolist() == [5, 6, 7, 8]


def test_the_mask_is_made_once_for_all_layers():
    documents = Documents(IDS)
    assert documents.mask is documents.mask


def test_dropout_reaches_the_attention_probabilities():
    q, k, v = random_heads(2)
    ones = torch.ones_like(v)  # so that the output is the sum of the probabilities that stay, times 1 / (1 - p)
    torch.manual_seed(0)
    kept = causal_attention(q, k, ones, documents=Documents(IDS), dropout=0.5)
    assert kept.min() == 0.0
    assert kept.max() > 1.2
    whole = causal_attention(q, k, ones, documents=Documents(IDS), dropout=0.0)
    torch.testing.assert_close(whole, torch.ones_like(whole))


def test_a_cache_gives_back_everything_appended_and_forgets_rows():
    cache, parts = KeyValueCache(), [torch.randn(3, 2, length, 4) for length in (5, 1, 1, 7, 1)]
    for part in parts:
        k, v = cache.append(part, -part)
    whole = torch.cat(parts, dim=2)
    assert torch.equal(k, whole)
    assert torch.equal(v, -whole)
    cache.keep(torch.tensor([2, 0]))
    k, _ = cache.append(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))
    assert cache.length == 16
    assert torch.equal(k[:, :, :-1], whole[[2, 0]])
