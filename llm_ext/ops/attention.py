"""Additive attention, and one step of a decoder that uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm_ext import reference
from llm_ext.ops import argument_checks
from llm_ext.ops._registration import (
    FAILURES,
    autocast_arguments,
    explain,
    explain_cast,
    fake_gradients,
    needed,
    refuse_derivative,
    register_autocast,
    register_autograd,
    register_fake,
    torch_ops,
    without_autocast,
)
from llm_ext.ops._transforms import differentiable_gradients, transforms_active
from llm_ext.ops.recurrence import State, Weights

__all__ = ["additive_attention", "attention_step"]

_additive_attention_forward = torch_ops.additive_attention_forward.default
_additive_attention_backward = torch_ops.additive_attention_backward.default
_attention_step = torch_ops.attention_step.default


# ---- additive_attention


def additive_attention(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    *,
    key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend by additive scores: ``c_q = sum_k softmax_k(v · tanh(query_q + keys_k)) values_k``.

    No tensor of Tq × Tk × A is stored.

    Args:
        query: Projected queries ``[B, Tq, A]``.
        keys: Projected keys ``[B, Tk, A]``. A bias belongs to the projection of either.
        v: ``[A]``.
        values: ``[B, Tk, Dv]``.
        key_lengths: int64 ``[B]``; keys ``k >= key_lengths[b]`` are masked. On CUDA, lengths outside 0 to Tk are
            clamped, not checked.
        mask: bool ``[B, Tk]`` or ``[B, Tq, Tk]``, False for masked keys. A key is attended to if both key_lengths and
            mask allow it.
        need_weights: Return the softmax weights too. They are differentiable.

    Returns:
        The context ``[B, Tq, Dv]``, and the weights ``[B, Tq, Tk]`` or ``None``. A query whose keys are all masked gets
        0, and gradients of 0.

    Raises:
        ValueError: A shape or device does not fit, or key_lengths are not from 0 to Tk.
        TypeError: The dtypes differ, or are not float32, float64, bfloat16 or float16.

    Source: Bahdanau et al., "Neural machine translation by jointly learning to align and translate", arXiv 1409.0473.

    Example:
        >>> query, keys, values = torch.randn(8, 5, 64), torch.randn(8, 20, 64), torch.randn(8, 20, 32)
        >>> context, weights = ops.additive_attention(query, keys, torch.randn(64), values, need_weights=True)
        >>> context.shape, weights.shape
        (torch.Size([8, 5, 32]), torch.Size([8, 5, 20]))
    """
    if transforms_active():
        query, keys, v, values = autocast_arguments(query, keys, v, values)
        argument_checks.additive_attention(query, keys, v, values, key_lengths, mask)
        context, weights = _plain_additive_attention(query, keys, v, values, key_lengths, mask)
        return context, weights if need_weights else None
    try:
        context, weights = _additive_attention_forward(query, keys, v, values, key_lengths, mask, need_weights)
    except FAILURES as failure:
        cast = (*autocast_arguments(query, keys, v, values), key_lengths, mask)
        explain_cast(failure, argument_checks.additive_attention, (query, keys, v, values, key_lengths, mask), cast)
    return context, weights if need_weights else None


def _additive_attention_forward_fake(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    argument_checks.additive_attention(query, keys, v, values, key_lengths, mask)
    (B, Tq, _), (_, Tk, Dv) = query.shape, values.shape
    return query.new_empty((B, Tq, Dv)), query.new_empty((B, Tq, Tk) if need_weights else 0)


def _additive_attention_backward_fake(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    *needs: bool,
) -> tuple[Tensor, ...]:
    return fake_gradients(*zip((query, keys, v, values), needs, strict=True))


def _additive_attention_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, need_weights = inputs
    ctx.save_for_backward(*tensors)
    if not need_weights:
        ctx.mark_non_differentiable(output[1])


def _additive_attention_autograd(
    ctx: Any, grad_context: Tensor | None, grad_weights: Tensor | None
) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() or transforms_active():
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[:6]
        grads = (grad_context, grad_weights)
        return *differentiable_gradients(_plain_additive_attention, inputs, needs, grads), None
    needs = ctx.needs_input_grad[:4]
    gradients = _additive_attention_backward(grad_context, grad_weights, *ctx.saved_tensors, *needs)
    return *needed(gradients, needs), None, None, None


def _plain_additive_attention(
    query: Tensor, keys: Tensor, v: Tensor, values: Tensor, key_lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return context and weights from torch's own ops, which have rules for every transform."""
    query, keys, v, values = autocast_arguments(query, keys, v, values)
    compute = argument_checks.compute_dtype(query.dtype)
    with without_autocast(query.device.type):
        inputs = (tensor.to(compute) for tensor in (query, keys, v, values))
        context, weights = reference.additive_attention(*inputs, key_lengths=key_lengths, mask=mask, need_weights=True)
    assert weights is not None
    return context.to(query.dtype), weights.to(query.dtype)


register_fake("additive_attention_forward", _additive_attention_forward_fake)
register_fake("additive_attention_backward", _additive_attention_backward_fake)
register_autograd("additive_attention_forward", _additive_attention_autograd, _additive_attention_setup_context)
register_autocast(_additive_attention_forward)
refuse_derivative("additive_attention_backward")


# ---- attention_step


def attention_step(
    mode: str,
    x: Tensor,
    state: State,
    weights: Sequence[Weights],
    w_query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    w_out: Tensor,
    b_out: Tensor | None = None,
    *,
    input_projections: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Apply one step of a decoder with attention in one op, for inference on a CPU.

    The recurrent layers give y; the query ``w_query y`` attends to the keys and gives the context; the result is
    ``out = tanh(w_out y + b_out + context)``. There is no derivative.

    Args:
        mode: See :func:`multilayer_rnn`.
        x: Input of N rows, ``[1, N, I]``, float32 or float64. With `input_projections`, int64 or int32 ids ``[1, N]``.
        state: ``(h0,)``, or ``(h0, c0)`` for an LSTM, each ``[L, N, H]``.
        weights: For each layer ``(w_ih, w_hh[, b_ih, b_hh])``.
        w_query: Projection of the query, ``[A, H]``.
        keys: Projected keys of B sources, ``[B, Tk, A]``. N is a multiple of B; N / B consecutive rows attend to each
            source.
        v: ``[A]``.
        values: ``[B, Tk, D]``.
        w_out: ``[D, H]``.
        b_out: ``[D]``, or ``None`` for zeros.
        input_projections: ``W_ih x + b_ih`` of every id for the first layer, ``[V, G H]``; its w_ih and b_ih are then
            not read.
        key_lengths: int64 ``[B]``; keys ``k >= key_lengths[b]`` of source b are masked.

    Returns:
        out ``[N, D]`` and the new state, each ``[L, N, H]``.

    Raises:
        ValueError: The mode is unknown, or a shape, number or device does not fit.
        IndexError: An id is not a row of `input_projections`.
        TypeError: The dtypes differ, or are not float32 or float64.
        NotImplementedError: The tensors are not on a CPU.

    Source: attention after the recurrence is that of Luong et al., arXiv 1508.04025.

    Example:
        >>> layer = torch.nn.GRU(16, 32)
        >>> x, h0 = torch.randn(1, 4, 16), torch.zeros(1, 4, 32)
        >>> keys, values = torch.randn(2, 7, 24), torch.randn(2, 7, 8)
        >>> weights = torch.randn(24, 32), keys, torch.randn(24), values, torch.randn(8, 32)
        >>> out, (h_n,) = ops.attention_step("GRU", x, (h0,), layer.all_weights, *weights)
        >>> out.shape, h_n.shape
        (torch.Size([4, 8]), torch.Size([1, 4, 32]))
    """
    if transforms_active():
        given = (mode, x, state, weights, w_query, keys, v, values, w_out, b_out)
        argument_checks.attention_step(*given, input_projections, key_lengths)
        return reference.attention_step(*given, input_projections=input_projections, key_lengths=key_lengths)
    if input_projections is not None and isinstance(x, Tensor) and x.dtype == torch.int32:
        x = x.long()
    try:
        h0, c0 = state if mode == "LSTM" else (*state, None)
        flat = [tensor for row in weights for tensor in row]
        bias = len(weights[0]) == 4
        out, h_n, c_n = _attention_step(
            mode, x, h0, c0, flat, bias, input_projections, w_query, keys, v, values, key_lengths, w_out, b_out
        )
    except (*FAILURES, ValueError, IndexError) as failure:
        explain(
            failure,
            argument_checks.attention_step,
            *(mode, x, state, weights, w_query, keys, v, values, w_out, b_out, input_projections, key_lengths),
        )
    return out, (h_n, c_n) if mode == "LSTM" else (h_n,)


def _attention_step_fake(
    mode: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    input_projection: Tensor | None,
    w_query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    key_lengths: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    each = 4 if bias else 2
    rows = [weights[i : i + each] for i in range(0, len(weights), each)]
    state = (h0,) if c0 is None else (h0, c0)
    argument_checks.attention_step(
        mode, x, state, rows, w_query, keys, v, values, w_out, b_out, input_projection, key_lengths
    )
    c_n = h0[:0] if c0 is None else c0
    return h0.new_empty((h0.shape[1], values.shape[2])), h0.new_empty(h0.shape), h0.new_empty(c_n.shape)


register_fake("attention_step", _attention_step_fake)
refuse_derivative("attention_step", "it is for inference")
