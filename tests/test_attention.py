import math

import pytest
import torch
from torch import Tensor, library
from torch._dynamo.utils import counters

from sft import attention_backends
from sft.attention import BackEnd, Documents, KeyValueCache, causal_attention
from sft.batches import make_batch
from tests.tiny import random_documents, tiny_model

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


def lengths_of(rows: list[list[int]], block_size: int = 16) -> Documents:
    return Documents.of_lengths(rows, block_size=block_size, place=torch.from_numpy)


def test_documents_of_lengths_are_those_that_the_ids_tell():
    for rows in ([[1, 9, 3], [4, 1, 2, 9]], [[16], []], [[1] * 16, [15]]):
        known = lengths_of(rows)
        found = Documents(known.ids).spans
        assert list(known.spans.lengths) == found.lengths
        assert torch.equal(known.spans.offsets, found.offsets)
        assert torch.equal(known.spans.extent, found.extent)
        assert known.spans.offsets.dtype == torch.int32
    assert torch.equal(lengths_of([[1, 9, 3], [4, 1, 2]]).ids, IDS)
    assert known.spans.extent.tolist() == [18, 15]


def test_the_operator_of_documents_tells_the_compiler_the_truth():
    q, k, v = (x.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for x in random_heads(2))
    spans = Documents(IDS).spans
    operator = torch.ops.sft.document_attention.default
    library.opcheck(operator, (q, k, v, spans.offsets, spans.extent, 2, "by_document"))


@pytest.mark.parametrize("back_end", ["sdpa", "varlen", "flex"])
def test_a_compiled_function_serves_all_documents_without_a_mask(back_end: BackEnd, monkeypatch):
    """On a CPU FlashAttention's place is taken by the kernel for CPUs, and FlexAttention has no gradients."""
    monkeypatch.setitem(attention_backends.KERNELS, "varlen", attention_backends.KERNELS["by_document"])
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(backend="aot_eager" if back_end != "flex" else "eager", fullgraph=True)
    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        return causal_attention(q, k, v, documents=documents, dropout=0.0, back_end=back_end)

    inputs = random_heads(2)
    if back_end == "flex":
        inputs = tuple(x.detach() for x in inputs)
    for rows in ([[1, 9, 3], [4, 1, 2]], [[16], [16]], [[1] * 16, [2, 14]], [[5], []]):
        documents = lengths_of(rows)
        documents.prepare(back_end, compiled=True)
        ours = attend(*inputs, documents)
        exact = causal_attention(*inputs, documents=Documents(documents.ids), dropout=0.0, back_end="definition")
        found, expected = [ours], [exact]
        if back_end != "flex":
            found += torch.autograd.grad(ours.square().sum(), inputs)
            expected += torch.autograd.grad(exact.square().sum(), inputs)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)
        assert "mask" not in vars(documents)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("back_end", ["sdpa", "varlen"])
@pytest.mark.slow
def test_compiled_blocks_are_translated_once_for_all_documents(back_end: BackEnd, monkeypatch):
    monkeypatch.setitem(attention_backends.KERNELS, "varlen", attention_backends.KERNELS["by_document"])
    torch._dynamo.reset()
    counters.clear()
    plain, model = tiny_model(), tiny_model()
    model.set_attention(back_end)
    model.compile_blocks(backend="aot_eager")
    for lengths in ([30, 20, 9], [64], [1, 2, 3, 4, 5, 6, 7, 8, 9], [63, 1]):
        batch = make_batch([random_documents(lengths)], block_size=64, pad_id=0)
        for module in (plain, model):
            module.zero_grad()
            module(batch.input_ids, batch.positions, batch.documents).square().sum().backward()
        for one, two in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": False, "num_key_value_heads": 4}, {"position_encoding": "learned_absolute", "bias": True}],
)
def test_under_autocast_queries_keys_and_values_are_half_precision(changes: dict, monkeypatch):
    """As FlashAttention wants them, without a cast of its own."""
    dtypes = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **_others: object) -> Tensor:
        dtypes.extend((q.dtype, k.dtype, v.dtype))
        return q

    monkeypatch.setattr("model_builder.causal_attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        tiny_model(**changes)(torch.zeros(1, 16, dtype=torch.int64))
    assert dtypes == [torch.bfloat16] * 6


def test_blocks_of_scores_are_left_out_where_no_document_has_them():
    from torch.nn.attention.flex_attention import create_block_mask

    for block_size, rows in ((384, [[384], [100, 284], [128, 128, 128]]), (300, [[1, 150, 60], [300], [1] * 300])):
        documents = lengths_of(rows, block_size)
        seen = attention_backends._within_documents(documents.ids)
        exact = create_block_mask(seen, 3, None, block_size, block_size, device="cpu")
        assert torch.equal(documents.block_mask.to_dense(), exact.to_dense())
        whole, exact_whole = documents.block_mask.full_kv_num_blocks, exact.full_kv_num_blocks
        assert torch.equal(whole[..., :2], exact_whole[..., :2])
        assert (whole >= exact_whole).all()  # a last block that is cut off counts as whole


def test_a_batch_knows_its_documents_without_reading_them_from_the_device(monkeypatch):
    batch = make_batch([random_documents([9, 20]), random_documents([30])], block_size=32, pad_id=0)
    monkeypatch.setattr(Tensor, "nonzero", None)
    assert batch.documents.spans.lengths == [9, 20, 3, 30, 2]


@pytest.mark.parametrize(("name", "rows"), [("varlen", [[1, 9, 3], [4, 1, 2]]), ("whole_rows", [[16], [16]])])
def test_the_kernels_of_a_gpu_are_called_as_their_schemas_and_shapes_say(name: str, rows: list[list[int]]):
    """On tensors without content: PyTorch checks the arguments, and tells the shapes of the results."""
    N, H, G, C = 32, 4, 2, 64
    q, k, v, grad = (torch.empty(N, n, C, dtype=torch.bfloat16, device="meta") for n in (H, G, G, H))
    spans = Documents.of_lengths(rows, block_size=16, place=lambda array: torch.from_numpy(array).to("meta")).spans
    offsets = spans.offsets[: len(spans.lengths) + 1]
    out, lse = attention_backends.KERNELS[name].forward(q, k, v, offsets, spans.extent)
    assert (out.shape, out.dtype) == ((N, H, C), torch.bfloat16)
    assert (lse.numel(), lse.dtype) == (N * H, torch.float32)
    kept = lse.reshape(H, N)
    gradients = attention_backends.KERNELS[name].backward(grad, q, k, v, out, kept, offsets, spans.extent)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


def test_whole_rows_are_told_from_documents_when_the_operator_runs():
    def kernel(rows: list[list[int]]) -> attention_backends.Kernel:
        spans = lengths_of(rows).spans
        return attention_backends._kernel("varlen_whole_rows", spans.extent, len(rows))

    whole, varlen = attention_backends.KERNELS["whole_rows"], attention_backends.KERNELS["varlen"]
    assert kernel([[16], [16]]) is whole
    assert kernel([[16], []]) is whole  # padding is a document, too
    for rows in ([[15, 1], [16]], [[15], [16]], [[8, 8], [8, 8]]):
        assert kernel(rows) is varlen
