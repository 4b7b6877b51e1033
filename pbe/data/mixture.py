"""Two data sets mixed in a fixed proportion, so that training on a few images keeps what was known before."""

from __future__ import annotations

from dataclasses import replace

from torch.utils.data import Dataset

from pbe.data.dataset import DatasetItem, ExemplarDataset

PARTS = 1_000_000  # that shares are counted in: whole numbers, so that no counter is rounded


class Mixture(Dataset[DatasetItem]):
    """Samples by global counter, of which an even share comes from a second data set.

    Both go on through their own epochs by counters of their own, however different their lengths: few images
    come again and again, with other masks, crops and augmentations each time, while many are not exhausted.
    An epoch of the mixture is one of the data set whose samples take longest to come round.

    Args:
        own: what is trained on.
        prior: what is mixed in; another stream than ``own``, so that both draw independently.
        share: of the samples that come from ``prior``, from 0 to below 1.
    """

    def __init__(self, own: ExemplarDataset, prior: ExemplarDataset, share: float) -> None:
        self.own, self.prior = own, prior
        self._share = round(share * PARTS)
        lengths = [len(own) * PARTS // (PARTS - self._share)]
        if self._share:
            lengths.append(len(prior) * PARTS // self._share)
        self._length = max(lengths)

    def __len__(self) -> int:
        """Return the number of samples an epoch."""
        return self._length

    def source(self, index: int) -> tuple[ExemplarDataset, int]:
        """Return the data set that a global counter's sample comes from, and its counter there."""
        before, after = index * self._share // PARTS, (index + 1) * self._share // PARTS
        return (self.prior, before) if after > before else (self.own, index - before)

    def __getitem__(self, index: int) -> DatasetItem:
        """Return the sample of a global counter."""
        dataset, counter = self.source(int(index))
        return replace(dataset[counter], index=int(index))
