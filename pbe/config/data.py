"""Configuration of the data: shards, samples, latent cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from pbe.config.fields import choice, number, path


@dataclass
class AugmentConfig:
    """Strong augmentation of the exemplar; probabilities and sizes of the original (at 224 px)."""

    enabled: bool = True
    """Augment the exemplar."""
    flip: float = number(0.5, high=1)
    """Probability of a horizontal flip."""
    rotate: float = number(0.5, high=1)
    """Probability of a rotation."""
    rotate_limit: float = number(20.0, high=360)
    """Largest rotation in degrees, in either direction."""
    blur: float = number(0.3, high=1)
    """Probability of a box blur."""
    affine: float = number(0.3, high=1)
    """Probability of a random affine map (what the original's ElasticTransform amounts to)."""
    affine_jitter: float = number(50.0)
    """Jitter of the three points that define the affine map, in pixels."""


@dataclass
class SampleConfig:
    """How an image and a box become a training sample; lengths are for a short side of 512 px."""

    arbitrary_mask_share: float = number(0.5, high=1)
    """Share of samples with an arbitrary (Bezier) mask; the others get a rectangle."""
    extend_fraction: float = number(0.4, high=1)
    """Largest extension of the box on each side, as a share of the space up to the image's border."""
    bezier_jitter: float = number(5.0)
    """Largest shift of the points of an arbitrary mask, in pixels."""
    exemplar_padding: int = number(10)
    """Margin around the box that belongs to the exemplar, in pixels."""
    shrink_fraction: float = number(0.6, high=1)
    """Largest shrinkage of the square crop on all sides, as a share of its smallest margin."""
    min_keep_share: float = number(0.02, high=0.5)
    """Smallest share of the image that must stay unmasked."""
    min_box_cover: float = number(0.9, high=1)
    """Smallest share of the box that an arbitrary mask must cover."""
    object_mask_share: float = number(0.0, high=1)
    """Share of samples that are masked with the object's own mask, if the shard holds it."""
    object_mask_dilate: float = number(10.0, high=512)
    """Dilation of the object's mask, in pixels."""
    squash: bool = False
    """Squash images that leave no room for a square crop, as the original code does."""
    antialias_above: float = number(1.0, low=1)
    """Average crops that shrink by more than this factor by area; interpolate others bilinearly."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class DataConfig:
    """Shards, sizes and loading."""

    train_shards: str = path()
    """Training shards: a folder, a file, a glob or brace pattern, URLs or a ``pipe:`` command."""
    validation_shards: str = path()
    """Validation shards; empty: no validation."""
    prior_shards: str = path()
    """Ordinary training shards to mix in, so that a model trained on few images forgets little."""
    prior_share: float = number(0.5, high=0.99)
    """Share of the samples that come from ``prior_shards``."""
    image_size: int = 512
    """Side of the training images in pixels; equal to ``model.image_size``, or 0 with ``model_from_init``."""
    exemplar_size: int = 224
    """Side of the exemplars in pixels; 0, or equal to ``model.exemplar_encoder.image_size``."""
    batch_size: int = number(4, low=1)
    """Samples per device and micro-batch."""
    num_workers: int = number(8)
    """Loading processes per device; 0: load in the training process."""
    min_box_area: float = number(0.02, high=1)
    """Smallest box to train on, as a share of the image's area."""
    max_box_area: float = number(0.8, high=1)
    """Largest box to train on, as a share of the image's area."""
    boxes: str = choice("one", "every")
    """What an epoch covers: every image once, with ``one`` of its boxes, or ``every`` box once."""
    max_bad_share: float = number(0.05, high=1)
    """Largest share of an epoch's images that may be unusable; above it training stops."""
    verify: bool = False
    """Compare indexes and images with their hashes, if the shards have an index."""
    remote_cache: str = path()
    """Folder for copies of remote shards; empty: ``~/.cache/pbe/remote``."""
    reduced_decoding: bool = False
    """Decode JPEGs at 1/2, 1/4 or 1/8 of their size if no crop needs more; changes pixel values slightly."""
    sample: SampleConfig = field(default_factory=SampleConfig)


@dataclass
class CacheConfig:
    """Latent cache: samples that the frozen networks encode once."""

    folder: str = path()
    """Folder of the cache; empty: no cache, samples are encoded while training."""
    variants: int = number(4, low=1)
    """Samples (crop, mask, augmentation) of every image, or with ``data.boxes=every`` of every box."""
    batch_size: int = number(64, low=1)
    """Samples that are encoded together."""
    shard_samples: int = number(0)
    """Samples per shard; 0: shards of about 64 MiB."""
