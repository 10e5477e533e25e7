import pytest

from sft.errors import UserError
from tests.preparing import dialogue, exchange, prepare, texts

WORDS = "the cat and the hat sat on the mat and the cat saw what the hat is of France and Paris is the capital of it"
MANY = [exchange(f"What is {i} and {i}?", f"It is {2 * i}.") for i in range(200)]
HALF = {"val_fraction": 0.5}


def split_of(data):
    """{record: split} of what was kept."""
    return {int(record): name for name, samples in data.splits.items() for record in samples.origins[:, 1]}


def places(data):
    return [
        (leak["validation"].split(" ")[-1], leak["training"].split(" ")[-1]) for leak in data.meta["leaks"]["first"]
    ]


@pytest.fixture
def near_pair(tmp_path):
    """Two texts that nearly equal each other: the first falls to training, the second to validation."""
    pytest.importorskip("datasketch")
    variants = [{"text": f"{WORDS} number {i}"} for i in range(20)]
    where = split_of(prepare(tmp_path, variants, out="alone", **HALF))
    training, validation = (next(r for r, name in where.items() if name == split) for split in ("train", "val"))
    return variants[training - 1], variants[validation - 1]


@pytest.mark.parametrize("order", [1, -1], ids=["training first", "validation first"])
def test_of_two_that_are_nearly_equal_the_one_for_validation_goes(tmp_path, near_pair, order):
    other = exchange("a", "b")
    records = [*near_pair[::order], other]
    data = prepare(tmp_path, records, near_duplicates=True, **HALF)
    training, validation = (1, 2) if order == 1 else (2, 1)
    assert set(split_of(data)) == {training, 3}
    assert split_of(data)[training] == "train"
    assert data.meta["ledger"]["conversations"]["in_training"] == 1
    assert data.meta["ledger"]["tokens"]["dropped"]["in_training"] > len(WORDS.split())
    leaks = data.meta["leaks"]
    assert (leaks["conversations"], leaks["exact"]) == (1, 0)
    assert places(data) == [(str(validation), str(training))]
    assert 0.8 <= leaks["first"][0]["similarity"] < 1


def test_what_is_nearly_equal_stays_where_nobody_asked(tmp_path, near_pair):
    data = prepare(tmp_path, list(near_pair), **HALF)
    assert split_of(data) == {1: "train", 2: "val"}
    assert data.meta["leaks"] == {"conversations": 0, "exact": 0, "first": []}


def test_a_leak_is_told_with_its_places(tmp_path, near_pair, capsys):
    prepare(tmp_path, list(near_pair), near_duplicates=True, **HALF)
    out = capsys.readouterr().out
    source = f"{tmp_path}/input.jsonl"
    assert "validation conversations dropped for being in training: 1, the first:" in out
    assert f"    {source}, record 2 is 9" in out
    assert f"% that of {source}, record 1" in out


@pytest.fixture
def groups(tmp_path):
    """A group that falls to training and one that falls to validation."""
    records = [{**record, "topic": f"topic {i}"} for i, record in enumerate(MANY[:20])]
    where = split_of(prepare(tmp_path, records, out="alone", group_by="topic", **HALF))
    return [next(records[r - 1]["topic"] for r, name in where.items() if name == split) for split in ("train", "val")]


@pytest.mark.parametrize("order", [1, -1], ids=["training first", "validation first"])
def test_a_conversation_in_groups_of_both_splits_stays_in_training(tmp_path, groups, order):
    records = [{**MANY[0], "topic": group} for group in groups][::order]
    records += [{**MANY[1], "topic": groups[1]}, {**MANY[2], "topic": groups[0]}]
    data = prepare(tmp_path, records, group_by="topic", **HALF)
    training, validation = (1, 2) if order == 1 else (2, 1)
    assert split_of(data) == {training: "train", 3: "val", 4: "train"}
    conversations = data.meta["ledger"]["conversations"]
    assert (conversations["in_training"], conversations["duplicate"]) == (1, 0)
    leaks = data.meta["leaks"]
    assert (leaks["conversations"], leaks["exact"]) == (1, 1)
    assert places(data) == [(str(validation), str(training))]
    assert leaks["first"][0]["similarity"] == 1


def test_every_copy_for_validation_goes_and_copies_in_training_are_duplicates(tmp_path, groups):
    records = [{**MANY[0], "topic": group} for group in [groups[1], groups[0], groups[1], groups[0]]]
    data = prepare(tmp_path, records, group_by="topic", **HALF)
    assert split_of(data) == {2: "train"}
    conversations = data.meta["ledger"]["conversations"]
    assert (conversations["in_training"], conversations["duplicate"], conversations["kept"]) == (2, 1, 1)


def test_a_group_by_key_that_a_record_lacks_makes_it_bad(tmp_path):
    with pytest.raises(UserError, match=r"input\.jsonl:2: 'topic' \(group_by\) holds nothing; give it a string"):
        prepare(tmp_path, [{**MANY[0], "topic": "a"}, MANY[1]], group_by="topic")


def test_the_first_of_several_copies_is_kept(tmp_path):
    data = prepare(tmp_path, [MANY[0], MANY[1], MANY[0], MANY[0]], val_fraction=0)
    assert data.splits["train"].origins[:, 1].tolist() == [1, 2]
    assert data.meta["ledger"]["conversations"]["duplicate"] == 2


def test_a_copy_in_another_file_is_a_duplicate_there(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "the cat"}\n{"text": "a hat"}\n')
    data = prepare(
        tmp_path, [{"text": "the cat"}], input=f"{tmp_path}/input.jsonl,{tmp_path}/other.jsonl", val_fraction=0
    )
    assert data.splits["train"].origins.tolist() == [[0, 1, -1], [1, 2, -1]]
    assert [(s["records"], s["conversations"], s["samples"]) for s in data.meta["sources"]] == [(1, 1, 1), (2, 2, 1)]


def test_every_sample_of_a_copy_is_dropped(tmp_path):
    thought = {"reasoning_content": "the hat"}
    record = dialogue(("user", "a"), ("assistant", "cat", thought), ("user", "b"), ("assistant", "hat", thought))
    data = prepare(tmp_path, [record, record], val_fraction=0, template="qwen3")
    assert data.splits["train"].origins.tolist() == [[0, 1, 1], [0, 1, 3]]
    tokens, conversations = data.meta["ledger"]["tokens"], data.meta["ledger"]["conversations"]
    assert tokens["total"] == 2 * tokens["dropped"]["duplicate"]
    assert (conversations["kept"], conversations["duplicate"], conversations["expanded"]) == (1, 1, 2)


def test_max_samples_ends_with_the_conversation_that_makes_it_full(tmp_path):
    """No conversation is kept in part: the last one may bring several samples."""
    thought = {"reasoning_content": "the hat"}
    record = dialogue(("user", "a"), ("assistant", "cat", thought), ("user", "b"), ("assistant", "hat", thought))
    data = prepare(tmp_path, [MANY[0], record, MANY[1]], val_fraction=0, template="qwen3", max_samples=2)
    assert data.splits["train"].origins.tolist() == [[0, 1, -1], [0, 2, 1], [0, 2, 3]]
    assert data.meta["ledger"]["conversations"]["read"] == 2


def test_max_samples_ends_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("sft.preparation.CHUNK_RECORDS", 10)
    data = prepare(tmp_path, MANY, val_fraction=0, max_samples=15, workers=1)
    assert len(texts(data)) == 15
    assert data.meta["ledger"]["records"]["read"] == 20


def test_nothing_left_to_train_on_is_told_with_what_became_of_it(tmp_path):
    with pytest.raises(UserError, match=r"nothing is left to train on; conversations: read 3, .* duplicate 1,"):
        prepare(tmp_path, [{"text": ""}, {"text": ""}, exchange("the cat " * 30, "hat")], block_size=20)
