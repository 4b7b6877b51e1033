"""The safety checker against diffusers' on tiny random models, and files that do not fit it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from pbe.editing.preprocess import cropped_pixels
from pbe.editing.safety import SafetyChecker, load_safety_checker, save_safety_checker
from pbe.errors import UserError
from tests.models.tiny import relative

VISION = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 16,
    "projection_dim": 24,
}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_reference(**vision: object) -> StableDiffusionSafetyChecker:
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=VISION | vision, text_config=TEXT, projection_dim=24)
    reference = StableDiffusionSafetyChecker(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape))
    return reference


@pytest.fixture(scope="module")
def reference() -> StableDiffusionSafetyChecker:
    return make_reference()


@pytest.fixture
def folder(reference: StableDiffusionSafetyChecker, tmp_path: Path) -> Path:
    reference.save_pretrained(tmp_path / "checker")
    return tmp_path / "checker"


def pictures(count: int = 24) -> np.ndarray:
    """Float images in [0, 1] of many kinds: noise of every coarseness and colour."""
    rng = np.random.default_rng(0)
    result = []
    for index in range(count):
        side = (2, 3, 5, 8, 20, 64)[index % 6]
        small = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        tint = rng.uniform(0.2, 1.0, 3)
        result.append(np.asarray(small.resize((80, 64), Image.Resampling.NEAREST)) / 255.0 * tint)
    return np.stack(result).astype(np.float32)


def their_flags(reference: StableDiffusionSafetyChecker, images: np.ndarray) -> list[bool]:
    """What diffusers' pipeline says, which turns the images into PIL images for CLIP's processor."""
    processor = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    as_pil = [Image.fromarray(np.round(image * 255).astype(np.uint8)) for image in images]
    pixels = processor(as_pil, return_tensors="pt").pixel_values
    _, flags = reference(clip_input=pixels, images=images.copy())
    return [bool(flag) for flag in flags]


def set_thresholds(
    reference: StableDiffusionSafetyChecker, checker: SafetyChecker, concept: float, special: float
) -> None:
    reference.concept_embeds_weights.fill_(concept)
    reference.special_care_embeds_weights.fill_(special)
    checker.concept_thresholds.fill_(concept)
    checker.special_thresholds.fill_(special)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_flags_are_those_of_diffusers(activation: str, tmp_path: Path) -> None:
    reference = make_reference(hidden_act=activation)
    reference.save_pretrained(tmp_path)
    checker, images, seen = load_safety_checker(tmp_path), pictures(), []
    margins = closest(checker, images)
    # thresholds in the midst of what occurs, with special care for none, some and all of the images
    for concept in np.quantile(margins, [0.1, 0.5, 0.9]):
        for special in (2.0, float(np.quantile(margins, 0.3)), -2.0):
            set_thresholds(reference, checker, float(concept), special)
            flags = checker(images)
            assert flags == their_flags(reference, images)
            assert flags == checker([Image.fromarray(np.round(x * 255).astype(np.uint8)) for x in images])
            seen.append(sum(flags))
    assert {0 < count < len(images) for count in seen} == {True}


def closest(checker: SafetyChecker, images: np.ndarray) -> np.ndarray:
    """Cosine of each image's closest concept."""
    checker.concept_thresholds.zero_()
    checker.special_thresholds.fill_(2.0)
    pixels = torch.stack(
        [cropped_pixels(np.round(image * 255).astype(np.uint8), checker.crop) for image in images]
    )
    return checker.margins(pixels).max(dim=1).values.numpy()


def test_embedding_is_theirs(reference: StableDiffusionSafetyChecker, folder: Path) -> None:
    checker, pixels = load_safety_checker(folder), torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        expected = reference.visual_projection(reference.vision_model(pixels)[1])
        assert relative(checker.projection(checker.tower(pixels)), expected) < 1e-5


@pytest.mark.parametrize(
    ("cosine", "special", "flagged"),
    [
        (0.5004, 0.0, False),  # rounded to 0.500
        (0.5006, 0.0, True),
        (0.4906, 0.3004, False),
        (0.4906, 0.3006, True),  # special care adds 0.01
        (0.4904, 0.9, False),
    ],
)
def test_scores_are_rounded_and_special_care_adds_a_hundredth(
    folder: Path, cosine: float, special: float, flagged: bool
) -> None:
    checker = load_safety_checker(folder)
    checker.tower, checker.projection = torch.nn.Flatten(), torch.nn.Identity()
    checker.projection.weight = torch.zeros(1)
    # the embedding is the first axis, so that a direction's first coordinate is its cosine
    checker.concepts = torch.tensor([[cosine, (1 - cosine**2) ** 0.5, 0.0]])
    checker.special = torch.tensor([[special, 0.0, (1 - special**2) ** 0.5]])
    checker.concept_thresholds, checker.special_thresholds = torch.tensor([0.5]), torch.tensor([0.3])
    margins = checker.margins(torch.tensor([[[[7.0]], [[0.0]], [[0.0]]]]))
    assert bool(margins.max() > 0) is flagged


def test_pickles_and_names_of_every_age(folder: Path) -> None:
    """The published file: a pickle with two levels of ``vision_model`` and counted positions."""
    new = load_safety_checker(folder).state_dict()
    state = load_file(folder / "model.safetensors")
    state = {
        key.replace("vision_model.", "vision_model.vision_model."): value for key, value in state.items()
    }
    state["vision_model.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    old = load_safety_checker(folder).state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in new)


def test_saved_checker_loads_here_and_there(
    reference: StableDiffusionSafetyChecker, folder: Path, tmp_path: Path
) -> None:
    checker = load_safety_checker(folder)
    save_safety_checker(tmp_path / "saved", checker)
    again = load_safety_checker(tmp_path / "saved")
    assert (again.sizes, again.crop) == (checker.sizes, checker.crop)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in checker.state_dict().items())
    theirs = StableDiffusionSafetyChecker.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in reference.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder: Path, dtype: torch.dtype) -> None:
    checker, half = load_safety_checker(folder), load_safety_checker(folder, dtype=dtype)
    assert {value.dtype for value in half.state_dict().values()} == {dtype}
    pixels = torch.randn(4, 3, 48, 48)
    assert float((half.margins(pixels) - checker.margins(pixels)).abs().max()) < 0.05


def test_images_it_does_not_take(folder: Path) -> None:
    checker = load_safety_checker(folder)
    assert checker([]) == []
    for wrong in (np.zeros((1, 8, 8, 3), np.uint8), np.zeros((8, 8, 3)), [np.zeros((8, 8, 3))]):
        with pytest.raises(UserError, match="safety checker"):
            checker(wrong)


def test_numbers_that_are_none_do_not_pass_for_safe(folder: Path) -> None:
    checker = load_safety_checker(folder)
    checker.projection.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="infinite"):
        checker(pictures(1))
    checker = load_safety_checker(folder)
    checker.special.fill_(float("nan"))
    with pytest.raises(UserError, match="infinite"):
        checker(pictures(1))


@pytest.fixture
def damaged(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder, and its tensors to write back with changes."""
    return folder, load_file(folder / "model.safetensors")


def refuses(folder: Path, tensors: dict[str, torch.Tensor], match: str) -> None:
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=match):
        load_safety_checker(folder)


def test_tensors_that_do_not_fit(damaged: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, tensors = damaged
    key = "vision_model.encoder.layers.1.mlp.fc2.bias"
    refuses(folder, {k: v for k, v in tensors.items() if k != key}, f"1 missing: {key}")
    refuses(folder, tensors | {"logit_scale": torch.ones(1)}, "1 unexpected: logit_scale")
    refuses(folder, tensors | {key: torch.zeros(5)}, f"1 misshapen: {key}")
    refuses(folder, tensors | {"concept_embeds": torch.full((17, 24), float("nan"))}, "NaN")
    tower = {k: v for k, v in tensors.items() if k.startswith("vision_model")}
    refuses(folder, tower, "not a safety checker")


def test_folders_that_hold_no_checker(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_safety_checker(tmp_path / "nowhere")
    config = folder / "config.json"
    values = json.loads(config.read_text())
    values["vision_config"]["hidden_act"] = "relu"
    config.write_text(json.dumps(values))
    with pytest.raises(UserError, match="relu"):
        load_safety_checker(folder)
    config.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_safety_checker(folder)
    config.write_text("[]")
    with pytest.raises(UserError, match="not an object of settings"):
        load_safety_checker(folder)
    config.write_text("{}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_safety_checker(folder)


def test_processor_settings_of_the_folder_are_used(folder: Path) -> None:
    settings = {"size": 60, "crop_size": 48, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    crop = load_safety_checker(folder).crop
    assert dataclasses.astuple(crop) == (60, 48, "bilinear", (0.5,) * 3, (0.5,) * 3)
