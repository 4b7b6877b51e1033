"""Distillation: a student that edits in a few steps of one call each learns from a teacher of many steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pbe.config import Config
from pbe.diffusion.distillation import (
    TEACHER,
    grids,
    pseudo_huber,
    step,
    velocity_of,
    velocity_to,
)
from pbe.diffusion.guidance import PredictNoise
from pbe.diffusion.solvers import get_solver
from pbe.editing.engine import Conditioning, noise_predictor, prepared_predictor
from pbe.models import LatentDiffusion
from pbe.models.adapters import adapters_off
from pbe.models.layers import compile_network
from pbe.training.optimization.sharding import regather
from pbe.training.tasks.diffusion import DiffusionTask
from pbe.training.tasks.encoding import Draws, EncodedBatch
from pbe.training.tasks.finetuning import fingerprint_of_frozen


class DistillationTask(DiffusionTask):
    """Trains a UNet, or adapters for it, to do in few calls what the model it starts from does in many.

    Both methods follow the teacher's guided flow and compare velocities. Autoencoder and exemplar encoder
    stay the teacher's. A sample's guidance scale is drawn uniformly from the range.

    - ``trajectory`` (after Zhou et al. 2024, simple and fast distillation): teacher and student start from
      the same noise; after each step of the student, its target is where the teacher is.
    - ``consistency`` (Luo et al. 2023, latent consistency models, in the form of Heek et al. 2024 for several
      steps): from a noised image the teacher makes one short step, and the student's moving average goes on
      to the end of the student's step, which is the student's target in a single step. With one step this is
      a consistency model (Song et al. 2023). A step of length zero is the identity, so the boundary condition
      holds by construction.
    """

    entry = "distances"

    def __init__(self, config: Config, model: LatentDiffusion) -> None:
        options, sizes = config.distillation, model.config
        # adapters share the teacher's weights; otherwise the teacher is a copy, not part of checkpoints
        unet = model.unet if config.lora.rank else copy.deepcopy(model.unet)
        others = model.autoencoder, model.exemplar_encoder
        teacher = LatentDiffusion(sizes, unet=unet, autoencoder=others[0], exemplar_encoder=others[1])
        model.unet.take_guidance(options.guidance, options.steps)
        model.config = replace(sizes, unet=model.unet.config)
        super().__init__(replace(config, model=model.config), model)
        if not self.adapted:
            unet.requires_grad_(False).eval()
            if config.trainer.precision.startswith("bf16"):
                unet.to(torch.bfloat16)
            if config.trainer.compile:
                compile_network(unet, "trainer.compile")
        self.calls = options.steps if self._walks else 1
        self._beside = (teacher,)  # in a tuple, so that Lightning does not register it as a submodule
        self.grid, self.teacher_grid = grids(self.schedule, options.steps, options.teacher_steps)

    @property
    def teacher(self) -> LatentDiffusion:
        """The model that the student starts from; not part of checkpoints."""
        return self._beside[0]

    def choose_trained(self) -> None:
        """Train the UNet, or its adapters; the exemplar encoder stays the teacher's."""
        super().choose_trained()
        if not self.adapted:
            self.model.exemplar_encoder.requires_grad_(False)

    def base_fingerprint(self) -> str:
        """Return the fingerprint of the teacher, which a resumed run must have."""
        return super().base_fingerprint() or fingerprint_of_frozen(self.teacher.unet)

    def batch_loss(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch."""
        encoded = self.encode(batch)
        distances = self.distances(encoded, self._draws(encoded, "train"))
        if self._walks:
            for index, values in enumerate(distances):
                self.sums.add(f"train/loss_step{index + 1}", values)
        loss = distances.mean()
        self.sums.add("train/loss", distances.mean(dim=0))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the distance between averaged student and teacher at each step, from fixed noise.

        It is the same for both methods: the loss of ``trajectory``.
        """
        encoded = self.encode(batch)
        counted = self.validated(batch_idx, len(encoded.keep_mask))
        with self.averaged_weights():
            distances = self.distances(encoded, self._draws(encoded, "validation"), walks=True)
        self.validation_sums.add("val/loss", distances.mean(dim=0), counted)
        for index, values in enumerate(distances):
            self.validation_sums.add(f"val/loss_step{index + 1}", values, counted)

    @property
    def _walks(self) -> bool:
        return self.config.distillation.method == "trajectory"

    def distances(self, batch: EncodedBatch, draws: Draws, walks: bool | None = None) -> Tensor:
        """Return each sample's distances to the teacher's targets, ``(steps or 1, b)``.

        ``walks`` is whether they are those of ``trajectory``; None: of the method.
        """
        if self._walks if walks is None else walks:
            return self._along_trajectory(batch, draws)
        return self._to_consistency(batch, draws)

    def _conditioning(self, batch: EncodedBatch, draws: Draws) -> Conditioning:
        device, dtype = batch.keep_mask.device, self.model.dtype
        scale = self.config.model.autoencoder.scale_factor
        masked = batch.masked.sample(draws.masked_noise.to(device)) * scale
        with torch.no_grad():
            condition = self.model.exemplar_encoder.condition(batch.features.to(dtype))
        return Conditioning(condition, masked.to(dtype), batch.keep_mask.to(dtype))

    def _guidance(self, draws: Draws, device: torch.device) -> Tensor:
        """Return the guidance scales ``(b,)``, from the draw that otherwise drops conditions."""
        low, high = self.config.distillation.guidance
        return (low + (high - low) * draws.drop).float().to(device)

    def _velocity(self, x: Tensor, timesteps: Tensor, given: Conditioning, scales: Tensor) -> Tensor:
        """Return the student's velocity, float32, at timesteps ``(b,)``."""
        inputs = (x.to(self.model.dtype), timesteps.to(x.device), given.condition)
        output = self.model.predict(*inputs, given.masked_latents, given.keep_mask, scales).float()
        alphas = self.schedule.alphas_cumprod[timesteps]
        return velocity_of(output, x, alphas, self.config.model.prediction)

    @contextmanager
    def _teaching(self, given: Conditioning) -> Iterator[Conditioning]:
        """Prepare the teacher, and yield the conditioning in the type of its weights."""
        if not self.adapted:
            self.teacher.unet.to(given.condition.device)
        dtype = self.teacher.dtype
        parts = (given.condition, given.masked_latents, given.keep_mask)
        with torch.no_grad(), adapters_off(self.model) if self.adapted else nullcontext():
            yield Conditioning(*(each.to(dtype) for each in parts))

    @contextmanager
    def _average_inside(self) -> Iterator[None]:
        """Use the averaged weights in the middle of a step, where those of no block are gathered already."""
        with nullcontext() if self.ema is None else self.ema.applied():
            regather(self)
            yield
        regather(self)

    def _teacher_states(self, noise: Tensor, given: Conditioning, scales: Tensor) -> list[Tensor]:
        """Return where the teacher, starting from ``noise``, is at the end of each of the student's steps."""
        options, states = self.config.distillation, list[Tensor]()
        every = options.teacher_steps // options.steps

        def note(index: int, timestep: float, x: Tensor) -> None:
            if (index + 1) % every == 0:
                states.append(x)

        timesteps = torch.tensor(self.teacher_grid.timesteps)
        with self._teaching(given) as known:
            predict: PredictNoise = prepared_predictor(
                self.teacher, self.schedule, known, scales.view(-1, 1, 1, 1), timesteps
            )
            solve = get_solver(TEACHER.name)
            solve(predict, noise, self.schedule, options.teacher_steps, callback=note, settings=TEACHER)
        return states

    def _along_trajectory(self, batch: EncodedBatch, draws: Draws) -> Tensor:
        """Sample from noise as an edit does, and compare the end of each step with where the teacher is."""
        given, x = self._conditioning(batch, draws), draws.noise.to(batch.keep_mask.device)
        scales = self._guidance(draws, x.device)
        states, found = self._teacher_states(x, given, scales), []
        for index, end in enumerate(states):
            timesteps = torch.full((len(x),), int(self.grid.timesteps[index]))
            ends = (self.grid.alphas[index], self.grid.alphas_next[index])
            levels = torch.tensor(ends, dtype=torch.float64)
            velocity = self._velocity(x, timesteps, given, scales)
            error = velocity - velocity_to(x, end, *levels)
            found.append(pseudo_huber(error, self.config.distillation.huber, batch.valid))
            x = step(x, velocity.detach(), *levels)
        return torch.stack(found)

    def _to_consistency(self, batch: EncodedBatch, draws: Draws) -> Tensor:
        """Step from noised images to the end of the student's step, directly and by way of the teacher."""
        options, device = self.config.distillation, batch.keep_mask.device
        given, scales = self._conditioning(batch, draws), self._guidance(draws, device)
        every = options.teacher_steps // options.steps
        place = draws.timesteps * options.teacher_steps // self.schedule.timesteps  # 0 is pure noise
        timesteps = torch.tensor(self.teacher_grid.timesteps)
        # the appended timestep stands for the clean end, from which no sample goes on
        now, after = timesteps[place], torch.cat([timesteps, timesteps[-1:]])[place + 1]
        alphas = torch.tensor(self.teacher_grid.alphas_next, dtype=torch.float64)[place]
        ends = torch.tensor(self.grid.alphas_next, dtype=torch.float64)[place // every]
        latents = (
            batch.image.sample(draws.image_noise.to(device)) * self.config.model.autoencoder.scale_factor
        )
        x = self.schedule.add_noise(latents, draws.noise.to(device), now)
        start = self.schedule.alphas_cumprod[now]
        with self._teaching(given) as known:
            predict = noise_predictor(self.teacher, self.schedule, known, scales.view(-1, 1, 1, 1))
            velocity = velocity_of(predict(x, now.to(device)), x, start, "eps")
        closer = step(x, velocity, start, alphas)
        with torch.no_grad(), self._average_inside():
            going_on = step(closer, self._velocity(closer, after, given, scales), alphas, ends)
        end = torch.where((alphas == ends).view(-1, 1, 1, 1).to(device), closer, going_on)
        error = self._velocity(x, now, given, scales) - velocity_to(x, end, start, ends)
        return pseudo_huber(error, options.huber, batch.valid)[None]
