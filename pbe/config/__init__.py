"""Typed configuration: one dataclass per section, merged from YAML and ``key=value`` overrides.

A configuration never imports code: every choice is a name or a number that a dataclass lists.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from pbe.config.checks import check_numbers
from pbe.config.data import (
    AugmentConfig as AugmentConfig,
    CacheConfig as CacheConfig,
    DataConfig as DataConfig,
    SampleConfig as SampleConfig,
)
from pbe.config.files import check_kinds, expanded, one_line, read_override, read_yaml
from pbe.config.model import (
    AutoencoderConfig as AutoencoderConfig,
    ExemplarEncoderConfig as ExemplarEncoderConfig,
    ModelConfig as ModelConfig,
    ScheduleConfig as ScheduleConfig,
    UNetConfig as UNetConfig,
)
from pbe.errors import UserError
from pbe.files import write_output


@dataclass
class ObjectiveConfig:
    """Training objective of the diffusion model.

    ``weighting`` is ``uniform`` or ``min_snr`` (Hang et al. 2023, clipped at ``min_snr_gamma``).
    ``drop_probability`` is the share of samples whose condition becomes the null condition,
    drawn ``per_sample`` or, as the original code does, once ``per_batch``.
    """

    weighting: str = "uniform"
    min_snr_gamma: float = 5.0
    drop_probability: float = 0.2
    drop_mode: str = "per_sample"


@dataclass
class AutoencoderLossConfig:
    """Loss of the autoencoder: L1 + L2 + L1 of the finite differences + KL, each a mean over its elements.

    ``masked_share`` of the pictures have their hole greyed out, since that is what the autoencoder
    will meet as masked images. ``train`` is ``all``, or ``decoder`` alone: latents stay what they are.
    A pixel in the hole counts ``hole_weight`` times one outside in the first three terms.
    ``perceptual_weight`` adds LPIPS on the user's VGG16 (``perceptual_vgg``, torchvision's state dict) and
    LPIPS weights (``perceptual_linear``; empty: all channels of a layer count alike).
    ``adversarial_weight`` adds the hinge loss of a patch discriminator from step ``adversarial_start`` on,
    as a factor on the ratio of gradient norms with ``adversarial_adaptive``, else as it is.
    ``perceptual_on`` is ``vgg``, or ``tower``: the same distance on the maps of the model's own image tower,
    which needs no further weights.
    """

    l1_weight: float = 1.0
    l2_weight: float = 0.0
    gradient_weight: float = 1.0
    kl_weight: float = 1.0e-4
    masked_share: float = 0.0
    train: str = "all"
    hole_weight: float = 1.0
    perceptual_weight: float = 0.0
    perceptual_on: str = "vgg"
    perceptual_vgg: str = ""
    perceptual_linear: str = ""
    adversarial_weight: float = 0.0
    adversarial_start: int = 0
    adversarial_adaptive: bool = True
    discriminator_layers: int = 3
    discriminator_channels: int = 64


@dataclass
class OptimizerConfig:
    """AdamW and its warm-up. ``decay`` is ``constant`` or ``cosine`` (to zero at ``trainer.max_steps``).

    ``name`` is ``adamw`` or ``muon``: then matrices and kernels move by orthogonalised momentum, with
    updates as large as AdamW's at the same rate, and vectors by NAdamW.
    A constant rate falls to zero over the last ``cooldown_steps``, so that a run whose length is not known
    yet can be ended well at any time (0: it does not fall).
    ``decay_groups`` keeps norms, biases and the null condition out of weight decay. ``fused`` updates all
    weights in one kernel.
    """

    name: str = "adamw"
    learning_rate: float = 1.0e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1.0e-8
    weight_decay: float = 0.01
    decay_groups: bool = True
    warmup_steps: int = 10_000
    decay: str = "constant"
    cooldown_steps: int = 0
    ema_decay: float = 0.9999
    gradient_clip: float = 1.0
    fused: bool = False


@dataclass
class TrainerConfig:
    """Lightning's trainer.

    A run is ``max_steps`` optimizer steps long, or ``max_epochs`` epochs where ``max_steps`` is 0: as many
    steps as follow from the data and the global batch.
    ``resume``: ``auto`` continues the newest checkpoint of ``output_dir``, ``never`` refuses to touch
    an existing run, anything else is the path of a checkpoint. ``threads`` 0 leaves torch's choice.
    A checkpoint is written every ``checkpoint_every`` steps and, where ``checkpoint_minutes`` is not 0,
    after so many minutes without one. The last ``keep_checkpoints`` stay (-1: all), one every
    ``keep_every`` steps (0: none), and with ``keep_best`` the one of the lowest validation loss.
    ``gradient_checkpointing`` computes activations twice and keeps few, ``channels_last`` lays them out as
    convolutions like them, ``compile`` is ``torch.compile``. Where numbers are not finite, ``on_nan`` says
    ``stop``, or ``skip`` the step, ``max_skipped`` in a row at most. ``profiler`` is Lightning's.
    ``overfit_batches`` trains on the very same samples, masks and noise of that many batches; 0 is off.
    """

    max_steps: int = 1000
    max_epochs: int = 0
    accelerator: str = "auto"
    devices: str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    accumulate: int = 1
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    profiler: str = ""
    on_nan: str = "stop"
    max_skipped: int = 10
    threads: int = 0
    resume: str = "auto"
    checkpoint_every: int = 1000
    checkpoint_minutes: float = 0.0
    keep_checkpoints: int = 2
    keep_every: int = 0
    keep_best: bool = False
    validate_every: int = 500
    validation_samples: int = 32
    overfit_batches: int = 0
    progress: bool = True


@dataclass
class LoggingConfig:
    """Loggers (``csv``, ``wandb``, ``tensorboard``) and sample grids (``grid_every`` 0 turns them off)."""

    loggers: list[str] = field(default_factory=lambda: ["csv", "wandb"])
    wandb_project: str = "pbe"
    wandb_mode: str = "offline"
    run_name: str = ""
    every: int = 10
    grid_every: int = 1000
    grid_samples: int = 6
    grid_steps: int = 25
    grid_guidance: list[float] = field(default_factory=lambda: [1.0, 3.0, 5.0])


@dataclass
class Config:
    """One reproducible experiment. ``task`` is ``diffusion`` or ``autoencoder``.

    ``autoencoder_from`` (diffusion) is the folder that holds the trained autoencoder; ``init_from`` is a
    model whose weights start the training, ``none`` asks for random ones by name.
    """

    task: str = "diffusion"
    seed: int = 23
    output_dir: str = "outputs/run"
    autoencoder_from: str = ""
    init_from: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    autoencoder_loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def start(self) -> str:
        """The model whose weights start the training, empty where they are random."""
        return "" if self.init_from == NONE else self.init_from


CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("diffusion", "autoencoder"),
    "model.prediction": ("eps", "v"),
    "model.exemplar_encoder.tokens": ("class", "all"),
    "data.boxes": ("one", "every"),
    "autoencoder_loss.train": ("all", "decoder"),
    "objective.weighting": ("uniform", "min_snr"),
    "objective.drop_mode": ("per_sample", "per_batch"),
    "model.unet.norm": ("group", "channel"),
    "autoencoder_loss.perceptual_on": ("vgg", "tower"),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.decay": ("constant", "cosine"),
    "trainer.precision": ("32-true", "bf16-mixed", "16-mixed", "bf16-true"),
    "trainer.on_nan": ("stop", "skip"),
    "trainer.profiler": ("", "simple", "advanced", "pytorch"),
    "logging.wandb_mode": ("offline", "online", "disabled"),
}

NONE = "none"  # value of init_from: random weights, and meant to be
LENGTHS = ("max_steps", "max_epochs")  # of the trainer, of which one is 0
PATHS = (
    "output_dir", "autoencoder_from", "init_from", "trainer.resume", "cache.folder",
    "data.train_shards", "data.validation_shards", "data.remote_cache",
    "model.exemplar_encoder.pretrained",
    "autoencoder_loss.perceptual_vgg", "autoencoder_loss.perceptual_linear",
)  # fmt: skip

T = TypeVar("T")


def _leaf_keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in config:
        name = f"{prefix}{key!s}"
        keys.append(name)
        if isinstance(config[key], DictConfig):
            keys.extend(_leaf_keys(config[key], f"{name}."))
    return keys


def _nearest(key: str, known: list[str]) -> str:
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return same_leaf[0] if same_leaf else match[0]


def _explain(error: OmegaConfBaseException, source: str, known: list[str]) -> UserError:
    key = " ".join((error.full_key or str(error.key or "")).split())
    if isinstance(error, ConfigKeyError):
        return UserError(f"{source}: unknown key '{key}'; the nearest valid one is '{_nearest(key, known)}'")
    reason = str(error.msg or error).splitlines()[0]
    return UserError(f"{source}: wrong value for '{key}': {reason}" if key else f"{source}: {reason}")


def _merge(base: DictConfig, addition: DictConfig, source: str) -> DictConfig:
    check_kinds(base, addition, source)
    try:
        merged = OmegaConf.merge(base, addition)
    except OmegaConfBaseException as error:
        raise _explain(error, source, _leaf_keys(base)) from error
    except (TypeError, ValueError, RecursionError) as error:  # OmegaConf's own, where kinds do not fit
        raise UserError(f"{source}: {one_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _finish(config: DictConfig, cls: type[T], source: str) -> T:
    try:
        for name, allowed in CHOICES.items():
            key = name if cls is Config else name.removeprefix("model.")
            if (value := OmegaConf.select(config, key)) is not None and value not in allowed:
                given = " ".join(str(value).split())
                raise UserError(f"{source}: '{key}' is '{given}'; it must be one of {', '.join(allowed)}")
        if cls is Config:
            for name in PATHS:
                if (text := str(OmegaConf.select(config, name))).startswith("~"):
                    OmegaConf.update(config, name, expanded(text, name))
            check_numbers(config, source)
        result = OmegaConf.to_object(config)
    except (OmegaConfBaseException, RecursionError) as error:  # an interpolation that leads nowhere
        raise UserError(f"{source}: {str(error).splitlines()[0]}") from error
    assert isinstance(result, cls)
    return result


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply ``key=value`` overrides and return the typed, checked configuration.

    A file may name another one under ``base:`` (a path relative to itself), which is read first. Of
    ``trainer.max_steps`` and ``trainer.max_epochs`` the one that is named last holds. ``~`` at the start of a
    path is the home folder.

    Args:
        path: YAML file.
        overrides: such as ``["trainer.max_steps=100", "data.batch_size=8"]``; later ones win.

    Raises:
        UserError: missing file, invalid YAML, unknown key (the nearest valid one is named), wrong type,
            choice or number; both lengths named in one place, or the start that a file names taken away.
    """
    config: DictConfig = OmegaConf.structured(Config)
    texts = {name for name in _leaf_keys(config) if isinstance(OmegaConf.select(config, name), str)}
    for source, loaded in _chain(expanded(str(path), "the configuration")):
        config = _layer(config, [(str(source), loaded)])
    typed = [(f"override '{' '.join(text.split())}'", read_override(text, texts)) for text in overrides or []]
    config = _layer(config, typed)
    return _finish(config, Config, f"{path} with overrides" if typed else str(path))


def _layer(config: DictConfig, parts: list[tuple[str, DictConfig]]) -> DictConfig:
    """Merge what stands in one place: a file, or all overrides."""
    lengths: dict[str, Any] = {}
    for source, part in parts:
        start = _raw(config)["init_from"]
        config = _merge(config, part, source)
        if start not in ("", NONE) and _raw(config)["init_from"] == "":
            raise UserError(
                f"{source}: 'init_from' is empty, and was '{start}'; name a model to start from, or "
                f"init_from={NONE} for random weights"
            )
        named, merged = _raw(part).get("trainer") or {}, _raw(config)["trainer"]
        lengths |= {name: merged[name] for name in LENGTHS if name in named}
        lengths = {name: value for name, value in lengths.items() if value}
        if len(lengths) == len(LENGTHS):
            raise UserError(
                f"{source}: both 'trainer.max_steps' and 'trainer.max_epochs' are given; leave one out"
            )
    for name in LENGTHS:
        if lengths and name not in lengths:
            config.trainer[name] = 0
    return config


def _raw(config: DictConfig) -> dict[str, Any]:
    """Return values as they stand, references among them."""
    content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    return content  # type: ignore[return-value]


def _chain(path: str) -> list[tuple[Path, DictConfig]]:
    """Return the files that a configuration is made of, the one that is read first first."""
    files: list[tuple[Path, DictConfig]] = []
    current = Path(path)
    while True:
        loaded = read_yaml(current)
        files.insert(0, (current, loaded))
        base = None if OmegaConf.is_interpolation(loaded, "base") else loaded.pop("base", None)
        if not base:
            return files
        if not isinstance(base, str):
            raise UserError(f"{current}: 'base' is the path of a configuration, not '{base}'")
        parent = current.parent / expanded(base, "base")
        if parent.resolve() in [file.resolve() for file, _ in files]:
            raise UserError(f"{path}: '{parent}' is its own base")
        if not parent.is_file():
            raise UserError(f"{current}: no configuration file at its base '{parent}'")
        current = parent


def to_dict(config: Any) -> dict[str, Any]:
    """Return a plain, JSON-ready dictionary of a configuration dataclass."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any], source: str = "configuration") -> T:
    """Build a configuration dataclass of type ``cls`` from a dictionary; strict like :func:`load_config`."""
    try:
        given = OmegaConf.create(values)
    except Exception as error:  # half a reference, or a value that no configuration holds
        raise UserError(f"{source}: {one_line(error)}") from error
    return _finish(_merge(OmegaConf.structured(cls), given, source), cls, source)


def save_yaml(config: Config, path: str | Path) -> None:
    """Write the complete configuration as YAML, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    write_output(Path(path), text.encode("utf-8", "surrogateescape"))
