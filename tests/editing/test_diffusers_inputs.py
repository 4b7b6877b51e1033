"""A pipeline's scheduler, read and assigned, beside diffusers' own classes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from pbe.diffusion.solvers import SOLVERS, SolverChoice
from pbe.editing import PaintByExample
from pbe.editing.diffusers_inputs import ReadOnly, Scheduler
from pbe.models import LatentDiffusion
from tests.editing.conftest import SCHEDULERS
from tests.editing.tiny_model import make_tiny_model

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def pipe(tiny_model: LatentDiffusion) -> PaintByExample:
    return PaintByExample(tiny_model)


# but lcm: what diffusers' DDIM has to be told to do the same, other classes read too
@pytest.mark.parametrize("start", [name for name in SOLVERS if name != "lcm"])
def test_swapping_schedulers_swaps_solvers(pipe: PaintByExample, start: str):
    pipe.solver = start
    for name, kind in SCHEDULERS.items():
        pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
        assert (pipe.solver, pipe.choice.karras) == (name, False)
        assert pipe.choice.offset == 1
        assert pipe.choice.spacing == ("leading" if name in ("ddim", "pndm") else "linspace")
        assert pipe.choice.end == ("first" if name in ("ddim", "pndm") else "clean")


def test_settings_come_along(pipe: PaintByExample):
    kind = diffusers.DPMSolverMultistepScheduler
    pipe.scheduler = kind.from_config(
        pipe.scheduler.config,
        use_karras_sigmas=True,
        timestep_spacing="trailing",
        algorithm_type="sde-dpmsolver++",
    )
    assert pipe.choice == SolverChoice("dpmpp_sde", "trailing", True, end="clean", variant="midpoint")
    assert pipe.scheduler.config["algorithm_type"] == "sde-dpmsolver++"
    again = kind.from_config(pipe.scheduler.config)
    assert again.config.use_karras_sigmas
    assert again.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("name", SOLVERS)
def test_what_is_read_can_be_assigned(pipe: PaintByExample, name: str):
    """Back to the very choice, the original's too, for which diffusers has no words."""
    pipe.solver = SolverChoice(name, "uniform")
    scheduler = pipe.scheduler
    pipe.solver = "euler"
    pipe.scheduler = scheduler
    assert pipe.choice == SolverChoice(name, "uniform")
    pipe.scheduler = dict(scheduler.config)
    assert pipe.choice == SolverChoice(name, "uniform")


@pytest.mark.parametrize("kind", SCHEDULERS.values())
def test_the_config_is_that_of_the_class(pipe: PaintByExample, kind: str):
    made = getattr(diffusers, kind)(**SCALED, steps_offset=1)
    pipe.scheduler = made
    config = pipe.scheduler.config
    assert config._class_name == config["_class_name"] == kind
    assert getattr(diffusers, kind).from_config(config).config.items() >= SCALED.items()
    assert kind in pipe.scheduler.compatibles


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("DDIMScheduler", "scheduler: str; it must be one of diffusers' DDIMScheduler, PNDMScheduler"),
        (None, "scheduler: NoneType"),
        ({"_class_name": "LCMScheduler"}, "'LCMScheduler' is not supported; there are: DDIMScheduler"),
    ],
)
def test_what_is_no_scheduler(pipe: PaintByExample, scheduler: Any, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        pipe.scheduler = scheduler
    assert pipe.solver == "plms"


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("LCMScheduler", SCALED, "'LCMScheduler' is not supported; there are: DDIMScheduler"),
        ("DDIMScheduler", {}, "beta_schedule is 'linear'"),
        (
            "DDIMScheduler",
            SCALED | {"beta_end": 0.02},
            "beta_end is 0.02, the model's 0.012",
        ),
        ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear"}, "beta_end is 0.02"),
        ("DDIMScheduler", SCALED | {"num_train_timesteps": 500}, "num_train_timesteps is 500"),
        ("DDIMScheduler", SCALED | {"prediction_type": "v_prediction"}, "prediction_type is v_prediction"),
        ("DDIMScheduler", SCALED | {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
    ],
)
def test_schedulers_that_do_not_fit(pipe: PaintByExample, kind: str, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        pipe.scheduler = getattr(diffusers, kind)(**settings)
    assert pipe.solver == "plms"


def test_a_network_that_predicts_v():
    pipe = PaintByExample(make_tiny_model(prediction="v"))
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    assert pipe.solver == "ddim"


def test_settings_cannot_be_changed_in_place():
    config = Scheduler({"a": 1}).config
    assert (config.a, dict(config), {**config}) == (1, {"a": 1}, {"a": 1})
    for change in (
        lambda: config.update(a=2),
        lambda: setattr(config, "a", 2),
        lambda: config.__setitem__("a", 2),
        lambda: config.pop("a"),
    ):
        with pytest.raises(TypeError, match="settings are read-only"):
            change()
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert isinstance(copied, ReadOnly)
        assert copied == config
    with pytest.raises(AttributeError, match="no setting 'b'; there are: a"):
        _ = config.b
    with pytest.raises(AttributeError, match="has no 'set_timesteps': it tells the solver's config"):
        Scheduler({}).set_timesteps(5)
