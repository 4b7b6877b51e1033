"""The mask-aware decoder: plain when fresh, blind to the hole, the same in bands."""

from __future__ import annotations

import copy

import pytest
import torch

from pbe.config import AutoencoderConfig
from pbe.models import AutoencoderKL, tiling
from pbe.models.codec import known_pixels
from tests.models.tiny import relative

PLAIN = AutoencoderConfig(
    channels=16, channel_mult=[1, 2, 4], num_res_blocks=1, norm_groups=8, mid_attention=False
)


@pytest.fixture
def plain() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(PLAIN).eval().requires_grad_(False)


@pytest.fixture
def trained(plain: AutoencoderKL) -> AutoencoderKL:
    """The same weights with a branch that has learnt something."""
    model = copy.deepcopy(plain)
    model.make_mask_aware()
    for projection in model.decoder.known.projections:
        torch.nn.init.normal_(projection.weight, std=0.3)
    return model.requires_grad_(False)


@pytest.fixture
def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, images, and a mask whose right half is the hole."""
    torch.manual_seed(1)
    keep = torch.ones(2, 1, 40, 24)
    keep[..., 12:] = 0.0
    return torch.randn(2, 4, 10, 6), torch.rand(2, 3, 40, 24) * 2 - 1, keep


def test_a_fresh_branch_changes_no_bit(plain, given):
    latents, pictures, keep = given
    fresh = copy.deepcopy(plain)
    fresh.make_mask_aware()
    assert fresh.config == AutoencoderConfig(**(vars(PLAIN) | {"mask_aware_decoder": True}))
    assert fresh.state_dict().keys() == AutoencoderKL(fresh.config).state_dict().keys()
    assert torch.equal(fresh.decode(latents, known_pixels(pictures, keep)), plain.decode(latents))
    assert plain.config == PLAIN


def test_what_is_known_is_used_and_what_is_not_is_not(plain, trained, given):
    latents, pictures, keep = given
    told = trained.decode(latents, known_pixels(pictures, keep))
    assert relative(told, plain.decode(latents)) > 1e-2
    other = torch.where(keep.bool(), pictures, torch.rand_like(pictures))
    assert torch.equal(trained.decode(latents, known_pixels(other, keep)), told)
    assert not torch.equal(trained.decode(latents, known_pixels(pictures.flip(2), keep)), told)
    # every resolution of the decoder is told
    for projection in trained.decoder.known.projections:
        less = copy.deepcopy(trained)
        index = list(trained.decoder.known.projections).index(projection)
        torch.nn.init.zeros_(less.decoder.known.projections[index].weight)
        assert not torch.equal(less.decode(latents, known_pixels(pictures, keep)), told)


def test_a_hole_that_is_everywhere_is_the_plain_decoder(plain, trained, given):
    latents, pictures, keep = given
    assert torch.equal(trained.decode(latents, known_pixels(pictures, 0 * keep)), plain.decode(latents))
    assert torch.equal(trained.decode(latents), plain.decode(latents))


def test_bands_give_the_numbers_of_the_undivided_pass(trained, given, monkeypatch):
    monkeypatch.setattr(tiling, "POSITIONS", 1)
    monkeypatch.setattr(tiling, "MIN_ROWS", 3)
    latents, pictures, keep = given
    known, banded = known_pixels(pictures, keep), copy.copy(trained)
    banded.tile_above = 0
    with torch.no_grad():
        assert relative(banded.decode(latents, known), trained.decode(latents, known)) < 1e-5


def test_gradients_reach_the_whole_branch(trained, given):
    latents, pictures, keep = given
    trained.requires_grad_(True)
    trained.decode(latents, known_pixels(pictures, keep)).square().mean().backward()
    assert all(p.grad.any() for p in trained.decoder.known.parameters())


def test_the_branch_learns_to_hand_pixels_through(plain, given):
    latents, pictures, keep = given
    plain.make_mask_aware()
    branch, known = plain.decoder.known.requires_grad_(True), known_pixels(pictures, keep)
    optimizer = torch.optim.Adam(branch.parameters(), lr=1e-2)
    errors = []
    for _ in range(40):
        error = ((plain.decode(latents, known) - pictures) * keep).square().sum() / (3 * keep.sum())
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]
