"""The original's YAML files: read into the model's configuration, and written from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pbe.checkpoints.clip import sizes_in_file, tower_sizes
from pbe.checkpoints.compvis.names import CONDITION, TOWER
from pbe.checkpoints.settings import Settings, Values, reading
from pbe.checkpoints.tensors import Lazies
from pbe.config import (
    AutoencoderConfig,
    ExemplarEncoderConfig,
    ModelConfig,
    ScheduleConfig,
    UNetConfig,
    loading,
)
from pbe.errors import UserError
from pbe.models.image_tower import follow_tower

UNET_FIXED: Values = {
    "conv_resample": True, "dims": 2, "dropout": 0, "legacy": False, "num_classes": None, "n_embed": None,
    "num_head_channels": -1, "num_heads_upsample": -1, "resblock_updown": False, "transformer_depth": 1,
    "use_linear_in_transformer": False, "use_scale_shift_norm": False, "use_spatial_transformer": True,
    "add_conv_in_front_of_unet": False,
}  # fmt: skip
AUTOENCODER_FIXED: Values = {
    "attn_resolutions": [], "double_z": True, "in_channels": 3, "out_ch": 3, "dropout": 0.0,
}  # fmt: skip
PREDICTIONS = ("eps", "v")


def is_original_yaml(content: Any) -> bool:
    """Tell whether the content of a YAML file has the original's structure."""
    model = content.get("model") if isinstance(content, dict) else None
    params = model.get("params") if isinstance(model, dict) else None
    return isinstance(params, dict) and "unet_config" in params


def read_yaml(path: Path) -> Any:
    """Read a YAML file as plain containers; errors as in :func:`pbe.config.loading.read_yaml`."""
    return OmegaConf.to_container(loading.read_yaml(path), resolve=False)


def read_config(content: Values, source: str, tensors: Lazies) -> ModelConfig:
    """Read the sizes of an original YAML; those of the tower, which it does not give, are the weights'."""
    with reading(source):
        return _read_model(content["model"]["params"], source, tensors)


def _read_model(params: Values, source: str, tensors: Lazies) -> ModelConfig:
    official = ScheduleConfig()
    root = Settings(params, source)
    unet = Settings(params["unet_config"].get("params", {}), f"{source}: unet_config")
    first = params.get("first_stage_config", {}).get("params", {})
    autoencoder = _read_autoencoder(Settings(first.get("ddconfig", {}), f"{source}: ddconfig"))
    autoencoder.scale_factor = root.real("scale_factor", autoencoder.scale_factor)
    if first.get("embed_dim", autoencoder.latent_channels) != autoencoder.latent_channels:
        raise UserError(f"{source}: 'embed_dim' is {first['embed_dim']}; it must equal 'z_channels'")
    factor = 2 ** (len(autoencoder.channel_mult) - 1)
    encoder = params.get("cond_stage_config", {}).get("params") or {}
    prediction = params.get("parameterization", "eps")
    if prediction not in PREDICTIONS:
        root.refuse(f"'parameterization' is {prediction}; this model has eps and v only")
    return ModelConfig(
        image_size=factor * root.number("image_size", 64),
        prediction=prediction,
        schedule=ScheduleConfig(
            root.number("timesteps", official.timesteps),
            root.real("linear_start", official.beta_start),
            root.real("linear_end", official.beta_end),
        ),
        unet=_read_unet(unet),
        autoencoder=autoencoder,
        exemplar_encoder=_read_encoder(Settings(encoder, f"{source}: cond_stage_config"), tensors),
    )


def _read_unet(settings: Settings) -> UNetConfig:
    settings.fixed(UNET_FIXED)
    return UNetConfig(
        model_channels=settings.number("model_channels"),
        channel_mult=list(settings.get("channel_mult", [1, 2, 4, 8])),
        num_res_blocks=settings.number("num_res_blocks"),
        attention_factors=sorted(settings.get("attention_resolutions")),
        num_heads=settings.number("num_heads"),
        context_dim=settings.number("context_dim"),
        time_embed_mult=settings.number("time_embed_mult", 4),
        norm_groups=settings.number("norm_groups", 32),
    )


def _read_autoencoder(settings: Settings) -> AutoencoderConfig:
    settings.fixed(AUTOENCODER_FIXED)
    return AutoencoderConfig(
        channels=settings.number("ch"),
        channel_mult=list(settings.get("ch_mult", [1, 2, 4, 8])),
        num_res_blocks=settings.number("num_res_blocks"),
        latent_channels=settings.number("z_channels"),
        norm_groups=settings.number("norm_groups", 32),
        mid_attention=bool(settings.get("mid_attention", True)),
    )


def _read_encoder(settings: Settings, tensors: Lazies) -> ExemplarEncoderConfig:
    mapper = [key for key in tensors if key.startswith(f"{CONDITION}mapper.resblocks.")]
    if f"{TOWER}embeddings.patch_embedding.weight" not in tensors or not mapper:
        raise UserError(f"{settings.source}: the checkpoint has no image tower with a mapper behind it")
    values = settings.values
    quick_gelu = values.get("hidden_act", "quick_gelu") == "quick_gelu"
    heads = settings.number("num_attention_heads") if "num_attention_heads" in values else None
    sizes, image_size = sizes_in_file(tensors, TOWER, heads=heads, quick_gelu=quick_gelu)
    fc, width = tensors[f"{CONDITION}mapper.resblocks.0.mlp.c_fc.weight"].shape
    return ExemplarEncoderConfig(
        tower=sizes.name,
        image_size=image_size,
        mean=list(settings.get("mean", [])),  # the tower's own, which are CLIP's
        std=list(settings.get("std", [])),
        mapper_layers=len({key.split(".")[3] for key in mapper}),
        mapper_heads=settings.number("mapper_heads", 1),
        mapper_mlp_ratio=fc // width,
    )


def write_config(config: ModelConfig) -> Values:
    """Return the content of an original YAML.

    What the original has no setting for is added only where the model departs from it; the original's own
    classes refuse such a setting, so that nothing is computed in another way unnoticed.
    """
    autoencoder, encoder = config.autoencoder, _write_encoder(config.exemplar_encoder)
    params: Values = {
        "linear_start": config.schedule.beta_start,
        "linear_end": config.schedule.beta_end,
        "timesteps": config.schedule.timesteps,
        "first_stage_key": "inpaint",
        "cond_stage_key": "image",
        "image_size": config.image_size // 2 ** (len(autoencoder.channel_mult) - 1),
        "channels": autoencoder.latent_channels,
        "cond_stage_trainable": True,
        "conditioning_key": "crossattn",
        "u_cond_percent": 0.2,
        "scale_factor": autoencoder.scale_factor,
        "use_ema": False,
        **_departures({"parameterization": (config.prediction, "eps")}),
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": _write_unet(config),
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL", "params": _write_autoencoder(autoencoder),
        },
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.FrozenCLIPImageEmbedder",
            **({"params": encoder} if encoder else {}),
        },
    }  # fmt: skip
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def _departures(values: dict[str, tuple[Any, Any]]) -> Values:
    return {key: value for key, (value, usual) in values.items() if value != usual}


def _write_unet(config: ModelConfig) -> Values:
    unet, latents = config.unet, config.autoencoder.latent_channels
    return {
        "image_size": 32,  # unused there, but wanted
        "in_channels": 2 * latents + 1,
        "out_channels": latents,
        "model_channels": unet.model_channels,
        "attention_resolutions": sorted(unet.attention_factors, reverse=True),
        "num_res_blocks": unet.num_res_blocks,
        "channel_mult": list(unet.channel_mult),
        "num_heads": unet.num_heads,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": unet.context_dim,
        "use_checkpoint": True,
        "legacy": False,
        **_departures({"time_embed_mult": (unet.time_embed_mult, 4), "norm_groups": (unet.norm_groups, 32)}),
    }


def _write_autoencoder(config: AutoencoderConfig) -> Values:
    sizes = {
        "double_z": True,
        "z_channels": config.latent_channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": config.channels,
        "ch_mult": list(config.channel_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
        **_departures(
            {"norm_groups": (config.norm_groups, 32), "mid_attention": (config.mid_attention, True)}
        ),
    }
    return {
        "embed_dim": config.latent_channels,
        "monitor": "val/rec_loss",
        "ddconfig": sizes,
        "lossconfig": {"target": "torch.nn.Identity"},
    }


def _write_encoder(config: ExemplarEncoderConfig) -> Values:
    sizes, official = tower_sizes(config), ExemplarEncoderConfig()
    follow_tower(official)
    heads = max(4, sizes.width // 64)
    return _departures(
        {
            "num_attention_heads": (sizes.heads, heads),
            "hidden_act": ("quick_gelu" if sizes.quick_gelu else "gelu", "quick_gelu"),
            "mean": (list(config.mean), official.mean),
            "std": (list(config.std), official.std),
            "mapper_heads": (config.mapper_heads, 1),
        }
    )
