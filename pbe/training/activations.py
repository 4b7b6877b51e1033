"""What a micro-batch keeps in memory for its backward pass: how much it is, and how it becomes less."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from pbe.models import LatentDiffusion
from pbe.models.attention import SpatialTransformer
from pbe.models.layers import ResBlock
from pbe.training.tasks.diffusion import DiffusionTask

MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep only the inputs of residual and transformer blocks and recompute the rest in the backward pass.

    Chen et al. 2016. The gradients are those of training without it.
    """

    def recomputed(forward: Callable[..., Any], *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)

    for module in model.modules():
        if isinstance(module, ResBlock | SpatialTransformer):
            module.forward = partial(recomputed, module.forward)  # type: ignore[method-assign]


class TrainingStep(nn.Module):
    """The forward pass of a training step through all weights that may be trained.

    The UNet is called ``calls`` times before the backward pass.
    """

    def __init__(self, model: LatentDiffusion, calls: int = 1) -> None:
        super().__init__()
        self.model, self.calls = model, calls

    def forward(self, batch: int, device: str) -> Tensor:
        """Return a loss of ``batch`` samples without content."""
        model, config = self.model, self.model.config
        side, size = config.image_size // model.size_multiple, config.exemplar_encoder.image_size
        pixels = torch.zeros(batch, 3, size, size, dtype=model.frozen_dtype, device=device)
        with torch.no_grad():
            features = model.exemplar_encoder.features(pixels).to(model.dtype)
        shape = (batch, config.autoencoder.latent_channels, side, side)
        latents = torch.zeros(shape, dtype=model.dtype, device=device)
        timesteps = torch.zeros(batch, dtype=torch.int64, device=device)
        condition = model.exemplar_encoder.condition(features)
        guidance = torch.ones(batch, device=device) if config.unet.guidance_range else None
        outputs = [
            model.predict(latents, timesteps, condition, latents, latents[:, :1], guidance)
            for _ in range(self.calls)
        ]
        return torch.stack(outputs).float().square().mean()


def activation_bytes(task: DiffusionTask, device: str) -> int:
    """Return the bytes that autograd keeps of a micro-batch, beside the weights themselves.

    The forward pass runs on tensors that have a shape, a type and a device, and no numbers, so that sizes are
    known which this machine has no memory for. What kernels take for a moment comes on top, and with gradient
    checkpointing the activations of one block.

    Args:
        task: whose weights may be on any device.
        device: that training will run on; on ``cuda`` attention keeps less than on ``cpu``.
    """
    mixed = MIXED.get(task.config.trainer.precision)
    arithmetic = torch.autocast(device, mixed) if mixed else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, arithmetic:
        parameters = task.model.named_parameters()
        state: dict[str, Tensor] = {f"model.{name}": mode.from_tensor(p) for name, p in parameters}
        weights = {value.untyped_storage()._cdata for value in state.values()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = functional_call(
                TrainingStep(task.model, task.calls), state, (task.config.data.batch_size, device)
            )
    del loss  # it held all that is kept, so that no storage took the place of another
    return sum(kept.values())
