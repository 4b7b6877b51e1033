"""What a tower wants: mean, deviation and size of its images, and weights as timm's own code reads them."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import timm
from torch import Tensor, nn

from pbe.config import Config, ExemplarEncoderConfig
from pbe.errors import UserError

TIMM = "timm/"
RANDOM = "random"  # in place of a name of weights
PACKAGED = (127 / 255, 128 / 255)  # mean and deviation of the weights that come as a Python package
LARGEST = 4096  # pixels; a position table of more would take gigabytes
CLASSIFIERS = (
    "head",
    "head.fc",
    "head_dist",
    "fc",
    "classifier",
)  # names of the last layer in published files
SAME = 5e-3  # means and deviations closer than this are told by nobody
MISMATCH = re.compile(r"(Missing|Unexpected) key\(s\) in state_dict: ([^\n]*)")


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
    clip = TowerFacts(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    if config.tower.startswith(TIMM):
        facts = _timm_facts(config)
        if config.pretrained == "pypi":
            return replace(facts or clip, mean=(PACKAGED[0],) * 3, std=(PACKAGED[1],) * 3)
        return facts or clip
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
    return (
        [found.partition(".")[2] for found in timm.list_pretrained(f"{name}.*")]
        if timm.is_model(name)
        else []
    )


def follow_tower(config: ExemplarEncoderConfig) -> None:
    """Put the tower's own mean, deviation and size where the configuration leaves them open, in place."""
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


def contradictions(config: ExemplarEncoderConfig) -> str:
    """Return what to say where a configuration departs from what the tower's weights were trained on."""
    facts, said = tower_facts(config), []
    for name, own, used in (("mean", facts.mean, config.mean), ("std", facts.std, config.std)):
        if any(abs(a - b) > SAME for a, b in zip(own, used, strict=False)):  # nothing where it is left open
            shown = [[round(value, 4) for value in values] for values in (used, own)]
            said.append(f"{name} {shown[0]} (its own is {shown[1]})")
    if facts.fixed and config.image_size not in (0, facts.image_size):
        said.append(f"size {config.image_size} (its own is {facts.image_size})")
    return f"; the configuration says {', '.join(said)}" if said else ""


def check_divided(config: ExemplarEncoderConfig, patch: int) -> None:
    """Refuse a size that the patches of a transformer do not fill."""
    size = config.image_size
    if size % patch:
        near = [multiple * patch for multiple in (size // patch, size // patch + 1) if multiple]
        raise UserError(
            f"exemplar_encoder.image_size is {size}, which the patches of '{config.tower}', {patch} pixels, "
            f"do not divide; the nearest that they do: {' and '.join(map(str, near))}"
        )


def timm_state(
    config: ExemplarEncoderConfig, trunk: nn.Module, state: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return the weights of a timm trunk as timm loads them: names brought to its own, positions resampled.

    Args:
        config: of the tower.
        trunk: the network that they are for; only its class is looked at.
        state: a published file's tensors, under any names that timm reads; None takes the weights of the tag,
            which may download.
    """
    name, tag = timm_name(config)
    size: dict[str, Any] = {"img_size": config.image_size} if hasattr(trunk, "set_input_size") else {}
    overlay: dict[str, Any] = {}
    if state is not None:
        last = {f"{each}.{leaf}" for each in CLASSIFIERS for leaf in ("weight", "bias")}
        kept = {key: value for key, value in state.items() if key not in last}
        # without a classifier to take off, timm loads strictly
        overlay = {"pretrained_cfg_overlay": {"state_dict": kept, "num_classes": 0, "classifier": None}}
    silenced = logging.root.manager.disable
    logging.disable(logging.ERROR)  # timm says the same in lines of its own
    try:
        full = f"{name}.{tag}" if tag and state is None else name
        source = timm.create_model(full, pretrained=True, num_classes=0, **size, **overlay)
    except Exception as error:  # of the network, the file system or torch, for whatever stands in a file
        why = _mismatch(str(error)) or (str(error) or type(error).__name__).splitlines()[0]
        if state is None:
            raise UserError(
                f"the weights '{tag}' of {config.tower} cannot be had ({why}); without a network name a file"
            ) from error
        raise UserError(f"'{config.pretrained}' holds no weights of {config.tower}: {why}") from error
    finally:
        logging.disable(silenced)
    return dict(source.state_dict())


def _mismatch(message: str) -> str:
    """Return a short form of torch's list of keys that do not fit."""
    parts = [
        f"{len(keys.split(','))} tensors {'missing' if kind == 'Missing' else 'unknown'}, such as "
        f"{keys.split(',')[0].strip().rstrip('.')}".replace('"', "'")
        for kind, keys in MISMATCH.findall(message)
    ]
    shaped = message.count("size mismatch for")
    return "; ".join([*parts, *([f"{shaped} of another shape"] if shaped else [])])
