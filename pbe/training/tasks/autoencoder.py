"""Stage one: the autoencoder, trained on the target crops of the training samples."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pbe.config import AutoencoderLossConfig, Config
from pbe.data.randomness import generator
from pbe.models import LatentDiffusion
from pbe.models.autoencoder import AutoencoderKL
from pbe.models.codec import Posterior
from pbe.models.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from pbe.models.latent_diffusion import masked_image
from pbe.training.tasks.autoencoder_losses import psnr, reconstruction_terms, weighted_terms
from pbe.training.tasks.base import BaseTask
from pbe.training.tasks.encoding import known_of, to_keep_mask, to_pixels
from pbe.training.tasks.perceptual import TowerDistance, load_perceptual


class AutoencoderTask(BaseTask):
    """Trains the autoencoder of a model with the terms that ``autoencoder_loss`` weighs.

    Args:
        config: the experiment.
        model: its autoencoder, or the decoder of that, is trained, the rest is frozen.

    Attributes:
        discriminator: judges what is decoded; None without an adversarial term.
        perceptual: the perceptual distance, which is no part of a checkpoint; None without that term.

    Raises:
        UserError: a perceptual term whose weights cannot be read.
    """

    shown = ("val/psnr",)
    discriminator: PatchDiscriminator | None

    def __init__(self, config: Config, model: LatentDiffusion) -> None:
        super().__init__(config)
        weights = config.autoencoder_loss
        self.model: LatentDiffusion = model.requires_grad_(False)
        self.decoder_only = weights.train == "decoder"
        for part in decoder_parts(model.autoencoder) if self.decoder_only else [model.autoencoder]:
            part.requires_grad_(True)
        self.start_average()
        self.perceptual = self._perceptual() if weights.perceptual_weight else None
        self.discriminator = None
        if weights.adversarial_weight:  # after the average, which it is no part of
            self.discriminator = seeded_discriminator(weights, config.seed)

    def _perceptual(self) -> Perceptual | TowerDistance:
        weights = self.config.autoencoder_loss
        on_tower = weights.perceptual_on == "tower"
        return TowerDistance(self.model.exemplar_encoder) if on_tower else Perceptual(weights)

    def pictures(self, batch: dict[str, Any]) -> Tensor:
        """Return the pictures ``(b, 3, h, w)`` in [-1, 1] of a batch, a share of them with a greyed hole."""
        images, keep = to_pixels(batch["image"]), to_keep_mask(batch["mask"])
        share, seed = self.config.autoencoder_loss.masked_share, self.config.seed
        masked = [generator(seed, "autoencoder", int(i)).random() < share for i in batch["sample_index"]]
        chosen = torch.tensor(masked, device=images.device).view(-1, 1, 1, 1)
        return torch.where(chosen, masked_image(images, keep), images)

    def _posterior_noise(self, batch: dict[str, Any], posterior: Posterior) -> Tensor:
        shape, seed = posterior.mean.shape[1:], self.config.seed
        draws = [
            generator(seed, "autoencoder", "noise", int(i)).standard_normal(shape, dtype="float32")
            for i in batch["sample_index"]
        ]
        return torch.stack([torch.from_numpy(d) for d in draws]).to(posterior.mean)

    def _encode(self, pictures: Tensor) -> Posterior:
        with torch.no_grad() if self.decoder_only else nullcontext():
            posterior = self.model.autoencoder.encode(pictures.to(self.model.dtype))
        return Posterior(posterior.mean.float(), posterior.std.float())

    def batch_loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss of a batch; with an adversarial term, that of the discriminator is added."""
        pictures = self.pictures(batch)
        posterior = self._encode(pictures)
        latents = posterior.sample(self._posterior_noise(batch, posterior))
        known = known_of(self.model, batch)
        decoded = self.model.autoencoder.decode(latents.to(self.model.dtype), known).float()
        terms = self._pixel_terms(decoded, pictures, batch) | {"kl": posterior.kl().mean()}
        weights = self.config.autoencoder_loss
        loss = (
            weights.l1_weight * terms["l1"]
            + weights.l2_weight * terms["l2"]
            + weights.gradient_weight * terms["gradient"]
            + weights.kl_weight * terms["kl"]
        )
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(decoded, pictures).mean()
            loss = loss + weights.perceptual_weight * terms["perceptual"]
        total = loss
        if self.discriminator is not None:
            loss, total = self._judged(self.discriminator, loss, decoded, pictures, terms)
        for name, value in {"loss": loss, **terms}.items():
            self.sums.add(f"train/{name}", value.detach().expand(len(pictures)))
        return total

    def _pixel_terms(self, decoded: Tensor, pictures: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        hole_weight = self.config.autoencoder_loss.hole_weight
        if hole_weight == 1.0:
            return reconstruction_terms(decoded, pictures)
        return weighted_terms(decoded, pictures, 1.0 - to_keep_mask(batch["mask"]), hole_weight)

    def _judged(
        self,
        judge: PatchDiscriminator,
        loss: Tensor,
        decoded: Tensor,
        pictures: Tensor,
        terms: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the loss with the adversarial term, and with the discriminator's own loss on top.

        No gradient of the one reaches what the other trains.
        """
        weights = self.config.autoencoder_loss
        if not self.judging:  # every parameter takes part all the same: DDP waits for each of them
            nothing = torch.stack([0.0 * p.sum() for p in judge.parameters()]).sum()
            return loss, loss + nothing
        fixed = {name: p.detach() for name, p in judge.named_parameters()}
        real, fake = pictures.to(self.model.dtype), decoded.to(self.model.dtype)
        adversarial = -functional_call(judge, fixed, (fake,)).float().mean()
        factor = torch.full((), weights.adversarial_weight, device=loss.device)
        if weights.adversarial_adaptive and torch.is_grad_enabled():
            last = self.model.autoencoder.decoder.conv_out.weight
            factor = factor * adaptive_weight(loss, adversarial, last, pictures[0].numel())
        own = hinge_loss(judge(real).float(), judge(fake.detach()).float())
        terms |= {"adversarial": adversarial, "adversarial_weight": factor, "discriminator": own}
        loss = loss + factor * adversarial
        return loss, loss + own

    @property
    def judging(self) -> bool:
        """Whether the discriminator takes part in the coming step."""
        return self.global_step >= self.config.autoencoder_loss.adversarial_start

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the gradients; a discriminator whose time has not come is not stepped."""
        if self.discriminator is not None and not self.judging:
            for parameter in self.discriminator.parameters():
                parameter.grad = None
        super().on_before_optimizer_step(optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does; a discriminator's gradients apart, so that neither shrinks the other's."""
        if self.discriminator is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            for part in (self.model, self.discriminator):
                torch.nn.utils.clip_grad_norm_(part.parameters(), gradient_clip_val)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log reconstruction error and PSNR (of pixels in [0, 1]) of posterior means, on averaged weights."""
        pictures = to_pixels(batch["image"])
        counted = self.validated(batch_idx, len(pictures))
        with self.averaged_weights():
            latents = self.model.autoencoder.encode(pictures.to(self.model.dtype)).mean
            decoded = self.model.autoencoder.decode(latents, known_of(self.model, batch)).float()
        by_picture = [_quality(*pair) for pair in zip(decoded.split(1), pictures.split(1), strict=True)]
        for name in by_picture[0]:
            values = torch.stack([quality[name] for quality in by_picture])
            self.validation_sums.add(f"val/{name}", values, counted)
        if self.perceptual is not None:
            self.validation_sums.add("val/perceptual", self.perceptual(decoded, pictures), counted)


class Perceptual:
    """The perceptual distance beside a task, not in it: its weights belong in no checkpoint.

    Args:
        weights: name the files.
    """

    def __init__(self, weights: AutoencoderLossConfig) -> None:
        self.network = load_perceptual(weights.perceptual_vgg, weights.perceptual_linear)

    def __call__(self, decoded: Tensor, pictures: Tensor) -> Tensor:
        """Return the distances ``(b,)``, wherever the pictures lie."""
        return self.network.to(decoded.device)(decoded, pictures)


def decoder_parts(autoencoder: AutoencoderKL) -> list[nn.Module]:
    """Return what turns latents into pictures; the latents themselves stay when only this is trained."""
    parts = (autoencoder.post_quant_conv, autoencoder.decoder, autoencoder.patch_decoder)
    return [part for part in parts if part is not None]


def seeded_discriminator(weights: AutoencoderLossConfig, seed: int) -> PatchDiscriminator:
    """Return a discriminator whose random start depends on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PatchDiscriminator(weights.discriminator_channels, weights.discriminator_layers)


def _quality(decoded: Tensor, picture: Tensor) -> dict[str, Tensor]:
    terms = reconstruction_terms(decoded, picture)
    return terms | {"psnr": psnr(decoded, picture), "loss": terms["l1"] + terms["gradient"]}


@torch.no_grad()
def measure_scale_factor(model: LatentDiffusion, batches: list[dict[str, Any]]) -> float:
    """Return one over the standard deviation of the latents of real pictures (LDM, section 4.3.2).

    Args:
        model: with a trained autoencoder.
        batches: of the data module; posterior deviation counts, since latents are sampled.
    """
    total, squares, count = 0.0, 0.0, 0
    for batch in batches:
        pictures = to_pixels(batch["image"]).to(model.unet.conv_in.weight)
        posterior = model.autoencoder.encode(pictures)
        mean, std = posterior.mean.double(), posterior.std.double()
        total += float(mean.sum())
        squares += float((mean**2 + std**2).sum())
        count += mean.numel()
    return (squares / count - (total / count) ** 2) ** -0.5
