"""Steps of a cell under autograd, for loops written by hand: one product gives the gradients of the weights.

The gradient of a weight is a sum over the steps that read it. Autograd would compute an outer product for each step and
add it to the sum, which for few rows costs more than everything else. Here the node of a step only stores its rows, and
a node that the steps of a loop share multiplies all of them, when autograd has come through all steps.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_ext.ops import _recurrence_derivatives as derivatives
from llm_ext.ops._registration import torch_ops
from llm_ext.ops._transforms import (
    backward_pass_id,
    below_autograd,
    differentiable_gradients,
    is_executed,
    transforms_active,
)
from llm_ext.ops.argument_checks import NONLINEARITIES

__all__ = ["step"]

# A state is (h,), or (h, c) of an LSTM; weights are (w_ih, w_hh, b_ih, b_hh).
State = tuple[Tensor, ...]
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

# Most rows that are stored, which bounds the memory of a long loop.
MOST_ROWS = 1024

_DTYPES = (torch.float32, torch.float64)
_TENSORS = (Tensor, torch.nn.Parameter)
# The forward op of each mode, and its arguments after the biases.
_FORWARD: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "GRU": (torch_ops.gru_forward.default, (None, None, False, False, True)),
    "LSTM": (torch_ops.lstm_forward.default, (None, None, None, False, False, True)),
} | {
    mode: (torch_ops.rnn_forward.default, (None, None, nonlinearity, False, False))
    for mode, nonlinearity in NONLINEARITIES.items()
}
_adjoint = torch_ops.recurrence_adjoint.default


class _Row(NamedTuple):
    """The rows of one step: the gradients by their pre-activations, and what the weights multiplied."""

    a: Tensor  # [B, *], in the blocks of the kernels
    x: Tensor
    h: Tensor


class _Sum:
    """The gradients of the weights over the steps of one backward pass.

    Attributes:
        rows: the rows that are not multiplied yet, `count` in all.
        products: the sums over the rows before them, in the order of the blocks of a; they are written to.
        gradients: the sums of other gradients, which autograd records.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.rows: list[_Row] = []
        self.count = 0
        self.products: list[Tensor] = []
        self.gradients: list[Tensor | None] = [None] * 4

    def add_rows(self, row: _Row) -> None:
        self.rows.append(row)
        self.count += len(row.x)
        if self.count >= MOST_ROWS:
            self.multiply()

    def multiply(self) -> None:
        """Add the gradients of the stored rows."""
        a, x, h = (torch.cat(tensors) for tensors in zip(*self.rows, strict=True))
        self.rows, self.count = [], 0
        by_input, by_state = derivatives.input_blocks(self.mode, a), derivatives.state_blocks(self.mode, a)
        if not self.products:
            self.products = [by_input.T @ x, by_state.T @ h, by_input.sum(0), by_state.sum(0)]
            return
        w_ih, w_hh, b_ih, b_hh = self.products
        w_ih.addmm_(by_input.T, x)
        w_hh.addmm_(by_state.T, h)
        b_ih += by_input.sum(0)
        b_hh += by_state.sum(0)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        self.gradients = [
            new if old is None else old if new is None else old + new
            for old, new in zip(self.gradients, gradients, strict=True)
        ]

    def total(self) -> list[Tensor | None]:
        """Return the gradients of (w_ih, w_hh, b_ih, b_hh)."""
        if self.rows:
            self.multiply()
        if self.products:
            w_ih, w_hh, b_ih, b_hh = self.products
            self.add([derivatives.in_gates(self.mode, w_ih), w_hh, derivatives.in_gates(self.mode, b_ih), b_hh])
        return self.gradients


class _Loop:
    """The weights and the sums of gradients that the steps of a loop share.

    Attributes:
        mode: that of the cell.
        forward, options: its op, and the op's arguments after the biases.
        weights: the weights of the cell.
        needs: for each of them whether it requires a gradient.
        sums: the sum of each backward pass that runs, by its number.
        is_over: whether a backward pass has come through the loop.
    """

    def __init__(self, mode: str, weights: Weights) -> None:
        self.mode = mode
        self.forward, self.options = _FORWARD[mode]
        self.weights = weights
        self.needs = _needs(weights)
        self.sums: dict[int, _Sum] = {}
        self.is_over = False

    def sum_of_pass(self) -> _Sum:
        number = backward_pass_id()
        found = self.sums.get(number)
        if found is None:
            found = self.sums[number] = _Sum(self.mode)
        return found


class _Weights(torch.autograd.Function):
    """The node that the steps of a loop share. Its output, the token of the loop, has no value."""

    @staticmethod
    def forward(ctx: Any, loop: _Loop, *weights: Tensor | None) -> Tensor:
        ctx.loop = loop
        ctx.set_materialize_grads(False)
        w_ih = weights[0]
        assert w_ih is not None
        return w_ih.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _grad: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.loop.is_over = True
        gradients = ctx.loop.sum_of_pass().total()
        del ctx.loop.sums[backward_pass_id()]
        needs = ctx.needs_input_grad[1:]
        return None, *[gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


class _Step(torch.autograd.Function):
    """One step. Its arguments: loop, token, x [B, I] and the state, each [B, H]."""

    @staticmethod
    def forward(ctx: Any, loop: _Loop, token: Tensor, x: Tensor, *state: Tensor) -> State:
        weights = loop.weights
        with below_autograd():
            y, *results = loop.forward(x.unsqueeze(0), *state, *weights, *loop.options)
        saved = results.pop() if len(results) > len(state) else None
        ctx.loop, ctx.token = loop, token
        ctx.set_materialize_grads(False)
        # y and not h, which the caller may write to.
        ctx.save_for_backward(x, y.squeeze(0), saved, *weights, *state)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        loop = ctx.loop
        mode = loop.mode
        x, y, saved, w_ih, w_hh, b_ih, b_hh, *state = ctx.saved_tensors
        _, need_token, need_x, *need_state = ctx.needs_input_grad
        collects = need_token and is_executed(ctx.token.grad_fn)
        if torch.is_grad_enabled() or transforms_active():
            needs = [need_x, *need_state, *(need and collects for need in loop.needs)]
            count = len(state)

            def call(x: Tensor, *tensors: Tensor) -> State:
                weights = (*tensors[count:], None)
                _, after = derivatives.one_direction(mode, x.unsqueeze(0), tensors[:count], weights, None, False)
                return tuple([tensor.squeeze(0) for tensor in after])

            dx, *found = differentiable_gradients(call, (x, *state, w_ih, w_hh, b_ih, b_hh), needs, grads)
            if collects:
                loop.sum_of_pass().add(found[count:])
            return None, None, dx, *found[:count]
        h, *c = state
        with below_autograd():
            a, _, _, dh, dc = _adjoint(
                mode, w_hh, None, saved, y, h, *(c or (None,)), None, *(*grads, None)[:2], None, _sizes(len(x)), False
            )
        if collects:
            loop.sum_of_pass().add_rows(_Row(a, x, h))
        dx = derivatives.gate_gradients(mode, a)[0] @ w_ih if need_x else None
        return None, None, dx, dh, *([dc] if c else [])


# Without the tests for torch.func in Function.apply, which take a tenth of the time of a small step.
_apply: Any = super(torch.autograd.Function, _Step).apply


@functools.lru_cache(64)
def _sizes(B: int) -> Tensor:
    return torch.tensor([B], device="cpu")


def _needs(weights: Weights) -> tuple[bool, ...]:
    return tuple([w is not None and w.requires_grad for w in weights])


# The token of the newest loop over each w_hh, by the id of the latter. The nodes of the steps keep the token.
_tokens: dict[int, weakref.ref[Tensor]] = {}


def _token(mode: str, weights: Weights) -> Any:
    """Return the token of the loop over these weights that still has steps, else None."""
    found = _tokens.get(id(weights[1]))
    token: Any = None if found is None else found()
    if token is None:
        return None
    # The graph of a loop that is over may live on. Autograd runs newer nodes first, and FSDP2 reduces gradients in a
    # node of each call, so the token of the next loop must be newer than the first of its calls.
    loop = token.loop
    if loop.is_over or loop.mode != mode or loop.needs != _needs(weights):
        return None
    # Tensors are compared by identity; the comparison of a loop would be slower.
    a, b, c, d = loop.weights
    return token if a is weights[0] and b is weights[1] and c is weights[2] and d is weights[3] else None


def _new_token(mode: str, weights: Weights) -> Any:
    """Return the token of a new loop, or None if the weights are no ordinary tensors, or need no gradient."""
    w_ih, w_hh, _, _ = weights
    if type(w_ih) not in _TENSORS or type(w_hh) not in _TENSORS or not any(_needs(weights)):
        return None
    loop = _Loop(mode, weights)
    token: Any = _Weights.apply(loop, *weights)  # type: ignore[no-untyped-call]
    token.loop = loop
    key = id(w_hh)

    def forget(ref: weakref.ref[Tensor]) -> None:
        if _tokens.get(key) is ref:
            del _tokens[key]

    _tokens[key] = weakref.ref(token, forget)
    return token


def step(mode: str, x: Tensor, state: State, weights: Weights) -> State | None:
    """Run one step, recorded by autograd, or return None if an ordinary call must run it.

    The gradient of the state is computed in any case, so the first step of a loop is better run by an ordinary call.

    Args:
        mode: `RNN_TANH`, `RNN_RELU`, `RNN_SIGMOID`, `GRU` or `LSTM`.
        x: Input ``[B, I]``.
        state: State before the step, each ``[B, H]``.
        weights: (w_ih, w_hh, b_ih, b_hh).

    Returns:
        The state after the step.
    """
    if not (state[0].requires_grad and x.is_cpu and x.dtype in _DTYPES and x.numel()):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    token = _token(mode, weights)
    if token is None:
        token = _new_token(mode, weights)
        if token is None:
            return None
    after: State = _apply(token.loop, token, x, *state)
    return after
