"""The safety checker of Stable Diffusion: CLIP's image tower and the directions of unwanted concepts.

An image is flagged when its embedding comes closer to a concept than the concept's threshold allows. Three
further concepts call for special care: close to one of them, every threshold is a little lower.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.checkpoints.clip import POSITION_IDS, sizes_in_file, vision_config, vision_names
from pbe.checkpoints.diffusers.format import preprocessor_config
from pbe.checkpoints.folders import ANY, CHECKER, FileChoice, open_folder
from pbe.checkpoints.key_map import Entry, checked, to_foreign, to_native
from pbe.checkpoints.settings import read_json
from pbe.checkpoints.tensors import Lazies, lazies
from pbe.config import ExemplarEncoderConfig
from pbe.editing.preprocess import FILTERS, CropSettings, crop_settings, cropped_pixels
from pbe.errors import EditTypeError, EditValueError, UserError
from pbe.files import make_folder
from pbe.models.image_tower import TowerSizes, build_tower

SPECIAL_CARE = 0.01  # what special care adds to every concept's score
DECIMALS = 3  # scores are rounded to so many before they are compared with zero
TOWER = "vision_model."
NAMES = {
    "projection.weight": "visual_projection.weight",
    "concepts": "concept_embeds",
    "concept_thresholds": "concept_embeds_weights",
    "special": "special_care_embeds",
    "special_thresholds": "special_care_embeds_weights",
}


READ_FOR_SIZES = (
    *(f"embeddings.{kind}_embedding.weight" for kind in ("patch", "position")),
    "encoder.layers.0.mlp.fc1.weight",
)


@dataclass(frozen=True)
class CheckerSizes:
    """What fixes the shape of a checker.

    Attributes:
        tower: of the vision transformer.
        image_size: side of the square that it takes, pixels.
        norm_eps: of its layer norms.
        projection: size of the space in which concepts are compared.
        concepts: number of concepts (the published checker has 17).
        special: number of those that call for special care (3).
    """

    tower: TowerSizes
    image_size: int
    norm_eps: float
    projection: int
    concepts: int
    special: int


class SafetyChecker(nn.Module):
    """Tells which images must not be shown; ``crop`` brings them to the tower, None is CLIP's own way."""

    concepts: Tensor
    concept_thresholds: Tensor
    special: Tensor
    special_thresholds: Tensor

    def __init__(self, sizes: CheckerSizes, crop: CropSettings | None = None) -> None:
        super().__init__()
        self.sizes = sizes
        config = ExemplarEncoderConfig(tower=sizes.tower.name, image_size=sizes.image_size)
        self.crop = crop or crop_settings(config)
        self.tower, width = build_tower(config)
        for module in self.tower.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = sizes.norm_eps
        self.projection = nn.Linear(width, sizes.projection, bias=False)
        self.register_buffer("concepts", torch.zeros(sizes.concepts, sizes.projection))
        self.register_buffer("concept_thresholds", torch.zeros(sizes.concepts))
        self.register_buffer("special", torch.zeros(sizes.special, sizes.projection))
        self.register_buffer("special_thresholds", torch.zeros(sizes.special))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: np.ndarray | Sequence[Image.Image]) -> list[bool]:
        """Return for each image, PIL or float ``(b, h, w, 3)`` in [0, 1], whether it is flagged."""
        arrays = _as_bytes(images)
        if not arrays:
            return []
        margins = self.margins(torch.stack([cropped_pixels(array, self.crop) for array in arrays]))
        if not bool(margins.isfinite().all()):
            raise EditValueError("the safety checker gave infinite numbers; load it in float32 or bfloat16")
        return (margins > 0).any(dim=1).tolist()

    def margins(self, pixels: Tensor) -> Tensor:
        """Return by how much each concept is closer than allowed, ``(b, concepts)`` float32; above 0 flags.

        ``pixels`` are ``(b, 3, s, s)``, normalised for the tower.
        """
        weight = self.projection.weight
        embedding = self.projection(self.tower(pixels.to(weight.device, weight.dtype))).float()
        special = _cosine(embedding, self.special) - self.special_thresholds.float()
        careful = (torch.round(special, decimals=DECIMALS) > 0).any(dim=1, keepdim=True)
        scores = _cosine(embedding, self.concepts) - self.concept_thresholds.float()
        # a NaN of the special scores must not pass for "no special care"
        scores = scores + careful * SPECIAL_CARE + 0.0 * special.sum(dim=1, keepdim=True)
        return torch.round(scores, decimals=DECIMALS)


def _cosine(embeddings: Tensor, directions: Tensor) -> Tensor:
    return F.normalize(embeddings) @ F.normalize(directions.float()).T


def _as_bytes(images: np.ndarray | Sequence[Image.Image]) -> list[np.ndarray]:
    if isinstance(images, np.ndarray):
        if images.ndim != 4 or images.shape[3] != 3 or not np.issubdtype(images.dtype, np.floating):
            raise EditTypeError(f"safety checker: {images.dtype} {images.shape}; it takes float (b, h, w, 3)")
        return list(np.round(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8))
    if not all(isinstance(image, Image.Image) for image in images):
        raise EditTypeError("safety checker: images must be PIL images or one float array (b, h, w, 3)")
    return [np.asarray(image.convert("RGB")) for image in images]


def load_safety_checker(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    files: FileChoice = ANY,
) -> SafetyChecker:
    """Load a published safety checker, such as a copy of ``CompVis/stable-diffusion-safety-checker``.

    The folder holds ``config.json`` and the weights, as safetensors or as a pickle, which is read without
    running anything in it; ``preprocessor_config.json`` is used where there is one. ``dtype`` None means
    float32.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"'{folder}' is not a safety checker: it has no config.json")
    config = read_json(folder / "config.json")
    weights = open_folder(folder, files)
    # one level of vision_model, whatever transformers' age, and no counters
    tensors = {re.sub(r"^(vision_model\.)+", TOWER, key): value for key, value in weights.tensors.items()}
    tensors.pop(f"{TOWER}{POSITION_IDS}", None)
    sizes = _sizes(config, tensors, weights.source)
    preprocessor = folder / "preprocessor_config.json"
    crop = crop_settings(
        ExemplarEncoderConfig(tower=sizes.tower.name, image_size=sizes.image_size),
        read_json(preprocessor) if preprocessor.is_file() else None,
    )
    with torch.device("meta"):
        checker = SafetyChecker(sizes, crop)
    entries, expected = _entries(checker), lazies(checker.state_dict())
    state = {
        key: checked(key, tensor, dtype or torch.float32, weights.source).clone()
        for key, tensor in to_native(entries, tensors, expected, weights.source).items()
    }
    checker.load_state_dict(state, assign=True)
    return checker.to(device).eval().requires_grad_(False)


def usable_checker(checker: Any) -> Any:
    """Return a checker that a pipeline can call with images; None stands for none."""
    if checker is None or isinstance(checker, SafetyChecker):
        return checker
    function = checker.forward if isinstance(checker, nn.Module) else checker
    try:
        inspect.signature(function).bind(())
    except (TypeError, ValueError) as error:
        raise EditTypeError(
            f"safety_checker: {type(checker).__name__}; it must be None (no screening), a SafetyChecker "
            "(from_pretrained loads one: safety_checker=FOLDER), or a function from images to one bool each"
        ) from error
    return checker


def flags_of(checker: Any, images: np.ndarray) -> list[bool] | None:
    """Return what a checker says of images, float ``(b, h, w, 3)`` in [0, 1]; None without a checker."""
    if checker is None:
        return None
    found = checker(images)
    if not isinstance(found, Sequence) or len(found) != len(images) or isinstance(found[0], np.ndarray):
        raise EditTypeError("safety_checker: it must return one bool an image; None turns the screening off")
    return [bool(each) for each in found]


def save_safety_checker(folder: str | Path, checker: SafetyChecker) -> None:
    """Write a checker in the published layout: ``config.json``, ``preprocessor_config.json``, safetensors."""
    folder = make_folder(folder)
    state = {key: value.cpu() for key, value in checker.state_dict().items()}
    tensors = to_foreign(_entries(checker), lazies(state))
    published = {key.replace(TOWER, TOWER * 2, 1): tensors[key].read().contiguous() for key in tensors}
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(checker.sizes), indent=2))
    crop = checker.crop
    number = next(number for number, name in FILTERS.items() if name == crop.resample)
    processor = preprocessor_config(crop.shortest_edge, crop.crop, number, crop.mean, crop.std)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def checker_problem(folder: Path, checker: Any) -> str | None:
    """Return what to tell of saving a model with this checker into a folder; None where it will be kept."""
    if checker is not None and not isinstance(checker, SafetyChecker):
        return f"the safety checker is a {type(checker).__name__} and is not saved: the model will have none"
    if checker is None and (folder / CHECKER).is_dir():
        return f"'{folder / CHECKER}' stays as it is: the next load takes it, though there is none now"
    return None


def _sizes(config: dict[str, Any], tensors: Lazies, source: str) -> CheckerSizes:
    wanted = [*NAMES.values(), *(f"{TOWER}{name}" for name in READ_FOR_SIZES)]
    if missing := [key for key in wanted if key not in tensors]:
        raise UserError(f"{source} is not a safety checker of Stable Diffusion: it has no '{missing[0]}'")
    vision = config.get("vision_config") or config.get("vision_config_dict") or {}
    activation = vision.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise UserError(f"{source}: hidden_act '{activation}' is not supported; quick_gelu and gelu are")
    tower, image_size = sizes_in_file(
        tensors, TOWER, heads=vision.get("num_attention_heads", 12), quick_gelu=activation == "quick_gelu"
    )
    return CheckerSizes(
        tower=tower,
        image_size=image_size,
        norm_eps=float(vision.get("layer_norm_eps", 1e-5)),
        projection=tensors["visual_projection.weight"].shape[0],
        concepts=tensors["concept_embeds"].shape[0],
        special=tensors["special_care_embeds"].shape[0],
    )


def _entries(checker: SafetyChecker) -> list[Entry]:
    """Return what each weight is called in the published layout."""
    entries = [Entry(native, (foreign,)) for native, foreign in NAMES.items()]
    for key in checker.tower.state_dict():
        names, kind = vision_names(key)
        entries.append(Entry(f"tower.{key}", tuple(f"{TOWER}{name}" for name in names), kind))
    return entries


def _config(sizes: CheckerSizes) -> dict[str, Any]:
    vision = vision_config(sizes.tower, sizes.image_size)
    vision |= {"layer_norm_eps": sizes.norm_eps, "projection_dim": sizes.projection}
    return {
        "architectures": ["StableDiffusionSafetyChecker"],
        "model_type": "clip",
        "projection_dim": sizes.projection,
        "vision_config": vision,
    }
