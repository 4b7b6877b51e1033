"""The pipeline a person calls: an exemplar, an image and a mask in, edited images out."""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pbe.checkpoints.folders import CHECKER
from pbe.checkpoints.saving import save_checkpoint
from pbe.checkpoints.settings import DEFAULT_SOLVER, Usage
from pbe.config import Config, ModelConfig
from pbe.diffusion.noise import Generators
from pbe.diffusion.schedule import NoiseSchedule
from pbe.diffusion.solvers import Callback, SolverChoice
from pbe.editing.adapters import AdapterSettings
from pbe.editing.compatibility import DiffusersNames
from pbe.editing.diffusers_inputs import check_saving, preprocessor_of, read_arguments
from pbe.editing.engine import Engine, check_callback, choose_solver, count_steps, merge_choice, progress_bar
from pbe.editing.images import to_bytes, to_unit
from pbe.editing.inputs import Batch, check_generator, match_inputs, read_exemplars
from pbe.editing.loading import (
    NETWORKS,
    Hub,
    PipelineSchedule,
    assemble,
    full_schedule,
    load_parts,
    own_names,
    schedule_of,
)
from pbe.editing.offload import MemorySettings, Offload
from pbe.editing.output import OUTPUT_TYPES, EditOutput, add_watermark, as_output, to_images
from pbe.editing.placement import View, choose_view, place_back, resize_batch
from pbe.editing.preprocess import check_embeds, crop_settings
from pbe.editing.safety import SafetyChecker, checker_problem, flags_of, save_safety_checker
from pbe.editing.settings import DEFAULT_STEPS, EditSettings, check_count, get_conventions
from pbe.errors import EditValueError
from pbe.files import expand_home
from pbe.models import LatentDiffusion

logger = logging.getLogger(__name__)


class PaintByExample(AdapterSettings, MemorySettings, DiffusersNames):
    """Paints an exemplar into the masked region of an image (Yang et al., CVPR 2023).

    Made by :meth:`from_pretrained`, from a whole model, or from the :attr:`components` of another pipeline,
    whose networks it then shares. A call, ``pipe(exemplar, image, mask)``, takes:

    - ``example_image``, ``image``, ``mask_image``: PIL images, uint8 or float arrays, or tensors, single or
      batched; in the mask 1 (white) is repainted. docs/pipeline.md lists the accepted shapes and ranges.
    - ``height``, ``width``: size in pixels of the result, or with ``region="mask"`` of what is edited.
    - ``num_inference_steps``, ``solver``, ``eta``; ``preset``: ``draft``, ``normal`` or ``best``.
    - ``guidance_scale``: from 0; 1 turns guidance off. ``guidance_interval``: noise levels that are guided.
    - ``num_images_per_prompt``: edits of each image. ``generator``: CPU generator, or one for each edit.
    - ``region``: ``full``, or ``mask`` for its surroundings only, with ``margin`` and ``feather``.
    - ``preserve_background``: keep every pixel outside the mask exactly.
    - ``exemplar_embeds``, ``latents``, ``masked_image_latents``: used instead of being computed or drawn.
    - ``output_type``: ``pil``, ``np``, ``pt`` or ``latent``. ``callback(step, timestep, latents)`` is called
      every ``callback_steps`` steps. With ``return_dict=False`` a tuple is returned, not an ``EditOutput``.

    It raises :class:`~pbe.errors.UserError`, which is a ``ValueError`` or ``TypeError`` too.

    Args:
        model: the networks, in evaluation mode, on the device and in the type that they run in.
        unet: used with ``autoencoder`` and ``exemplar_encoder`` in place of ``model``.
        autoencoder: likewise.
        exemplar_encoder: likewise.
        noise_schedule: the networks' schedule; that of another pipeline brings its settings along.
        safety_checker: checks what was painted, or None.
        solver: name or settings of the solver for calls that name none; None takes the schedule's.
        conventions: ``original`` or ``diffusers``; None takes the schedule's.
        watermark: put the original's invisible watermark into every image; None takes the schedule's.
        theirs: parts by diffusers' names: ``vae``, ``image_encoder``, ``scheduler``, ``feature_extractor``.
    """

    def __init__(
        self,
        model: LatentDiffusion | None = None,
        *,
        unet: nn.Module | None = None,
        autoencoder: nn.Module | None = None,
        exemplar_encoder: nn.Module | None = None,
        noise_schedule: NoiseSchedule | None = None,
        safety_checker: Any = None,
        solver: str | SolverChoice | None = None,
        conventions: str | None = None,
        watermark: bool | None = None,
        **theirs: Any,
    ) -> None:
        networks = {"unet": unet, "autoencoder": autoencoder, "exemplar_encoder": exemplar_encoder}
        parts = own_names(networks | {"noise_schedule": noise_schedule}, theirs)
        if model is None:
            self.model, schedule = assemble(parts)
        else:
            self.model = model
            schedule = schedule_of(model) if noise_schedule is None else full_schedule(noise_schedule)
        usage = schedule.usage
        if theirs.get("feature_extractor") is not None:
            usage = replace(usage, preprocessor=preprocessor_of(theirs["feature_extractor"]))
        self.noise_schedule = replace(schedule, usage=usage)
        self.safety_checker = safety_checker
        self.watermark = bool(usage.watermark) if watermark is None else watermark
        self.conventions = str(usage.conventions) if conventions is None else conventions
        self._choice = choose_solver(usage.solver or DEFAULT_SOLVER if solver is None else solver)
        self._crop = crop_settings(self.model.config.exemplar_encoder, usage.preprocessor)
        self._bar: dict[str, Any] = {}
        self._offload: Offload | None = None
        if theirs.get("scheduler") is not None:
            self.scheduler = theirs["scheduler"]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        config: str | Path | ModelConfig | Config | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        solver: str | SolverChoice | None = None,
        *,
        conventions: str | None = None,
        safety_checker: str | Path | nn.Module | None = "auto",
        watermark: bool | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        raw_weights: bool = False,
        int8: bool = False,
        compile: bool = False,
        **others: Any,
    ) -> PaintByExample:
        """Load a model: a folder in any layout or of a run, a checkpoint, or a repository of the Hub.

        Args:
            pretrained_model_name_or_path: folder, file, ``owner/name`` on the Hub, or ``toy``, the model that
                ships.
            config: the model's sizes, if its files do not give them: a YAML file or a typed configuration. A
                bare checkpoint without it is assumed to have the official sizes.
            dtype: type of the weights in memory; None means float32.
            device: where the model runs; None means the CPU.
            solver: as in the class; None takes the one in the model's files, else ``plms``.
            conventions: as in the class; None takes those in the model's files, else ``diffusers`` for that
                layout and ``original`` for the others.
            safety_checker: ``auto`` takes the one in the model's folder, None turns it off; or a folder, a
                Hub id, or the network.
            watermark: as in the class; None takes what the model's files say.
            revision: branch, tag or commit on the Hub; None means ``main``.
            cache_dir: where downloads go; None means huggingface_hub's cache.
            local_files_only: use only what is cached.
            token: for private repositories; None takes that of ``hf auth login``.
            raw_weights: take the plain weights of a training checkpoint, not the averaged ones.
            int8: keep the weights of UNet and exemplar encoder in 8 bits, half of bfloat16's memory.
            compile: compile the UNet, as :meth:`compile_unet` does.
            others: arguments of diffusers' pipelines: ``torch_dtype``, ``device_map`` (one device),
                ``variant``, ``use_safetensors``, ``force_download``, ``requires_safety_checker`` (False
                silences the note that there is none), and in place of the model's own ``unet``, ``vae``,
                ``image_encoder``, ``scheduler`` and ``feature_extractor``.
        """
        given = read_arguments(others, dtype, device, inspect.signature(cls.from_pretrained))
        hub = Hub(revision, cache_dir, local_files_only, token, given.files, given.force_download)
        path = pretrained_model_name_or_path
        parts = load_parts(
            path, config, solver, safety_checker, hub, given, raw_weights=raw_weights, int8=int8
        )
        pipe = cls(**parts, conventions=conventions, watermark=watermark)
        pipe._name_or_path = str(path)
        if compile:
            pipe.compile_unet()
        return pipe

    def save_pretrained(
        self,
        folder: str | Path,
        layout: str = "native",
        dtype: torch.dtype | None = None,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        push_to_hub: bool = False,
    ) -> None:
        """Write the model to a folder, adapters merged in, with its solver settings and safety checker.

        Args:
            folder: created if it does not exist.
            layout: ``native``, ``compvis`` (the original's) or ``diffusers``.
            dtype: type of the weights in the files; None keeps that in memory.
            safe_serialization: as in diffusers, but True only.
            variant: likewise, None only.
            push_to_hub: likewise, False only.
        """
        check_saving(layout, dtype, safe_serialization, variant, push_to_hub)
        folder, checker = expand_home(str(folder)), self.safety_checker
        if problem := checker_problem(Path(folder), checker):
            logger.warning(problem)

        def beside(staging: Path) -> None:
            if isinstance(checker, SafetyChecker):
                save_safety_checker(staging / CHECKER, checker)

        save_checkpoint(folder, self.model, layout, dtype, self.usage, beside)

    @property
    def usage(self) -> Usage:
        """Solver, conventions and watermark of calls that name none; saved with the model."""
        kept = self.noise_schedule.usage
        return replace(kept, solver=self._choice, conventions=self.conventions, watermark=self.watermark)

    @property
    def components(self) -> dict[str, Any]:
        """The parts; ``PaintByExample(**components)`` is another pipeline that shares these networks."""
        networks = {name: getattr(self.model, name) for name in NETWORKS}
        rest = {"safety_checker": self.safety_checker, "watermark": self.watermark}
        return networks | {"noise_schedule": replace(self.noise_schedule, usage=self.usage)} | rest

    @property
    def schedule(self) -> PipelineSchedule:
        """The noise schedule."""
        return self.noise_schedule

    @property
    def choice(self) -> SolverChoice:
        """The solver with its settings; :attr:`solver` is its name."""
        return self._choice

    @property
    def solver(self) -> str:
        """Name of the solver; assign another name, or a ``SolverChoice`` with spacing or Karras sigmas."""
        return self._choice.name

    @solver.setter
    def solver(self, solver: str | SolverChoice) -> None:
        """Take another solver for the calls that name none."""
        self._choice = choose_solver(solver)

    def solver_steps(
        self,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        solver: str | SolverChoice | None = None,
        conventions: str | None = None,
    ) -> int:
        """Return how many steps a call with these arguments makes, which may be more than asked for."""
        steps = self._few_steps or None if num_inference_steps is None else num_inference_steps
        settings = EditSettings(steps=steps, eta=eta).checked()
        choice = self._choice if solver is None else choose_solver(solver)
        return count_steps(self._engine(conventions).with_spacing(choice), settings, self.noise_schedule)

    @torch.no_grad()
    def encode_exemplar(self, images: Any, conventions: str | None = None) -> Tensor:
        """Return the condition of exemplars, ``(b, tokens, channels)``, for ``exemplar_embeds``."""
        return self._engine(conventions).encode(read_exemplars(images))

    def __call__(
        self,
        example_image: Any,
        image: Any,
        mask_image: Any,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        negative_prompt: object = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callback | None = None,
        callback_steps: int = 1,
        *,
        masked_image_latents: Tensor | None = None,
        exemplar_embeds: Tensor | None = None,
        preserve_background: bool = True,
        region: str = "full",
        conventions: str | None = None,
        solver: str | SolverChoice | None = None,
        margin: float = EditSettings.margin,
        feather: float | None = None,
        preset: str | None = None,
        guidance_interval: tuple[float, float] = EditSettings.guidance_interval,
        reuse_features: int = 1,
        **others: Any,
    ) -> EditOutput | tuple[Any, list[bool] | None]:
        """Paint the exemplar into the masked region; the class lists the arguments."""
        self._refuse_arguments(others)
        if not isinstance(negative_prompt, str | list | None) or negative_prompt:
            raise EditValueError("negative_prompt: there is no text here; leave it None")
        if preset is not None and solver is not None:
            raise EditValueError("preset and solver both name a solver; give one of them")
        own = self._few_steps or preset is not None  # which the call's default gives way to
        steps = None if own and num_inference_steps == DEFAULT_STEPS else num_inference_steps
        more: dict[str, Any] = {"region": region, "margin": margin, "feather": feather, "preset": preset}
        more |= {"height": height, "width": width, "preserve_background": preserve_background}
        more |= {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval, "eta": eta}
        more |= {"reuse_features": reuse_features, "conventions": conventions}
        settings = EditSettings(num_images=num_images_per_prompt, steps=steps, **more).checked()
        output = self.edit(
            example_image,
            image,
            mask_image,
            settings,
            choice=None if solver is None else choose_solver(solver),
            generator=generator,
            output_type=output_type,
            callback=callback,
            callback_steps=callback_steps,
            exemplar_embeds=exemplar_embeds,
            latents=latents,
            masked_image_latents=masked_image_latents,
        )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def edit(
        self,
        example_image: Any,
        image: Any,
        mask_image: Any,
        settings: EditSettings,
        *,
        choice: SolverChoice | None = None,
        output_type: str = "pil",
        callback: Callback | None = None,
        callback_steps: int = 1,
        generator: Generators = None,
        exemplar_embeds: Tensor | None = None,
        **given: Any,
    ) -> EditOutput:
        """Do what a call does, with settings that were checked; the other arguments are the call's.

        ``choice`` is the solver if the settings name none (None: the pipeline's own), and ``given`` takes
        ``latents`` and ``masked_image_latents``.
        """
        engine = self._engine(settings.conventions)
        settings = engine.complete(settings)
        choice = engine.with_spacing(merge_choice(choice or self._choice, settings))
        check_callback(callback)
        every = check_count("callback_steps", callback_steps, kind=EditValueError)
        if output_type not in OUTPUT_TYPES:
            raise EditValueError(f"no output_type '{output_type}'; there are: {', '.join(OUTPUT_TYPES)}")
        count_steps(choice, settings, self.noise_schedule)
        conditions = 0
        if exemplar_embeds is not None:
            conditions = len(check_embeds(exemplar_embeds, self.model.config.unet.context_dim))
        batch = match_inputs(
            example_image,
            image,
            mask_image,
            settings.num_images,
            conditions=conditions,
            half_is_masked=engine.conventions.half_is_masked,
        )
        check_generator(generator, len(batch))
        batch = replace(batch, generator=generator, exemplar_embeds=exemplar_embeds, **given)
        batch = resize_batch(batch, settings)
        view = choose_view(batch, settings, self.model.config.image_size, engine.conventions.largest_side)
        show = partial(progress_bar, bar=self._bar, callback=callback, every=every)
        sampled = engine.sample(batch, view, settings, choice, show)
        if output_type == "latent":
            return EditOutput(sampled, None, view.size)
        edits, flags = self._finish(engine.decode(sampled, batch, view), batch, view, settings)
        return EditOutput(as_output(edits, output_type, batch.carried), flags, view.size)

    def _engine(self, conventions: str | None) -> Engine:
        chosen = get_conventions(self.conventions if conventions is None else conventions)
        return Engine(self.model, self.noise_schedule, self._crop, chosen)

    def _finish(
        self, painted: Tensor, batch: Batch, view: View, settings: EditSettings
    ) -> tuple[list[np.ndarray], list[bool] | None]:
        """Put what was painted, ``(edits, 3, h, w)``, back into the images; blacken what is flagged."""
        flags = flags_of(self.safety_checker, to_images(painted))
        edits = []
        for index, each in enumerate(painted):
            edit = place_back(each, index // batch.copies, batch, view, settings)
            if flags is not None and flags[index]:
                edit = np.zeros_like(edit)
            edits.append(to_unit(add_watermark(to_bytes(edit))) if self.watermark else edit)
        return edits, flags
