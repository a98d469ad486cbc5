"""Checks of what arguments mean, with messages a person understands.

`csrc/torch` checks what could corrupt memory, including values inside tensors (lengths, batch sizes): under
torch.compile those do not exist here yet.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

NONLINEARITIES = ("tanh", "relu", "sigmoid")
DTYPES = (torch.float32, torch.float64)


class ArgumentError(ValueError, RuntimeError):
    """Arguments that do not fit together: a ValueError; a RuntimeError too, as torch.nn raises here."""


class DtypeError(ArgumentError, TypeError):
    """A wrong dtype: a TypeError too."""


def fail_shape(op: str, name: str, letters: str, expected: tuple[int | str, ...], got: Tensor) -> NoReturn:
    """Raise for a shape; `letters` names the sizes, `expected` holds them, with "*" for any."""
    sizes = ", ".join(map(str, expected))
    raise ArgumentError(f"{op}: {name} must be [{letters}] = [{sizes}], got {list(got.shape)}")


def _fail_dtype(op: str, name: str, got: torch.dtype) -> NoReturn:
    raise DtypeError(f"{op}: {name} must be float32 or float64, got {got}".replace("torch.", ""))


def _check_tensor(op: str, name: str, got: object) -> None:
    if not isinstance(got, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(got).__name__}")


def _check_like(op: str, name: str, got: Tensor, other_name: str, other: Tensor) -> None:
    """`got` must have the dtype and the device of `other`."""
    if got.dtype is not other.dtype:
        raise DtypeError(
            f"{op}: {name} must be {other.dtype} like {other_name}, got {got.dtype}".replace("torch.", "")
        )
    if got.device != other.device:
        raise ArgumentError(f"{op}: {name} must be on {other.device} like {other_name}, got {got.device}")


def rnn(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    nonlinearity: str,
) -> None:
    """Raise if the arguments of `ops.rnn` do not fit together."""
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"rnn: nonlinearity must be one of {NONLINEARITIES}, got {nonlinearity!r}")
    _check_tensor("rnn", "x", x)
    if w_ih.dtype not in DTYPES:
        _fail_dtype("rnn", "w_ih", w_ih.dtype)
    shape = w_ih.shape
    if len(shape) != 2:
        fail_shape("rnn", "w_ih", "H, I", ("*", "*"), w_ih)
    H, I = shape  # noqa: E741
    if w_hh.shape != (H, H):
        fail_shape("rnn", "w_hh", "H, H", (H, H), w_hh)
    _check_like("rnn", "w_hh", w_hh, "w_ih", w_ih)
    if b_ih is not None:
        if b_ih.shape != (H,):
            fail_shape("rnn", "b_ih", "H", (H,), b_ih)
        _check_like("rnn", "b_ih", b_ih, "w_ih", w_ih)
    if b_hh is not None:
        if b_hh.shape != (H,):
            fail_shape("rnn", "b_hh", "H", (H,), b_hh)
        _check_like("rnn", "b_hh", b_hh, "w_ih", w_ih)

    shape = x.shape
    if batch_sizes is None:
        if len(shape) != 3 or shape[2] != I:
            fail_shape("rnn", "x", "T, B, I", ("*", "*", I), x)
        if h0 is not None and h0.shape != (shape[1], H):
            fail_shape("rnn", "h0", "B, H", (shape[1], H), h0)
    else:
        if len(shape) != 2 or shape[1] != I:
            fail_shape("rnn", "x", "N, I", ("*", I), x)
        if batch_sizes.dtype is not torch.int64 or not batch_sizes.is_cpu or batch_sizes.dim() != 1:
            raise ArgumentError(
                "rnn: batch_sizes must be int64 [T] on cpu, "
                f"got {batch_sizes.dtype} {list(batch_sizes.shape)} on {batch_sizes.device}"
            )
        if h0 is None:
            raise ArgumentError("rnn: h0 must be given with batch_sizes, got None")
        if h0.dim() != 2 or h0.shape[1] != H:
            fail_shape("rnn", "h0", "B, H", ("*", H), h0)
    _check_like("rnn", "x", x, "w_ih", w_ih)
    if h0 is not None:
        _check_like("rnn", "h0", h0, "w_ih", w_ih)


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
    _check_tensor(op, "e", e)
    if e.dtype not in DTYPES:
        _fail_dtype(op, "e", e.dtype)
    shape = e.shape
    if len(shape) != 3:
        fail_shape(op, "e", "B, T, D", ("*", "*", "*"), e)
    B, T, D = shape

    if u is not None:
        if scores is not None:
            raise ArgumentError(f"{op}: exactly one of u and scores must be given, got both")
        if u.shape != (D,):
            fail_shape(op, "u", "D", (D,), u)
        _check_like(op, "u", u, "e", e)
    elif scores is not None:
        if scores.shape != (B, T):
            fail_shape(op, "scores", "B, T", (B, T), scores)
        _check_like(op, "scores", scores, "e", e)
    else:
        raise ArgumentError(f"{op}: exactly one of u and scores must be given, got neither")

    if lengths is not None:
        _check_tensor(op, "lengths", lengths)
        if lengths.shape != (B,):
            fail_shape(op, "lengths", "B", (B,), lengths)
        if lengths.dtype is not torch.int64:
            raise DtypeError(f"{op}: lengths must be int64, got {lengths.dtype}".replace("torch.", ""))
        if lengths.device != e.device:
            raise ArgumentError(f"{op}: lengths must be on {e.device} like e, got {lengths.device}")
    if mask is not None:
        _check_tensor(op, "mask", mask)
        if mask.shape != (B, T):
            fail_shape(op, "mask", "B, T", (B, T), mask)
        if mask.dtype is not torch.bool:
            raise DtypeError(f"{op}: mask must be bool, got {mask.dtype}".replace("torch.", ""))
        if mask.device != e.device:
            raise ArgumentError(f"{op}: mask must be on {e.device} like e, got {mask.device}")
    if state is not None:
        L, c = state
        if L.shape != (B,):
            fail_shape(op, "state L", "B", (B,), L)
        if c.shape != (B, D):
            fail_shape(op, "state c", "B, D", (B, D), c)
        _check_like(op, "state L", L, "e", e)
        _check_like(op, "state c", c, "e", e)
