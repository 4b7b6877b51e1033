"""Values of scores, as `score` returns them, against computations that are written out here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from pbe.errors import UserError
from pbe.evaluation.metrics.base import Score
from pbe.evaluation.metrics.pixels import seam
from pbe.evaluation.metrics.scoring import ScoreSettings, score
from pbe.evaluation.metrics.towers import TOWERS, TowerSpec, build_network, load_tower
from tests.evaluation.metrics.test_feature_scores import FEW, SMALL, random_weights
from tests.evaluation.metrics.test_scoring import by_name, make

OTHER = "vit/48x1-patch56-heads2-mlp64"
CLIPS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # mean, std
IMAGENETS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(picture: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def stretched(picture: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC))


def expected_cosines(network, numbers, cases, edits, *, paper: bool = False) -> np.ndarray:
    """Cosines of the hole, rows 6 to 17 and columns 5 to 14 of every case, with the exemplar."""
    found = []
    for case, edit in zip(cases, edits, strict=True):
        shown = normalised(stretched(edit[6:18, 5:15]), *numbers)
        if paper:  # its last row and column are lost, and it is stretched once it is normalised
            cut = normalised(edit, *numbers)[:, :, 6:17, 5:14]
            shown = F.interpolate(cut, size=(224, 224), mode="bilinear", align_corners=False)
        exemplar = normalised(stretched(case.exemplar), *numbers)
        with torch.inference_mode():
            found.append(F.cosine_similarity(network(shown), network(exemplar)).item())
    return np.array(found)


@pytest.fixture
def scored(tmp_path: Path):
    """Cases and edits, two towers of other sizes and weights, and the four similarities made with them."""
    towers = {"clip": SMALL, "dino": OTHER}
    files, networks = {"clip": str(random_weights(tmp_path))}, {}
    torch.manual_seed(2)
    other = build_network(TowerSpec(OTHER))
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    files["dino"] = str(tmp_path / "dino.safetensors")
    save_file(other.state_dict(), files["dino"])
    networks["dino"] = other.eval()
    networks["clip"] = load_tower("clip", SMALL, files["clip"]).network
    cases, edits = make(3)
    names = ("region-clip", "region-clip-corrected", "clip-similarity", "dino-similarity")
    settings = ScoreSettings(names, batch_size=2, weights=files, architectures=towers, bootstrap=FEW)
    return cases, edits, networks, by_name(score(cases, edits, settings))


def check(found: Score, expected: np.ndarray) -> None:
    scale = float(np.abs(expected).max())
    assert found.per_case == pytest.approx(expected, abs=1e-5 * scale)
    assert found.value == pytest.approx(expected.mean(), abs=1e-5 * scale)
    assert found.low <= found.value <= found.high
    assert found.better == "higher"
    assert len(found.card.reference_sha256) == 64, "the exemplars are what it compares with"


def test_clip_scores_by_hand(scored):
    cases, edits, networks, found = scored
    whole = expected_cosines(networks["clip"], CLIPS, cases, edits)
    paper = expected_cosines(networks["clip"], CLIPS, cases, edits, paper=True)
    assert np.abs(whole - paper).max() > 3e-5, "a test that cannot tell the crops apart"
    check(found["clip-similarity"], whole)
    check(found["region-clip-corrected"], 100 * whole)
    check(found["region-clip"], 100 * paper)


def test_dino_similarity_by_hand(scored):
    cases, edits, networks, found = scored
    expected = expected_cosines(networks["dino"], IMAGENETS, cases, edits)
    others = expected_cosines(networks["dino"], CLIPS, cases, edits)
    assert np.abs(expected - others).max() > 3e-5, "a test that cannot tell the normalisations apart"
    check(found["dino-similarity"], expected)


@pytest.mark.parametrize(("role", "numbers"), [("clip", CLIPS), ("dino", IMAGENETS)])
def test_every_tower_has_its_own_normalisation(tmp_path, role, numbers):
    tower = load_tower(role, SMALL, str(random_weights(tmp_path)))
    picture = make(1)[1][0]
    assert tower.normalise(picture).numpy() == pytest.approx(
        normalised(picture, *numbers)[0].numpy(), abs=1e-5
    )


@pytest.mark.parametrize("quick", [True, False])
def test_towers_of_open_clip_are_open_clips(tmp_path, monkeypatch, quick):
    config = {
        "embed_dim": 24,
        "quick_gelu": quick,
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 32, "head_width": 16, "patch_size": 56},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small", config)
    model, _, preprocess = open_clip.create_model_and_transforms("Small")
    for parameter in model.visual.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    torch.save(model.state_dict(), tmp_path / "small.pt")
    picture = np.random.default_rng(0).integers(0, 256, (250, 300, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = model.encode_image(preprocess(Image.fromarray(picture))[None])[0].numpy()
    found = load_tower("clip", "Small", str(tmp_path / "small.pt")).whole([picture])[0]
    assert found.shape == (24,)
    assert found == pytest.approx(expected, abs=1e-4 * float(np.abs(expected).max()))


def test_the_papers_tower_is_openais_with_its_own_activation():
    with torch.device("meta"):  # no memory, no time
        clip, dino = (build_network(TOWERS[role]) for role in ("clip", "dino"))
        features = clip(torch.empty(1, 3, 224, 224)), dino(torch.empty(1, 3, 224, 224))
    kinds = {type(module).__name__ for module in clip.modules() if "GELU" in type(module).__name__}
    assert kinds == {"QuickGELU"}
    assert {type(block.mlp.act).__name__ for block in dino.blocks} == {"GELU"}
    assert (clip.conv1.out_channels, len(clip.transformer.resblocks)) == (768, 12)
    assert (dino.num_features, len(dino.blocks)) == (768, 12)
    assert [each.shape for each in features] == [(1, 512), (1, 768)]
    assert (TOWERS["clip"].mean, TOWERS["clip"].std) == CLIPS
    assert (TOWERS["dino"].mean, TOWERS["dino"].std) == IMAGENETS


def test_lite2_weights_that_are_junk_or_anothers_are_one_line(tmp_path):
    torch.save({"features.0.weight": torch.ones(2)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"_blocks.20.weight": torch.ones(2)}, tmp_path / "strange.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("other", "list", "strange", "junk", "empty"):
        with pytest.raises(UserError, match=rf"{name}\.pth' holds no weights of EfficientNet-Lite2"):
            load_tower("lite2", None, str(tmp_path / f"{name}.pth"))


def test_towers_of_another_input_size_are_refused():
    with pytest.raises(UserError, match="takes images of 518 pixels; the score's have 224"):
        build_network(TowerSpec("timm/vit_small_patch14_dinov2"))


def test_seam_is_the_geometric_mean_of_the_ratios():
    cases, edits = make(4)
    for index, edit in enumerate(edits):
        edit[6:18, 5:15] = edit[6:18, 5:15] // (index + 1)  # other steps in every case
    (found,) = score(cases, edits, ScoreSettings(("seam",), batch_size=3))
    ratios = np.array([seam(case.image, edit, case.mask) for case, edit in zip(cases, edits, strict=True)])
    assert np.ptp(ratios) > 0.01
    assert found.per_case == pytest.approx(ratios)
    assert found.value == pytest.approx(np.exp(np.mean(np.log(ratios))))
    assert found.value != pytest.approx(ratios.mean())
    assert 0.0 < found.low < found.value < found.high


def test_psnr_is_of_the_mean_error_and_inside_its_interval():
    cases, edits = make(6)
    for index, edit in enumerate(edits):
        edit[0, : index + 1] ^= 8
    (found,) = score(cases, edits, ScoreSettings(("psnr-outside",), batch_size=4))
    outside = 24 * 24 - 12 * 10
    errors = np.array([(index + 1) * 64 / outside for index in range(6)])
    assert found.per_case == pytest.approx(10 * np.log10(255**2 / errors))
    assert found.value == pytest.approx(10 * np.log10(255**2 / errors.mean()))
    assert found.low < found.value < found.high
    assert found.better == "higher"
