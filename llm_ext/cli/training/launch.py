"""Start of the processes of a training, with Lightning Fabric."""

from __future__ import annotations

from typing import Literal, cast

from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from llm_ext.cli.device import default_device
from llm_ext.cli.errors import CommandError
from llm_ext.cli.training.config import Config
from llm_ext.cli.training.malloc import keep_freed_memory

__all__ = ["launch"]


def launch(config: Config, alone: bool = False) -> Fabric:
    """Start the processes; under torchrun they already run, and it determines their number.

    The process group is not destroyed at the end: DDP holds the last reference to it, and its destructor would wait for
    gloo threads, which may need Python's lock, while holding that lock.

    Args:
        config: The settings.
        alone: Train in this process only, whatever others torchrun has started.

    Raises:
        CommandError: The device cannot be used.
    """
    device = default_device() if config.device == "auto" else config.device
    devices: int | list[int] = config.devices
    if TorchElasticEnvironment.detect():
        environment = TorchElasticEnvironment()
        if not alone:
            devices = environment.world_size() // config.nodes
        elif device != "cpu":
            devices = [environment.local_rank()]
    try:
        fabric = Fabric(
            accelerator=device,
            devices=devices,
            num_nodes=config.nodes,
            precision=cast(Literal["32-true", "bf16-mixed"], config.precision),
        )
    except (ValueError, RuntimeError) as error:
        raise CommandError(f"device {config.device!r} cannot be used: {error}") from None
    keep_freed_memory()
    fabric.launch()
    return fabric
