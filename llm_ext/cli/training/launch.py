"""Start of the processes of a training, with Lightning Fabric."""

from __future__ import annotations

import logging
from typing import Literal, cast

from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from llm_ext.cli.device import check_device, default_device
from llm_ext.cli.errors import CommandError
from llm_ext.cli.training.config import Config
from llm_ext.cli.training.malloc import keep_freed_memory
from llm_ext.cli.training.sharding import sharded_strategy

__all__ = ["launch", "process_count"]


def launch(config: Config, alone: bool = False) -> Fabric:
    """Start the processes; under torchrun they already run, and it determines their number.

    The process group is not destroyed at the end: DDP holds the last reference to it, and its destructor would wait for
    gloo threads, which may need Python's lock, while holding that lock.

    Args:
        config: The settings.
        alone: Train in this process only, whatever others torchrun has started.

    Raises:
        CommandError: The device or the number of processes cannot be used.
    """
    check_device(config.device)
    device = default_device() if config.device == "auto" else config.device
    processes = process_count(config, alone)
    devices: int | list[int] = processes // config.nodes
    if config.strategy != "auto" and processes == 1:
        raise CommandError(
            f"--strategy {config.strategy} needs several processes, got 1: "
            "give --devices N, or start them with torchrun --nproc-per-node N --no-python llm-ext train"
        )
    if config.batch % processes:
        raise CommandError(
            f"the number of processes must divide --batch, which is {config.batch}, got {processes} processes"
        )
    if alone:
        devices = 1
        if TorchElasticEnvironment.detect() and device != "cpu":
            devices = [TorchElasticEnvironment().local_rank()]
    try:
        fabric = Fabric(
            accelerator=device,
            devices=devices,
            num_nodes=config.nodes,
            precision=cast(Literal["32-true", "bf16-mixed"], config.precision),
            strategy=sharded_strategy(processes) if config.strategy == "fsdp" else config.strategy,
        )
    except (ValueError, RuntimeError) as error:
        raise CommandError(f"device {config.device!r} cannot be used: {error}") from None
    keep_freed_memory()
    # Each process would log that it has started.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric.launch()
    return fabric


def process_count(config: Config, alone: bool = False) -> int:
    """Return the number of processes with which `launch` trains."""
    if alone:
        return 1
    return TorchElasticEnvironment().world_size() if TorchElasticEnvironment.detect() else config.devices * config.nodes
