import io
import os
import time

import pytest

import prepare_sft
from sft import preparation
from sft.errors import EXIT_FAILED, UserError
from sft.workers import Workers
from tests.preparing import dialogue, exchange, prepare, write_lines


def later_the_smaller(state, item):
    time.sleep(0.002 * (10 - item))
    return state + item, os.getpid()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_order_from_so_many_processes(count):
    with Workers(100, count) as workers:
        found = list(workers.map(later_the_smaller, range(10)))
    assert [number for number, _ in found] == list(range(100, 110))
    processes = {process for _, process in found}
    assert (processes == {os.getpid()}) == (count == 1)
    assert len(processes) <= count


@pytest.mark.parametrize("items", [[], [5]])
def test_a_single_item_needs_no_process(items):
    with Workers(100, 2) as workers:
        assert list(workers.map(later_the_smaller, items)) == [(105, os.getpid())] * len(items)


def test_two_items_for_each_process_are_taken_ahead_and_no_more():
    taken = []

    def items():
        for item in range(10):
            taken.append(item)
            yield item

    with Workers(0, 2) as workers:
        results = workers.map(later_the_smaller, items())
        next(results)
        assert len(taken) <= 5
        results.close()


def fail_at_3(state, item):
    if item == 3:
        raise ValueError("three")
    return item


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_in_a_process_is_the_callers(count):
    with Workers(None, count) as workers:
        results = workers.map(fail_at_3, range(10))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="three"):
            next(results)


def die_at_3(state, item):
    if item == 3:
        os._exit(1)
    return item


def test_a_process_that_dies_is_one_error_with_a_remedy():
    with (
        pytest.raises(UserError, match="a worker process was killed, perhaps for want of memory") as caught,
        Workers(None, 2) as workers,
    ):
        list(workers.map(die_at_3, range(10)))
    assert "fewer --workers" in str(caught.value)
    assert caught.value.exit_status == EXIT_FAILED


def render_and_die(recipe, chunk):
    if chunk.records[0].record > 20:
        os._exit(9)
    return preparation.render_chunk(recipe, chunk)


def test_a_process_that_dies_leaves_no_data(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK_RECORDS", 5)
    monkeypatch.setattr(prepare_sft, "render_chunk", render_and_die)
    with pytest.raises(UserError, match="a worker process was killed"):
        prepare(tmp_path, [exchange(f"What is {i}?", "a cat") for i in range(60)], workers=2)
    assert not (tmp_path / "data").exists()


def mixed(number):
    """Records of every kind, by turns; the last ones repeat."""
    thought = {"reasoning_content": f"the hat {number}"}
    return [
        exchange(f"What is {number}?", "a cat"),
        dialogue(("user", f"{number}"), ("assistant", "Paris", thought), ("user", "b"), ("assistant", "mat")),
        {"text": f"the cat and the hat sat on the mat {number}"},
        dialogue(("user", f"weigh {number}"), ("assistant", "cat", {"weight": 0.5 + number % 2 / 2})),
        {"text": number},
        exchange("What is it?", f"the cat sat on the mat {number % 3}"),
    ]


MIXED = [record for number in range(12) for record in mixed(number)]
SETTINGS = {
    "chatml": {},
    "qwen3": {"template": "qwen3"},
    "max_samples": {"template": "qwen3", "max_samples": 31},
    "split": {"too_long": "split", "block_size": 24, "train_on": "all"},
    "cut": {"too_long": "cut", "block_size": 48, "system_prompt": "Say"},
}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", SETTINGS)
def test_any_number_of_processes_writes_the_same_bytes(tmp_path, monkeypatch, name):
    settings = {"val_fraction": 0.3, "bad_records": "skip", "max_bad_fraction": 0.5, **SETTINGS[name]}
    monkeypatch.setattr(preparation, "CHUNK_RECORDS", 4)
    data = prepare(tmp_path, MIXED, workers=1, **settings)
    whole = files_of(tmp_path / "data")
    assert {"meta.json", "train_weights.npy", "val_labels.npy", "chat_template.jinja"} < whole.keys()
    assert data.meta["ledger"]["conversations"]["duplicate"] >= 1
    assert data.meta["ledger"]["records"]["bad"] > 1
    for workers in (2, 3):
        prepare(tmp_path, MIXED, workers=workers, **settings)
        assert files_of(tmp_path / "data") == whole, workers


def pipe_in(monkeypatch, content):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_standard_input_is_read_as_often_as_needed_and_its_copy_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK_RECORDS", 5)
    settings = {"val_fraction": 0.3, "near_duplicates": True, "bad_records": "skip", "max_bad_fraction": 1}
    of_file = prepare(tmp_path, MIXED, out="a", **settings)
    pipe_in(monkeypatch, (tmp_path / "input.jsonl").read_bytes())
    of_pipe = prepare(tmp_path, out="b", input="-", workers=2, **settings)
    assert of_pipe.fingerprint == of_file.fingerprint
    assert of_pipe.meta["ledger"] == of_file.meta["ledger"]
    (source,), (told,) = of_file.meta["sources"], of_pipe.meta["sources"]
    assert told == {**source, "path": "standard input"}
    assert of_pipe.meta["bad_records"][0].startswith("standard input:5: 'text' must be a string")
    assert files_of(tmp_path / "a").keys() == files_of(tmp_path / "b").keys()


@pytest.mark.parametrize("problem", ["bad records", "a process that dies"])
def test_the_copy_of_standard_input_is_removed_after_an_error(tmp_path, monkeypatch, problem):
    pipe_in(monkeypatch, write_lines(tmp_path / "piped", MIXED).read_bytes())
    settings = {}
    if problem == "a process that dies":
        monkeypatch.setattr(preparation, "CHUNK_RECORDS", 5)
        monkeypatch.setattr(prepare_sft, "render_chunk", render_and_die)
        settings = {"bad_records": "skip", "max_bad_fraction": 1, "workers": 2}
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="standard input:5" if problem == "bad records" else "was killed"):
        prepare(tmp_path, input="-", **settings)
    assert list((tmp_path / "data").iterdir()) == []
