"""Shards of one process: cutting, putting together, and the checkpoint that both make."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from pbe.training.optimization.non_finite import gradient_norm
from pbe.training.optimization.optimizer import Ema
from pbe.training.optimization.sharding import cut_like, gathered, is_sharded, local, shard, whole


@pytest.fixture
def mesh(tmp_path) -> Iterator[object]:
    """A mesh of this process alone."""
    before = dict(os.environ)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


class Small(nn.Module):
    """Two layers and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.frozen = (nn.Linear(4, 4) for _ in range(3))
        self.frozen.requires_grad_(False)

    def losses(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.frozen(x))).square().sum()


def test_what_is_not_sharded_stays_as_it_is():
    tensor = torch.arange(6.0)
    assert whole(tensor) is local(tensor) is cut_like(tensor, torch.ones(6)) is tensor
    assert not is_sharded(Small().parameters())
    with gathered(Small()):
        pass


def test_a_sharded_module_computes_the_same_and_its_average_moves_alike(mesh):
    plain, sharded, x = Small(), Small(), torch.randn(3, 4)
    shard(sharded, mesh, [sharded.frozen], "losses")
    assert {name for name, p in sharded.named_parameters() if not isinstance(p, DTensor)} == {
        "frozen.weight",
        "frozen.bias",
    }
    averages = []
    for module in (plain, sharded):
        average = Ema(module, 0.9)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        module.losses(x).backward()
        norm = gradient_norm(module.parameters())
        optimizer.step()
        average.update(1)
        with average.applied(), gathered(module):
            applied = module.losses(x)
        averages.append((norm, applied, average.state_dict()))
        again = Ema(module, 0.9)
        again.load_state_dict(average.state_dict())
        assert all(torch.equal(again.state_dict()[k], v) for k, v in average.state_dict().items())
    (norm, loss, state), (other_norm, other_loss, other_state) = averages
    assert torch.equal(norm, other_norm)
    assert torch.equal(loss, other_loss)
    assert not any(isinstance(value, DTensor) for value in other_state.values())
    assert state.keys() == other_state.keys()
    assert all(torch.equal(state[name], other_state[name]) for name in state)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, whole(sharded.get_parameter(name))), "the weights are back"
