"""Calls of the ops with large views of little memory, and one argument that does not fit: the last that is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from support.memory import memory_limit

HUGE = 1 << 31
# Megabytes in which each of the calls is refused.
LIMIT = 1000

Z = torch.zeros
STEPS = Z(1, 1, 4).expand(HUGE, 1, 4)  # a view of one step: a copy of it takes 34 GB, and its row offsets 17 GB
ROWS = Z(1, 4).expand(HUGE, 4)
LONG = torch.ones(1).long()
W_IH, W_QUERY, KEYS, W_OUT = Z(3, 4), Z(2, 3), Z(1, 5, 2), Z(6, 3)  # that fit
# bfloat16 weights as kernels read them: of a [3, 3] or [3, 4] one, and of a [3, 2 * HUGE] one.
PACKED = torch.zeros(1, 1, 2, 16, 2, dtype=torch.int16)
WIDE = PACKED[:, :, :1].expand(1, 1, HUGE, 16, 2)


def _needs(count: int) -> list[bool]:
    return [True] * count


def _rnn(
    ops: Any,
    x: Tensor = STEPS,
    w_ih: Tensor = W_IH,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
) -> object:
    return ops.rnn_forward(x, h0, w_ih, Z(3, 3), None, b_hh, batch_sizes, lengths, "tanh", False, False)


def _rnn_backward(
    ops: Any, grad_y: Tensor, grad_h_n: Tensor, x: Tensor, y: Tensor, h0: Any = None, sizes: Any = None
) -> object:
    return ops.rnn_backward(grad_y, grad_h_n, x, h0, Z(3, 4), Z(3, 3), y, sizes, None, "tanh", False, False, *_needs(6))


def _lstm_backward(ops: Any, saved: Tensor, grad_c_n: Tensor) -> object:
    x, y, weights = STEPS, STEPS[..., :3], (Z(12, 4), Z(12, 3), None)
    return ops.lstm_backward(y, None, grad_c_n, x, None, None, *weights, y, saved, None, None, False, False, *_needs(8))


def _layers(
    ops: Any,
    x: Tensor,
    *weights: Tensor,
    h0: Tensor | None = None,
    projections: Sequence[Tensor] = (),
    sizes: Tensor | None = None,
) -> object:
    return ops.multilayer_rnn_forward("RNN_TANH", x, h0, None, list(weights), False, False, projections, sizes, False)


def _quantized(
    ops: Any,
    x: Tensor,
    w_ih: Tensor = PACKED,
    w_hh: Tensor = PACKED,
    *,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    sizes: Tensor | None = None,
    lengths: Tensor | None = None,
) -> object:
    weights = w_ih, None, w_hh, None, None, b_hh, None, None
    return ops.quantized_rnn_forward("RNN_TANH", x, h0, None, *weights, sizes, lengths, x.shape[-1], 3, 3, False)


def _tangent(ops: Any, tangent_h0: Tensor) -> object:
    y, h0 = ROWS[:, :3], Z(1, 3)
    return ops.recurrence_tangent(
        "RNN_TANH", Z(3, 3), None, None, y, h0, *[None] * 4, tangent_h0, None, LONG.expand(HUGE), False
    )


def _pool_backward(
    ops: Any,
    grad_c: Tensor | None = None,
    grad_lse: Tensor | None = None,
    c: Tensor = ROWS,
    l: Tensor = ROWS[:, :2],  # noqa: E741
) -> object:
    return ops.attention_pool_backward(grad_c, grad_lse, STEPS, Z(4), None, None, None, c, l, *_needs(3))


def _prefix_backward(
    ops: Any,
    grad_c: Tensor | None = None,
    grad_l_n: Tensor | None = None,
    c: Tensor = STEPS,
    share: Tensor = ROWS[:, :1],
) -> object:
    return ops.prefix_pool_backward(grad_c, grad_l_n, None, STEPS, Z(4), None, c, share, *_needs(4))


def _additive(ops: Any, lengths: Tensor | None = None, values: Tensor = STEPS) -> object:
    return ops.additive_attention_forward(STEPS, STEPS, Z(4), values, lengths, None, False)


def _additive_backward(ops: Any, grad_context: Tensor | None = None, grad_weights: Tensor | None = None) -> object:
    inputs = STEPS, STEPS, Z(4), STEPS, None, None
    return ops.additive_attention_backward(grad_context, grad_weights, *inputs, *_needs(4))


def _step(
    ops: Any,
    w_query: Tensor = W_QUERY,
    keys: Tensor = KEYS,
    w_out: Tensor = W_OUT,
    b_out: Tensor | None = None,
    lengths: Tensor | None = None,
) -> object:
    x, h0 = Z(1, 1, 4).expand(1, HUGE, 4), Z(1, 1, 3).expand(1, HUGE, 3)
    rest = w_query, keys, Z(2), Z(1, 5, 6), lengths, w_out, b_out
    return ops.attention_step("RNN_TANH", x, h0, None, [Z(3, 4), Z(3, 3)], False, None, *rest)


IDS = torch.zeros(1, 1).long().expand(HUGE, 1)
HALF = Z(1, 1).half().expand(HUGE, 1)

# On each backend.
CALLS: dict[str, Callable[[Any], object]] = {
    "rnn: dtype of w_ih": lambda ops: _rnn(ops, w_ih=Z(3, 4).double()),
    "rnn: w_ih": lambda ops: _rnn(ops, w_ih=Z(3, 5)),
    "rnn: b_hh": lambda ops: _rnn(ops, b_hh=Z(4)),
    "rnn: b_hh, lengths": lambda ops: _rnn(ops, b_hh=Z(4), lengths=LONG),
    "rnn: b_hh, packed": lambda ops: _rnn(ops, ROWS, b_hh=Z(4), h0=Z(1, 3), batch_sizes=LONG.expand(HUGE)),
    "rnn: batch_sizes": lambda ops: _rnn(ops, Z(3, 4), h0=Z(1, 3), batch_sizes=LONG.expand(HUGE)),
    "rnn_backward: grad_h_n": lambda ops: _rnn_backward(ops, STEPS[..., :3], Z(1, 4), STEPS, STEPS[..., :3]),
    "rnn_backward: grad_h_n, packed": lambda ops: _rnn_backward(
        ops, *(ROWS[:, :3], Z(1, 4), ROWS, ROWS[:, :3], Z(1, 3)), LONG.expand(HUGE)
    ),
    "lstm_backward: saved": lambda ops: _lstm_backward(ops, Z(1, 4).expand(HUGE, 4), Z(1, 3)),
    "lstm_backward: grad_c_n": lambda ops: _lstm_backward(ops, Z(1, 12).expand(HUGE, 12), Z(1, 4)),
    "layers: w_ih": lambda ops: _layers(ops, STEPS, Z(3, 5), Z(3, 3)),
    "layers: w_ih of the second": lambda ops: _layers(ops, STEPS, Z(3, 4), Z(3, 3), Z(3, 4), Z(3, 3)),
    "layers: w_hh of the second": lambda ops: _layers(ops, STEPS, Z(3, 4), Z(3, 3), Z(3, 3), Z(3, 4)),
    "layers: h0": lambda ops: _layers(ops, STEPS, Z(3, 4), Z(3, 3), h0=Z(1, 2, 3)),
    "attention_pool: u": lambda ops: ops.attention_pool_forward(STEPS, Z(5), None, None, None),
    "attention_pool: mask": lambda ops: ops.attention_pool_forward(STEPS, Z(4), None, None, Z(1, 1).bool()),
    "attention_pool_backward: grad_c": lambda ops: _pool_backward(ops, grad_c=Z(1, 4)),
    "attention_pool_backward: dtype of grad_lse": lambda ops: _pool_backward(ops, ROWS, HALF[:, 0]),
    "attention_pool_backward: c": lambda ops: _pool_backward(ops, c=Z(1, 4)),
    "attention_pool_backward: l": lambda ops: _pool_backward(ops, l=ROWS),
    "prefix_pool: scores": lambda ops: ops.prefix_pool_forward(STEPS, None, Z(1, 1), None, None, None, None),
    "prefix_pool: c0": lambda ops: ops.prefix_pool_forward(STEPS, Z(4), None, None, None, ROWS[:, :2], ROWS[:, :3]),
    "prefix_pool_backward: grad_c": lambda ops: _prefix_backward(ops, grad_c=Z(1, 1, 4)),
    "prefix_pool_backward: dtype of grad_l_n": lambda ops: _prefix_backward(ops, STEPS, HALF[:, 0]),
    "prefix_pool_backward: share": lambda ops: _prefix_backward(ops, share=Z(1, 1)),
    "prefix_pool_backward: c": lambda ops: _prefix_backward(ops, c=Z(1, 1, 4)),
    "additive_attention: values": lambda ops: _additive(ops, values=Z(1, 1, 3)),
    "additive_attention_backward: grad_context": lambda ops: _additive_backward(ops, grad_context=Z(1, 1, 4)),
    "additive_attention_backward: dtype of grad_weights": lambda ops: _additive_backward(ops, STEPS, HALF[..., None]),
}

# On the CPU, which has more ops, and reads lengths and ids.
CPU_CALLS: dict[str, Callable[[Any], object]] = {
    "layers: w_hh, packed": lambda ops: _layers(ops, ROWS, Z(3, 4), Z(3, 3), Z(3, 3), Z(3, 4), sizes=LONG.expand(HUGE)),
    "layers: w_hh, ids": lambda ops: _layers(ops, IDS, Z(3, 4), Z(3, 4), projections=(Z(9, 4),)),
    "layers: ids": lambda ops: _layers(ops, IDS, Z(4, 4), Z(4, 4), projections=(Z(0, 4),)),
    "rnn: lengths": lambda ops: _rnn(ops, Z(1, 1, 4).expand(3, HUGE, 4), lengths=(4 * LONG).expand(HUGE)),
    "attention_pool: lengths": lambda ops: ops.attention_pool_forward(STEPS, Z(4), None, (2 * LONG).expand(HUGE), None),
    "additive_attention: key_lengths": lambda ops: _additive(ops, (2 * LONG).expand(HUGE)),
    "attention_step: w_query": lambda ops: _step(ops, w_query=Z(2, 4)),
    "attention_step: keys": lambda ops: _step(ops, keys=Z(1, 4, 2)),
    "attention_step: key_lengths": lambda ops: _step(ops, lengths=6 * LONG),
    "attention_step: w_out": lambda ops: _step(ops, w_out=Z(6, 4)),
    "attention_step: b_out": lambda ops: _step(ops, b_out=Z(5)),
    "quantized_rnn: w_hh": lambda ops: _quantized(ops, STEPS, w_hh=PACKED[:0]),
    "quantized_rnn: w_hh, lengths": lambda ops: _quantized(ops, STEPS, w_hh=PACKED[:0], lengths=LONG),
    "quantized_rnn: b_hh, lengths": lambda ops: _quantized(ops, STEPS, b_hh=Z(4), lengths=LONG),
    "quantized_rnn: b_hh, packed": lambda ops: _quantized(ops, ROWS, b_hh=Z(4), h0=Z(1, 3), sizes=LONG.expand(HUGE)),
    "quantized_rnn: b_hh, a wide w_ih": lambda ops: _quantized(ops, Z(1, 1, 1).expand(1, 1, 2 * HUGE), WIDE, b_hh=Z(4)),
    "quantized_rnn: lengths": lambda ops: _quantized(
        ops, Z(1, 1, 4).expand(1, HUGE, 4), lengths=(2 * LONG).expand(HUGE)
    ),
    "quantized_linear: b": lambda ops: ops.quantized_linear_forward(ROWS, PACKED, None, Z(4), 4, 3),
    "quantized_linear: b, a wide w": lambda ops: ops.quantized_linear_forward(
        Z(1, 1).expand(1, 2 * HUGE), WIDE, None, Z(4), 2 * HUGE, 3
    ),
    "linear: w": lambda ops: ops.linear_forward(ROWS, Z(3, 5), None),
    "linear: b": lambda ops: ops.linear_forward(ROWS, Z(3, 4), Z(4)),
    "linear_argmax: b": lambda ops: ops.linear_argmax(ROWS, Z(3, 4), Z(4)),
    "linear_backward: grad_y": lambda ops: ops.linear_backward(ROWS, ROWS, Z(3, 4), *_needs(3)),
    "recurrence_tangent: tangent_h0": lambda ops: _tangent(ops, Z(1, 4)),
}


def assert_refused_without_memory(call: Callable[[Any], object], ops: Any) -> None:
    """The op names the argument that does not fit, before it copies or allocates."""
    with memory_limit(LIMIT), pytest.raises(RuntimeError, match="must") as found:
        call(ops)
    assert "out of memory" not in str(found.value)
