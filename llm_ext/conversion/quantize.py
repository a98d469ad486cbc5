"""Quantization of the layers of a model, in place: weights of 8 or 16 bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from llm_ext.conversion import strict
from llm_ext.conversion.classes import CONVERTED, assign_converted, assign_original, reason_against
from llm_ext.nn import GRU, LSTM, RNN, AffineEmbedding, GRUCell, Linear, LSTMCell, RNNCell
from llm_ext.nn.fake_quantized import FAKE_QUANTIZED, FakeQuantize, FakeQuantizedStates
from llm_ext.nn.quantized import (
    DTYPES,
    MAX_INT8_COLUMNS,
    QuantizedAffineEmbedding,
    QuantizedBase,
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLinear,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRNN,
    QuantizedRNNCell,
    rounding_error,
)

__all__ = ["Quantized", "dequantize_", "fake_quantize_", "quantize_"]

Filter = Callable[[nn.Module, str], bool]
Dtype = Literal["int8", "bfloat16"]

# The quantized class of each class.
_QUANTIZED: dict[type[nn.Module], Any] = {
    RNN: QuantizedRNN,
    GRU: QuantizedGRU,
    LSTM: QuantizedLSTM,
    RNNCell: QuantizedRNNCell,
    GRUCell: QuantizedGRUCell,
    LSTMCell: QuantizedLSTMCell,
    Linear: QuantizedLinear,
    AffineEmbedding: QuantizedAffineEmbedding,
}
_RECURRENT = (nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell)
# The classes of layers that `patched` and `convert(strict_types=True)` make.
_STRICT = (strict.RNN, strict.GRU, strict.LSTM)


class Quantized(NamedTuple):
    """A module that :func:`quantize_` has quantized, or left for a reason.

    Attributes:
        fqn: Name of the module in the model, such as ``"encoder.rnn"``; ``""`` is the model itself.
        type: Class that the module had.
        error: Root mean square over the rows of a matrix of the relative error of its weights; the largest of the
            module's matrices. Weights of more than ten times the median of their row do not count: they show in the
            error of the others. NaN if a row has no scale. ``None`` if the module is left.
        reason: Why the module is left, or ``None`` if it is quantized.
    """

    fqn: str
    type: type[nn.Module]
    error: float | None
    reason: str | None


def quantize_(model: nn.Module, weights: Dtype = "int8", *, filter: Filter | None = None) -> list[Quantized]:
    """Round the weights of a model to 8 or 16 bits, in place, for inference on the CPU.

    Recurrent layers and cells of llm_ext and of torch.nn, and the linear layers and embeddings of llm_ext, become
    layers of :mod:`llm_ext.nn` whose weights are packed buffers. Their inputs, states and results stay float32. A
    module stays the same object, but its parameters are gone, so quantize before an optimizer is made, or after
    training. Layers that shared a weight have one each afterwards.

    Args:
        model: Any module, which may be a layer itself.
        weights: ``"int8"``: a scale for each row of a matrix, and products in integers, with inputs in up to 16 bits
            and states in 7. A network gives the same bits on every ISA and any number of threads. ``"bfloat16"``:
            weights are widened when they are read, and products are float32; or pairs of bfloat16, where the machine
            has them.
        filter: Called with a module and its name in the model; False leaves the module as it is.

    Returns:
        An entry for each recurrent module, linear layer and embedding, in the order of ``model.named_modules()``.
        Modules that are quantized already are not listed. If none is quantized, there is a warning.

    Raises:
        TypeError: The model is not a module.
        ValueError: `weights` is unknown.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.GRU(8, 16))
        >>> for fqn, _, _, reason in llm_ext.quantize_(model):
        ...     print(fqn, reason)
        0 it is a layer of torch.nn that is not recurrent
        1 None
        >>> model[1]
        QuantizedGRU(8, 16, weights=int8)
    """
    _check("quantize_", model, weights)
    entries: list[Quantized] = []
    for fqn, module, reason in list(_considered(model, weights, filter)):
        kind = type(module)
        error = None
        if reason is None:
            _restore(module)
            error = _largest_error(module, weights)
            _QUANTIZED[type(module)].quantize(module, weights)
        entries.append(Quantized(fqn, kind, error, reason))
    _warn_of_none("quantize_", model, entries)
    return entries


def dequantize_(model: nn.Module) -> nn.Module:
    """Make the quantized layers of a model ordinary ones of llm_ext, in place; weights keep their rounded values.

    Parameters have gradients if they had them before :func:`quantize_`.

    Args:
        model: Any module, which may be a layer itself.

    Returns:
        The model.

    Raises:
        TypeError: The model is not a module.

    Example:
        >>> layer = llm_ext.GRU(8, 16)
        >>> _ = llm_ext.quantize_(layer)
        >>> llm_ext.dequantize_(layer)
        GRU(8, 16)
    """
    _check("dequantize_", model, "int8")
    quantized: list[Any] = [each for each in model.modules() if isinstance(each, QuantizedBase)]
    for module in quantized:
        module.dequantize()
    return model


def fake_quantize_(
    model: nn.Module, weights: Dtype = "int8", *, filter: Filter | None = None, states: bool = False
) -> list[Quantized]:
    """Let the layers of a model compute with rounded weights while it is trained, in place.

    The modules that :func:`quantize_` would change keep their parameters, which a parametrization rounds in every call;
    recurrent layers and cells of torch.nn become those of llm_ext. Gradients pass the rounding as if it were not there
    (straight-through estimator, arXiv 1308.3432). After training, :func:`quantize_` removes the parametrizations and
    quantizes.

    Args:
        model: As in :func:`quantize_`.
        weights: As in :func:`quantize_`.
        filter: As in :func:`quantize_`.
        states: Also round the inputs and states of recurrent layers and cells, as int8 weights do. They then run in
            plain torch, a loop over the steps, which takes many times as long.

    Returns:
        As :func:`quantize_`.

    Raises:
        TypeError: The model is not a module.
        ValueError: `weights` is unknown, or states are to be rounded with weights other than int8.

    Example:
        >>> layer = llm_ext.GRU(8, 16)
        >>> _ = llm_ext.fake_quantize_(layer)
        >>> layer(torch.randn(5, 3, 8))[0].sum().backward()  # then train, and quantize
        >>> _ = llm_ext.quantize_(layer)
        >>> layer
        QuantizedGRU(8, 16, weights=int8)
    """
    _check("fake_quantize_", model, weights)
    if states and weights != "int8":
        raise ValueError(f"fake_quantize_: states are rounded with int8 weights only, got {weights!r}")
    entries: list[Quantized] = []
    for fqn, module, reason in list(_considered(model, weights, filter)):
        error = None
        kind = type(module)
        if reason is None:
            _restore(module)
            error = _largest_error(module, weights)
            if states and type(module) in FAKE_QUANTIZED:
                module.__class__ = FAKE_QUANTIZED[type(module)]
            for name in [name for name, p in module.named_parameters(recurse=False) if p.dim() > 1]:
                parametrize.register_parametrization(module, name, FakeQuantize(weights))
        entries.append(Quantized(fqn, kind, error, reason))
    _warn_of_none("fake_quantize_", model, entries)
    return entries


def _warn_of_none(caller: str, model: nn.Module, entries: list[Quantized]) -> None:
    if all(entry.reason is not None for entry in entries):
        warnings.warn(f"{caller}: no layer of {type(model).__name__} has been changed", stacklevel=3)


def _largest_error(module: nn.Module, weights: Dtype) -> float:
    """Return the largest error of the matrices of a module, NaN if one of them is NaN."""
    errors = [rounding_error(p.detach(), weights) for p in module.parameters(recurse=False) if p.dim() > 1]
    return max(errors, key=lambda error: (math.isnan(error), error))


def _restore(module: nn.Module) -> None:
    """Remove fake quantization from a module, and make it one of llm_ext that is not also a layer of torch.nn."""
    if parametrize.is_parametrized(module):
        # remove_parametrizations deletes attributes of the class, which copies of the module have, too.
        originals: Any = module._modules.pop("parametrizations")
        module.__class__ = type(module).__bases__[0]
        for name in originals:
            setattr(module, name, originals[name].original)
    if isinstance(module, FakeQuantizedStates):
        original: Any = module._replaces
        module.__class__ = original
    if type(module) in _STRICT:
        assign_original(module)
    if type(module) in _RECURRENT:
        assign_converted(module, False)


def _considered(model: nn.Module, weights: Dtype, filter: Filter | None) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Yield the modules that hold weights of a known kind, and why they are left, or None."""
    kinds = (nn.RNNBase, nn.RNNCellBase, nn.Linear, nn.Embedding, AffineEmbedding)
    for fqn, module in model.named_modules():
        if isinstance(module, kinds) and not isinstance(module, QuantizedBase):
            excluded = filter is not None and not filter(module, fqn)
            yield fqn, module, "the filter excludes it" if excluded else _reason_to_leave(module, weights)


def _reason_to_leave(module: nn.Module, weights: Dtype) -> str | None:
    """Return why a module is not quantized, or None if it can be."""
    cls = parametrize.type_before_parametrizations(module)
    if cls not in (*_QUANTIZED, *FAKE_QUANTIZED.values(), *_RECURRENT, *_STRICT):
        if cls in CONVERTED or cls is nn.Embedding:
            return "it is a layer of torch.nn that is not recurrent"
        return f"{cls.__name__} is a subclass"
    if cls in _RECURRENT and (reason := reason_against(module)) is not None:
        return reason
    lists = getattr(module, "parametrizations", {})
    if any(not isinstance(each, FakeQuantize) for name in lists for each in lists[name]):
        return "it has parametrizations; remove them first"
    if {*module._parameters, *lists} != _parameter_names(module):
        return (
            "its parameters are not those of its class: "
            "remove hooks that compute its weights first, as by torch.nn.utils.prune.remove"
        )
    for name, parameter in module.named_parameters():
        name = name.removeprefix("parametrizations.").removesuffix(".original")
        if parameter.dtype != torch.float32 or not parameter.is_cpu:
            return f"{name} is {parameter.dtype} on {parameter.device}, not float32 on the cpu"
        if weights == "int8" and parameter.dim() > 1 and parameter.shape[1] > MAX_INT8_COLUMNS:
            return f"{name} has {parameter.shape[1]} columns, more than {MAX_INT8_COLUMNS}"
    return "it has no units" if getattr(module, "hidden_size", 1) == 0 else None


def _parameter_names(module: nn.Module) -> set[str]:
    """Return the names of the parameters that a module of a known kind has, unless a hook replaces some."""
    if isinstance(module, nn.RNNBase):
        return set(module._flat_weights_names)
    if isinstance(module, nn.RNNCellBase):
        return {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}
    return {"weight", "bias"}


def _check(caller: str, model: object, weights: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    if weights not in DTYPES:
        raise ValueError(f"{caller}: weights must be one of {', '.join(DTYPES)}, got {weights!r}")
