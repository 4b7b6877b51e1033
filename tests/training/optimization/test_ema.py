"""The moving average against a sequence computed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pbe.training.optimization.optimizer import Ema


def scalar(value: float) -> nn.Module:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def set_to(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        module.weight.fill_(value)


def test_follows_the_closed_form_with_its_warm_up():
    module = scalar(1.0)
    ema = Ema(module, decay=0.25)
    # decays: min(1/4, (1 + s) / (10 + s)) = 2/11, 3/12, then 1/4 for good
    expected = 1.0
    for step, (weight, decay) in enumerate([(2.0, 2 / 11), (5.0, 3 / 12), (-3.0, 0.25), (0.5, 0.25)], 1):
        set_to(module, weight)
        ema.update(step)
        expected = decay * expected + (1 - decay) * weight
        assert float(ema.average["weight"]) == pytest.approx(expected, rel=1e-6)
    by_hand = 0.25 * (0.25 * (0.25 * (2 / 11 + 9 / 11 * 2) + 0.75 * 5) + 0.75 * -3) + 0.75 * 0.5
    assert float(ema.average["weight"]) == pytest.approx(by_hand, rel=1e-6)


def test_of_constant_weights_is_the_weights():
    module = nn.Linear(3, 2)
    ema = Ema(module, 0.999)
    for step in range(1, 6):
        ema.update(step)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(ema.average[name], parameter.detach())


def test_averages_in_float32_what_trains_in_half_precision():
    module = scalar(1.0).bfloat16()
    ema = Ema(module, 0.9999)
    set_to(module, 2.0)
    for step in range(100_000, 100_010):
        ema.update(step)
    assert ema.average["weight"].dtype == torch.float32
    # ten times 1e-4 of the way, which bfloat16 could not hold
    assert float(ema.average["weight"]) == pytest.approx(2 - 0.9999**10, rel=1e-6)


def test_leaves_out_frozen_parameters():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    ema = Ema(module, 0.9)
    assert set(ema.average) == {"weight"}


def test_applied_puts_the_average_in_and_the_weights_back():
    module = scalar(1.0)
    ema = Ema(module, 0.0)
    ema.average["weight"].fill_(7.0)
    with ema.applied():
        assert float(module.weight.detach()) == 7.0
    assert float(module.weight.detach()) == 1.0
    assert float(ema.average["weight"]) == 7.0


def test_applied_restores_after_an_exception():
    module = scalar(1.0)
    ema = Ema(module, 0.9)
    ema.average["weight"].fill_(7.0)
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    assert float(module.weight.detach()) == 1.0


def test_state_makes_the_round_trip():
    module = scalar(1.0)
    ema = Ema(module, 0.9)
    set_to(module, 3.0)
    ema.update(1)
    state = copy.deepcopy(ema.state_dict())
    other_module = scalar(3.0)
    other = Ema(other_module, 0.9)
    other.load_state_dict(state)
    for average in (ema, other):
        average.update(2)
    assert torch.equal(ema.average["weight"], other.average["weight"])


def test_missing_parameter_in_the_state_is_an_error():
    with pytest.raises(KeyError):
        Ema(nn.Linear(2, 2), 0.9).load_state_dict({})
