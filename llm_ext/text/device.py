"""Which device to compute on."""

from __future__ import annotations

import torch

from llm_ext.text.errors import TextError


def default_device() -> str:
    """Return "cpu": nothing here has been tried on a GPU yet."""
    return "cpu"


def find_device(name: str) -> torch.device:
    """Return a device by its name; "auto" is the default one.

    Raises:
        TextError: torch does not know it, or it is not there.
    """
    try:
        device = torch.device(default_device() if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TextError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device
