"""Recurrent networks: one direction of one layer (`rnn`, `gru`, `lstm`), and several layers (`multilayer_rnn`).

`run` decides which ops a call takes. The ops follow, each with its fake kernel, autograd and autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_ext import reference
from llm_ext.ops import _loops, _onnx, argument_checks, packing, quantization
from llm_ext.ops import _recurrence_derivatives as derivatives
from llm_ext.ops._registration import (
    FAILURES,
    allows_tf32,
    autocast_arguments,
    explain_cast,
    fake_gradients,
    is_autocast_on,
    is_on_cuda,
    match_dtype,
    needed,
    needs_autograd,
    refuse_derivative,
    register_autocast,
    register_autograd,
    register_fake,
    torch_ops,
    without_autocast,
)
from llm_ext.ops._transforms import (
    differentiable_gradients,
    exports_to_onnx,
    forward_mode_is_nested,
    is_mapped,
    is_recorded,
    transforms_active,
    unwrapped,
    wanted_gradients,
    without_transforms,
)
from llm_ext.ops.argument_checks import ELMAN_MODES, NONLINEARITIES, ArgumentError, gates_of, op_of
from llm_ext.ops.quantization import QuantizedWeights
from llm_ext.reference.quantization import FakeQuantizedWeight
from llm_ext.reference.recurrence import unpack_weights

__all__ = ["gru", "lstm", "multilayer_rnn", "rnn"]

_rnn_forward = torch_ops.rnn_forward.default
_gru_forward = torch_ops.gru_forward.default
_lstm_forward = torch_ops.lstm_forward.default
_bidirectional_forward = torch_ops.bidirectional_forward.default
_bidirectional_backward = torch_ops.bidirectional_backward.default
_multilayer_rnn_forward = torch_ops.multilayer_rnn_forward.default

# A state is (h,), or (h, c) of an LSTM.
State = tuple[Tensor, ...]
# The weights of one direction of one layer: (w_ih, w_hh[, b_ih, b_hh][, w_hr]).
Weights = Sequence[Tensor]


# ---- public functions


def rnn(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
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
    r"""Apply one direction of one Elman RNN layer to a sequence.

    ``h_t = f(w_ih x_t + b_ih + w_hh h_{t-1} + b_hh)``

    Args:
        x: Input ``[T, B, I]``, or the rows ``[N, I]`` of a packed sequence if `batch_sizes` is given.
        h0: State before the first step, ``[B, H]`` or ``[1, B, H]``. ``None`` means zeros; a packed sequence needs h0.
        w_ih: Input weights ``[H, I]``.
        w_hh: Recurrent weights ``[H, H]``.
        b_ih: Input bias ``[H]``, or ``None``.
        b_hh: Recurrent bias ``[H]``, or ``None``.
        batch_sizes: Rows of each step of a packed sequence, int64 ``[T]`` on the CPU, positive and never rising.
        lengths: Steps of each batch row of a padded x, int64 ``[B]`` on the device of x, from 0 to T, in any order.
            Beyond them y is 0. On CUDA, lengths outside this range are clamped, not checked.
        nonlinearity: f: ``"tanh"``, ``"relu"`` or ``"sigmoid"``.
        reverse: Run from the last step to the first; ``y[t]`` still belongs to ``x[t]``.
        reset: Whether the state of a row is replaced before a step, bool ``[T, B]``, or ``[N]`` in the order of the
            rows of a packed sequence. Beyond lengths it has no effect. It excludes `reverse`. Its values are read on
            the host, so a call on CUDA synchronizes.
        reset_to: State that a reset puts in place, ``[B, H]`` or ``[1, B, H]``, or with 1 in place of B. ``None`` means
            zeros.

    Returns:
        Every state y ``[T, B, H]`` (packed: ``[N, H]``), and the state after the last step of each row in the shape of
        h0 (``[B, H]`` if h0 is ``None``).

    Raises:
        ValueError: A shape, device or nonlinearity does not fit, or batch_sizes do not describe x.
        TypeError: The dtypes differ, or are not float32, float64, bfloat16 or float16.

    Source: J. Elman, "Finding structure in time", 1990.

    Example:
        >>> y, h_n = ops.rnn(torch.randn(20, 8, 64), None, torch.randn(128, 64) / 8, torch.randn(128, 128) / 12)
        >>> y.shape, h_n.shape
        (torch.Size([20, 8, 128]), torch.Size([8, 128]))
    """
    argument_checks.nonlinearity("rnn", nonlinearity)
    weights = (w_ih, w_hh, b_ih, b_hh, None)
    state = None if h0 is None else (h0,)
    to = None if reset_to is None else (reset_to,)
    mode = ELMAN_MODES[nonlinearity]
    y, (h_n,) = run(mode, x, state, (weights,), (reverse,), 0.0, batch_sizes, lengths, None, reset, to)
    return y, h_n.squeeze(0) if h0 is None else h_n


def gru(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    reset_to: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Apply one direction of one GRU layer to a sequence.

    ``r_t = sigmoid(W_r x_t + b_ih_r + U_r h_{t-1} + b_hh_r)``, ``z_t`` likewise,
    ``n_t = tanh(W_n x_t + b_ih_n + r_t (U_n h_{t-1} + b_hh_n))``, ``h_t = (1 - z_t) n_t + z_t h_{t-1}``,
    where ``w_ih`` holds the rows of W_r, W_z, W_n and ``w_hh`` those of U_r, U_z, U_n.

    Args:
        x: Input ``[T, B, I]``, or the rows ``[N, I]`` of a packed sequence if `batch_sizes` is given.
        h0: State before the first step, ``[B, H]`` or ``[1, B, H]``. ``None`` means zeros; a packed sequence needs h0.
        w_ih: Input weights ``[3 H, I]``.
        w_hh: Recurrent weights ``[3 H, H]``.
        b_ih: Input bias ``[3 H]``, or ``None``.
        b_hh: Recurrent bias ``[3 H]``, or ``None``.
        batch_sizes: See :func:`rnn`.
        lengths: See :func:`rnn`.
        reverse: See :func:`rnn`.
        reset: See :func:`rnn`.
        reset_to: See :func:`rnn`.

    Returns:
        Every state y ``[T, B, H]`` (packed: ``[N, H]``), and the state after the last step of each row in the shape of
        h0 (``[B, H]`` if h0 is ``None``).

    Raises:
        ValueError: A shape or device does not fit, or batch_sizes do not describe x.
        TypeError: The dtypes differ, or are not float32, float64, bfloat16 or float16.

    Source: Cho et al., arXiv 1406.1078; the reset gate is applied after the product, as in torch and cuDNN.

    Example:
        >>> y, h_n = ops.gru(torch.randn(20, 8, 64), None, torch.randn(384, 64) / 8, torch.randn(384, 128) / 12)
        >>> y.shape, h_n.shape
        (torch.Size([20, 8, 128]), torch.Size([8, 128]))
    """
    weights = (w_ih, w_hh, b_ih, b_hh, None)
    state = None if h0 is None else (h0,)
    to = None if reset_to is None else (reset_to,)
    y, (h_n,) = run("GRU", x, state, (weights,), (reverse,), 0.0, batch_sizes, lengths, None, reset, to)
    return y, h_n.squeeze(0) if h0 is None else h_n


def lstm(
    x: Tensor,
    state: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    reset_to: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""Apply one direction of one LSTM layer to a sequence.

    ``i_t = sigmoid(W_i x_t + b_ih_i + U_i h_{t-1} + b_hh_i)``, ``f_t`` and ``o_t`` likewise, ``g_t`` with tanh,
    ``c_t = f_t c_{t-1} + i_t g_t``, ``h_t = o_t tanh(c_t)``, or with a projection ``h_t = w_hr (o_t tanh(c_t))``,
    where ``w_ih`` holds the rows of W_i, W_f, W_g, W_o and ``w_hh`` those of U_i, U_f, U_g, U_o.

    Args:
        x: Input ``[T, B, I]``, or the rows ``[N, I]`` of a packed sequence if `batch_sizes` is given.
        state: ``(h0, c0)`` before the first step, h0 ``[B, P]`` and c0 ``[B, H]``, or both with a leading dimension of
            1. ``None`` means zeros; a packed sequence needs a state. P = H without `w_hr`.
        w_ih: Input weights ``[4 H, I]``.
        w_hh: Recurrent weights ``[4 H, P]``.
        b_ih: Input bias ``[4 H]``, or ``None``.
        b_hh: Recurrent bias ``[4 H]``, or ``None``.
        w_hr: Projection of the output, ``[P, H]`` with P < H, or ``None``.
        batch_sizes: See :func:`rnn`.
        lengths: See :func:`rnn`.
        reverse: See :func:`rnn`.
        reset: See :func:`rnn`.
        reset_to: State ``(h, c)`` that a reset puts in place, in the shapes of `state`, or with 1 in place of B.
            ``None`` means zeros.

    Returns:
        Every output y ``[T, B, P]`` (packed: ``[N, P]``), and the state ``(h_n, c_n)`` after the last step of each row
        in the shapes of `state` (``[B, P]`` and ``[B, H]`` if it is ``None``).

    Raises:
        ValueError: A shape or device does not fit, or batch_sizes do not describe x.
        TypeError: The dtypes differ, or are not float32, float64, bfloat16 or float16.

    Source: S. Hochreiter and J. Schmidhuber, "Long short-term memory", 1997; forget gate: F. Gers et al., "Learning to
    forget", 2000; projection: Sak et al., arXiv 1402.1128.

    Example:
        >>> w_ih, w_hh = torch.randn(512, 64) / 8, torch.randn(512, 128) / 12
        >>> y, (h_n, c_n) = ops.lstm(torch.randn(20, 8, 64), None, w_ih, w_hh, reverse=True)
        >>> y.shape, h_n.shape, c_n.shape
        (torch.Size([20, 8, 128]), torch.Size([8, 128]), torch.Size([8, 128]))
    """
    weights = (w_ih, w_hh, b_ih, b_hh, w_hr)
    y, (h_n, c_n) = run("LSTM", x, state, (weights,), (reverse,), 0.0, batch_sizes, lengths, None, reset, reset_to)
    return y, (h_n.squeeze(0), c_n.squeeze(0)) if state is None else (h_n, c_n)


@overload
def multilayer_rnn(
    mode: str,
    x: Tensor,
    state: State | None,
    weights: Sequence[Weights],
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
    weights: Sequence[Weights],
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
    weights: Sequence[Weights],
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
    r"""Apply several recurrent layers, each to the output of the layer below.

    The result is that of one call of :func:`rnn`, :func:`gru` or :func:`lstm` for each layer and direction. Without a
    derivative, all layers run in one op; where steps are too small for several threads, each thread then runs layers
    (as a wavefront over time) or directions of its own.

    Args:
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"RNN_SIGMOID"``, ``"GRU"`` or ``"LSTM"``.
        x: Input ``[T, B, I]``, or the rows ``[N, I]`` of a packed sequence if `batch_sizes` is given. With
            `input_projections`, int64 or int32 ids ``[T, B]`` or ``[N]``.
        state: State before the first step, ``(h0,)``, or ``(h0, c0)`` for an LSTM, each ``[R, B, *]`` with
            R = layers * directions. ``None`` means zeros.
        weights: For each layer and direction ``(w_ih, w_hh[, b_ih, b_hh][, w_hr])``, in the order of the states, as
            ``torch.nn.RNNBase.all_weights``.
        bidirectional: A second direction reads the sequence backwards; the outputs of both are concatenated.
        dropout: Probability of dropout on the output of every layer but the last. It is applied whenever it is above 0.
        batch_sizes: See :func:`rnn`.
        lengths: See :func:`rnn`.
        input_projections: For each direction of the first layer ``W_ih x + b_ih`` of every id, ``[V, G H]`` with G
            gates; w_ih and b_ih of the first layer are then not read. Inference on the CPU only.
        reset: See :func:`rnn`. It excludes `bidirectional`.
        reset_to: State that a reset puts in place, in the form of `state`, ``[R, B, *]`` or ``[R, 1, *]``. ``None``
            means zeros.
        return_all_states: Return the state after every step, too. It excludes `input_projections`.

    Returns:
        The output y of the last layer, ``[T, B, D P]`` with D directions (packed: ``[N, D P]``), and the state after
        the last step of every layer and direction, each ``[R, B, *]``. With `return_all_states` also the state after
        every step of every layer and direction, each ``[R, T, B, *]`` (packed: ``[R, N, *]``); beyond `lengths` it is
        0.

    Raises:
        ValueError: The mode is unknown, or a shape, number or device does not fit.
        TypeError: The dtypes differ, or are not float32, float64, bfloat16 or float16.
        IndexError: An id is not a row of `input_projections`.

    Example:
        >>> layer = torch.nn.GRU(64, 128, num_layers=2)
        >>> y, (h_n,) = ops.multilayer_rnn("GRU", torch.randn(20, 8, 64), None, layer.all_weights)
        >>> y.shape, h_n.shape
        (torch.Size([20, 8, 128]), torch.Size([2, 8, 128]))
    """
    if mode not in argument_checks.MODES or not weights or len(weights) % (1 + bidirectional):
        argument_checks.multilayer_rnn(
            "multilayer_rnn", mode, x, state, weights, 1 + bidirectional, batch_sizes, lengths, input_projections
        )
    if input_projections and x.dtype == torch.int32:
        x = x.long()
    directions = (False, True) if bidirectional else (False,)
    call = _Call(mode, x, state, weights, directions, dropout, batch_sizes, lengths, input_projections, reset, reset_to)
    return run_all_states(*call[:-1]) if return_all_states else run(*call)


# ---- the path of a call


def run_step(mode: str, x: Tensor, state: State, weights: tuple[Any, ...]) -> State:
    """Run one step of a cell: x [B, I] and the weights (w_ih, w_hh, b_ih, b_hh) to the state after it, [B, *] each.

    Autograd records a step as part of a loop, unless a transform of torch is active or a graph is being recorded.
    Weights may be `QuantizedWeights` or `FakeQuantizedWeights`.
    """
    if isinstance(weights, (QuantizedWeights, FakeQuantizedWeights)):
        return run(mode, x.unsqueeze(0), state, weights, (False,), 0.0, None, None)[1]
    if torch.is_grad_enabled() and not transforms_active() and not is_recorded(x):
        try:
            after = _loops.step(mode, x, state, weights)
            if after is not None:
                return after
        except FAILURES:  # the ordinary path explains it
            pass
    return run(mode, x.unsqueeze(0), state, (weights,), (False,), 0.0, None, None)[1]


class _Call(NamedTuple):
    """The arguments of `run`.

    Attributes:
        mode: `RNN_TANH`, `RNN_RELU`, `RNN_SIGMOID`, `GRU` or `LSTM`.
        x: [T, B, I], or packed rows [N, I]; with input_projections ids [T, B] or [N].
        state: tensors [R, B, *], or [B, *] for one direction of one layer. None means zeros.
        weights: those of each layer and direction, R in all.
        directions: for each direction whether it is reversed.
        dropout: probability of dropout between layers.
        batch_sizes: rows of each step of a packed sequence.
        lengths: steps of each row of a padded batch.
        input_projections: those of each direction of the first layer.
        reset: whether the state of a row is replaced before a step, bool [T, B] or [N].
        reset_to: the state that replaces it, as `state`, or with one row in place of B. None means zeros.
        all_states: whether the features of y are followed by the state of every layer and direction: those of h, then
            those of c.
    """

    mode: str
    x: Tensor
    state: State | None
    weights: Sequence[Sequence[Tensor | None]]
    directions: tuple[bool, ...]
    dropout: float = 0.0
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    input_projections: Sequence[Tensor] | None = None
    reset: Tensor | None = None
    reset_to: State | None = None
    all_states: bool = False


def run(
    mode: str,
    x: Tensor,
    state: State | None,
    weights: Sequence[Sequence[Tensor | None]] | QuantizedWeights,
    directions: tuple[bool, ...],
    dropout: float,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    input_projections: Sequence[Tensor] | None = None,
    reset: Tensor | None = None,
    reset_to: State | None = None,
    all_states: bool = False,
) -> tuple[Tensor, State]:
    """Choose the ops of a call and run them; `_Call` has the arguments.

    The new state is [R, B, *], or [B, *] if a state of one direction was given in that shape.

    1. Resets: the pieces of the rows between them are packed once for all layers, and take one of the paths below. A
       graph that is recorded must not depend on their values, so it records the reference.
    2. A transform of torch is active: layer by layer, each direction with rules for all transforms. In an export to
       ONNX: one of its operators for each layer.
    3. Lengths on the CPU: the rows are packed once for all layers and directions. In a graph that is recorded each op
       packs.
    4. One direction of one layer: its op, or a step of a loop that autograd records, if one step is all.
    5. No derivative, dropout or projection: one op for all layers and directions.
    6. Otherwise layer by layer. On CUDA one op runs both directions of a layer.

    Before all of these, `run_samples` takes calls with `SampleWeights`, `_run_quantized` those with `QuantizedWeights`,
    and `_run_fake_quantized` those with `FakeQuantizedWeights`.
    """
    if isinstance(weights, QuantizedWeights):
        if reset is not None or reset_to is not None or all_states:
            name = "return_all_states" if all_states else "reset"
            raise NotImplementedError(f"llm_ext: quantized layers take no {name}; dequantize the model")
        return _run_quantized(mode, x, state, weights, directions, dropout, batch_sizes, lengths)
    samples, rounds = type(weights) is SampleWeights, type(weights) is FakeQuantizedWeights
    if samples or rounds or reset is not None or reset_to is not None:
        others = input_projections, reset, reset_to, all_states
        call = _Call(mode, x, state, weights, directions, dropout, batch_sizes, lengths, *others)
        return run_samples(call) if samples else _run_fake_quantized(call) if rounds else _run_resets(call)
    transformed = transforms_active()
    packs = not transformed and lengths is not None and (all_states or not is_on_cuda(x)) and not is_recorded(lengths)
    if len(weights) == 1 and not (transformed or packs or input_projections or all_states):
        # Without a _Call: making one takes some per cent of the time of a single step.
        if state is not None and batch_sizes is None and lengths is None:
            after = _step_of_a_loop(mode, x, state, weights[0])
            if after is not None:
                return after
        return _one_direction(mode, x, state, weights[0], batch_sizes, lengths, directions[0])
    call = _Call(
        *(mode, x, state, weights, directions, dropout, batch_sizes, lengths, input_projections), all_states=all_states
    )
    if transformed:
        return _run_transformed(call)
    if packs:
        return _run_packed(call, lambda packed: run(*packed))
    if all_states:
        # The rows of `saved` are those of packed rows, not of y, where the op packs.
        return _layer_by_layer(call) if lengths is None else _run_reference(call)
    try:
        recorded = needs_autograd(x, *(state or ()), *[tensor for row in weights for tensor in row])
    except AttributeError as failure:  # an argument is not a tensor
        _explain(failure, call)
    if input_projections or (
        not recorded
        and lengths is None
        and not dropout
        and (batch_sizes is None or not is_on_cuda(x))
        and all(len(row) in (2, 4) for row in weights)
    ):
        return _all_layers(call)
    return _layer_by_layer(call)


def _step_of_a_loop(
    mode: str, x: Tensor, state: State, weights: Sequence[Tensor | None]
) -> tuple[Tensor, State] | None:
    """Run a call of one step as `run_step` does, if its state needs a gradient, as in a loop; else return None."""
    try:
        if not (torch.is_grad_enabled() and state[0].requires_grad) or is_recorded(x) or len(x) != 1 or x.dim() != 3:
            return None
        *found, w_hr = unpack_weights(weights)
        cell: Any = tuple(found)
        flat = state[0].dim() == 2
        before = state if flat else tuple([tensor[0] for tensor in state])
        after = None if w_hr is not None else _loops.step(mode, x[0], before, cell)
        if after is None:
            return None
    except FAILURES:  # the ordinary path explains it
        return None
    # Not views, which share memory and could not be detached in place.
    return torch.stack(after[:1]), after if flat else tuple([torch.stack((tensor,)) for tensor in after])


def run_all_states(*args: Any) -> tuple[Tensor, State, State]:
    """Do as `run`, and also return the state after every step, each [R, T, B, *] or [R, N, *]."""
    call = _Call(*args)._replace(all_states=True)
    if call.input_projections:
        raise ArgumentError("multilayer_rnn: return_all_states excludes input_projections")
    y, last = run(*call)
    sizes = [tensor.shape[-1] for tensor in last for _ in call.weights]
    y, *columns = torch.split(y, [y.shape[-1] - sum(sizes), *sizes], -1)
    R = len(call.weights)
    return y, last, tuple(torch.stack(columns[i : i + R]) for i in range(0, len(columns), R))


def _with_states(y: Tensor, every: Sequence[Iterable[Tensor]]) -> Tensor:
    """Return y with the states of each layer and direction as further features."""
    return torch.cat((y, *[tensor for tensors in every for tensor in tensors]), -1)


def _run_resets(call: _Call) -> tuple[Tensor, State]:
    """Run a call with resets: each piece of a row between them is a row of a packed sequence, with a state of its own.

    These rows are more numerous and shorter than those of the batch, so resets cost little and can even save time.
    """
    call = _matched(call)
    _check(call)
    x, state, reset, lengths, batch_sizes = call.x, call.state, call.reset, call.lengths, call.batch_sizes
    reset_to = call.reset_to
    assert reset is not None
    if exports_to_onnx():
        _refuse_in_onnx(call)
    if is_recorded(reset) or is_mapped(reset) or (lengths is not None and is_mapped(lengths)):
        return _run_reference(call)
    with without_transforms():
        sizes = [None if tensor is None else unwrapped(tensor).cpu() for tensor in (lengths, batch_sizes)]
        pieces = packing.pack_pieces(unwrapped(reset).cpu(), *sizes)
    call = call._replace(reset=None, reset_to=None)
    if pieces is None:
        return run(*call)
    rows, starts, ends = pieces.to(x.device)
    if state is None:
        state = _zero_state(call, x.shape[1] if batch_sizes is None else int(batch_sizes[0]))
    if reset_to is None:
        reset_to = tuple(torch.zeros_like(old) for old in state)
    else:
        reset_to = tuple(
            to.reshape(*old.shape[:-2], *to.shape[-2:]).expand_as(old) for to, old in zip(reset_to, state, strict=True)
        )
    first = (torch.cat(both, -2).index_select(-2, starts) for both in zip(state, reset_to, strict=True))
    padded = x if batch_sizes is None else x.unsqueeze(1)
    call = call._replace(x=rows.pack(padded), state=tuple(first), batch_sizes=rows.batch_sizes, lengths=None)
    y, last = run(*call)
    y = rows.pad(y, *padded.shape[:2])
    states = (
        old.to(new.dtype).index_copy(-2, rows.rows, new.index_select(-2, ends))
        for old, new in zip(state, last, strict=True)
    )
    return y if batch_sizes is None else y.squeeze(1), tuple(states)


def _run_transformed(call: _Call) -> tuple[Tensor, State]:
    """Run a call under a transform of torch, or record it for ONNX."""
    call = _matched(call)
    _check(call)
    lengths, onnx = call.lengths, exports_to_onnx()
    if onnx:
        _refuse_in_onnx(call)
    elif call.input_projections or (lengths is not None and is_mapped(lengths)) or forward_mode_is_nested():
        # Mapped lengths cannot be read, and precomputed input projections are an optimization of inference.
        return _run_reference(call)
    call = _converted(call, autocast_arguments)
    if onnx:
        return _onnx.run_layers(call.mode, call.x, call.state, call.weights, call.directions, call.dropout, lengths)
    if lengths is not None:
        return _run_packed(call._replace(lengths=unwrapped(lengths)), _run_transformed)
    if len(call.weights) == 1 and not call.all_states:
        weights = unpack_weights(call.weights[0])
        return derivatives.one_direction(call.mode, call.x, call.state, weights, call.batch_sizes, call.directions[0])
    return _layer_by_layer(call, derivatives.one_direction)


def _refuse_in_onnx(call: _Call) -> None:
    """Raise if the operators of ONNX cannot run a call."""
    if call.reset is not None:
        what, instead = "reset", "start a call for each episode, with its state"
    elif call.batch_sizes is not None:
        what, instead = "PackedSequence", "pass the padded batch and lengths"
    elif call.input_projections:
        what, instead = "input_projections", "pass the input"
    elif call.all_states:
        what, instead = "return_all_states", "call one layer after the other, or each step"
    elif unpack_weights(call.weights[0])[4] is not None:
        what, instead = "proj_size", "export a layer without projection"
    else:
        return
    raise NotImplementedError(f"llm_ext: a recurrence of ONNX takes no {what}; {instead}")


def _converted(call: _Call, convert: Callable[..., Any]) -> _Call:
    """Return a call with its numbers converted; `convert` takes tensors and returns as many."""
    call = _with_inputs(call, convert)
    projections = None if call.input_projections is None else list(convert(*call.input_projections))
    return call._replace(weights=[convert(*row) for row in call.weights], input_projections=projections)


def _matched(call: _Call) -> _Call:
    """Return a call whose inputs have the dtype of the weights, where autocast would cast them."""
    return _with_inputs(call, partial(match_dtype, _recurrent_weight(call)))


def _with_inputs(call: _Call, convert: Callable[..., Any]) -> _Call:
    """Return a call with x and the states converted."""
    x, *tensors = convert(call.x, *(call.state or ()), *(call.reset_to or ()))
    given = len(call.state or ())
    state = None if call.state is None else tuple(tensors[:given])
    return call._replace(x=x, state=state, reset_to=None if call.reset_to is None else tuple(tensors[given:]))


def _widened(*tensors: Any) -> list[Any]:
    """Return tensors with their numbers in the dtype that they are computed in."""
    return [
        tensor.to(argument_checks.compute_dtype(tensor.dtype))
        if tensor is not None and tensor.is_floating_point()
        else tensor
        for tensor in tensors
    ]


def _run_reference(call: _Call) -> tuple[Tensor, State]:
    """Run a call in torch's own ops, a loop over steps, with the dtypes of the ops."""
    call = _converted(_matched(call), autocast_arguments)
    dtype = _recurrent_weight(call).dtype
    with without_autocast(call.x.device.type):
        y, last = _reference(_converted(call, _widened))
    return y.to(dtype), tuple([tensor.to(dtype) for tensor in last])


def _reference(call: _Call) -> tuple[Tensor, State]:
    """Return the results of the reference."""
    mode, x, state, weights, directions, dropout, batch_sizes, lengths, input_projections, reset, reset_to, _ = call
    options: dict[str, Any] = {"batch_sizes": batch_sizes, "lengths": lengths, "reset": reset}
    last: State
    if len(weights) > 1 or input_projections or call.all_states:
        rows = [[tensor for tensor in row if tensor is not None] for row in weights]
        y, last, every = reference.multilayer_rnn(
            mode,
            x,
            state,
            rows,
            bidirectional=len(directions) == 2,
            dropout=dropout,
            input_projections=input_projections,
            reset_to=reset_to,
            return_all_states=True,
            **options,
        )
        return _with_states(y, every) if call.all_states else y, last
    w_ih, w_hh, b_ih, b_hh, w_hr = unpack_weights(weights[0])
    assert w_ih is not None
    assert w_hh is not None
    to: Any = reset_to if reset_to is None or mode == "LSTM" else reset_to[0]
    options |= {"reverse": directions[0], "reset_to": to}
    if mode == "LSTM":
        y, last = reference.lstm(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, **options)  # type: ignore[arg-type]
    else:
        h0 = None if state is None else state[0]
        if mode == "GRU":
            y, h_n = reference.gru(x, h0, w_ih, w_hh, b_ih, b_hh, **options)
        else:
            y, h_n = reference.rnn(x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity=NONLINEARITIES[mode], **options)
        last = (h_n,)
    return y, last if state is not None else tuple([tensor.unsqueeze(0) for tensor in last])


def _run_packed(call: _Call, run_rows: Callable[[_Call], tuple[Tensor, State]]) -> tuple[Tensor, State]:
    """Run a padded batch [T, B, *] as packed rows, since the CPU kernels and the derivatives do not read lengths.

    `run_rows` runs a call without lengths.
    """
    call = _matched(call)
    _check(call)
    x, state, lengths = call.x, call.state, call.lengths
    assert lengths is not None
    T, B = x.shape[:2]
    if T > 0 and bool((lengths == T).all()):
        return run_rows(call._replace(lengths=None))
    if state is None:
        state = _zero_state(call, B)
    with without_transforms():
        rows = packing.pack_lengths(lengths.cpu(), T).to(x.device)
    first = tuple(tensor.index_select(-2, rows.rows) for tensor in state)
    y, last = run_rows(call._replace(x=rows.pack(x), state=first, batch_sizes=rows.batch_sizes, lengths=None))
    # Under autocast the new state has another dtype than the given one.
    states = (old.to(new.dtype).index_copy(-2, rows.rows, new) for old, new in zip(state, last, strict=True))
    return rows.pad(y, T, B), tuple(states)


def _recurrent_weight(call: _Call) -> Tensor:
    """Return w_hh of the first layer and direction."""
    row = call.weights[0] if call.weights else ()
    w_hh = row[1] if len(row) > 1 else None
    if w_hh is None:
        _check(call)  # raises an error that names it
    assert w_hh is not None
    return w_hh


def _zero_state(call: _Call, B: int) -> State:
    """Return zeros [R, B, *] as the state of a call."""
    w_hh = _recurrent_weight(call)
    sizes = (w_hh.shape[1], w_hh.shape[0] // 4) if call.mode == "LSTM" else (w_hh.shape[1],)
    return tuple(w_hh.new_zeros((len(call.weights), B, size)) for size in sizes)


def _one_direction(
    mode: str,
    x: Tensor,
    state: State | None,
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    all_states: bool = False,
) -> tuple[Tensor, State]:
    """Run one direction of one layer; its state may be [B, *], and then comes back as [B, *], else as [1, B, *].

    In an LSTM, every c follows the new state if `all_states`.
    """
    if len(weights) == 4:
        w_ih, w_hh, b_ih, b_hh = weights
        w_hr = None
    else:
        w_ih, w_hh, b_ih, b_hh, w_hr = unpack_weights(weights)
    try:
        if mode == "LSTM":
            h0, c0 = (None, None) if state is None else state
            save = all_states or needs_autograd(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
            y, h_n, c_n, saved = _lstm_forward(
                x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, lengths, reverse, allows_tf32(x), save
            )
            if all_states:
                H = c_n.shape[-1]  # saved has the blocks i f g o c
                return y, (h_n, c_n, saved[:, 4 * H : 5 * H].view(*y.shape[:-1], H))
            return y, (h_n, c_n)
        (h0,) = (None,) if state is None else state
        if mode == "GRU":
            save = needs_autograd(x, h0, w_ih, w_hh, b_ih, b_hh)
            y, h_n, _ = _gru_forward(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, lengths, reverse, allows_tf32(x), save)
        else:
            nonlinearity = NONLINEARITIES[mode]
            y, h_n = _rnn_forward(
                x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, lengths, nonlinearity, reverse, allows_tf32(x)
            )
        return y, (h_n,)
    except (*FAILURES, ValueError) as failure:
        _explain(failure, _Call(mode, x, state, (weights,), (reverse,), 0.0, batch_sizes, lengths))


def _all_layers(call: _Call) -> tuple[Tensor, State]:
    """Run all layers and directions in one op, which has no derivative."""
    mode, x, state, weights, directions, _, batch_sizes, _, input_projections, *_ = call
    flat = [tensor for row in weights for tensor in row]
    bias, bidirectional, projections = len(weights[0]) == 4, len(directions) == 2, list(input_projections or ())
    try:
        h0, c0 = _split(mode, state)
        y, h_n, c_n = _multilayer_rnn_forward(
            mode, x, h0, c0, flat, bias, bidirectional, projections, batch_sizes, allows_tf32(x)
        )
    except (*FAILURES, ValueError, IndexError) as failure:
        _explain(failure, call)
    return y, (h_n, c_n) if mode == "LSTM" else (h_n,)


def _run_quantized(
    mode: str,
    x: Tensor,
    state: State | None,
    weights: QuantizedWeights,
    directions: tuple[bool, ...],
    dropout: float,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, State]:
    """Run the layers one after the other with packed weights."""
    count, R = len(directions), len(weights.rows)
    if R == 1:
        return quantization.one_direction(mode, x, state, weights, 0, batch_sizes, lengths, directions[0])
    if state is not None and any(tensor.shape[0] != R for tensor in state):
        raise ArgumentError(f"{mode}: states must be [R, B, *] with R = {R}, got {[list(t.shape) for t in state]}")
    last: list[State] = []
    for row in range(0, R, count):
        if row > 0 and dropout > 0:
            x = F.dropout(x, dropout)
        outputs = []
        for d, reverse in enumerate(directions):
            given = None if state is None else tuple([tensor[row + d : row + d + 1] for tensor in state])
            y, after = quantization.one_direction(mode, x, given, weights, row + d, batch_sizes, lengths, reverse)
            outputs.append(y)
            last.append(after)
        x = outputs[0] if count == 1 else torch.cat(outputs, -1)
    return x, tuple([torch.cat(tensors) for tensors in zip(*last, strict=True)])


class FakeQuantizedWeights(list[Sequence[Any]]):
    """Weights of a call of `run` whose inputs and states are rounded as with int8 weights, while gradients pass."""


def _run_fake_quantized(call: _Call) -> tuple[Tensor, State]:
    """Run the reference, a loop over steps, with inputs and states that are rounded."""
    if is_autocast_on(call.x.device.type):
        call = _with_inputs(call, lambda *tensors: [tensor.float() for tensor in tensors])
    _check(call)
    rows: Any = [[w if w is None or w.dim() == 1 else FakeQuantizedWeight(w) for w in row] for row in call.weights]
    with without_autocast(call.x.device.type):
        return _reference(call._replace(weights=rows))


class SampleWeights(list[Sequence[Any]]):
    """Weights of a call of `run` whose gradients are those of each sample.

    Each has a first dimension of the size of the batch, along which its values are the same.
    """


def run_samples(call: _Call) -> tuple[Tensor, State]:
    """Run a call with `SampleWeights`, layer by layer."""
    weights, lengths = call.weights, call.lengths
    call = _matched(call._replace(weights=[[None if w is None else w[0].detach() for w in row] for row in weights]))
    _check(call)
    if call.reset is not None:
        raise ArgumentError(f"{op_of(call.mode)}: reset must be None for gradients of each sample, got a Tensor")
    order = None if lengths is None else packing.pack_lengths(lengths.cpu(), len(call.x)).rows

    def run_rows(call: _Call) -> tuple[Tensor, State]:
        sizes, positions = call.batch_sizes, None
        if sizes is not None:
            steps = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
            columns = torch.arange(len(steps), device="cpu") - (sizes.cumsum(0) - sizes)[steps]
            positions = (columns if order is None else order[columns]) * len(sizes) + steps
            positions = positions.to(call.x.device)
        one_direction = partial(derivatives.one_direction, samples=True, positions=positions)
        return _layer_by_layer(call._replace(weights=weights), one_direction)

    with without_autocast(call.x.device.type):  # its cast of the weights would store those of each sample
        return run_rows(call) if lengths is None else _run_packed(call, run_rows)


def _layer_by_layer(
    call: _Call, one_direction: Callable[..., tuple[Tensor, State]] | None = None
) -> tuple[Tensor, State]:
    """Run the layers one after the other; `one_direction` replaces the ops, which have no rules for transforms."""
    mode, x, state, weights, directions, dropout, batch_sizes, lengths, *_ = call
    count, R = len(directions), len(weights)
    expected = [R, R] if mode == "LSTM" else [R]
    if R % count or (state is not None and [tensor is not None and len(tensor) for tensor in state] != expected):
        _check(call)
    last: list[State] = []
    every: list[State] = []
    for row in range(0, R, count):
        if row > 0 and dropout > 0:
            x = F.dropout(x, dropout)
        if count == 2 and is_on_cuda(x) and one_direction is None and not call.all_states:
            given = None if state is None else tuple([tensor[row : row + 2] for tensor in state])
            x, after = _both_directions(mode, x, given, weights[row : row + 2], batch_sizes, lengths)
            last.append(after)
            continue
        outputs = []
        for d, reverse in enumerate(directions):
            given = None if state is None else tuple([tensor[row + d : row + d + 1] for tensor in state])
            own = weights[row + d]
            if one_direction is not None:
                y, after = one_direction(mode, x, given, unpack_weights(own), batch_sizes, reverse, call.all_states)
            else:
                y, after = _one_direction(mode, x, given, own, batch_sizes, lengths, reverse, call.all_states)
            outputs.append(y)
            last.append(after[: len(expected)])
            every.append((y, *after[len(expected) :]))
        x = outputs[0] if count == 1 else torch.cat(outputs, -1)
    if call.all_states:
        x = _with_states(x, list(zip(*every, strict=True)))
    try:
        return x, tuple([torch.cat(tensors) for tensors in zip(*last, strict=True)])
    except RuntimeError as failure:  # each layer fits, but their sizes differ
        _explain(failure, call)


def _both_directions(
    mode: str,
    x: Tensor,
    state: State | None,
    weights: Sequence[Sequence[Tensor | None]],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, State]:
    """Run both directions of one layer in one op, which CUDA has."""
    flat = [tensor for row in weights for tensor in row]
    bias = len(weights[0]) >= 4
    try:
        h0, c0 = _split(mode, state)
        save = mode in ("GRU", "LSTM") and needs_autograd(x, h0, c0, *flat)
        y, h_n, c_n, _ = _bidirectional_forward(mode, x, h0, c0, flat, bias, batch_sizes, lengths, allows_tf32(x), save)
    except FAILURES as failure:
        _explain(failure, _Call(mode, x, state, weights, (False, True), 0.0, batch_sizes, lengths))
    return y, (h_n, c_n) if mode == "LSTM" else (h_n,)


def _split(mode: str, state: State | None) -> tuple[Tensor | None, Tensor | None]:
    """Return (h0, c0) of a state, None for a tensor that it does not have."""
    if state is None:
        return None, None
    if mode == "LSTM":
        h0, c0 = state
        return h0, c0
    (h0,) = state
    return h0, None


def _check(call: _Call) -> None:
    """Raise if the arguments of a call do not fit together; a call of one direction names its function."""
    mode, x, state, weights, directions, _, batch_sizes, lengths, input_projections, reset, reset_to, _ = call
    if len(weights) == 1 and not input_projections:
        op = op_of(mode)
        given = state if state is not None else (None,) * (2 if mode == "LSTM" else 1)
        own = unpack_weights(weights[0])
        argument_checks.recurrence(op, mode, x, given, own, batch_sizes, lengths, reset, reset_to, directions[0])
    else:
        argument_checks.multilayer_rnn(
            "multilayer_rnn",
            mode,
            x,
            state,
            weights,  # type: ignore[arg-type]
            len(directions),
            batch_sizes,
            lengths,
            input_projections,
            reset,
            reset_to,
        )


def _explain(failure: Exception, call: _Call) -> NoReturn:
    """Raise the fault in the arguments of a failed call, or else the failure itself."""
    casts = isinstance(call.x, Tensor) and is_autocast_on(call.x.device.type)
    explain_cast(failure, _check, (call,), (_converted(call, autocast_arguments) if casts else call,))


# ---- rnn_forward, gru_forward, lstm_forward and their backward ops


class _Inputs(NamedTuple):
    """The arguments of one of the forward ops, whatever their order in its schema."""

    x: Tensor
    state: tuple[Tensor | None, ...]
    weights: tuple[Tensor | None, ...]  # (w_ih, w_hh, b_ih, b_hh, w_hr)
    batch_sizes: Tensor | None
    lengths: Tensor | None
    options: tuple[Any, ...]


class _Cell(NamedTuple):
    """The facts about a cell that the registration of its ops needs.

    Attributes:
        name: prefix of its ops.
        state: tensors of its state.
        saved_blocks: blocks of H numbers per row that forward saves for backward; one more with a projection.
    """

    name: str
    state: int
    saved_blocks: int

    @property
    def differentiable(self) -> int:
        """Leading arguments of the forward op that have gradients: x, the state, the weights."""
        return 1 + self.state + (5 if self.name == "lstm" else 4)

    def inputs(self, args: tuple[Any, ...]) -> _Inputs:
        """Sort the arguments of the forward op."""
        n = self.differentiable
        x, *tensors = args[:n]
        state, weights = tuple(tensors[: self.state]), tuple(tensors[self.state :])
        batch_sizes, lengths, *options = args[n:]
        return _Inputs(x, state, (*weights, None)[:5], batch_sizes, lengths, tuple(options))

    def mode(self, options: tuple[Any, ...]) -> str:
        """Return the mode of a call; `options` are those of the op."""
        return ELMAN_MODES[options[0]] if self.name == "rnn" else self.name.upper()


def _register_cell(cell: _Cell) -> None:
    """Register fake kernels, autograd and autocast of a cell's forward and backward ops."""
    forward = getattr(torch_ops, f"{cell.name}_forward").default
    backward = getattr(torch_ops, f"{cell.name}_backward").default

    def forward_fake(*args: Any) -> tuple[Tensor, ...]:
        x, state, weights, batch_sizes, lengths, options = cell.inputs(args)
        if cell.name == "rnn":
            argument_checks.nonlinearity("rnn", options[0])
        mode = cell.mode(options)
        argument_checks.recurrence(cell.name, mode, x, state, weights, batch_sizes, lengths)
        w_ih, w_hh, _, _, w_hr = weights
        assert w_ih is not None
        assert w_hh is not None
        H, P = w_ih.shape[0] // gates_of(mode), w_hh.shape[1]
        y = x.new_empty((*x.shape[:-1], P))
        last = [
            x.new_empty((1, x.shape[1], size) if given is None else given.shape)
            for given, size in zip(state, (P, H), strict=False)
        ]
        if not cell.saved_blocks:
            return y, *last
        save = options[-1]
        blocks = cell.saved_blocks + (w_hr is not None)
        return y, *last, x.new_empty((math.prod(x.shape[:-1]) if save else 0, blocks * H))

    def backward_fake(*args: Any) -> tuple[Tensor, ...]:
        grads = 1 + cell.state
        x, *tensors = args[grads:]
        state, (w_ih, w_hh), rest = (
            tensors[: cell.state],
            tensors[cell.state : cell.state + 2],
            tensors[cell.state + 2 :],
        )
        bias = w_ih.new_empty(w_ih.shape[0])
        weights = (w_ih, w_hh, bias, bias, rest[0])[: cell.differentiable - 1 - cell.state]
        return fake_gradients(*zip((x, *state, *weights), args[-cell.differentiable :], strict=True))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, state, (w_ih, w_hh, b_ih, b_hh, w_hr), batch_sizes, lengths, options = cell.inputs(inputs)
        projection = (w_hr,) if cell.name == "lstm" else ()
        if cell.saved_blocks:
            options = options[:-1]
        saved = output[-1:] if cell.saved_blocks else ()
        ctx.save_for_backward(x, *state, w_ih, w_hh, *projection, output[0], *saved, batch_sizes, lengths, b_ih, b_hh)
        ctx.options = options

    def autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[: cell.differentiable]
        others = [None] * (len(ctx.needs_input_grad) - cell.differentiable)
        *tensors, b_ih, b_hh = ctx.saved_tensors
        states = 1 + cell.state
        if not torch.is_grad_enabled() and not transforms_active() and all(grad is None for grad in grads[states:]):
            gradients = backward(*grads[:states], *tensors, *ctx.options, *needs)
            return *needed(gradients, needs), *others
        mode, reverse = cell.mode(ctx.options), ctx.options[-2]
        x, *state = tensors[:states]
        w_ih, w_hh, *w_hr = tensors[states : len(needs) - 2]
        *results, batch_sizes, lengths = tensors[len(needs) - 2 :]
        inputs = [x, *state, w_ih, w_hh, b_ih, b_hh, *w_hr]
        if not transforms_active():
            needs = wanted_gradients(ctx, inputs, needs)
        if lengths is None:
            found = derivatives.gradients_of_op(
                mode, x, state, (w_ih, w_hh, *w_hr, None)[:3], results, batch_sizes, reverse, needs, grads
            )
            return *found, *others

        def call(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            state = None if others[0] is None else others[: cell.state]
            weights = unpack_weights(others[cell.state :])
            y, last = _run_transformed(_Call(mode, x, state, (weights,), (reverse,), lengths=lengths))
            return y, *last

        return *differentiable_gradients(call, inputs, needs, grads[:states]), *others

    register_fake(f"{cell.name}_forward", forward_fake)
    register_fake(f"{cell.name}_backward", backward_fake)
    register_autograd(f"{cell.name}_forward", autograd, setup_context)
    register_autocast(forward)
    refuse_derivative(f"{cell.name}_backward")


for _cell in (_Cell("rnn", 1, 0), _Cell("gru", 1, 4), _Cell("lstm", 2, 5)):
    _register_cell(_cell)


# ---- bidirectional_forward and bidirectional_backward: both directions of a layer, on CUDA


def _bidirectional_forward_fake(
    mode: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    tf32: bool,
    needs_autograd: bool,
) -> tuple[Tensor, ...]:
    half = len(weights) // 2
    state = None if h0 is None else (h0,) if c0 is None else (h0, c0)
    rows = (weights[:half], weights[half:])
    argument_checks.multilayer_rnn("bidirectional", mode, x, state, rows, 2, batch_sizes, lengths)
    P, H = weights[1].shape[1], weights[0].shape[0] // gates_of(mode)
    B = x.shape[1] if h0 is None else h0.shape[1]
    blocks = {"GRU": 4, "LSTM": 5 + (P != H)}.get(mode, 0)
    return (
        x.new_empty((*x.shape[:-1], 2 * P)),
        x.new_empty((2, B, P)),
        x.new_empty((2, B, H) if mode == "LSTM" else 0),
        x.new_empty((2 * math.prod(x.shape[:-1]) if needs_autograd else 0, blocks * H) if blocks else 0),
    )


def _bidirectional_backward_fake(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    mode: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    y: Tensor,
    saved: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    tf32: bool,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dx, dh0, dc0, *dweights = fake_gradients(
        *zip((x, h0, c0, *weights), (*needs[:3], *[needs[3]] * len(weights)), strict=True)
    )
    return dx, dh0, dc0, dweights


def _bidirectional_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mode, x, h0, c0, weights, bias, batch_sizes, lengths, tf32, _needs_autograd = inputs
    y, _h_n, _c_n, saved = output
    ctx.save_for_backward(x, h0, c0, y, saved, batch_sizes, lengths, *weights)
    ctx.options = mode, bias, tf32
    ctx.mark_non_differentiable(saved)


def _bidirectional_autograd(
    ctx: Any, grad_y: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, _grad_saved: None
) -> tuple[Any, ...]:
    x, h0, c0, y, saved, batch_sizes, lengths, *weights = ctx.saved_tensors
    mode, bias, tf32 = ctx.options
    _, *needs, need_weights, _, _, _, _, _ = ctx.needs_input_grad
    if torch.is_grad_enabled() or transforms_active():
        half = len(weights) // 2

        def call(x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
            state = None if h0 is None else (h0,) if c0 is None else (h0, c0)
            rows = (weights[:half], weights[half:])
            y, last = _run_transformed(_Call(mode, x, state, rows, (False, True), 0.0, batch_sizes, lengths))
            return y, *last

        gradients = differentiable_gradients(
            call, (x, h0, c0, *weights), (*needs, *need_weights), (grad_y, grad_h_n, grad_c_n)
        )
        return None, *gradients[:3], gradients[3:], None, None, None, None, None
    *gradients, dweights = _bidirectional_backward(
        *(grad_y, grad_h_n, grad_c_n if mode == "LSTM" else None),
        *(mode, x, h0, c0, weights, bias, y, saved, batch_sizes, lengths, tf32),
        *(*needs, any(need_weights)),
    )
    wanted = needed(tuple(gradients), tuple(needs))
    return None, *wanted, list(needed(tuple(dweights), tuple(need_weights))), None, None, None, None, None


register_fake("bidirectional_forward", _bidirectional_forward_fake)
register_fake("bidirectional_backward", _bidirectional_backward_fake)
register_autograd("bidirectional_forward", _bidirectional_autograd, _bidirectional_setup_context)
register_autocast(_bidirectional_forward)
refuse_derivative("bidirectional_backward")


# ---- multilayer_rnn_forward: all layers and directions, for inference


def _multilayer_rnn_forward_fake(
    mode: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    bidirectional: bool,
    input_projections: list[Tensor],
    batch_sizes: Tensor | None,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    each = 4 if bias else 2
    rows = [weights[i : i + each] for i in range(0, len(weights), each)]
    state = None if h0 is None else (h0,) if c0 is None else (h0, c0)
    directions = 1 + bidirectional
    op = "multilayer_rnn"
    argument_checks.multilayer_rnn(op, mode, x, state, rows, directions, batch_sizes, None, input_projections)
    H = weights[1].shape[1]
    B: int | torch.SymInt
    if h0 is not None:
        B = h0.shape[1]
    elif batch_sizes is None:
        B = x.shape[1]
    else:  # the first of batch_sizes, which a fake tensor does not have
        B = torch.library.get_ctx().new_dynamic_size()
    like = weights[1]
    leading = x.shape if input_projections else x.shape[:-1]
    y = like.new_empty((*leading, directions * H))
    return y, like.new_empty((len(rows), B, H)), like.new_empty((len(rows) if mode == "LSTM" else 0, B, H))


register_fake("multilayer_rnn_forward", _multilayer_rnn_forward_fake)
register_autocast(_multilayer_rnn_forward)
refuse_derivative("multilayer_rnn_forward", "it is for inference")
