"""Batches through shared slots: the same as without workers, reused, and never overwritten while held."""

from __future__ import annotations

import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pbe.data import transport
from pbe.data.transport import FREE, HELD, KEPT_SLOTS, RETIRED, Inbox, Outbox
from tests.data.test_datamodule import digest, make_module


def stack(items, allocate):
    """Collate rows of bytes, with a number each."""
    rows, numbers = allocate(
        [((len(items), len(items[0])), np.dtype(np.uint8)), ((len(items),), np.dtype(np.int64))]
    )
    rows[:], numbers[:] = items, [-len(item) for item in items]
    return {"rows": torch.from_numpy(rows), "numbers": torch.from_numpy(numbers), "key": ["a"] * len(items)}


@pytest.fixture
def worker(monkeypatch):
    """Both ends in one process: call it with rows, get the parcel."""
    inbox = Inbox()
    outbox = Outbox(stack, inbox.key)
    monkeypatch.setattr(transport, "get_worker_info", lambda: SimpleNamespace(id=3))
    return SimpleNamespace(inbox=inbox, outbox=outbox, send=lambda *rows: outbox([list(row) for row in rows]))


def receive(parcel):
    function, arguments = parcel.__reduce__()
    return function(*arguments)


def states(worker) -> list[int]:
    return [int(slot[0]) for slot in worker.outbox._slots]


def test_a_batch_arrives_as_it_was(worker):
    batch = receive(worker.send([1, 2, 3], [4, 5, 6]))
    assert batch["rows"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch["rows"].dtype == torch.uint8
    assert batch["numbers"].tolist() == [-3, -3]
    assert batch["numbers"].dtype == torch.int64
    assert list(batch) == ["key", "rows", "numbers"]


def test_a_slot_is_free_when_the_last_view_is_gone(worker):
    batch = receive(worker.send([1, 2, 3]))
    row = batch["rows"][0, 1:].numpy()[:1]
    number = batch["numbers"]
    assert states(worker) == [HELD]
    del batch
    assert states(worker) == [HELD]
    del number
    assert states(worker) == [HELD]
    assert row == 2
    del row
    assert states(worker) == [FREE]


def test_a_free_slot_is_used_again_and_sent_only_once(worker):
    first = worker.send([1, 2, 3])
    assert isinstance(first._contents[2], torch.Tensor)
    place = receive(first)["rows"].data_ptr()
    second = worker.send([7, 8, 9])
    assert second._contents[2] is None
    batch = receive(second)
    assert batch["rows"].data_ptr() == place
    assert batch["rows"].tolist() == [[7, 8, 9]]


def test_a_larger_batch_replaces_a_free_slot(worker):
    receive(worker.send([1, 2, 3]))
    batch = receive(worker.send(*[[5] * 200] * 3))
    assert batch["rows"].shape == (3, 200)
    assert len(worker.outbox._slots) == len(worker.inbox.slots) == 1
    del batch
    assert receive(worker.send([1, 2]))["rows"].tolist() == [[1, 2]]
    assert len(worker.inbox.slots[3, 0]) > 600


def test_held_batches_beyond_the_slots_are_sent_apart(worker):
    held = [receive(worker.send([number] * 5)) for number in range(3 * KEPT_SLOTS)]
    assert len(worker.outbox._slots) == len(worker.inbox.slots) == KEPT_SLOTS
    assert [batch["rows"].tolist() for batch in held] == [[[number] * 5] for number in range(3 * KEPT_SLOTS)]
    del held
    assert states(worker) == [FREE] * KEPT_SLOTS


@pytest.mark.filterwarnings("ignore:This process")  # has threads; the copy runs none of them
def test_a_forked_process_keeps_what_it_saw(worker):
    """It inherits the batch; here it is dropped and the next ones are loaded, there it must stay."""
    batch = receive(worker.send([1, 2, 3]))
    start, started = os.pipe()
    done, finished = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(started)  # so that the end of the parent ends the waiting too
        os.read(start, 1)
        os.write(finished, bytes(batch["rows"][0].tolist()))
        os._exit(0)
    retired = states(worker)
    del batch
    received = [receive(worker.send([9, 9, 9])) for _ in range(3)]
    os.write(started, b"x")
    seen = os.read(done, 3)
    os.waitpid(child, 0)
    for descriptor in (start, started, done, finished):
        os.close(descriptor)
    assert retired == [RETIRED]
    assert seen == bytes([1, 2, 3])
    assert len(received) == 3


def test_a_copy_of_this_process_gives_nothing_back(worker, monkeypatch):
    batch = receive(worker.send([1, 2, 3]))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    del batch
    assert states(worker) == [HELD]


def test_a_parcel_for_a_loader_that_is_gone(worker):
    parcel = worker.send([1, 2, 3])
    worker.inbox = None
    assert receive(parcel) == {"key": ["a"]}


def test_the_outbox_may_be_sent_to_a_spawned_worker():
    assert pickle.loads(pickle.dumps(Outbox(stack, 5))).key == 5


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_kept_stay_what_they_are(shards, workers):
    """Three epochs of twelve batches, all kept; of others only a piece is."""

    def epochs(count: int) -> list[dict]:
        loader = make_module(shards, batch_size=5, num_workers=count).train_dataloader()
        return [batch for _ in range(3) for batch in loader]

    expected, kept = epochs(0), epochs(workers)
    assert [digest(batch) for batch in kept] == [digest(batch) for batch in expected]
    loader = make_module(shards, batch_size=5, num_workers=workers).train_dataloader()
    pieces = [batch["mask"][2, 0, 5:9].numpy() for _ in range(3) for batch in loader]
    assert all(
        (piece == batch["mask"][2, 0, 5:9].numpy()).all()
        for piece, batch in zip(pieces, expected, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loader_needs_few_slots(shards, workers):
    """Two batches are prefetched a worker, one is held and one is being made."""
    loader = make_module(shards, batch_size=2, num_workers=workers).train_dataloader()
    for _ in range(2):
        for batch in loader:
            assert len(batch["key"]) == 2
    assert 0 < len(loader._inbox.slots) <= 5 * workers


def test_an_abandoned_epoch_leaves_the_slots_in_order(shards):
    """What was prefetched is thrown away unread when the workers start anew."""
    loader = make_module(shards, batch_size=4, num_workers=2).train_dataloader()
    expected = [digest(batch) for batch in make_module(shards, batch_size=4).train_dataloader()]
    seen = []
    for _ in range(5):
        for _, batch in zip(range(3), loader, strict=False):
            seen.append(digest(batch))
    assert seen == expected
