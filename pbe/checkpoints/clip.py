"""The image tower of CLIP: its sizes, its names here (open_clip's) and in transformers' layout."""

from __future__ import annotations

import math
from typing import Any

import open_clip

from pbe.checkpoints.key_map import Kind
from pbe.checkpoints.tensors import Lazies
from pbe.config import ExemplarEncoderConfig
from pbe.errors import UserError
from pbe.models.image_tower import TowerSizes

# What a tower may say of itself in open_clip's registry and still be the plain transformer of CLIP.
PLAIN = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}

MODULES = {
    "ln_pre": "pre_layrnorm",  # so misspelt in transformers
    "ln_post": "post_layernorm",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
SINGLE = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
}
POSITION_IDS = "embeddings.position_ids"


def tower_sizes(config: ExemplarEncoderConfig) -> TowerSizes:
    """Return the sizes of a configured tower."""
    if sizes := TowerSizes.from_name(config.tower):
        return sizes
    known = open_clip.get_model_config(config.tower) or {}
    vision = known.get("vision_cfg", {})
    if not vision or set(vision) - PLAIN or not isinstance(vision["layers"], int):
        raise UserError(
            f"the tower '{config.tower}' has no place in this layout, which knows CLIP's vision transformers "
            "only; keep the native layout"
        )
    width = vision["width"]
    return TowerSizes(
        width=width,
        layers=vision["layers"],
        patch=vision["patch_size"],
        heads=width // vision.get("head_width", 64),
        mlp=int(width * vision.get("mlp_ratio", 4.0)),
        quick_gelu=bool(known.get("quick_gelu", False)),
    )


def vision_config(sizes: TowerSizes, image_size: int) -> dict[str, Any]:
    """Return a tower's sizes and its input side in pixels by transformers' names."""
    return {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "patch_size": sizes.patch,
        "image_size": image_size,
        "hidden_act": "quick_gelu" if sizes.quick_gelu else "gelu",
    }


def vision_names(key: str) -> tuple[tuple[str, ...], Kind]:
    """Translate a key of open_clip's tower to transformers' (from ``embeddings`` or ``encoder`` on)."""
    if key in SINGLE:
        return (SINGLE[key],), "same"
    stem, _, leaf = key.removeprefix("transformer.resblocks.").rpartition(".")
    index, _, module = stem.partition(".")
    if stem in MODULES:
        return (f"{MODULES[stem]}.{leaf}",), "same"
    block = f"encoder.layers.{index}"
    if module in MODULES:
        return (f"{block}.{MODULES[module]}.{leaf}",), "same"
    kind = leaf.removeprefix("in_proj_")
    return (
        f"{block}.self_attn.q_proj.{kind}",
        f"{block}.self_attn.k_proj.{kind}",
        f"{block}.self_attn.v_proj.{kind}",
    ), "fused"


def sizes_in_file(
    tensors: Lazies, prefix: str, *, heads: int | None, quick_gelu: bool = True
) -> tuple[TowerSizes, int]:
    """Return the sizes of a tower under transformers' names behind ``prefix``, and its input side in pixels.

    No tensor shows heads and activation; None takes heads of width 64, as every tower of CLIP has, but no
    fewer than four.
    """
    width, _, patch, _ = tensors[f"{prefix}embeddings.patch_embedding.weight"].shape
    positions = tensors[f"{prefix}embeddings.position_embedding.weight"].shape[0]
    mlp = tensors[f"{prefix}encoder.layers.0.mlp.fc1.weight"].shape[0]
    layers = 1 + max(
        int(key.removeprefix(f"{prefix}encoder.layers.").partition(".")[0])
        for key in tensors
        if key.startswith(f"{prefix}encoder.layers.")
    )
    heads = heads or max(4, width // 64)
    if width % heads:
        raise UserError(f"a tower of width {width} cannot have {heads} heads; give the model's configuration")
    return TowerSizes(width, layers, patch, heads, mlp, quick_gelu), patch * math.isqrt(positions - 1)
