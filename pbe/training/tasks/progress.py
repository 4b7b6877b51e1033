"""Where a resumed run is in its epoch, when its batches are others than those of the run before."""

from __future__ import annotations

from typing import Any


def translate(checkpoint: dict[str, Any], samples: int, global_batch: int, accumulate: int) -> None:
    """Count a checkpoint's batches anew, in those of the run that goes on from it.

    Lightning counts micro-batches, in an epoch for the end of steps, in all for validations. With another
    ``trainer.accumulate`` or batch those counts would make short steps, and validations in between.
    Nothing changes where the batches are the same.

    Args:
        checkpoint: of Lightning's; changed in place.
        samples: of the current epoch that are done, 0 between two epochs.
        global_batch: samples of a micro-batch of all ranks, now.
        accumulate: micro-batches of a step, now.
    """
    before = checkpoint.get("config", {}).get("trainer", {}).get("accumulate", accumulate)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if before != accumulate:
        _shift(progress["total"], checkpoint["global_step"] * accumulate)
    if samples and progress["current"]["processed"] * global_batch != samples:
        batches = samples // global_batch
        _shift(progress["current"], batches - batches % accumulate)


def _shift(counters: dict[str, int], processed: int) -> None:
    """Set the batches that were processed; the others keep their distance (a checkpoint falls in a batch)."""
    change = processed - counters["processed"]
    counters.update({name: count + change for name, count in counters.items()})
