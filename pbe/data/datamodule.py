"""The loading chain: sampler of global counters, loader that knows its place, Lightning data module."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import pytorch_lightning as lightning
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from pbe.config import Config
from pbe.data.dataset import ExemplarDataset, check_counts, collate as collate_samples, describe
from pbe.data.mixture import Mixture
from pbe.data.shards.archive import ShardImages, shards_of
from pbe.data.transport import Inbox, Outbox
from pbe.errors import UserError

LOG = logging.getLogger(__name__)
PLACES = 8  # remembered, so that a batch that was handed out but not used can be taken again


class CounterSampler(DistributedSampler[int]):
    """Yields global sample counters so that the split over ranks does not change what is drawn.

    Global batch k is made of the positions start + k * world * batch and on; rank r takes the r-th run
    of ``batch_size`` of them. So 1 x 8 and 2 x 4 see the same global batches. It derives from
    DistributedSampler because Lightning replaces any other sampler when there are several ranks.

    Args:
        dataset: gives the length of an epoch.
        batch_size: per rank and micro-batch.
        rank: of this process.
        world_size: number of processes.
        drop_last: leave out the samples that do not fill an optimizer step, so that every step has the same
            number of samples; an epoch shorter than a step is one short step.
        accumulate: micro-batches of an optimizer step.
        only: batches to repeat for ever, the same samples each time; 0 takes them all.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        rank: int,
        world_size: int,
        drop_last: bool,
        accumulate: int = 1,
        only: int = 0,
    ) -> None:
        self.length: int = len(dataset)  # type: ignore[arg-type]
        drop_last = drop_last and self.length >= batch_size * world_size * accumulate
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False, drop_last=drop_last)
        self.batch_size, self.accumulate, self.only = batch_size, accumulate, only
        self.start = 0  # position in the epoch

    @property
    def global_batch(self) -> int:
        """Samples that all ranks take together in a micro-batch."""
        return self.batch_size * self.num_replicas

    def _batches(self, samples: int) -> int:
        count = samples // self.global_batch if self.drop_last else -(-samples // self.global_batch)
        if self.drop_last:
            count -= count % self.accumulate
        return min(count, self.only) if self.only else count

    @property
    def batches(self) -> int:
        """Batches of a whole epoch."""
        return self._batches(self.length)

    @property
    def batches_left(self) -> int:
        """Batches from ``start`` on."""
        done, rest = divmod(self.start, self.global_batch)
        # a start between two batches belongs to a run with batches of another size: count anew from there
        return self._batches(self.length - self.start) if rest else max(self.batches - done, 0)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: Lightning's count runs ahead after some restarts, so the loader keeps its own."""

    def seek(self, epoch: int, start: int) -> None:
        """Make the next iteration start at a position of an epoch."""
        self.epoch, self.start = 0 if self.only else epoch, start

    def __len__(self) -> int:
        """Return the number of samples of this rank in a whole epoch."""
        if self.num_replicas == 1 and not self.drop_last:
            return self.length
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's counters of the epoch."""
        offset = self.epoch * self.length
        for batch in range(self.batches_left):
            first = self.start + batch * self.global_batch + self.rank * self.batch_size
            for position in range(first, first + self.batch_size):
                if position < self.length:
                    yield offset + position
                elif self.num_replicas > 1:  # ranks must take equal steps: wrap around
                    yield offset + position % self.length


class CountingLoader(DataLoader[Any]):
    """A DataLoader that knows its place in the stream of samples and adds up what was skipped.

    Iterating yields the rest of the current epoch; the next iteration continues with the next one, or where
    an abandoned one stopped. With ``repeat`` every iteration draws epoch 0. Counting happens in the main
    process, as batches are handed out; those of a ``collate`` of its own count nothing.

    Attributes:
        counts: what was skipped or adjusted in the current epoch, or in the last one after its end.
        waited: seconds that batches have been waited for.
    """

    def __init__(
        self,
        sampler: CounterSampler,
        name: str,
        max_bad_share: float,
        repeat: bool,
        num_workers: int,
        collate: Callable[[Any], Any] | None = None,
    ) -> None:
        inbox = Inbox()
        super().__init__(
            sampler.dataset,
            batch_size=sampler.batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate or Outbox(collate_samples, inbox.key),
            worker_init_fn=start_worker,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        self._inbox = inbox  # which lives as long as the loader
        self.counter, self.name, self.repeat = sampler, name, repeat
        self.max_faults = max_bad_share * sampler.length / sampler.num_replicas
        self.counts, self.waited = Counter[str](), 0.0
        self._places = deque([(0, 0)], maxlen=PLACES)

    @property
    def place(self) -> tuple[int, int]:
        """Epoch, and position therein, of the next batch."""
        return self._places[-1]

    @place.setter
    def place(self, place: tuple[int, int]) -> None:
        """Continue somewhere else."""
        self._places = deque([place], maxlen=PLACES)

    def place_before(self, batches: int) -> tuple[int, int]:
        """Return the place as it was before the last ``batches`` batches were handed out."""
        return self._places[max(-1 - batches, -len(self._places))]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches; raise UserError when too many of the epoch's images cannot be used.

        This is a generator so that workers start only when the first batch is asked for: Lightning makes
        the iterator long before.
        """
        epoch, start = (0, 0) if self.repeat else self.place
        self.counter.seek(epoch, start)
        if self.counter.batches_left == 0:  # what is left of the epoch fills no batch of this size
            epoch, start = epoch + 1, 0
            self.counter.seek(epoch, start)
        if start == 0:
            self.counts = Counter()
        left = self.counter.batches_left
        for number, batch in enumerate(self._timed(), start=1):
            if isinstance(batch, dict):
                self._count(batch)
            done = start + number * self.counter.global_batch
            self._places.append((epoch, done) if number < left else (epoch + 1, 0))
            yield batch
        if self.counts and not self.repeat and self.counter.rank == 0:
            images = self.counter.length
            LOG.info("%s epoch %d: %d images; %s", self.name, epoch, images, describe(self.counts))

    def _timed(self) -> Iterator[Any]:
        """Yield batches, and note how long each was waited for."""
        start = time.perf_counter()
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def _count(self, batch: dict[str, Any]) -> None:
        self.counts.update(batch["counts"])
        try:
            check_counts(self.name, self.counts, self.max_faults, batch["missing"])
        except UserError:
            self._iterator = None  # ends the workers now, not when the error has been dealt with
            raise


def start_worker(_: int) -> None:
    """Prepare a loading process."""
    # One thread a worker: OpenCV's and torch's own pools would fight over the cores.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Signals to the whole process group are the main process's business: it saves, and ends its workers.
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # everywhere but on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    """End this worker at a SIGTERM of its parent, and at no one else's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class TrainingData(lightning.LightningDataModule):
    """Batches for training and validation.

    A batch is a dictionary: ``image`` (b 3 h w), ``mask`` (b 1 h w, 255 = repaint), ``exemplar`` (b 3 s s)
    and ``valid`` (b 1 h w, 255 = counts in the loss), all uint8; ``sample_index`` (b,) int64, the global
    counter ``epoch * len + position``; ``key``, the images' names; ``counts``, what was skipped or
    adjusted while this batch was made; ``missing``, always 0. Validation always draws epoch 0 of a stream
    of its own.

    A checkpoint holds the place in the training stream, under the name of the class, and a resumed run takes
    the very next batch.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.seed, self.options = config.data, config.seed, config.trainer
        self._restored = (0, 0)
        self._datasets: dict[str, ExemplarDataset] = {}
        self._loaders: dict[str, CountingLoader] = {}

    def dataset(self, stream: str) -> ExemplarDataset:
        """Return the data set ``train``, ``prior`` or ``validation``; shards are indexed when asked for."""
        if stream not in self._datasets:
            config = self.config
            shards = {"train": config.train_shards, "validation": config.validation_shards}
            shards["prior"] = config.prior_shards
            every, cache = config.boxes == "every", config.remote_cache
            with shards_of(f"data.{stream}_shards"):
                images = ShardImages(shards[stream], count_boxes=every, verify=config.verify, cache=cache)
            self._datasets[stream] = ExemplarDataset(images, config, self.seed, stream)
        return self._datasets[stream]

    def samples(self, stream: str) -> Dataset[Any]:
        """Return the samples of a stream by global counter."""
        if stream == "train" and self.config.prior_shards:
            return Mixture(self.dataset("train"), self.dataset("prior"), self.config.prior_share)
        return self.dataset(stream)

    def open(self) -> None:
        """Open all streams, so that shards which cannot be used are told of before anything is written."""
        self.samples("train")
        if self.config.validation_shards:
            self.samples("validation")

    @property
    def length(self) -> int:
        """Samples of an epoch."""
        return len(self.samples("train"))  # type: ignore[arg-type]

    def steps_of_epochs(self, epochs: int, world_size: int) -> int:
        """Return the optimizer steps of so many epochs on so many processes."""
        batches = self._sampler("train", 0, world_size).batches
        return epochs * -(-batches // self.options.accumulate)  # the last step of an epoch may be short

    def steps_of_run(self, world_size: int) -> int:
        """Return the optimizer steps of a whole run, as ``max_steps`` or ``max_epochs`` gives them.

        An epoch is counted in the batches of today, whatever a run was begun with.
        """
        epochs = self.options.max_epochs
        return self.steps_of_epochs(epochs, world_size) if epochs else self.options.max_steps

    def counts(self, stream: str) -> Counter[str]:
        """Return what was skipped or adjusted in the current or last epoch of a stream."""
        return self._loaders[stream].counts if stream in self._loaders else Counter()

    @property
    def waited(self) -> float:
        """Seconds that training has waited for its batches."""
        return self._loaders["train"].waited if "train" in self._loaders else 0.0

    def state_dict(self) -> dict[str, int]:
        """Return the place in the training stream: epoch, and samples of it that are done."""
        loader = self._loaders.get("train")
        epoch, samples = self._restored
        if loader is not None:
            waiting = 0
            if self.trainer is not None:
                # A batch that was handed out but whose step was interrupted is to be taken again.
                progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
                waiting = progress.ready - progress.processed
            epoch, samples = loader.place_before(waiting)
        return {"epoch": epoch, "samples": samples}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue the training stream at the place that a checkpoint holds."""
        self._restored = (state_dict["epoch"], state_dict["samples"])

    def _sampler(self, stream: str, rank: int, world_size: int) -> CounterSampler:
        samples, size, options = self.samples(stream), self.config.batch_size, self.options
        if stream != "train":
            return CounterSampler(samples, size, rank, world_size, drop_last=False)
        return CounterSampler(
            samples, size, rank, world_size, True, options.accumulate, options.overfit_batches
        )

    def _loader(self, stream: str, *, workers: int, collate: Callable[[Any], Any] | None) -> CountingLoader:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        sampler, repeat = self._sampler(stream, rank, world_size), stream != "train"
        loader = CountingLoader(sampler, stream, self.config.max_bad_share, repeat, workers, collate)
        self._loaders[stream] = loader
        return loader

    def loader(self, stream: str) -> CountingLoader:
        """Return the batches of a stream from its start on."""
        return self._loader(stream, workers=self.config.num_workers, collate=None)

    def train_dataloader(self) -> CountingLoader:
        """Return the training batches, from the place of a restored checkpoint on."""
        loader = self.loader("train")
        loader.place = self._restored
        return loader

    def val_dataloader(self) -> CountingLoader | list[Any]:
        """Return the validation batches, the same in every epoch; none where no shards are given."""
        return self.loader("validation") if self.config.validation_shards else []

    def close(self) -> None:
        """End the loading processes now, not when Python gets around to it."""
        for loader in self._loaders.values():
            if loader._iterator is not None:
                loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
                loader._iterator = None
