"""Attention pooling and additive attention as modules: parameters, and the choice between the ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llm_ext import checks, ops

State = tuple[Tensor, Tensor]


class AttentionPool(nn.Module):
    """Pool vectors by attention, `α = softmax(s)`, `c = Σ α_i e_i`, over a sequence or each of its prefixes.

    Args:
        embed_dim: D, size of the pooled vectors.
        attn_dim: A, size of the attention space.
        score: "linear" for `s_i = vᵀ W e_i`, "tanh" for `s_i = vᵀ tanh(W e_i + b)`.
        causal: pool at each position over it and those before it.
        device: of the parameters.
        dtype: of the parameters, float32, float64, bfloat16 or float16.

    Source: the tanh score is that of "Neural machine translation by jointly learning to align and translate",
    arXiv 1409.0473; the causal form is in "Attention as an RNN", arXiv 2405.13956.
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
        for name, size in (("embed_dim", embed_dim), ("attn_dim", attn_dim)):
            if size <= 0:
                raise ValueError(f"AttentionPool: {name} must be at least 1, got {size}")
        self.embed_dim = embed_dim
        self.attn_dim = attn_dim
        self.score = score
        self.causal = causal
        self.bias: nn.Parameter | None
        self.weight = nn.Parameter(torch.empty(attn_dim, embed_dim, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.empty(attn_dim, device=device, dtype=dtype))
        bias = nn.Parameter(torch.empty(attn_dim, device=device, dtype=dtype)) if score == "tanh" else None
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W by Xavier's rule and v from U(-1/√A, 1/√A); the bias is zero."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.uniform_(self.v, -1 / math.sqrt(self.attn_dim), 1 / math.sqrt(self.attn_dim))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.attn_dim}, score={self.score!r}, causal={self.causal}"

    def fold(self) -> Tensor | None:
        """Return u = Wᵀ v, [D], of a linear score: vᵀ W e = u·e. None for a tanh score, which does not fold."""
        return self.v @ self.weight if self.bias is None else None

    def forward(
        self,
        e: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        return_weights: bool = False,
        state: State | None = None,
        u: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
        """Pool e.

        Args:
            e: [B, T, D].
            lengths: [B] int64: position i of row b takes part if i < lengths[b].
            mask: [B, T] bool: True takes part; with `lengths`, a position needs both.
            return_weights: return α as well (which costs the memory of a T × T matrix a row when causal).
            state: when causal, (L [B], c [B, D]) as returned for what came before e; None at the start. It is float32
                where e has 16 bits, because it adds up over the sequence.
            u: what `fold` has returned, for many calls with the same weights; None: it is formed in this call.

        Returns:
            c [B, D], or (c, α [B, T]); when causal (c [B, T, D], state), or (c, state, α [B, T, T]).
            Where nothing takes part both are 0. Given a state, α sums to less than 1: the rest is the past's.

        Raises:
            ValueError: a shape or device that does not fit, a state for a pool that is not causal, or u for a tanh
                score.
            TypeError: a dtype that does not fit.
        """
        if e.dim() != 3 or e.shape[2] != self.embed_dim:
            checks.fail_shape("AttentionPool", "e", "B, T, D", (None, None, self.embed_dim), e)
        scores = None
        if self.bias is not None:
            if u is not None:
                raise ValueError("AttentionPool: u must be None with a tanh score, got a Tensor")
            scores = (torch.tanh(ops.linear(e, self.weight, self.bias)) @ self.v).to(e.dtype)
        elif u is None:
            u = (self.v @ self.weight).to(e.dtype)  # W e is never formed

        if self.causal:
            c, new_state = ops.prefix_pool(e, u, scores=scores, lengths=lengths, mask=mask, state=state)
            if return_weights:
                return c, new_state, self._weights(e, u, scores, lengths, mask, state)
            return c, new_state
        if state is not None:
            raise ValueError("AttentionPool: state must be None unless causal=True, got a state")
        c, _ = ops.attention_pool(e, u, scores=scores, lengths=lengths, mask=mask)
        return (c, self._weights(e, u, scores, lengths, mask, None)) if return_weights else c

    def _weights(
        self,
        e: Tensor,
        u: Tensor | None,
        scores: Tensor | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        state: State | None,
    ) -> Tensor:
        """The softmax that the ops never store: α [B, T], or [B, T, T] when causal."""
        T = e.shape[1]
        s = e @ u if u is not None else scores
        assert s is not None
        s = s.to(checks.compute_dtype(e.dtype))  # as the state
        position = torch.arange(T, device=e.device)
        if lengths is not None:
            s = s.masked_fill(position >= lengths[:, None], -math.inf)
        if mask is not None:
            s = s.masked_fill(~mask, -math.inf)
        if self.causal:
            s = s[:, None].masked_fill(position > position[:, None], -math.inf)
            # The past competes as one more position, which is then dropped.
            past = s.new_full((s.shape[0],), -math.inf) if state is None else state[0]
            s = torch.cat((past[:, None, None].expand(-1, T, 1), s), -1)
        empty = (s == -math.inf).all(-1, keepdim=True)
        alpha = torch.softmax(s.masked_fill(empty, 0), -1).masked_fill(empty, 0)
        return (alpha[..., 1:] if self.causal else alpha).to(e.dtype)


class AdditiveAttention(nn.Module):
    """Attend to keys by the additive score of Bahdanau, `s_qk = v·tanh(W_q query_q + W_k key_k + b)`.

    The weights `α_q = softmax_k(s_qk)` give the context `c_q = Σ_k α_qk value_k`. No tensor of Tq × Tk × A is stored.

    Args:
        query_dim: Dq, size of the queries.
        key_dim: Dk, size of the keys.
        attn_dim: A, size of the attention space.
        bias: whether there is a b.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16.

    Source: "Neural machine translation by jointly learning to align and translate", arXiv 1409.0473.
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
        for name, size in (("query_dim", query_dim), ("key_dim", key_dim), ("attn_dim", attn_dim)):
            if size <= 0:
                raise ValueError(f"AdditiveAttention: {name} must be at least 1, got {size}")
        self.query_dim = query_dim
        self.key_dim = key_dim
        self.attn_dim = attn_dim
        self.bias: nn.Parameter | None
        self.q_proj_weight = nn.Parameter(torch.empty(attn_dim, query_dim, device=device, dtype=dtype))
        self.k_proj_weight = nn.Parameter(torch.empty(attn_dim, key_dim, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.empty(attn_dim, device=device, dtype=dtype))
        b = nn.Parameter(torch.empty(attn_dim, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", b)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W_q and W_k by Xavier's rule and v from U(-1/√A, 1/√A); the bias is zero."""
        nn.init.xavier_uniform_(self.q_proj_weight)
        nn.init.xavier_uniform_(self.k_proj_weight)
        nn.init.uniform_(self.v, -1 / math.sqrt(self.attn_dim), 1 / math.sqrt(self.attn_dim))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.query_dim}, {self.key_dim}, {self.attn_dim}, bias={self.bias is not None}"

    def project_keys(self, keys: Tensor) -> Tensor:
        """Return W_k keys + b, [B, Tk, A], of keys [B, Tk, Dk]: once for many calls with the same keys and weights.

        Raises:
            ValueError: a shape that does not fit.
        """
        if keys.dim() != 3 or keys.shape[2] != self.key_dim:
            checks.fail_shape("AdditiveAttention", "keys", "B, Tk, Dk", (None, None, self.key_dim), keys)
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
            query: [B, Tq, Dq].
            keys: [B, Tk, Dk]; None if both values and projected_keys are given.
            values: [B, Tk, Dv]; None: the keys are the values.
            key_lengths: [B] int64: key k of row b takes part if k < key_lengths[b].
            mask: [B, Tk] or [B, Tq, Tk] bool: True takes part; with `key_lengths`, a key needs both.
            need_weights: return α as well.
            projected_keys: [B, Tk, A], what `project_keys` has returned for the keys; None: they are projected here.

        Returns:
            The context [B, Tq, Dv], and α [B, Tq, Tk] or None. Where no key takes part both are 0.

        Raises:
            ValueError: a shape or device that does not fit, or keys that are needed and missing.
            TypeError: a dtype that does not fit.
        """
        if query.dim() != 3 or query.shape[2] != self.query_dim:
            checks.fail_shape("AdditiveAttention", "query", "B, Tq, Dq", (None, None, self.query_dim), query)
        if keys is None and (values is None or projected_keys is None):
            raise ValueError("AdditiveAttention: keys must be given unless values and projected_keys are, got None")
        if projected_keys is None:
            assert keys is not None
            projected_keys = self.project_keys(keys)
        if values is None:
            assert keys is not None
            values = keys
        q = ops.linear(query, self.q_proj_weight)
        return ops.additive_attention(
            q, projected_keys, self.v, values, key_lengths=key_lengths, mask=mask, need_weights=need_weights
        )
