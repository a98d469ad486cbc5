"""torch.jit.script: layers that torch.nn has are compiled as its own, the others are refused."""

from __future__ import annotations

from typing import NoReturn, TypeVar

from torch import nn

__all__ = ["refuse_script", "share_parameters"]

Module = TypeVar("Module", bound=nn.Module)


def share_parameters(layer: nn.Module, other: Module) -> Module:
    """Return `other`, a module with the same names of parameters, with the parameters and the mode of `layer`."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        refuse_script(layer, "with forward hooks")
    for name, parameter in layer._parameters.items():
        setattr(other, name, parameter)
    return other.train(layer.training)


def refuse_script(module: nn.Module, why: str = "") -> NoReturn:
    """Raise the error of a module that torch.jit.script cannot compile; `why` is the option that prevents it."""
    name = " ".join((type(module).__name__, why)).strip()
    raise RuntimeError(f"torch.jit.script cannot compile {name}; torch.export can")
