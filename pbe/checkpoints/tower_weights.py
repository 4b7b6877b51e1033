"""Files with the weights of an image tower alone: its own state dict, all of CLIP's, or OpenAI's programs."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from open_clip.model import resize_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pbe.checkpoints.key_map import check_finite
from pbe.checkpoints.readers import LEGACY_MAGIC, is_program, open_weights
from pbe.checkpoints.recognise import WRAPPED
from pbe.config import ExemplarEncoderConfig
from pbe.errors import UserError
from pbe.models.tower import load_pretrained
from pbe.models.tower_facts import RANDOM, contradictions, timm_state

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


def load_tower_weights(tower: nn.Module, config: ExemplarEncoderConfig) -> str:
    """Load the pretrained weights that the configuration names into ``tower``.

    ``pretrained`` is a file (of the tower or of all of CLIP, whose projection is left out; under open_clip's
    names or, for timm's towers, under any that timm reads; safetensors, a state dict in any wrapping or
    OpenAI's TorchScript archive), or what :func:`pbe.models.tower.load_pretrained` takes. Positions are
    resampled where the file is for another size.

    Returns:
        A line that says what was loaded, and where the configuration departs from what it was trained on.
    """
    path = Path(config.pretrained)
    if config.pretrained in ("", "pypi", RANDOM) or not path.is_file():
        return load_pretrained(tower, config)
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
    table = {f"{VISUAL}positional_embedding": state.get("positional_embedding")}
    try:
        resize_pos_embed(table, SimpleNamespace(visual=tower))
    except (RuntimeError, IndexError) as error:
        raise UserError(f"'{path}': its position embeddings are not those of a square") from error
    (value,) = table.values()
    return state if value is None else state | {"positional_embedding": value}


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
        raise UserError(f"'{path}' is no plain state dict: it must hold tensors by name")
    return {key.removeprefix("module."): value for key, value in state.items()}


def image_tower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the image tower's part of a state dict of all of CLIP; any other as it is."""
    inner = {key.removeprefix(VISUAL): value for key, value in state.items() if key.startswith(VISUAL)}
    return inner or state


def load_strictly(network: nn.Module, state: dict[str, Tensor], path: Path, architecture: str) -> None:
    """Load a state dict that has all tensors of a network, in its shapes, and no other."""
    wanted = network.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shaped = [key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape]
    if missing or extra or shaped:
        first = (missing or extra or shaped)[0]
        raise UserError(
            f"'{path}' holds no weights of {architecture}: {len(missing)} tensors missing, {len(extra)} "
            f"unknown, {len(shaped)} of another shape, such as '{first}'"
        )
    for key, value in wanted.items():
        if value.is_floating_point() and not state[key].is_floating_point():
            kind = str(state[key].dtype).removeprefix("torch.")
            raise UserError(
                f"'{path}': '{key}' holds no floating-point numbers ({kind}); quantised files are not "
                "supported, take the fp16 one"
            )
    network.load_state_dict(state)
