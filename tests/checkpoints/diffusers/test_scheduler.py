"""What a diffusers ``scheduler_config.json`` is taken to mean, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pbe.checkpoints.diffusers.scheduler import (
    OWN,
    scheduler_from_solver,
    solver_from_json,
    solver_from_scheduler,
)
from pbe.diffusion.solvers import SOLVERS, SPACINGS, SolverChoice, get_solver
from pbe.errors import UserError

BETAS = {"beta_schedule": "scaled_linear"}


def choose(kind: str, **settings: Any) -> SolverChoice:
    return solver_from_scheduler({"_class_name": kind, **BETAS, **settings})


@pytest.mark.parametrize(
    ("kind", "choice"),
    [
        ("DDIMScheduler", SolverChoice("ddim", "leading", False, offset=0, end="clean", clip=1.0)),
        ("PNDMScheduler", SolverChoice("pndm", "leading", False, offset=0, end="first", runge_kutta=True)),
        (
            "DPMSolverMultistepScheduler",
            SolverChoice("dpmpp_2m", "linspace", False, offset=0, end="clean", variant="midpoint"),
        ),
        (
            "UniPCMultistepScheduler",
            SolverChoice("unipc", "linspace", False, offset=0, end="clean", variant="bh2"),
        ),
        ("EulerDiscreteScheduler", SolverChoice("euler", "linspace", False, offset=0, end="clean")),
        (
            "EulerAncestralDiscreteScheduler",
            SolverChoice("euler_ancestral", "linspace", False, offset=0, end="clean"),
        ),
        ("HeunDiscreteScheduler", SolverChoice("heun", "linspace", False, offset=0, end="clean")),
        ("LMSDiscreteScheduler", SolverChoice("lms", "linspace", False, offset=0, end="clean")),
    ],
)
def test_missing_keys_mean_the_defaults_of_the_class(kind: str, choice: SolverChoice) -> None:
    assert choose(kind) == choice
    assert get_solver(choice.name).name == choice.name


def test_stable_diffusion() -> None:
    settings = {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False}
    assert choose("PNDMScheduler", **settings) == SolverChoice(
        "pndm", "leading", False, offset=1, end="first"
    )
    assert choose("DDIMScheduler", **settings) == SolverChoice(
        "ddim", "leading", False, offset=1, end="first"
    )


def test_kinds_of_dpm_solver() -> None:
    kind = "DPMSolverMultistepScheduler"
    assert choose(kind, algorithm_type="sde-dpmsolver++").name == "dpmpp_sde"
    noise = choose(kind, algorithm_type="dpmsolver", final_sigmas_type="sigma_min", solver_order=3)
    assert (noise.name, noise.predicts, noise.order) == ("dpmpp_2m", "noise", 3)
    assert choose(kind, use_karras_sigmas=True, timestep_spacing="trailing").karras
    assert choose(kind, solver_type="heun").variant == "heun"
    # what another class's solver_type becomes on conversion
    assert choose(kind, solver_type="bh2").variant == "midpoint"
    assert choose("UniPCMultistepScheduler", solver_type="midpoint").variant == "bh2"


def test_null_is_no() -> None:
    keys = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "thresholding")
    assert choose("EulerDiscreteScheduler", **dict.fromkeys(keys)) == choose("EulerDiscreteScheduler")


def test_karras_sigmas_where_the_class_does_not_read_them() -> None:
    for kind in ("DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler"):
        assert not choose(kind, use_karras_sigmas=True).karras


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("LCMScheduler", {}, "'LCMScheduler' is not supported; there are: DDIMScheduler"),
        ("DDIMScheduler", {"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
        ("DDIMScheduler", {"trained_betas": [0.1]}, "trained_betas"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ("DDIMScheduler", {"prediction_type": "sample"}, "'epsilon' or 'v_prediction'"),
        ("DDIMScheduler", {"thresholding": True}, "thresholding is True"),
        ("DDIMScheduler", {"timestep_spacing": "log"}, "timestep_spacing is 'log'"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver"}, "algorithm_type"),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "use_lu_lambdas"),
        ("DPMSolverMultistepScheduler", {"lower_order_final": False}, "lower_order_final"),
        (
            "DPMSolverMultistepScheduler",
            {"final_sigmas_type": "sigma_min", "euler_at_final": True},
            "euler_at_final",
        ),
        ("UniPCMultistepScheduler", {"disable_corrector": [0]}, "disable_corrector"),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, "Karras"),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "one"}, "final_sigmas_type is 'one'"),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type"),
        ("HeunDiscreteScheduler", {"clip_sample": True}, "clip_sample"),
    ],
    ids=str,
)
def test_what_is_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(kind, **settings)


def test_a_config_without_a_class_or_betas() -> None:
    with pytest.raises(UserError, match="'None' is not supported"):
        solver_from_scheduler({})
    with pytest.raises(UserError, match="beta_schedule is 'linear'"):
        solver_from_scheduler({"_class_name": "DDIMScheduler"})


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("steps_offset", [-3, 2.5, "1", None, True, []]),
        ("clip_sample_range", ["x", -1.0, 0, []]),
        ("clip_sample", ["no", 3, []]),
        ("use_karras_sigmas", ["false", 2, {}]),
        ("timestep_spacing", ["uniform", None, []]),
    ],
)
def test_values_of_another_kind_are_refused_by_their_name(key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UserError, match=f"scheduler_config.json: {key} is "):
            choose("DDIMScheduler", **{key: value})


@pytest.mark.parametrize(("key", "value"), [("solver_order", 4), ("solver_order", "2"), ("solver_type", 3)])
def test_orders_and_types_that_there_are_none_of(key: str, value: Any) -> None:
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        with pytest.raises(UserError, match=f"scheduler_config.json: {key} is {value!r}"):
            choose(name, **{key: value})


@pytest.mark.parametrize("name", [[], {}, None, 3])
def test_a_class_that_is_no_name(name: Any) -> None:
    with pytest.raises(UserError, match="is not supported; there are: DDIMScheduler"):
        solver_from_scheduler(BETAS | {"_class_name": name})


def test_settings_of_other_classes_mean_nothing() -> None:
    foreign = {"thresholding": True, "rescale_betas_zero_snr": True, "lower_order_final": False}
    assert choose("PNDMScheduler", **foreign) == choose("PNDMScheduler")
    foreign = {"variance_type": "fixed_small", "clip_sample": True, "interpolation_type": "log_linear"}
    assert choose("UniPCMultistepScheduler", **foreign) == choose("UniPCMultistepScheduler")


CHOICES = [
    SolverChoice(name, spacing, karras and get_solver(name).karras, *settings)
    for name in SOLVERS
    for spacing in (None, *SPACINGS)
    for karras, *settings in (
        (False,),
        (True,),
        (False, 0, "first", 0.5, True, 3, None, "noise"),
        (False, 2, "clean", None, False, 1),
    )
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_what_is_written_is_read_alike(choice: SolverChoice) -> None:
    """To the choice itself, or to one that says what it left to its solver; plain JSON in between."""
    config = json.loads(json.dumps(scheduler_from_solver(choice)))
    read = solver_from_scheduler(config)
    if OWN in config:
        assert read == choice
        del config[OWN]
        assert solver_from_scheduler(config) != choice
        return
    assert (read.name, read.karras, read.offset) == (
        choice.name,
        choice.karras,
        choice.offset,
    )
    assert read.spacing == choice.spacing or get_solver(choice.name).spacing == read.spacing
    for key in ("clip", "runge_kutta", "order", "predicts"):
        assert getattr(read, key) == getattr(choice, key)
    assert choice.end in (None, read.end)


def test_a_note_does_not_outlive_a_change() -> None:
    config = scheduler_from_solver(SolverChoice("plms", "uniform"))
    assert solver_from_scheduler(config).name == "plms"
    assert solver_from_scheduler(config | {"beta_end": 0.02}).name == "plms"
    for change in ({"timestep_spacing": "trailing"}, {"steps_offset": 0}, {"skip_prk_steps": False}):
        assert solver_from_scheduler(config | change).name == "pndm"
    assert solver_from_scheduler(config | {"_class_name": "DDIMScheduler"}).name == "ddim"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "not a solver with a name"),
        ({"spacing": "leading"}, "not a solver with a name"),
        ({"name": "magic"}, "no solver 'magic'"),
        ({"name": "ddim", "speed": 3}, "no setting 'speed'; there are: name, spacing"),
        ({"name": "ddim", "spacing": 3}, "no timestep spacing 3"),
        ({"name": "ddim", "karras": 1}, "karras is 1"),
        ({"name": "ddim", "settings": [1]}, r"settings are \[1\]"),
        ({"name": "ddim", "settings": {"offset": True}}, "offset is True"),
        ({"name": "ddim", "settings": {"orders": 2}}, "no setting 'orders'; there are: offset"),
    ],
)
def test_notes_that_cannot_be_read(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^here: .*{message}|^here: {message}"):
        solver_from_json(values, "here")
