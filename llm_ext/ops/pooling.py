"""Attention pooling over a sequence, and over each of its prefixes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llm_ext import reference
from llm_ext.ops import argument_checks
from llm_ext.ops._registration import (
    FAILURES,
    autocast_arguments,
    explain_cast,
    refuse_derivative,
    register_autocast,
    register_autograd,
    register_fake,
    torch_ops,
    without_autocast,
)
from llm_ext.ops._transforms import differentiable_gradients, transforms_active
from llm_ext.reference.lengths import within_lengths
from llm_ext.reference.pooling import mask_positions

__all__ = ["attention_pool", "prefix_pool"]

_attention_pool_forward = torch_ops.attention_pool_forward.default
_attention_pool_backward = torch_ops.attention_pool_backward.default
_prefix_pool_forward = torch_ops.prefix_pool_forward.default
_prefix_pool_backward = torch_ops.prefix_pool_backward.default


def _empty_like_rows(e: Tensor) -> Tensor:
    """Return an empty tensor laid out as the kernels lay out results for e: time-major where e is, else dense."""
    B, T, D = e.shape
    if e.stride() == (D, B * D, 1):
        return e.new_empty((T, B, D)).transpose(0, 1)
    return e.new_empty((B, T, D))


# ---- attention_pool


def attention_pool(
    e: Tensor,
    u: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pool vectors by the softmax of their scores: ``c = sum_t softmax_t(s_t) e_t``.

    Args:
        e: Vectors ``[B, T, D]``. A transposed view of a dense ``[T, B, D]`` is read without a copy.
        u: ``[D]``, for the scores ``s_t = u · e_t``. Exactly one of u and `scores` must be given.
        scores: s, ``[B, T]``.
        lengths: int64 ``[B]``; positions ``t >= lengths[b]`` are masked. On CUDA, lengths outside 0 to T are clamped,
            not checked.
        mask: bool ``[B, T]``, False for masked positions. A position is attended to if both lengths and mask allow it.

    Returns:
        c ``[B, D]``, and the log-sum-exp of the scores ``[B]``, in float32 if e has 16 bits. A fully masked row gives 0
        and -inf, and gradients of 0.

    Raises:
        ValueError: A shape or device does not fit, or lengths are not from 0 to T.
        TypeError: The dtypes differ, or are not float32, float64, bfloat16 or float16.

    Source: the softmax in one pass is that of Milakov and Gimelshein, arXiv 1805.02867.

    Example:
        >>> c, lse = ops.attention_pool(torch.randn(8, 20, 256), torch.randn(256) / 16)
        >>> c.shape, lse.shape
        (torch.Size([8, 256]), torch.Size([8]))
    """
    if transforms_active():
        e, u, scores = autocast_arguments(e, u, scores)
        argument_checks.pool("attention_pool", e, u, scores, lengths, mask)
        return _plain_attention_pool(e, u, scores, lengths, mask)
    try:
        c, lse, _l = _attention_pool_forward(e, u, scores, lengths, mask)
    except FAILURES as failure:
        cast = ("attention_pool", *autocast_arguments(e, u, scores), lengths, mask)
        explain_cast(failure, argument_checks.pool, ("attention_pool", e, u, scores, lengths, mask), cast)
    return c, lse


def _attention_pool_forward_fake(
    e: Tensor, u: Tensor | None, scores: Tensor | None, lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    argument_checks.pool("attention_pool", e, u, scores, lengths, mask)
    B, _T, D = e.shape
    computed = argument_checks.compute_dtype(e.dtype)
    return e.new_empty((B, D)), e.new_empty(B, dtype=computed), e.new_empty((B, 2), dtype=computed)


def _attention_pool_backward_fake(
    grad_c: Tensor | None,
    grad_lse: Tensor | None,
    e: Tensor,
    u: Tensor | None,
    scores: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    c: Tensor,
    l: Tensor,  # noqa: E741
    need_de: bool,
    need_du: bool,
    need_dscores: bool,
) -> tuple[Tensor, ...]:
    B, T, D = e.shape
    return (
        _empty_like_rows(e) if need_de else e.new_empty(0),
        e.new_empty(D if need_du and u is not None else 0),
        e.new_empty((B, T) if need_dscores and scores is not None else 0),
    )


def _attention_pool_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    c, _lse, l = output  # noqa: E741
    ctx.save_for_backward(*inputs, c, l)
    ctx.mark_non_differentiable(l)


def _attention_pool_autograd(
    ctx: Any, grad_c: Tensor | None, grad_lse: Tensor | None, _grad_l: None
) -> tuple[Tensor | None, ...]:
    need_e, need_u, need_scores = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled() or transforms_active():
        inputs, needs = ctx.saved_tensors[:5], ctx.needs_input_grad
        return tuple(differentiable_gradients(_plain_attention_pool, inputs, needs, (grad_c, grad_lse)))
    de, du, dscores = _attention_pool_backward(grad_c, grad_lse, *ctx.saved_tensors, need_e, need_u, need_scores)
    return de if need_e else None, du if need_u else None, dscores if need_scores else None, None, None


def _plain_attention_pool(
    e: Tensor, u: Tensor | None, scores: Tensor | None, lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the results of the op from torch's own ops, which have rules for every transform."""
    dtype, e, u, scores = _widened(e, u, scores)
    with without_autocast(e.device.type):
        c, lse = reference.attention_pool(e, u, scores=scores, lengths=lengths, mask=mask)
    return c.to(dtype), lse


def _widened(
    e: Tensor, u: Tensor | None, scores: Tensor | None
) -> tuple[torch.dtype, Tensor, Tensor | None, Tensor | None]:
    """Return the dtype of c, and the inputs in the dtype that they are computed in."""
    e, u, scores = autocast_arguments(e, u, scores)
    compute = argument_checks.compute_dtype(e.dtype)
    u, scores = (None if tensor is None else tensor.to(compute) for tensor in (u, scores))
    return e.dtype, e.to(compute), u, scores


register_fake("attention_pool_forward", _attention_pool_forward_fake)
register_fake("attention_pool_backward", _attention_pool_backward_fake)
register_autograd("attention_pool_forward", _attention_pool_autograd, _attention_pool_setup_context)
register_autocast(_attention_pool_forward)
refuse_derivative("attention_pool_backward")


# ---- the weights, which the ops do not store


def unmasked_positions(T: int, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return the positions that lengths and mask allow, bool ``[B, T]``; ``None`` means all."""
    if lengths is None:
        return mask
    within = within_lengths(lengths, T)
    return within if mask is None else within & mask


def pool_weights(
    e: Tensor,
    u: Tensor | None,
    scores: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    state: tuple[Tensor, Tensor] | None,
    causal: bool,
) -> Tensor:
    """Return the softmax weights of `attention_pool`, ``[B, T]``, or if causal of `prefix_pool`, ``[B, T, T]``.

    The values of e at masked positions must be finite.
    """
    dtype, e, u, scores = _widened(e, u, scores)
    T = e.shape[1]
    with without_autocast(e.device.type):
        s = e @ u if u is not None else scores
        assert s is not None
        unmasked = unmasked_positions(T, lengths, mask)
        if unmasked is not None:
            s = s.masked_fill(~unmasked, -math.inf)
        if causal:
            position = torch.arange(T, device=e.device)
            s = s[:, None].masked_fill(position > position[:, None], -math.inf)
            # The state takes part in the softmax as one more position, which is dropped afterwards. Beside scores
            # relative to m, log z is not rounded away.
            past = s.new_full((s.shape[0],), -math.inf)
            if state is not None:
                m, z = state[0].unbind(1)
                none = (z == 0) | (m == -math.inf)
                s = s - m.masked_fill(none, 0)[:, None, None]
                past = z.masked_fill(none, 1).log().masked_fill(none, -math.inf)
            s = torch.cat((past[:, None, None].expand(-1, T, 1), s), -1)
        empty = (s == -math.inf).all(-1, keepdim=True)
        alpha = torch.softmax(s.masked_fill(empty, 0), -1).masked_fill(empty, 0)
    return (alpha[..., 1:] if causal else alpha).to(dtype)


# ---- prefix_pool


def prefix_pool(
    e: Tensor,
    u: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Pool each prefix of a sequence: ``c_t`` pools the positions ``i <= t`` and whatever an initial state has pooled.

    ``a_t = sigmoid(s_t - L_{t-1})``, ``L_t = logaddexp(L_{t-1}, s_t)``, ``c_t = c_{t-1} + a_t (e_t - c_{t-1})``

    Args:
        e: Vectors ``[B, T, D]``. A transposed view of a dense ``[T, B, D]`` is read without a copy.
        u: ``[D]``, for the scores ``s_t = u · e_t``. Exactly one of u and `scores` must be given.
        scores: s, ``[B, T]``.
        lengths: int64 ``[B]``; positions ``t >= lengths[b]`` are masked and leave the state unchanged. On CUDA, lengths
            outside 0 to T are clamped, not checked.
        mask: bool ``[B, T]``, False for masked positions.
        state: ``(L [B, 2], c [B, D])`` as returned for an earlier part of the sequence, in float32 if e has 16 bits.
            ``None`` means an empty past: L = (-inf, 0), c = 0.

    Returns:
        c ``[B, T, D]``, with the memory layout of e, and the state ``(L [B, 2], c [B, D])`` after the last position.
        L is held in two numbers, which keep their precision where scores are large: m, the largest score, and z, the
        sum of ``exp(s - m)``; the log-sum-exp is ``m + log z``. It is differentiable by z, and m is a constant.

    Raises:
        ValueError: A shape or device does not fit, or lengths are not from 0 to T.
        TypeError: The dtypes differ, or are not float32, float64, bfloat16 or float16.

    Source: "Attention as an RNN", arXiv 2405.13956.

    Example:
        >>> c, (L, c_last) = ops.prefix_pool(torch.randn(8, 20, 256), torch.randn(256) / 16)
        >>> c.shape, L.shape, c_last.shape
        (torch.Size([8, 20, 256]), torch.Size([8, 2]), torch.Size([8, 256]))
    """
    l0, c0 = (None, None) if state is None else state
    if transforms_active():
        e, u, scores = autocast_arguments(e, u, scores)
        argument_checks.pool("prefix_pool", e, u, scores, lengths, mask, state)
        c, l_n, c_n = _plain_prefix_pool(e, u, scores, lengths, mask, l0, c0)
        return c, (l_n, c_n)
    try:
        c, _share, l_n, c_n = _prefix_pool_forward(e, u, scores, lengths, mask, l0, c0)
    except FAILURES as failure:
        cast = ("prefix_pool", *autocast_arguments(e, u, scores), lengths, mask, state)
        explain_cast(failure, argument_checks.pool, ("prefix_pool", e, u, scores, lengths, mask, state), cast)
    return c, (l_n, c_n)


def _prefix_pool_forward_fake(
    e: Tensor,
    u: Tensor | None,
    scores: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    l0: Tensor | None,
    c0: Tensor | None,
) -> tuple[Tensor, ...]:
    argument_checks.pool("prefix_pool", e, u, scores, lengths, mask, None if l0 is None or c0 is None else (l0, c0))
    B, T, D = e.shape
    computed = argument_checks.compute_dtype(e.dtype)
    return _empty_like_rows(e), *(e.new_empty(size, dtype=computed) for size in ((B, T), (B, 2), (B, D)))


def _prefix_pool_backward_fake(
    grad_c: Tensor | None,
    grad_l_n: Tensor | None,
    grad_c_n: Tensor | None,
    e: Tensor,
    u: Tensor | None,
    c0: Tensor | None,
    c: Tensor,
    share: Tensor,
    need_de: bool,
    need_du: bool,
    need_dscores: bool,
    need_dstate: bool,
) -> tuple[Tensor, ...]:
    B, T, D = e.shape
    return (
        _empty_like_rows(e) if need_de else e.new_empty(0),
        e.new_empty(D if need_du else 0),
        e.new_empty((B, T) if need_dscores else 0),
        share.new_empty(B if need_dstate else 0),
        share.new_empty((B, D) if need_dstate else 0),
    )


def _prefix_pool_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    e, u, scores, lengths, mask, l0, c0 = inputs
    c, share, l_n, _c_n = output
    ctx.save_for_backward(e, u, c0, c, share, scores, lengths, mask, l0, l_n)
    ctx.mark_non_differentiable(share)


def _prefix_pool_autograd(
    ctx: Any, grad_c: Tensor | None, _grad_share: None, grad_l_n: Tensor | None, grad_c_n: Tensor | None
) -> tuple[Tensor | None, ...]:
    need_e, need_u, need_scores, _, _, need_l0, need_c0 = ctx.needs_input_grad
    e, u, c0, c, share, scores, lengths, mask, l0, l_n = ctx.saved_tensors
    if torch.is_grad_enabled() or transforms_active():
        inputs, grads = (e, u, scores, lengths, mask, l0, c0), (grad_c, grad_l_n, grad_c_n)
        return tuple(differentiable_gradients(_plain_prefix_pool, inputs, ctx.needs_input_grad, grads))
    # The op takes and gives gradients of the log-sum-exp m + log z.
    of_log_sum = None if grad_l_n is None else grad_l_n[:, 1] * l_n[:, 1]
    de, du, dscores, dl0, dc0 = _prefix_pool_backward(
        grad_c, of_log_sum, grad_c_n, e, u, c0, c, share, need_e, need_u, need_scores, need_l0 or need_c0
    )
    if need_l0:
        z = l0[:, 1]
        dl0 = torch.stack((dl0, torch.where(z == 0, 0, dl0 / z)), 1)
    return (
        de if need_e else None,
        du if need_u else None,
        dscores if need_scores else None,
        None,
        None,
        dl0 if need_l0 else None,
        dc0 if need_c0 else None,
    )


def _plain_prefix_pool(
    e: Tensor,
    u: Tensor | None,
    scores: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    l0: Tensor | None,
    c0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of the op from torch's own ops, by the softmax of each prefix: a T × T matrix per row."""
    dtype, e, u, scores = _widened(e, u, scores)
    B, T, D = e.shape
    if l0 is None or c0 is None:
        l0, c0 = torch.stack((e.new_full((B,), -math.inf), e.new_zeros(B)), 1), e.new_zeros(B, D)
    with without_autocast(e.device.type):
        e, s, unmasked = mask_positions(e, u, scores, lengths, mask)
        # The state is one more position, before the others, that counts z times; row t of the matrix has the positions
        # up to t.
        m, z = l0.unbind(1)
        e = torch.cat((c0[:, None], e), 1)
        s = torch.cat((m.masked_fill(z == 0, -math.inf)[:, None], s.masked_fill(~unmasked, -math.inf)), 1)
        later = torch.ones(T + 1, T + 1, dtype=torch.bool, device=e.device).triu(1)
        matrix = s[:, None].masked_fill(later, -math.inf)
        empty = (matrix == -math.inf).all(2, keepdim=True)
        high = matrix.amax(2, keepdim=True).detach()
        count = torch.cat((z[:, None], torch.ones_like(s[:, 1:])), 1)[:, None]
        weights = torch.exp(matrix - high.masked_fill(empty, 0)) * count
        totals = weights.sum(2, keepdim=True)
        alpha = weights / totals.masked_fill(empty, 1)
        # Where nothing has been attended to, the state has passed unchanged.
        c = torch.where(empty, c0[:, None], alpha @ e)
        l_n = torch.cat((high[:, -1], totals[:, -1]), 1)
    return c[:, 1:].to(dtype), l_n, c[:, -1]


register_fake("prefix_pool_forward", _prefix_pool_forward_fake)
register_fake("prefix_pool_backward", _prefix_pool_backward_fake)
register_autograd("prefix_pool_forward", _prefix_pool_autograd, _prefix_pool_setup_context)
register_autocast(_prefix_pool_forward, float32_arguments=(5, 6))
refuse_derivative("prefix_pool_backward")
