"""State dicts of the original's layout under this project's names: a table kept apart from the package's own.

Written out from the original's block numbering (one flat list of input and of output blocks), so that it
shares nothing with the conversions of ``pbe.checkpoints``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pbe.config import AutoencoderConfig, UNetConfig

Names = dict[str, str]

RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
CODEC_BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "nin_shortcut"}


def _transformer() -> Names:
    block = "transformer_blocks.0"
    names = {"norm": "norm", "proj_in": "proj_in", "proj_out": "proj_out"}
    names |= {f"block.norm{i}": f"{block}.norm{i}" for i in (1, 2, 3)}
    names |= {
        f"block.{a}.{ours}": f"{block}.{a}.{theirs}"
        for a in ("attn1", "attn2")
        for ours, theirs in ATTENTION.items()
    }
    return names | {"block.ff.proj": f"{block}.ff.net.0.proj", "block.ff.out": f"{block}.ff.net.2"}


def _under(ours: str, theirs: str, names: Names) -> Names:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in names.items()}


def unet_modules(config: UNetConfig) -> Names:
    """Our module names to the original's, relative to the UNet."""
    names = {"time_embed.0": "time_embed.0", "time_embed.2": "time_embed.2", "conv_in": "input_blocks.0.0"}
    names |= {"norm_out": "out.0", "conv_out": "out.2"}
    depth = len(config.channel_mult)
    position = 1
    for level in range(depth):
        for block in range(config.num_res_blocks):
            names |= _under(f"down.{level}.blocks.{block}", f"input_blocks.{position}.0", RES_BLOCK)
            if 2**level in config.attention_factors:
                names |= _under(
                    f"down.{level}.attentions.{block}", f"input_blocks.{position}.1", _transformer()
                )
            position += 1
        if level < depth - 1:
            names[f"down.{level}.downsample.conv"] = f"input_blocks.{position}.0.op"
            position += 1
    names |= _under("mid1", "middle_block.0", RES_BLOCK)
    names |= _under("mid_attention", "middle_block.1", _transformer())
    names |= _under("mid2", "middle_block.2", RES_BLOCK)
    position = 0
    for index in range(depth):
        attention = 2 ** (depth - 1 - index) in config.attention_factors
        for block in range(config.num_res_blocks + 1):
            names |= _under(f"up.{index}.blocks.{block}", f"output_blocks.{position}.0", RES_BLOCK)
            if attention:
                names |= _under(
                    f"up.{index}.attentions.{block}", f"output_blocks.{position}.1", _transformer()
                )
            if block == config.num_res_blocks and index < depth - 1:
                names[f"up.{index}.upsample.conv"] = f"output_blocks.{position}.{1 + attention}.conv"
            position += 1
    return names


def _codec_middle(side: str) -> Names:
    attention = {part: part for part in ("norm", "q", "k", "v", "proj_out")}
    names = _under(f"{side}.mid.block1", f"{side}.mid.block_1", CODEC_BLOCK)
    names |= _under(f"{side}.mid.attention", f"{side}.mid.attn_1", attention)
    names |= _under(f"{side}.mid.block2", f"{side}.mid.block_2", CODEC_BLOCK)
    return names | {f"{side}.{layer}": f"{side}.{layer}" for layer in ("conv_in", "norm_out", "conv_out")}


def autoencoder_modules(config: AutoencoderConfig) -> Names:
    """Our module names to the original's, relative to the autoencoder."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    names |= _codec_middle("encoder") | _codec_middle("decoder")
    depth = len(config.channel_mult)
    for level in range(depth):
        for block in range(config.num_res_blocks):
            names |= _under(
                f"encoder.levels.{level}.blocks.{block}", f"encoder.down.{level}.block.{block}", CODEC_BLOCK
            )
        if level < depth - 1:
            names[f"encoder.levels.{level}.resample.conv"] = f"encoder.down.{level}.downsample.conv"
        # the original numbers the decoder's levels by resolution, here they stand in the order they run
        ours = f"decoder.levels.{depth - 1 - level}"
        for block in range(config.num_res_blocks + 1):
            names |= _under(f"{ours}.blocks.{block}", f"decoder.up.{level}.block.{block}", CODEC_BLOCK)
        if level:
            names[f"{ours}.resample.conv"] = f"decoder.up.{level}.upsample.conv"
    return names


def mapper_modules(layers: int) -> Names:
    """Our module names (of the exemplar encoder, without tower) to the original's, from the root."""
    block = {"norm1": "ln_1", "attention.qkv": "attn.c_qkv", "attention.proj": "attn.c_proj"}
    block |= {"norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
    names = {"final_norm": "cond_stage_model.final_ln", "proj": "proj_out"}
    for index in range(layers):
        names |= _under(f"mapper.{index}", f"cond_stage_model.mapper.resblocks.{index}", block)
    return names


def clip_tower_state(source: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The vision tower of transformers (keys from ``embeddings`` on) under open_clip's names."""
    state = {
        "class_embedding": source["embeddings.class_embedding"],
        "positional_embedding": source["embeddings.position_embedding.weight"],
        "conv1.weight": source["embeddings.patch_embedding.weight"],
    }
    modules = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    parts |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for index in range(layers):
        ours, theirs = f"transformer.resblocks.{index}", f"encoder.layers.{index}"
        modules |= _under(ours, theirs, parts)
        for kind in ("weight", "bias"):
            fused = [source[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{ours}.attn.in_proj_{kind}"] = torch.cat(fused)
    return state | renamed(source, modules)


def renamed(source: dict[str, Tensor], modules: Names, prefix: str = "") -> dict[str, Tensor]:
    """Pick the tensors of ``modules`` out of ``source``, whose keys start with ``prefix``; keep our names."""
    state = {}
    for ours, theirs in modules.items():
        for kind in ("weight", "bias"):
            if f"{prefix}{theirs}.{kind}" in source:
                state[f"{ours}.{kind}"] = source[f"{prefix}{theirs}.{kind}"]
    return state
