"""What a pipeline is made of: model, sampling settings and safety checker, loaded or given as parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pbe.checkpoints.folders import ANY
from pbe.checkpoints.loading import Loaded, load_checkpoint
from pbe.checkpoints.settings import DEFAULT_SOLVER, Usage
from pbe.config import Config, ModelConfig, ScheduleConfig
from pbe.diffusion.schedule import NoiseSchedule, make_schedule
from pbe.diffusion.solvers import SolverChoice
from pbe.editing.diffusers_inputs import OURS, LoadingArguments, check_dtype, solver_of
from pbe.editing.engine import choose_solver
from pbe.editing.hub import Hub
from pbe.editing.safety import load_safety_checker
from pbe.editing.settings import ORIGINAL
from pbe.errors import EditTypeError, EditValueError, UserError, warn_once
from pbe.files import expand_home
from pbe.models import AutoencoderKL, ExemplarEncoder, LatentDiffusion, UNet

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


def full_schedule(schedule: object) -> PipelineSchedule:
    """Return a schedule with settings; a bare one is taken for that of a model of the official size."""
    if not isinstance(schedule, NoiseSchedule):
        raise EditTypeError(f"noise_schedule: {type(schedule).__name__}; it must be a NoiseSchedule")
    if isinstance(schedule, PipelineSchedule):
        return schedule
    betas = schedule.betas
    config = ScheduleConfig(schedule.timesteps, float(betas[0]), float(betas[-1]))
    return PipelineSchedule(betas, schedule.alphas_cumprod, config=config)


def own_names(parts: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return parts by their names here, where some have the names that diffusers gives them."""
    found = dict(parts)
    for name, part in theirs.items():
        ours = OURS.get(name)
        if ours is not None and found[ours] is None:
            found[ours] = part
        elif ours is not None or name not in ("scheduler", "feature_extractor", "requires_safety_checker"):
            raise EditTypeError(f"a pipeline takes no '{name}'{f' beside its {ours}' if ours else ''}")
    return found


def assemble(parts: dict[str, Any]) -> tuple[LatentDiffusion, PipelineSchedule]:
    """Return a model around three networks, none of which is copied, and its ``noise_schedule``."""
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
    schedule = full_schedule(parts["noise_schedule"])
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


AUTO = "auto"
Configuration = str | Path | ModelConfig | Config | None
Checker = str | Path | nn.Module | None


def load_parts(
    path_or_hub_id: str | Path,
    config: Configuration,
    solver: str | SolverChoice | None,
    safety_checker: Checker,
    hub: Hub,
    given: LoadingArguments,
    *,
    raw_weights: bool = False,
) -> dict[str, Any]:
    """Load a model, its sampling settings and its safety checker: what a pipeline is made of."""
    place, dtype = "cpu" if given.device is None else given.device, given.dtype
    check_dtype(dtype)
    folder = hub.find(path_or_hub_id)
    loaded = load_checkpoint(
        folder,
        config=_sizes(config),
        device=usable_device(place),
        dtype=dtype,
        files=hub.files,
        raw_weights=raw_weights,
    )
    usage = _usage(loaded, solver, given)
    schedule = schedule_of(
        loaded.model,
        conventions=usage.conventions,
        solver=usage.solver,
        watermark=bool(usage.watermark),
        preprocessor=usage.preprocessor,
        scheduler=usage.scheduler,
    )
    for note in loaded.notes:
        warn_once(f"'{path_or_hub_id}': {note}")
    checker = _checker(safety_checker, loaded, hub)
    if checker is None and given.screened:
        warn_once(f"no safety checker with '{path_or_hub_id}': what it paints is not screened")
    elif isinstance(checker, Path):
        checker = load_safety_checker(checker, device=place, dtype=dtype, files=hub.files)
    parts: dict[str, Any] = {"model": loaded.model}
    if given.networks:
        parts = {name: getattr(loaded.model, name) for name in NETWORKS} | given.networks
    return parts | {"noise_schedule": schedule, "safety_checker": checker}


def _sizes(config: Configuration) -> str | Path | ModelConfig | None:
    if isinstance(config, Config):
        return config.model
    if isinstance(config, str | Path):
        return expand_home(str(config))
    if config is None or isinstance(config, ModelConfig):
        return config
    raise EditTypeError(f"config: {type(config).__name__}; it must be a YAML file or a typed configuration")


def usable_device(device: str | torch.device, named: str = "device") -> torch.device:
    """Return a device that tensors can be made on; errors call the argument ``named``."""
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta":
            raise NotImplementedError("it holds no numbers")
        return found
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UserError(f"{named} '{device}' cannot be used here: {str(error).splitlines()[0]}") from error


def _usage(loaded: Loaded, solver: str | SolverChoice | None, given: LoadingArguments) -> Usage:
    """Return how the model is to be run: as the call says, else as its files do, else as the layout does."""
    usage = loaded.usage
    if solver is not None and given.scheduler is not None:
        raise EditValueError("solver and scheduler are two names for one thing; give one of them")
    if solver is not None:
        usage = replace(usage, solver=choose_solver(solver))
    elif given.scheduler is not None:
        usage = replace(usage, solver=solver_of(given.scheduler, loaded.model))
    return replace(usage, preprocessor=given.preprocessor or usage.preprocessor).complete(loaded.layout)


def _checker(wanted: Checker, loaded: Loaded, hub: Hub) -> Path | nn.Module | None:
    """Return the checker, or the folder to load it from."""
    if wanted is None or isinstance(wanted, nn.Module) or callable(wanted):
        return wanted
    if wanted != AUTO:
        return replace(hub, revision=None, files=ANY, force_download=False).find(wanted)
    return loaded.safety_checker
