"""Image towers: any open_clip visual architecture or timm trunk, with its final projection left out.

Also what a tower wants: mean, deviation and size of the images that its weights were trained on.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from pbe.config import Config, ExemplarEncoderConfig
from pbe.errors import UserError
from pbe.models.lite_tower import NAME as LITE, EfficientNetLite0

TIMM, DESCRIBED = "timm/", "vit/"
PACKAGED = (127 / 255, 128 / 255)  # mean and deviation of the weights that come as a Python package
LARGEST = 4096  # pixels; a position table of more would take gigabytes
OFFICIAL = "ViT-L-14-quickgelu"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VIT = re.compile(r"vit/(\d+)x(\d+)-patch(\d+)-heads(\d+)-mlp(\d+)(-quickgelu)?")


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of a vision transformer of CLIP; ``mlp`` is the inner width, ``quick_gelu`` its activation."""

    width: int
    layers: int
    patch: int
    heads: int
    mlp: int
    quick_gelu: bool = True

    @staticmethod
    def from_name(name: str) -> TowerSizes | None:
        """Return the sizes that a name ``vit/<sizes>`` gives, None for any other."""
        match = VIT.fullmatch(name)
        if match is None:
            return None
        width, layers, patch, heads, mlp = (int(size) for size in match.groups()[:5])
        return TowerSizes(width, layers, patch, heads, mlp, quick_gelu=match[6] is not None)

    @property
    def name(self) -> str:
        """What ``exemplar_encoder.tower`` calls it."""
        if self == TowerSizes(1024, 24, 14, 16, 4096):
            return OFFICIAL
        sizes = f"vit/{self.width}x{self.layers}-patch{self.patch}-heads{self.heads}-mlp{self.mlp}"
        return sizes + ("-quickgelu" if self.quick_gelu else "")


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
    if config.tower.startswith(TIMM):
        tower = TimmTower(_bare_trunk(config.tower.removeprefix(TIMM)))
        return tower, _finish_trunk(tower, config)
    from open_clip.model import CLIPVisionCfg, _build_vision_tower  # no public builder of the tower alone

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


def _bare_trunk(name: str) -> nn.Module:
    """Build a trunk of timm's. timm and open_clip take seconds to import: only what needs them does."""
    if name == LITE:
        return EfficientNetLite0()
    import timm

    trunk: Any = timm.create_model(_known_to_timm(name), pretrained=False)
    trunk.reset_classifier(0)
    return trunk


class TimmTower(nn.Module):
    """A bare timm trunk, pooled as it is by itself; keys are those of open_clip's adapter."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head: nn.Module = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """Map ``(b, 3, s, s)`` to the pooled feature ``(b, width)``."""
        return self.head(self.trunk(pixels))


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
    if config.tower.startswith(DESCRIBED):
        return _described_transformer(config)
    import open_clip

    known = open_clip.get_model_config(config.tower)
    if known is None:
        raise UserError(
            f"exemplar_encoder.tower '{config.tower}' is not an open_clip architecture; "
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
    if "timm_model_name" in vision:
        _known_to_timm(vision["timm_model_name"])
    vision["timm_model_pretrained"] = False
    return vision, int(known["embed_dim"]), bool(known.get("quick_gelu", False))


def _described_transformer(config: ExemplarEncoderConfig) -> tuple[dict[str, Any], int, bool]:
    """Return the sections of a CLIP vision transformer whose name gives its sizes."""
    sizes = TowerSizes.from_name(config.tower)
    if sizes is None:
        raise UserError(
            f"exemplar_encoder.tower '{config.tower}' is not of the form "
            "vit/<width>x<layers>-patch<size>-heads<number>-mlp<width>[-quickgelu]"
        )
    if 0 in dataclasses.astuple(sizes)[:5] or sizes.width % sizes.heads:
        raise UserError(
            f"exemplar_encoder.tower '{config.tower}': no size may be 0; heads must divide the width"
        )
    check_divided(config, sizes.patch)
    vision = {
        "width": sizes.width,
        "layers": sizes.layers,
        "patch_size": sizes.patch,
        "head_width": sizes.width // sizes.heads,
        "mlp_ratio": (sizes.mlp + 0.5) / sizes.width,  # open_clip rounds width * ratio down, to mlp exactly
        "image_size": config.image_size,
        "output_tokens": config.tokens == "all",
    }
    return vision, sizes.width, sizes.quick_gelu


def _known_to_timm(name: str) -> str:
    import timm

    if not timm.is_model(name):
        raise UserError(f"timm has no model '{name}'; timm.list_models() shows those that exist")
    return name


def tower_stages(tower: nn.Module, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the pooled feature of a tower and the maps of its stages.

    Args:
        tower: as :func:`build_tower` makes it; it must be able to give its stages
            (``forward_intermediates``), which timm's and open_clip's can.
        pixels: ``(b, 3, s, s)`` normalised.

    Returns:
        The pooled feature ``(b, width)``, and one ``(b, c, h, w)`` for each stage of a convolutional tower or
        each block of a transformer, from the first one up.
    """
    trunk: Any = getattr(tower, "trunk", None)
    if trunk is not None:
        last, maps = trunk.forward_intermediates(pixels)
        return trunk.forward_head(last, pre_logits=True), maps
    output = tower.forward_intermediates(pixels)  # type: ignore[operator]
    return output["image_features"], output["image_intermediates"]


def stage_widths(tower: nn.Module) -> list[int]:
    """Return the channels of the maps of :func:`tower_stages`."""
    trunk: Any = getattr(tower, "trunk", None)
    if trunk is not None:
        return [int(stage["num_chs"]) for stage in trunk.feature_info]
    network: Any = tower
    if hasattr(network, "layer4"):  # a ResNet of CLIP: its stem and four stages
        stages = [network.layer1, network.layer2, network.layer3, network.layer4]
        return [int(network.conv3.out_channels), *(int(stage[-1].conv3.out_channels) for stage in stages)]
    return [int(network.conv1.out_channels)] * len(network.transformer.resblocks)


def check_divided(config: ExemplarEncoderConfig, patch: int) -> None:
    """Refuse a size that the patches of a transformer do not fill."""
    size = config.image_size
    if size % patch:
        near = [multiple * patch for multiple in (size // patch, size // patch + 1) if multiple]
        raise UserError(
            f"exemplar_encoder.image_size is {size}, which the patches of '{config.tower}', {patch} pixels, "
            f"do not divide; the nearest that they do: {' and '.join(map(str, near))}"
        )


@dataclass(frozen=True)
class TowerFacts:
    """Mean, deviation and side (pixels) of the images that a tower was trained on.

    Attributes:
        mean: of three channels.
        std: likewise.
        image_size: 0 where it is not known.
        fixed: positions are learnt for that size, and resampled for any other.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int = 0
    fixed: bool = False


def tower_facts(config: ExemplarEncoderConfig) -> TowerFacts:
    """Return what the weights that a configuration names were trained on.

    timm's and open_clip's own lists say it: that of the tag in ``pretrained``, else of the tag in the name of
    the tower, else of the architecture. Transformers that are described by sizes are CLIP's.
    """
    clip = TowerFacts(CLIP_MEAN, CLIP_STD)
    if config.tower.startswith(TIMM):
        facts = _timm_facts(config)
        if config.pretrained == "pypi":
            return replace(facts or clip, mean=(PACKAGED[0],) * 3, std=(PACKAGED[1],) * 3)
        return facts or clip
    if config.tower.startswith(DESCRIBED):
        return clip
    import open_clip

    known = open_clip.get_model_config(config.tower)
    if known is None:
        return clip
    tags = open_clip.list_pretrained_tags_by_model(config.tower)
    wanted = [config.pretrained] if config.pretrained in tags else tags
    weights = [open_clip.get_pretrained_cfg(config.tower, tag) for tag in wanted]
    means = {(tuple(each.get("mean", clip.mean)), tuple(each.get("std", clip.std))) for each in weights}
    mean, std = next(iter(means)) if len(means) == 1 else (clip.mean, clip.std)
    vision = known["vision_cfg"]
    size = vision.get("image_size", 0)
    fixed = "patch_size" in vision or "vit" in vision.get("timm_model_name", "")
    return TowerFacts(mean, std, int(size[0] if isinstance(size, (list, tuple)) else size), fixed)


def _timm_facts(config: ExemplarEncoderConfig) -> TowerFacts | None:
    import timm

    name, tag = timm_name(config)
    if not timm.is_model(name):
        return None  # the building of the tower says so
    found = timm.models.get_pretrained_cfg(f"{name}.{tag}" if tag else name)
    if found is None:
        return None
    return TowerFacts(
        tuple(found.mean), tuple(found.std), int(found.input_size[-1]), bool(found.fixed_input_size)
    )


def timm_name(config: ExemplarEncoderConfig) -> tuple[str, str]:
    """Return timm's name of a tower and the tag of its weights: ``pretrained``, or that in the name."""
    if not config.tower.startswith(TIMM):  # one of open_clip's around a trunk of timm's
        import open_clip

        return str(open_clip.get_model_config(config.tower)["vision_cfg"]["timm_model_name"]), ""
    name, _, tag = config.tower.removeprefix(TIMM).partition(".")
    tags = timm_tags(name)
    if tag and tag not in tags:
        raise UserError(
            f"exemplar_encoder.tower '{config.tower}': timm has no weights '{tag}' of {name}; "
            f"it has: {', '.join(tags) or 'none'}"
        )
    return name, config.pretrained if config.pretrained in tags else tag


def timm_tags(name: str) -> list[str]:
    """Return the tags of timm's weights of an architecture."""
    import timm

    return (
        [found.partition(".")[2] for found in timm.list_pretrained(f"{name}.*")]
        if timm.is_model(name)
        else []
    )


def follow_tower(config: ExemplarEncoderConfig) -> None:
    """Put the tower's own mean, deviation and size where the configuration leaves them open, in place."""
    complete = config.mean and config.std and config.image_size
    if not complete or config.tower != TIMM + LITE:
        facts = tower_facts(config)
        config.mean, config.std = list(config.mean or facts.mean), list(config.std or facts.std)
        config.image_size = config.image_size or facts.image_size or 224
    if not 0 < config.image_size <= LARGEST:
        raise UserError(
            f"exemplar_encoder.image_size is {config.image_size}; it must be between 1 and {LARGEST}, "
            "or 0 for the tower's own"
        )
    for name, values in (("mean", config.mean), ("std", config.std)):
        if len(values) != 3 or not all(map(math.isfinite, values)):
            raise UserError(
                f"exemplar_encoder.{name} is {values}; it must be three numbers, or [] for the tower's own"
            )
    if min(config.std) <= 0:
        raise UserError(f"exemplar_encoder.std is {config.std}; its numbers must be above 0")


def follow_sizes(config: Config) -> None:
    """Do :func:`follow_tower` for a whole experiment, and let its data follow the tower's size."""
    follow_tower(config.model.exemplar_encoder)
    size = config.model.exemplar_encoder.image_size
    config.data.exemplar_size = config.data.exemplar_size or size
    if config.data.exemplar_size != size:
        raise UserError(
            f"data.exemplar_size is {config.data.exemplar_size}, but the tower takes {size}; "
            "set data.exemplar_size=0, or model.exemplar_encoder.image_size to the same number"
        )
