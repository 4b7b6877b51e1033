"""Models by name: found here or on the Hugging Face Hub, loaded, and made a pipeline's parts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

from pbe.checkpoints.folders import ANY, CHECKER, SHARD, STRANGERS, SUFFIXES, FileChoice, rank
from pbe.checkpoints.loading import load_checkpoint
from pbe.checkpoints.settings import UNSAID, Usage, usage_for
from pbe.config import Config, ModelConfig, ScheduleConfig
from pbe.diffusion.schedule import NoiseSchedule, make_schedule
from pbe.diffusion.solvers import SolverChoice
from pbe.editing.diffusers_inputs import OURS, LoadingArguments, check_dtype, solver_of
from pbe.editing.engine import choose_solver
from pbe.editing.offload import usable_device
from pbe.editing.safety import load_safety_checker
from pbe.editing.settings import existing_path
from pbe.errors import EditTypeError, EditValueError, UserError, first_line, warn_once
from pbe.files import expand_home
from pbe.models import AutoencoderKL, ExemplarEncoder, LatentDiffusion, UNet

NATIVE_FILES = ("unet.safetensors", "autoencoder.safetensors", "exemplar_encoder.safetensors")
COMPONENTS = ("unet", "vae", "image_encoder", "feature_extractor", "scheduler")
SMALL = (".json", ".yaml", ".yml")
# Whatever goes wrong on the way to the Hub: errors of the system, and those of the HTTP library underneath.
TRANSPORT: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
logger = logging.getLogger(__name__)
USUAL = UNSAID.complete("native")  # what models run like that say nothing of it
NETWORKS = ("unet", "autoencoder", "exemplar_encoder")
PARTS = (*NETWORKS, "noise_schedule")


@dataclass(frozen=True)
class Hub:
    """How the Hub is asked; the address is ``$HF_ENDPOINT``, ``HF_HUB_OFFLINE=1`` keeps every call offline.

    Attributes:
        revision: branch, tag or commit; None is ``main``.
        cache_dir: where downloads go; None is huggingface_hub's cache.
        local_files_only: take what is cached and do not connect.
        token: for private repositories; None is the one that ``hf auth login`` stored.
        files: which copies of the weights are fetched.
        force_download: fetch files that are cached, too.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    token: str | bool | None = None
    files: FileChoice = ANY
    force_download: bool = False

    def find(self, path_or_hub_id: str | Path) -> Path:
        """Return the path of a model: the one given, or that of a download.

        A path that exists comes before a repository of the same name.
        """
        path = existing_path(path_or_hub_id)
        return self._download(str(path_or_hub_id)) if path is None else path

    def _download(self, name: str) -> Path:
        if self.local_files_only:
            return self._cached(
                name, f"'{name}' is neither a path here nor in the cache, and the call stays offline"
            )
        api = HfApi(token=self.token)
        try:
            info = api.model_info(name, revision=self.revision or "main")
            files = [each.rfilename for each in info.siblings or []]
            files = files or list(api.list_repo_files(name, revision=info.sha))
        except RevisionNotFoundError as error:
            raise UserError(f"'{name}' on the Hub has no revision '{self.revision}'") from error
        except HFValidationError as error:
            raise UserError(f"'{name}' cannot be the name of a repository: {first_line(error)}") from error
        except TRANSPORT as error:
            problem = _explain(name, error)
            logger.warning("%s; taking the cached copy, if there is one", problem)
            return self._cached(name, problem, error)
        try:
            return self._snapshot(name, select_files(files, name, self.files))
        except TRANSPORT as error:
            raise UserError(f"downloading '{name}' failed: {first_line(error)}") from error

    def _cached(self, name: str, problem: str, cause: BaseException | None = None) -> Path:
        """Return the folder of an earlier download, whatever it holds: loading finds what is missing."""
        try:
            return self._snapshot(name, [], offline=True)
        except TRANSPORT as error:
            raise UserError(problem) from cause or error

    def _snapshot(self, name: str, files: list[str], offline: bool = False) -> Path:
        folder = snapshot_download(
            name,
            revision=self.revision,
            cache_dir=None if self.cache_dir is None else expand_home(str(self.cache_dir)),
            token=self.token,
            force_download=self.force_download,
            local_files_only=offline,
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", file) for file in files],
        )
        return Path(folder)


def _explain(name: str, error: BaseException) -> str:
    if isinstance(error, GatedRepoError):
        return f"'{name}' on the Hub is gated: accept its terms there and give a token"
    if isinstance(error, RepositoryNotFoundError):
        return f"'{name}' is neither a path here nor a model on the Hub (a private one needs a token)"
    return f"'{name}' is no path here, and the Hub cannot be reached: {first_line(error)}"


def upload(
    folder: Path,
    repo_id: str,
    message: str,
    *,
    private: bool | None,
    token: str | bool | None,
    create_pr: bool,
) -> str:
    """Put a folder's files into a repository, made when missing; return the commit's address."""
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, create_pr=create_pr
        )
    except HFValidationError as error:
        raise UserError(f"'{repo_id}' cannot be the name of a repository: {first_line(error)}") from error
    except TRANSPORT as error:
        raise UserError(f"uploading to '{repo_id}' failed: {first_line(error)}") from error
    return str(commit.commit_url)


def select_files(files: Iterable[str], name: str, choice: FileChoice = ANY) -> list[str]:
    """Choose what to download of a repository: settings, and the weights of every network once.

    A model in diffusers' layout is taken before a native one, and that before a checkpoint: repositories hold
    the same weights several times. Where ``choice`` leaves it open, safetensors come before pickles and
    variants last.
    """
    listed = sorted(files)
    there = [part for part in (*COMPONENTS, CHECKER) if any(each.startswith(f"{part}/") for each in listed)]
    if "model_index.json" in listed:
        chosen = [each for folder in there for each in _folder_files(listed, folder, name, choice)]
        return ["model_index.json", *chosen]
    checker = _folder_files(listed, CHECKER, name, choice) if CHECKER in there else []
    if all(each in listed for each in NATIVE_FILES):
        choice.narrow([PurePosixPath(each) for each in NATIVE_FILES], f"'{name}' on the Hub")
        return ["config.json", *NATIVE_FILES, *checker]
    return [*_folder_files(listed, "", name, choice), *checker]


def _folder_files(listed: list[str], folder: str, name: str, choice: FileChoice) -> list[str]:
    """Return the settings and the best weights that lie in a folder itself."""
    inside = [PurePosixPath(each) for each in listed if str(PurePosixPath(each).parent) == (folder or ".")]
    settings = [str(path) for path in inside if path.suffix in SMALL]
    weights = [path for path in inside if path.suffix in SUFFIXES and path.name not in STRANGERS]
    if not weights:
        if folder in ("feature_extractor", "scheduler"):
            return settings
        raise UserError(f"'{name}' on the Hub holds no weights{f' in {folder}/' if folder else ''}")
    weights = choice.narrow(weights, f"'{name}' on the Hub{f': {folder}/' if folder else ''}")
    best = [path for path in weights if rank(path) == min(map(rank, weights))]
    if len(best) > 1 and not all(SHARD.search(path.stem) for path in best):
        found = ", ".join(path.name for path in best)
        raise UserError(f"'{name}' on the Hub holds several models ({found}); download one and give its path")
    return settings + [str(path) for path in best]


@dataclass(frozen=True)
class PipelineSchedule(NoiseSchedule):
    """A pipeline's noise schedule, with what else its weights were made for and how they are run.

    Attributes:
        config: of the schedule.
        prediction: what the network predicts, ``eps`` or ``v``.
        image_size: training resolution in pixels.
        usage: how calls run the model that do not say; its solver and conventions are given.
    """

    config: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction: str = "eps"
    image_size: int = 512
    usage: Usage = USUAL


def schedule_of(model: LatentDiffusion, usage: Usage | None = None) -> PipelineSchedule:
    """Return the schedule of a whole model that is run like this; None is how models of its kind are run."""
    usage = usage_for(model.config).complete("native") if usage is None else usage
    config, plain = model.config, make_schedule(model.config.schedule)
    sizes = (config.schedule, config.prediction, config.image_size)
    return PipelineSchedule(plain.betas, plain.alphas_cumprod, *sizes, usage)


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
        schedule=replace(schedule.config),
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
    int8: bool = False,
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
        int8=int8,
    )
    usage = loaded.usage
    if solver is not None and given.scheduler is not None:
        raise EditValueError("solver and scheduler are two names for one thing; give one of them")
    if solver is not None:
        usage = replace(usage, solver=choose_solver(solver))
    elif given.scheduler is not None:
        usage = replace(usage, solver=solver_of(given.scheduler, loaded.model))
    usage = replace(usage, preprocessor=given.preprocessor or usage.preprocessor).complete(loaded.layout)
    for note in loaded.notes:
        warn_once(f"'{path_or_hub_id}': {note}")
    checker: Any = loaded.safety_checker if safety_checker == AUTO else safety_checker
    if checker is None and given.screened:
        warn_once(f"'{path_or_hub_id}' has no safety checker: its edits are not screened")
    elif isinstance(checker, str | Path):
        if safety_checker != AUTO:
            checker = replace(hub, revision=None, files=ANY, force_download=False).find(checker)
        checker = load_safety_checker(checker, device=place, dtype=dtype, files=hub.files)
    parts: dict[str, Any] = {"model": loaded.model}
    if given.networks:
        parts = {name: getattr(loaded.model, name) for name in NETWORKS} | given.networks
    return parts | {"noise_schedule": schedule_of(loaded.model, usage), "safety_checker": checker}


def _sizes(config: Configuration) -> str | Path | ModelConfig | None:
    if isinstance(config, Config):
        return config.model
    if isinstance(config, str | Path):
        return expand_home(str(config))
    if config is None or isinstance(config, ModelConfig):
        return config
    raise EditTypeError(f"config: {type(config).__name__}; it must be a YAML file or a typed configuration")
