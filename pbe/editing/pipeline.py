"""The pipeline a person calls: an exemplar, a picture and a mask in, edited pictures out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pbe.checkpoints.native import load_model
from pbe.diffusion.schedule import make_schedule
from pbe.diffusion.solvers import Callback, get_solver, uniform_timesteps
from pbe.editing.compositing import composite, to_bytes
from pbe.editing.conditioning import Conditioning, noise_predictor
from pbe.editing.preprocess import (
    Generators,
    Triple,
    check_generator,
    draw_noise,
    matched,
    network_inputs,
    squash_exemplars,
    working_size,
)
from pbe.editing.problems import EditTypeError, EditValueError
from pbe.models import LatentDiffusion
from pbe.models.latent_diffusion import latent_mask, masked_image

OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass
class EditOutput:
    """What the pipeline returns.

    Attributes:
        images: ``output_type`` ``pil``: a list of RGB images; ``np``: float32 ``(b, h, w, 3)``; ``pt``:
            float32 ``(b, 3, h, w)``, both in [0, 1]. The size is that of the source picture.
        edited_at: height and width at which the model worked, before padding.
    """

    images: Any
    edited_at: tuple[int, int]


@dataclass(frozen=True)
class Sampling:
    """How latents are sampled; the fields are those of :meth:`PaintByExample.__call__`."""

    solver: str
    steps: int
    guidance_scale: float
    eta: float
    callback: Callback | None


class PaintByExample:
    """Paints an exemplar into the hole of a picture (Yang et al., CVPR 2023).

    Args:
        model: the networks, in evaluation mode, on the device and in the type they are to run in.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        self.model = model
        self.schedule = make_schedule(model.config.schedule)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> PaintByExample:
        """Load a model folder of this project.

        Args:
            folder: holds ``config.json`` and three safetensors files.
            device: where the model runs; None means the CPU.
            dtype: type of the weights in memory; None means float32.

        Raises:
            UserError: the folder is missing, incomplete or damaged.
        """
        return cls(load_model(folder, "cpu" if device is None else device, dtype))

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights; latents are kept in float32 whatever it is."""
        return self.model.unet.conv_in.weight.dtype

    @torch.no_grad()
    def __call__(
        self,
        example_image: Any,
        image: Any,
        mask_image: Any,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback: Callback | None = None,
        preserve_background: bool = True,
        solver: str = "plms",
    ) -> EditOutput:
        """Paint the exemplar into the masked part of the picture.

        Exemplars, pictures and masks are PIL images or numpy arrays, or lists of them: one each, or as many
        as there are edits in the batch. They are taken as they are (no EXIF rotation); see
        :mod:`pbe.editing.pictures` for modes and array forms. Results come picture by picture.

        Args:
            example_image: exemplar(s), squashed to the tower's square.
            image: picture(s), all of one size.
            mask_image: mask(s), white = repaint; resized to the picture by nearest neighbour.
            height: height to edit at; the result keeps the picture's. None: see ``working_size``.
            width: width to edit at, likewise.
            num_inference_steps: steps of the solver, 1 to 500.
            guidance_scale: strength of classifier-free guidance, 0 and above; 1 turns it off.
            num_images_per_prompt: edits of each picture.
            eta: share of ancestral noise, 0 to 1; above 0 with ``ddim`` only.
            generator: CPU generator of all noise, or a list with one an edit.
            latents: standard normal start ``(edits, z, h, w)`` instead of drawn noise.
            output_type: ``pil``, ``np`` or ``pt``.
            callback: called after each step with (step, timestep, latents).
            preserve_background: give back every pixel outside the mask as it was, bit by bit.
            solver: ``plms`` or ``ddim``.

        Raises:
            EditTypeError, EditValueError, UserError: an argument that cannot be used, in one clear line.
        """
        sampling = Sampling(solver, num_inference_steps, guidance_scale, eta, callback)
        self._check(sampling, num_images_per_prompt, output_type)
        triples = matched(example_image, image, mask_image, num_images_per_prompt)
        check_generator(generator, len(triples))
        size = working_size(triples[0].picture.shape[:2], self.model.config.image_size, height, width)
        edits = self._edit(triples, size, sampling, generator, latents)
        if preserve_background:
            edits = np.stack([composite(t.picture, e, t.hole) for t, e in zip(triples, edits, strict=True)])
        return EditOutput(_as_output(edits, output_type), size)

    def _edit(
        self,
        triples: Sequence[Triple],
        size: tuple[int, int],
        sampling: Sampling,
        generator: Generators,
        latents: Tensor | None,
    ) -> np.ndarray:
        """Return one edit a triple, float32 ``(b, h, w, 3)`` in [0, 1] at the size of the pictures."""
        images, keep = network_inputs(triples, size, self.model.size_multiple)
        condition = self.encode_exemplars([triple.exemplar for triple in triples])
        x_T = self._start(latents, images, generator)
        noise = draw_noise(tuple(x_T.shape), generator)
        conditioning = self._conditioning(images.to(self.device), keep.to(self.device), condition, noise)
        sampled = self._sample(x_T, conditioning, sampling, generator)
        return self._decode(sampled, size, triples[0].picture.shape[:2])

    def _check(self, sampling: Sampling, num_images: int, output_type: str) -> None:
        for name, number in (("num_inference_steps", sampling.steps), ("num_images_per_prompt", num_images)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise EditTypeError(f"{name}: {type(number).__name__}; it must be an int")
        get_solver(sampling.solver)
        uniform_timesteps(self.schedule, sampling.steps)
        if not (math.isfinite(sampling.guidance_scale) and sampling.guidance_scale >= 0.0):
            raise EditValueError(f"guidance_scale is {sampling.guidance_scale}; it must be 0 or more")
        if not 0.0 <= sampling.eta <= 1.0:
            raise EditValueError(f"eta is {sampling.eta}; it must lie between 0 and 1")
        if sampling.eta and sampling.solver == "plms":
            raise EditValueError("plms is deterministic: eta must be 0 (use solver ddim for eta above 0)")
        if num_images < 1:
            raise EditValueError(f"num_images_per_prompt is {num_images}; it must be at least 1")
        if output_type not in OUTPUT_TYPES:
            raise EditValueError(f"no output_type '{output_type}'; there are: {', '.join(OUTPUT_TYPES)}")

    def encode_exemplars(self, exemplars: Sequence[np.ndarray]) -> Tensor:
        """Map exemplars, uint8 ``h w 3`` each, to the condition ``(b, tokens, context_dim)``."""
        squares = squash_exemplars(exemplars, self.model.config.exemplar_encoder.image_size)
        return self.model.encode_exemplar(self.model.normalise_exemplar(squares))

    def _start(self, latents: Tensor | None, images: Tensor, generator: Generators) -> Tensor:
        """Return the starting noise ``(b, z, h, w)`` float32: the one given, or a draw."""
        factor = self.model.autoencoder.downsampling
        height, width = images.shape[-2:]
        channels = self.model.config.autoencoder.latent_channels
        shape = (len(images), channels, height // factor, width // factor)
        if latents is None:
            return draw_noise(shape, generator).to(self.device)
        if not isinstance(latents, Tensor):
            raise EditTypeError(f"latents: {type(latents).__name__}; it must be a torch.Tensor")
        if tuple(latents.shape) != shape:
            raise EditValueError(f"latents have the shape {tuple(latents.shape)}; this edit needs {shape}")
        return latents.to(self.device, torch.float32)

    def _conditioning(self, images: Tensor, keep: Tensor, condition: Tensor, noise: Tensor) -> Conditioning:
        """Encode the masked pictures, the posterior sampled with ``noise``; bring the mask to latent size."""
        hidden = masked_image(images, keep).to(self.dtype)
        masked_latents = self.model.encode_images(hidden, noise.to(self.device, self.dtype))
        keep_mask = latent_mask(keep, (noise.shape[-2], noise.shape[-1])).to(self.dtype)
        return Conditioning(condition, masked_latents, keep_mask)

    def _sample(
        self, x_T: Tensor, conditioning: Conditioning, sampling: Sampling, generator: Generators
    ) -> Tensor:
        """Run the solver. Ancestral noise of one generator an edit asks for one edit after the other."""
        if not (sampling.eta and isinstance(generator, Sequence)):
            own = None if isinstance(generator, Sequence) else generator
            return self._solve(x_T, conditioning, sampling, own)
        single = [slice(i, i + 1) for i in range(len(x_T))]
        parts = zip(single, generator, strict=True)
        return torch.cat([self._solve(x_T[i], conditioning.part(i), sampling, own) for i, own in parts])

    def _solve(
        self, x_T: Tensor, conditioning: Conditioning, sampling: Sampling, generator: torch.Generator | None
    ) -> Tensor:
        return get_solver(sampling.solver)(
            noise_predictor(self.model, self.schedule, conditioning, sampling.guidance_scale),
            x_T,
            self.schedule,
            sampling.steps,
            eta=sampling.eta,
            generator=generator,
            callback=sampling.callback,
        )

    def _decode(self, latents: Tensor, size: tuple[int, int], picture_size: tuple[int, int]) -> np.ndarray:
        """Return float32 ``(b, h, w, 3)`` in [0, 1] at the size of the pictures, the padding cut off."""
        decoded = self.model.decode_latents(latents.to(self.dtype)).float()[:, :, : size[0], : size[1]]
        if not torch.isfinite(decoded).all():
            raise EditValueError("the model gave infinite numbers: damaged weights, or float16 is too small")
        if size != picture_size:
            decoded = F.interpolate(decoded, picture_size, mode="bicubic", antialias=True)
        return rearrange((decoded / 2.0 + 0.5).clamp(0.0, 1.0), "b c h w -> b h w c").cpu().numpy()


def _as_output(edits: np.ndarray, output_type: str) -> Any:
    if output_type == "pil":
        return [Image.fromarray(to_bytes(edit)) for edit in edits]
    if output_type == "np":
        return edits
    return rearrange(torch.from_numpy(edits), "b h w c -> b c h w").contiguous()
