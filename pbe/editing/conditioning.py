"""What the UNet sees besides the noisy latents, and the noise predictor that solvers take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pbe.diffusion.guidance import PredictNoise, guided, noise_from_v
from pbe.diffusion.schedule import NoiseSchedule
from pbe.models import LatentDiffusion


@dataclass(frozen=True)
class Conditioning:
    """Condition and masked picture of a batch of edits.

    Attributes:
        condition: ``(b, tokens, context_dim)``.
        masked_latents: ``(b, z, h, w)``.
        keep_mask: ``(b, 1, h, w)`` at latent size, 1 = keep.
    """

    condition: Tensor
    masked_latents: Tensor
    keep_mask: Tensor

    def part(self, which: slice) -> Conditioning:
        """Return the conditioning of some of the batch."""
        return Conditioning(self.condition[which], self.masked_latents[which], self.keep_mask[which])


def noise_predictor(
    model: LatentDiffusion, schedule: NoiseSchedule, conditioning: Conditioning, guidance_scale: float
) -> PredictNoise:
    """Close a model over its conditioning, guided, as the predictor of the noise that solvers take.

    Latents stay float32 whatever the type of the weights; the model may predict eps or v.

    Args:
        model: the networks.
        schedule: noise schedule of the model.
        conditioning: of b edits.
        guidance_scale: 1 turns guidance off.
    """
    fixed = (conditioning.masked_latents, conditioning.keep_mask)
    doubled = tuple(torch.cat([x, x]) for x in fixed)
    dtype = model.unet.conv_in.weight.dtype

    def network(x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        masked_latents, keep_mask = fixed if len(x_t) == len(fixed[0]) else doubled
        return model.predict(x_t.to(dtype), timesteps, condition, masked_latents, keep_mask).float()

    null = model.null_condition(*conditioning.condition.shape[:2])
    predict = guided(network, conditioning.condition, null, guidance_scale)
    return noise_from_v(predict, schedule) if model.config.prediction == "v" else predict


def prepared_predictor(
    model: LatentDiffusion,
    schedule: NoiseSchedule,
    conditioning: Conditioning,
    guidance_scale: float,
    timesteps: Tensor,
) -> PredictNoise:
    """Do what :func:`noise_predictor` does, with all that is the same in every call computed once.

    Weights must stay as they are while it is used, and lie whole in memory.

    Args:
        model: the networks.
        schedule: noise schedule of the model.
        conditioning: of b edits.
        guidance_scale: 1 turns guidance off.
        timesteps: ``(n,)`` all that the solver will ask for.
    """
    condition, dtype = conditioning.condition, model.dtype
    null = model.null_condition(*condition.shape[:2])
    both = condition if guidance_scale == 1.0 else torch.cat([null, condition])  # in the order of `guided`
    fixed = (conditioning.masked_latents, conditioning.keep_mask)
    prepared = model.prepare(both, *fixed, timesteps.to(model.device))

    def network(x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        return model.predict_prepared(x_t.to(dtype), timesteps, prepared).float()

    predict = guided(network, condition, null, guidance_scale)
    return noise_from_v(predict, schedule) if model.config.prediction == "v" else predict
