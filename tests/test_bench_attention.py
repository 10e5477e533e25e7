"""The benchmark of attention: what takes turns computes the same, and what is told is what was measured."""

import json

import numpy as np
import pytest
import torch

from bench import attention
from sft.attention_choice import Heads
from tests.devices import gpu_test

ROWS = {"documents": (2, 64, 3, 30), "whole": (2, 32, 0, 0)}


def report(device: str, tmp_path, monkeypatch) -> list[dict]:
    monkeypatch.setitem(attention.ROWS, device, ROWS)
    monkeypatch.setitem(attention.HEADS, device, Heads(4, 2, 16))
    attention.main([f"--device={device}", "--seconds=0.1", f"--out_dir={tmp_path}"])
    (path,) = tmp_path.glob("attention_*.json")
    return json.loads(path.read_text())["rows"]


def test_all_that_can_be_had_take_turns_on_the_same_rows(tmp_path, monkeypatch):
    documents, whole = report("cpu", tmp_path, monkeypatch)
    names = {attention.BY_DOCUMENT, attention.MASK, attention.REPEATED}
    assert set(documents["providers"]) == set(whole["providers"]) == names
    assert whole["rows"]["pairs"] == 2 * 32 * 33 // 2
    for row in whole["providers"].values():
        assert row["tflops"] * row["milliseconds"] * 1e9 == pytest.approx(14 * 4 * 16 * whole["rows"]["pairs"])
        assert 0 < row["least"] <= row["milliseconds"]
    assert documents["left_out"] == {}


def test_what_takes_turns_computes_the_same():
    documents = attention.documents_of([[20, 12], [32]], 32, torch.device("cpu"))
    q, k, v, _ = attention.drawn(Heads(4, 2, 16), torch.float64, documents)
    exact = attention.by_back_end(q, k, v, documents=documents, name="definition")
    for repeats in (False, True):
        torch.testing.assert_close(attention.under_a_mask(q, k, v, documents=documents, repeats=repeats), exact)
    torch.testing.assert_close(attention.by_back_end(q, k, v, documents=documents, name="by_document"), exact)


def test_rows_are_filled_to_the_last_token():
    lengths = attention.row_lengths(2048, 300, 900, np.random.default_rng(1))
    assert sum(lengths) == 2048
    assert all(300 <= length <= 900 for length in lengths[:-1])
    assert attention.row_lengths(2048, 0, 0, np.random.default_rng(1)) == [2048]


@gpu_test
def test_on_a_gpu_the_back_ends_take_part_or_say_why_not(tmp_path, monkeypatch):
    documents, whole = report("cuda", tmp_path, monkeypatch)
    assert {"varlen", "flex"} <= set(documents["providers"])
    assert "varlen_whole_rows" in {**whole["providers"], **whole["left_out"]}
    assert "varlen_whole_rows" not in documents["providers"]
