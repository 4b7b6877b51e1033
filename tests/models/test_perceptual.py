"""The perceptual distance: against LPIPS's own package, and with files that are none."""

from __future__ import annotations

from pathlib import Path

import lpips
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision.models.vgg import cfgs, make_layers

from pbe.errors import UserError
from pbe.models.exemplar_encoder import ExemplarEncoder
from pbe.models.perceptual import PerceptualDistance, TowerDistance
from pbe.training.tasks.autoencoder import load_perceptual
from tests.models.tiny import CONV_TOWER, TRANSFORMER_TOWER, tiny_encoder_config

LINEAR = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"


@pytest.fixture(scope="module")
def vgg() -> dict[str, torch.Tensor]:
    """Random weights of the state dict's form, without the classifier's half gigabyte."""
    torch.manual_seed(5)
    return {f"features.{key}": value for key, value in make_layers(cfgs["D"]).state_dict().items()}


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(6)
    first = torch.rand(2, 3, 40, 33) * 2 - 1
    return first, (first + 0.3 * torch.randn_like(first)).clamp(-1, 1)


def reference(vgg: dict[str, torch.Tensor], linear: bool) -> lpips.LPIPS:
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, lpips=linear, verbose=False)
    named = {key.removeprefix("features."): value for key, value in vgg.items()}
    for part in (
        theirs.net.slice1,
        theirs.net.slice2,
        theirs.net.slice3,
        theirs.net.slice4,
        theirs.net.slice5,
    ):
        part.load_state_dict({key: named[key] for key in part.state_dict()})
    return theirs


def test_distances_are_those_of_the_lpips_package(vgg, pictures, tmp_path):
    torch.save(vgg | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg.pth")
    ours = load_perceptual(str(tmp_path / "vgg.pth"), str(LINEAR))
    theirs = reference(vgg, linear=True)(*pictures).flatten()
    assert theirs.min() > 1e-3
    assert torch.allclose(ours(*pictures), theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours(pictures[0], pictures[0]), torch.zeros(2))


def test_without_lpips_weights_channels_count_alike(vgg, pictures, tmp_path):
    save_file(vgg, tmp_path / "vgg.safetensors")
    ours = load_perceptual(str(tmp_path / "vgg.safetensors"), "")
    net, scaled = reference(vgg, linear=False).net, [lpips.ScalingLayer()(x) for x in pictures]
    features = [[lpips.normalize_tensor(f) for f in net(x)] for x in scaled]
    expected = sum(((a - b) ** 2).mean(dim=(1, 2, 3)) for a, b in zip(*features, strict=True))
    assert torch.allclose(ours(*pictures), expected, rtol=1e-5, atol=1e-7)


def test_the_gradient_is_finite_where_no_feature_is_active(vgg):
    dead = {key: torch.zeros_like(value) for key, value in vgg.items()}
    first = torch.zeros(1, 3, 32, 32, requires_grad=True)
    PerceptualDistance(dead)(first, torch.ones(1, 3, 32, 32)).sum().backward()
    assert torch.equal(first.grad, torch.zeros_like(first))


def test_nothing_is_trained_and_nothing_grows(vgg):
    network = PerceptualDistance(vgg)
    assert not any(p.requires_grad for p in network.parameters())
    assert len(list(network.parameters())) == 26


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vgg: {"lin0.model.1.weight": torch.ones(1)}, "does not hold torchvision's vgg16"),
        (lambda vgg: {k: v for k, v in vgg.items() if "28" not in k}, "'features.28.weight' is missing"),
        (lambda vgg: vgg | {"features.0.weight": torch.ones(64, 1, 3, 3)}, "does not fit VGG16"),
        (lambda vgg: vgg | {"features.0.bias": torch.full((64,), torch.nan)}, "NaN or infinity"),
        (lambda vgg: [1, 2], "holds no state dict"),
    ],
)
def test_wrong_vgg_weights_are_one_line(vgg, tmp_path, change, message: str):
    torch.save(change(vgg), tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=message) as caught:
        load_perceptual(str(tmp_path / "vgg.pth"), "")
    assert "\n" not in str(caught.value)


def test_wrong_places_and_lpips_weights_are_one_line(vgg, tmp_path):
    path = str(tmp_path / "vgg.pth")
    torch.save(vgg, path)
    with pytest.raises(UserError, match="perceptual_weight needs"):
        load_perceptual("", "")
    with pytest.raises(UserError, match="perceptual_vgg: no file at 'nowhere'"):
        load_perceptual("nowhere", "")
    with pytest.raises(UserError, match="perceptual_linear: no file at 'nowhere'"):
        load_perceptual(path, "nowhere")
    with pytest.raises(UserError, match="does not hold LPIPS weights"):
        load_perceptual(path, path)
    bad = torch.load(LINEAR, map_location="cpu") | {"lin3.model.1.weight": -torch.ones(1, 512, 1, 1)}
    torch.save(bad, tmp_path / "linear.pth")
    with pytest.raises(UserError, match=r"lin3\.model\.1\.weight is not a row of 512 non-negative"):
        load_perceptual(path, str(tmp_path / "linear.pth"))
    (tmp_path / "cut.pth").write_bytes(Path(path).read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut\.pth' is damaged"):
        load_perceptual(str(tmp_path / "cut.pth"), "")


@pytest.mark.parametrize(("tower", "stages"), [(CONV_TOWER, 3), (TRANSFORMER_TOWER, 3), ("RN50", 4)])
def test_distance_on_a_tower_is_the_sum_over_its_maps(tower, stages, pictures):
    """Written out with hooks-free calls of the trunk: unit vectors, squared differences, means."""
    torch.manual_seed(0)
    encoder = ExemplarEncoder(tiny_encoder_config(tower), 24).eval()
    distance = TowerDistance(encoder)
    first, second = (F.interpolate(x, (64, 64)) for x in pictures)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.config.mean, encoder.config.std))
    maps = []
    for images in (first, second):
        pixels = ((images + 1) / 2 - mean) / std
        if hasattr(encoder.tower, "trunk"):
            maps.append(encoder.tower.trunk.forward_intermediates(pixels, intermediates_only=True))
        else:
            maps.append(encoder.tower.forward_intermediates(pixels)["image_intermediates"])
    count = len(maps[0])
    chosen = [k * count // 4 - 1 for k in (1, 2, 3)] if tower == TRANSFORMER_TOWER else list(range(count - 1))
    assert len(chosen) == len(distance.stages)
    expected = sum(
        (1.0 - F.cosine_similarity(maps[0][i], maps[1][i], dim=1)).mul(2.0).mean(dim=(1, 2)) for i in chosen
    )
    torch.testing.assert_close(distance(first, second), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(distance(first, first), torch.zeros(2))


def test_gradients_reach_the_images_and_not_the_tower():
    encoder = ExemplarEncoder(tiny_encoder_config(), 24)
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    TowerDistance(encoder)(images, torch.rand(1, 3, 32, 32)).sum().backward()
    assert bool(images.grad.abs().sum() > 0)
    assert all(p.grad is None for p in encoder.parameters())


def test_a_transformer_sees_images_at_its_own_size():
    encoder = ExemplarEncoder(tiny_encoder_config(TRANSFORMER_TOWER), 24)
    assert TowerDistance(encoder)(torch.rand(1, 3, 24, 40), torch.rand(1, 3, 24, 40)).shape == (1,)
