"""Stage one: the autoencoder, trained on the target crops of the training samples."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from pbe.checkpoints.key_map import check_finite
from pbe.config import AutoencoderLossConfig, Config
from pbe.data.randomness import generator
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.autoencoder import AutoencoderKL
from pbe.models.codec import Posterior
from pbe.models.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from pbe.models.latent_diffusion import masked_image
from pbe.models.perceptual import PerceptualDistance, TowerDistance
from pbe.training.resume.files import UNREADABLE
from pbe.training.tasks.base import BaseTask
from pbe.training.tasks.encoding import decoder_known_pixels, to_keep_mask, to_pixels


class AutoencoderTask(BaseTask):
    """Trains the autoencoder of a model, or its decoder alone, with the terms of ``autoencoder_loss``.

    Attributes:
        discriminator: judges the decoded images; None without an adversarial term.
        perceptual: the perceptual distance, which is no part of a checkpoint; None without that term.
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
        self.perceptual: Perceptual | TowerDistance | None = None
        if weights.perceptual_weight:
            on_tower = weights.perceptual_on == "tower"
            self.perceptual = TowerDistance(model.exemplar_encoder) if on_tower else Perceptual(weights)
        self.discriminator = None
        if weights.adversarial_weight:  # after the average, which it is no part of
            self.discriminator = seeded_discriminator(weights, config.seed)

    def images(self, batch: dict[str, Any]) -> Tensor:
        """Return the images ``(b, 3, h, w)`` in [-1, 1] of a batch, a share of them greyed in the mask."""
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

    def _encode(self, images: Tensor) -> Posterior:
        with torch.no_grad() if self.decoder_only else nullcontext():
            posterior = self.model.autoencoder.encode(images.to(self.model.dtype))
        return Posterior(posterior.mean.float(), posterior.std.float())

    def batch_loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss of a batch; with an adversarial term, that of the discriminator is added."""
        images = self.images(batch)
        posterior = self._encode(images)
        latents = posterior.sample(self._posterior_noise(batch, posterior))
        known = decoder_known_pixels(self.model, batch)
        decoded = self.model.autoencoder.decode(latents.to(self.model.dtype), known).float()
        terms = self._pixel_terms(decoded, images, batch) | {"kl": posterior.kl().mean()}
        weights = self.config.autoencoder_loss
        loss = (
            weights.l1_weight * terms["l1"]
            + weights.l2_weight * terms["l2"]
            + weights.gradient_weight * terms["gradient"]
            + weights.kl_weight * terms["kl"]
        )
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(decoded, images).mean()
            loss = loss + weights.perceptual_weight * terms["perceptual"]
        total = loss
        if self.discriminator is not None:
            loss, total = self._add_adversarial(self.discriminator, loss, decoded, images, terms)
        for name, value in {"loss": loss, **terms}.items():
            self.sums.add(f"train/{name}", value.detach().expand(len(images)))
        return total

    def _pixel_terms(self, decoded: Tensor, images: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        mask_weight = self.config.autoencoder_loss.masked_weight
        if mask_weight == 1.0:
            return reconstruction_terms(decoded, images)
        return weighted_terms(decoded, images, 1.0 - to_keep_mask(batch["mask"]), mask_weight)

    def _add_adversarial(
        self,
        discriminator: PatchDiscriminator,
        loss: Tensor,
        decoded: Tensor,
        images: Tensor,
        terms: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the loss with the adversarial term, and with the discriminator's own loss on top.

        No gradient of the one reaches what the other trains.
        """
        weights = self.config.autoencoder_loss
        if not self.discriminates:  # every parameter takes part all the same: DDP waits for each of them
            nothing = torch.stack([0.0 * p.sum() for p in discriminator.parameters()]).sum()
            return loss, loss + nothing
        fixed = {name: p.detach() for name, p in discriminator.named_parameters()}
        real, fake = images.to(self.model.dtype), decoded.to(self.model.dtype)
        adversarial = -functional_call(discriminator, fixed, (fake,)).float().mean()
        factor = torch.full((), weights.adversarial_weight, device=loss.device)
        if weights.adversarial_adaptive and torch.is_grad_enabled():
            last = self.model.autoencoder.decoder.conv_out.weight
            factor = factor * adaptive_weight(loss, adversarial, last, images[0].numel())
        own = hinge_loss(discriminator(real).float(), discriminator(fake.detach()).float())
        terms |= {"adversarial": adversarial, "adversarial_weight": factor, "discriminator": own}
        loss = loss + factor * adversarial
        return loss, loss + own

    @property
    def discriminates(self) -> bool:
        """Whether the discriminator takes part in the coming step."""
        return self.global_step >= self.config.autoencoder_loss.adversarial_start

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the gradients; a discriminator that does not take part yet is not stepped."""
        if self.discriminator is not None and not self.discriminates:
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
        images = to_pixels(batch["image"])
        counted = self.validated(batch_idx, len(images))
        with self.averaged_weights():
            latents = self.model.autoencoder.encode(images.to(self.model.dtype)).mean
            decoded = self.model.autoencoder.decode(latents, decoder_known_pixels(self.model, batch)).float()
        by_image = [_quality(*pair) for pair in zip(decoded.split(1), images.split(1), strict=True)]
        for name in by_image[0]:
            values = torch.stack([quality[name] for quality in by_image])
            self.validation_sums.add(f"val/{name}", values, counted)
        if self.perceptual is not None:
            self.validation_sums.add("val/perceptual", self.perceptual(decoded, images), counted)


class Perceptual:
    """The perceptual distance beside a task, not in it: its weights belong in no checkpoint."""

    def __init__(self, weights: AutoencoderLossConfig) -> None:
        self.network = load_perceptual(weights.perceptual_vgg, weights.perceptual_linear)

    def __call__(self, decoded: Tensor, images: Tensor) -> Tensor:
        """Return the distances ``(b,)``, on the device of the images."""
        return self.network.to(decoded.device)(decoded, images)


def load_perceptual(vgg: str, linear: str) -> PerceptualDistance:
    """Build the distance from the user's files: torchvision's ``vgg16``, as torch or safetensors file.

    The linear weights are those of LPIPS (``lpips/weights/v0.1/vgg.pth``); without, all channels weigh alike.
    """
    if not vgg:
        raise UserError(
            "autoencoder_loss.perceptual_weight needs autoencoder_loss.perceptual_vgg: the file of "
            "torchvision's VGG16 weights (vgg16-397923af.pth)"
        )
    features = _read_tensors(vgg, "autoencoder_loss.perceptual_vgg")
    weights = _read_tensors(linear, "autoencoder_loss.perceptual_linear") if linear else None
    if "features.0.weight" not in features:
        raise UserError(f"'{vgg}' does not hold torchvision's vgg16: it has no 'features.0.weight'")
    if weights is not None and "lin0.model.1.weight" not in weights:
        raise UserError(f"'{linear}' does not hold LPIPS weights: it has no 'lin0.model.1.weight'")
    try:
        return PerceptualDistance(features, weights)
    except KeyError as error:
        raise UserError(f"'{vgg}' or '{linear}' is incomplete: {error} is missing") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{vgg}' or '{linear}' does not fit VGG16: {reason}") from error


def _read_tensors(path: str, key: str) -> dict[str, Tensor]:
    """Return the tensors of a file, without running what a pickle may hold."""
    if not Path(path).is_file():
        raise UserError(f"{key}: no file at '{path}'")
    try:
        safetensors = path.endswith(".safetensors")
        content = load_file(path) if safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise UserError(f"{key}: '{path}' is damaged or not a file of weights") from error
    if not isinstance(content, dict):
        raise UserError(f"{key}: '{path}' holds no state dict")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        check_finite(name, value, path)
    return tensors


def decoder_parts(autoencoder: AutoencoderKL) -> list[nn.Module]:
    """Return the networks that turn latents into images; the latents stay when only these are trained."""
    parts = (autoencoder.post_quant_conv, autoencoder.decoder, autoencoder.patch_decoder)
    return [part for part in parts if part is not None]


def seeded_discriminator(weights: AutoencoderLossConfig, seed: int) -> PatchDiscriminator:
    """Return a discriminator whose random start depends on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PatchDiscriminator(weights.discriminator_channels, weights.discriminator_layers)


def reconstruction_terms(decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Return mean absolute (``l1``) and squared error (``l2``) of pixels, and ``gradient`` of differences.

    Both arguments are ``(b, 3, h, w)`` in [-1, 1]. ``gradient`` is the mean absolute error of finite
    differences, which makes blurred edges costly without a perceptual network; ``l2`` keeps rare
    saturated colours, which ``l1`` alone learns last.
    """
    error = decoded - images
    horizontal = (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
    vertical = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return {"l1": error.abs().mean(), "l2": (error**2).mean(), "gradient": horizontal + vertical}


def weighted_terms(decoded: Tensor, images: Tensor, mask: Tensor, mask_weight: float) -> dict[str, Tensor]:
    """Return the terms of :func:`reconstruction_terms` with other weights inside the mask than outside.

    A pixel inside the mask, ``(b, 1, h, w)`` in [0, 1] with 1 = repaint, weighs ``mask_weight`` where one
    outside weighs 1. Weights have mean one over each image, so that a batch and its micro-batches agree.
    """
    weight, error = 1.0 + (mask_weight - 1.0) * mask, decoded - images
    across = (error[..., :, 1:] - error[..., :, :-1]).abs()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs()
    horizontal = _weighted_mean(across, torch.maximum(weight[..., 1:], weight[..., :-1]))
    vertical = _weighted_mean(down, torch.maximum(weight[..., 1:, :], weight[..., :-1, :]))
    l1, l2 = _weighted_mean(error.abs(), weight), _weighted_mean(error**2, weight)
    return {"l1": l1, "l2": l2, "gradient": horizontal + vertical}


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Return the mean over images of the weighted means over each image's ``(c, h, w)``."""
    sums = (values.mean(dim=1, keepdim=True) * weight).sum(dim=(1, 2, 3))
    return (sums / weight.sum(dim=(1, 2, 3))).mean()


def psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """Return the mean peak signal-to-noise ratio in dB of images ``(b, 3, h, w)`` in [-1, 1]."""
    error = ((decoded.clamp(-1, 1) - images) / 2.0) ** 2
    return (-10.0 * torch.log10(error.mean(dim=(1, 2, 3)).clamp_min(1e-10))).mean()


def _quality(decoded: Tensor, image: Tensor) -> dict[str, Tensor]:
    terms = reconstruction_terms(decoded, image)
    return terms | {"psnr": psnr(decoded, image), "loss": terms["l1"] + terms["gradient"]}


@torch.no_grad()
def measure_scale_factor(model: LatentDiffusion, batches: list[dict[str, Any]]) -> float:
    """Return one over the standard deviation of the latents of real images (LDM, section 4.3.2).

    The posterior's deviation counts too, since latents are sampled.
    """
    total, squares, count = 0.0, 0.0, 0
    for batch in batches:
        images = to_pixels(batch["image"]).to(model.unet.conv_in.weight)
        posterior = model.autoencoder.encode(images)
        mean, std = posterior.mean.double(), posterior.std.double()
        total += float(mean.sum())
        squares += float((mean**2 + std**2).sum())
        count += mean.numel()
    return (squares / count - (total / count) ** 2) ** -0.5
