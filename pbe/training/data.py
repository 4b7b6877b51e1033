"""Training batches: in whole optimizer steps, a few of them again and again, and with the time they take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset

from pbe.config import Config
from pbe.data.datamodule import CounterSampler, CountingLoader, ExemplarDataModule


class StepSampler(CounterSampler):
    """Counters of the whole optimizer steps of an epoch.

    The micro-batches that do not fill an optimizer step at the end of an epoch are left out, as the
    samples are that do not fill a batch: every step has the same number of samples.

    Args:
        dataset: gives the length of an epoch.
        batch_size: per rank and micro-batch.
        rank: of this process.
        world_size: number of processes.
        accumulate: micro-batches of an optimizer step.
        only: number of batches to repeat for ever, with the same samples each time; 0 takes them all.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, rank: int, world_size: int, accumulate: int, only: int
    ) -> None:
        length: int = len(dataset)  # type: ignore[arg-type]
        # An epoch shorter than a step is one short step, not none at all.
        whole = length >= batch_size * world_size * accumulate
        super().__init__(dataset, batch_size, rank, world_size, drop_last=whole)
        self.accumulate, self.only = accumulate, only

    def _batches(self, samples: int) -> int:
        count = super()._batches(samples)
        if self.drop_last:
            count -= count % self.accumulate
        return min(count, self.only) if self.only else count

    @property
    def batches_left(self) -> int:
        """Batches from ``start`` on."""
        done, rest = divmod(self.start, self.global_batch)
        # a start between two batches belongs to a run with batches of another size: count anew from there
        return super().batches_left if rest else max(self.batches - done, 0)

    def seek(self, epoch: int, start: int) -> None:
        """Make the next iteration start at a position of an epoch."""
        super().seek(0 if self.only else epoch, start)


class TimedLoader(CountingLoader):
    """A loader that adds up the seconds that training has waited for it, in ``waited``."""

    waited = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches."""
        batches = super().__iter__()
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - start
            yield batch


class TrainingData(ExemplarDataModule):
    """The data module of a training run."""

    loader_type: type[TimedLoader] = TimedLoader

    def __init__(self, config: Config) -> None:
        super().__init__(config.data, config.seed)
        self.options = config.trainer

    def samples(self, stream: str) -> Dataset[Any]:
        """Return the samples of a stream by global counter."""
        return self.dataset(stream)

    def open(self) -> None:
        """Open all streams, so that unusable shards are reported before anything is written."""
        self.samples("train")
        if self.config.validation_shards:
            self.samples("validation")

    @property
    def length(self) -> int:
        """Samples of an epoch."""
        return len(self.samples("train"))  # type: ignore[arg-type]

    def steps_of_epochs(self, epochs: int, world_size: int) -> int:
        """Return the optimizer steps of a number of epochs."""
        options, dataset = self.options, self.samples("train")
        sampler = StepSampler(
            dataset, self.config.batch_size, 0, world_size, options.accumulate, options.overfit_batches
        )
        return epochs * -(-sampler.batches // options.accumulate)  # the last step of an epoch may be short

    def workers(self) -> int:
        """Return the number of processes that load."""
        return self.config.num_workers

    def _loader(self, stream: str) -> CountingLoader:
        dataset, size, train = self.samples(stream), self.config.batch_size, stream == "train"
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = (
            StepSampler(dataset, size, rank, world, self.options.accumulate, self.options.overfit_batches)
            if train
            else CounterSampler(dataset, size, rank, world, drop_last=False)
        )
        loader = self.loader_type(sampler, stream, self.config.max_bad_share, not train, self.workers())
        self._loaders[stream] = loader
        return loader

    @property
    def waited(self) -> float:
        """Seconds that training has waited for its batches."""
        loader = self._loaders.get("train")
        return loader.waited if isinstance(loader, TimedLoader) else 0.0

    def close(self) -> None:
        """End the loading processes now, not when they are garbage collected."""
        for loader in self._loaders.values():
            if loader._iterator is not None:
                loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
                loader._iterator = None


def steps_of_run(config: Config, data: TrainingData, world_size: int) -> int:
    """Return the optimizer steps of a whole run, as ``max_steps`` or ``max_epochs`` gives them.

    Args:
        config: the experiment.
        data: of it; an epoch is counted in the batches of today, whatever a run was begun with.
        world_size: number of processes.
    """
    options = config.trainer
    return data.steps_of_epochs(options.max_epochs, world_size) if options.max_epochs else options.max_steps
