"""A program written for diffusers' pipeline meets this one."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pbe.checkpoints.saving import save_checkpoint
from pbe.editing import EditOutput, PaintByExample, PaintByExamplePipeline, StableDiffusionPipelineOutput
from pbe.editing.compatibility import NOT_HERE
from pbe.editing.preprocess import crop_settings
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from tests.editing.conftest import Scene
from tests.editing.tiny_model import make_tiny_model

THEIRS = importlib.import_module("diffusers.pipelines.deprecated.paint_by_example").PaintByExamplePipeline


@pytest.fixture
def pipe(tiny_model: LatentDiffusion) -> PaintByExample:
    return PaintByExample(tiny_model)


@pytest.fixture(scope="module")
def folder(tiny_model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_checkpoint(path, tiny_model)
    return path


def test_every_public_member_is_here_or_has_a_reason():
    public = {name for name in dir(THEIRS) if not name.startswith("_")}
    ours = {name for name in dir(PaintByExample) if not name.startswith("_")}
    assert not public - ours - set(NOT_HERE)
    assert not ours & set(NOT_HERE)
    assert all("\n" not in reason and len(reason) > 10 for reason in NOT_HERE.values())


def test_the_call_has_their_order():
    theirs, ours = (inspect.signature(each.__call__).parameters for each in (THEIRS, PaintByExample))
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name
    *own, others = list(ours.values())[len(theirs) :]
    assert all(each.kind is each.KEYWORD_ONLY for each in own)
    assert others.kind is others.VAR_KEYWORD  # only to be refused in words of ours


@pytest.mark.parametrize("name", ["enable_model_cpu_offload", "progress_bar", "enable_attention_slicing"])
def test_methods_take_their_arguments(name: str):
    theirs, ours = (inspect.signature(getattr(each, name)).parameters for each in (THEIRS, PaintByExample))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [each.default for each in ours.values()][: len(theirs)] == [
        each.default for each in theirs.values()
    ]


def test_a_negative_prompt_is_none(pipe: PaintByExample, scene: Scene):
    call = (scene.exemplar, scene.picture, scene.mask, None, None, 1, 5.0)
    assert len(pipe(*call, None, 2).images) == 2
    assert len(pipe(*call, "", 1, 0.0, None, None, "pil", True, None, 1).images) == 1
    for prompt in ("blurry", ["blurry"], np.zeros(2), 3):
        with pytest.raises(ValueError, match="negative_prompt: there is no text here"):
            pipe(*call, prompt)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prompt", "the call has no argument 'prompt': the exemplar is the condition; there is no text"),
        ("callback_on_step_end", "'callback_on_step_end': callback=f gets the step"),
        ("strength", "'strength': the masked region always starts from noise"),
        ("num_inference_step", "'num_inference_step'; did you mean 'num_inference_steps'"),
        ("clip_skip", "'clip_skip'; there are: example_image, image, mask_image"),
    ],
)
def test_arguments_that_the_call_does_not_have(pipe: PaintByExample, scene: Scene, name: str, message: str):
    with pytest.raises(TypeError, match=message):
        pipe(scene.exemplar, scene.picture, scene.mask, **{name: None})


def test_the_output_is_read_as_theirs(pipe: PaintByExample, scene: Scene):
    assert PaintByExamplePipeline is PaintByExample
    assert StableDiffusionPipelineOutput is EditOutput
    out = pipe(scene.exemplar, scene.picture, scene.mask, num_inference_steps=1)
    assert out[0] is out["images"] is out.images is out.to_tuple()[0]
    assert out[1] is out["nsfw_content_detected"] is None
    assert out[:1] == (out.images,)
    assert list(out.keys())[:2] == ["images", "nsfw_content_detected"]
    assert dict(out.items()) == dict(zip(out.keys(), out.values(), strict=True)) == dict(out)
    assert "images" in out
    assert "latents" not in out
    assert out.get("images") is out.images
    assert out.get("latents", 0) == 0
    with pytest.raises(KeyError, match="no 'image'; there are: images"):
        out["image"]


def test_read_only_names(folder: Path, tiny_model: LatentDiffusion):
    pipe = PaintByExample.from_pretrained(folder)
    assert pipe.vae is pipe.autoencoder
    assert pipe.image_encoder is pipe.exemplar_encoder
    assert pipe.vae_scale_factor == 4
    assert pipe.name_or_path == pipe.config["_name_or_path"] == str(folder)
    assert pipe.config._class_name == "PaintByExamplePipeline"
    assert pipe.config.scheduler[1] == pipe.scheduler.config._class_name == "PNDMScheduler"
    encoder = tiny_model.config.exemplar_encoder
    assert crop_settings(encoder, pipe.feature_extractor) == crop_settings(encoder)
    twin = PaintByExamplePipeline.from_pipe(pipe, watermark=True)
    assert twin.unet is pipe.unet
    assert (twin.name_or_path, twin.watermark) == (str(folder), True)


def test_parts_by_their_names(pipe: PaintByExample):
    parts = {"unet": pipe.unet, "vae": pipe.vae, "image_encoder": pipe.image_encoder}
    rest = {"safety_checker": None, "feature_extractor": pipe.feature_extractor}
    pipe.solver = "heun"
    twin = PaintByExamplePipeline(
        **parts,
        **rest,
        noise_schedule=pipe.noise_schedule,
        scheduler=pipe.scheduler,
        requires_safety_checker=False,
    )
    assert (twin.vae, twin.solver, twin.feature_extractor) == (pipe.vae, "heun", pipe.feature_extractor)
    with pytest.raises(TypeError, match="a pipeline takes no 'tokenizer'"):
        PaintByExample(**pipe.components, tokenizer=None)
    with pytest.raises(TypeError, match="a pipeline takes no 'vae' beside its autoencoder"):
        PaintByExample(**pipe.components, vae=pipe.vae)
    other = PaintByExample(make_tiny_model(seed=1)).vae
    assert PaintByExample.from_pipe(pipe, vae=other).autoencoder is other


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vae", r"'vae' cannot be assigned; PaintByExample\(\*\*pipe.components\)"),
        ("unet", "'unet' cannot be assigned"),
        ("config", "'config' cannot be assigned"),
        ("model", "'model' cannot be assigned; make another PaintByExample of it"),
        ("noise_schedule", "'noise_schedule' cannot be assigned"),
        ("enable_vae_tiling", "'enable_vae_tiling' is a method"),
        ("shceduler", "has no 'shceduler' to assign; did you mean 'scheduler'?"),
        ("sampler_solver", "did you mean 'solver'?"),
        ("guidance_scale", r"it is an argument of the call, pipe\(..., guidance_scale=...\)"),
        ("tokenizer", "there is no text"),
        ("zzz", "there are: conventions, model"),
    ],
)
def test_what_cannot_be_assigned(pipe: PaintByExample, name: str, message: str):
    before = vars(pipe).copy()
    with pytest.raises(AttributeError, match=message):
        setattr(pipe, name, 1)
    assert vars(pipe) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("conventions", "mine", "no conventions 'mine'"),
        ("conventions", ["original"], "no conventions"),
        ("watermark", "yes", "watermark: str; it must be True or False"),
        ("safety_checker", 3, "safety_checker: int; it must be None"),
        ("safety_checker", lambda images, clip_input: (images, [False]), "it must be None"),
        ("solver", "magic", "no solver 'magic'"),
    ],
)
def test_values_that_cannot_be_assigned(pipe: PaintByExample, name: str, value: Any, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        setattr(pipe, name, value)


def test_a_checker_that_answers_as_theirs(pipe: PaintByExample, scene: Scene):
    pipe.safety_checker = lambda images, **_: (images, False)
    with pytest.raises(TypeError, match="it must return one bool an image; None turns"):
        pipe(scene.exemplar, scene.picture, scene.mask, num_inference_steps=1)
    pipe.safety_checker = lambda images: [True] * len(images)
    assert pipe(scene.exemplar, scene.picture, scene.mask, num_inference_steps=1)[1] == [True]
    pipe.safety_checker = None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("enable_freeu", "a pipeline has no 'enable_freeu': FreeU"),
        ("solvr", "a pipeline has no 'solvr'; did you mean 'solver'?"),
        ("num_inference_steps", "it is an argument of the call"),
    ],
)
def test_what_is_not_there(pipe: PaintByExample, name: str, message: str):
    assert not hasattr(pipe, name)
    with pytest.raises(AttributeError, match=message):
        getattr(pipe, name)


def test_the_progress_bar(pipe: PaintByExample, capsys: pytest.CaptureFixture[str]):
    pipe.set_progress_bar_config(desc="mine")
    assert list(pipe.progress_bar(range(3))) == [0, 1, 2]
    with pipe.progress_bar(total=2) as bar:
        bar.update(2)
    assert capsys.readouterr().err.count("mine: 100%") == 2
    pipe.set_progress_bar_config(disable=True)
    assert list(pipe.progress_bar(range(3))) == [0, 1, 2]
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="an iterable or a total"):
        pipe.progress_bar()
    with pytest.raises(
        TypeError, match="the progress bar has no setting 'colours'; there are: iterable, desc"
    ):
        pipe.set_progress_bar_config(colours="red")


def test_arguments_of_loading(folder: Path, pipe: PaintByExample, caplog: pytest.LogCaptureFixture):
    loaded = PaintByExamplePipeline.from_pretrained(
        pretrained_model_name_or_path=folder,
        torch_dtype=torch.float16,
        device=torch.device("cpu"),
        device_map="cpu",
        variant=None,
        use_safetensors=True,
        safety_checker=None,
        requires_safety_checker=False,
        low_cpu_mem_usage=True,
        custom_pipeline=None,
    )
    assert loaded.dtype == torch.float16
    assert not [each for each in caplog.records if "safety checker" in each.message]
    assert PaintByExample.download(folder) == folder


def test_parts_in_place_of_the_models_own(folder: Path, pipe: PaintByExample, scene: Scene):
    """As ``vae=`` and the like, a scheduler and a feature extractor of the libraries themselves."""
    from diffusers import EulerDiscreteScheduler
    from transformers import CLIPImageProcessor

    size = pipe.model.config.exemplar_encoder.image_size
    extractor = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": size, "width": size})
    loaded = PaintByExample.from_pretrained(
        folder,
        unet=pipe.unet,
        vae=pipe.vae,
        image_encoder=pipe.image_encoder,
        scheduler=EulerDiscreteScheduler.from_config(pipe.scheduler.config),
        feature_extractor=extractor,
    )
    assert (loaded.unet, loaded.vae, loaded.image_encoder) == (pipe.unet, pipe.vae, pipe.image_encoder)
    assert loaded.solver == "euler"
    assert loaded.feature_extractor["size"] == {"shortest_edge": 40}
    call = {"num_inference_steps": 2, "output_type": "np", "conventions": "diffusers"}
    inputs = (scene.exemplar, scene.picture, scene.mask)
    edits = [
        each(*inputs, **call, solver="euler", generator=torch.Generator().manual_seed(0)).images
        for each in (loaded, pipe)
    ]
    assert np.abs(edits[0] - edits[1]).max() > 1e-4  # another crop of the exemplar


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"torch_dtpe": None}, "no argument 'torch_dtpe'; did you mean 'torch_dtype'?"),
        ({"zzz": 1}, "no argument 'zzz'; there are: pretrained_model"),
        ({"unet": None}, "unet is None, but an edit needs it"),
        ({"unet": nn.Linear(1, 1)}, "unet: torch's Linear; it must be a pipeline's here, such as"),
        ({"torch_dtype": "float16"}, "dtype: 'float16'; it must be a floating-point torch.dtype"),
        ({"torch_dtype": torch.int8}, "dtype: torch.int8"),
        ({"torch_dtype": torch.float16, "dtype": torch.float32}, "give one of them"),
        ({"device_map": "auto"}, "not spread over devices"),
        ({"variant": 16}, "variant must be a str or None"),
        ({"variant": "fp16"}, r"has no weights of the variant 'fp16' \(there is: no variant\)"),
        ({"use_safetensors": False}, "holds no pickles, which use_safetensors=False asks for"),
        ({"custom_pipeline": "x"}, "custom_pipeline cannot be used: there is one pipeline"),
        ({"quantization_config": {}}, "quantization_config cannot be used"),
        ({"scheduler": "ddim"}, "scheduler: str"),
        ({"feature_extractor": 3}, "feature_extractor: int; it must be a CLIPImageProcessor"),
    ],
    ids=str,
)
def test_arguments_of_loading_that_cannot_be_followed(folder: Path, settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        PaintByExample.from_pretrained(folder, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": True}, "layout: bool; it must be a name"),
        ({"dtype": "half"}, "dtype: 'half'; it must be a floating-point torch.dtype"),
        ({"dtype": torch.float8_e5m2}, "dtype: torch.float8_e5m2"),
        ({"safe_serialization": False}, "never pickles"),
        ({"variant": "fp16"}, "dtype=torch.float16 writes them in half precision"),
        ({"push_to_hub": True}, r"call pipe.push_to_hub\(repo_id\)"),
    ],
)
def test_arguments_of_saving_that_cannot_be_followed(
    pipe: PaintByExample, tmp_path: Path, settings: dict[str, Any], message: str
):
    with pytest.raises((TypeError, ValueError), match=message):
        pipe.save_pretrained(tmp_path / "model", **settings)
    assert not (tmp_path / "model").exists()
