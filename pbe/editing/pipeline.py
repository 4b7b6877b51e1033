"""The pipeline a person calls: an exemplar, a picture and a mask in, edited pictures out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pbe.checkpoints.saving import save_checkpoint
from pbe.config import Config, ModelConfig
from pbe.diffusion.noise import Generators
from pbe.diffusion.schedule import NoiseSchedule
from pbe.diffusion.solvers.scheduler_config import SolverChoice
from pbe.editing.components import NETWORKS, PipelineSchedule, assemble, schedule_of
from pbe.editing.compositing import to_bytes, to_unit
from pbe.editing.conventions import get_conventions
from pbe.editing.engine import Engine, Given
from pbe.editing.exemplars import check_embeds, crop_settings
from pbe.editing.hub import CHECKER, Hub
from pbe.editing.inputs import Batch, check_generator, matched, read_exemplars
from pbe.editing.jobs import MARGIN
from pbe.editing.offload import Offload, offload_idle_parts
from pbe.editing.output import OUTPUT_TYPES, EditOutput, as_output, to_pictures
from pbe.editing.placement import Placement, View, put_back
from pbe.editing.preprocess import check_count
from pbe.editing.pretrained import load_parts
from pbe.editing.problems import EditValueError
from pbe.editing.safety import SafetyChecker, save_safety_checker
from pbe.editing.sampling import Callback, Progress, Sampling, choose_solver, with_spacing
from pbe.editing.watermark import add_watermark
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.attention import set_attention_slicing


class PaintByExample:
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
        watermark: put the original's invisible watermark into every picture.

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
        watermark: bool = False,
    ) -> None:
        parts = {"unet": unet, "autoencoder": autoencoder, "exemplar_encoder": exemplar_encoder}
        if model is None:
            self.model, schedule = assemble(parts | {"noise_schedule": noise_schedule})
        else:
            self.model, schedule = model, schedule_of(model)
        self.noise_schedule = schedule
        self.safety_checker = safety_checker
        self.watermark = watermark
        self.conventions = get_conventions(conventions or schedule.conventions).name
        self._choice = schedule.solver if solver is None else choose_solver(solver)
        self._crop = crop_settings(self.model.config.exemplar_encoder, schedule.preprocessor)
        self._progress = Progress()
        self._offload: Offload | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        config: str | Path | ModelConfig | Config | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        solver: str | SolverChoice | None = None,
        *,
        conventions: str | None = None,
        safety_checker: str | Path | nn.Module | None = "auto",
        watermark: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        raw_weights: bool = False,
    ) -> PaintByExample:
        """Load a model: a folder in any layout or of a run, a checkpoint, or a repository of the Hub.

        Args:
            path_or_hub_id: folder, file, or ``owner/name`` on the Hub.
            config: the model's sizes, where the files do not say: a YAML file or a typed configuration. A
                bare checkpoint without it is taken for the official sizes.
            dtype: type of the weights in memory; None means float32.
            device: where the model runs; None means the CPU.
            solver: as in the class; None is what the model's scheduler configuration says, else ``plms``.
            conventions: as in the class; None is ``diffusers`` for that layout, ``original`` for the others.
            safety_checker: ``auto`` takes the model folder's own; None turns it off; otherwise a folder or a
                Hub id of one, or the network.
            watermark: as in the class.
            revision: branch, tag or commit on the Hub; None is ``main``.
            cache_dir: where downloads go; None is huggingface_hub's cache.
            local_files_only: use what is cached and stay offline.
            token: for private repositories; None is the one of ``hf auth login``.
            raw_weights: take the plain weights of a training checkpoint instead of the averaged ones.

        Raises:
            UserError: nothing usable is there, in one line that says what is wrong.
        """
        hub = Hub(revision, cache_dir, local_files_only, token)
        model, schedule, checker = load_parts(
            path_or_hub_id, config, dtype, device, solver, safety_checker, hub, raw_weights=raw_weights
        )
        networks = {name: getattr(model, name) for name in NETWORKS}
        return cls(
            **networks,
            noise_schedule=schedule,
            safety_checker=checker,
            conventions=conventions,
            watermark=watermark,
        )

    def save_pretrained(
        self, folder: str | Path, layout: str = "native", dtype: torch.dtype | None = None
    ) -> None:
        """Write the model to a folder.

        Args:
            folder: made when missing.
            layout: ``native``, ``compvis`` (the original's) or ``diffusers``.
            dtype: type of the weights in the files; None keeps that in memory.

        Raises:
            UserError: an unknown layout, a model that it cannot hold, or a folder that cannot be written.
        """
        save_checkpoint(folder, self.model, layout, dtype, self.noise_schedule.scheduler)
        if isinstance(self.safety_checker, SafetyChecker):
            save_safety_checker(Path(folder) / CHECKER, self.safety_checker)

    @property
    def components(self) -> dict[str, Any]:
        """What ``PaintByExample(**components)`` makes a pipeline of that shares these very networks."""
        schedule = dataclasses.replace(self.noise_schedule, conventions=self.conventions, solver=self._choice)
        networks = {name: getattr(self.model, name) for name in NETWORKS}
        return networks | {"noise_schedule": schedule, "safety_checker": self.safety_checker}

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

    def to(self, *args: Any, **kwargs: Any) -> PaintByExample:
        """Move the networks in place, as ``torch.nn.Module.to`` does; return the pipeline.

        Raises:
            UserError: there is no such device, or idle parts are being offloaded.
        """
        if self._offload is not None:
            raise UserError(
                "idle parts are being offloaded; call disable_cpu_offload() before moving the pipeline"
            )
        networks = (
            [self.model, self.safety_checker] if isinstance(self.safety_checker, nn.Module) else [self.model]
        )
        try:
            for network in networks:
                network.to(*args, **kwargs)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"the pipeline cannot be moved: {str(error).splitlines()[0]}") from error
        return self

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Set tqdm's arguments for the progress bar: ``disable=True`` turns it off."""
        self._progress.settings.update(settings)

    def enable_attention_slicing(self, queries: int = 1024) -> None:
        """Run attention on so many queries at a time: less memory, the same numbers up to rounding."""
        check_count("queries", queries)
        set_attention_slicing(self.model, queries)

    def disable_attention_slicing(self) -> None:
        """Run attention on all queries at once again."""
        set_attention_slicing(self.model, None)

    def enable_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Keep parts on the CPU while they are idle, and run each on ``device``."""
        self.disable_cpu_offload()
        self._offload = offload_idle_parts(self.model, device)

    def disable_cpu_offload(self) -> None:
        """Undo :meth:`enable_cpu_offload`: all parts go to the device that they ran on."""
        if self._offload is not None:
            self._offload.remove()
            self._offload = None

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
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        masked_image_latents: Tensor | None = None,
        exemplar_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callback | None = None,
        callback_steps: int = 1,
        preserve_background: bool = True,
        region: str = "full",
        conventions: str | None = None,
        solver: str | SolverChoice | None = None,
        *,
        margin: float = MARGIN,
        feather: float | None = None,
    ) -> EditOutput | tuple[Any, list[bool] | None]:
        """Paint the exemplar into the masked part of the picture; docs/pipeline.md explains every argument.

        Returns:
            The edits, picture by picture; without ``return_dict`` the tuple (images, nsfw_content_detected).

        Raises:
            EditTypeError, EditValueError: an argument that cannot be used, in one clear line.
        """
        engine = self._engine(conventions)
        choice = self._chosen(solver, conventions)
        sampling = Sampling(choice, num_inference_steps, guidance_scale, eta, callback, callback_steps)
        placement = Placement(region, height, width, margin, feather, preserve_background)
        given = Given(generator, latents, masked_image_latents, exemplar_embeds)
        check_count("num_images_per_prompt", num_images_per_prompt)
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
            output = EditOutput(as_output(edits, output_type), flags, view.size)
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
        flags = None if self.safety_checker is None else self.safety_checker(to_pictures(painted))
        edits = []
        for index, each in enumerate(painted):
            edit = put_back(each, index // batch.copies, batch, view, placement)
            if flags is not None and flags[index]:
                edit = np.zeros_like(edit)
            edits.append(to_unit(add_watermark(to_bytes(edit))) if self.watermark else edit)
        return edits, flags
