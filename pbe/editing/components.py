"""The parts of a pipeline, and a pipeline's model made of parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pbe.checkpoints.usage import DEFAULT_SOLVER
from pbe.config import ModelConfig, ScheduleConfig
from pbe.diffusion.schedule import NoiseSchedule, make_schedule
from pbe.diffusion.solvers import SolverChoice
from pbe.editing.conventions import ORIGINAL
from pbe.editing.problems import EditTypeError, EditValueError
from pbe.models import AutoencoderKL, ExemplarEncoder, LatentDiffusion, UNet

OURS = {"vae": "autoencoder", "image_encoder": "exemplar_encoder"}  # diffusers' names
NETWORKS = ("unet", "autoencoder", "exemplar_encoder")
PARTS = (*NETWORKS, "noise_schedule")


@dataclass(frozen=True)
class PipelineSchedule(NoiseSchedule):
    """A pipeline's noise schedule, with what else its weights were made for and how it samples them.

    Attributes:
        config: of the schedule.
        prediction: what the network predicts, ``eps`` or ``v``.
        image_size: training resolution in pixels.
        conventions: name of the pipeline's conventions.
        solver: the pipeline's solver.
        watermark: whether its edits get the watermark.
        preprocessor: the ``preprocessor_config.json`` that came with the model, or None.
        scheduler: its ``scheduler_config.json``, or None.
    """

    config: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction: str = "eps"
    image_size: int = 512
    conventions: str = ORIGINAL.name
    solver: SolverChoice = field(default_factory=lambda: SolverChoice(DEFAULT_SOLVER))
    watermark: bool = False
    preprocessor: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None


def schedule_of(model: LatentDiffusion, **settings: Any) -> PipelineSchedule:
    """Return the schedule of a whole model, with these settings of :class:`PipelineSchedule`."""
    config, plain = model.config, make_schedule(model.config.schedule)
    return PipelineSchedule(
        plain.betas,
        plain.alphas_cumprod,
        config=config.schedule,
        prediction=config.prediction,
        image_size=config.image_size,
        **settings,
    )


def full_schedule(schedule: NoiseSchedule) -> PipelineSchedule:
    """Return a schedule with settings; a bare one is taken for that of a model of the official size."""
    if isinstance(schedule, PipelineSchedule):
        return schedule
    betas = schedule.betas
    config = ScheduleConfig(schedule.timesteps, float(betas[0]), float(betas[-1]))
    return PipelineSchedule(betas, schedule.alphas_cumprod, config=config)


def own_names(parts: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return parts by their names here, where some have the names that diffusers gives them.

    Args:
        parts: ``unet``, ``autoencoder``, ``exemplar_encoder`` and ``noise_schedule``, or None.
        theirs: ``vae``, ``image_encoder`` and what makes no network.

    Raises:
        EditTypeError: a name that is neither's, or two names for one part.
    """
    found = dict(parts)
    for name, part in theirs.items():
        ours = OURS.get(name)
        if ours is not None and found[ours] is None:
            found[ours] = part
        elif ours is not None or name not in ("scheduler", "feature_extractor", "requires_safety_checker"):
            raise EditTypeError(f"a pipeline takes no '{name}'{f' beside its {ours}' if ours else ''}")
    return found


def assemble(parts: dict[str, Any]) -> tuple[LatentDiffusion, PipelineSchedule]:
    """Return a model around parts, none of which is copied, and its schedule.

    Args:
        parts: ``unet``, ``autoencoder``, ``exemplar_encoder`` and ``noise_schedule``.

    Raises:
        EditTypeError: a part is missing or no part.
        EditValueError: the parts do not fit together.
    """
    missing = [name for name in PARTS if parts[name] is None]
    if missing:
        raise EditTypeError(
            f"a pipeline needs a model or all of {', '.join(PARTS)}; missing: {', '.join(missing)}"
        )
    networks = {name: parts[name] for name in NETWORKS}
    for (name, part), kind in zip(networks.items(), (UNet, AutoencoderKL, ExemplarEncoder), strict=True):
        if not isinstance(part, kind):
            raise EditTypeError(f"{name}: {type(part).__name__}; it must be a network of this project")
    _check_fit(**networks)
    given = parts["noise_schedule"]
    if not isinstance(given, NoiseSchedule):
        raise EditTypeError(f"noise_schedule: {type(given).__name__}; it must be a NoiseSchedule")
    schedule = full_schedule(given)
    config = ModelConfig(
        image_size=schedule.image_size,
        prediction=schedule.prediction,
        schedule=dataclasses.replace(schedule.config),
        **{name: part.config for name, part in networks.items()},
    )
    return LatentDiffusion(config, **networks), schedule


def _check_fit(unet: UNet, autoencoder: AutoencoderKL, exemplar_encoder: ExemplarEncoder) -> None:
    condition = exemplar_encoder.null_condition.shape[-1]
    if unet.config.context_dim != condition:
        raise EditValueError(
            f"the unet takes conditions of {unet.config.context_dim} numbers, and the exemplar encoder gives "
            f"{condition}; take both from models of one kind"
        )
    channels = autoencoder.config.latent_channels
    if unet.conv_in.in_channels != 2 * channels + 1:
        raise EditValueError(
            f"the unet takes {unet.conv_in.in_channels} channels, and latents of {channels} channels make "
            f"{2 * channels + 1}; take unet and autoencoder from models of one kind"
        )
    parts = {"unet": unet, "autoencoder": autoencoder, "exemplar encoder": exemplar_encoder}
    weights = {name: next(part.parameters()) for name, part in parts.items()}
    if len({(weight.dtype, weight.device) for weight in weights.values()}) > 1:
        told = ", ".join(f"the {name} is {each.dtype} on {each.device}" for name, each in weights.items())
        raise EditValueError(f"{told}; bring them to one type and device with to()")
