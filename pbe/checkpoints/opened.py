"""A model in files, recognised and translated, of whose numbers none is read yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from pbe.checkpoints.layout import empty_model
from pbe.checkpoints.strict import checked
from pbe.checkpoints.tensors import Lazies, whole
from pbe.checkpoints.usage import UNSAID, Usage
from pbe.config import ModelConfig
from pbe.errors import UserError
from pbe.models import LatentDiffusion

WHOLE = ("num_batches_tracked", "position_ids", "_index")  # names that end so are of counters and indices


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


def numbers(opened: Opened) -> Lazies:
    """Return the tensors of a model with counters and indices as whole numbers, whatever the files hold."""
    wrong = [
        key
        for key, tensor in opened.tensors.items()
        if not tensor.dtype.is_floating_point and not key.endswith(WHOLE)
    ]
    if wrong:
        kind = str(opened.tensors[wrong[0]].dtype).removeprefix("torch.")
        raise UserError(
            f"{opened.source}: {len(wrong)} weights are no floating-point numbers, such as '{wrong[0]}' "
            f"({kind}); quantised files are not supported, take the fp16 one"
        )
    return {key: whole(tensor) if key.endswith(WHOLE) else tensor for key, tensor in opened.tensors.items()}


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
