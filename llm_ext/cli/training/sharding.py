"""A model whose parameters are divided between processes, by `fully_shard` of torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["full_tensor", "gathered", "shard_like", "sharded_strategy"]


def sharded_strategy(processes: int) -> ModelParallelStrategy:
    """Return the strategy of Lightning Fabric that divides a model between processes.

    The model is one group: models use weights of their layers without calling these, so that the weights must be whole
    whenever the model runs. What stays divided all the time is the state of the optimizer.
    """

    def shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        # Gathered once a step: the backward pass follows at once.
        fully_shard(module, mesh=mesh["data_parallel"], reshard_after_forward=False)
        return module

    return ModelParallelStrategy(shard, data_parallel_size=processes, tensor_parallel_size=1)


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Keep the parameters of a divided model whole, so that processes may call it a different number of times."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor, or the whole of one that is divided between processes, which all take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """Divide a tensor that every process has as a parameter of the same shape is divided."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(mesh.device_type), mesh, placements, src_data_rank=None)
