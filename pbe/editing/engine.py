"""One batch of edits through the networks: conditions, latents, the solver, and pictures again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pbe.diffusion.noise import Generators, draw_noise
from pbe.diffusion.schedule import NoiseSchedule
from pbe.editing.conditioning import Conditioning, prepared_predictor
from pbe.editing.conventions import Conventions
from pbe.editing.exemplars import CropSettings, Exemplar, exemplar_pixels
from pbe.editing.inputs import Batch
from pbe.editing.placement import View
from pbe.editing.preprocess import mask_at_latent_size, network_inputs
from pbe.editing.problems import EditTypeError, EditValueError
from pbe.editing.sampling import Progress, Sampling
from pbe.models import LatentDiffusion
from pbe.models.codec import known_pixels
from pbe.models.latent_diffusion import masked_image


@dataclass(frozen=True)
class Given:
    """What a call gives instead of having it drawn or encoded; fields as in the pipeline's call."""

    generator: Generators
    latents: Tensor | None
    masked_image_latents: Tensor | None
    exemplar_embeds: Tensor | None


@dataclass(frozen=True)
class Engine:
    """A model and the conventions of one call.

    Attributes:
        model: the networks.
        schedule: their noise schedule.
        crop: how exemplars are cropped, where the conventions crop them.
        conventions: of the call.
    """

    model: LatentDiffusion
    schedule: NoiseSchedule
    crop: CropSettings
    conventions: Conventions

    def encode(self, exemplars: Sequence[Exemplar]) -> Tensor:
        """Return the condition of exemplars, ``(b, tokens, context_dim)``."""
        crop = self.crop if self.conventions.crop_exemplar else None
        pixels = exemplar_pixels(exemplars, self.model.config.exemplar_encoder, crop)
        return self.model.encode_exemplar(pixels.to(self.model.device, self.model.dtype))

    def sample(
        self, batch: Batch, view: View, sampling: Sampling, given: Given, progress: Progress
    ) -> Tensor:
        """Return the latents of a batch of edits, ``(edits, z, h, w)`` float32.

        Noise is drawn on the CPU in this order: starting noise, noise of the masked pictures' posterior,
        noise of the solver.

        Args:
            batch: exemplars, and how edits belong to pictures.
            view: what the model is shown of the pictures.
            sampling: solver and guidance.
            given: generators, and what is given instead of drawn or encoded.
            progress: the bar.

        Raises:
            EditTypeError, EditValueError: something given does not fit.
            EditValueError: the latents are not finite.
        """
        images, keep = network_inputs(view.pictures, view.holes, view.size, self.model.size_multiple)
        x_T = self._start(batch, images, given)
        conditioning = Conditioning(
            self._condition(batch, given),
            self._masked_latents(batch, masked_image(images, keep), x_T, given),
            self._keep_mask(batch, keep, x_T),
        )
        scale = max(sampling.guidance_scale, self.conventions.guidance_floor)
        steps, timesteps = sampling.check(self.schedule), sampling.timesteps(self.schedule)
        predict = prepared_predictor(self.model, self.schedule, conditioning, scale, timesteps)
        with progress.watched(sampling, steps) as step:
            sampled = sampling.run(predict, x_T, self.schedule, given.generator, step)
        _require_finite(sampled, f", or too large a guidance_scale ({scale:g})")
        return sampled

    def decode(self, latents: Tensor, batch: Batch, view: View) -> Tensor:
        """Return pictures ``(edits, 3, h, w)`` float32, about [-1, 1], at the working size.

        Args:
            latents: one an edit.
            batch: how edits belong to pictures.
            view: what the model is shown of the pictures.

        Raises:
            EditValueError: they are not finite.
        """
        height, width = view.size
        known = self._known(batch, view) if self.model.config.autoencoder.mask_aware_decoder else None
        painted = self.model.decode_latents(latents.to(self.model.dtype), known)
        painted = painted.float()[:, :, :height, :width]
        _require_finite(painted)
        return painted

    def _known(self, batch: Batch, view: View) -> Tensor:
        """Return what a mask-aware decoder is told, one an edit."""
        images, keep = network_inputs(view.pictures, view.holes, view.size, self.model.size_multiple)
        known = batch.spread(known_pixels(images, keep), "image")
        return known.to(self.model.device, self.model.dtype)

    def _condition(self, batch: Batch, given: Given) -> Tensor:
        embeds = given.exemplar_embeds
        rows = self.encode(batch.exemplars) if embeds is None else embeds
        return batch.spread(rows.to(self.model.device, self.model.dtype), "exemplar_embeds")

    def _keep_mask(self, batch: Batch, keep: Tensor, x_T: Tensor) -> Tensor:
        size = (x_T.shape[-2], x_T.shape[-1])
        small = mask_at_latent_size(keep, size, self.conventions.mask_mode)
        return batch.spread(small.to(self.model.device, self.model.dtype), "mask_image")

    def _start(self, batch: Batch, images: Tensor, given: Given) -> Tensor:
        """Return the starting noise ``(edits, z, h, w)`` float32: the one given, or a draw."""
        factor = self.model.autoencoder.downsampling
        channels = self.model.config.autoencoder.latent_channels
        shape = (len(batch), channels, images.shape[-2] // factor, images.shape[-1] // factor)
        if given.latents is None:
            return draw_noise(shape, given.generator).to(self.model.device)
        return check_latents(given.latents, "latents", shape, (len(batch),)).to(self.model.device)

    def _masked_latents(self, batch: Batch, hidden: Tensor, x_T: Tensor, given: Given) -> Tensor:
        """Return latents of the pictures with their holes greyed, one an edit, in the type of the weights."""
        device, dtype, name = self.model.device, self.model.dtype, "masked_image_latents"
        shape, generator = tuple(x_T.shape), given.generator
        if given.masked_image_latents is not None:
            counts = (1, len(batch.pictures), len(batch))
            rows = check_latents(given.masked_image_latents, name, shape, counts)
            return batch.spread(rows, name).to(device, dtype)
        if self.conventions.share_posterior:
            shape = (len(batch.pictures), *shape[1:])
            generator = list(generator)[:: batch.copies] if isinstance(generator, Sequence) else generator
        else:
            hidden = batch.spread(hidden, "image")
        noise = draw_noise(shape, generator).to(device, dtype)
        return batch.spread(self.model.encode_images(hidden.to(device, dtype), noise), name)


def _require_finite(made: Tensor, more: str = "") -> None:
    """Refuse infinite numbers and those that are none, which would become black.

    Raises:
        EditValueError: there are some.
    """
    if not torch.isfinite(made).all():
        causes = f"damaged weights, or float16 is too small{more}"
        raise EditValueError(f"the model gave infinite numbers: {causes}")


def check_latents(latents: Any, name: str, shape: tuple[int, ...], counts: tuple[int, ...]) -> Tensor:
    """Check latents that a call gives, and return them in float32.

    Args:
        latents: what is given.
        name: what errors call it.
        shape: one of every edit's.
        counts: possible numbers of rows.

    Raises:
        EditTypeError: no floating-point tensor.
        EditValueError: another shape, or values that are not finite.
    """
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise EditTypeError(f"{name}: {kind}; it must be a floating-point torch.Tensor")
    if latents.ndim != 4 or tuple(latents.shape[1:]) != shape[1:] or len(latents) not in counts:
        raise EditValueError(f"{name} have the shape {tuple(latents.shape)}; this edit needs {shape}")
    if not torch.isfinite(latents).all():
        raise EditValueError(f"{name}: its values must be finite numbers")
    return latents.float()
