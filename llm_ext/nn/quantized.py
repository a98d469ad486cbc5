"""Layers with weights of 8 or 16 bits, for inference on the CPU: what :func:`llm_ext.quantize_` makes of others.

They have buffers in place of parameters. Inputs, states and results are float32.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_ext.nn.arguments import check_input
from llm_ext.nn.cells import GRUCell, LSTMCell, RNNCell
from llm_ext.nn.embedding import AffineEmbedding
from llm_ext.nn.linear import Linear
from llm_ext.nn.recurrent import GRU, LSTM, RNN
from llm_ext.nn.scripting import refuse_script
from llm_ext.ops.argument_checks import ArgumentError, gates_of
from llm_ext.ops.quantization import (
    DTYPES,
    MAX_INT8_COLUMNS,
    PackedWeight,
    QuantizedWeights,
    pack,
    quantized_linear,
    round_weight,
    unpack,
    widen,
)

__all__ = [
    "DTYPES",
    "MAX_INT8_COLUMNS",
    "QuantizedAffineEmbedding",
    "QuantizedBase",
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedLinear",
    "QuantizedRNN",
    "QuantizedRNNCell",
    "rounding_error",
]

# The error of a row leaves out weights above this multiple of the median magnitude of the row: 6.7 standard deviations
# of a normal distribution.
_OUTLIER = 10


class QuantizedBase(nn.Module):
    """A module whose matrices are packed into the buffers NAME_packed and NAME_scale, and biases are buffers.

    It comes before the class that it replaces in the bases. `quantize` and `dequantize` assign the class of an
    instance, so that every reference to it, its hooks and its other attributes stay.
    """

    _weights_dtype: str
    _parameter_names: tuple[str, ...]
    _trained: frozenset[str]  # names of the parameters that had gradients
    _replaces: type[nn.Module]
    _torch_ao = "leaves layers that llm_ext.quantize_ has quantized as they are"

    @classmethod
    def quantize(cls, module: Any, dtype: str) -> None:
        """Make a module of the class that this one replaces a quantized one.

        Args:
            module: The module; its parameters are float32 on the CPU.
            dtype: "int8" or "bfloat16".
        """
        weights = dict(module._parameters)
        module.__class__ = cls
        module._weights_dtype, module._parameter_names = dtype, tuple(weights)
        module._trained = frozenset(name for name, w in weights.items() if w is not None and w.requires_grad)
        for name, tensor in weights.items():
            del module._parameters[name]
            if tensor is None or tensor.dim() == 1:
                module.register_buffer(name, None if tensor is None else tensor.detach().clone())
            else:
                values, scale, _ = module._pack(name, tensor.detach())
                module.register_buffer(f"{name}_packed", values)
                module.register_buffer(f"{name}_scale", scale)
        module._renew()

    def dequantize(self) -> None:
        """Make this module one of the class that it replaces, whose parameters are the rounded weights."""
        trained = self._trained
        weights: dict[str, Tensor | None] = {}
        for name in self._parameter_names:
            if name in self._buffers:
                weights[name] = self._buffers.pop(name)
            else:
                weights[name] = self._matrix(name)
                del self._buffers[f"{name}_packed"], self._buffers[f"{name}_scale"]
        for attribute in ("_weights_dtype", "_parameter_names", "_trained", "_buffer_names"):
            self.__dict__.pop(attribute, None)
        self.__class__ = self._replaces  # type: ignore[assignment]
        for name, tensor in weights.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, name in trained))
        QuantizedBase._renew(self)

    def _renew(self) -> None:
        """Renew what the class of torch.nn holds besides parameters and buffers."""
        if isinstance(self, nn.RNNBase):
            self._init_flat_weights()

    def _pack(self, name: str, w: Tensor) -> PackedWeight:
        return pack(w, self._weights_dtype)

    def _shape(self, name: str) -> tuple[int, int]:
        """Return R and K of the matrix `name`, which is ``[G R, K]``."""
        raise NotImplementedError

    def _packed(self, name: str) -> PackedWeight:
        values = self._buffers[f"{name}_packed"]
        assert values is not None
        return PackedWeight(values, self._buffers[f"{name}_scale"], self._shape(name)[1])

    def _matrix(self, name: str) -> Tensor:
        return unpack(self._packed(name), self._shape(name)[0])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weights={self._weights_dtype}"

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)


class _QuantizedLayers(QuantizedBase):
    """Recurrent layers; `forward` is that of the layer which this one replaces."""

    mode: str
    input_size: int
    hidden_size: int
    proj_size: int
    bidirectional: bool
    _all_weights: list[list[str]]
    _buffer_names: list[tuple[list[str], int]]  # buffers of each row of QuantizedWeights, and I

    def _pack(self, name: str, w: Tensor) -> PackedWeight:
        gates = 1 if name.startswith("weight_hr") else gates_of(self.mode)
        return pack(w, self._weights_dtype, gates, state=not name.startswith("weight_ih"))

    def _shape(self, name: str) -> tuple[int, int]:
        P, H = self.proj_size or self.hidden_size, self.hidden_size
        if name.startswith("weight_hr"):
            return P, H
        if name.startswith("weight_hh"):
            return H, P
        return H, self.input_size if name.startswith("weight_ih_l0") else P * (1 + self.bidirectional)

    def _renew(self) -> None:
        super()._renew()
        self._buffer_names = []
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            matrices = [f"weight_{name}{suffix}_{part}" for name in ("ih", "hh", "hr") for part in ("packed", "scale")]
            biases = [f"bias_{name}{suffix}" for name in ("ih", "hh")]
            self._buffer_names.append(([*matrices[:4], *biases, *matrices[4:]], self._shape(names[0])[1]))

    def _weights(self) -> Any:
        # Looked up in every call, as in other layers, and written for speed: a call may be one step.
        find = self._buffers.get  # None for what the layer does not have
        rows = []
        for (w_ih, s_ih, w_hh, s_hh, b_ih, b_hh, w_hr, s_hr), columns in self._buffer_names:
            state = find(w_hh), find(s_hh), find(b_ih), find(b_hh), find(w_hr), find(s_hr)
            rows.append((find(w_ih), find(s_ih), *state, columns))
        return QuantizedWeights(rows, self.hidden_size, self.proj_size or self.hidden_size)

    @property
    def all_weights(self) -> Any:
        """The weights of each layer and direction in float32, in the order of the states."""
        return [
            [self._matrix(name) if name.startswith("weight") else self._buffers[name] for name in names]
            for names in self._all_weights
        ]


class QuantizedRNN(_QuantizedLayers, RNN):
    """A :class:`llm_ext.RNN` with weights of 8 or 16 bits; it is called as that layer, on float32.

    Example:
        >>> layer = llm_ext.RNN(10, 20)
        >>> _ = llm_ext.quantize_(layer)
        >>> type(layer).__name__, layer(torch.randn(5, 3, 10))[0].shape
        ('QuantizedRNN', torch.Size([5, 3, 20]))
    """

    _replaces = RNN


class QuantizedGRU(_QuantizedLayers, GRU):
    """A :class:`llm_ext.GRU` with weights of 8 or 16 bits; it is called as that layer, on float32.

    Example:
        >>> layer = llm_ext.GRU(10, 20)
        >>> _ = llm_ext.quantize_(layer)
        >>> type(layer).__name__, layer(torch.randn(5, 3, 10))[0].shape
        ('QuantizedGRU', torch.Size([5, 3, 20]))
    """

    _replaces = GRU


class QuantizedLSTM(_QuantizedLayers, LSTM):
    """A :class:`llm_ext.LSTM` with weights of 8 or 16 bits; it is called as that layer, on float32.

    Example:
        >>> layer = llm_ext.LSTM(10, 20)
        >>> _ = llm_ext.quantize_(layer)
        >>> type(layer).__name__, layer(torch.randn(5, 3, 10))[0].shape
        ('QuantizedLSTM', torch.Size([5, 3, 20]))
    """

    _replaces = LSTM


class _QuantizedCell(QuantizedBase):
    """A recurrent cell; `forward` is that of the cell which this one replaces."""

    mode: str
    input_size: int
    hidden_size: int

    def _pack(self, name: str, w: Tensor) -> PackedWeight:
        return pack(w, self._weights_dtype, gates_of(self.mode), state=name == "weight_hh")

    def _shape(self, name: str) -> tuple[int, int]:
        return self.hidden_size, self.input_size if name == "weight_ih" else self.hidden_size

    def _weights(self) -> Any:
        found: Any = self._buffers
        names = "weight_ih_packed", "weight_ih_scale", "weight_hh_packed", "weight_hh_scale", "bias_ih", "bias_hh"
        row = (*[found[name] for name in names], None, None, self.input_size)
        return QuantizedWeights([row], self.hidden_size, self.hidden_size)


class QuantizedRNNCell(_QuantizedCell, RNNCell):
    """A :class:`llm_ext.RNNCell` with weights of 8 or 16 bits; it is called as that cell, on float32.

    Example:
        >>> cell = llm_ext.RNNCell(10, 20)
        >>> _ = llm_ext.quantize_(cell)
        >>> type(cell).__name__, cell(torch.randn(3, 10)).shape
        ('QuantizedRNNCell', torch.Size([3, 20]))
    """

    _replaces = RNNCell


class QuantizedGRUCell(_QuantizedCell, GRUCell):
    """A :class:`llm_ext.GRUCell` with weights of 8 or 16 bits; it is called as that cell, on float32.

    Example:
        >>> cell = llm_ext.GRUCell(10, 20)
        >>> _ = llm_ext.quantize_(cell)
        >>> type(cell).__name__, cell(torch.randn(3, 10)).shape
        ('QuantizedGRUCell', torch.Size([3, 20]))
    """

    _replaces = GRUCell


class QuantizedLSTMCell(_QuantizedCell, LSTMCell):
    """A :class:`llm_ext.LSTMCell` with weights of 8 or 16 bits; it is called as that cell, on float32.

    Example:
        >>> cell = llm_ext.LSTMCell(10, 20)
        >>> _ = llm_ext.quantize_(cell)
        >>> type(cell).__name__, cell(torch.randn(3, 10))[0].shape
        ('QuantizedLSTMCell', torch.Size([3, 20]))
    """

    _replaces = LSTMCell


class QuantizedLinear(QuantizedBase, Linear):
    """A :class:`llm_ext.Linear` with a weight of 8 or 16 bits.

    Attributes:
        bias: b, ``[O]``.

    Example:
        >>> layer = llm_ext.Linear(20, 30)
        >>> _ = llm_ext.quantize_(layer)
        >>> type(layer).__name__, layer(torch.randn(128, 20)).shape
        ('QuantizedLinear', torch.Size([128, 30]))
    """

    _replaces = Linear

    def _shape(self, name: str) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W in float32, ``[O, I]``; it is computed here."""
        return self._matrix("weight")

    def forward(self, input: Tensor) -> Tensor:
        """Return input ``[*, I]`` mapped to ``[*, O]``.

        Raises:
            ValueError: A shape or device does not fit.
            TypeError: The input is not float32.
        """
        try:
            return quantized_linear(input, self._packed("weight"), self._buffers["bias"], self.out_features)
        except (ArgumentError, TypeError):
            if isinstance(input, Tensor) and input.dtype == torch.float32:
                leading = (None,) * (input.dim() - 1)
                check_input("Linear", "input", input, "*, I", (*leading, self.in_features), self.weight)
            raise


class QuantizedAffineEmbedding(QuantizedBase, AffineEmbedding):
    """A :class:`llm_ext.nn.AffineEmbedding` with embeddings of 8 or 16 bits.

    Example:
        >>> embedding = llm_ext.nn.AffineEmbedding(1000, 64)
        >>> _ = llm_ext.quantize_(embedding)
        >>> embedding(torch.randint(1000, (20, 8))).shape
        torch.Size([20, 8, 64])
    """

    _replaces = AffineEmbedding

    def _pack(self, name: str, w: Tensor) -> PackedWeight:
        # Rows are looked up, and not multiplied: they stay as they are.
        return PackedWeight(*round_weight(w, self._weights_dtype), w.shape[1])

    def _shape(self, name: str) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def _matrix(self, name: str) -> Tensor:
        return widen(*self._packed(name)[:2])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W in float32, ``[V, E]``; it is computed here."""
        return self._matrix("weight")

    def _look_up(self, ids: Tensor) -> Tensor:
        values, scale, _ = self._packed("weight")
        rows = F.embedding(ids, values)
        return widen(rows, None if scale is None else F.embedding(ids, scale.unsqueeze(1)).squeeze(-1))


def rounding_error(w: Tensor, weights: str) -> float:
    """Return the root mean square of the error of rounded weights, relative to that of the weights.

    It is that of each row, averaged over the rows, and leaves out weights above `_OUTLIER` times the median of their
    row: otherwise a weight that is large enough to take the bits of all others would hide it.
    """
    if w.numel() == 0:
        return 0.0
    size = w.abs()
    median = torch.where(size == 0, torch.nan, size).nanmedian(1, keepdim=True).values  # NaN in a row of zeros
    median = torch.where(median.isnan(), 1, median)
    counted = ~(size > _OUTLIER * median)  # with NaN
    error, weight = (
        torch.where(counted, each / median, 0).square().sum(1) for each in (widen(*round_weight(w, weights)) - w, w)
    )
    return float(torch.where(error == 0, 0, error / weight).mean().sqrt())
