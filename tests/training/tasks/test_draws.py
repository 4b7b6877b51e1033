"""Draws of a training step are functions of the seed and the sample's global index, and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pbe.training.tasks.encoding import Draws, batch_drop, draw

SHAPE = (3, 4, 5)
FIELDS = ("timesteps", "drop", "noise", "image_noise", "masked_noise")


def draws(indices, seed: int = 5, stream: str = "train", shape=SHAPE) -> Draws:
    return draw(seed, torch.as_tensor(indices), shape, 1000, stream)


def same(first: Draws, second: Draws) -> list[bool]:
    return [torch.equal(getattr(first, name), getattr(second, name)) for name in FIELDS]


def test_a_global_batch_cut_in_any_way_has_the_same_draws():
    whole, parts = draws(range(100, 108)), [draws([100, 101]), draws(range(102, 108))]
    for name in FIELDS:
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name


def test_draws_do_not_depend_on_order_company_or_global_random_state():
    alone = draws([7])
    torch.manual_seed(1)
    np.random.seed(1)
    reversed_batch = draws([9, 8, 7])
    for name in FIELDS:
        assert torch.equal(getattr(reversed_batch, name)[2:], getattr(alone, name)), name


def test_shapes_types_and_ranges():
    made = draws(range(6))
    assert made.timesteps.dtype == torch.int64
    assert made.drop.dtype == torch.float64
    assert (made.timesteps.shape, made.drop.shape) == ((6,), (6,))
    for noise in (made.noise, made.image_noise, made.masked_noise):
        assert noise.shape == (6, *SHAPE)
        assert noise.dtype == torch.float32


def test_latents_of_another_shape_leave_timestep_and_drop_alone():
    small, large = draws(range(4)), draws(range(4), shape=(4, 8, 8))
    assert torch.equal(small.timesteps, large.timesteps)
    assert torch.equal(small.drop, large.drop)


@pytest.mark.parametrize(
    "other", [draws(range(8), seed=6), draws(range(8), stream="validation"), draws(range(8, 16))]
)
def test_another_seed_stream_or_index_draws_anew(other: Draws):
    assert same(draws(range(8)), other) == [False] * len(FIELDS)


def test_statistics():
    count = 4000
    made = draws(range(count), shape=(1, 2, 2))
    histogram = np.bincount(made.timesteps.numpy() // 100, minlength=10)
    expected = count / 10
    # chi-square with 9 degrees of freedom: above 27.9 once in a thousand
    assert ((histogram - expected) ** 2 / expected).sum() < 27.9
    assert made.timesteps.min() < 10
    assert made.timesteps.max() >= 990
    # five standard errors each
    assert abs(float((made.drop < 0.2).double().mean()) - 0.2) < 5 * (0.16 / count) ** 0.5
    flat = torch.stack([made.noise, made.image_noise, made.masked_noise]).reshape(3, -1).double()
    error = flat.shape[1] ** -0.5
    assert flat.mean(dim=1).abs().max() < 5 * error
    assert (flat.var(dim=1) - 1).abs().max() < 5 * 2**0.5 * error
    assert (torch.corrcoef(flat) - torch.eye(3)).abs().max() < 5 * error
    kinds = torch.stack([made.timesteps.double(), made.drop, made.noise[:, 0, 0, 0].double()])
    assert (torch.corrcoef(kinds) - torch.eye(3)).abs().max() < 5 * count**-0.5


def test_the_drop_of_a_whole_batch_is_a_function_of_the_optimizer_step():
    values = np.array([batch_drop(5, step) for step in range(2000)])
    assert batch_drop(5, 17) == values[17]
    assert batch_drop(6, 17) != values[17]
    assert abs((values < 0.2).mean() - 0.2) < 5 * (0.16 / 2000) ** 0.5
    assert len(set(values.tolist())) == 2000
