"""A base that does not know <|im_start|> and <|im_end|> is found by the lengths of their rows."""

import json

import pytest
import torch

import train_sft
from sft.checkpoint import read_checkpoint
from sft.control_rows import Row, begin_with_mean, strange_rows, told
from sft.errors import UserError
from tests.test_start_checks import base, model  # noqa: F401
from tests.test_train import run_log
from tests.tiny import tiny_model

META = {"vocab_size": 90, "im_start_id": 88, "im_end_id": 89}  # of a model with 97 rows


def set_length(weight: torch.Tensor, row: int, *, medians: float) -> None:
    with torch.no_grad():
        length = torch.linalg.vector_norm(weight[: META["vocab_size"]], dim=1).median()
        weight[row] *= medians * length / torch.linalg.vector_norm(weight[row])


@pytest.mark.parametrize(
    ("medians", "is_strange"),
    [(0, True), (0.1, True), (0.24, True), (0.26, False), (1, False), (3.9, False), (4.1, True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_strange_from_four_times_the_median_on_or_down_to_a_quarter(medians, is_strange, dtype):
    drawn = tiny_model(weight_tying=True, dtype=dtype)
    set_length(drawn.token_embeddings.weight, META["im_end_id"], medians=medians)
    found = strange_rows(drawn, META)
    assert [(row.token, row.part) for row in found] == ([("<|im_end|>", "embedding")] if is_strange else [])
    for row in found:
        assert row.length == pytest.approx(medians * row.median, rel=0.02)


def test_an_untied_head_is_looked_at_too():
    drawn = tiny_model(weight_tying=False)
    set_length(drawn.lm_head.weight, META["im_start_id"], medians=0.01)
    (row,) = strange_rows(drawn, META)
    assert row[:2] == ("<|im_start|>", "head")


def test_rows_beyond_the_tokenizers_ids_count_for_nothing():
    drawn = tiny_model(vocab_size=400)
    with torch.no_grad():
        drawn.token_embeddings.weight[META["vocab_size"] :] = 0  # most rows, and the median of all
    assert strange_rows(drawn, META) == []
    set_length(drawn.token_embeddings.weight, META["im_end_id"], medians=0.01)
    assert len(strange_rows(drawn, META)) == 1


def test_a_mended_row_is_the_mean_of_the_tokens_that_are_no_control_tokens():
    drawn = tiny_model(weight_tying=False)
    for weight, medians in ((drawn.token_embeddings.weight, 0.01), (drawn.lm_head.weight, 1)):
        set_length(weight, META["im_end_id"], medians=medians)
    before = {name: value.clone() for name, value in drawn.state_dict().items()}
    begin_with_mean(drawn, META, strange_rows(drawn, META))
    expected = before["token_embeddings.weight"].clone()
    expected[89] = expected[:88].mean(dim=0)
    torch.testing.assert_close(drawn.token_embeddings.weight, expected)
    assert torch.equal(drawn.lm_head.weight, before["lm_head.weight"])


@pytest.mark.parametrize(
    ("mends", "are_trained", "ending"),
    [
        (True, True, "they begin as the mean of all others"),
        (False, True, "they are trained from there; --untrained_rows=mean begins with"),
        (False, False, "so answers may not end; --train_embeddings trains them; another base knows them"),
    ],
)
def test_the_remedies_are_those_of_the_run(mends, are_trained, ending):
    rows = [Row("<|im_end|>", "embedding", 0.01, 0.79), Row("<|im_end|>", "head", 0.02, 0.5)]
    sentence = told(rows, source="base.pt", begins_with_mean=mends, are_trained=are_trained)
    assert sentence.startswith("base.pt seems not to know the tokens of a conversation, by the lengths of their rows: ")
    assert (
        "embedding of <|im_end|> (0.01, the median is 0.79), head of <|im_end|> (0.02, the median is 0.5)" in sentence
    )
    assert ending in sentence


def test_a_run_from_such_a_base_warns_once_and_mends_it_where_asked(arguments, prepared, base, tmp_path, capsys):  # noqa: F811
    path, content = base
    options = {"model": "none", "checkpoint_path": path, "max_iters": 1, "learning_rate": 1e-12, "min_lr": 0}
    train_sft.main(arguments(**options, out_dir=tmp_path / "well"))
    assert "seems not to know" not in capsys.readouterr().out
    end = json.loads((prepared / "meta.json").read_text())["im_end_id"]
    content["model"]["token_embeddings.weight"][end] = 0
    torch.save(content, path)
    for choice in ("keep", "mean"):
        train_sft.main(arguments(**options, out_dir=tmp_path / choice, untrained_rows=choice))
        assert capsys.readouterr().out.count("warning  ") == 1
        (event,) = (event for event in run_log(tmp_path / choice)["events"] if event["kind"] == "untrained_rows")
        assert {(row["token"], row["part"], row["length"]) for row in event["rows"]} == {("<|im_end|>", "embedding", 0)}
        row = read_checkpoint(tmp_path / choice / "ckpt.pt")["model"]["token_embeddings.weight"][end]
        assert (float(row.abs().max()) > 1e-6) == (choice == "mean")
    train_sft.main(arguments(**options, out_dir=tmp_path / "keep", resume="required"))
    assert "seems not to know" not in capsys.readouterr().out  # it goes on from a checkpoint


def test_adapters_alone_cannot_keep_a_mended_row(arguments, tmp_path):
    (tmp_path / "base.pt").write_bytes(b"")
    options = {"model": "none", "checkpoint_path": tmp_path / "base.pt", "lora_rank": 2, "untrained_rows": "mean"}
    with pytest.raises(UserError, match="untrained_rows=mean needs train_embeddings"):
        train_sft.main(arguments(**options))
