"""Batches of a checkpoint, counted anew for a run with other ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pbe.training.tasks.progress import translate


def checkpoint(step: int, accumulate: int, in_epoch: int) -> dict[str, Any]:
    def counters(done: int) -> dict[str, int]:
        return {"ready": done, "started": done, "processed": done, "completed": done - 1}

    progress = {"total": counters(step * accumulate), "current": counters(in_epoch)}
    loops = {"fit_loop": {"epoch_loop.batch_progress": progress}}
    return {"global_step": step, "config": {"trainer": {"accumulate": accumulate}}, "loops": loops}


@pytest.mark.parametrize(("samples", "in_epoch"), [(24, 6), (0, 10)])
def test_the_same_batches_change_nothing(samples: int, in_epoch: int):
    stored = checkpoint(13, 2, in_epoch)
    before = copy.deepcopy(stored)
    translate(stored, samples, 4, 2)
    assert stored == before


def test_other_batches_are_counted_in_whole_steps():
    stored = checkpoint(13, 2, 6)
    translate(stored, 24, 2, 4)
    progress = stored["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["total"] == {"ready": 52, "started": 52, "processed": 52, "completed": 51}
    assert progress["current"] == {"ready": 12, "started": 12, "processed": 12, "completed": 11}


def test_a_place_between_two_steps_counts_as_the_one_before():
    stored = checkpoint(3, 1, 3)
    translate(stored, 12, 2, 4)
    assert stored["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == 4
