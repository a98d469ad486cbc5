"""Linear layers: y = x Wᵀ + b, and the index of its largest component."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_ext.ops import argument_checks
from llm_ext.ops._registration import (
    FAILURES,
    explain,
    fake_gradients,
    needed,
    refuse_derivative,
    register_autograd,
    register_fake,
    torch_ops,
)
from llm_ext.ops._transforms import transforms_active

__all__ = ["linear", "linear_argmax"]

_linear_forward = torch_ops.linear_forward.default
_linear_backward = torch_ops.linear_backward.default
_linear_argmax = torch_ops.linear_argmax.default


def use_native_gemm(x: Tensor) -> bool:
    """Return whether products with x run on the native GEMM: on a CPU in float32 and float64, outside autocast.

    In 16 bits and on CUDA torch's products are at least as fast; under a transform they have the rules.
    """
    return (
        isinstance(x, Tensor)
        and x.dtype in argument_checks.NATIVE_GEMM_DTYPES
        and x.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and not transforms_active()
    )


# ---- linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply an affine map ``y = x Wᵀ + b``, as :func:`torch.nn.functional.linear`.

    On a CPU, in float32 and float64, the product runs on the native GEMM; elsewhere it is torch's.

    Args:
        x: Input ``[*, I]``.
        weight: W, ``[O, I]``.
        bias: b, ``[O]``, or ``None`` for zeros.

    Returns:
        y, ``[*, O]``.

    Raises:
        ValueError: A shape or device does not fit.
        TypeError: The dtypes differ.

    Example:
        >>> ops.linear(torch.randn(20, 8, 64), torch.randn(128, 64)).shape
        torch.Size([20, 8, 128])
    """
    if not use_native_gemm(x):
        return F.linear(x, weight, bias)
    try:
        return cast(Tensor, _linear_forward(x, weight, bias))
    except FAILURES as failure:
        explain(failure, argument_checks.linear, x, weight, bias)


def _linear_forward_fake(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    argument_checks.linear(x, w, b)
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _linear_backward_fake(grad_y: Tensor, x: Tensor, w: Tensor, *needs: bool) -> tuple[Tensor, ...]:
    return fake_gradients(*zip((x, w, w.new_empty(w.shape[0])), needs, strict=True))


def _linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, _b = inputs
    ctx.save_for_backward(x, w)


def _linear_autograd(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return None, None, None
    needs = ctx.needs_input_grad
    x, w = ctx.saved_tensors
    if torch.is_grad_enabled() or transforms_active():
        N = math.prod(x.shape[:-1])
        rows = grad_y.reshape(N, w.shape[0])
        return (
            grad_y @ w if needs[0] else None,
            rows.mT @ x.reshape(N, w.shape[1]) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
        )
    return needed(_linear_backward(grad_y, x, w, *needs), needs)


register_fake("linear_forward", _linear_forward_fake)
register_fake("linear_backward", _linear_backward_fake)
# Autocast needs no rule: under it, use_native_gemm leaves the product to torch.
register_autograd("linear_forward", _linear_autograd, _linear_setup_context)
refuse_derivative("linear_backward")


# ---- linear_argmax


def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the index of the largest component of ``x Wᵀ + b``, as ``linear(x, weight, bias).argmax(-1)``.

    Where the native GEMM is used, the components themselves are not stored. Greedy search needs no scores.

    Args:
        x: Input ``[*, I]``.
        weight: W, ``[O, I]`` with 0 < O < 2³¹.
        bias: b, ``[O]``, or ``None`` for zeros.

    Returns:
        Indices ``[*]`` int64, the first one of equal components. A NaN is larger than every number; which one of
        several NaNs is returned is not specified.

    Raises:
        ValueError: A shape or device does not fit.
        TypeError: The dtypes differ.

    Example:
        >>> ops.linear_argmax(torch.tensor([[1.0, 2.0]]), torch.eye(2))
        tensor([1])
    """
    if not use_native_gemm(x):
        return F.linear(x, weight, bias).argmax(-1)
    try:
        return cast(Tensor, _linear_argmax(x, weight, bias))
    except FAILURES as failure:
        explain(failure, argument_checks.linear_argmax, x, weight, bias)


def _linear_argmax_fake(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    argument_checks.linear_argmax(x, w, b)
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


register_fake("linear_argmax", _linear_argmax_fake)
refuse_derivative("linear_argmax", "indices are not differentiable")
