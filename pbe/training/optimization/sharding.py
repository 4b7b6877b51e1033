"""Sharded training (FSDP2): every process keeps a share of weights, gradients, moments and average.

Lightning's :class:`ModelParallelStrategy` gives the device mesh, torch's ``fully_shard`` (Zhao et al. 2023)
cuts the weights. What is saved is whole and has the layout of an unsharded run's checkpoint, so that a
run can resume with another strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from pbe.models.attention import SpatialTransformer
from pbe.models.exemplar_encoder import MapperBlock
from pbe.models.layers import ResBlock

T = TypeVar("T")

STRATEGY_NAMES = ("fsdp2", "model_parallel")  # values of trainer.strategy
BLOCKS = (ResBlock, SpatialTransformer, MapperBlock)  # gathered and freed one at a time


def is_distributed() -> bool:
    """Return whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def from_all_ranks(value: T) -> list[T]:
    """Return the value of every rank, in their order; all ranks have to call it."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor put together from its shards, others as they are; all ranks have to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's share of a sharded tensor, sharing memory with it; others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, which every rank has, cut as ``like`` is (as it is where that is whole)."""
    if not isinstance(like, DTensor):
        return tensor
    moved = tensor.to(like.device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def on_the_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors on the CPU; all ranks have to call it."""
    return {name: whole(tensor.detach()).cpu() for name, tensor in tensors.items()}


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether any of the tensors is cut into shards."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gather the weights that belong to no block for a ``with`` block; all ranks have to enter it.

    Blocks gather their own when they are called. Nothing happens to a module that is not sharded.
    """
    if isinstance(module, FSDPModule):
        module.unshard()
    try:
        yield
    finally:
        if isinstance(module, FSDPModule):
            module.reshard()


def regather(module: nn.Module) -> None:
    """Gather the weights that belong to no block anew, whose shards were changed in a forward pass.

    All ranks have to call it. Nothing happens to a module that is not sharded.
    """
    if isinstance(module, FSDPModule):
        module.reshard()
        module.unshard()


def shard(module: nn.Module, mesh: DeviceMesh, whole_parts: list[nn.Module], entry: str) -> None:
    """Cut a module's weights into shards, block by block and then the rest together, in place.

    Its parameters are other objects afterwards, of the same names. The mesh, of the processes that share the
    weights, is one-dimensional; every process keeps the weights of the ``whole_parts``, the frozen networks;
    ``entry`` names the method through which all weights are used.
    """
    kept = {parameter for part in whole_parts for parameter in part.parameters()}
    # Freed after the forward pass too: the moving average is put into the shards between two of them.
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": kept}
    inside = {child for part in whole_parts for child in part.modules()}
    for child in list(module.modules()):
        if isinstance(child, BLOCKS) and child not in inside:
            fully_shard(child, **options)
    fully_shard(module, **options)
    register_fsdp_forward_method(module, entry)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes, with checkpoints that are those of an unsharded run.

    Lightning's own files number the optimizer's moments by another order of the parameters.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Take all processes for the data-parallel side of the mesh."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state is restored by :meth:`load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights on the CPU; all ranks have to call it."""
        assert self.lightning_module is not None
        return on_the_cpu(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state with whole moments on the CPU; all ranks have to call it."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return _with_moments(state, lambda _, value: whole(value).cpu())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, the same file on every rank, by memory map."""
        return torch.load(checkpoint_path, map_location="cpu", weights_only=bool(weights_only), mmap=True)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Cut the whole weights and put them into the module."""
        module, stored = self.lightning_module, checkpoint["state_dict"]
        assert module is not None
        own = module.state_dict()
        if strict and own.keys() != stored.keys():
            raise KeyError(f"the checkpoint has other weights: {sorted(own.keys() ^ stored.keys())[:8]}")
        for name, value in own.items():
            local(value).copy_(local(cut_like(stored[name], value)))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Cut the whole moments and put them into the optimizers."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

            def cut(number: int, value: Tensor, parameters: list[Tensor] = parameters) -> Tensor:
                return cut_like(value, parameters[number]) if value.ndim else value  # the count of steps

            optimizer.load_state_dict(_with_moments(state, cut))


def _with_moments(state: dict[str, Any], change: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    """Return an optimizer's state whose tensors, given with the number of their parameter, are changed."""
    moments = {
        number: {
            name: change(number, value) if isinstance(value, Tensor) else value
            for name, value in entries.items()
        }
        for number, entries in state["state"].items()
    }
    return {**state, "state": moments}
