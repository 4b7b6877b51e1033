"""Pipelines from files and into files, and pipelines that share their parts."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from pbe.checkpoints.diffusers.scheduler import scheduler_from_solver
from pbe.checkpoints.loading import open_checkpoint
from pbe.checkpoints.saving import convert, save_checkpoint
from pbe.checkpoints.settings import Usage
from pbe.config import AutoencoderConfig, ExemplarEncoderConfig, ModelConfig, UNetConfig
from pbe.diffusion.solvers import SOLVERS, SolverChoice
from pbe.editing import PaintByExample
from pbe.editing.safety import CheckerSizes, SafetyChecker
from pbe.errors import UserError, warn_once
from pbe.models import AutoencoderKL, LatentDiffusion, UNet, int8
from pbe.models.image_tower import TowerSizes
from tests.editing.conftest import Scene
from tests.editing.tiny_model import IMAGE_SIZE, make_tiny_model

LAYOUTS = ("native", "compvis", "diffusers")
SCALED = {"beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def clip_model() -> LatentDiffusion:
    """A model that every layout can hold."""
    torch.manual_seed(0)
    unet = UNetConfig(16, [1, 2], 1, [2], num_heads=2, context_dim=16, norm_groups=8)
    encoder = ExemplarEncoderConfig(
        tower="vit/16x4-patch8-heads2-mlp32-quickgelu", image_size=IMAGE_SIZE, mapper_layers=1
    )
    autoencoder = AutoencoderConfig(16, [1, 1, 2], 1, norm_groups=8)
    model = LatentDiffusion(
        ModelConfig(IMAGE_SIZE, "eps", unet=unet, autoencoder=autoencoder, exemplar_encoder=encoder)
    )
    for parameter in model.unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


def edit(pipe: PaintByExample, scene: Scene, **settings: object) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return pipe(scene.exemplar, scene.picture, scene.mask, **(call | settings)).images


CHOICES: dict[str, str | SolverChoice] = {
    **{name: name for name in SOLVERS},
    "leading": SolverChoice("ddim", "leading"),
    "trailing karras": SolverChoice("dpmpp_2m", "trailing", True, order=3, variant="heun"),
    "noise": SolverChoice("unipc", predicts="noise", end="first", variant="bh1"),
    "clipped": SolverChoice("ddim", "linspace", offset=0, end="clean", clip=0.5),
    "Runge-Kutta": SolverChoice("pndm", runge_kutta=True),
    "uniform heun": SolverChoice("heun", "uniform", end="first"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_edit_is_the_same_after_saving_and_loading(
    clip_model: LatentDiffusion, scene: Scene, layout: str, tmp_path: Path
):
    """Every choice in every layout, and with both conventions, which take turns.

    30 steps of ``uniform`` spacing are 31, which diffusers' own settings cannot say.
    """
    for index, (name, choice) in enumerate(CHOICES.items()):
        steps = 4 if name == "Runge-Kutta" else 2
        conventions = ("original", "diffusers")[(index + LAYOUTS.index(layout)) % 2]
        pipe = PaintByExample(clip_model, conventions=conventions)
        pipe.solver = choice
        pipe.save_pretrained(tmp_path / str(index), layout)
        loaded = PaintByExample.from_pretrained(tmp_path / str(index))
        assert loaded.conventions == conventions
        assert loaded.solver == pipe.solver
        assert loaded.solver_steps(30) == pipe.solver_steps(30)
        edits = [edit(each, scene, num_inference_steps=steps) for each in (loaded, pipe)]
        np.testing.assert_array_equal(*edits, err_msg=str(choice))
        for other in ("original", "diffusers"):
            assert loaded.solver_steps(30, conventions=other) == pipe.solver_steps(30, conventions=other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_diffusers_is_run_alike_in_every_layout(
    clip_model: LatentDiffusion, scene: Scene, layout: str, tmp_path: Path
):
    scheduler = scheduler_from_solver(SolverChoice("dpmpp_2m", "trailing", karras=True))
    size = {"shortest_edge": IMAGE_SIZE + 7}
    preprocessor = {"size": size, "crop_size": IMAGE_SIZE, "resample": 2, "image_mean": [0.4, 0.5, 0.6]}
    save_checkpoint(
        tmp_path / "foreign",
        clip_model,
        "diffusers",
        usage=Usage(scheduler=scheduler, preprocessor=preprocessor),
    )
    pipe = PaintByExample.from_pretrained(tmp_path / "foreign")
    assert (pipe.conventions, pipe.solver) == ("diffusers", "dpmpp_2m")
    assert pipe.feature_extractor["size"] == size
    pipe.save_pretrained(tmp_path / "saved", layout)
    convert(open_checkpoint(tmp_path / "foreign"), tmp_path / "converted", layout)
    for name in ("saved", "converted"):
        loaded = PaintByExample.from_pretrained(tmp_path / name)
        assert loaded.feature_extractor == pipe.feature_extractor
        np.testing.assert_array_equal(edit(loaded, scene), edit(pipe, scene))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_conversion_runs_as_its_source(
    clip_model: LatentDiffusion, scene: Scene, layout: str, tmp_path: Path
):
    save_checkpoint(tmp_path / "trained", clip_model)
    convert(open_checkpoint(tmp_path / "trained"), tmp_path / "converted", layout, verify=True)
    pipes = [PaintByExample.from_pretrained(tmp_path / name) for name in ("trained", "converted")]
    assert [(pipe.solver, pipe.conventions) for pipe in pipes] == [("plms", "original")] * 2
    np.testing.assert_array_equal(*[edit(pipe, scene) for pipe in pipes])


def test_another_solver_stands_in_what_diffusers_reads(clip_model: LatentDiffusion, tmp_path: Path):
    save_checkpoint(tmp_path, clip_model, "diffusers")
    pipe = PaintByExample.from_pretrained(tmp_path)
    assert (pipe.solver, pipe.conventions) == ("pndm", "diffusers")
    pipe.solver = "unipc"
    pipe.save_pretrained(tmp_path, "diffusers")
    scheduler, index = (
        json.loads((tmp_path / name).read_text())
        for name in ("scheduler/scheduler_config.json", "model_index.json")
    )
    assert scheduler["_class_name"] == "UniPCMultistepScheduler"
    assert index["scheduler"] == ["diffusers", "UniPCMultistepScheduler"]
    assert not [key for key in (*scheduler, *index) if key.startswith("_pbe")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_watermark_is_kept(clip_model: LatentDiffusion, layout: str, tmp_path: Path):
    pipe = PaintByExample(clip_model, watermark=True)
    assert pipe.components["watermark"] is True
    assert PaintByExample(**pipe.components).watermark
    pipe.save_pretrained(tmp_path, layout)
    assert PaintByExample.from_pretrained(tmp_path).watermark
    assert not PaintByExample.from_pretrained(tmp_path, watermark=False).watermark


def test_the_scheduler_of_a_folder_is_the_default_and_is_kept(clip_model: LatentDiffusion, tmp_path: Path):
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        "beta_schedule": "scaled_linear",
        "use_karras_sigmas": True,
        "timestep_spacing": "trailing",
    }
    save_checkpoint(tmp_path / "one", clip_model, "diffusers", usage=Usage(scheduler=scheduler))
    pipe = PaintByExample.from_pretrained(tmp_path / "one")
    choice = pipe.components["noise_schedule"].usage.solver
    assert (choice.name, choice.spacing, choice.karras) == ("dpmpp_2m", "trailing", True)
    pipe.save_pretrained(tmp_path / "two", "diffusers")
    written = json.loads((tmp_path / "two/scheduler/scheduler_config.json").read_text())
    assert written.items() >= scheduler.items()
    other = PaintByExample.from_pretrained(tmp_path / "two", solver="unipc", conventions="original")
    assert (other.solver, other.conventions) == ("unipc", "original")


def test_a_scheduler_that_is_not_known_needs_another_solver(clip_model: LatentDiffusion, tmp_path: Path):
    save_checkpoint(tmp_path, clip_model, "diffusers")
    (tmp_path / "scheduler/scheduler_config.json").write_text(
        json.dumps({"_class_name": "LCMScheduler", "beta_start": 0.00085, "beta_end": 0.012} | SCALED)
    )
    with pytest.raises(UserError, match="'LCMScheduler' is not supported"):
        PaintByExample.from_pretrained(tmp_path)
    assert PaintByExample.from_pretrained(tmp_path, solver="ddim").solver == "ddim"


def test_weights_in_half_precision(clip_model: LatentDiffusion, tmp_path: Path):
    PaintByExample(clip_model).save_pretrained(tmp_path, dtype=torch.float16)
    assert PaintByExample.from_pretrained(tmp_path).dtype == torch.float32
    assert PaintByExample.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_there_is_no_such_layout(clip_model: LatentDiffusion, tmp_path: Path):
    with pytest.raises(UserError, match="no layout 'onnx'"):
        PaintByExample(clip_model).save_pretrained(tmp_path, "onnx")


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("/nowhere", {}, "'/nowhere' does not exist; give a model's folder"),
        (Path("no/where"), {}, "'no/where' does not exist"),
        ("model", {"config": 3}, "config: int; it must be a YAML file or a typed configuration"),
        ("model", {"device": "abacus"}, "device 'abacus' cannot be used here"),
        ("model", {"solver": "magic"}, "no solver 'magic'"),
        ("model", {"conventions": "mine"}, "no conventions 'mine'"),
        ("model", {"safety_checker": "/nowhere"}, "'/nowhere' does not exist"),
    ],
)
def test_what_cannot_be_loaded(
    clip_model: LatentDiffusion, tmp_path: Path, path: str | Path, settings: dict, message: str
):
    if path == "model":
        path = tmp_path / "model"
        PaintByExample(clip_model).save_pretrained(path)
    with pytest.raises(UserError, match=message):
        PaintByExample.from_pretrained(path, **settings)


def test_the_home_folder_in_a_path(
    clip_model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    PaintByExample(clip_model).save_pretrained("~/model")
    assert (tmp_path / "home/model/config.json").is_file()
    assert not (tmp_path / "~").exists()
    PaintByExample.from_pretrained("~/model", safety_checker=None)


def test_a_missing_checker_is_said_once(
    clip_model: LatentDiffusion, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    PaintByExample(clip_model).save_pretrained(tmp_path)
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert PaintByExample.from_pretrained(tmp_path).safety_checker is None
    assert caplog.text.count("no safety checker") == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checker_is_saved_with_its_model_and_found_again(
    clip_model: LatentDiffusion, scene: Scene, layout: str, tmp_path: Path
):
    tower = TowerSizes(width=16, layers=1, patch=8, heads=2, mlp=32)
    checker = SafetyChecker(CheckerSizes(tower, 16, 1e-5, projection=8, concepts=2, special=1))
    checker.concepts.normal_()
    checker.special.normal_()
    checker.concept_thresholds.fill_(-2.0)  # no cosine is below it: everything is flagged
    PaintByExample(clip_model, safety_checker=checker.eval()).save_pretrained(tmp_path, layout)
    config = clip_model.config if layout == "compvis" else None
    if layout == "diffusers":
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    pipe = PaintByExample.from_pretrained(tmp_path, config)
    assert isinstance(pipe.safety_checker, SafetyChecker)
    output = pipe(scene.exemplar, scene.picture, scene.mask, num_inference_steps=1)
    assert output.nsfw_content_detected == [True]
    assert np.asarray(output.images[0]).max() == 0
    assert PaintByExample.from_pretrained(tmp_path, config, safety_checker=None).safety_checker is None
    named = PaintByExample.from_pretrained(tmp_path, config, safety_checker=tmp_path / "safety_checker")
    assert isinstance(named.safety_checker, SafetyChecker)


def test_components_share_the_networks(clip_model: LatentDiffusion, scene: Scene):
    pipe = PaintByExample(clip_model, conventions="diffusers", solver=SolverChoice("euler", karras=True))
    parts = pipe.components
    names = ["unet", "autoencoder", "exemplar_encoder", "noise_schedule", "safety_checker", "watermark"]
    assert list(parts) == names
    twin = PaintByExample(**parts)
    for name in ("unet", "autoencoder", "exemplar_encoder"):
        assert getattr(twin, name) is getattr(pipe, name)
        assert getattr(pipe, name) is getattr(clip_model, name)
    assert twin.model.config == clip_model.config
    assert (twin.solver, twin.conventions) == ("euler", "diffusers")
    np.testing.assert_array_equal(edit(twin, scene), edit(pipe, scene))
    other = PaintByExample(**(parts | {"autoencoder": make_tiny_model(seed=1).autoencoder}))
    assert other.unet is pipe.unet
    assert np.abs(edit(other, scene) - edit(pipe, scene)).max() > 1e-3


def test_components_keep_what_the_network_predicts():
    pipe = PaintByExample(make_tiny_model(prediction="v"))
    assert PaintByExample(**pipe.components).model.config == pipe.model.config


def test_a_bare_schedule_will_do(clip_model: LatentDiffusion):
    from pbe.config import ScheduleConfig
    from pbe.diffusion.schedule import make_schedule

    parts = PaintByExample(clip_model).components | {"noise_schedule": make_schedule(ScheduleConfig())}
    config = PaintByExample(**parts).model.config
    assert config.schedule.timesteps == 1000
    assert config.schedule.beta_end == pytest.approx(0.012)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet": None}, "missing: unet"),
        ({"noise_schedule": None}, "missing: noise_schedule"),
        ({"autoencoder": 3}, "autoencoder: int; it must be a network"),
        ({"noise_schedule": "linear"}, "noise_schedule: str; it must be a NoiseSchedule"),
    ],
)
def test_parts_that_make_no_pipeline(clip_model: LatentDiffusion, change: dict, message: str):
    with pytest.raises(TypeError, match=message):
        PaintByExample(**(PaintByExample(clip_model).components | change))


def test_parts_that_do_not_fit_together(clip_model: LatentDiffusion):
    parts, config = PaintByExample(clip_model).components, copy.deepcopy(clip_model.config)
    config.unet.context_dim, config.autoencoder.latent_channels = 8, 3
    changes = {
        "the unet takes conditions of 8 numbers, and the exemplar encoder gives 16": UNet(config.unet),
        "the unet takes 9 channels, and latents of 3 channels make 7": AutoencoderKL(config.autoencoder),
        "the unet is torch.float16 on cpu, the autoencoder is torch.float32": copy.deepcopy(
            clip_model.unet
        ).half(),
    }
    for message, part in changes.items():
        name = "unet" if isinstance(part, UNet) else "autoencoder"
        with pytest.raises(ValueError, match=message):
            PaintByExample(**(parts | {name: part}))


def test_weights_in_8_bits(
    clip_model: LatentDiffusion, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Loaded layer by layer they are what quantising the whole gives; they compute, and are not saved."""
    monkeypatch.setattr(int8, "ENOUGH", 1)
    PaintByExample(clip_model).save_pretrained(tmp_path / "model")
    pipe = PaintByExample.from_pretrained(tmp_path / "model", int8=True)
    plain = PaintByExample.from_pretrained(tmp_path / "model")
    assert not int8.is_quantised(pipe.autoencoder)
    assert not [name for name, each in pipe.model.named_parameters() if each.is_meta]
    for network in (plain.unet, plain.exemplar_encoder):
        int8.quantise(network)
    expected = plain.model.state_dict()
    assert pipe.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in pipe.model.state_dict().items())
    assert np.isfinite(edit(pipe, scene)).all()
    with pytest.raises(UserError, match="weights in 8 bits cannot be saved; load the model without int8"):
        pipe.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
