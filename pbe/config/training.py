"""Configuration of a training: objective, losses, optimizer, trainer, logging, and all of it together."""

from __future__ import annotations

from dataclasses import dataclass, field

from pbe.config.data import CacheConfig, DataConfig
from pbe.config.fields import choice, number, path
from pbe.config.model import ModelConfig

NONE = "none"  # value of init_from: random weights, on purpose
# Of UNet and bottleneck: values of optimizer.parts and lora.targets.
PARTS = (
    *("self_attention", "cross_attention", "cross_attention_keys", "feed_forward", "projections"),
    *("residual", "mapper"),
)


@dataclass
class ObjectiveConfig:
    """Training objective of the diffusion model."""

    weighting: str = choice("uniform", "min_snr")
    """Weights of the timesteps: all equal, or min-SNR (Hang et al. 2023)."""
    min_snr_gamma: float = number(5.0)
    """Upper bound on the signal-to-noise ratio in the min-SNR weights."""
    drop_probability: float = number(0.2, high=1)
    """Probability that the condition becomes the null condition."""
    drop_mode: str = choice("per_sample", "per_batch")
    """Decide whether to drop the condition for each sample or, as the original code does, for each batch."""


@dataclass
class DistillationConfig:
    """Distillation of a trained model into a few-step model, with one call per step, guidance included."""

    method: str = choice("trajectory", "consistency")
    """``trajectory``: the student goes from noise to the image in its few steps, and after each is pulled to
    where the teacher is; ``consistency``: from a noised image it must reach the same end of a step as from a
    point further along (latent consistency distillation)."""
    steps: int = number(4, low=1, high=50)
    """Number of steps that the student will be used with."""
    guidance: list[float] = field(default_factory=lambda: [1.0, 8.0])
    """Lowest and highest guidance scale that the student learns, as an input of its UNet. Two equal numbers:
    that scale alone, without an input; adapters need this."""
    teacher_steps: int = number(12, low=1, high=500)
    """Steps of the teacher from noise to image, a multiple of ``steps``; about 50 for ``consistency``."""
    huber: float = number(1.0e-3, low=1.0e-6)
    """Width of the pseudo-Huber distance: squared for errors well below it, linear above."""


@dataclass
class AutoencoderLossConfig:
    """Loss of the autoencoder: a weighted sum of terms, each a mean over its elements."""

    l1_weight: float = number(1.0)
    """Weight of the absolute error."""
    l2_weight: float = number(0.0)
    """Weight of the squared error."""
    gradient_weight: float = number(1.0)
    """Weight of the absolute error of finite differences."""
    kl_weight: float = number(1.0e-4)
    """Weight of the KL divergence of the posterior from a standard normal."""
    masked_share: float = number(0.0, high=1)
    """Share of images whose masked region is greyed, like the masked images of stage two."""
    train: str = choice("all", "decoder")
    """Train the whole autoencoder, or only its decoder, which leaves the latents unchanged."""
    masked_weight: float = number(1.0, low=0.001)
    """Weight of a pixel in the masked region, relative to one outside, in the first three terms."""
    perceptual_weight: float = number(0.0)
    """Weight of the perceptual distance."""
    perceptual_on: str = choice("vgg", "tower")
    """LPIPS on VGG16, or the same distance on the model's own image tower, which needs no extra weights."""
    perceptual_vgg: str = path()
    """File of torchvision's VGG16 weights."""
    perceptual_linear: str = path()
    """File of the LPIPS weights; empty: all channels of a layer count equally."""
    adversarial_weight: float = number(0.0)
    """Weight of the hinge loss of a patch discriminator."""
    adversarial_start: int = number(0)
    """Optimizer step at which the adversarial term sets in."""
    adversarial_adaptive: bool = True
    """Multiply the weight by the ratio of the other terms' gradient norm to this one's."""
    discriminator_layers: int = number(3, low=1, high=8)
    """Strided layers of the discriminator."""
    discriminator_channels: int = number(64, low=1)
    """Channels of the discriminator's first layer, a multiple of 16."""


@dataclass
class OptimizerConfig:
    """Optimizer, learning-rate schedule and moving average."""

    name: str = choice("adamw", "muon")
    """``muon`` updates matrices and kernels by orthogonalised momentum, at the scale of AdamW's updates, and
    vectors by NAdamW."""
    learning_rate: float = number(1.0e-5)
    """Learning rate after the warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the two moments, each from 0 to below 1."""
    eps: float = number(1.0e-8)
    """Number added to the denominator of an update."""
    weight_decay: float = number(0.01)
    """Decoupled weight decay."""
    decay_groups: bool = True
    """Exempt norms, biases and the null condition from weight decay."""
    warmup_steps: int = number(10_000)
    """Steps of linear warm-up."""
    decay: str = choice("constant", "cosine")
    """Learning rate after the warm-up: constant, or half a cosine to zero at the end of the run."""
    cooldown_steps: int = number(0)
    """Number of steps at the end over which a constant rate falls to zero; 0: none."""
    ema_decay: float = number(0.9999, high=0.999999)
    """Decay of the moving average of the weights; 0: no average."""
    gradient_clip: float = number(1.0)
    """Largest norm of the gradients; 0: not clipped."""
    fused: bool = False
    """Update all weights in one kernel (``adamw`` only); always on for CPUs."""
    parts: list[str] = field(default_factory=list)
    """Train only these parts and freeze the rest: ``self_attention``, ``cross_attention`` (values and
    outputs), ``cross_attention_keys`` (queries and keys), ``feed_forward``, ``projections`` (around the
    transformers), ``residual`` (residual blocks, down- and upsampling), ``mapper``; empty: train all."""


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021), trained in place of the model's own weights."""

    rank: int = number(0, high=1024)
    """Rank of every adapter; 0: train the weights themselves, without adapters."""
    alpha: float = number(16.0)
    """Strength: an adapter's output is scaled by alpha over rank."""
    targets: list[str] = field(
        default_factory=lambda: ["self_attention", "cross_attention", "feed_forward", "mapper"]
    )
    """Parts that get adapters; the names are those of ``optimizer.parts``."""
    base: str = choice("bf16", "fp32", "int8")
    """Type of the frozen weights of UNet and bottleneck; adapters are float32. ``int8`` computes in bf16."""


@dataclass
class TrainerConfig:
    """Length, devices, checkpoints and validation of a run."""

    max_steps: int = number(1000)
    """Length in optimizer steps; 0: ``max_epochs`` gives the length."""
    max_epochs: int = number(0)
    """Length in epochs; 0: ``max_steps`` gives the length."""
    accelerator: str = "auto"
    """Kind of device, as in Lightning: ``auto``, ``cpu``, ``gpu``, ``mps``, ..."""
    devices: str = "auto"
    """Number of devices, or a list of GPUs such as ``0,1``."""
    num_nodes: int = number(1, low=1)
    """Number of machines."""
    strategy: str = "auto"
    """Strategy for several devices, as in Lightning, such as ``ddp``; ``fsdp2`` shards the weights."""
    precision: str = choice("32-true", "bf16-mixed", "16-mixed", "bf16-true")
    """Precision of the arithmetic, and with ``bf16-true`` of the weights."""
    accumulate: int = number(1, low=1)
    """Micro-batches per optimizer step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third more time."""
    channels_last: bool = False
    """Use the memory layout that convolutions prefer, on GPUs and on CPUs."""
    compile: bool = False
    """Compile the networks with ``torch.compile``."""
    profiler: str = choice("", "simple", "advanced", "pytorch")
    """Lightning's profiler; empty: none."""
    on_nan: str = choice("stop", "skip")
    """What to do if the loss or gradients are not finite: stop, or skip the step."""
    max_skipped: int = number(10)
    """Largest number of skipped steps in a row."""
    threads: int = number(0)
    """CPU threads of a process; 0: torch's choice."""
    resume: str = path("auto")
    """``auto`` continues from the newest checkpoint of ``output_dir``; ``never`` refuses if there is one;
    anything else is the path of a checkpoint or run to start from."""
    checkpoint_every: int = number(1000, low=1)
    """Steps between checkpoints."""
    checkpoint_minutes: float = number(0.0)
    """Write a checkpoint after this many minutes, too; 0: by steps only."""
    keep_checkpoints: int = number(2, low=-1)
    """Number of older checkpoints to keep; -1: all."""
    keep_every: int = number(0)
    """Steps between checkpoints that are never deleted; 0: none."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest validation loss."""
    validate_every: int = number(500, low=1)
    """Steps between validations."""
    validation_samples: int = number(32, low=1)
    """Number of samples in a validation."""
    overfit_batches: int = number(0)
    """Train on this many batches only, always with the same samples, masks and noise; 0: off."""
    progress: bool = True
    """Show a progress bar."""


@dataclass
class LoggingConfig:
    """Loggers and sample grids."""

    loggers: list[str] = field(default_factory=lambda: ["csv", "wandb"])
    """Where to log: any of ``csv``, ``wandb`` and ``tensorboard``."""
    wandb_project: str = "pbe"
    """Project at Weights & Biases."""
    wandb_mode: str = choice("offline", "online", "disabled")
    """Whether Weights & Biases logs to disk, to its server, or not at all."""
    run_name: str = ""
    """Name of the run at Weights & Biases; empty: the name of its folder."""
    every: int = number(10, low=1)
    """Steps between logged values."""
    grid_every: int = number(1000)
    """Steps between sample grids; 0: none."""
    grid_samples: int = number(6, low=1)
    """Rows of a sample grid."""
    grid_steps: int = number(25, low=1, high=500)
    """Sampling steps of a grid's edits."""
    grid_guidance: list[float] = field(default_factory=lambda: [1.0, 3.0, 5.0])
    """Guidance scales of a grid's edits."""


@dataclass
class Config:
    """One reproducible experiment."""

    task: str = choice("diffusion", "autoencoder", "distillation")
    """What to train: the diffusion model (stage two), its autoencoder (stage one), or a few-step student."""
    seed: int = number(23, high=2**32 - 1)  # NumPy's largest
    """Seed of every random draw."""
    output_dir: str = path("outputs/run")
    """Folder for the run: logs, checkpoints and the trained model."""
    autoencoder_from: str = path()
    """Model whose autoencoder is used, if ``init_from`` names none; ``toy``: the one that ships."""
    init_from: str = path()
    """Model to start from, in any layout; ``none``: start from random weights."""
    model_from_init: bool = False
    """Take the ``model`` section from ``init_from``; ``data.image_size`` may set another resolution."""
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    autoencoder_loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def start(self) -> str:
        """The model to start from; empty for random weights."""
        return "" if self.init_from == NONE else self.init_from
