"""Floating-point operations of every op, for torch.utils.flop_counter.FlopCounterMode.

As in torch, they are those of the matrix products, two for each multiply-add; padding and masked positions count. The
recurrent product of a first step counts with a state of zeros too, as torch.nn computes it. The formulas receive the
shapes of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from llm_ext.ops._registration import torch_ops
from llm_ext.ops.argument_checks import gates_of

Shape = Sequence[int]


def _register(*ops: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    return register_flop_formula([getattr(torch_ops, op) for op in ops])


# ---- recurrent networks


def _forward(rows: int, w_ih: Shape, w_hh: Shape, w_hr: Shape | None = None) -> int:
    """Count the products with all weights in each row."""
    return 2 * rows * (prod(w_ih) + prod(w_hh) + prod(w_hr or (0,)))


def _backward(
    rows: int, batch: int, w_ih: Shape, w_hh: Shape, w_hr: Shape | None, dx: bool, dh0: bool, dw: Sequence[bool]
) -> int:
    """Count the products of the gradients; `dw` are those of w_ih, w_hh and w_hr.

    The gradient of the hidden state goes through every row, but reaches the state before the first step only if needed.
    """
    through_time = rows if dh0 else rows - batch
    projection = prod(w_hr or (0,))
    products = rows * prod(w_ih) * (dx + dw[0]) + prod(w_hh) * (through_time + rows * dw[1])
    return 2 * (products + rows * projection * (1 + dw[2]))


def _rows(x: Shape) -> int:
    return prod(x[:-1])


def _batch(x: Shape, h0: Shape | None, batch_sizes: Shape | None) -> int:
    """Return the rows of a step; a packed sequence has a state."""
    return h0[-2] if h0 is not None else 0 if batch_sizes is not None or x[0] == 0 else x[1]


@_register("rnn_forward", "gru_forward")
def _(x: Shape, h0: Shape | None, w_ih: Shape, w_hh: Shape, *_: Any, out_shape: Any = None) -> int:
    return _forward(_rows(x), w_ih, w_hh)


@_register("lstm_forward")
def _(
    x: Shape,
    h0: Shape | None,
    c0: Shape | None,
    w_ih: Shape,
    w_hh: Shape,
    b_ih: Shape | None,
    b_hh: Shape | None,
    w_hr: Shape | None,
    *_: Any,
    out_shape: Any = None,
) -> int:
    return _forward(_rows(x), w_ih, w_hh, w_hr)


@_register("rnn_backward")
def _(grad_y: Any, grad_h: Any, x: Shape, h0: Any, w_ih: Shape, w_hh: Shape, *rest: Any, out_shape: Any = None) -> int:
    _y, batch_sizes, _lengths, _nonlinearity, _reverse, _tf32, dx, dh0, *dw = rest
    return _backward(_rows(x), _batch(x, h0, batch_sizes), w_ih, w_hh, None, dx, dh0, (*dw[:2], False))


@_register("gru_backward")
def _(grad_y: Any, grad_h: Any, x: Shape, h0: Any, w_ih: Shape, w_hh: Shape, *rest: Any, out_shape: Any = None) -> int:
    _y, _saved, batch_sizes, _lengths, _reverse, _tf32, dx, dh0, *dw = rest
    return _backward(_rows(x), _batch(x, h0, batch_sizes), w_ih, w_hh, None, dx, dh0, (*dw[:2], False))


@_register("lstm_backward")
def _(grad_y: Any, grad_h: Any, grad_c: Any, x: Shape, h0: Any, c0: Any, *rest: Any, out_shape: Any = None) -> int:
    w_ih, w_hh, w_hr, _y, _saved, batch_sizes, _lengths, _reverse, _tf32, dx, dh0, _dc0, *dw = rest
    return _backward(_rows(x), _batch(x, h0, batch_sizes), w_ih, w_hh, w_hr, dx, dh0, (*dw[:2], dw[4]))


@_register("quantized_rnn_forward")
def _(mode: str, x: Shape, *args: Any, out_shape: Any = None) -> int:
    hidden, output = args[13:15]
    w_hh, w_hr = (gates_of(mode) * hidden, output), (output, hidden) if output < hidden else None
    return _forward(_rows(x), (w_hh[0], x[-1]), w_hh, w_hr)


@_register("quantized_linear_forward")
def _(x: Shape, w: Any, scale: Any, b: Any, input: int, output: int, *, out_shape: Any = None) -> int:
    return 2 * prod(x) * output


@_register("recurrence_tangent", "recurrence_adjoint")
def _(mode: str, w_hh: Shape, w_hr: Shape | None, saved: Any, y: Shape, *_: Any, out_shape: Any = None) -> int:
    return _forward(_rows(y), (0,), w_hh, w_hr)


@_register("recurrence_curvature")
def _(*_: Any, out_shape: Any = None) -> int:
    return 0  # elementwise


def _directions(weights: Sequence[Shape], bias: bool) -> list[tuple[Shape, Shape, Shape | None]]:
    """Return (w_ih, w_hh, w_hr) of both directions of a layer."""
    half = len(weights) // 2
    rows = (weights[:half], weights[half:])
    return [(row[0], row[1], row[-1] if half > 2 + 2 * bias else None) for row in rows]


@_register("bidirectional_forward")
def _(
    mode: str, x: Shape, h0: Any, c0: Any, weights: Sequence[Shape], bias: bool, *_: Any, out_shape: Any = None
) -> int:
    return sum(_forward(_rows(x), *each) for each in _directions(weights, bias))


@_register("bidirectional_backward")
def _(grad_y: Any, grad_h: Any, grad_c: Any, mode: str, x: Shape, h0: Any, *rest: Any, out_shape: Any = None) -> int:
    _c0, weights, bias, _y, _saved, batch_sizes, _lengths, _tf32, dx, dh0, _dc0, dw = rest
    rows, batch = _rows(x), _batch(x, h0 and h0[1:], batch_sizes)
    return sum(_backward(rows, batch, *each, dx, dh0, (dw,) * 3) for each in _directions(weights, bias))


def _layers(rows: int, weights: Sequence[Shape], bias: bool, projected: int) -> int:
    """Count the products of layers whose first `projected` directions have precomputed input projections."""
    each = 4 if bias else 2
    pairs = [(weights[i], weights[i + 1]) for i in range(0, len(weights), each)]
    return sum(_forward(rows, (0,) if i < projected else w_ih, w_hh) for i, (w_ih, w_hh) in enumerate(pairs))


@_register("multilayer_rnn_forward")
def _(
    mode: str,
    x: Shape,
    h0: Any,
    c0: Any,
    weights: Sequence[Shape],
    bias: bool,
    bidirectional: bool,
    input_projections: Sequence[Shape],
    *_: Any,
    out_shape: Any = None,
) -> int:
    rows = prod(x) if input_projections else _rows(x)
    return _layers(rows, weights, bias, len(input_projections))


# ---- linear layers


@_register("linear_forward", "linear_argmax")
def _(x: Shape, w: Shape, b: Any, out_shape: Any = None) -> int:
    return 2 * _rows(x) * prod(w)


@_register("linear_backward")
def _(grad_y: Shape, x: Shape, w: Shape, dx: bool, dw: bool, db: bool, out_shape: Any = None) -> int:
    return 2 * _rows(x) * prod(w) * (dx + dw)


# ---- attention


@_register("attention_pool_forward", "prefix_pool_forward")
def _(e: Shape, u: Shape | None, *_: Any, out_shape: Any = None) -> int:
    # A prefix pool takes one multiply-add for each feature of a position, not a T × T matrix.
    return 2 * prod(e) * (1 + (u is not None))


def _pool_backward(e: Shape, u: Shape | None, de: bool, du: bool, dscores: bool) -> int:
    scores = de and u is not None  # e has a gradient through its scores
    return 2 * prod(e) * ((du or dscores or scores) + de + scores + du)


@_register("attention_pool_backward")
def _(grad_c: Any, grad_lse: Any, e: Shape, u: Shape | None, *rest: Any, out_shape: Any = None) -> int:
    *_tensors, de, du, dscores = rest
    return _pool_backward(e, u, de, du, dscores)


@_register("prefix_pool_backward")
def _(grad_c: Any, grad_l: Any, grad_c_n: Any, e: Shape, u: Shape | None, *rest: Any, out_shape: Any = None) -> int:
    *_tensors, de, du, dscores, _dstate = rest
    return _pool_backward(e, u, de, du, dscores)


def _pairs(query: Shape, keys: Shape) -> int:
    return query[0] * query[1] * keys[1]


@_register("additive_attention_forward")
def _(query: Shape, keys: Shape, v: Shape, values: Shape, *_: Any, out_shape: Any = None) -> int:
    return 2 * _pairs(query, keys) * (v[0] + values[2])


@_register("additive_attention_backward")
def _(
    grad_context: Any,
    grad_weights: Any,
    query: Shape,
    keys: Shape,
    v: Shape,
    values: Shape,
    *rest: Any,
    out_shape: Any = None,
) -> int:
    *_tensors, dquery, dkeys, dv, dvalues = rest
    hidden: bool = dquery or dkeys
    products: int = values[2] * ((hidden or dv) + dvalues) + v[0] * (hidden + dv)
    return 2 * _pairs(query, keys) * products


@_register("attention_step")
def _(
    mode: str,
    x: Shape,
    h0: Shape,
    c0: Any,
    weights: Sequence[Shape],
    bias: bool,
    input_projection: Shape | None,
    w_query: Shape,
    keys: Shape,
    v: Shape,
    values: Shape,
    key_lengths: Any,
    w_out: Shape,
    *_: Any,
    out_shape: Any = None,
) -> int:
    N = h0[1]
    attention: int = 2 * N * (prod(w_query) + keys[1] * (v[0] + values[2]) + prod(w_out))
    return _layers(N, weights, bias, int(input_projection is not None)) + attention
