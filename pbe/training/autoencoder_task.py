"""Stage one: the autoencoder, trained on the target crops of the training samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pbe.config import Config
from pbe.data.randomness import generator
from pbe.models import LatentDiffusion
from pbe.models.autoencoder import Posterior
from pbe.models.latent_diffusion import masked_image
from pbe.training.base_task import BaseTask
from pbe.training.encoding import to_keep_mask, to_pixels


class AutoencoderTask(BaseTask):
    """Trains the autoencoder of a model with L1, gradient and KL terms.

    Args:
        config: the experiment.
        model: its autoencoder is trained, the rest is frozen.
    """

    shown = ("val/psnr",)

    def __init__(self, config: Config, model: LatentDiffusion) -> None:
        super().__init__(config)
        self.model: LatentDiffusion = model.requires_grad_(False)
        self.model.autoencoder.requires_grad_(True)
        self.start_average()

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

    def batch_loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss of a batch."""
        pictures = self.pictures(batch)
        posterior = self.model.autoencoder.encode(pictures)
        posterior = Posterior(posterior.mean.float(), posterior.std.float())
        decoded = self.model.autoencoder.decode(posterior.sample(self._posterior_noise(batch, posterior)))
        terms = reconstruction_terms(decoded.float(), pictures) | {"kl": posterior.kl().mean()}
        weights = self.config.autoencoder_loss
        loss = (
            weights.l1_weight * terms["l1"]
            + weights.l2_weight * terms["l2"]
            + weights.gradient_weight * terms["gradient"]
            + weights.kl_weight * terms["kl"]
        )
        for name, value in {"loss": loss, **terms}.items():
            self.sums.add(f"train/{name}", value.detach().expand(len(pictures)))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log reconstruction error and PSNR (of pixels in [0, 1]) of posterior means, on averaged weights."""
        pictures = to_pixels(batch["image"])
        counted = self.validated(batch_idx, len(pictures))
        with self.averaged_weights():
            decoded = self.model.autoencoder.decode(self.model.autoencoder.encode(pictures).mean).float()
        by_picture = [_quality(*pair) for pair in zip(decoded.split(1), pictures.split(1), strict=True)]
        for name in by_picture[0]:
            values = torch.stack([quality[name] for quality in by_picture])
            self.validation_sums.add(f"val/{name}", values, counted)


def _quality(decoded: Tensor, picture: Tensor) -> dict[str, Tensor]:
    terms = reconstruction_terms(decoded, picture)
    return terms | {"psnr": psnr(decoded, picture), "loss": terms["l1"] + terms["gradient"]}


def reconstruction_terms(decoded: Tensor, pictures: Tensor) -> dict[str, Tensor]:
    """Return mean absolute (``l1``) and squared error (``l2``) of pixels, and ``gradient`` of differences.

    Both arguments are ``(b, 3, h, w)`` in [-1, 1]. ``gradient`` is the mean absolute error of finite
    differences, which makes blurred edges costly without a perceptual network; ``l2`` keeps rare
    saturated colours, which ``l1`` alone learns last.
    """
    error = decoded - pictures
    horizontal = (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
    vertical = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return {"l1": error.abs().mean(), "l2": (error**2).mean(), "gradient": horizontal + vertical}


def psnr(decoded: Tensor, pictures: Tensor) -> Tensor:
    """Return the mean peak signal-to-noise ratio in dB of pictures ``(b, 3, h, w)`` in [-1, 1]."""
    error = ((decoded.clamp(-1, 1) - pictures) / 2.0) ** 2
    return (-10.0 * torch.log10(error.mean(dim=(1, 2, 3)).clamp_min(1e-10))).mean()


@torch.no_grad()
def measure_scale_factor(model: LatentDiffusion, batches: list[dict[str, Any]]) -> float:
    """Return one over the standard deviation of the latents of real pictures (LDM, section 4.3.2).

    Args:
        model: with a trained autoencoder.
        batches: of the data module; posterior deviation counts, since latents are sampled.
    """
    total, squares, count = 0.0, 0.0, 0
    for batch in batches:
        posterior = model.autoencoder.encode(to_pixels(batch["image"]).to(model.unet.conv_in.weight.device))
        mean, std = posterior.mean.double(), posterior.std.double()
        total += float(mean.sum())
        squares += float((mean**2 + std**2).sum())
        count += mean.numel()
    return (squares / count - (total / count) ** 2) ** -0.5
