"""What a pipeline is loaded from: the model, how it is sampled, and its safety checker."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pbe.checkpoints.loading import Loaded, load_checkpoint
from pbe.config import Config, ModelConfig
from pbe.diffusion.solvers.scheduler_config import SolverChoice, solver_from_scheduler
from pbe.editing.components import DEFAULT_SOLVER, PipelineSchedule, schedule_of
from pbe.editing.conventions import DIFFUSERS, ORIGINAL
from pbe.editing.hub import CHECKER, Hub
from pbe.editing.problems import EditTypeError, say_once
from pbe.editing.safety import load_safety_checker
from pbe.editing.sampling import choose_solver
from pbe.errors import UserError
from pbe.files import expand_home
from pbe.models import LatentDiffusion

AUTO = "auto"
Configuration = str | Path | ModelConfig | Config | None
Checker = str | Path | nn.Module | None


def load_parts(
    path_or_hub_id: str | Path,
    config: Configuration,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    solver: str | SolverChoice | None,
    safety_checker: Checker,
    hub: Hub,
) -> tuple[LatentDiffusion, PipelineSchedule, nn.Module | None]:
    """Load a model, its sampling settings and its safety checker.

    Args:
        path_or_hub_id: folder, file or Hub id.
        config: sizes of the model, where its files do not say.
        dtype: type of the weights in memory; None means float32.
        device: None means the CPU.
        solver: None takes the one of the model's scheduler configuration.
        safety_checker: ``auto``, None, a folder or Hub id, or the network.
        hub: how the Hub is asked.

    Raises:
        UserError: see ``PaintByExample.from_pretrained``.
    """
    place = "cpu" if device is None else device
    folder = hub.find(path_or_hub_id)
    loaded = load_checkpoint(folder, config=_sizes(config), device=usable_device(place), dtype=dtype)
    schedule = schedule_of(
        loaded.model,
        conventions=(DIFFUSERS if loaded.layout == "diffusers" else ORIGINAL).name,
        solver=_choice(loaded, solver),
        preprocessor=loaded.preprocessor,
        scheduler=loaded.scheduler,
    )
    for note in loaded.notes:
        say_once(f"'{path_or_hub_id}': {note}")
    checker = _checker(safety_checker, folder, loaded, hub)
    if checker is None:
        say_once(f"no safety checker with '{path_or_hub_id}': what it paints is not screened")
    elif isinstance(checker, Path):
        checker = load_safety_checker(checker, device=place, dtype=dtype)
    return loaded.model, schedule, checker


def _sizes(config: Configuration) -> str | Path | ModelConfig | None:
    if isinstance(config, Config):
        return config.model
    if isinstance(config, str | Path):
        return expand_home(str(config))
    if config is None or isinstance(config, ModelConfig):
        return config
    raise EditTypeError(f"config: {type(config).__name__}; it must be a YAML file or a typed configuration")


def usable_device(device: str | torch.device, named: str = "device") -> torch.device:
    """Return a device that tensors can be made on.

    Args:
        device: or its name.
        named: what errors call the argument.

    Raises:
        UserError: there is no such device here.
    """
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta":
            raise NotImplementedError("it holds no numbers")
        return found
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UserError(f"{named} '{device}' cannot be used here: {str(error).splitlines()[0]}") from error


def _choice(loaded: Loaded, solver: str | SolverChoice | None) -> SolverChoice:
    if solver is not None:
        return choose_solver(solver)
    return (
        SolverChoice(DEFAULT_SOLVER) if loaded.scheduler is None else solver_from_scheduler(loaded.scheduler)
    )


def _checker(wanted: Checker, folder: Path, loaded: Loaded, hub: Hub) -> Path | nn.Module | None:
    """Return the checker, or the folder to load it from."""
    if wanted is None or isinstance(wanted, nn.Module):
        return wanted
    if wanted != AUTO:
        return Hub(cache_dir=hub.cache_dir, local_files_only=hub.local_files_only, token=hub.token).find(
            wanted
        )
    beside = folder / CHECKER
    return loaded.safety_checker or (beside if beside.is_dir() else None)
