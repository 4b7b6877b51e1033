"""The solver that a diffusers folder asks for: what its ``scheduler_config.json`` means here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pbe.diffusion.solvers.registry import Solver, get_solver
from pbe.diffusion.solvers.settings import DEFAULTS, Settings
from pbe.errors import UserError


@dataclass(frozen=True)
class SolverChoice:
    """A solver and how it is to be run.

    Attributes:
        name: a name in ``SOLVERS``.
        spacing: timestep spacing; None is the solver's own.
        karras: Karras sigmas.
        settings: finer settings.
    """

    name: str
    spacing: str | None = None
    karras: bool = False
    settings: Settings = DEFAULTS

    @property
    def solver(self) -> Solver:
        """The solver itself; pass it spacing, karras and settings."""
        return get_solver(self.name)


# Settings that the solvers here have for these values only, and what it means where one is missing.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("scaled_linear",),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False, None),
    "prediction_type": ("epsilon", "v_prediction"),
    "thresholding": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "variance_type": (None,),
    "lambda_min_clipped": (float("-inf"), "-Infinity"),
    "lower_order_final": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
}
MISSING = {"beta_schedule": "linear"}
# The classes that read use_karras_sigmas; to the others the key means nothing.
KARRAS = ("dpmpp_2m", "dpmpp_sde", "unipc", "euler", "heun", "lms")


def _ddim(config: Mapping[str, Any]) -> SolverChoice:
    clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else None
    end = "clean" if config.get("set_alpha_to_one", True) else "first"
    return _choice("ddim", config, "leading", end=end, clip=clip)


def _pndm(config: Mapping[str, Any]) -> SolverChoice:
    end = "clean" if config.get("set_alpha_to_one", False) else "first"
    return _choice("pndm", config, "leading", end=end, runge_kutta=not config.get("skip_prk_steps", False))


def _dpm(config: Mapping[str, Any]) -> SolverChoice:
    algorithm = config.get("algorithm_type", "dpmsolver++")
    _require("algorithm_type", algorithm, ("dpmsolver++", "deis", "dpmsolver", "sde-dpmsolver++"))
    end = _final(config)
    if end == "first":
        _require("euler_at_final", config.get("euler_at_final", False), (False,))
    name = "dpmpp_sde" if algorithm == "sde-dpmsolver++" else "dpmpp_2m"
    variant = "heun" if config.get("solver_type") == "heun" else "midpoint"
    predicts = "noise" if algorithm == "dpmsolver" else "data"
    order = config.get("solver_order", 2)
    return _choice(name, config, "linspace", end=end, order=order, variant=variant, predicts=predicts)


def _unipc(config: Mapping[str, Any]) -> SolverChoice:
    variant = "bh1" if config.get("solver_type") == "bh1" else "bh2"
    predicts = "data" if config.get("predict_x0", True) else "noise"
    order = config.get("solver_order", 2)
    return _choice(
        "unipc", config, "linspace", end=_final(config), order=order, variant=variant, predicts=predicts
    )


def _sigma_solver(name: str) -> Callable[[Mapping[str, Any]], SolverChoice]:
    def choose(config: Mapping[str, Any]) -> SolverChoice:
        if name == "heun":
            _require("clip_sample", config.get("clip_sample", False), (False,))
        return _choice(name, config, "linspace", end=_final(config) if name == "euler" else "clean")

    return choose


CLASSES: dict[str, Callable[[Mapping[str, Any]], SolverChoice]] = {
    "DDIMScheduler": _ddim,
    "PNDMScheduler": _pndm,
    "DPMSolverMultistepScheduler": _dpm,
    "UniPCMultistepScheduler": _unipc,
    "EulerDiscreteScheduler": _sigma_solver("euler"),
    "EulerAncestralDiscreteScheduler": _sigma_solver("euler_ancestral"),
    "HeunDiscreteScheduler": _sigma_solver("heun"),
    "LMSDiscreteScheduler": _sigma_solver("lms"),
}


def solver_from_scheduler(config: Mapping[str, Any]) -> SolverChoice:
    """Read the solver from a diffusers ``scheduler_config.json``; keys it lacks mean diffusers' defaults.

    The betas are the model's (its noise schedule is built from the same file) and are not looked at, but for
    kinds of schedules that there are none of here.

    Raises:
        UserError: an unknown scheduler class, or a setting that the solvers here do not have.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise UserError(f"scheduler '{name}' is not supported; there are: {', '.join(CLASSES)}")
    for key, allowed in REQUIRED.items():
        if key in config or key in MISSING:
            _require(key, config.get(key, MISSING.get(key)), allowed)
    return CLASSES[name](config)


def _choice(name: str, config: Mapping[str, Any], spacing: str, **settings: Any) -> SolverChoice:
    spacing = config.get("timestep_spacing", spacing)
    _require("timestep_spacing", spacing, ("leading", "linspace", "trailing"))
    found = Settings(offset=config.get("steps_offset", 0), **settings)
    karras = name in KARRAS and bool(config.get("use_karras_sigmas", False))
    if karras and found.end == "first":
        raise UserError("scheduler_config.json: Karras sigmas need final_sigmas_type 'zero'")
    return SolverChoice(name, spacing, karras, found)


def _final(config: Mapping[str, Any]) -> str:
    """Return where the run ends by ``final_sigmas_type``."""
    final = config.get("final_sigmas_type", "zero")
    _require("final_sigmas_type", final, ("zero", "sigma_min"))
    return "clean" if final == "zero" else "first"


def _require(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        wanted = " or ".join(repr(each) for each in allowed)
        raise UserError(f"scheduler_config.json: {key} is {value!r}, which is not supported (only {wanted})")
