"""Attention layers: attention pooling and additive attention."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor, nn

from llm_ext import ops
from llm_ext.nn.arguments import as_flag, as_size, check_input
from llm_ext.nn.scripting import refuse_script
from llm_ext.ops import argument_checks
from llm_ext.ops._registration import match_dtype
from llm_ext.ops.pooling import pool_weights, unmasked_positions

__all__ = ["AdditiveAttention", "AttentionPool"]

# (L [B, 2], c [B, D]): the log-sum-exp of the scores, as `ops.prefix_pool` holds it, and the pooled vector of what came
# before.
State = tuple[Tensor, Tensor]


def zero_padding_for_autograd(rows: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return rows ``[B, T, *]`` with zeros at masked positions, if autograd records calls.

    A batch may hold anything there. Masked positions get gradients of 0, but 0 times the derivative of NaN or infinity
    is NaN, and a sum over all positions, such as the gradient of a weight, would be NaN with it.
    """
    if not torch.is_grad_enabled():
        return rows
    try:
        unmasked = unmasked_positions(rows.shape[1], lengths, mask)
        return rows if unmasked is None else rows.masked_fill(~unmasked[..., None], 0)
    except (RuntimeError, TypeError, IndexError, AttributeError):
        return rows  # the op says what is wrong with lengths and mask


def _results(
    c: Tensor, state: State | None, weights: Tensor | None
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
    """Return the results of pooling in the form that a call gets: c, and after it the state and weights that exist."""
    if state is None:
        return c if weights is None else (c, weights)
    return (c, state) if weights is None else (c, state, weights)


class AttentionPool(nn.Module):
    r"""Pool vectors by attention, over a sequence or over each of its prefixes.

    ``c = sum_t softmax_t(s) e_t`` with the score ``s_t = v · (W e_t)``, or ``s_t = v · tanh(W e_t + b)``.

    Args:
        embed_dim: D, size of the vectors.
        attn_dim: A, size of the attention space.
        score: ``"linear"`` or ``"tanh"``.
        causal: Pool at each position over the positions up to it.
        device: Device of the parameters.
        dtype: Dtype of the parameters: float32, float64, bfloat16 or float16.

    Attributes:
        weight: W, ``[A, D]``.
        v: ``[A]``.
        bias: b, ``[A]``, or ``None`` for a linear score.

    Raises:
        ValueError: A size or the score is out of range.

    Source: the tanh score is that of Bahdanau et al., arXiv 1409.0473; the causal form is that of "Attention as an
    RNN", arXiv 2405.13956.

    Example:
        >>> pool = llm_ext.AttentionPool(embed_dim=256, attn_dim=64)
        >>> e = torch.randn(8, 20, 256)
        >>> c, weights = pool(e, mask=torch.rand(8, 20) > 0.1, need_weights=True)
        >>> c.shape, weights.shape
        (torch.Size([8, 256]), torch.Size([8, 20]))
    """

    def __init__(
        self,
        embed_dim: int,
        attn_dim: int,
        score: str = "linear",
        causal: bool = False,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if score not in ("linear", "tanh"):
            raise ValueError(f"AttentionPool: score must be one of linear, tanh, got {score!r}")
        self.embed_dim = embed_dim = as_size("AttentionPool", "embed_dim", embed_dim)
        self.attn_dim = attn_dim = as_size("AttentionPool", "attn_dim", attn_dim)
        self.score = score
        self.causal = as_flag("AttentionPool", "causal", causal)
        self.bias: nn.Parameter | None
        self.weight = nn.Parameter(torch.empty(attn_dim, embed_dim, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.empty(attn_dim, device=device, dtype=dtype))
        bias = nn.Parameter(torch.empty(attn_dim, device=device, dtype=dtype)) if score == "tanh" else None
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W by Xavier's rule and v from U(-1/√A, 1/√A), and set the bias to zero."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.uniform_(self.v, -1 / math.sqrt(self.attn_dim), 1 / math.sqrt(self.attn_dim))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.attn_dim}, score={self.score!r}, causal={self.causal}"

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def fold(self) -> Tensor | None:
        """Return ``u = Wᵀ v``, ``[D]``, with which a linear score is ``s_t = u · e_t``; ``None`` for a tanh score."""
        return self.v @ self.weight if self.bias is None else None

    def forward(
        self,
        e: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = False,
        state: State | None = None,
        u: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
        """Pool e.

        Args:
            e: Vectors ``[B, T, D]``.
            lengths: int64 ``[B]``; positions ``t >= lengths[b]`` are masked.
            mask: bool ``[B, T]``, False for masked positions. A position is attended to if both lengths and mask allow
                it.
            need_weights: Return the softmax weights too. If causal, they take the memory of a T × T matrix per row.
            state: State ``(L [B, 2], c [B, D])`` that a causal call returned for the positions before e, in float32
                if e has 16 bits. ``None`` means there are none.
            u: The result of :meth:`fold`, for several calls with the same weights. ``None``: it is computed here.

        Returns:
            c ``[B, D]``, or ``(c, weights [B, T])`` with need_weights. If causal, ``(c [B, T, D], state)``, or
            ``(c, state, weights [B, T, T])``. Fully masked rows give 0. With a state the weights sum to less than 1;
            the rest belongs to the positions before e.

        Raises:
            ValueError: A shape or device does not fit, the pool is not causal but a state is given, or the score is
                tanh but u is given.
            TypeError: A dtype does not fit.
        """
        if e.dim() != 3 or e.shape[2] != self.embed_dim:
            argument_checks.fail_shape("AttentionPool", "e", "B, T, D", (None, None, self.embed_dim), e)
        scores = None
        scored = e  # what torch computes scores of; the ops do not read padding
        if self.bias is not None or need_weights:
            scored = zero_padding_for_autograd(e, lengths, mask)
        if self.bias is not None:
            if u is not None:
                raise ValueError("AttentionPool: u must be None with a tanh score, got a Tensor")
            try:
                scores = (torch.tanh(ops.linear(scored, self.weight, self.bias)) @ self.v).to(e.dtype)
            except (RuntimeError, TypeError):
                check_input("AttentionPool", "e", e, "B, T, D", (None, None, self.embed_dim), self.weight)
                raise
        elif u is None:
            (u,) = match_dtype(e, self.v @ self.weight)  # W e is never formed
        try:
            return self._pool(e, scored, u, scores, lengths, mask, need_weights, state)
        except (RuntimeError, TypeError):
            check_input("AttentionPool", "e", e, "B, T, D", (None, None, self.embed_dim), self.weight)
            raise

    def _pool(
        self,
        e: Tensor,
        scored: Tensor,
        u: Tensor | None,
        scores: Tensor | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        need_weights: bool,
        state: State | None,
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
        """Pool e by u or by scores; `scored` is e without what it has beyond lengths and mask."""
        new_state = None
        if self.causal:
            c, new_state = ops.prefix_pool(e, u, scores=scores, lengths=lengths, mask=mask, state=state)
        elif state is None:
            c, _ = ops.attention_pool(e, u, scores=scores, lengths=lengths, mask=mask)
        else:
            raise ValueError("AttentionPool: state must be None unless causal=True, got a state")
        weights = pool_weights(scored, u, scores, lengths, mask, state, self.causal) if need_weights else None
        return _results(c, new_state, weights)


class AdditiveAttention(nn.Module):
    r"""Attend from queries to keys by additive scores.

    ``c_q = sum_k softmax_k(s_qk) value_k`` with ``s_qk = v · tanh(W_q query_q + W_k key_k + b)``. No tensor of
    Tq × Tk × A is stored.

    Args:
        query_dim: Dq, size of the queries.
        key_dim: Dk, size of the keys.
        attn_dim: A, size of the attention space.
        bias: Whether b exists.
        device: Device of the parameters.
        dtype: Dtype of the parameters: float32, float64, bfloat16 or float16.

    Attributes:
        q_proj_weight: W_q, ``[A, Dq]``.
        k_proj_weight: W_k, ``[A, Dk]``.
        v: ``[A]``.
        bias: b, ``[A]``, or ``None``.

    Raises:
        ValueError: A size is out of range.

    Source: Bahdanau et al., "Neural machine translation by jointly learning to align and translate", arXiv 1409.0473.

    Example:
        >>> attention = llm_ext.AdditiveAttention(query_dim=128, key_dim=256, attn_dim=64)
        >>> query, keys = torch.randn(8, 5, 128), torch.randn(8, 20, 256)
        >>> context, weights = attention(query, keys, need_weights=True)
        >>> context.shape, weights.shape
        (torch.Size([8, 5, 256]), torch.Size([8, 5, 20]))
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attn_dim: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query_dim = query_dim = as_size("AdditiveAttention", "query_dim", query_dim)
        self.key_dim = key_dim = as_size("AdditiveAttention", "key_dim", key_dim)
        self.attn_dim = attn_dim = as_size("AdditiveAttention", "attn_dim", attn_dim)
        bias = as_flag("AdditiveAttention", "bias", bias)
        self.bias: nn.Parameter | None
        self.q_proj_weight = nn.Parameter(torch.empty(attn_dim, query_dim, device=device, dtype=dtype))
        self.k_proj_weight = nn.Parameter(torch.empty(attn_dim, key_dim, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.empty(attn_dim, device=device, dtype=dtype))
        b = nn.Parameter(torch.empty(attn_dim, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", b)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W_q and W_k by Xavier's rule and v from U(-1/√A, 1/√A), and set the bias to zero."""
        nn.init.xavier_uniform_(self.q_proj_weight)
        nn.init.xavier_uniform_(self.k_proj_weight)
        nn.init.uniform_(self.v, -1 / math.sqrt(self.attn_dim), 1 / math.sqrt(self.attn_dim))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.query_dim}, {self.key_dim}, {self.attn_dim}, bias={self.bias is not None}"

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def project_keys(self, keys: Tensor) -> Tensor:
        """Return ``W_k keys + b``, ``[B, Tk, A]``, for several calls with the same keys ``[B, Tk, Dk]`` and weights.

        Raises:
            ValueError: A shape does not fit.
        """
        if keys.dim() != 3 or keys.shape[2] != self.key_dim:
            argument_checks.fail_shape("AdditiveAttention", "keys", "B, Tk, Dk", (None, None, self.key_dim), keys)
        return ops.linear(keys, self.k_proj_weight, self.bias)

    def forward(
        self,
        query: Tensor,
        keys: Tensor | None,
        values: Tensor | None = None,
        key_lengths: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = False,
        *,
        projected_keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to keys.

        Args:
            query: ``[B, Tq, Dq]``.
            keys: ``[B, Tk, Dk]``; ``None`` if both values and projected_keys are given.
            values: ``[B, Tk, Dv]``; ``None``: the keys are the values.
            key_lengths: int64 ``[B]``; keys ``k >= key_lengths[b]`` are masked.
            mask: bool ``[B, Tk]`` or ``[B, Tq, Tk]``, False for masked keys. A key is attended to if both key_lengths
                and mask allow it.
            need_weights: Return the softmax weights too.
            projected_keys: ``[B, Tk, A]``, the result of :meth:`project_keys`; ``None``: keys are projected here.

        Returns:
            The context ``[B, Tq, Dv]``, and the weights ``[B, Tq, Tk]`` or ``None``. A query whose keys are all masked
            gets 0.

        Raises:
            ValueError: A shape or device does not fit, or keys are needed and missing.
            TypeError: A dtype does not fit.
        """
        if query.dim() != 3 or query.shape[2] != self.query_dim:
            argument_checks.fail_shape("AdditiveAttention", "query", "B, Tq, Dq", (None, None, self.query_dim), query)
        if keys is None and (values is None or projected_keys is None):
            raise ValueError("AdditiveAttention: keys must be given unless values and projected_keys are, got None")
        values = keys if values is None else values
        assert values is not None
        try:
            q = ops.linear(query, self.q_proj_weight)
            k = projected_keys
            if k is None:
                assert keys is not None
                k = self.project_keys(self._with_zero_padding(keys, key_lengths, mask))
            return ops.additive_attention(
                q, k, self.v, values, key_lengths=key_lengths, mask=mask, need_weights=need_weights
            )
        except (RuntimeError, TypeError):
            self._check_arguments(query, keys, projected_keys)
            raise

    def _with_zero_padding(self, keys: Tensor, key_lengths: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the keys with zeros where no query attends to them, if autograd records calls."""
        attended = mask.any(1) if isinstance(mask, Tensor) and mask.dim() == 3 else mask
        return zero_padding_for_autograd(keys, key_lengths, attended)

    def _check_arguments(self, query: Tensor, keys: Tensor | None, projected_keys: Tensor | None) -> None:
        """Raise if a tensor that is projected does not fit, in the words of the layer's own arguments."""
        name, weight, B = "AdditiveAttention", self.q_proj_weight, query.shape[0]
        check_input(name, "query", query, "B, Tq, Dq", (B, None, self.query_dim), weight)
        if projected_keys is not None:
            check_input(name, "projected_keys", projected_keys, "B, Tk, A", (B, None, self.attn_dim), weight)
        elif keys is not None:
            check_input(name, "keys", keys, "B, Tk, Dk", (B, None, self.key_dim), weight)
