"""One batch of edits through the networks: conditions, latents, the solver, and images again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from pbe.diffusion.guidance import (
    EVERYWHERE,
    Interval,
    Network,
    PredictNoise,
    guided,
    guided_in,
    noise_from_v,
)
from pbe.diffusion.noise import Generators, draw_noise
from pbe.diffusion.schedule import NoiseSchedule
from pbe.diffusion.solvers import Callback, SolverChoice, get_solver
from pbe.editing.inputs import Batch
from pbe.editing.placement import View
from pbe.editing.preprocess import (
    CropSettings,
    Exemplar,
    exemplar_pixels,
    mask_at_latent_size,
    network_inputs,
)
from pbe.editing.settings import DEFAULT_STEPS, Conventions, EditSettings
from pbe.errors import EditTypeError, EditValueError, UserError
from pbe.models import LatentDiffusion
from pbe.models.codec import known_pixels
from pbe.models.latent_diffusion import masked_image
from pbe.models.unet import DeepFeatures

S = TypeVar("S", bound=EditSettings)
ShowSteps = Callable[[int], AbstractContextManager[Callback]]  # from the number of steps; gives the callback


def choose_solver(solver: str | SolverChoice) -> SolverChoice:
    """Return the choice that a name stands for."""
    if isinstance(solver, SolverChoice):
        return solver
    if not isinstance(solver, str):
        raise EditTypeError(f"solver: {type(solver).__name__}; it must be a name or a SolverChoice")
    try:
        return SolverChoice(get_solver(solver).name)
    except UserError as error:
        raise EditValueError(str(error)) from error


def merge_choice(default: SolverChoice, settings: EditSettings) -> SolverChoice:
    """Return the solver that the settings ask for; anything that they leave open comes from the default."""
    choice = default if settings.solver is None else choose_solver(settings.solver)
    spacing, karras = settings.spacing or choice.spacing, settings.karras or choice.karras
    return replace(choice, spacing=spacing, karras=karras)


def complete(settings: S, model: LatentDiffusion) -> S:
    """Return settings with the number of steps that the model is meant for, if they give none.

    Raises EditValueError for guidance that a distilled model has not learned.
    """
    unet = model.config.unet
    if unet.guidance_range:
        low, high = unet.guidance_range
        if not low <= settings.guidance_scale <= high:
            known = f"{low:g} to {high:g}" if low < high else f"{low:g} alone"
            raise EditValueError(
                f"guidance_scale is {settings.guidance_scale:g}; this model was distilled for {known}"
            )
        if settings.guidance_interval != EVERYWHERE:
            raise EditValueError(
                "guidance_interval: this model was distilled with guidance everywhere; leave it at 0 to 1"
            )
    return replace(settings, steps=settings.steps or unet.few_steps or DEFAULT_STEPS)


def count_steps(choice: SolverChoice, settings: EditSettings, schedule: NoiseSchedule) -> int:
    """Check that a solver accepts the settings, and return the number of steps that it will report."""
    solver = get_solver(choice.name)
    if settings.eta and solver.noise != "eta":
        kind = "draws its own noise" if solver.noise == "always" else "is deterministic"
        raise EditValueError(f"{solver.name} {kind}: eta must be 0 (use solver ddim or lcm for eta above 0)")
    try:
        return len(solver.grid(schedule, settings.count, choice))
    except UserError as error:
        raise EditValueError(str(error)) from error


def solve(
    choice: SolverChoice,
    settings: EditSettings,
    predict: PredictNoise,
    x_T: Tensor,
    schedule: NoiseSchedule,
    *,
    generator: Generators,
    callback: Callback | None = None,
) -> Tensor:
    """Run the solver from the noise ``x_T``, and return latents, both ``(b, z, h, w)``."""
    return get_solver(choice.name)(
        predict,
        x_T,
        schedule,
        settings.count,
        eta=settings.eta,
        generator=generator,
        callback=callback,
        settings=choice,
    )


def network_timesteps(choice: SolverChoice, settings: EditSettings, schedule: NoiseSchedule) -> Tensor:
    """Return the timesteps ``(n,)`` of the solver's network calls, by running it on a single number."""
    asked: list[Tensor] = []

    def predict(x_t: Tensor, timesteps: Tensor) -> Tensor:
        asked.append(timesteps)
        return torch.zeros_like(x_t)

    solve(choice, settings, predict, torch.zeros(1, 1, 1, 1), schedule, generator=torch.Generator())
    return torch.cat(asked)


def check_callback(callback: Any) -> None:
    """Check that a callback is None or can be called with (step, timestep, latents)."""
    if callback is None:
        return
    if not callable(callback):
        raise EditTypeError(f"callback: {type(callback).__name__}; it must be a function")
    try:
        signature = inspect.signature(callback)
    except (TypeError, ValueError):  # some that are written in C do not say what they take
        return
    try:
        signature.bind(0, 0.0, None)
    except TypeError as error:
        wanted = "it must take three arguments: step, timestep and latents"
        raise EditTypeError(f"callback: {wanted} ({error})") from error


@contextmanager
def progress_bar(
    total: int, *, bar: dict[str, Any], callback: Callback | None, every: int
) -> Iterator[Callback]:
    """Show a bar; yield a function that advances it and calls the user's callback every n-th step."""
    with tqdm(**({"total": total, "desc": "painting", "unit": "step"} | bar)) as shown:

        def step(index: int, timestep: float, latents: Tensor) -> None:
            shown.update()
            if callback is not None and index % every == 0:
                callback(index, timestep, latents)

        yield step


@dataclass(frozen=True)
class Conditioning:
    """What a batch of edits is conditioned on.

    ``condition`` is ``(b, tokens, context_dim)``, ``masked_latents`` ``(b, z, h, w)``, and ``keep_mask``
    ``(b, 1, h, w)`` at latent size, 1 = keep.
    """

    condition: Tensor
    masked_latents: Tensor
    keep_mask: Tensor


def noise_predictor(
    model: LatentDiffusion,
    schedule: NoiseSchedule,
    conditioning: Conditioning,
    guidance_scale: float | Tensor,
) -> PredictNoise:
    """Return the model as a guided predictor of noise, with its conditioning fixed, as solvers take it.

    Latents stay float32 whatever the type of the weights. The model may predict eps or v; a distilled one
    gets the guidance scale as an input. Scales ``(b, 1, 1, 1)`` differ between samples.
    """
    fixed = (conditioning.masked_latents, conditioning.keep_mask)
    doubled = tuple(torch.cat([x, x]) for x in fixed)
    dtype, scale = model.unet.conv_in.weight.dtype, _as_input(model, guidance_scale)

    def network(x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        masked_latents, keep_mask = fixed if len(x_t) == len(fixed[0]) else doubled
        inputs = (x_t.to(dtype), timesteps, condition, masked_latents, keep_mask)
        return model.predict(*inputs, guidance=scale).float()

    null = model.null_condition(*conditioning.condition.shape[:2]).to(conditioning.condition.dtype)
    predict = guided(network, conditioning.condition, null, 1.0 if scale is not None else guidance_scale)
    return noise_from_v(predict, schedule) if model.config.prediction == "v" else predict


def _as_input(model: LatentDiffusion, guidance_scale: float | Tensor) -> Tensor | None:
    """Return the guidance scales as a distilled model takes them, ``(b,)``; None for other models."""
    if not model.config.unet.guidance_range:
        return None
    return torch.as_tensor(guidance_scale, dtype=torch.float32, device=model.device).flatten()


def prepared_predictor(
    model: LatentDiffusion,
    schedule: NoiseSchedule,
    conditioning: Conditioning,
    guidance_scale: float | Tensor,
    timesteps: Tensor,
    *,
    interval: Interval = EVERYWHERE,
    reuse: int = 1,
) -> PredictNoise:
    """Do what :func:`noise_predictor` does, but compute once whatever is the same in every call.

    It is for one batch of edits; the weights must not change while it is used, nor be sharded.

    Args:
        model: model to edit with.
        schedule: its noise schedule.
        conditioning: of the batch.
        guidance_scale: 1 turns guidance off; ``(b, 1, 1, 1)`` gives each sample its own.
        timesteps: ``(n,)`` timesteps of the solver's calls, in their order.
        interval: noise levels that are guided; a call outside takes half the time.
        reuse: this many calls share the UNet's inner levels; above 1 it is an approximation.
    """
    condition = conditioning.condition
    null = model.null_condition(*condition.shape[:2]).to(condition.dtype)
    known, scale = timesteps.to(model.device), _as_input(model, guidance_scale)
    # one for calls inside and outside of the interval: whatever lies on its other side is too old to be taken
    deep = DeepFeatures(reuse) if reuse > 1 else None

    def of(*conditions: Tensor) -> Network:
        fixed = (conditioning.masked_latents, conditioning.keep_mask)
        prepared = model.prepare(torch.cat(conditions), *fixed, known, scale)
        return lambda x_t, timesteps, _: model.predict_prepared(
            x_t.to(model.dtype), timesteps, prepared, deep
        ).float()

    def alone() -> PredictNoise:
        return guided(of(condition), condition, null, 1.0)

    if scale is not None or (not isinstance(guidance_scale, Tensor) and guidance_scale == 1.0):
        predict = alone()
    else:
        predict = guided(of(null, condition), condition, null, guidance_scale)  # null first, as in `guided`
        if interval != EVERYWHERE:
            predict = guided_in(interval, predict, alone(), timesteps.tolist(), len(schedule.betas) - 1)
    return noise_from_v(predict, schedule) if model.config.prediction == "v" else predict


@dataclass(frozen=True)
class Engine:
    """A model and the conventions of one call; ``crop`` is for conventions that crop the exemplar."""

    model: LatentDiffusion
    schedule: NoiseSchedule
    crop: CropSettings
    conventions: Conventions

    def complete(self, settings: S) -> S:
        """Do what :func:`complete` does, for this model."""
        return complete(settings, self.model)

    def encode(self, exemplars: Sequence[Exemplar]) -> Tensor:
        """Return the condition of exemplars, ``(b, tokens, context_dim)``."""
        crop = self.crop if self.conventions.crop_exemplar else None
        pixels = exemplar_pixels(exemplars, self.model.config.exemplar_encoder, crop)
        return self.model.encode_exemplar(pixels.to(self.model.device, self.model.dtype))

    def with_spacing(self, choice: SolverChoice) -> SolverChoice:
        """Return the solver with the conventions' timestep spacing, if it has none of its own."""
        if choice.spacing is not None or choice.name not in self.conventions.leading:
            return choice
        return replace(choice, spacing="leading")

    def sample(
        self, batch: Batch, view: View, settings: EditSettings, choice: SolverChoice, show: ShowSteps
    ) -> Tensor:
        """Return the latents of a batch of edits, ``(edits, z, h, w)`` float32.

        Noise is drawn on the CPU in this order: starting noise, noise of the masked images' posterior,
        noise of the solver.
        """
        images, keep = network_inputs(view.images, view.masks, view.size, self.model.size_multiple)
        x_T = self._start(batch, images)
        conditioning = Conditioning(
            self._condition(batch),
            self._masked_latents(batch, masked_image(images, keep), x_T),
            self._keep_mask(batch, keep, x_T),
        )
        scale = max(settings.guidance_scale, self.conventions.guidance_floor)
        steps = count_steps(choice, settings, self.schedule)
        timesteps = network_timesteps(choice, settings, self.schedule)
        predict = prepared_predictor(
            self.model,
            self.schedule,
            conditioning,
            scale,
            timesteps,
            interval=settings.guidance_interval,
            reuse=settings.reuse_features,
        )
        with show(steps) as step:
            generator = batch.generator
            sampled = solve(choice, settings, predict, x_T, self.schedule, generator=generator, callback=step)
        _require_finite(sampled, f", or too large a guidance_scale ({scale:g})")
        return sampled

    def decode(self, latents: Tensor, batch: Batch, view: View) -> Tensor:
        """Return images ``(edits, 3, h, w)`` float32, about [-1, 1], at the working size."""
        height, width = view.size
        known = self._known(batch, view) if self.model.config.autoencoder.mask_aware_decoder else None
        painted = self.model.decode_latents(latents.to(self.model.dtype), known)
        painted = painted.float()[:, :, :height, :width]
        _require_finite(painted)
        return painted

    def _known(self, batch: Batch, view: View) -> Tensor:
        """Return what a mask-aware decoder sees, ``(edits, 4, h, w)``."""
        images, keep = network_inputs(view.images, view.masks, view.size, self.model.size_multiple)
        known = batch.spread(known_pixels(images, keep), "image")
        return known.to(self.model.device, self.model.dtype)

    def _condition(self, batch: Batch) -> Tensor:
        embeds = batch.exemplar_embeds
        rows = self.encode(batch.exemplars) if embeds is None else embeds
        return batch.spread(rows.to(self.model.device, self.model.dtype), "exemplar_embeds")

    def _keep_mask(self, batch: Batch, keep: Tensor, x_T: Tensor) -> Tensor:
        size = (x_T.shape[-2], x_T.shape[-1])
        small = mask_at_latent_size(keep, size, self.conventions.mask_mode)
        return batch.spread(small.to(self.model.device, self.model.dtype), "mask_image")

    def _start(self, batch: Batch, images: Tensor) -> Tensor:
        """Return the starting noise ``(edits, z, h, w)`` float32: the one given, or a draw."""
        factor = self.model.autoencoder.downsampling
        channels = self.model.config.autoencoder.latent_channels
        shape = (len(batch), channels, images.shape[-2] // factor, images.shape[-1] // factor)
        if batch.latents is None:
            return draw_noise(shape, batch.generator).to(self.model.device)
        return check_latents(batch.latents, "latents", shape, (len(batch),)).to(self.model.device)

    def _masked_latents(self, batch: Batch, hidden: Tensor, x_T: Tensor) -> Tensor:
        """Return latents of the images with the masked region greyed, one per edit, in the weights' type."""
        device, dtype, name = self.model.device, self.model.dtype, "masked_image_latents"
        shape, generator = tuple(x_T.shape), batch.generator
        if batch.masked_image_latents is not None:
            counts = (1, len(batch.images), len(batch))
            rows = check_latents(batch.masked_image_latents, name, shape, counts)
            return batch.spread(rows, name).to(device, dtype)
        if self.conventions.share_posterior:
            shape = (len(batch.images), *shape[1:])
            generator = list(generator)[:: batch.copies] if isinstance(generator, Sequence) else generator
        else:
            hidden = batch.spread(hidden, "image")
        noise = draw_noise(shape, generator).to(device, dtype)
        return batch.spread(self.model.encode_images(hidden.to(device, dtype), noise), name)


def _require_finite(made: Tensor, more: str = "") -> None:
    """Refuse NaN and infinite numbers, which would become black."""
    if not torch.isfinite(made).all():
        causes = f"damaged weights, or float16 is too small{more}"
        raise EditValueError(f"the model's output is not finite: {causes}")


def check_latents(latents: Any, name: str, shape: tuple[int, ...], counts: tuple[int, ...]) -> Tensor:
    """Check the latents of a call: rows like those of ``shape``, as many as in ``counts``; return float32."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise EditTypeError(f"{name}: {kind}; it must be a floating-point torch.Tensor")
    if latents.ndim != 4 or tuple(latents.shape[1:]) != shape[1:] or len(latents) not in counts:
        raise EditValueError(f"{name} have the shape {tuple(latents.shape)}; this edit needs {shape}")
    if not torch.isfinite(latents).all():
        raise EditValueError(f"{name}: its values must be finite numbers")
    return latents.float()
