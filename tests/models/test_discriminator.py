"""The patch discriminator, its loss and the weight of the adversarial term."""

from __future__ import annotations

import pytest
import torch

from pbe.models.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss


def test_the_sizes_are_those_of_the_original():
    judge = PatchDiscriminator()
    kernels = [tuple(p.shape) for p in judge.parameters() if p.ndim == 4]
    assert kernels == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]
    assert judge(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    assert PatchDiscriminator(16, 2)(torch.zeros(1, 3, 12, 12)).shape == (1, 1, 1, 1)


@pytest.mark.parametrize(("layers", "side"), [(1, 16), (2, 34), (3, 70)])
def test_a_patch_is_as_wide_as_it_says(layers: int, side: int):
    judge = PatchDiscriminator(16, layers)
    for module in judge.modules():  # a norm sees the whole map
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
    picture = torch.randn(1, 3, 128, 128, requires_grad=True)
    numbers = judge(picture)
    numbers[0, 0, numbers.shape[2] // 2, numbers.shape[3] // 2].backward()
    rows = picture.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == side


def test_a_batch_is_judged_as_its_images_are():
    judge, pictures = PatchDiscriminator(16, 2), torch.randn(4, 3, 32, 32)
    one_by_one = torch.cat([judge(picture) for picture in pictures.split(1)])
    assert torch.allclose(judge(pictures), one_by_one, atol=1e-6)


def test_the_hinge_lets_go_of_what_is_sure():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert float(hinge_loss(real, fake)) == pytest.approx(0.5 * (0.25 + 0.5))
    assert float(hinge_loss(real + 9, fake - 9)) == 0.0


def test_the_weight_makes_both_gradients_equally_long():
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, adversarial = 3.0 * last.sum(), (last * torch.tensor([0.3, 0.4])).sum()
    weight = adaptive_weight(reconstruction, adversarial, last)
    assert not weight.requires_grad
    assert float(weight) == pytest.approx(18**0.5 / 0.5001)
    assert last.grad is None
    (reconstruction + weight * adversarial).backward()  # the graphs are still there
    assert float(adaptive_weight(1e9 * last.sum(), (0.0 * last).sum(), last)) == 1e4


@pytest.mark.parametrize("adversarial_scale", [1.0, 1e-3, 1e-7])
def test_a_mean_has_the_weight_of_the_sum_divided_by_its_elements(adversarial_scale: float) -> None:
    """The original's loss sums over an image: all of it divided by the elements is the same training."""
    torch.manual_seed(0)
    last = torch.randn(3, 4, requires_grad=True)
    image = torch.randn(2, 5, 4)
    elements = 5 * 3  # of an image that the layer gives
    summed = (image @ last.T).abs().sum(dim=(1, 2)).mean()
    adversarial = -adversarial_scale * (image @ last.T).mean()
    original = adaptive_weight(summed, adversarial, last)
    here = adaptive_weight(summed / elements, adversarial, last, elements)
    assert float(here) * elements == pytest.approx(float(original), rel=1e-5)
    if adversarial_scale == 1e-7:  # the limit of the original, 1e4, in units of a mean
        assert float(original) == 1e4
        assert float(here) == pytest.approx(1e4 / elements)


def test_the_limit_of_a_published_image_is_a_196608th() -> None:
    last = torch.ones(2, requires_grad=True)
    weight = adaptive_weight(1e9 * last.sum(), (0.0 * last).sum(), last, 3 * 256 * 256)
    assert float(weight) == pytest.approx(1e4 / 196_608)
