"""Conversion of the modules of a model, in place."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from llm_ext.conversion.classes import (
    CONVERTED,
    assign_converted,
    assign_original,
    has_original,
    is_converted,
    reason_against,
)
from llm_ext.nn.quantized import QuantizedBase

__all__ = ["Convertible", "convert", "convertible", "revert", "to_torch"]

Model = TypeVar("Model", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]

_NAMES = {cls.__name__ for cls in CONVERTED}
_EXCLUDED = "the filter excludes it"


class Convertible(NamedTuple):
    """A module that :func:`convert` changes, or leaves for a reason.

    Attributes:
        fqn: Name of the module in the model, such as ``"encoder.rnn"``; ``""`` is the model itself.
        type: Class of the module.
        reason: Why the module is left, or ``None`` if it changes.
    """

    fqn: str
    type: type[nn.Module]
    reason: str | None


def convert(model: Model, *, filter: Filter | None = None, linear: bool = False, strict_types: bool = False) -> Model:
    """Make the recurrent layers and cells of a model those of llm_ext, in place.

    Every ``torch.nn.RNN``, ``GRU``, ``LSTM``, ``RNNCell``, ``GRUCell`` and ``LSTMCell`` gets the class of llm_ext, and
    stays the same object with the same parameters, buffers, hooks, parametrizations, training mode and attributes. So
    optimizers, averaged weights, tied weights, ``DistributedDataParallel`` and modules that two modules share need no
    change. A subclass is converted if it inherits ``forward`` or calls ``super().forward`` in its own; it stays a
    subclass of what it was. A warning names the modules that are left; :func:`convertible` lists all.

    Args:
        model: Any module, which may be a layer itself. Convert before sharding and quantizing.
        filter: Called with a module and its name in the model; False leaves the module as it is.
        linear: Also convert ``torch.nn.Linear``.
        strict_types: Converted layers are still instances of ``torch.nn.RNN``, ``GRU`` and ``LSTM``, for code that asks
            for these; without it, of ``torch.nn.RNNBase``. ``torch.compile`` then needs
            ``torch._dynamo.config.allow_rnn = True``, as for the layers of torch.nn. Cells and linear layers are always
            instances of the classes of torch.nn.

    Returns:
        The model.

    Raises:
        TypeError: The model is not a module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.GRU(8, 16))
        >>> llm_ext.convert(model)
        Sequential(
          (0): Embedding(50, 8)
          (1): GRU(8, 16)
        )
        >>> type(model[1])
        <class 'llm_ext.nn.recurrent.GRU'>
    """
    found = list(_recurrent_modules("convert", model, filter, linear))
    changing = [(module, entry) for module, entry in found if entry.reason is None]
    for module, _ in changing:
        assign_converted(module, strict_types)
    left = [entry for _, entry in found if entry.reason not in (None, _EXCLUDED)]
    if left:
        words = "; ".join(f"{entry.fqn or 'the model'} ({entry.type.__name__}): {entry.reason}" for entry in left)
        warnings.warn(f"convert: these modules are left as they are: {words}", stacklevel=2)
    elif not found and not any(is_converted(module) for module in model.modules()):
        warnings.warn(f"convert: {type(model).__name__} has no recurrent layer; nothing is changed", stacklevel=2)
    return model


def convertible(model: nn.Module, *, filter: Filter | None = None, linear: bool = False) -> list[Convertible]:
    """List the modules that :func:`convert` would change, and those that it would leave, with the reason.

    Args:
        model: Any module.
        filter: As in :func:`convert`.
        linear: As in :func:`convert`.

    Returns:
        An entry for each recurrent module, and each linear one if asked, in the order of ``model.named_modules()``.
        Modules that already are those of llm_ext are not listed.

    Raises:
        TypeError: The model is not a module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.GRU(8, 16), torch.jit.script(torch.nn.GRUCell(16, 16)))
        >>> for fqn, _, reason in llm_ext.convertible(model):
        ...     print(fqn, reason)
        0 None
        1 it is compiled by torch.jit
    """
    return [entry for _, entry in _recurrent_modules("convertible", model, filter, linear)]


def revert(model: Model) -> Model:
    """Make the layers of llm_ext in a model those of torch.nn, in place: the inverse of :func:`convert`.

    Layers that were built as those of llm_ext change too, except inside the models and the attention of llm_ext, which
    call them with arguments that torch.nn does not have.

    Args:
        model: Any module, which may be a layer itself.

    Returns:
        The model.

    Raises:
        TypeError: The model is not a module.
        ValueError: A layer has the nonlinearity ``"sigmoid"``, which torch.nn does not have, or is quantized; then
            nothing is changed.

    Example:
        >>> type(llm_ext.revert(llm_ext.LSTM(3, 5)))
        <class 'torch.nn.modules.rnn.LSTM'>
    """
    found = list(_revertible("revert", model))
    for module in found:
        assign_original(module)
    return model


def to_torch(module: nn.Module) -> nn.Module:
    """Return a copy of a module in which layers of llm_ext are those of torch.nn, with the same parameters.

    The copy is for tools that know the classes of torch.nn only, such as ``torch.jit.script``,
    ``torch.ao.quantization.quantize_dynamic`` and ``torch.fx.symbolic_trace``. Parameters and buffers are shared, all
    else is copied.

    Args:
        module: Any module, which may be a layer itself.

    Returns:
        The copy.

    Raises:
        TypeError: The argument is not a module.
        ValueError: A layer has the nonlinearity ``"sigmoid"``, which torch.nn does not have, or is quantized.

    Example:
        >>> layer = llm_ext.LSTM(3, 5)
        >>> copy = llm_ext.to_torch(layer)
        >>> copy, copy.weight_hh_l0 is layer.weight_hh_l0
        (LSTM(3, 5), True)
    """
    list(_revertible("to_torch", module))
    memo = {id(tensor): tensor for each in module.modules() for tensor in _tensors(each)}
    return revert(copy.deepcopy(module, memo))


def _recurrent_modules(
    caller: str, model: nn.Module, filter: Filter | None, linear: bool
) -> Iterator[tuple[nn.Module, Convertible]]:
    """Yield the modules that a conversion considers, each with its entry."""
    _check_module(caller, model)
    for fqn, module in model.named_modules():
        if _is_considered(module, linear):
            excluded = filter is not None and not filter(module, fqn)
            reason = _EXCLUDED if excluded else reason_against(module)
            yield module, Convertible(fqn, type(module), reason)


def _is_considered(module: nn.Module, linear: bool) -> bool:
    """Return whether a module is recurrent, or linear if asked, and does not compute with llm_ext."""
    if isinstance(module, torch.jit.ScriptModule):
        name = getattr(module, "original_name", "")
    elif type(module).__module__.startswith("torch.ao.nn."):
        name = type(module).__name__
    else:
        kinds = (nn.RNNBase, nn.RNNCellBase, *((nn.Linear,) if linear else ()))
        return isinstance(module, kinds) and not is_converted(module)
    return name in _NAMES and (linear or name != "Linear")


def _revertible(caller: str, model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of llm_ext that can become those of torch.nn; raise if there is another one."""
    _check_module(caller, model)
    inside: set[nn.Module] = set()
    for fqn, module in model.named_modules():
        name, kind = fqn or "the model", type(module).__name__
        if module in inside:
            continue
        if not is_converted(module):
            if any(base.__module__.startswith("llm_ext.") for base in type(module).__mro__):
                inside |= set(module.modules())
        elif isinstance(module, QuantizedBase):
            raise ValueError(f"{caller}: {name} is a {kind}; call llm_ext.dequantize_ first")
        elif getattr(module, "mode", None) == "RNN_SIGMOID":
            raise ValueError(f"{caller}: {name} has nonlinearity='sigmoid', which torch.nn.{kind} does not have")
        elif not has_original(module):
            raise ValueError(f"{caller}: {name} is a {kind}, a subclass of a layer of llm_ext, and not of torch.nn")
        else:
            yield module


def _check_module(caller: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a module holds: parameters, buffers, and what weight_norm and pruning set."""
    for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, Tensor):
                yield item
