"""Arguments of layers: those of constructors as plain values, and why a call failed. `owner` begins each message."""

from __future__ import annotations

import operator
from typing import SupportsIndex

from torch import Tensor

from llm_ext.ops import argument_checks
from llm_ext.ops._registration import is_autocast_on
from llm_ext.ops.argument_checks import ArgumentError, DtypeError

__all__ = ["as_flag", "as_size", "check_input"]


def as_size(owner: str, name: str, size: SupportsIndex, least: int = 1) -> int:
    """Return a size as an int; raise TypeError for what is no integer, and ValueError for one below `least`."""
    try:
        value = operator.index(size)
    except TypeError:
        raise TypeError(f"{owner}: {name} must be an int, got {type(size).__name__}") from None
    if value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")
    return value


def as_flag(owner: str, name: str, flag: object) -> bool:
    """Return a flag as a bool; raise TypeError unless it equals True or False, as 0 and 1 do."""
    if flag not in (False, True):
        raise TypeError(f"{owner}: {name} must be a bool, got {flag!r}")
    return bool(flag)


def check_input(
    owner: str, name: str, tensor: Tensor, letters: str, sizes: tuple[int | None, ...], weight: Tensor
) -> None:
    """Raise unless a tensor has these sizes, and the device of a weight and, outside autocast, its dtype.

    A layer whose op failed calls it, because the op has other names for the arguments.
    """
    if tensor.dim() != len(sizes) or any(n not in (None, m) for n, m in zip(sizes, tensor.shape, strict=True)):
        argument_checks.fail_shape(owner, name, letters, sizes, tensor)
    if tensor.device != weight.device:
        raise ArgumentError(f"{owner}: {name} must be on {weight.device} like the weights, got {tensor.device}")
    if tensor.dtype != weight.dtype and not is_autocast_on(weight.device.type):
        raise DtypeError(f"{owner}: {name} must be {weight.dtype}, got {tensor.dtype}".replace("torch.", ""))
