"""Weights of 8 bits, inputs of up to 16 and states of 7 bits in plain PyTorch: `llm_ext.ops` with int8 weights.

A row of weights is ``w = scale * q`` with integers q from -127 to 127. A row a of K numbers is rounded to ``a = scale *
q`` with integers |q| <= Q. For an input, Q is the largest number up to 32767 with ``127 * Q * K < 2**31``: it exceeds
16000 up to K = 1024, so that what is lost is lost in the weights. For a state, and the output of an LSTM before its
projection, Q is 63: they are bounded, and their numbers of similar size. The sum of the products of both integers is
exact in int32, in any order of the terms. Everything else, the gates included, is not rounded.

Rows of zeros have the scale 0. A row with NaN or infinity has the scale NaN, and everything computed with it is NaN. A
row of inputs without a magnitude above 1e-30 counts as zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "INPUT_LIMIT",
    "MAX_INT8_COLUMNS",
    "STATE_LIMIT",
    "FakeQuantizedWeight",
    "QuantizedWeight",
    "fake_quantized_linear",
    "quantize_rows",
    "quantize_weight",
    "quantized_linear",
]

# The largest Q of inputs, and Q of states.
INPUT_LIMIT, STATE_LIMIT = 32767, 63
# The largest K: sums of products of 127 and 127 fit into int32.
MAX_INT8_COLUMNS = 2**31 // 127**2


class QuantizedWeight(NamedTuple):
    """A weight matrix of 8 bits; it takes the place of a matrix in the recurrences of `llm_ext.reference`.

    Attributes:
        values: q, int8 ``[O, K]``, from -127 to 127.
        scale: Scale of each row, ``[O]``.
    """

    values: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """Return the weights, ``[O, K]`` in the dtype of the scale."""
        return self.values.to(self.scale.dtype) * self.scale[:, None]


class FakeQuantizedWeight(NamedTuple):
    """A weight matrix whose inputs and states are rounded as those of a `QuantizedWeight`, for training.

    Attributes:
        values: The weights, ``[O, K]``; they are not rounded here.
    """

    values: Tensor


def _divide(x: Tensor, largest: Tensor, limit: int, smallest: float) -> tuple[Tensor, Tensor]:
    """Return x in units of ``largest / limit``, rounded to integers, and the unit; both 0 for rows below `smallest`."""
    usable = (largest >= smallest) & largest.isfinite()
    factor = torch.where(usable, limit / largest, 0)
    # A product and not a quotient with the unit: one division for each row.
    values = torch.where(usable, (x * factor).round(), 0)
    scale = torch.where(usable, largest / limit, torch.where(largest < torch.inf, 0.0, torch.nan))
    return values, scale.to(x.dtype)


def quantize_weight(w: Tensor) -> QuantizedWeight:
    """Round each row of weights ``[O, K]`` to 8 bits: its largest magnitude becomes 127."""
    largest = w.abs().amax(1, keepdim=True) if w.shape[1] else w.new_zeros(len(w), 1)
    smallest = 127 * torch.finfo(w.dtype).tiny  # the reciprocal of the unit must be finite
    values, scale = _divide(w, largest, 127, smallest)
    return QuantizedWeight(values.to(torch.int8), scale.squeeze(1))


def quantize_rows(x: Tensor, limit: int = INPUT_LIMIT) -> tuple[Tensor, Tensor]:
    """Return each row of an input ``[*, K]`` rounded to integers, in the dtype of x, and the scales ``[*, 1]``."""
    K = x.shape[-1]
    largest = x.abs().amax(-1, keepdim=True) if K else x.new_zeros(*x.shape[:-1], 1)
    return _divide(x, largest, min(limit, 2**31 // (127 * max(K, 1))), 1e-30)


def quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, limit: int = INPUT_LIMIT
) -> Tensor:
    """Affine map ``y = x Wᵀ + b`` with weights of 8 bits and rows of x that are rounded to integers.

    Args:
        x: Input ``[*, K]``.
        weight: W, ``[O, K]``.
        bias: b, ``[O]``, or None for zeros.
        limit: The largest magnitude of the integers of x, unless fewer fit.
    """
    values, scale = quantize_rows(x, limit)
    # float64 holds the sums of integers exactly.
    sums = values.double() @ weight.values.double().T
    y = sums.to(x.dtype) * scale * weight.scale.to(x.dtype)
    return y if bias is None else y + bias


def fake_quantized_linear(
    x: Tensor, weight: FakeQuantizedWeight, bias: Tensor | None = None, limit: int = INPUT_LIMIT
) -> Tensor:
    """Affine map ``y = x Wᵀ + b`` with rows of x that are rounded, and gradients that pass the rounding.

    The arguments are those of `quantized_linear`. Source: the straight-through estimator, arXiv 1308.3432.
    """
    values, scale = quantize_rows(x.detach(), limit)
    rounded = values * scale + (x - x.detach())  # the difference is 0, and has the gradient of x
    return F.linear(rounded, weight.values, bias)
