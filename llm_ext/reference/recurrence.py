"""The truth: what every op of `llm_ext.ops` computes, in plain torch, written for reading."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}


def _recurrence(
    cell: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    state: tuple[Tensor, ...] | None,
    sizes: tuple[int, ...],
    w_ih: Tensor,
    b_ih: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Walk over the steps: `cell(w_ih x_t + b_ih, *state)` is the state after step t, and y[t] the first part of it.

    `sizes` are the features of each part of the state, for the zeros it starts from if it is None.
    """
    rows = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    ended = None
    if lengths is not None:
        ended = torch.arange(x.shape[0], device=x.device)[:, None, None] >= lengths[:, None]  # [T, B, 1]
        # Replaced before use: whatever stands in padding, even NaN, reaches no result and no gradient.
        x = x.masked_fill(ended, 0)
    inputs = torch.split(F.linear(x.reshape(sum(rows), x.shape[-1]), w_ih, b_ih), rows)
    if state is None:
        state = tuple(x.new_zeros(x.shape[1], size) for size in sizes)
    now = [part.reshape(part.shape[-2:]) for part in state]
    y = [x.new_empty(0, sizes[0])] * len(rows)
    for t in reversed(range(len(rows))) if reverse else range(len(rows)):
        after = cell(inputs[t], *(part[: rows[t]] for part in now))
        y[t] = after[0]
        if ended is not None:
            # Forward in time such a row keeps its last state, in reverse the one it is to start from.
            y[t] = y[t].masked_fill(ended[t], 0)
            after = tuple(torch.where(ended[t], part, new) for new, part in zip(after, now, strict=True))
        # Rows beyond this step's size wait: forward they have ended and hold their last state, in reverse their first.
        now = [torch.cat((new, part[rows[t] :])) for new, part in zip(after, now, strict=True)]
    last = tuple(part.reshape(given.shape).clone() for part, given in zip(now, state, strict=True))
    return torch.cat((x.new_empty(0, sizes[0]), *y)).view(*x.shape[:-1], sizes[0]), last


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
) -> tuple[Tensor, Tensor]:
    """Elman recurrence over a whole sequence, `h_t = σ(W x_t + b_ih + U h_{t-1} + b_hh)`.

    Args:
        x: [T, B, I]; with `batch_sizes` the packed rows [N, I] of all steps, one step after the other.
        h0: [B, H] or [1, B, H], or None for zeros; required with `batch_sizes`.
        w_ih: W, [H, I].
        w_hh: U, [H, H].
        b_ih: [H] or None.
        b_hh: [H] or None.
        batch_sizes: [T] int64, not increasing: how many rows step t has; N is their sum.
        lengths: [B] int64, from 0 to T: row b has lengths[b] steps; y is 0 beyond them. Not with `batch_sizes`.
        nonlinearity: σ, one of "tanh", "relu", "sigmoid".
        reverse: run t from T-1 down to 0; y[t] still belongs to x[t].

    Returns:
        y, shaped like x with H in place of I, and h_n in the shape of h0, each row after its own last step.

    Source: J. Elman, "Finding structure in time", 1990.
    """

    def cell(wx: Tensor, h: Tensor) -> tuple[Tensor]:
        return (ACTIVATIONS[nonlinearity](wx + F.linear(h, w_hh, b_hh)),)

    state = None if h0 is None else (h0,)
    y, (h_n,) = _recurrence(cell, x, state, (w_hh.shape[1],), w_ih, b_ih, batch_sizes, lengths, reverse)
    return y, h_n


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
) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit over a whole sequence, with the gates of torch.nn.GRU.

    `r_t = sigmoid(W_r x_t + b_ih_r + U_r h_{t-1} + b_hh_r)`, `z_t` in the same way,
    `n_t = tanh(W_n x_t + b_ih_n + r_t (U_n h_{t-1} + b_hh_n))`, `h_t = (1 - z_t) n_t + z_t h_{t-1}`.

    Args:
        x: [T, B, I]; with `batch_sizes` the packed rows [N, I] of all steps, one step after the other.
        h0: [B, H] or [1, B, H], or None for zeros; required with `batch_sizes`.
        w_ih: W, [3 H, I]: the blocks r, z, n one below the other.
        w_hh: U, [3 H, H].
        b_ih: [3 H] or None.
        b_hh: [3 H] or None.
        batch_sizes: [T] int64, not increasing: how many rows step t has; N is their sum.
        lengths: [B] int64, from 0 to T: row b has lengths[b] steps; y is 0 beyond them. Not with `batch_sizes`.
        reverse: run t from T-1 down to 0; y[t] still belongs to x[t].

    Returns:
        y, shaped like x with H in place of I, and h_n in the shape of h0, each row after its own last step.

    Source: Cho et al., arXiv 1406.1078; there r is applied before the product with U_n, here as in torch after it.
    """

    def cell(wx: Tensor, h: Tensor) -> tuple[Tensor]:
        wx_r, wx_z, wx_n = wx.chunk(3, 1)
        uh_r, uh_z, uh_n = F.linear(h, w_hh, b_hh).chunk(3, 1)
        r, z = torch.sigmoid(wx_r + uh_r), torch.sigmoid(wx_z + uh_z)
        n = torch.tanh(wx_n + r * uh_n)
        return ((1 - z) * n + z * h,)

    state = None if h0 is None else (h0,)
    y, (h_n,) = _recurrence(cell, x, state, (w_hh.shape[1],), w_ih, b_ih, batch_sizes, lengths, reverse)
    return y, h_n


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
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Long short-term memory over a whole sequence, with the gates of torch.nn.LSTM.

    `i_t = sigmoid(W_i x_t + b_ih_i + U_i h_{t-1} + b_hh_i)`, `f_t` and `o_t` in the same way, `g_t` with tanh,
    `c_t = f_t c_{t-1} + i_t g_t`, `h_t = o_t tanh(c_t)`; with a projection `h_t = R (o_t tanh(c_t))`.

    Args:
        x: [T, B, I]; with `batch_sizes` the packed rows [N, I] of all steps, one step after the other.
        state: (h0, c0), h0 [B, H] or [1, B, H], with a projection P for its H, and c0 [B, H] or [1, B, H]; or None for
            zeros; required with `batch_sizes`.
        w_ih: W, [4 H, I]: the blocks i, f, g, o one below the other.
        w_hh: U, [4 H, H], with a projection [4 H, P].
        b_ih: [4 H] or None.
        b_hh: [4 H] or None.
        w_hr: R, [P, H], or None for no projection.
        batch_sizes: [T] int64, not increasing: how many rows step t has; N is their sum.
        lengths: [B] int64, from 0 to T: row b has lengths[b] steps; y is 0 beyond them. Not with `batch_sizes`.
        reverse: run t from T-1 down to 0; y[t] still belongs to x[t].

    Returns:
        y, shaped like x with H (or P) in place of I, and (h_n, c_n) in the shapes of h0 and c0, each row after its own
        last step.

    Source: Hochreiter and Schmidhuber, "Long short-term memory", 1997; the forget gate f: Gers et al., "Learning to
    forget", 2000; the projection: Sak et al., arXiv 1402.1128.
    """

    def cell(wx: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (wx + F.linear(h, w_hh, b_hh)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h if w_hr is None else F.linear(h, w_hr), c

    sizes = w_hh.shape[1], w_hh.shape[0] // 4  # P or H, and H
    y, (h_n, c_n) = _recurrence(cell, x, state, sizes, w_ih, b_ih, batch_sizes, lengths, reverse)
    return y, (h_n, c_n)


def stack(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    *,
    bias: bool = True,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Layers one upon the other, each reading the output of the one below.

    Args:
        cell: "tanh", "relu" or "sigmoid" (Elman), "gru" or "lstm".
        x: [T, B, I].
        h0: [L, B, H], 2 L if bidirectional, or None for zeros.
        c0: likewise, of an LSTM, given exactly where h0 is; None otherwise.
        weights: w_ih, w_hh and with `bias` b_ih, b_hh of each layer and direction, in the order of the state.
        bias: whether there are biases.
        bidirectional: a second direction reads the sequence backwards; outputs of both are concatenated.

    Returns:
        y [T, B, H] (2 H) of the last layer, h_n [L, B, H], and c_n [L, B, H] of an LSTM, otherwise [0, B, H].
    """
    directions, each = 1 + bidirectional, 2 + 2 * bias
    last: list[tuple[Tensor, ...]] = []
    while len(last) * each < len(weights):
        outputs = []
        for reverse in (False, True)[:directions]:
            row = len(last)
            of_row = weights[row * each : (row + 1) * each]
            h = None if h0 is None else h0[row]
            if cell == "lstm":
                state = None if h is None or c0 is None else (h, c0[row])
                y, states = lstm(x, state, *of_row, reverse=reverse)
            elif cell == "gru":
                y, h_n = gru(x, h, *of_row, reverse=reverse)
                states = (h_n, h_n[:0])
            else:
                y, h_n = rnn(x, h, *of_row, nonlinearity=cell, reverse=reverse)
                states = (h_n, h_n[:0])
            outputs.append(y)
            last.append(states)
        x = torch.cat(outputs, -1)
    h_n, c_n = (torch.stack(parts) for parts in zip(*last, strict=True))
    return x, h_n, c_n if cell == "lstm" else h_n[:0]


def _admitted(e: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """Which positions take part, [B, T] bool."""
    admitted = torch.ones(e.shape[:2], dtype=torch.bool, device=e.device)
    if lengths is not None:
        admitted &= torch.arange(e.shape[1], device=e.device) < lengths[:, None]
    return admitted if mask is None else admitted & mask


def _scores(e: Tensor, u: Tensor | None, scores: Tensor | None) -> Tensor:
    if (u is None) == (scores is None):
        raise ValueError("exactly one of u and scores must be given")
    return scores if u is None else e @ u  # type: ignore[return-value]


def attention_pool(
    e: Tensor,
    u: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention pooling, `α_i = softmax_i(s_i)`, `c = Σ α_i e_i`, over the positions that take part.

    Args:
        e: [B, T, D].
        u: [D], for the scores `s_i = u·e_i`; exactly one of `u` and `scores` is given.
        scores: s, [B, T].
        lengths: [B] int64: position i of row b takes part if i < lengths[b].
        mask: [B, T] bool: True takes part.

    Returns:
        c [B, D] and the log-sum-exp of the scores [B]; 0 and -inf in rows where nothing takes part.
    """
    admitted = _admitted(e, lengths, mask)
    # Replaced before use: whatever stands in padding, even NaN, reaches no result and no gradient.
    e = e.masked_fill(~admitted[..., None], 0)
    s = _scores(e, u, scores).masked_fill(~admitted, -math.inf)
    empty = (s == -math.inf).all(1)
    lse = torch.logsumexp(s.masked_fill(empty[:, None], 0), 1)
    alpha = torch.exp(s - lse[:, None])
    return torch.einsum("bt,btd->bd", alpha, e), lse.masked_fill(empty, -math.inf)


def prefix_pool(
    e: Tensor,
    u: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Causal attention pooling, c_t over the positions i ≤ t, as a recurrence of two numbers (L, c).

    No exponential of a score is formed, so none can overflow:
    `a_t = sigmoid(s_t - L_{t-1})`, `L_t = logaddexp(L_{t-1}, s_t)`, `c_t = c_{t-1} + a_t (e_t - c_{t-1})`.

    Args:
        e: [B, T, D].
        u: [D], for the scores `s_t = u·e_t`; exactly one of `u` and `scores` is given.
        scores: s, [B, T].
        lengths: [B] int64: position t of row b takes part if t < lengths[b].
        mask: [B, T] bool: True takes part; a position that does not leaves the state as it is.
        state: (L [B], c [B, D]) of everything before e, or None for the empty past (-inf, 0).

    Returns:
        c [B, T, D] and the state (L [B], c [B, D]) after the last position.

    Source: "Attention as an RNN", arXiv 2405.13956.
    """
    B, _, D = e.shape
    admitted = _admitted(e, lengths, mask)
    e = e.masked_fill(~admitted[..., None], 0)
    s = _scores(e, u, scores)
    admitted &= s != -math.inf
    # The step is computed where nothing takes part too, and not taken: any finite score will do there.
    s = s.masked_fill(~admitted, 0)
    if state is None:
        L, c = e.new_full((B,), -math.inf), e.new_zeros(B, D)
    else:
        L, c = state[0].clone(), state[1].clone()
    outputs = [e.new_empty(B, 0, D)]
    for e_t, s_t, admitted_t in zip(e.unbind(1), s.unbind(1), admitted.unbind(1), strict=True):
        a = torch.sigmoid(s_t - L)[:, None]
        c = torch.where(admitted_t[:, None], c + a * (e_t - c), c)
        L = torch.where(admitted_t, torch.logaddexp(L, s_t), L)
        outputs.append(c[:, None])
    return torch.cat(outputs, 1), (L, c)


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
    """Additive attention, `s_qk = v·tanh(query_q + keys_k)`, `α_q = softmax_k(s_qk)`, `c_q = Σ_k α_qk values_k`.

    Args:
        query: [B, Tq, A], projected.
        keys: [B, Tk, A], projected; the bias, if there is one, is part of either.
        v: [A].
        values: [B, Tk, Dv].
        key_lengths: [B] int64: key k of row b takes part if k < key_lengths[b].
        mask: [B, Tk] or [B, Tq, Tk] bool: True takes part.
        need_weights: return α as well.

    Returns:
        c [B, Tq, Dv], and α [B, Tq, Tk] or None; 0 where no key takes part.

    Source: "Neural machine translation by jointly learning to align and translate", arXiv 1409.0473.
    """
    (B, Tq, _), Tk = query.shape, keys.shape[1]
    admitted = torch.ones(B, Tq, Tk, dtype=torch.bool, device=query.device)
    if mask is not None:
        admitted = admitted & (mask[:, None] if mask.dim() == 2 else mask)
    if key_lengths is not None:
        admitted = admitted & (torch.arange(Tk, device=query.device) < key_lengths[:, None, None])
    # Replaced before use: whatever stands where no query looks, even NaN, reaches no result and no gradient.
    unseen = ~admitted.any(1)[..., None]
    keys, values = keys.masked_fill(unseen, 0), values.masked_fill(unseen, 0)
    s = (torch.tanh(query[:, :, None] + keys[:, None]) @ v).masked_fill(~admitted, -math.inf)
    empty = (s == -math.inf).all(2, keepdim=True)
    alpha = torch.softmax(s.masked_fill(empty, 0), 2).masked_fill(empty, 0)
    return alpha @ values, alpha if need_weights else None


def attention_step(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    w_query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    w_out: Tensor,
    b_out: Tensor | None = None,
    *,
    bias: bool = True,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of a decoder with attention: its layers, then `out = tanh(w_out y + b_out + context)`.

    Args:
        cell: "tanh", "relu" or "sigmoid" (Elman), "gru" or "lstm".
        x: [1, N, I].
        h0: [L, N, H].
        c0: likewise, of an LSTM; None otherwise.
        weights: w_ih, w_hh and with `bias` b_ih, b_hh of each layer.
        w_query: [A, H].
        keys: [B, Tk, A], projected; N / B rows attend to each source.
        v: [A].
        values: [B, Tk, D].
        w_out: [D, H].
        b_out: [D], or None for zeros.
        bias: whether the layers have biases.
        key_lengths: [B] int64: key k of source b takes part if k < key_lengths[b].

    Returns:
        out [N, D], the new h [L, N, H], and the new c [L, N, H] of an LSTM, otherwise [0, N, H].

    Source: attention after the recurrence: Luong et al., arXiv 1508.04025.
    """
    y, h_n, c_n = stack(cell, x, h0, c0, weights, bias=bias)
    B, N = keys.shape[0], x.shape[1]
    query = F.linear(y[0], w_query).view(B, N // max(B, 1), keys.shape[2])
    context, _ = additive_attention(query, keys, v, values, key_lengths=key_lengths)
    return torch.tanh(F.linear(y[0], w_out, b_out) + context.flatten(0, 1)), h_n, c_n
