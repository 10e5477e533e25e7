import copy
import json
import math

import pytest
import torch

from sft.comparison import compare, outcome

TREE = {
    "model": {"weight": torch.tensor([[1.0, 0.0], [math.nan, 3.0]]), "half": torch.ones(3, dtype=torch.bfloat16)},
    "state": [{"step": torch.tensor(4.0)}, {"flags": torch.tensor([True, False])}],
    "loss": 0.1,
    "none": None,
    "not": math.nan,
    "empty": torch.zeros(0),
}


def changed(*path, value):
    tree = copy.deepcopy(TREE)
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return tree


def test_what_is_equal_to_the_bit_has_no_differences():
    result = compare(TREE, copy.deepcopy(TREE))
    assert (result.values, result.differences) == (8, [])


@pytest.mark.parametrize(
    ("path", "value", "name", "sentence", "size"),
    [
        (
            ("model", "weight"),
            torch.tensor([[1.0, 0.0], [math.nan, 3.5]]),
            "model.weight",
            "1 of 4 numbers differ, by at most 0.5",
            0.5,
        ),
        (
            ("model", "weight"),
            torch.tensor([[1.0, -0.0], [math.nan, 3.0]]),
            "model.weight",
            "1 of 4 numbers differ, by at most 0",
            0.0,
        ),
        (
            ("model", "weight"),
            torch.tensor([[1.0, 0.0], [2.0, 3.0]]),
            "model.weight",
            "1 of 4 numbers differ, by at most inf",
            math.inf,
        ),
        (("model", "half"), torch.ones(3), "model.half", "bfloat16 of (3,) and float32 of (3,)", math.inf),
        (
            ("model", "half"),
            torch.ones(2, dtype=torch.bfloat16),
            "model.half",
            "bfloat16 of (3,) and bfloat16 of (2,)",
            math.inf,
        ),
        (("state", 0, "step"), torch.tensor(5.0), "state[0].step", "1 of 1 numbers differ, by at most 1", 1.0),
        (
            ("state", 1, "flags"),
            torch.tensor([True, True]),
            "state[1].flags",
            "1 of 2 numbers differ, by at most 1",
            1.0,
        ),
        (("loss",), 0.5, "loss", "0.1 and 0.5", 0.4),
        (("loss",), None, "loss", "0.1 and None", math.inf),
        (("none",), 0, "none", "None and 0", math.inf),
        (("more",), 1, "more", "nothing and 1", math.inf),
    ],
)
def test_each_difference_has_a_name_a_sentence_and_a_size(path, value, name, sentence, size):
    (difference,) = compare(TREE, changed(*path, value=value)).differences
    assert difference == (name, sentence, pytest.approx(size))


def test_a_number_whose_last_bit_differs_is_another_one():
    (difference,) = compare(TREE, changed("loss", value=math.nextafter(0.1, 1))).differences
    assert difference.name == "loss"


def test_what_the_other_has_not_is_a_difference():
    without = {key: value for key, value in TREE.items() if key != "model"}
    assert [each.name for each in compare(TREE, without).differences] == ["model"]


def write_run(folder, *, losses=((1, 0.5), (2, 0.25)), resumed=((2, 0.25),)):
    """A checkpoint of two steps, and the logs of two starts of which the second one repeats a step."""
    counters = {"iter_num": 2, "rows_seen": 4, "order": "ab", "trained_tokens_seen": 9, "val_loss": 1.0}
    content = {"model": {"w": torch.ones(2)}, "optimizer": {}, "best_val_loss": 1.0, "watch": {}, **counters}
    torch.save({**content, "config": {"out_dir": str(folder)}}, folder / "ckpt_000002.pt")
    numbers = {"grad_norm": 1.0, "lr": 0.1, "trained_tokens": 3, "tokens": 5, "skipped": 0, "order": "cd"}
    for place, told in enumerate((losses, resumed)):
        records = [{"iter": step, "loss": loss, **numbers, "time_ms": step * 7} for step, loss in told]
        log = {"startup_info": {}, "training_iterations": records, "eval_steps": [], "events": [], "checkpoints": []}
        (folder / f"run_20260101_00000{place}.json").write_text(json.dumps(log))
    return outcome(folder, step=2)


def test_a_step_that_was_told_of_twice_alike_is_told_of_once(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    one = write_run(tmp_path / "one")
    assert compare(one, write_run(tmp_path / "two", losses=((1, 0.5), (2, 0.25)), resumed=())).differences == []
    other = write_run(tmp_path / "three", resumed=((2, 0.125),))
    assert [each.name for each in compare(one, other).differences] == ["logged steps.step 2"]
