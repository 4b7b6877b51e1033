"""What a pipeline is loaded from: the model, how it is sampled, and its safety checker."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pbe.checkpoints.folders import ANY, FileChoice
from pbe.checkpoints.loading import Loaded, load_checkpoint
from pbe.checkpoints.usage import Usage
from pbe.config import Config, ModelConfig
from pbe.diffusion.solvers import SolverChoice
from pbe.editing.components import NETWORKS, OURS, schedule_of
from pbe.editing.hub import Hub
from pbe.editing.problems import EditTypeError, EditValueError, say_once
from pbe.editing.safety import load_safety_checker
from pbe.editing.sampling import choose_solver
from pbe.editing.schedulers import solver_of
from pbe.errors import UserError
from pbe.files import expand_home
from pbe.models import AutoencoderKL, ExemplarEncoder, UNet

AUTO = "auto"
Configuration = str | Path | ModelConfig | Config | None
Checker = str | Path | nn.Module | None


PARTS = {"unet": UNet, "vae": AutoencoderKL, "image_encoder": ExemplarEncoder}
# diffusers' arguments of loading that change no result, and those that cannot be followed here, and why.
IDLE = ("disable_mmap", "low_cpu_mem_usage", "offload_state_dict", "resume_download", "trust_remote_code")
REFUSED = {
    "custom_pipeline": "there is one pipeline",
    "custom_revision": "there is one pipeline",
    "dduf_file": "folders and checkpoints are read",
    "from_flax": "flax's weights are not read",
    "load_connected_pipeline": "there is one pipeline",
    "max_memory": "enable_model_cpu_offload bounds the memory",
    "mirror": "the environment's HF_ENDPOINT names another address",
    "offload_folder": "enable_model_cpu_offload keeps idle networks in memory",
    "output_loading_info": "missing and unexpected keys are errors here",
    "provider": "ONNX is not read",
    "provider_options": "ONNX is not read",
    "proxies": "the environment's HTTPS_PROXY names one",
    "quantization_config": "weights are float32, bfloat16 or float16",
    "sess_options": "ONNX is not read",
    "subfolder": "give the path of the folder itself",
    "use_flashpack": "safetensors and pickles are read",
    "use_onnx": "ONNX is not read",
}
OTHERS = (
    *("torch_dtype", "device_map", "variant", "use_safetensors", "force_download", "requires_safety_checker"),
    *(*PARTS, "scheduler", "feature_extractor"),
)


@dataclass(frozen=True)
class Theirs:
    """What the arguments mean that diffusers' loading has and this one has not.

    Attributes:
        dtype: of the weights.
        device: where the model runs.
        files: which copies of the weights.
        force_download: fetch cached files again.
        screened: whether a model without a safety checker is to be told.
        networks: in place of the model's, by their names here.
        scheduler: whose solver is taken, or None.
        preprocessor: how exemplars are cropped, or None.
    """

    dtype: torch.dtype | None
    device: str | torch.device | None
    files: FileChoice = ANY
    force_download: bool = False
    screened: bool = True
    networks: dict[str, nn.Module] = field(default_factory=dict)
    scheduler: Any = None
    preprocessor: dict[str, Any] | None = None


def read_theirs(
    others: dict[str, Any],
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    known: inspect.Signature | None = None,
) -> Theirs:
    """Read the arguments that are diffusers' alone.

    Args:
        others: by name.
        dtype: given by its name here.
        device: likewise.
        known: of the call, for errors, which tell the nearest name.

    Raises:
        EditTypeError: an argument that is not known, or of the wrong kind.
        EditValueError: one that cannot be followed; the line says why.
    """
    for name, value in others.items():
        if name in REFUSED and value not in (None, False):
            raise EditValueError(f"from_pretrained: {name} cannot be used: {REFUSED[name]}")
        if name not in (*OTHERS, *IDLE, *REFUSED):
            own = [] if known is None else [*known.parameters][:-1]
            nearest = _nearest(name, [*own, *OTHERS])
            raise EditTypeError(f"from_pretrained has no argument '{name}'{nearest}")
        if value is None and name in (*PARTS, "scheduler", "feature_extractor"):
            raise EditValueError(f"from_pretrained: {name} is None, but an edit needs it; leave it out")
    networks = {OURS.get(name, name): others[name] for name in PARTS if name in others}
    for name, kind in PARTS.items():
        if name in others and not isinstance(others[name], kind):
            raise EditTypeError(
                f"{name}: {type(others[name]).__module__.split('.')[0]}'s {type(others[name]).__name__}; it "
                f"must be a pipeline's here, such as PaintByExample.from_pretrained(FOLDER).{name}"
            )
    variant, safetensors = others.get("variant"), others.get("use_safetensors")
    if not isinstance(variant, str | None) or not isinstance(safetensors, bool | None):
        raise EditTypeError("from_pretrained: variant must be a str or None, use_safetensors a bool or None")
    return Theirs(
        _one("dtype", dtype, "torch_dtype", others.get("torch_dtype")),
        _one("device", device, "device_map", _place(others.get("device_map"))),
        FileChoice(variant, safetensors),
        bool(others.get("force_download")),
        others.get("requires_safety_checker") is not False,
        networks,
        others.get("scheduler"),
        preprocessor_of(others.get("feature_extractor")),
    )


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; there are: {', '.join(known)}"


def _one(name: str, ours: Any, other: str, theirs: Any) -> Any:
    """Return the one of two names for a setting that is given."""
    if ours is not None and theirs is not None and str(ours) != str(theirs):
        raise EditValueError(f"{name} is {ours} and {other} {theirs}; give one of them")
    return theirs if ours is None else ours


def _place(device_map: Any) -> Any:
    if isinstance(device_map, dict) or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise EditValueError("device_map: networks are not spread over devices; name one, such as cuda:0")
    return device_map


def preprocessor_of(extractor: Any) -> dict[str, Any] | None:
    """Return the ``preprocessor_config.json`` of a feature extractor, or of its settings.

    Raises:
        EditTypeError: something else.
    """
    if extractor is None or isinstance(extractor, Mapping):
        return None if extractor is None else dict(extractor)
    if not callable(getattr(extractor, "to_dict", None)):
        raise EditTypeError(
            f"feature_extractor: {type(extractor).__name__}; it must be a CLIPImageProcessor or its settings"
        )
    return dict(extractor.to_dict())


def check_saving(
    layout: object, dtype: object, safe_serialization: object, variant: object, push_to_hub: object
) -> None:
    """Check the arguments of saving, those that diffusers has among them.

    Raises:
        EditTypeError, EditValueError: one that cannot be followed; the line says what to do.
    """
    if not isinstance(layout, str):
        raise EditTypeError(f"layout: {type(layout).__name__}; it must be a name, such as diffusers")
    _check_dtype(dtype)
    if not safe_serialization:
        raise EditValueError("safe_serialization is False; folders hold safetensors, never pickles")
    if variant is not None:
        raise EditValueError("files have no variant here; dtype=torch.float16 writes them in half precision")
    if push_to_hub:
        raise EditValueError("saving does not upload; call pipe.push_to_hub(repo_id)")


def load_parts(
    path_or_hub_id: str | Path,
    config: Configuration,
    solver: str | SolverChoice | None,
    safety_checker: Checker,
    hub: Hub,
    theirs: Theirs,
    *,
    raw_weights: bool = False,
) -> dict[str, Any]:
    """Load a model, its sampling settings and its safety checker; returns what a pipeline is made of.

    Args:
        path_or_hub_id: folder, file or Hub id.
        config: sizes of the model, where its files do not say.
        solver: None takes the one that the model's files name.
        safety_checker: ``auto``, None, a folder or Hub id, or the network.
        hub: how the Hub is asked.
        theirs: type and device of the weights, and what else diffusers' arguments ask for.
        raw_weights: take a training checkpoint's plain weights instead of the averaged ones.

    Raises:
        UserError: see ``PaintByExample.from_pretrained``.
    """
    place, dtype = "cpu" if theirs.device is None else theirs.device, theirs.dtype
    _check_dtype(dtype)
    folder = hub.find(path_or_hub_id)
    loaded = load_checkpoint(
        folder,
        config=_sizes(config),
        device=usable_device(place),
        dtype=dtype,
        files=hub.files,
        raw_weights=raw_weights,
    )
    usage = _usage(loaded, solver, theirs)
    schedule = schedule_of(
        loaded.model,
        conventions=usage.conventions,
        solver=usage.solver,
        watermark=bool(usage.watermark),
        preprocessor=usage.preprocessor,
        scheduler=usage.scheduler,
    )
    for note in loaded.notes:
        say_once(f"'{path_or_hub_id}': {note}")
    checker = _checker(safety_checker, loaded, hub)
    if checker is None and theirs.screened:
        say_once(f"no safety checker with '{path_or_hub_id}': what it paints is not screened")
    elif isinstance(checker, Path):
        checker = load_safety_checker(checker, device=place, dtype=dtype, files=hub.files)
    networks = {name: getattr(loaded.model, name) for name in NETWORKS} | theirs.networks
    return networks | {"noise_schedule": schedule, "safety_checker": checker}


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


def _check_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise EditTypeError(f"dtype: {dtype!r}; it must be a floating-point torch.dtype, as torch.float16")


def _usage(loaded: Loaded, solver: str | SolverChoice | None, theirs: Theirs) -> Usage:
    """Return how the model is to be run: as the call says, else as its files do, else as the layout does."""
    usage = loaded.usage
    if solver is not None and theirs.scheduler is not None:
        raise EditValueError("solver and scheduler are two names for one thing; give one of them")
    if solver is not None:
        usage = replace(usage, solver=choose_solver(solver))
    elif theirs.scheduler is not None:
        usage = replace(usage, solver=solver_of(theirs.scheduler, loaded.model))
    return replace(usage, preprocessor=theirs.preprocessor or usage.preprocessor).complete(loaded.layout)


def _checker(wanted: Checker, loaded: Loaded, hub: Hub) -> Path | nn.Module | None:
    """Return the checker, or the folder to load it from."""
    if wanted is None or isinstance(wanted, nn.Module) or callable(wanted):
        return wanted
    if wanted != AUTO:
        return Hub(cache_dir=hub.cache_dir, local_files_only=hub.local_files_only, token=hub.token).find(
            wanted
        )
    return loaded.safety_checker
