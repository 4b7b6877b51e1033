"""A model in files, recognised and translated, of whose numbers none is read yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from pbe.checkpoints.layout import empty_model
from pbe.checkpoints.strict import checked
from pbe.checkpoints.tensors import Lazies
from pbe.checkpoints.usage import UNSAID, Usage
from pbe.config import ModelConfig
from pbe.models import LatentDiffusion


@dataclass(frozen=True)
class Opened:
    """What :func:`pbe.checkpoints.loading.open_checkpoint` found.

    Attributes:
        source: the file or folder, for errors.
        layout: ``native``, ``compvis`` or ``diffusers``.
        config: sizes of the model.
        tensors: every weight under its native name, exactly those that the model wants.
        notes: one line for each thing that was left out or assumed.
        usage: what the files say of how the model is to be run.
        safety_checker: the folder of a safety checker inside the model's.
    """

    source: str
    layout: str
    config: ModelConfig
    tensors: Lazies
    notes: tuple[str, ...] = field(default=())
    usage: Usage = UNSAID
    safety_checker: Path | None = None


def build(opened: Opened, dtype: torch.dtype | None) -> LatentDiffusion:
    """Read the weights into a model in evaluation mode on the CPU, without gradients.

    Args:
        opened: where they are.
        dtype: type in memory; None keeps that of the file.
    """
    model = empty_model(opened.config)
    state = {key: checked(key, value, dtype, opened.source) for key, value in opened.tensors.items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
