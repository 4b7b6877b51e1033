"""Stage two: the exemplar-conditioned UNet, with autoencoder and tower frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pbe.checkpoints.native import check_keys
from pbe.config import Config
from pbe.diffusion.objective import drop_condition, loss_weights, per_sample_loss, training_target
from pbe.diffusion.schedule import make_schedule
from pbe.models import LatentDiffusion
from pbe.training.tasks.base import BaseTask
from pbe.training.tasks.encoding import Draws, EncodedBatch, batch_drop, draw, encode_batch
from pbe.training.tasks.finetuning import (
    fingerprint_of_frozen,
    train_adapters,
    train_parts,
)

VALIDATION_TIMESTEPS = (100, 300, 500, 700, 900)
# Cross-attention parameters that have no influence with a single condition token.
DEAD_WITH_ONE_TOKEN = (".attn2.to_q.", ".attn2.to_k.", ".block.norm2.")
QUARTERS = 4  # of the schedule, for which training losses are logged separately


class DiffusionTask(BaseTask):
    """Trains UNet, mapper, projection and null condition (Paint by Example, section 3).

    The model's autoencoder and tower must have been loaded; they are frozen here.
    """

    entry = "losses"
    calls = 1  # calls of the UNet with gradients per micro-batch, for estimating memory

    def __init__(self, config: Config, model: LatentDiffusion) -> None:
        super().__init__(config)
        self.model: LatentDiffusion = model
        self.schedule = make_schedule(config.model.schedule)
        self.adapted = config.lora.rank > 0
        self.choose_trained()
        self.start_average()

    def choose_trained(self) -> None:
        """Freeze everything but the adapters or the chosen parts, or else what the paper freezes."""
        freeze(self.model)
        if self.adapted:
            train_adapters(self.model, self.config)
        elif self.config.optimizer.parts:
            train_parts(self.model, self.config.optimizer.parts)

    def base_fingerprint(self) -> str:
        """Return the fingerprint of the frozen weights that adapters belong to; empty without adapters."""
        return fingerprint_of_frozen(self.model) if self.adapted else ""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return all weights, or only the adapters, whose model is read from ``init_from`` again."""
        state = super().state_dict(*args, **kwargs)
        if not self.adapted:
            return state
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in state.items() if name in trained}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load what :meth:`state_dict` returns."""
        if strict:
            check_keys(dict(state_dict), self, "the checkpoint")
        return super().load_state_dict(state_dict, strict=strict and not self.adapted, assign=assign)

    def whole_parts(self) -> list[nn.Module]:
        """Return the frozen networks, which are also used outside a step."""
        return [self.model.autoencoder, self.model.exemplar_encoder.tower]

    def encode(self, batch: EncodedBatch | dict[str, Any]) -> EncodedBatch:
        """Return the encoded batch, unchanged if it comes from the latent cache."""
        return batch if isinstance(batch, EncodedBatch) else encode_batch(self.model, batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to a device; Lightning cannot move encoded ones."""
        if isinstance(batch, EncodedBatch):
            return batch.to(device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def losses(self, batch: EncodedBatch, draws: Draws, drop: Tensor) -> tuple[Tensor, Tensor]:
        """Return each sample's plain squared error and its weight, both ``(b,)``.

        The null condition replaces the condition of samples set in ``drop``, ``(b,)`` bool.
        """
        device, scale = batch.keep_mask.device, self.config.model.autoencoder.scale_factor
        noise, timesteps = draws.noise.to(device), draws.timesteps.to(device)
        latents = batch.image.sample(draws.image_noise.to(device)) * scale
        masked = batch.masked.sample(draws.masked_noise.to(device)) * scale
        dtype = self.model.dtype  # bfloat16 with trainer.precision=bf16-true
        condition = self.model.exemplar_encoder.condition(batch.features.to(dtype))
        null = self.model.null_condition(len(noise), condition.shape[1])
        condition = drop_condition(condition, null, drop.to(device))
        x_t = self.schedule.add_noise(latents, noise, timesteps)
        inputs = (x_t.to(dtype), timesteps, condition, masked.to(dtype), batch.keep_mask.to(dtype))
        output = self.model.predict(*inputs)
        prediction = self.config.model.prediction
        target = training_target(prediction, latents, noise, timesteps, self.schedule)
        objective = self.config.objective
        weights = loss_weights(
            objective.weighting, prediction, timesteps, self.schedule, objective.min_snr_gamma
        )
        return per_sample_loss(output, target, batch.valid), weights

    def batch_loss(self, batch: Any) -> Tensor:
        """Return the weighted mean loss of a batch."""
        encoded = self.encode(batch)
        draws = self._draws(encoded, "train")
        plain, weights = self.losses(encoded, draws, self._drop(draws))
        loss = (plain * weights).mean()
        self._measure(plain, weights, draws.timesteps.to(plain.device))
        return loss

    def _measure(self, plain: Tensor, weights: Tensor, timesteps: Tensor) -> None:
        """Add up losses, over the whole schedule and by quarter of it."""
        self.sums.add("train/loss", plain * weights)
        self.sums.add("train/loss_simple", plain)
        quarters = timesteps * QUARTERS // self.schedule.timesteps
        for quarter in range(QUARTERS):
            self.sums.add(f"train/loss_quarter{quarter + 1}", plain, quarters == quarter)

    def _draws(self, batch: EncodedBatch, stream: str) -> Draws:
        shape = tuple(batch.image.mean.shape[1:])
        return draw(self.config.seed, batch.sample_index, shape, self.schedule.timesteps, stream)  # type: ignore[arg-type]

    def _drop(self, draws: Draws) -> Tensor:
        probability = self.config.objective.drop_probability
        if self.config.objective.drop_mode == "per_batch":
            dropped = batch_drop(self.config.seed, self.global_step) < probability
            return torch.full((len(draws.drop),), dropped)
        return draws.drop < probability

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss over a fixed grid of samples, timesteps and noise, on the averaged weights."""
        encoded = self.encode(batch)
        draws = self._draws(encoded, "validation")
        keep = torch.zeros(len(draws.drop), dtype=torch.bool)
        counted = self.validated(batch_idx, len(keep))
        by_timestep = []
        with self.averaged_weights():
            for timestep in VALIDATION_TIMESTEPS:
                fixed = Draws(
                    torch.full_like(draws.timesteps, timestep * self.schedule.timesteps // 1000),
                    draws.drop, draws.noise, draws.image_noise, draws.masked_noise,
                )  # fmt: skip
                by_timestep.append(self.losses(encoded, fixed, keep)[0])
        self.validation_sums.add("val/loss", torch.stack(by_timestep).mean(dim=0), counted)
        for timestep, values in zip(VALIDATION_TIMESTEPS, by_timestep, strict=True):
            self.validation_sums.add(f"val/loss_t{timestep}", values, counted)


def freeze(model: LatentDiffusion) -> None:
    """Freeze everything that the method does not train.

    That is autoencoder and tower and, with one condition token, the weights without influence: queries, keys
    and norm of the cross-attention.
    """
    model.autoencoder.requires_grad_(False)
    model.exemplar_encoder.tower.requires_grad_(False)
    if model.config.exemplar_encoder.tokens != "class":
        return
    for name, parameter in model.unet.named_parameters():
        if any(part in name for part in DEAD_WITH_ONE_TOKEN):
            parameter.requires_grad_(False)
