import gc
import weakref

import pytest
import torch

import train_sft
from sft.batches import make_batch
from sft.collector import QuietCollector
from sft.journal import Journal
from sft.optim import make_optimizer
from sft.run import Run
from sft.step import SummedLoss, train_step
from tests.tiny import CPU_WORLD, random_documents, target_weight, tiny_model


class Thing:
    pass


def cycle() -> weakref.ref:
    one, two = Thing(), Thing()
    one.other, two.other = two, one
    return weakref.ref(one)


@pytest.fixture
def collector():
    collector = QuietCollector()
    yield collector
    collector.stop()


def test_nothing_is_collected_but_where_it_is_asked_for(collector):
    before = cycle()
    collector.start()
    assert before() is None  # what is there at the start is cleaned up before it is frozen
    assert gc.get_freeze_count() > 0
    later = cycle()
    for _ in range(100_000):
        cycle()  # many times what sets the collector off by itself
    assert later() is not None
    collector.collect()
    assert later() is None


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was_found(collector, enabled):
    try:
        if not enabled:
            gc.disable()
        collector.stop()  # before a start: nothing to undo
        for _ in range(2):
            collector.start()
            assert not gc.isenabled()
            collector.stop()
            collector.stop()
            assert gc.isenabled() is enabled
            assert gc.get_freeze_count() == 0
    finally:
        gc.enable()


def test_collecting_before_a_start_does_nothing(collector, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: pytest.fail("collected"))
    collector.collect()


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_run_holds_the_collector_back_while_it_trains_and_lets_it_go_however_it_ends(arguments, monkeypatch, error):
    collections = []
    update = Run.update

    def watched(run: Run, **options) -> None:
        assert not gc.isenabled()
        update(run, **options)
        if run.iter_num == 3 and error is not None:
            raise error

    monkeypatch.setattr(Run, "update", watched)
    monkeypatch.setattr(QuietCollector, "collect", lambda collector: collections.append(collector._quiet))
    if error is None:
        train_sft.main(arguments(eval_interval=2, save_interval=2, log_interval=2))
        # before the start once, where step 0 is evaluated; then twice for a report, an evaluation and a checkpoint
        assert collections == [False] + 6 * [True]
    else:
        with pytest.raises(error):
            train_sft.main(arguments())
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_run_that_cannot_start_leaves_the_collector_alone(arguments, monkeypatch):
    monkeypatch.setattr(Journal, "startup", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_sft.main(arguments())
    assert gc.isenabled()


def test_an_update_leaves_no_tensor_for_the_collector(collector):
    """Else memory would grow from one milestone to the next."""
    documents = random_documents([60])
    batch = make_batch([documents], block_size=64, pad_id=0)
    model = tiny_model()
    optimizer = make_optimizer(model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    loss_module = SummedLoss(model)
    options = {"learning_rate": 1e-2, "grad_clip": 1.0, "world": CPU_WORLD, "target_weight": target_weight(documents)}
    train_step(loss_module, optimizer, [batch], **options)  # makes the optimizer's moments
    collector.start()
    for _ in range(3):
        train_step(loss_module, optimizer, [batch], **options)
    assert not [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.requires_grad]
