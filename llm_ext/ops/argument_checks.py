"""Checks of what arguments mean, with messages a person understands.

`csrc/torch` refuses whatever it cannot run; these say why. Values inside tensors (lengths, batch sizes) are
looked at where there are any: not under torch.compile.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

NONLINEARITIES = ("tanh", "relu", "sigmoid")
STACK_CELLS = (*NONLINEARITIES, "gru", "lstm")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of affine maps of our own, on a CPU; elsewhere torch has products that are at least as quick.
LINEAR_DTYPES = (torch.float32, torch.float64)

# Sizes of a tensor; None for any.
Sizes = tuple[int | None, ...]


class ArgumentError(ValueError, RuntimeError):
    """Arguments that do not fit together: a ValueError; a RuntimeError too, as torch.nn raises here."""


class DtypeError(ArgumentError, TypeError):
    """A wrong dtype: a TypeError too."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what numbers of a dtype are computed in, and what adds up over a sequence is kept in."""
    return torch.promote_types(dtype, torch.float32)


def fail_shape(op: str, name: str, letters: str, sizes: Sizes, got: Tensor) -> NoReturn:
    """Raise for a shape that is not `sizes`, which `letters` names."""
    expected = ", ".join("*" if size is None else str(size) for size in sizes)
    raise ArgumentError(f"{op}: {name} must be [{letters}] = [{expected}], got {list(got.shape)}")


def _check(
    op: str,
    name: str,
    got: Tensor,
    letters: str,
    sizes: Sizes,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """Raise unless `got` is a tensor of these sizes and of one of these dtypes, on the device of `like`."""
    if not isinstance(got, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(got).__name__}")
    if got.dim() != len(sizes) or any(n is not None and n != m for n, m in zip(sizes, got.shape, strict=True)):
        fail_shape(op, name, letters, sizes, got)
    if got.dtype not in dtypes:
        *others, last = map(str, dtypes)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise DtypeError(f"{op}: {name} must be {expected}, got {got.dtype}".replace("torch.", ""))
    if like is not None and got.device != like[1].device:
        raise ArgumentError(f"{op}: {name} must be on {like[1].device} like {like[0]}, got {got.device}")


def _has_values(tensor: Tensor) -> bool:
    """Whether it is a plain tensor on the CPU: the fake ones of torch.compile are of another type."""
    return type(tensor) is Tensor and tensor.is_cpu


def _check_lengths(op: str, name: str, lengths: Tensor, letter: str, T: int) -> None:
    """Raise if a length is not from 0 to T, which `letter` names."""
    if _has_values(lengths) and any(not 0 <= length <= T for length in lengths.tolist()):
        raise ArgumentError(f"{op}: {name} must be from 0 to {letter} = {T}, got {lengths.tolist()}")


def batch_lengths(op: str, x: Tensor, lengths: Tensor) -> None:
    """Raise if lengths are not those of the rows of x [T, B, *]."""
    _check(op, "lengths", lengths, "B", (x.shape[1],), (torch.int64,), ("x", x))
    _check_lengths(op, "lengths", lengths, "T", x.shape[0])


def _packed_batch(op: str, x: Tensor, batch_sizes: Tensor) -> int | None:
    """Rows of the first step of packed rows x, None if they are not known; raise if batch_sizes do not describe x."""
    _check(op, "batch_sizes", batch_sizes, "T", (None,), (torch.int64,))
    if not batch_sizes.is_cpu:
        raise ArgumentError(f"{op}: batch_sizes must be on cpu, got {batch_sizes.device}")
    if not _has_values(batch_sizes):
        return None
    sizes = batch_sizes.tolist()
    if min(sizes, default=1) < 1 or sizes != sorted(sizes, reverse=True):
        raise ArgumentError(f"{op}: batch_sizes must be positive and never rise, got {sizes}")
    if sum(sizes) != len(x):
        raise ArgumentError(f"{op}: batch_sizes must sum to the rows of x, {len(x)}, got {sum(sizes)}")
    return sizes[0] if sizes else None


def _recurrence(
    op: str,
    gates: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Raise if the arguments of a recurrence do not fit together; w_ih is [gates * H, I]."""
    G = "" if gates == 1 else f"{gates} "
    _check(op, "w_ih", w_ih, f"{G}H, I", (None, None), DTYPES)
    rows, I = w_ih.shape  # noqa: E741
    if rows % gates:
        raise ArgumentError(f"{op}: w_ih must be [{G}H, I], got {list(w_ih.shape)}")
    H = P = rows // gates
    same, like = (w_ih.dtype,), ("w_ih", w_ih)
    if w_hr is not None:
        _check(op, "w_hr", w_hr, "P, H", (None, H), same, like)
        P = w_hr.shape[0]
        if P >= H:
            raise ArgumentError(f"{op}: w_hr must be [P, H] with P < H, got {list(w_hr.shape)}")
    batch = None
    if batch_sizes is None:
        _check(op, "x", x, "T, B, I", (None, None, I), same, like)
        batch = x.shape[1]
        if lengths is not None:
            batch_lengths(op, x, lengths)
    else:
        if lengths is not None:
            raise ArgumentError(f"{op}: lengths belong to a padded x [T, B, I], got batch_sizes too")
        _check(op, "x", x, "N, I", (None, I), same, like)
        if h0 is None:
            raise ArgumentError(f"{op}: h0 must be given with batch_sizes, got None")
        batch = _packed_batch(op, x, batch_sizes)
    for name, state, letter, width in (("h0", h0, "H" if w_hr is None else "P", P), ("c0", c0, "H", H)):
        if state is not None and state.dim() == 3:  # one layer's state as torch.nn lays it out
            _check(op, name, state, f"1, B, {letter}", (1, batch, width), same, like)
        elif state is not None:
            _check(op, name, state, f"B, {letter}", (batch, width), same, like)
    _check(op, "w_hh", w_hh, f"{G}H, H" if w_hr is None else f"{G}H, P", (rows, P), same, like)
    if b_ih is not None:
        _check(op, "b_ih", b_ih, f"{G}H", (rows,), same, like)
    if b_hh is not None:
        _check(op, "b_hh", b_hh, f"{G}H", (rows,), same, like)


def rnn(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    nonlinearity: str,
) -> None:
    """Raise if the arguments of `ops.rnn` do not fit together."""
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"rnn: nonlinearity must be one of {NONLINEARITIES}, got {nonlinearity!r}")
    _recurrence("rnn", 1, x, h0, None, w_ih, w_hh, b_ih, b_hh, None, batch_sizes, lengths)


def gru(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Raise if the arguments of `ops.gru` do not fit together."""
    _recurrence("gru", 3, x, h0, None, w_ih, w_hh, b_ih, b_hh, None, batch_sizes, lengths)


def lstm(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Raise if the arguments of `ops.lstm` do not fit together."""
    if (h0 is None) != (c0 is None):
        raise ArgumentError("lstm: h0 and c0 must be given together")
    _recurrence("lstm", 4, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, lengths)


def bidirectional(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Raise if the arguments of `ops.bidirectional` do not fit together."""
    op = "bidirectional"
    if cell not in STACK_CELLS:
        raise ValueError(f"{op}: cell must be one of {STACK_CELLS}, got {cell!r}")
    each = 2 + 2 * bias
    if len(weights) != 2 * each and not (cell == "lstm" and len(weights) == 2 * each + 2):
        raise ArgumentError(f"{op}: weights must be {each} tensors for each direction, got {len(weights)} tensors")
    if cell == "lstm" and (h0 is None) != (c0 is None):
        raise ArgumentError(f"{op}: h0 and c0 must be given together")
    if cell != "lstm" and c0 is not None:
        raise ArgumentError(f"{op}: c0 belongs to an LSTM, got one for {cell}")
    for name, state in (("h0", h0), ("c0", c0)):
        if state is not None and (state.dim() != 3 or state.shape[0] != 2):
            fail_shape(op, name, "2, B, H", (2, None, None), state)
    each = len(weights) // 2
    for d in range(2):
        w_ih, w_hh, *others = weights[d * each : (d + 1) * each]
        b_ih, b_hh = others[:2] if bias else (None, None)
        w_hr = others[-1] if len(others) % 2 else None
        h, c = (None if state is None else state[d] for state in (h0, c0))
        _recurrence(op, {"gru": 3, "lstm": 4}.get(cell, 1), x, h, c, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, lengths)


def stack(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    bidirectional: bool,
    tables: list[Tensor],
    batch_sizes: Tensor | None,
    op: str = "stack",
) -> None:
    """Raise if the arguments of `ops.stack` do not fit together."""
    if cell not in STACK_CELLS:
        raise ValueError(f"{op}: cell must be one of {STACK_CELLS}, got {cell!r}")
    gates = {"gru": 3, "lstm": 4}.get(cell, 1)
    directions, each = 1 + bidirectional, 2 + 2 * bias
    rows = len(weights) // each
    if rows == 0 or len(weights) % (each * directions):
        per = f"{each} tensors for each layer" + (" and direction" if bidirectional else "")
        raise ArgumentError(f"{op}: weights must be {per}, got {len(weights)} tensors")
    if cell == "lstm" and (h0 is None) != (c0 is None):
        raise ArgumentError(f"{op}: h0 and c0 must be given together")
    if cell != "lstm" and c0 is not None:
        raise ArgumentError(f"{op}: c0 belongs to an LSTM, got one for {cell}")
    steps, sizes = ("T, B", (None, None)) if batch_sizes is None else ("N", (None,))
    if tables:
        _check(op, "x", x, steps, sizes, (torch.int64,))
    else:
        _check(op, "x", x, f"{steps}, I", (*sizes, None))
    batch = x.shape[1] if batch_sizes is None else _packed_batch(op, x, batch_sizes)
    if batch is None and h0 is None:
        raise ArgumentError(f"{op}: h0 must be given with batch_sizes of no steps, got None")
    like = ("x", x)
    same = (tables[0].dtype,) if tables else (x.dtype,)
    hidden = None
    for row in range(rows):
        names = [f"weights[{row * each + i}]" for i in range(each)]
        w_ih, w_hh, *biases = weights[row * each : (row + 1) * each]
        if tables and row < directions:
            _check(op, names[1], w_hh, f"{gates} H, H", (None, hidden), DTYPES, like)
            hidden = w_hh.shape[1]
        else:
            features = x.shape[-1] if row < directions or hidden is None else directions * hidden
            _check(op, names[0], w_ih, f"{gates} H, I", (None, features), same, like)
            if w_ih.shape[0] % gates or hidden not in (None, w_ih.shape[0] // gates):
                raise ArgumentError(f"{op}: {names[0]} must have {gates} H rows in every layer, got {list(w_ih.shape)}")
            hidden = w_ih.shape[0] // gates
        _check(op, names[1], w_hh, f"{gates} H, H", (gates * hidden, hidden), same, like)
        for name, b in zip(names[2:], biases, strict=True):
            _check(op, name, b, f"{gates} H", (gates * hidden,), same, like)
    for name, state in (("h0", h0), ("c0", c0)):
        if state is not None:
            _check(op, name, state, "L, B, H", (rows, batch, hidden), same, like)
    if tables:
        _tables(op, x, tables, directions, gates, gates * weights[1].shape[1])


def _tables(op: str, ids: Tensor, tables: list[Tensor], directions: int, gates: int, width: int) -> None:
    """Raise if tables of so many directions do not fit, or ids are not of their rows."""
    if len(tables) != directions:
        raise ArgumentError(f"{op}: tables must be {directions}, one for each direction, got {len(tables)}")
    _check(op, "tables[0]", tables[0], f"V, {gates} H", (None, width), DTYPES, ("x", ids))
    V = len(tables[0])
    for d, table in enumerate(tables):
        _check(op, f"tables[{d}]", table, f"V, {gates} H", (V, width), (tables[0].dtype,), ("x", ids))
    if _has_values(ids) and ids.numel() > 0:
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= V:
            raise IndexError(f"{op}: ids must be from 0 to V - 1 = {V - 1}, got {least} to {most}")


def attention_step(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    table: Tensor | None,
    w_query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    key_lengths: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
) -> None:
    """Raise if the arguments of `ops.attention_step` do not fit together."""
    op = "attention_step"
    _check(op, "h0", h0, "L, N, H", (None, None, None), LINEAR_DTYPES)
    N, H = h0.shape[1:]
    same, like = (h0.dtype,), ("h0", h0)
    if table is None:
        _check(op, "x", x, "1, N, I", (1, N, None), same, like)
    else:
        _check(op, "x", x, "1, N", (1, N), (torch.int64,), like)
    stack(cell, x, h0, c0, weights, bias, False, [] if table is None else [table], None, op)
    _check(op, "keys", keys, "B, Tk, A", (None, None, None), same, like)
    B, Tk, A = keys.shape
    if (N if B == 0 else N % B) != 0:
        raise ArgumentError(f"{op}: keys must be of B sources, N = {N} a multiple of B, got {list(keys.shape)}")
    _check(op, "w_query", w_query, "A, H", (A, H), same, like)
    _check(op, "v", v, "A", (A,), same, like)
    _check(op, "values", values, "B, Tk, D", (B, Tk, None), same, like)
    D = values.shape[2]
    if key_lengths is not None:
        _check(op, "key_lengths", key_lengths, "B", (B,), (torch.int64,), like)
        _check_lengths(op, "key_lengths", key_lengths, "Tk", Tk)
    _check(op, "w_out", w_out, "D, H", (D, H), same, like)
    if b_out is not None:
        _check(op, "b_out", b_out, "D", (D,), same, like)


def pool(
    op: str,
    e: Tensor,
    u: Tensor | None,
    scores: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    state: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Raise if the arguments of `ops.attention_pool` or `ops.prefix_pool` do not fit together."""
    _check(op, "e", e, "B, T, D", (None, None, None))
    B, T, D = e.shape
    same, like = (e.dtype,), ("e", e)
    if (u is None) == (scores is None):
        got = "neither" if u is None else "both"
        raise ArgumentError(f"{op}: exactly one of u and scores must be given, got {got}")
    if u is not None:
        _check(op, "u", u, "D", (D,), same, like)
    if scores is not None:
        _check(op, "scores", scores, "B, T", (B, T), same, like)
    if lengths is not None:
        _check(op, "lengths", lengths, "B", (B,), (torch.int64,), like)
        _check_lengths(op, "lengths", lengths, "T", T)
    if mask is not None:
        _check(op, "mask", mask, "B, T", (B, T), (torch.bool,), like)
    if state is not None:
        L, c = state
        computed = (compute_dtype(e.dtype),)
        _check(op, "state L", L, "B", (B,), computed, like)
        _check(op, "state c", c, "B, D", (B, D), computed, like)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, op: str = "linear") -> None:
    """Raise if the arguments of `ops.linear` do not fit together."""
    _check(op, "weight", weight, "O, I", (None, None))
    same, like = (weight.dtype,), ("weight", weight)
    O, I = weight.shape  # noqa: E741
    leading: Sizes = (None,) * (x.dim() - 1) if isinstance(x, Tensor) else ()
    _check(op, "x", x, "*, I", (*leading, I), same, like)
    if bias is not None:
        _check(op, "bias", bias, "O", (O,), same, like)


def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise if the arguments of `ops.linear_argmax` do not fit together."""
    linear(x, weight, bias, "linear_argmax")
    if not 0 < len(weight) < 2**31:
        raise ArgumentError(f"linear_argmax: weight must have from 1 to 2^31 - 1 rows, got {list(weight.shape)}")


def additive_attention(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Raise if the arguments of `ops.additive_attention` do not fit together."""
    op = "additive_attention"
    _check(op, "query", query, "B, Tq, A", (None, None, None))
    B, Tq, A = query.shape
    same, like = (query.dtype,), ("query", query)
    _check(op, "keys", keys, "B, Tk, A", (B, None, A), same, like)
    Tk = keys.shape[1]
    _check(op, "v", v, "A", (A,), same, like)
    _check(op, "values", values, "B, Tk, Dv", (B, Tk, None), same, like)
    if key_lengths is not None:
        _check(op, "key_lengths", key_lengths, "B", (B,), (torch.int64,), like)
        _check_lengths(op, "key_lengths", key_lengths, "Tk", Tk)
    if mask is not None:
        letters, sizes = ("B, Tq, Tk", (B, Tq, Tk)) if mask.dim() == 3 else ("B, Tk", (B, Tk))
        _check(op, "mask", mask, letters, sizes, (torch.bool,), like)
