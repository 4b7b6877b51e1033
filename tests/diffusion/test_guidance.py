"""Classifier-free guidance: how often the network runs, on what, and what becomes of its answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pbe.config import ScheduleConfig
from pbe.diffusion.guidance import guided, guided_in, noise_from_v
from pbe.diffusion.schedule import make_schedule

SCHEDULE = make_schedule(ScheduleConfig())
CONDITION, NULL = torch.randn(2, 2, 1, 6, generator=torch.Generator().manual_seed(1)).unbind(0)
X = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(2))
T = torch.tensor([400, 400])


class Network:
    """Adds the mean of the condition to x; remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        self.calls.append((x, timesteps, condition))
        return x + condition.mean(dim=(1, 2)).view(-1, 1, 1, 1)


def test_scale_one_runs_the_condition_alone() -> None:
    network = Network()
    result = guided(network, CONDITION, NULL, 1.0)(X, T)
    ((x, timesteps, condition),) = network.calls
    assert torch.equal(x, X)
    assert torch.equal(timesteps, T)
    assert torch.equal(condition, CONDITION)
    assert torch.equal(result, Network()(X, T, CONDITION))


def test_both_branches_run_in_one_call_null_first() -> None:
    network = Network()
    guided(network, CONDITION, NULL, 5.0)(X, T)
    ((x, timesteps, condition),) = network.calls
    assert torch.equal(condition, torch.cat([NULL, CONDITION]))
    assert torch.equal(x, torch.cat([X, X]))
    assert torch.equal(timesteps, torch.cat([T, T]))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 2.5, 5.0])
def test_result_is_linear_in_the_scale(scale: float) -> None:
    null, conditional = Network()(X, T, NULL), Network()(X, T, CONDITION)
    expected = null + scale * (conditional - null)
    torch.testing.assert_close(guided(Network(), CONDITION, NULL, scale)(X, T), expected)


def test_guidance_on_v_equals_guidance_on_the_noise_it_stands_for() -> None:
    outside = noise_from_v(guided(Network(), CONDITION, NULL, 3.0), SCHEDULE)(X, T)

    def network(x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        return noise_from_v(lambda a, b: Network()(a, b, condition), SCHEDULE)(x, timesteps)

    torch.testing.assert_close(guided(network, CONDITION, NULL, 3.0)(X, T), outside)


def test_outside_of_the_interval_the_condition_runs_alone() -> None:
    network, timesteps = Network(), [999, 800, 400, 200, 0]
    both = guided(network, CONDITION, NULL, 5.0)
    alone = guided(network, CONDITION, NULL, 1.0)
    predict = guided_in((0.2, 800 / 999), both, alone, timesteps, 999)
    made = [predict(X, T * 0 + timestep) for timestep in timesteps]
    assert [len(x) // len(X) for x, _, _ in network.calls] == [1, 2, 2, 2, 1]
    for index, result in enumerate(made):
        scale = 5.0 if index in (1, 2, 3) else 1.0
        torch.testing.assert_close(result, guided(Network(), CONDITION, NULL, scale)(X, T))
