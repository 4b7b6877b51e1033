"""Names of the original's checkpoints (CompVis' latent diffusion), whose UNet is two flat lists of blocks."""

from __future__ import annotations

import re

from pbe.checkpoints.clip import vision_names
from pbe.checkpoints.key_map import Entry
from pbe.config import AutoencoderConfig, ModelConfig, UNetConfig

UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
CONDITION = "cond_stage_model."
TOWER = "cond_stage_model.transformer.vision_model."

RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
MAPPER = {
    "norm1": "ln_1",
    "attention.qkv": "attn.c_qkv",
    "attention.proj": "attn.c_proj",
    "norm2": "ln_2",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
}
MIDDLE = {"mid1": "middle_block.0", "mid_attention": "middle_block.1", "mid2": "middle_block.2"}


def entries(config: ModelConfig, keys: list[str]) -> list[Entry]:
    """Return the entries of the native ``keys``, each with its part in front."""
    return [_entry(key, config) for key in keys]


def _entry(key: str, config: ModelConfig) -> Entry:
    part, _, rest = key.partition(".")
    if part == "unet":
        return Entry(key, (UNET + unet_name(rest, config.unet),))
    if part == "autoencoder":
        return Entry(key, (AUTOENCODER + autoencoder_name(rest, config.autoencoder),))
    if rest.startswith("tower."):
        names, kind = vision_names(rest.removeprefix("tower."))
        return Entry(key, tuple(TOWER + name for name in names), kind)
    return Entry(key, (condition_name(rest),))


def transformer_name(name: str) -> str:
    """Translate what stands inside a spatial transformer; the original and diffusers name it alike."""
    name = re.sub(r"^block\.", "transformer_blocks.0.", name)
    name = name.replace(".ff.proj.", ".ff.net.0.proj.").replace(".ff.out.", ".ff.net.2.")
    return name.replace(".to_out.", ".to_out.0.")


def unet_name(key: str, config: UNetConfig) -> str:
    """Translate a key of the UNet; the original counts the blocks of all levels straight through."""
    head, _, rest = key.partition(".")
    if head in MIDDLE:
        return f"{MIDDLE[head]}.{_inner(head != 'mid_attention', rest)}"
    match = re.fullmatch(r"(down|up)\.(\d+)\.(blocks|attentions|downsample|upsample)\.(.+)", key)
    if match is None:
        return {"conv_in": "input_blocks.0.0.", "norm_out": "out.0.", "conv_out": "out.2."}.get(
            head, f"{head}."
        ) + rest
    side, kind, rest = match[1], match[3], match[4]
    level, per_level = int(match[2]), config.num_res_blocks + 1
    if kind == "downsample":
        return f"input_blocks.{(level + 1) * per_level}.0.{rest.replace('conv', 'op')}"
    if kind == "upsample":
        factor = 2 ** (len(config.channel_mult) - 1 - level)
        return (
            f"output_blocks.{(level + 1) * per_level - 1}.{1 + (factor in config.attention_factors)}.{rest}"
        )
    index, _, rest = rest.partition(".")
    # the input's list begins with the first convolution
    position = level * per_level + int(index) + (side == "down")
    lists = {"down": "input_blocks", "up": "output_blocks"}
    return f"{lists[side]}.{position}.{int(kind == 'attentions')}.{_inner(kind == 'blocks', rest)}"


def _inner(is_block: bool, name: str) -> str:
    if not is_block:
        return transformer_name(name)
    module, _, leaf = name.partition(".")
    return f"{RES_BLOCK[module]}.{leaf}"


def autoencoder_name(key: str, config: AutoencoderConfig) -> str:
    """Translate a key of the autoencoder, whose decoder the original numbers from the finest level on."""
    key = key.replace(".skip.", ".nin_shortcut.")
    key = re.sub(r"\.mid\.block(\d)\.", r".mid.block_\1.", key).replace(".mid.attention.", ".mid.attn_1.")
    match = re.fullmatch(r"(encoder|decoder)\.levels\.(\d+)\.(blocks|resample)\.(.+)", key)
    if match is None:
        return key
    side, level, kind, rest = match[1], int(match[2]), match[3], match[4]
    if side == "encoder":
        return f"encoder.down.{level}.{'block' if kind == 'blocks' else 'downsample'}.{rest}"
    level = len(config.channel_mult) - 1 - level
    return f"decoder.up.{level}.{'block' if kind == 'blocks' else 'upsample'}.{rest}"


def condition_name(key: str) -> str:
    """Translate a key of the exemplar encoder outside its tower."""
    if key == "null_condition":
        return "learnable_vector"
    if key.startswith("proj."):
        return f"proj_out.{key.removeprefix('proj.')}"
    if key.startswith("final_norm."):
        return f"{CONDITION}final_ln.{key.removeprefix('final_norm.')}"
    _, index, rest = key.split(".", 2)
    module, _, leaf = rest.rpartition(".")
    return f"{CONDITION}mapper.resblocks.{index}.{MAPPER[module]}.{leaf}"
