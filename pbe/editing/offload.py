"""Weights that wait on the CPU: only the network that is at work lies on the accelerator."""

from __future__ import annotations

import torch

from pbe.errors import UserError
from pbe.models import LatentDiffusion

PARTS = ("exemplar_encoder", "autoencoder", "unet")


class Offload:
    """Keeps at most one network of a model on the accelerator. Made by :func:`offload_idle_parts`.

    An edit uses exemplar encoder, autoencoder, UNet and autoencoder, in this order, so that weights travel
    four times an edit, not with every step.

    Attributes:
        model: whose parts are moved.
        device: where each part runs.
    """

    def __init__(self, model: LatentDiffusion, device: torch.device) -> None:
        self.model = model
        self.device = device
        model.before_use = self.fetch
        model.run_on = device
        for part in PARTS:
            self._move(part, torch.device("cpu"))

    def fetch(self, part: str) -> None:
        """Bring a part to the accelerator, after the one that is there has left it."""
        for other in PARTS:
            if other != part:
                self._move(other, torch.device("cpu"))
        self._move(part, self.device)

    def remove(self, device: torch.device | str | None = None) -> None:
        """End it: all parts go to ``device`` (None: where they ran) and stay there."""
        self.model.before_use = None
        self.model.run_on = None
        self.model.to(self.device if device is None else device)

    def _move(self, part: str, device: torch.device) -> None:
        module = self.model.get_submodule(part)
        if next(module.parameters()).device != device:
            module.to(device)


def offload_idle_parts(model: LatentDiffusion, device: torch.device | str) -> Offload:
    """Keep exemplar encoder, autoencoder and UNet on the CPU and bring each to ``device`` when it is needed.

    Nothing changes in the results. Inputs are expected on ``device`` (``model.device`` tells), as ever.

    Args:
        model: its parts must be used through its own methods (``encode_images``, ``predict``, ...), as the
            pipeline does.
        device: an accelerator, such as ``cuda``.

    Raises:
        UserError: ``device`` is the CPU, where there is nothing to save, or not there.
    """
    try:
        # weights report the number of their GPU, so that 'cuda' alone would equal none of them
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"CPU offload: '{device}' cannot be used on this machine ({reason})") from error
    if device.type == "cpu":
        raise UserError("CPU offload needs an accelerator to run on, such as cuda; this is the CPU itself")
    return Offload(model, device)
