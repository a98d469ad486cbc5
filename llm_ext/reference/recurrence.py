"""Recurrences in plain PyTorch: one layer in one direction (`rnn`, `gru`, `lstm`), and several layers at once.

The functions share these arguments and results:

- `x`: Input ``[T, B, I]``, or the rows ``[N, I]`` of a packed sequence, step after step, if `batch_sizes` is given.
- `w_ih`: W, ``[G H, I]``, the blocks of G gates one below the other. `w_hh`: U, ``[G H, H]``. `b_ih`, `b_hh`: b,
  ``[G H]``, or None for zeros. A matrix may be a `QuantizedWeight` or a `FakeQuantizedWeight`.
- `batch_sizes`: Rows of each step, int64 ``[T]``, positive and not increasing; N is their sum.
- `lengths`: Steps of each row, int64 ``[B]``, from 0 to T. Values of `x` beyond them are ignored, and y is 0 there.
- `reverse`: Run from the last step of a row to its first; ``y[t]`` still belongs to ``x[t]``.
- `reset`: bool ``[T, B]``, or ``[N]`` with `batch_sizes`. Before each step where it is set, the state of the row is
  replaced by that of `reset_to`, which has the form of the given state, with B rows or one; None means zeros.
- A state is ``[B, H]`` or, as torch.nn lays out the state of one layer, ``[1, B, H]``; None means zeros.

They return every hidden state in the layout of `x`, and the state after the last step of each row in the layout of the
given one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_ext.reference.lengths import within_lengths
from llm_ext.reference.quantization import (
    INPUT_LIMIT,
    STATE_LIMIT,
    FakeQuantizedWeight,
    QuantizedWeight,
    fake_quantized_linear,
    quantized_linear,
)

__all__ = ["gru", "lstm", "multilayer_rnn", "rnn"]

State = tuple[Tensor, ...]
Matrix = Tensor | QuantizedWeight | FakeQuantizedWeight
W = TypeVar("W")


def rnn(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Matrix,
    w_hh: Matrix,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    reset: Tensor | None = None,
    reset_to: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman recurrence, ``h_t = f(W x_t + b_ih + U h_{t-1} + b_hh)``.

    `nonlinearity` is f: "tanh", "relu" or "sigmoid". The other arguments are those of
    :func:`llm_ext.ops.rnn`.

    Source: J. Elman, "Finding structure in time", 1990.
    """
    mode = f"RNN_{nonlinearity.upper()}"
    wx = _linear(_zero_padding(x, lengths), w_ih, b_ih)
    first, to = (None if tensor is None else (tensor,) for tensor in (h0, reset_to))
    (y,), (h_n,) = _run(mode, wx, first, w_hh, b_hh, None, batch_sizes, lengths, reverse, reset, to)
    return y, h_n


def gru(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Matrix,
    w_hh: Matrix,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    reset_to: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit, with the gates r, z, n of torch.nn.GRU.

    ``r_t = sigmoid(W_r x_t + b_ih_r + U_r h_{t-1} + b_hh_r)``, z_t likewise,
    ``n_t = tanh(W_n x_t + b_ih_n + r_t (U_n h_{t-1} + b_hh_n))``, ``h_t = (1 - z_t) n_t + z_t h_{t-1}``.

    The arguments are those of :func:`llm_ext.ops.gru`; G = 3.

    Source: Cho et al., arXiv 1406.1078. Here, as in torch.nn.GRU, r is applied after the product with U_n.
    """
    wx = _linear(_zero_padding(x, lengths), w_ih, b_ih)
    first, to = (None if tensor is None else (tensor,) for tensor in (h0, reset_to))
    (y,), (h_n,) = _run("GRU", wx, first, w_hh, b_hh, None, batch_sizes, lengths, reverse, reset, to)
    return y, h_n


def lstm(
    x: Tensor,
    state: tuple[Tensor, Tensor] | None,
    w_ih: Matrix,
    w_hh: Matrix,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Matrix | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    reset_to: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Long short-term memory, with the gates i, f, g, o of torch.nn.LSTM.

    ``i_t = sigmoid(W_i x_t + b_ih_i + U_i h_{t-1} + b_hh_i)``, f_t and o_t likewise, g_t with tanh,
    ``c_t = f_t c_{t-1} + i_t g_t``, ``h_t = o_t tanh(c_t)``, or with a projection ``h_t = R (o_t tanh(c_t))``.

    `state` is ``(h0, c0)``. `w_hr` is R, ``[P, H]``: h then has P features, and U is ``[4 H, P]``. The other arguments
    are those of :func:`llm_ext.ops.lstm`; G = 4.

    Source: Hochreiter and Schmidhuber, "Long short-term memory", 1997; the forget gate: Gers et al., "Learning to
    forget", 2000; the projection: Sak et al., arXiv 1402.1128.
    """
    wx = _linear(_zero_padding(x, lengths), w_ih, b_ih)
    (y, _), (h_n, c_n) = _run("LSTM", wx, state, w_hh, b_hh, w_hr, batch_sizes, lengths, reverse, reset, reset_to)
    return y, (h_n, c_n)


@overload
def multilayer_rnn(
    mode: str,
    x: Tensor,
    state: State | None,
    weights: Sequence[Sequence[Matrix]],
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    input_projections: Sequence[Tensor] | None = None,
    reset: Tensor | None = None,
    reset_to: State | None = None,
    return_all_states: Literal[False] = False,
) -> tuple[Tensor, State]: ...


@overload
def multilayer_rnn(
    mode: str,
    x: Tensor,
    state: State | None,
    weights: Sequence[Sequence[Matrix]],
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    input_projections: Sequence[Tensor] | None = None,
    reset: Tensor | None = None,
    reset_to: State | None = None,
    return_all_states: Literal[True],
) -> tuple[Tensor, State, State]: ...


def multilayer_rnn(
    mode: str,
    x: Tensor,
    state: State | None,
    weights: Sequence[Sequence[Matrix]],
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    input_projections: Sequence[Tensor] | None = None,
    reset: Tensor | None = None,
    reset_to: State | None = None,
    return_all_states: bool = False,
) -> tuple[Tensor, State] | tuple[Tensor, State, State]:
    """Several recurrent layers, each reading the output of the one below it, in one or two directions.

    Args:
        mode: "RNN_TANH", "RNN_RELU", "RNN_SIGMOID", "GRU" or "LSTM".
        x: Input ``[T, B, I]`` or packed ``[N, I]``. With `input_projections`, int64 ids ``[T, B]`` or ``[N]``.
        state: ``(h0,)``, or ``(h0, c0)`` for an LSTM, each ``[R, B, *]`` with R = layers * directions. None means
            zeros.
        weights: ``(w_ih, w_hh[, b_ih, b_hh][, w_hr])`` of each layer and direction, layer by layer.
        bidirectional: A second direction runs in reverse; the outputs of both are concatenated.
        dropout: Probability of dropout on the output of every layer but the last, applied whenever it is above 0.
        batch_sizes: As in :func:`llm_ext.ops.multilayer_rnn`.
        lengths: As in :func:`llm_ext.ops.multilayer_rnn`.
        input_projections: For each direction of the first layer ``W_ih x + b_ih`` of every id, ``[V, G H]``; w_ih and
            b_ih of the first layer are then not read.
        reset: As in :func:`llm_ext.ops.multilayer_rnn`.
        reset_to: State in the form of `state`, ``[R, B, *]`` or ``[R, 1, *]``. None means zeros.
        return_all_states: Return the states after every step, too.

    Returns:
        The output y of the last layer, ``[T, B, D P]`` with D directions and P = H without w_hr (packed: ``[N, D P]``),
        and the state after the last step of every layer and direction, each ``[R, B, *]``. With `return_all_states`
        also the states after every step, each ``[R, T, B, *]`` or ``[R, N, *]``.
    """
    directions = 2 if bidirectional else 1
    last: list[State] = []
    every: list[State] = []
    for layer in range(len(weights) // directions):
        if layer > 0 and dropout > 0:
            x = F.dropout(x, dropout)
        x = _zero_padding(x, lengths)
        outputs = []
        for direction in range(directions):
            row = len(last)
            row_weights: Sequence[Any] = weights[row]
            w_ih, w_hh, b_ih, b_hh, w_hr = unpack_weights(row_weights)
            if layer == 0 and input_projections is not None:
                wx = input_projections[direction][x]
            else:
                wx = _linear(x, w_ih, b_ih)
            first, to = (None if s is None else tuple(tensor[row] for tensor in s) for s in (state, reset_to))
            states, new = _run(mode, wx, first, w_hh, b_hh, w_hr, batch_sizes, lengths, direction == 1, reset, to)
            outputs.append(states[0])
            last.append(new)
            every.append(states)
        x = torch.cat(outputs, -1)
    after, states = (tuple(torch.stack(tensors) for tensors in zip(*rows, strict=True)) for rows in (last, every))
    return (x, after, states) if return_all_states else (x, after)


def unpack_weights(row: Sequence[W]) -> tuple[W, W, W | None, W | None, W | None]:
    """Return (w_ih, w_hh, b_ih, b_hh, w_hr) of one direction; None for those it does not have."""
    w_ih, w_hh, *rest = row
    b_ih, b_hh = rest[:2] if len(rest) >= 2 else (None, None)
    return w_ih, w_hh, b_ih, b_hh, rest[-1] if len(rest) % 2 else None


def _linear(x: Tensor, w: Matrix, b: Tensor | None = None, limit: int = INPUT_LIMIT) -> Tensor:
    if isinstance(w, Tensor):
        return F.linear(x, w, b)
    return quantized_linear(x, w, b, limit) if isinstance(w, QuantizedWeight) else fake_quantized_linear(x, w, b, limit)


def _linear_of_state(h: Tensor, w: Matrix, b: Tensor | None = None) -> Tensor:
    return _linear(h, w, b, STATE_LIMIT)


def _zero_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return x with 0 beyond `lengths`: whatever padding holds, even NaN, then reaches no result and no gradient."""
    if lengths is None:
        return x
    padding = ~within_lengths(lengths, len(x)).T  # [T, B]
    return x.masked_fill(padding.view(*padding.shape, *[1] * (x.dim() - 2)), 0)


def _run(
    mode: str,
    wx: Tensor,
    state: State | None,
    w_hh: Matrix,
    b_hh: Tensor | None,
    w_hr: Matrix | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    reset: Tensor | None,
    reset_to: State | None,
) -> tuple[State, State]:
    """Run one direction of one layer over wx, W x + b_ih of every step: ``[T, B, G H]`` or packed ``[N, G H]``.

    Return the states after every step and after the last one.
    """
    if state is None:
        B = wx.shape[1] if batch_sizes is None else int(batch_sizes[0])
        P = (w_hh if isinstance(w_hh, Tensor) else w_hh.values).shape[1]
        sizes = (P, wx.shape[-1] // 4) if mode == "LSTM" else (P,)
        state = tuple(wx.new_zeros(B, size) for size in sizes)
    now = tuple(tensor.reshape(tensor.shape[-2:]) for tensor in state)
    if reset_to is None:
        reset_to = tuple(torch.zeros_like(tensor) for tensor in now)
    else:
        reset_to = tuple(to.reshape(to.shape[-2:]).expand_as(tensor) for to, tensor in zip(reset_to, now, strict=True))

    rows = [wx.shape[1]] * len(wx) if batch_sizes is None else batch_sizes.tolist()
    steps = wx.unbind(0) if batch_sizes is None else torch.split(wx, rows)
    resets = reset if reset is None or batch_sizes is None else torch.split(reset, rows)
    every: list[State] = [()] * len(rows)
    for t in reversed(range(len(rows))) if reverse else range(len(rows)):
        before = tuple(tensor[: rows[t]] for tensor in now)
        if resets is not None:
            before = tuple(
                torch.where(resets[t][:, None], to[: rows[t]], tensor)
                for to, tensor in zip(reset_to, before, strict=True)
            )
        new = _STEPS[mode](steps[t], before, w_hh, b_hh, w_hr)
        every[t] = new
        if lengths is not None:
            # Beyond its length a row keeps its state, which is not reset there: the last one, or in reverse the one it
            # is to start from.
            runs = (t < lengths)[:, None]
            every[t] = tuple(tensor.masked_fill(~runs, 0) for tensor in new)
            new = tuple(torch.where(runs, after, before) for after, before in zip(new, now, strict=True))
        # The rows beyond batch_sizes[t] keep theirs, too.
        now = tuple(torch.cat((after, before[rows[t] :])) for after, before in zip(new, now, strict=True))
    last = tuple(tensor.reshape(given.shape).clone() for tensor, given in zip(now, state, strict=True))
    joined = (torch.cat((tensor[:0], *(step[i] for step in every))) for i, tensor in enumerate(now))
    return tuple(tensor.view(*wx.shape[:-1], tensor.shape[1]) for tensor in joined), last


def _rnn_step(
    nonlinearity: Callable[[Tensor], Tensor],
    wx: Tensor,
    state: State,
    w_hh: Matrix,
    b_hh: Tensor | None,
    w_hr: Matrix | None,
) -> State:
    (h,) = state
    return (nonlinearity(wx + _linear_of_state(h, w_hh, b_hh)),)


def _gru_step(wx: Tensor, state: State, w_hh: Matrix, b_hh: Tensor | None, w_hr: Matrix | None) -> State:
    (h,) = state
    wx_r, wx_z, wx_n = wx.chunk(3, 1)
    uh_r, uh_z, uh_n = _linear_of_state(h, w_hh, b_hh).chunk(3, 1)
    r, z = torch.sigmoid(wx_r + uh_r), torch.sigmoid(wx_z + uh_z)
    n = torch.tanh(wx_n + r * uh_n)
    return ((1 - z) * n + z * h,)


def _lstm_step(wx: Tensor, state: State, w_hh: Matrix, b_hh: Tensor | None, w_hr: Matrix | None) -> State:
    h, c = state
    i, f, g, o = (wx + _linear_of_state(h, w_hh, b_hh)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else _linear_of_state(h, w_hr)), c


_STEPS: dict[str, Callable[[Tensor, State, Matrix, Tensor | None, Matrix | None], State]] = {
    "RNN_TANH": partial(_rnn_step, torch.tanh),
    "RNN_RELU": partial(_rnn_step, torch.relu),
    "RNN_SIGMOID": partial(_rnn_step, torch.sigmoid),
    "GRU": _gru_step,
    "LSTM": _lstm_step,
}
