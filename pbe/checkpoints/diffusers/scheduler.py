"""diffusers' ``scheduler_config.json``: read as a solver of this project, and written from one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from pbe.diffusion.solvers import SPACINGS, get_solver
from pbe.diffusion.solvers.settings import FINER, SolverChoice, check_settings
from pbe.errors import UserError

OWN = "_pbe_solver"  # diffusers leaves keys that begin with an underscore alone
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
HEUN, LMS = "HeunDiscreteScheduler", "LMSDiscreteScheduler"
# The betas that a class takes where its configuration names none; all of them are linear then.
BETAS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("DDIMScheduler", "PNDMScheduler", DPM, UNIPC, EULER, ANCESTRAL, LMS), (0.0001, 0.02)),
    HEUN: (0.00085, 0.012),
}
# Settings that the solvers here have for these values only, and the classes that read them: the
# configuration of a class may carry settings of others along, which mean nothing to it. () is every class.
REQUIRED: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "beta_schedule": (("scaled_linear",), ()),
    "trained_betas": ((None,), ()),
    "prediction_type": (("epsilon", "v_prediction"), ()),
    "rescale_betas_zero_snr": ((False, None), ("DDIMScheduler", DPM, UNIPC, EULER, ANCESTRAL)),
    "thresholding": ((False, None), ("DDIMScheduler", DPM, UNIPC)),
    "use_exponential_sigmas": ((False, None), (DPM, UNIPC, EULER, HEUN, LMS)),
    "use_beta_sigmas": ((False, None), (DPM, UNIPC, EULER, HEUN, LMS)),
    "use_lu_lambdas": ((False, None), (DPM,)),
    "use_flow_sigmas": ((False, None), (DPM, UNIPC)),
    "use_dynamic_shifting": ((False, None), (DPM, UNIPC)),
    "interpolation_type": (("linear",), (EULER,)),
    "timestep_type": (("discrete",), (EULER,)),
    "sigma_min": ((None,), (UNIPC, EULER)),
    "sigma_max": ((None,), (UNIPC, EULER)),
    "shift_terminal": ((None,), (UNIPC,)),
    "variance_type": ((None,), (DPM,)),
    "lambda_min_clipped": ((float("-inf"), "-Infinity"), (DPM,)),
    "lower_order_final": ((True,), (DPM, UNIPC)),
    "disable_corrector": (([],), (UNIPC,)),
    "solver_p": ((None,), (UNIPC,)),
    # for those of the other class either takes its default
    "solver_type": (("midpoint", "heun", "logrho", "bh1", "bh2"), (DPM, UNIPC)),
    "clip_sample": ((False, None), (HEUN,)),
}
MISSING = {"beta_schedule": "linear"}
SWITCHES = (
    *("clip_sample", "euler_at_final", "predict_x0"),
    *("set_alpha_to_one", "skip_prk_steps", "use_karras_sigmas"),
)
NAMES = {"offset": "steps_offset", "clip": "clip_sample_range", "order": "solver_order"}
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


def _sigma_solver(name: str, config: Mapping[str, Any]) -> SolverChoice:
    return _choice(name, config, "linspace", end=_final(config) if name == "euler" else "clean")


CLASSES: dict[str, Callable[[Mapping[str, Any]], SolverChoice]] = {
    "DDIMScheduler": _ddim,
    "PNDMScheduler": _pndm,
    DPM: _dpm,
    UNIPC: _unipc,
    EULER: partial(_sigma_solver, "euler"),
    ANCESTRAL: partial(_sigma_solver, "euler_ancestral"),
    HEUN: partial(_sigma_solver, "heun"),
    LMS: partial(_sigma_solver, "lms"),
}


def solver_from_scheduler(config: Mapping[str, Any]) -> SolverChoice:
    """Read the solver from a diffusers ``scheduler_config.json``; keys it lacks mean diffusers' defaults.

    What :func:`scheduler_from_solver` noted for this project counts as long as the settings that diffusers
    reads were not changed since. The betas are the model's (its noise schedule is built from the same file)
    and are not looked at, but for kinds of schedules that there are none of here.
    """
    found = _read(config)
    if OWN not in config:
        return found
    noted = solver_from_json(config[OWN], f"scheduler_config.json: {OWN}")
    return noted if _read(scheduler_from_solver(noted)) == found else found


def _read(config: Mapping[str, Any]) -> SolverChoice:
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise UserError(f"scheduler '{name}' is not supported; there are: {', '.join(CLASSES)}")
    for key, (allowed, classes) in REQUIRED.items():
        if (key in config or key in MISSING) and (not classes or name in classes):
            _require(key, config.get(key, MISSING.get(key)), allowed)
    for key in SWITCHES:
        _require(key, config.get(key), (True, False, None))
    return CLASSES[name](config)


def _choice(name: str, config: Mapping[str, Any], spacing: str, **settings: Any) -> SolverChoice:
    spacing = config.get("timestep_spacing", spacing)
    _require("timestep_spacing", spacing, ("leading", "linspace", "trailing"))
    values = {"offset": config.get("steps_offset", 0), **settings}
    try:
        check_settings(values, NAMES)
    except UserError as error:
        raise UserError(f"scheduler_config.json: {error}") from error
    karras = name in KARRAS and bool(config.get("use_karras_sigmas", False))
    if karras and values.get("end") == "first":
        raise UserError("scheduler_config.json: Karras sigmas need final_sigmas_type 'zero'")
    return SolverChoice(name, spacing, karras, **values)


def _final(config: Mapping[str, Any]) -> str:
    """Return where the run ends by ``final_sigmas_type``."""
    final = config.get("final_sigmas_type", "zero")
    _require("final_sigmas_type", final, ("zero", "sigma_min"))
    return "clean" if final == "zero" else "first"


def _require(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        wanted = " or ".join(repr(each) for each in allowed)
        raise UserError(f"scheduler_config.json: {key} is {value!r}, which is not supported (only {wanted})")


# What every configuration that is written here holds, whatever its class: a swap to another one reads it. The
# spacing is left out where it is the class's own, so that another class takes its own too.
SHARED: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "trained_betas": None,
}
SPACING = {"DDIMScheduler": "leading", "PNDMScheduler": "leading"}  # of a class; linspace of all others


def scheduler_from_solver(choice: SolverChoice) -> dict[str, Any]:
    """Return the ``scheduler_config.json`` of a solver, but for betas and what the network predicts.

    Where diffusers' settings cannot say all of the choice (``uniform`` spacing, say), the choice itself
    stands under a key of this project, at which diffusers does not look.
    """
    name, found = _class_of(choice)
    spacing = choice.spacing or get_solver(choice.name).spacing
    spacing = "leading" if spacing == "uniform" else spacing
    if spacing != SPACING.get(name, "linspace"):
        found["timestep_spacing"] = spacing
    if choice.karras:
        found["use_karras_sigmas"] = True
    config = {"_class_name": name, **SHARED, "steps_offset": choice.offset} | found
    return config if _says_all(config, choice) else config | {OWN: solver_to_json(choice)}


def _class_of(choice: SolverChoice) -> tuple[str, dict[str, Any]]:
    """Return the class that is nearest to a solver, and the settings of it that are not its defaults."""
    name = get_solver(choice.name).name
    found: dict[str, Any] = {}
    if name in ("ddim", "lcm", "plms", "pndm"):
        if choice.end == "clean" or (name == "lcm" and choice.end is None):
            found["set_alpha_to_one"] = True
        if name in ("ddim", "lcm"):
            clip = {} if choice.clip is None else {"clip_sample": True, "clip_sample_range": choice.clip}
            return "DDIMScheduler", found | clip
        return "PNDMScheduler", found | ({"skip_prk_steps": False} if choice.runge_kutta else {})
    if choice.end == "first" and name in ("dpmpp_2m", "dpmpp_sde", "unipc", "euler"):
        found["final_sigmas_type"] = "sigma_min"
    if name in ("dpmpp_2m", "dpmpp_sde", "unipc") and choice.order != 2:
        found["solver_order"] = choice.order
    if name == "unipc":
        found |= {"predict_x0": False} if choice.predicts == "noise" else {}
        return UNIPC, found | ({"solver_type": "bh1"} if choice.variant == "bh1" else {})
    if name.startswith("dpmpp"):
        algorithm = "sde-dpmsolver++" if name == "dpmpp_sde" else "dpmsolver"
        if name == "dpmpp_sde" or choice.predicts == "noise":
            found["algorithm_type"] = algorithm
        return DPM, found | ({"solver_type": "heun"} if choice.variant == "heun" else {})
    return {"euler": EULER, "euler_ancestral": ANCESTRAL, "heun": HEUN, "lms": LMS}[name], found


def _says_all(config: Mapping[str, Any], choice: SolverChoice) -> bool:
    """Return whether reading a configuration gives the choice back, with what it leaves to its solver."""
    solver = get_solver(choice.name)
    end = "first" if solver.name in ("ddim", "plms", "pndm") else "clean"
    usual = {"dpmpp_2m": "midpoint", "dpmpp_sde": "midpoint", "unipc": "bh2"}.get(solver.name)
    spacing, variant = choice.spacing or solver.spacing, choice.variant or usual
    told = replace(choice, name=solver.name, spacing=spacing, end=choice.end or end, variant=variant)
    try:
        return _read(config) == told
    except UserError:
        return False


def solver_to_json(choice: SolverChoice) -> dict[str, Any]:
    """Return a solver and how it is run as plain values; what is at its default is left out."""
    found: dict[str, Any] = {"name": get_solver(choice.name).name}
    if choice.spacing is not None:
        found["spacing"] = choice.spacing
    if choice.karras:
        found["karras"] = True
    values = {key: getattr(choice, key) for key in FINER}
    settings = {key: value for key, value in values.items() if value != FINER[key]}
    return found | ({"settings": settings} if settings else {})


def solver_from_json(values: Any, source: str) -> SolverChoice:
    """Return the choice that :func:`solver_to_json` wrote; ``source`` is the place, for errors."""
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        raise UserError(f"{source}: not a solver with a name; remove the entry to run with the default")
    spacing, karras, settings = values.get("spacing"), values.get("karras", False), values.get("settings", {})
    if not isinstance(settings, Mapping):
        raise UserError(f"{source}: settings are {settings!r}; they must be names with values")
    for given, known in ((values, ("name", "spacing", "karras", "settings")), (settings, tuple(FINER))):
        if unknown := [str(key) for key in given if key not in known]:
            raise UserError(f"{source}: no setting '{unknown[0]}'; there are: {', '.join(known)}")
    if spacing is not None and spacing not in SPACINGS:
        raise UserError(f"{source}: no timestep spacing {spacing!r}; there are: {', '.join(SPACINGS)}")
    if not isinstance(karras, bool):
        raise UserError(f"{source}: karras is {karras!r}; it must be true or false")
    try:
        return SolverChoice(get_solver(values["name"]).name, spacing, karras, **settings)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
