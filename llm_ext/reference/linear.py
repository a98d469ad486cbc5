"""Affine maps in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

__all__ = ["linear", "linear_argmax"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Affine map of vectors, ``y = x Wᵀ + b``.

    Args:
        x: ``[*, I]``.
        weight: W, ``[O, I]``.
        bias: b, ``[O]``. None means zeros.

    Returns:
        y, ``[*, O]``.
    """
    y = x @ weight.T
    return y if bias is None else y + bias


def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Index of the maximum of each vector ``y = x Wᵀ + b``.

    The arguments are those of `linear`.

    Returns:
        Indices, int64 ``[*]``: the first of equal maxima. A NaN is above all numbers.
    """
    return linear(x, weight, bias).argmax(-1)
