"""The pipeline a person calls: an exemplar, a picture and a mask in, edited pictures out."""

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

from pbe.checkpoints.saving import save_checkpoint
from pbe.checkpoints.usage import Usage
from pbe.config import Config, ModelConfig
from pbe.diffusion.noise import Generators
from pbe.diffusion.schedule import NoiseSchedule
from pbe.diffusion.solvers import SolverChoice
from pbe.editing.batch.jobs import MARGIN
from pbe.editing.compatibility import DiffusersNames
from pbe.editing.components import NETWORKS, PipelineSchedule, assemble, own_names, schedule_of
from pbe.editing.compositing import to_bytes, to_unit
from pbe.editing.conventions import get_conventions
from pbe.editing.engine import Engine, Given
from pbe.editing.exemplars import check_embeds, crop_settings
from pbe.editing.hub import Hub
from pbe.editing.inputs import Batch, check_generator, matched, read_exemplars
from pbe.editing.memory import MemorySettings
from pbe.editing.offload import Offload
from pbe.editing.output import OUTPUT_TYPES, EditOutput, as_output, to_pictures
from pbe.editing.placement import Placement, View, put_back
from pbe.editing.preprocess import check_count
from pbe.editing.pretrained import check_saving, load_parts, preprocessor_of, read_theirs
from pbe.editing.problems import EditValueError
from pbe.editing.safety import SafetyChecker, checker_problem, flags_of, save_checker_in
from pbe.editing.sampling import Callback, Progress, Sampling, choose_solver, with_spacing
from pbe.editing.watermark import add_watermark
from pbe.files import expand_home
from pbe.models import LatentDiffusion

logger = logging.getLogger(__name__)


class PaintByExample(MemorySettings, DiffusersNames):
    """Paints an exemplar into the hole of a picture (Yang et al., CVPR 2023).

    Made by :meth:`from_pretrained`, of a whole model, or of the :attr:`components` of another pipeline, whose
    networks it then shares.

    Args:
        model: the networks, in evaluation mode, on the device and in the type they are to run in.
        unet: a network in place of the model's; all four parts or a model.
        autoencoder: likewise.
        exemplar_encoder: likewise.
        noise_schedule: likewise; that of another pipeline brings its settings along.
        safety_checker: looks at what was painted, or None.
        solver: name of the solver of calls that name none, or how it is to run; None is the schedule's.
        conventions: ``original`` or ``diffusers``; None is the schedule's.
        watermark: put the original's invisible watermark into every image; None is the schedule's.
        theirs: parts by diffusers' names: ``vae``, ``image_encoder``, ``scheduler``, ``feature_extractor``.

    Attributes:
        model: the networks.
        noise_schedule: the model's noise schedule.
        safety_checker: or None.
        conventions: name of the conventions of calls that name none.
        watermark: whether pictures get the watermark.
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
            self.model, schedule = model, schedule_of(model)
        if theirs.get("feature_extractor") is not None:
            schedule = replace(schedule, preprocessor=preprocessor_of(theirs["feature_extractor"]))
        self.noise_schedule = schedule
        self.safety_checker = safety_checker
        self.watermark = schedule.watermark if watermark is None else watermark
        self.conventions = schedule.conventions if conventions is None else conventions
        self._choice = schedule.solver if solver is None else choose_solver(solver)
        self._crop = crop_settings(self.model.config.exemplar_encoder, schedule.preprocessor)
        self._progress = Progress()
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
        **others: Any,
    ) -> PaintByExample:
        """Load a model: a folder in any layout or of a run, a checkpoint, or a repository of the Hub.

        Args:
            pretrained_model_name_or_path: folder, file, or ``owner/name`` on the Hub.
            config: the model's sizes, where the files do not say: a YAML file or a typed configuration. A
                bare checkpoint without it is taken for the official sizes.
            dtype: type of the weights in memory; None means float32.
            device: where the model runs; None means the CPU.
            solver: as in the class; None is what the model's files say, else ``plms``.
            conventions: as in the class; None is what the model's files say, else ``diffusers`` for that
                layout and ``original`` for the others.
            safety_checker: ``auto`` takes the model folder's own; None turns it off; otherwise a folder or a
                Hub id of one, or the network.
            watermark: as in the class; None is what the model's files say.
            revision: branch, tag or commit on the Hub; None is ``main``.
            cache_dir: where downloads go; None is huggingface_hub's cache.
            local_files_only: use what is cached and stay offline.
            token: for private repositories; None is the one of ``hf auth login``.
            raw_weights: take the plain weights of a training checkpoint instead of the averaged ones.
            others: arguments of diffusers' pipelines: ``torch_dtype``, ``device_map`` (one device),
                ``variant``, ``use_safetensors``, ``force_download``, ``requires_safety_checker`` (False
                silences the note that there is none), and in place of the model's own ``unet``, ``vae``,
                ``image_encoder``, ``scheduler`` and ``feature_extractor``.

        Raises:
            UserError: nothing usable is there, in one line that says what is wrong.
        """
        theirs = read_theirs(others, dtype, device, inspect.signature(cls.from_pretrained))
        hub = Hub(revision, cache_dir, local_files_only, token, theirs.files, theirs.force_download)
        path = pretrained_model_name_or_path
        parts = load_parts(path, config, solver, safety_checker, hub, theirs, raw_weights=raw_weights)
        pipe = cls(**parts, conventions=conventions, watermark=watermark)
        pipe._name_or_path = str(path)
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
        """Write the model to a folder, with how it is run and its safety checker.

        Args:
            folder: made when missing.
            layout: ``native``, ``compvis`` (the original's) or ``diffusers``.
            dtype: type of the weights in the files; None keeps that in memory.
            safe_serialization: as in diffusers, but True only.
            variant: likewise, None only.
            push_to_hub: likewise, False only.

        Raises:
            EditValueError: an argument of diffusers that cannot be followed.
            UserError: an unknown layout, a model that it cannot hold, or a folder that cannot be written.
        """
        check_saving(layout, dtype, safe_serialization, variant, push_to_hub)
        folder, checker = expand_home(str(folder)), self.safety_checker
        beside = partial(save_checker_in, checker) if isinstance(checker, SafetyChecker) else None
        if problem := checker_problem(Path(folder), checker):
            logger.warning(problem)
        save_checkpoint(folder, self.model, layout, dtype, self.usage, beside)

    @property
    def usage(self) -> Usage:
        """How the model is run by calls that do not say: what saving keeps."""
        schedule = self.noise_schedule
        return Usage(
            self._choice, self.conventions, self.watermark, schedule.preprocessor, schedule.scheduler
        )

    @property
    def components(self) -> dict[str, Any]:
        """What ``PaintByExample(**components)`` makes a pipeline of that shares these very networks."""
        schedule = replace(self.noise_schedule, conventions=self.conventions, solver=self._choice)
        networks = {name: getattr(self.model, name) for name in NETWORKS}
        rest = {"safety_checker": self.safety_checker, "watermark": self.watermark}
        return networks | {"noise_schedule": schedule} | rest

    @property
    def unet(self) -> nn.Module:
        """The noise predictor."""
        return self.model.unet

    @property
    def autoencoder(self) -> nn.Module:
        """Pictures to latents and back."""
        return self.model.autoencoder

    @property
    def exemplar_encoder(self) -> nn.Module:
        """Exemplars to conditions."""
        return self.model.exemplar_encoder

    @property
    def schedule(self) -> PipelineSchedule:
        """The noise schedule."""
        return self.noise_schedule

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights; latents are kept in float32 whatever it is."""
        return self.model.dtype

    @property
    def choice(self) -> SolverChoice:
        """The solver with how it is run; :attr:`solver` is its name."""
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
        num_inference_steps: int = 50,
        eta: float = 0.0,
        solver: str | SolverChoice | None = None,
        conventions: str | None = None,
    ) -> int:
        """Return how many steps such a call makes: a few solvers and spacings make more than are asked for.

        Raises:
            EditTypeError, EditValueError: an argument that cannot be used.
        """
        choice = self._chosen(solver, conventions)
        return Sampling(choice, num_inference_steps, 1.0, eta, None, 1).check(self.noise_schedule)

    def _chosen(self, solver: str | SolverChoice | None, conventions: str | None) -> SolverChoice:
        choice = self._choice if solver is None else choose_solver(solver)
        return with_spacing(choice, self._engine(conventions).conventions)

    @torch.no_grad()
    def encode_exemplar(self, images: Any, conventions: str | None = None) -> Tensor:
        """Return the condition of exemplars, ``(b, tokens, channels)``, for ``exemplar_embeds``.

        Args:
            images: exemplars as in a call.
            conventions: likewise.

        Raises:
            EditTypeError, EditValueError: no exemplars.
        """
        return self._engine(conventions).encode(read_exemplars(images))

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
        margin: float = MARGIN,
        feather: float | None = None,
        **others: Any,
    ) -> EditOutput | tuple[Any, list[bool] | None]:
        """Paint the exemplar into the masked part of the picture; docs/pipeline.md explains every argument.

        Returns:
            The edits, picture by picture; without ``return_dict`` the tuple (images, nsfw_content_detected).

        Raises:
            EditTypeError, EditValueError: an argument that cannot be used, in one clear line.
        """
        self._refuse_arguments(others)
        if not isinstance(negative_prompt, str | list | None) or negative_prompt:
            raise EditValueError("negative_prompt: there is no text here; leave it None")
        engine = self._engine(conventions)
        choice = self._chosen(solver, conventions)
        sampling = Sampling(choice, num_inference_steps, guidance_scale, eta, callback, callback_steps)
        placement = Placement(region, height, width, margin, feather, preserve_background)
        given = Given(generator, latents, masked_image_latents, exemplar_embeds)
        num_images_per_prompt = check_count("num_images_per_prompt", num_images_per_prompt)
        if output_type not in OUTPUT_TYPES:
            raise EditValueError(f"no output_type '{output_type}'; there are: {', '.join(OUTPUT_TYPES)}")
        sampling.check(self.noise_schedule)
        placement.check()
        batch = self._batch(engine, given, num_images_per_prompt, example_image, image, mask_image)
        batch = placement.resized(batch)
        view = placement.view(batch, self.model.config.image_size, engine.conventions.largest_side)
        sampled = engine.sample(batch, view, sampling, given, self._progress)
        if output_type == "latent":
            output = EditOutput(sampled, None, view.size)
        else:
            edits, flags = self._finish(engine.decode(sampled, batch, view), batch, view, placement)
            output = EditOutput(as_output(edits, output_type, batch.carried), flags, view.size)
        return output if return_dict else output.to_tuple()

    def _engine(self, conventions: str | None) -> Engine:
        manner = get_conventions(self.conventions if conventions is None else conventions)
        return Engine(self.model, self.noise_schedule, self._crop, manner)

    def _batch(self, engine: Engine, given: Given, copies: int, *inputs: Any) -> Batch:
        example_image, image, mask_image = inputs
        embeds = given.exemplar_embeds
        conditions = 0
        if embeds is not None:
            conditions = len(check_embeds(embeds, self.model.config.unet.context_dim))
        half_is_hole = engine.conventions.half_is_hole
        batch = matched(
            example_image, image, mask_image, copies, conditions=conditions, half_is_hole=half_is_hole
        )
        check_generator(given.generator, len(batch))
        return batch

    def _finish(
        self, painted: Tensor, batch: Batch, view: View, placement: Placement
    ) -> tuple[list[np.ndarray], list[bool] | None]:
        """Put what was painted, ``(edits, 3, h, w)``, back into the pictures; blacken what is flagged."""
        flags = flags_of(self.safety_checker, to_pictures(painted))
        edits = []
        for index, each in enumerate(painted):
            edit = put_back(each, index // batch.copies, batch, view, placement)
            if flags is not None and flags[index]:
                edit = np.zeros_like(edit)
            edits.append(to_unit(add_watermark(to_bytes(edit))) if self.watermark else edit)
        return edits, flags
