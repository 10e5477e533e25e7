"""Attention on a CUDA GPU: every back end that can be had beside the definition in float64."""

import json

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import train_sft
from sft.attention import BackEnd, Documents, causal_attention
from sft.attention_choice import BY_TRIAL, Heads, active, documents_of, drawn, try_out, unsupported
from sft.batches import make_batch
from sft.prefetch import Ahead
from tests.conftest import SHAPE
from tests.tiny import random_documents, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

GPU = torch.device("cuda", 0)
# One-token documents, one beyond a block of 128, a padded tail, a row that is one document, a row filled to the end.
ROWS = [[1, 200, 37, 1], [320], [128, 128, 64]]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 2e-3}  # of the norm


def results(back_end: BackEnd, inputs: list[Tensor], grad: Tensor, documents: Documents) -> list[Tensor]:
    mixed = causal_attention(*inputs, documents=documents, dropout=0.0, back_end=back_end)
    return [mixed.detach(), *torch.autograd.grad(mixed, inputs, grad)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [Heads(4, 4, 64), Heads(4, 2, 64), Heads(16, 1, 128)], ids=str)
@pytest.mark.parametrize("name", [*BY_TRIAL, "varlen_whole_rows", "definition"])
def test_every_back_end_computes_the_definition_in_value_and_gradient(name, heads, dtype):
    whole_rows = name == "varlen_whole_rows"
    documents = documents_of([[320], [320]] if whole_rows else ROWS, 320, GPU)
    if name == "flex" and heads.key != 2:
        pytest.skip("each shape is compiled for seconds")
    if name != "definition" and (problem := unsupported(name, heads, dtype, documents)) is not None:
        pytest.skip(f"{name} {problem}")
    *inputs, grad = drawn(heads, dtype, documents)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = results("definition", exact, grad.double(), documents)
    with active(name):
        found = results("varlen" if name.startswith("flash") else name, inputs, grad, documents)
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - two).norm() <= TOLERANCE[dtype] * two.norm()


def test_dropout_under_a_mask_leaves_out_and_scales_up_probabilities():
    documents = documents_of(ROWS, 320, GPU)
    q, k, v, _ = drawn(Heads(4, 2, 64), torch.bfloat16, documents)
    sums = causal_attention(q, k, torch.ones_like(v), documents=documents, dropout=0.5)
    assert sums.min() < 0.9
    assert sums.max() > 1.1
    assert sums.float().mean() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("back_end", ["varlen", "flex"])
def test_changing_one_document_leaves_the_others_bit_identical(back_end):
    documents = documents_of(ROWS, 320, GPU)
    q, k, v, _ = (x.detach() for x in drawn(Heads(4, 2, 64), torch.bfloat16, documents))
    before = causal_attention(q, k, v, documents=documents, dropout=0.0, back_end=back_end)
    for x in (q, k, v):
        x[0, :, 1:201] = x[0, :, 1:201] * 3 + 1
    after = causal_attention(q, k, v, documents=documents, dropout=0.0, back_end=back_end)
    same = (before == after).all(dim=-1).all(dim=1)
    assert same[0, :1].all()
    assert same[0, 201:].all()
    assert same[1:].all()
    assert not same[0, 1:201].any()


@pytest.mark.parametrize("name", ["varlen", "varlen_whole_rows"])
def test_neither_a_batch_nor_attention_waits_for_the_device(name):
    batch_rows = [random_documents([100, 27]), random_documents([128])]
    make_batch(batch_rows, block_size=128, pad_id=0, device=GPU)  # the first pinned memory may wait
    documents = documents_of([[128], [128]], 128, GPU)
    *inputs, grad = drawn(Heads(4, 2, 64), torch.bfloat16, documents)
    results(name, inputs, grad, documents)  # libraries are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        documents = make_batch(batch_rows, block_size=128, pad_id=0, device=GPU).documents
        documents.prepare(name)
        results(name, inputs, grad, documents)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("back_end", ["varlen", "varlen_whole_rows", "flex"])
def test_compiled_blocks_are_translated_once_and_follow_the_plain_ones(back_end):
    torch._dynamo.reset()
    counters.clear()
    shape = {"head_dim": 32, "block_size": 256}
    plain, model = tiny_model(**shape).cuda(), tiny_model(**shape).cuda()
    model.set_attention(back_end)
    model.compile_blocks()
    weights = torch.randn(1, 256, 32, device=GPU)
    for lengths in ([30, 20, 9], [256], [1] * 9, [200, 56], [128, 128]):
        batch = make_batch([random_documents(lengths)], block_size=256, pad_id=0, device=GPU)
        found = []
        for module in (plain, model):
            module.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                hidden = module.hidden_states(batch.input_ids, batch.positions, batch.documents)
            (hidden.float() * weights).sum().backward()
            found.append([hidden, *(parameter.grad for parameter in module.parameters())])
        for one, two in zip(*found, strict=True):
            assert (one.float() - two.float()).norm() <= 0.1 * one.float().norm()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_batches_made_ahead_bring_their_documents_along():
    made = (make_batch([random_documents([40, 9])], block_size=64, pad_id=0, device=GPU) for _ in range(3))
    ahead = Ahead(made, device=GPU)
    for batch in ahead:
        documents = batch.documents
        *inputs, grad = drawn(Heads(4, 2, 32), torch.bfloat16, documents)
        exact = results("definition", inputs, grad, documents)
        for one, two in zip(results("varlen", inputs, grad, documents), exact, strict=True):
            assert (one - two).norm() <= 2e-2 * two.norm()
    ahead.close()


def test_the_choice_is_one_that_works_and_is_told_with_the_times_of_all():
    documents = documents_of([[600, 600, 600, 200]] * 4, 2048, GPU)
    heads = Heads(16, 8, 128)
    outcomes = {name: try_out(name, heads, torch.bfloat16, documents) for name in BY_TRIAL}
    print(outcomes)
    assert outcomes["varlen"].problem is None
    assert outcomes["flex"].problem is None
    assert outcomes["varlen"].milliseconds < outcomes["sdpa"].milliseconds


@pytest.mark.parametrize("choice", ["auto", "varlen", "flex", "sdpa"])
def test_a_run_takes_the_back_end_that_it_says(arguments, tmp_path, choice):
    settings = {"model": {**SHAPE, "head_dim": 16}, "device": "cuda", "compile": False, "out_dir": tmp_path / "run"}
    train_sft.main(arguments(**settings, attention=choice, max_iters=20))
    (path,) = (tmp_path / "run").glob("run_*.json")
    log = json.loads(path.read_text())
    sentence = log["startup_info"]["sentences"]["attention"]
    assert ("fastest here: varlen " if choice == "auto" else f"attention={choice}") in sentence
    losses = [record["loss"] for record in log["training_iterations"]]
    assert losses[-1] < losses[0]
