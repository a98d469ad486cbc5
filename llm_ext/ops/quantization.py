"""Recurrences and linear layers with packed weights of 8 or 16 bits; inputs, states and results are float32.

The layers of :mod:`llm_ext.nn.quantized` call them. `llm_ext.reference.quantization` defines the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from llm_ext.ops import argument_checks
from llm_ext.ops._registration import (
    AUTOCAST_DTYPES,
    FAILURES,
    explain,
    refuse_derivative,
    register_fake,
    torch_ops,
)
from llm_ext.ops._transforms import exports_to_onnx
from llm_ext.ops.argument_checks import ArgumentError, DtypeError, op_of
from llm_ext.reference.quantization import MAX_INT8_COLUMNS, quantize_weight

__all__ = [
    "DTYPES",
    "MAX_INT8_COLUMNS",
    "PackedWeight",
    "QuantizedWeights",
    "one_direction",
    "pack",
    "quantized_linear",
    "round_weight",
    "unpack",
    "widen",
]

_rnn_forward = torch_ops.quantized_rnn_forward.default
_linear_forward = torch_ops.quantized_linear_forward.default

DTYPES = ("int8", "bfloat16")
# Rows of a panel of packed weights, numbers of a row that are adjacent there, of int8 weights that meet states and of
# others, and what is added to the integers of a state: csrc/params/quantized.h.
_PANEL = 16
_BYTE_DEPTH, _DEPTH = 4, 2
_OFFSET = 64
_DERIVATIVE = "train with llm_ext.fake_quantize_, and quantize after training"


class PackedWeight(NamedTuple):
    """A packed weight matrix ``[G R, K]``, of G blocks of R rows.

    Attributes:
        values: ``[R / 16, G, K / d, 16, d]``, R and K rounded up: int8, with d = 4 for the products with states, or
            bfloat16 as int16; otherwise d = 2. With d = 4 there is one more of K / d, the first: an int32 for each
            row, -64 times the sum of its numbers, because a state has integers from 1 to 127 for -63 to 63.
        scale: Scale of each row of int8 values, float32 ``[G R]``; None for bfloat16.
        columns: K.
    """

    values: Tensor
    scale: Tensor | None
    columns: int


class QuantizedWeights(NamedTuple):
    """Weights of a call of `recurrence.run` that are packed.

    Attributes:
        rows: ``(w_ih, s_ih, w_hh, s_hh, b_ih, b_hh, w_hr, s_hr, I)`` of each layer and direction: the values and scales
            of packed weights, biases, which may be None as w_hr may, and the size of the input.
        hidden: H.
        output: P.
    """

    rows: Sequence[tuple[Any, ...]]
    hidden: int
    output: int


def round_weight(w: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """Round a float32 matrix to int8 and the scale of each row, or to bfloat16 as int16 and None."""
    if dtype == "int8":
        return quantize_weight(w)
    # As integers, which `module.to(dtype)` does not cast.
    return w.to(torch.bfloat16).view(torch.int16), None


def widen(values: Tensor, scale: Tensor | None) -> Tensor:
    """Return rounded rows ``[*, K]`` in float32; the scale is ``[*]``."""
    if scale is None:
        return values.view(torch.bfloat16).float()
    return values.float() * scale.unsqueeze(-1)


def pack(w: Tensor, dtype: str, gates: int = 1, *, state: bool = False) -> PackedWeight:
    """Round a float32 matrix ``[G R, K]`` to int8 or bfloat16, and pack it.

    Args:
        w: The matrix.
        dtype: "int8" or "bfloat16".
        gates: G.
        state: Whether it is multiplied with states, which are bytes if it is int8.

    Raises:
        ValueError: An int8 matrix has more than `MAX_INT8_COLUMNS` columns: a sum could exceed 32 bits.
    """
    rows, K = len(w) // gates, w.shape[1]
    if dtype == "int8" and K > MAX_INT8_COLUMNS:
        raise ValueError(f"pack: w has {K} columns, and an int8 weight may have at most {MAX_INT8_COLUMNS}")
    values, scale = round_weight(w, dtype)
    depth = _BYTE_DEPTH if state and dtype == "int8" else _DEPTH
    blocks = torch.nn.functional.pad(values.view(gates, rows, K), (0, -K % depth, 0, -rows % _PANEL))
    panels = blocks.view(gates, -(-rows // _PANEL), _PANEL, -(-K // depth), depth).permute(1, 0, 3, 2, 4)
    if depth == _BYTE_DEPTH:
        first = (panels.sum((2, 4), dtype=torch.int32) * -_OFFSET).unsqueeze(-1).view(torch.int8)
        panels = torch.cat([first.unsqueeze(2), panels], 2)
    return PackedWeight(panels.contiguous(), scale, K)


def unpack(packed: PackedWeight, rows: int) -> Tensor:
    """Return the float32 matrix ``[G R, K]`` that a packed weight of G blocks of R = `rows` rows stands for."""
    values = packed.values[:, :, 1:] if packed.values.shape[-1] == _BYTE_DEPTH else packed.values
    panels, gates = values.permute(1, 0, 3, 2, 4), values.shape[1]
    values = panels.flatten(3).flatten(1, 2)[:, :rows, : packed.columns].reshape(gates * rows, packed.columns)
    return widen(values, packed.scale)


def _check_input(op: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a Tensor, got {type(x).__name__}")
    if x.dtype != torch.float32:
        raise DtypeError(f"{op}: x must be float32 with quantized weights, got {x.dtype}".replace("torch.", ""))
    if not x.is_cpu:
        raise ArgumentError(f"{op}: quantized weights need x on the cpu, got {x.device}")


def _call_arguments(*tensors: Tensor | None) -> Any:
    """Return inputs and states as the ops take them; None stays None.

    Under autocast, in which layers pass each other rounded results, they become float32.
    """
    if exports_to_onnx():
        raise NotImplementedError("llm_ext: ONNX has no operator for packed weights; call llm_ext.dequantize_ first")
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    return tuple(t.float() if isinstance(t, Tensor) and t.dtype in AUTOCAST_DTYPES else t for t in tensors)


def one_direction(
    mode: str,
    x: Tensor,
    state: tuple[Tensor, ...] | None,
    weights: QuantizedWeights,
    row: int,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run row `row` of the weights, one direction of one layer, as `recurrence._one_direction`."""
    tensors, hidden, output = weights.rows[row], weights.hidden, weights.output
    h0 = None if state is None else state[0]
    c0 = None if state is None or mode != "LSTM" else state[1]
    x, h0, c0 = _call_arguments(x, h0, c0)
    try:
        y, h_n, c_n = _rnn_forward(
            mode, x, h0, c0, *tensors[:-1], batch_sizes, lengths, tensors[-1], hidden, output, reverse
        )
    except (*FAILURES, ValueError) as failure:
        explain(failure, _check_recurrence, mode, x, lengths, failure)
    return y, (h_n, c_n) if mode == "LSTM" else (h_n,)


def _check_recurrence(mode: str, x: Tensor, lengths: Tensor | None, failure: Exception) -> None:
    op = op_of(mode)
    _check_input(op, x)
    if lengths is not None and x.dim() == 3:
        argument_checks.batch_lengths(op, x, lengths)
    _check(op, x, failure)


def _check(op: str, x: Tensor, failure: Exception) -> None:
    """Raise what is wrong with x, or else what the op says of its arguments, if it has refused them."""
    _check_input(op, x)
    _, refused, words = str(failure).partition("\n")[0].rpartition("_forward: ")
    if refused and isinstance(failure, RuntimeError):
        raise ArgumentError(f"{op}: {words}")


def _rnn_forward_fake(
    mode: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    s_ih: Tensor | None,
    w_hh: Tensor,
    s_hh: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    s_hr: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    input: int,
    hidden: int,
    output: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = op_of(mode)
    _check_input(op, x)
    if x.shape[-1] != input:
        raise ArgumentError(f"{op}: x must have I = {input} features, got {list(x.shape)}")
    if h0 is not None:
        leading: tuple[Any, ...] = tuple(h0.shape[:-1])
    else:
        leading = (1, x.shape[1])
    cells = x.new_empty((*leading, hidden)) if mode == "LSTM" else x.new_empty(0)
    return x.new_empty((*x.shape[:-1], output)), x.new_empty((*leading, output)), cells


register_fake("quantized_rnn_forward", _rnn_forward_fake)
refuse_derivative("quantized_rnn_forward", _DERIVATIVE)


def quantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out_features: int) -> Tensor:
    """Apply an affine map with a packed weight ``[O, I]``: x ``[*, I]`` to ``[*, O]``."""
    (x,) = _call_arguments(x)
    try:
        return cast(Tensor, _linear_forward(x, *weight[:2], bias, weight.columns, out_features))
    except FAILURES as failure:
        explain(failure, _check, "linear", x, failure)


def _linear_forward_fake(
    x: Tensor, w: Tensor, scale: Tensor | None, b: Tensor | None, input: int, output: int
) -> Tensor:
    _check_input("linear", x)
    if x.shape[-1] != input:
        raise ArgumentError(f"linear: x must have I = {input} features, got {list(x.shape)}")
    return x.new_empty((*x.shape[:-1], output))


register_fake("quantized_linear_forward", _linear_forward_fake)
refuse_derivative("quantized_linear_forward", _DERIVATIVE)
