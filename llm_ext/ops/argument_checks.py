"""Argument checks with messages for people: each names the op, the argument, what was expected and what came.

The C++ ops refuse whatever they cannot run, and these functions explain why. Values inside tensors (lengths, batch
sizes, ids) are read only where they exist, which excludes torch.compile.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from llm_ext.ops._transforms import is_mapped, is_recorded, unwrapped
from llm_ext.reference.recurrence import unpack_weights

# torch.jit.trace warns that it does not record what the checks compare, and that the order of gates is a constant.
_TracerWarning: Any = torch.jit.TracerWarning  # type: ignore[attr-defined]
warnings.filterwarnings("ignore", category=_TracerWarning, module=r"llm_ext\.ops\.(argument_checks|_onnx)$")

# Modes of a recurrence, as torch.nn.RNNBase.mode spells them; those of an Elman cell by nonlinearity. RNN_SIGMOID is an
# extension.
ELMAN_MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "sigmoid": "RNN_SIGMOID"}
MODES = (*ELMAN_MODES.values(), "GRU", "LSTM")
# The nonlinearity of each mode of an Elman cell.
NONLINEARITIES = {mode: nonlinearity for nonlinearity, mode in ELMAN_MODES.items()}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The native GEMM covers these on a CPU; elsewhere torch has products that are at least as fast.
NATIVE_GEMM_DTYPES = (torch.float32, torch.float64)

# Sizes of a tensor; None matches any size.
Sizes = tuple[int | None, ...]


class ArgumentError(ValueError, RuntimeError):
    """Raised when arguments do not fit together. It is also a RuntimeError, which torch.nn raises in these cases."""


class DtypeError(ArgumentError, TypeError):
    """Raised for a wrong dtype. It is also a TypeError."""


def gates_of(mode: str) -> int:
    """Return the number of gates of a mode: the blocks of H rows in its weights."""
    return {"GRU": 3, "LSTM": 4}.get(mode, 1)


def op_of(mode: str) -> str:
    """Return the name of the op of a mode: rnn, gru or lstm."""
    return mode.partition("_")[0].lower()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that tensors of `dtype` are computed in, and that accumulated state has."""
    return torch.promote_types(dtype, torch.float32)


def fail_shape(op: str, name: str, letters: str, sizes: Sizes, got: Tensor) -> NoReturn:
    """Raise for a tensor whose shape is not `sizes`; `letters` names the sizes."""
    expected = ", ".join("*" if size is None else str(size) for size in sizes)
    raise ArgumentError(f"{op}: {name} must be [{letters}] = [{expected}], got {list(got.shape)}")


def _check_is_tensor(op: str, name: str, got: Any) -> None:
    """Raise unless `got` is a tensor."""
    if not isinstance(got, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(got).__name__}")


def _check(
    op: str,
    name: str,
    got: Tensor,
    letters: str,
    sizes: Sizes,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """Raise unless `got` is a tensor of these sizes, of one of these dtypes, on the device of `like`."""
    _check_is_tensor(op, name, got)
    if got.dim() != len(sizes) or any(n is not None and n != m for n, m in zip(sizes, got.shape, strict=True)):
        fail_shape(op, name, letters, sizes, got)
    if got.dtype not in dtypes:
        *others, last = map(str, dtypes)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise DtypeError(f"{op}: {name} must be {expected}, got {got.dtype}".replace("torch.", ""))
    if like is not None and got.device != like[1].device:
        raise ArgumentError(f"{op}: {name} must be on {like[1].device} like {like[0]}, got {got.device}")


def has_values(tensor: Tensor) -> bool:
    """Return whether Python can read the values of a tensor: it is on the CPU, not recorded and not mapped."""
    return tensor.is_cpu and not is_recorded(tensor) and not is_mapped(tensor)


def _numbers(tensor: Tensor) -> list[int]:
    """Return the numbers of a tensor [n]: one if it has been expanded, whatever n is."""
    values = unwrapped(tensor)
    return cast(list[int], (values[:1] if values.stride() == (0,) else values).tolist())


def lengths_of(op: str, name: str, lengths: Tensor, B: int, letter: str, T: int, like: tuple[str, Tensor]) -> None:
    """Raise unless there is one length from 0 to T for each of B rows; `letter` names T."""
    _check(op, name, lengths, "B", (B,), (torch.int64,), like)
    if has_values(lengths) and any(not 0 <= length <= T for length in _numbers(lengths)):
        raise ArgumentError(f"{op}: {name} must be from 0 to {letter} = {T}, got {_numbers(lengths)}")


def batch_lengths(op: str, x: Tensor, lengths: Tensor) -> None:
    """Raise unless `lengths` has one length from 0 to T for each batch row of x [T, B, *]."""
    lengths_of(op, "lengths", lengths, x.shape[1], "T", x.shape[0], ("x", x))


# ---- recurrent networks


def nonlinearity(op: str, name: str) -> None:
    """Raise unless `name` is a nonlinearity of an Elman RNN."""
    if name not in ELMAN_MODES:
        raise ValueError(f"{op}: nonlinearity must be one of {', '.join(ELMAN_MODES)}, got {name!r}")


def _packed_batch(op: str, x: Tensor, batch_sizes: Tensor) -> int | None:
    """Return the rows of the first step of packed rows x, None if unknown; raise if batch_sizes does not describe x."""
    _check(op, "batch_sizes", batch_sizes, "T", (None,), (torch.int64,))
    if not batch_sizes.is_cpu:
        raise ArgumentError(f"{op}: batch_sizes must be on cpu, got {batch_sizes.device}")
    if is_mapped(batch_sizes):
        raise ArgumentError(f"{op}: batch_sizes must be the same for all samples, got one that vmap maps")
    if not has_values(batch_sizes):
        return None
    sizes = _numbers(batch_sizes)
    if min(sizes, default=1) < 1 or sizes != sorted(sizes, reverse=True):
        raise ArgumentError(f"{op}: batch_sizes must be positive and never rise, got {sizes}")
    rows = sum(sizes) if len(sizes) == len(batch_sizes) else sizes[0] * len(batch_sizes)
    if rows != len(x):
        raise ArgumentError(f"{op}: batch_sizes must sum to the rows of x, {len(x)}, got {rows}")
    return sizes[0] if sizes else None


def _sequence(
    op: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    features: tuple[tuple[str, int], ...],
    dtype: torch.dtype,
    like: tuple[str, Tensor],
) -> int | None:
    """Return the batch size of x [T, B, *], or [N, *] with batch_sizes, None if unknown; raise if x does not fit.

    `features` are the letters and sizes of the dimensions of a step.
    """
    letters = "".join(f", {letter}" for letter, _ in features)
    sizes = tuple(size for _, size in features)
    if batch_sizes is None:
        _check(op, "x", x, f"T, B{letters}", (None, None, *sizes), (dtype,), like)
        if lengths is not None:
            batch_lengths(op, x, lengths)
        return x.shape[1]
    if lengths is not None:
        raise ArgumentError(f"{op}: lengths belong to a padded x [T, B{letters}], got batch_sizes too")
    _check(op, "x", x, f"N{letters}", (None, *sizes), (dtype,), like)
    return _packed_batch(op, x, batch_sizes)


def _direction_weights(
    op: str,
    mode: str,
    names: Sequence[str],
    weights: Sequence[Tensor | None],
    same: tuple[torch.dtype, ...] = DTYPES,
    like: tuple[str, Tensor] | None = None,
) -> tuple[int, int, int]:
    """Return I, H and P of one direction with weights (w_ih, w_hh, b_ih, b_hh, w_hr); raise if they do not fit."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    for name, weight in zip(names, (w_ih, w_hh), strict=False):
        _check_is_tensor(op, name, weight)
    assert w_ih is not None
    assert w_hh is not None
    gates = gates_of(mode)
    G = "" if gates == 1 else f"{gates} "
    _check(op, names[0], w_ih, f"{G}H, I", (None, None), same, like)
    rows, I = w_ih.shape  # noqa: E741
    if rows % gates:
        raise ArgumentError(f"{op}: {names[0]} must be [{G}H, I], got {list(w_ih.shape)}")
    H = P = rows // gates
    same, like = (w_ih.dtype,), like or (names[0], w_ih)
    if w_hr is not None:
        _check(op, names[4], w_hr, "P, H", (None, H), same, like)
        P = w_hr.shape[0]
        if P >= H:
            raise ArgumentError(f"{op}: {names[4]} must be [P, H] with P < H, got {list(w_hr.shape)}")
    _check(op, names[1], w_hh, f"{G}H, H" if w_hr is None else f"{G}H, P", (rows, P), same, like)
    for name, bias in ((names[2], b_ih), (names[3], b_hh)):
        if bias is not None:
            _check(op, name, bias, f"{G}H", (rows,), same, like)
    return I, H, P


WEIGHT_NAMES = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


def recurrence(
    op: str,
    mode: str,
    x: Tensor,
    state: tuple[Tensor | None, ...],
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None = None,
    reset_to: tuple[Tensor, ...] | None = None,
    reverse: bool = False,
) -> None:
    """Raise unless the arguments of one direction of one layer fit together.

    `weights` are (w_ih, w_hh, b_ih, b_hh, w_hr); `state` is (h0,), or (h0, c0) of an LSTM.
    """
    names = ("h0", "c0") if mode == "LSTM" else ("h0",)
    if len(state) != len(names):
        raise ArgumentError(f"{op}: state must be ({', '.join(names)}), got {len(state)} tensors")
    if mode == "LSTM" and (state[0] is None) != (state[1] is None):
        raise ArgumentError(f"{op}: h0 and c0 must be given together")
    I, H, P = _direction_weights(op, mode, WEIGHT_NAMES, weights)  # noqa: E741
    w_ih = weights[0]
    assert w_ih is not None
    like = ("w_ih", w_ih)
    if batch_sizes is not None and state[0] is None:
        raise ArgumentError(f"{op}: h0 must be given with batch_sizes, got None")
    batch = _sequence(op, x, batch_sizes, lengths, (("I", I),), w_ih.dtype, like)
    for name, tensor, letter, width in zip(names, state, ("H" if P == H else "P", "H"), (P, H), strict=False):
        if isinstance(tensor, Tensor) and tensor.dim() == 3:  # the state of one layer in the layout of torch.nn
            _check(op, name, tensor, f"1, B, {letter}", (1, batch, width), (w_ih.dtype,), like)
        elif tensor is not None:
            _check(op, name, tensor, f"B, {letter}", (batch, width), (w_ih.dtype,), like)
    shapes = [list(tensor.shape) for tensor in state if tensor is not None]
    if len(shapes) == 2 and len(shapes[0]) != len(shapes[1]):
        raise ArgumentError(f"{op}: c0 must have as many dimensions as h0, got {shapes[1]} and {shapes[0]}")
    if reset is not None or reset_to is not None:
        if reverse:
            raise ArgumentError(f"{op}: reset needs one forward direction, got reverse=True")
        layered = reset_to and all(isinstance(tensor, Tensor) and tensor.dim() == 3 for tensor in reset_to)
        leading: Sizes = (1, batch) if layered else (batch,)
        letters = ("1", "B") if layered else ("B",)
        steps = _steps_of(x, batch_sizes)
        resets(op, mode, reset, reset_to, *steps, leading, letters, (P, H), (w_ih.dtype,), ("x", x))


def multilayer_rnn(
    op: str,
    mode: str,
    x: Tensor,
    state: tuple[Tensor, ...] | None,
    weights: Sequence[Sequence[Tensor]],
    directions: int,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    input_projections: Sequence[Tensor] | None = None,
    reset: Tensor | None = None,
    reset_to: tuple[Tensor, ...] | None = None,
) -> None:
    """Raise unless the arguments of `ops.multilayer_rnn` fit together."""
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be one of {', '.join(MODES)}, got {mode!r}")
    rows, counts = len(weights), (2, 3, 4, 5) if mode == "LSTM" else (2, 4)
    if rows == 0 or rows % directions:
        per = "layer and direction" if directions == 2 else "layer"
        raise ArgumentError(f"{op}: weights must have one sequence of tensors per {per}, got {rows}")
    if any(len(row) not in counts or len(row) != len(weights[0]) for row in weights):
        names = "w_ih, w_hh[, b_ih, b_hh]" + ("[, w_hr]" if mode == "LSTM" else "")
        got = [len(row) for row in weights]
        raise ArgumentError(f"{op}: weights must have ({names}) per layer and direction, got {got} tensors")
    _check_is_tensor(op, "x", x)
    first = input_projections[0] if input_projections else weights[0][0]
    _check(op, "input_projections[0]" if input_projections else "weights[0][0]", first, "*, *", (None, None))
    same, like = (first.dtype,), ("x", x)
    gates, sizes = gates_of(mode), (0, 0)
    for row, tensors in enumerate(weights):
        labels = [f"weights[{row}][{i}]" for i in range(len(tensors))]
        if input_projections and row < directions:  # w_ih and b_ih are not read
            _check_is_tensor(op, labels[1], tensors[1])
            H = tensors[1].shape[1] if tensors[1].dim() == 2 else 0
            _check(op, labels[1], tensors[1], f"{gates} H, H", (gates * H, H), same, like)
            found = (0, H, H)
        else:
            named = [label or "" for label in unpack_weights(labels)]
            found = _direction_weights(op, mode, named, unpack_weights(tensors), same, like)
        expected = directions * sizes[1] if row >= directions else None
        if (expected is not None and found[0] != expected) or (row > 0 and found[1:] != sizes):
            expected_sizes = f"[{gates} H, I] = [{gates * sizes[0]}, {'*' if expected is None else expected}]"
            raise ArgumentError(f"{op}: {labels[0]} must be {expected_sizes}, got {list(tensors[0].shape)}")
        sizes = found[1:]
    H, P = sizes
    if input_projections:
        batch = _sequence(op, x, batch_sizes, lengths, (), torch.int64, ("weights[0][1]", weights[0][1]))
        _input_projections(op, x, input_projections, directions, gates, gates * H)
    else:
        features = (("I", weights[0][0].shape[1]),)
        batch = _sequence(op, x, batch_sizes, lengths, features, first.dtype, ("weights[0][0]", first))
    if state is not None:
        layer_states(op, mode, state, (rows, batch), ("L", "B"), (P, H), ("h0", "c0"), same, like)
    elif batch is None and batch_sizes is not None and has_values(batch_sizes):
        raise ArgumentError(f"{op}: h0 must be given with batch_sizes of no steps, got None")
    if reset is not None or reset_to is not None:
        if directions == 2:
            raise ArgumentError(f"{op}: reset needs one forward direction, got bidirectional=True")
        steps = _steps_of(x, batch_sizes)
        resets(op, mode, reset, reset_to, *steps, (rows, batch), ("L", "B"), (P, H), same, like)


def _steps_of(x: Tensor, batch_sizes: Tensor | None) -> tuple[str, Sizes]:
    """Return the letters and the sizes of a tensor with one element for each step of each row of x."""
    return ("T, B", tuple(x.shape[:2])) if batch_sizes is None else ("N", (x.shape[0],))


def resets(
    op: str,
    mode: str,
    reset: Tensor | None,
    reset_to: tuple[Tensor, ...] | None,
    letters: str,
    sizes: Sizes,
    leading: Sizes,
    leading_letters: tuple[str, ...],
    features: tuple[int, int],
    dtypes: tuple[torch.dtype, ...],
    like: tuple[str, Tensor],
) -> None:
    """Raise unless reset has these sizes, and reset_to is as `layer_states` has it, or has 1 in place of B."""
    if reset is None:
        raise ArgumentError(f"{op}: reset_to belongs to reset, got reset=None")
    _check(op, "reset", reset, letters, sizes, (torch.bool,), like)
    if reset_to is None:
        return
    if leading_letters and leading_letters[-1] == "B" and all(_has_one_row(tensor) for tensor in reset_to):
        leading = (*leading[:-1], 1)
    names = ("reset_to[0]", "reset_to[1]") if mode == "LSTM" else ("reset_to",)
    layer_states(op, mode, reset_to, leading, leading_letters, features, names, dtypes, like)


def _has_one_row(state: Tensor) -> bool:
    """Return whether a state is [*, 1, features]."""
    return isinstance(state, Tensor) and state.dim() > 1 and state.shape[-2] == 1


def layer_states(
    op: str,
    mode: str,
    state: tuple[Tensor, ...],
    leading: Sizes,
    letters: tuple[str, ...],
    features: tuple[int, int],
    names: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """Raise unless the state is (h,), or (h, c) of an LSTM, each [*leading, features]; `letters` name `leading`."""
    count = 2 if mode == "LSTM" else 1
    if len(state) != count:
        raise ArgumentError(f"{op}: state must be ({', '.join(names[:count])}), got {len(state)} tensors")
    hidden = ("H" if features[0] == features[1] else "P", "H")
    for name, tensor, letter, width in zip(names, state, hidden, features, strict=False):
        _check(op, name, tensor, ", ".join((*letters, letter)), (*leading, width), dtypes, like)


def _input_projections(
    op: str, ids: Tensor, projections: Sequence[Tensor], directions: int, gates: int, width: int
) -> None:
    """Raise unless there is one [V, width] for each direction, and all ids are from 0 to V - 1."""
    if len(projections) != directions:
        raise ArgumentError(f"{op}: input_projections must be {directions}, one per direction, got {len(projections)}")
    V = len(projections[0])
    for d, each in enumerate(projections):
        _check(op, f"input_projections[{d}]", each, f"V, {gates} H", (V, width), (projections[0].dtype,), ("x", ids))
    if has_values(ids) and ids.numel() > 0:
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= V:
            raise IndexError(f"{op}: ids must be from 0 to V - 1 = {V - 1}, got {least} to {most}")


def attention_step(
    mode: str,
    x: Tensor,
    state: tuple[Tensor, ...],
    weights: Sequence[Sequence[Tensor]],
    w_query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    input_projections: Tensor | None,
    key_lengths: Tensor | None,
) -> None:
    """Raise unless the arguments of `ops.attention_step` fit together."""
    op = "attention_step"
    _check(op, "h0", state[0], "L, N, H", (None, None, None), NATIVE_GEMM_DTYPES)
    h0 = state[0]
    N, H = h0.shape[1:]
    same, like = (h0.dtype,), ("h0", h0)
    if input_projections is None:
        _check(op, "x", x, "1, N, I", (1, N, None), same, like)
    else:
        _check(op, "x", x, "1, N", (1, N), (torch.int64,), like)
    projections = None if input_projections is None else [input_projections]
    multilayer_rnn(op, mode, x, state, weights, 1, None, None, projections)
    _check(op, "keys", keys, "B, Tk, A", (None, None, None), same, like)
    B, Tk, A = keys.shape
    if (N if B == 0 else N % B) != 0:
        raise ArgumentError(f"{op}: keys must be of B sources, N = {N} a multiple of B, got {list(keys.shape)}")
    _check(op, "w_query", w_query, "A, H", (A, H), same, like)
    _check(op, "v", v, "A", (A,), same, like)
    _check(op, "values", values, "B, Tk, D", (B, Tk, None), same, like)
    D = values.shape[2]
    if key_lengths is not None:
        lengths_of(op, "key_lengths", key_lengths, B, "Tk", Tk, like)
    _check(op, "w_out", w_out, "D, H", (D, H), same, like)
    if b_out is not None:
        _check(op, "b_out", b_out, "D", (D,), same, like)


# ---- linear layers


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, op: str = "linear") -> None:
    """Raise unless the arguments of `ops.linear` fit together."""
    _check(op, "weight", weight, "O, I", (None, None))
    same, like = (weight.dtype,), ("weight", weight)
    O, I = weight.shape  # noqa: E741
    leading: Sizes = (None,) * (x.dim() - 1) if isinstance(x, Tensor) else ()
    _check(op, "x", x, "*, I", (*leading, I), same, like)
    if bias is not None:
        _check(op, "bias", bias, "O", (O,), same, like)


def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless the arguments of `ops.linear_argmax` fit together."""
    linear(x, weight, bias, "linear_argmax")
    if not 0 < len(weight) < 2**31:
        raise ArgumentError(f"linear_argmax: weight must have from 1 to 2^31 - 1 rows, got {list(weight.shape)}")


# ---- attention


def pool(
    op: str,
    e: Tensor,
    u: Tensor | None,
    scores: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    state: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Raise unless the arguments of `ops.attention_pool` or `ops.prefix_pool` fit together."""
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
        lengths_of(op, "lengths", lengths, B, "T", T, like)
    if mask is not None:
        _check(op, "mask", mask, "B, T", (B, T), (torch.bool,), like)
    if state is not None:
        L, c = state
        computed = (compute_dtype(e.dtype),)
        _check(op, "state L", L, "B, 2", (B, 2), computed, like)
        _check(op, "state c", c, "B, D", (B, D), computed, like)


def additive_attention(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Raise unless the arguments of `ops.additive_attention` fit together."""
    op = "additive_attention"
    _check(op, "query", query, "B, Tq, A", (None, None, None))
    B, Tq, A = query.shape
    same, like = (query.dtype,), ("query", query)
    _check(op, "keys", keys, "B, Tk, A", (B, None, A), same, like)
    Tk = keys.shape[1]
    _check(op, "v", v, "A", (A,), same, like)
    _check(op, "values", values, "B, Tk, Dv", (B, Tk, None), same, like)
    if key_lengths is not None:
        lengths_of(op, "key_lengths", key_lengths, B, "Tk", Tk, like)
    if mask is not None:
        _check_is_tensor(op, "mask", mask)
        letters, sizes = ("B, Tq, Tk", (B, Tq, Tk)) if mask.dim() == 3 else ("B, Tk", (B, Tk))
        _check(op, "mask", mask, letters, sizes, (torch.bool,), like)
