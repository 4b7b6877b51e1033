"""Names of a folder in diffusers' layout, and those that its older releases and transformers' used."""

from __future__ import annotations

import re

from pbe.checkpoints.clip import POSITION_IDS, vision_names
from pbe.checkpoints.compvis.names import transformer_name
from pbe.checkpoints.key_map import Entry
from pbe.checkpoints.tensors import Lazies
from pbe.config import ExemplarEncoderConfig

FOLDERS = {"unet": "unet", "autoencoder": "vae", "exemplar_encoder": "image_encoder"}
TOWER = "model.vision_model."

RES_BLOCK = {"time_proj": "time_emb_proj", "skip": "conv_shortcut"}
TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
}
MIDDLE = {
    "mid1": "mid_block.resnets.0",
    "mid_attention": "mid_block.attentions.0",
    "mid2": "mid_block.resnets.1",
    "block1": "mid_block.resnets.0",
    "block2": "mid_block.resnets.1",
    "attention": "mid_block.attentions.0",
}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
MAPPER = {
    "norm1": "norm1",
    "attention.proj": "attn1.to_out.0",
    "norm2": "norm3",  # the block that they use has a second norm for a cross-attention that is not there
    "fc1": "ff.net.0.proj",
    "fc2": "ff.net.2",
}


def entries(part: str, config: ExemplarEncoderConfig, keys: list[str]) -> list[Entry]:
    """Return the entries of one part's native ``keys``, which have the part in front."""
    return [_entry(part, key, key.removeprefix(f"{part}."), config) for key in keys]


def _entry(part: str, native: str, key: str, config: ExemplarEncoderConfig) -> Entry:
    if part == "unet":
        return Entry(native, (unet_name(key),))
    if part == "autoencoder":
        name = autoencoder_name(key)
        linear = re.search(r"\.attentions\.0\.to_\w+(\.0)?\.weight$", name) is not None
        return Entry(native, (name,), "linear" if linear else "same")
    if key.startswith("tower."):
        names, kind = vision_names(key.removeprefix("tower."))
        return Entry(native, tuple(TOWER + name for name in names), kind)
    if ".attention.qkv." in key:
        block, leaf = re.sub(r"^mapper", "mapper.blocks", key).split(".attention.qkv.")
        fused = tuple(f"{block}.attn1.to_{part}.{leaf}" for part in "qkv")
        return Entry(native, fused, "fused", config.mapper_heads)
    return Entry(native, (condition_name(key),))


def unet_name(key: str) -> str:
    """Translate a key of the UNet."""
    module, _, leaf = key.rpartition(".")
    head, _, rest = key.partition(".")
    if module in TOP:
        return f"{TOP[module]}.{leaf}"
    if head in MIDDLE:
        return f"{MIDDLE[head]}.{transformer_name(rest) if head == 'mid_attention' else _res_block(rest)}"
    match = re.fullmatch(r"(down|up)\.(\d+)\.(blocks|attentions|downsample|upsample)\.(.+)", key)
    if match is None:
        return key
    level, kind, rest = f"{match[1]}_blocks.{match[2]}", match[3], match[4]
    if kind.endswith("sample"):
        return f"{level}.{kind}rs.0.{rest}"
    index, _, rest = rest.partition(".")
    if kind == "blocks":
        return f"{level}.resnets.{index}.{_res_block(rest)}"
    return f"{level}.attentions.{index}.{transformer_name(rest)}"


def _res_block(name: str) -> str:
    module, _, leaf = name.partition(".")
    return f"{RES_BLOCK.get(module, module)}.{leaf}"


def autoencoder_name(key: str) -> str:
    """Translate a key of the autoencoder."""
    key = re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", key)
    if match := re.fullmatch(r"(encoder|decoder)\.mid\.(\w+)\.(.+)\.(\w+)", key):
        names = ATTENTION if match[2] == "attention" else RES_BLOCK
        return f"{match[1]}.{MIDDLE[match[2]]}.{names.get(match[3], match[3])}.{match[4]}"
    match = re.fullmatch(r"(encoder|decoder)\.levels\.(\d+)\.(blocks|resample)\.(.+)", key)
    if match is None:
        return key
    way = "down" if match[1] == "encoder" else "up"
    level = f"{match[1]}.{way}_blocks.{match[2]}"
    if match[3] == "resample":
        return f"{level}.{way}samplers.0.{match[4]}"
    index, _, rest = match[4].partition(".")
    return f"{level}.resnets.{index}.{_res_block(rest)}"


def condition_name(key: str) -> str:
    """Translate a key of the exemplar encoder outside its tower and its fused projections."""
    key = re.sub(r"^proj\.", "proj_out.", key.replace("final_norm.", "final_layer_norm."))
    if key == "null_condition":
        return "uncond_vector"
    if not key.startswith("mapper."):
        return key
    _, index, rest = key.split(".", 2)
    module, _, leaf = rest.rpartition(".")
    return f"mapper.blocks.{index}.{MAPPER[module]}.{leaf}"


def current_names(part: str, tensors: Lazies) -> Lazies:
    """Bring the names of every age to those that are written today, and leave position indices out.

    diffusers before 0.18 called an autoencoder's attention query, key, value and proj_attn; transformers
    from 5 on leaves the level ``vision_model`` out of a tower's names.
    """
    if part == "autoencoder":
        return {_attention_today(key): value for key, value in tensors.items()}
    if part == "exemplar_encoder":
        renamed = {re.sub(r"^model\.(?!vision_model\.)", TOWER, key): value for key, value in tensors.items()}
        return {key: value for key, value in renamed.items() if not key.endswith(POSITION_IDS)}
    return tensors


def _attention_today(key: str) -> str:
    match = re.fullmatch(r"(.*\.attentions\.0\.)(\w+)\.(weight|bias)", key)
    if match is None or match[2] not in OLD_ATTENTION:
        return key
    return f"{match[1]}{OLD_ATTENTION[match[2]]}.{match[3]}"
