"""Solvers in the form of diffusers' schedulers: what a pipeline shows as its scheduler, and what it takes."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn

from pbe.checkpoints.diffusers.format import write_scheduler
from pbe.checkpoints.diffusers.scheduler import BETAS, CLASSES, OWN, solver_from_scheduler
from pbe.checkpoints.folders import ANY, FileChoice
from pbe.diffusion.solvers import SolverChoice
from pbe.errors import EditTypeError, EditValueError, UserError
from pbe.models import AutoencoderKL, ExemplarEncoder, LatentDiffusion, UNet


class ReadOnly(dict[str, Any]):
    """A mapping of settings that are read as attributes, too, and cannot be changed."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no setting '{name}'; there are: {', '.join(self)}")

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise EditTypeError(
            "settings are read-only; pipe.solver and pipe.scheduler take others, and so do a call's arguments"
        )

    __setattr__ = __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadOnly, (dict(self),)


class Scheduler:
    """What ``pipe.scheduler`` tells: the solver as a configuration that diffusers' classes take.

    Attributes:
        config: of ``X.from_config(pipe.scheduler.config)``.
        compatibles: names of the classes that ``pipe.scheduler = X.from_config(...)`` takes.
    """

    compatibles = tuple(CLASSES)

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = ReadOnly(config)

    def __repr__(self) -> str:
        return f"Scheduler({dict(self.config)})"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"pipe.scheduler has no '{name}': it tells the solver's config, and steps are made inside a call"
        )


def solver_of(scheduler: Any, model: LatentDiffusion) -> SolverChoice:
    """Return the solver that a scheduler stands for.

    It is one of diffusers, of another pipeline, or a configuration of one, and must have the noise schedule
    and the prediction of the model.
    """
    config = scheduler if isinstance(scheduler, Mapping) else getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise EditTypeError(
            f"scheduler: {type(scheduler).__name__}; it must be one of diffusers' {', '.join(CLASSES)}"
        )
    values = dict(config)
    if not isinstance(scheduler, Scheduler | Mapping):
        # a configuration carries notes of the class that it was made from along
        values = {key: value for key, value in values.items() if key != OWN}
        values["_class_name"] = type(scheduler).__name__
    try:
        choice = solver_from_scheduler(values)
    except UserError as error:
        raise EditValueError(str(error)) from error
    _check_betas(values, model)
    return choice


def _check_betas(values: Mapping[str, Any], model: LatentDiffusion) -> None:
    start, end = BETAS[values["_class_name"]]
    found: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": start, "beta_end": end}
    found["prediction_type"] = "epsilon"
    found |= {key: values[key] for key in found if key in values}
    for key, wanted in write_scheduler(model.config, {}).items():
        value: Any = found.get(key, wanted)
        numbers = isinstance(value, int | float) and isinstance(wanted, int | float)
        if value != wanted and not (numbers and math.isclose(value, wanted, rel_tol=1e-6)):
            raise EditValueError(
                f"the scheduler's {key} is {value}, the model's {wanted}; "
                "make it by X.from_config(pipe.scheduler.config)"
            )


OURS = {"vae": "autoencoder", "image_encoder": "exemplar_encoder"}  # diffusers' names
PARTS = {"unet": UNet, "vae": AutoencoderKL, "image_encoder": ExemplarEncoder}
# diffusers' arguments of loading that change no result, and those that cannot be followed, by the reason.
IDLE = ("disable_mmap", "low_cpu_mem_usage", "offload_state_dict", "resume_download", "trust_remote_code")
REASONS = {
    "ONNX is not read": "provider provider_options sess_options use_onnx",
    "enable_model_cpu_offload bounds the memory": "max_memory",
    "enable_model_cpu_offload keeps idle networks in memory": "offload_folder",
    "flax's weights are not read": "from_flax",
    "folders and checkpoints are read": "dduf_file",
    "give the path of the folder itself": "subfolder",
    "missing and unexpected keys are errors here": "output_loading_info",
    "safetensors and pickles are read": "use_flashpack",
    "the environment's HF_ENDPOINT names another address": "mirror",
    "the environment's HTTPS_PROXY names one": "proxies",
    "there is one pipeline": "custom_pipeline custom_revision load_connected_pipeline",
    "weights are float32, bfloat16 or float16": "quantization_config",
}
REFUSED = {name: reason for reason, names in REASONS.items() for name in names.split()}
OTHERS = (
    *("torch_dtype", "device_map", "variant", "use_safetensors", "force_download", "requires_safety_checker"),
    *(*PARTS, "scheduler", "feature_extractor"),
)


@dataclass(frozen=True)
class LoadingArguments:
    """What the arguments mean that diffusers' loading has and this one has not.

    Attributes:
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


def read_arguments(
    others: dict[str, Any],
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    known: inspect.Signature | None = None,
) -> LoadingArguments:
    """Read the arguments that are diffusers' alone, by name.

    ``dtype`` and ``device`` may be given by their names here. ``known`` is the signature of the call, so that
    an error tells the nearest name.
    """
    for name, value in others.items():
        if name in REFUSED and value not in (None, False):
            raise EditValueError(f"from_pretrained: {name} cannot be used: {REFUSED[name]}")
        if name not in (*OTHERS, *IDLE, *REFUSED):
            own = [] if known is None else [*known.parameters][:-1]
            raise EditTypeError(f"from_pretrained has no argument '{name}'{nearest(name, [*own, *OTHERS])}")
        if value is None and name in (*PARTS, "scheduler", "feature_extractor"):
            raise EditValueError(f"from_pretrained: {name} is None, but an edit needs it; leave it out")
    networks = {OURS.get(name, name): others[name] for name in PARTS if name in others}
    for name, kind in PARTS.items():
        if name in others and not isinstance(others[name], kind):
            raise EditTypeError(
                f"{name}: {type(others[name]).__module__.split('.')[0]}'s {type(others[name]).__name__}; it "
                f"must be a pipeline's here, such as PaintByExample.from_pretrained(FOLDER).{name}"
            )
    device_map = others.get("device_map")
    if isinstance(device_map, dict) or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise EditValueError("device_map: networks are not spread over devices; name one, such as cuda:0")
    variant, safetensors = others.get("variant"), others.get("use_safetensors")
    if not isinstance(variant, str | None) or not isinstance(safetensors, bool | None):
        raise EditTypeError("from_pretrained: variant must be a str or None, use_safetensors a bool or None")
    return LoadingArguments(
        _one("dtype", dtype, "torch_dtype", others.get("torch_dtype")),
        _one("device", device, "device_map", device_map),
        FileChoice(variant, safetensors),
        bool(others.get("force_download")),
        others.get("requires_safety_checker") is not False,
        networks,
        others.get("scheduler"),
        preprocessor_of(others.get("feature_extractor")),
    )


def nearest(name: str, known: list[str]) -> str:
    """Return the end of an error about a name: the nearest one that is known, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; there are: {', '.join(known)}"


def _one(name: str, ours: Any, other: str, theirs: Any) -> Any:
    """Return the one of two names for a setting that is given."""
    if ours is not None and theirs is not None and str(ours) != str(theirs):
        raise EditValueError(f"{name} is {ours} and {other} {theirs}; give one of them")
    return theirs if ours is None else ours


def preprocessor_of(extractor: Any) -> dict[str, Any] | None:
    """Return the ``preprocessor_config.json`` of a feature extractor, or of its settings."""
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
    """Check the arguments of saving, those that diffusers has among them."""
    if not isinstance(layout, str):
        raise EditTypeError(f"layout: {type(layout).__name__}; it must be a name, such as diffusers")
    check_dtype(dtype)
    if not safe_serialization:
        raise EditValueError("safe_serialization is False; folders hold safetensors, never pickles")
    if variant is not None:
        raise EditValueError("files have no variant here; dtype=torch.float16 writes them in half precision")
    if push_to_hub:
        raise EditValueError("saving does not upload; call pipe.push_to_hub(repo_id)")


def check_dtype(dtype: Any) -> None:
    """Refuse a type of weights that is none of torch's floating-point types."""
    if dtype is not None and dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise EditTypeError(f"dtype: {dtype!r}; it must be a floating-point torch.dtype, as torch.float16")
