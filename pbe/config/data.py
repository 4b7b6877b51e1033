"""Configuration of the data: shards, samples, latent cache. Import the sections from :mod:`pbe.config`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class AugmentConfig:
    """Strong augmentation of the exemplar; probabilities and sizes of the original (at 224 px)."""

    enabled: bool = True
    flip: float = 0.5
    rotate: float = 0.5
    rotate_limit: float = 20.0
    blur: float = 0.3
    affine: float = 0.3
    affine_jitter: float = 50.0


@dataclass
class SampleConfig:
    """How a picture and a box become a training sample; lengths are pixels of a 512 px short side.

    Crops that shrink by more than a factor of ``antialias_above`` are averaged by area, others interpolated
    bilinearly. ``object_mask_share`` of the samples whose shard holds the object's mask get that as their
    hole, ``object_mask_dilate`` wider on every side; the others get arbitrary masks and rectangles.
    """

    arbitrary_mask_share: float = 0.5
    extend_fraction: float = 0.4
    bezier_jitter: float = 5.0
    exemplar_padding: int = 10
    shrink_fraction: float = 0.6
    min_keep_share: float = 0.02
    min_box_cover: float = 0.9
    object_mask_share: float = 0.0
    object_mask_dilate: float = 10.0
    squash: bool = False
    antialias_above: float = 1.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class DataConfig:
    """Shards, sizes and loading. Box areas are shares of the picture's area.

    ``boxes`` is ``one`` (an epoch takes every picture once, with one of its boxes) or ``every`` (every box
    once). ``verify`` compares indexes and pictures with their hashes, where the shards have an index.
    ``remote_cache`` is a folder for copies of what is remote; empty is the user's cache. ``reduced_decoding``
    decodes JPEGs at a half, a quarter or an eighth of their size where no crop needs more; pixels change.
    """

    train_shards: str = ""
    validation_shards: str = ""
    image_size: int = 512
    exemplar_size: int = 224
    batch_size: int = 4
    num_workers: int = 8
    min_box_area: float = 0.02
    max_box_area: float = 0.8
    boxes: str = "one"
    max_bad_share: float = 0.05
    verify: bool = False
    remote_cache: str = ""
    reduced_decoding: bool = False
    sample: SampleConfig = field(default_factory=SampleConfig)


@dataclass
class CacheConfig:
    """Latent cache: ``variants`` samples of every box are encoded once and kept in ``folder``.

    An empty ``folder`` means no cache: samples are made and encoded online. A shard has ``shard_samples``
    samples; 0 makes shards of about 64 MiB.
    """

    folder: str = ""
    variants: int = 4
    batch_size: int = 64
    shard_samples: int = 0
