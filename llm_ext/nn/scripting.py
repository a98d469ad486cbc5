"""torch.jit.script: layers that torch.nn has are compiled as its own, the others are refused."""

from __future__ import annotations

import copy
from typing import NoReturn

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["as_type", "refuse_script"]


def as_type(layer: nn.Module, torch_type: type[nn.Module]) -> nn.Module:
    """Return a shallow copy of `layer` as a module of `torch_type`, which torch.jit.script compiles instead."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        refuse_script(layer, "with forward hooks")
    if parametrize.is_parametrized(layer):
        refuse_script(layer, "with parametrizations")
    other = copy.copy(layer)
    other.__class__ = torch_type
    return other


def refuse_script(module: nn.Module, why: str = "") -> NoReturn:
    """Raise the error of a module that torch.jit.script cannot compile; `why` is the option that prevents it."""
    name = " ".join((type(module).__name__, why)).strip()
    raise RuntimeError(f"torch.jit.script cannot compile {name}; torch.export can")
