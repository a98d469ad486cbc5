"""The device to compute on."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from llm_ext.cli.errors import CommandError

__all__ = ["check_device", "default_device", "device_of", "find_device"]


def default_device() -> str:
    """Return "cpu", the device of `--device auto`: the command line has not been tested on a GPU yet."""
    return "cpu"


def check_device(name: str) -> None:
    """Raise a CommandError for a device for which llm_ext has no kernels; there may still be none of the others."""
    if name.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise CommandError(f"device {name!r} cannot be used: expected cpu, cuda or auto")


def find_device(name: str) -> torch.device:
    """Return a device by its name in torch; "auto" is the default device.

    Raises:
        CommandError: Torch does not know the device, or it is not available.
    """
    try:
        device = torch.device(default_device() if name == "auto" else name)
        check_device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model; quantized layers have no parameters, but buffers."""
    return next(chain(model.parameters(), model.buffers())).device
