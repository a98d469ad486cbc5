"""One direction of one layer with rules for every transform of torch: derivatives of any order and mode, and vmap.

Around a solution of the recurrence, its tangents p = (a, h, c) solve a linear system, ``residual(theta, p, p0) = v``
with p0 the tangents of the initial state. `Tangent` solves this system, forwards in time, and `Adjoint` the transposed
one, backwards in time. The derivatives of `Recurrence` are one of them and batched products; their own derivatives
follow from the residual, which has no loop over time. docs/math/derivatives.md has the formulas.

Everything here works on rows [N, *]: the steps of all batch rows, as in a PackedSequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm_ext.ops._registration import needed, refuse_derivative, register_fake, torch_ops, without_autocast
from llm_ext.ops._transforms import (
    forward_mode_is_nested,
    forward_mode_once,
    make_dual,
    transforms_active,
    unpack_duals,
    unwrapped,
    without_transforms,
)
from llm_ext.ops.argument_checks import NATIVE_GEMM_DTYPES, NONLINEARITIES, compute_dtype, gates_of

# A vector of the linear system: pre-activations a [N, blocks H], states h [N, P], and cell states c [N, H] of an LSTM.
System = tuple[Tensor, ...]
# The same for the initial state: (h0 [B, P],), or (h0, c0 [B, H]) of an LSTM.
State = tuple[Tensor, ...]
# One of these as an argument: None means zeros.
Vector = Sequence[Tensor | None]


class Rows:
    """The steps of a sequence of T steps and B batch rows, whose rows are adjacent in memory.

    Attributes:
        batch_sizes: rows of each step of a packed sequence, int64 [T]; None if each step has B rows.
        reverse: whether the steps run from the last to the first.
    """

    def __init__(self, T: int, B: int, batch_sizes: Tensor | None, reverse: bool) -> None:
        self.T = T
        self.B = B
        self.batch_sizes = None if batch_sizes is None else unwrapped(batch_sizes)
        self.reverse = reverse

    def repeated(self, times: int) -> Rows:
        """Return the rows of a batch in which each row is `times` adjacent rows."""
        with without_transforms():
            batch_sizes = None if self.batch_sizes is None else self.batch_sizes * times
        return Rows(self.T, self.B * times, batch_sizes, self.reverse)

    def sizes(self) -> list[int]:
        """Return the number of rows of each step."""
        return [self.B] * self.T if self.batch_sizes is None else self.batch_sizes.tolist()

    def batch_sizes_tensor(self) -> Tensor:
        """Return the number of rows of each step as a tensor."""
        with without_transforms():
            return torch.full((self.T,), self.B, device="cpu") if self.batch_sizes is None else self.batch_sizes

    def previous(self, first: Tensor, rows: Tensor) -> Tensor:
        """Return for each row the row of the step that runs before it; `first` [B, *] before the first step."""
        if self.T == 0:
            return rows
        if self.batch_sizes is None:
            return torch.cat((rows[self.B :], first) if self.reverse else (first, rows[: -self.B]))
        return torch.cat((first, rows)).index_select(0, self._previous_index(len(rows)).to(rows.device))

    def _previous_index(self, N: int) -> Tensor:
        """Return for each of N packed rows the index of the row before it among the first and all rows."""
        assert self.batch_sizes is not None
        with without_transforms():
            sizes = self.batch_sizes
            starts = sizes.cumsum(0) - sizes
            step = torch.arange(self.T, device="cpu").repeat_interleave(sizes, output_size=N)
            column = torch.arange(N, device="cpu") - starts[step]
            if self.reverse:
                following = torch.cat((sizes[1:], sizes.new_zeros(1)))[step]
                return torch.where(column < following, starts[step] + sizes[step] + column + self.B, column)
            return torch.where(step > 0, starts[step - 1] + column + self.B, column)

    def last(self, first: Tensor, rows: Tensor) -> Tensor:
        """Return the row of the last step of each batch row, [B, *]; `first` if there is no step."""
        if self.T == 0:
            return first
        if self.reverse:
            return rows[: self.B]
        if self.batch_sizes is None:
            return rows[-self.B :]
        return rows.index_select(0, self._last_index().to(rows.device))

    def at_last(self, last: Tensor, N: int) -> Tensor:
        """Return N rows with `last` [B, *] at the last step of each batch row, and zeros elsewhere."""
        if self.reverse:
            return F.pad(last, (0, 0, 0, N - self.B))
        if self.batch_sizes is None:
            return F.pad(last, (0, 0, N - self.B, 0))
        return torch.zeros_like(last[:1]).expand(N, -1).index_copy(0, self._last_index().to(last.device), last)

    def _last_index(self) -> Tensor:
        """Return the index of the last row of each batch row of a packed sequence that is not reversed."""
        assert self.batch_sizes is not None
        with without_transforms():
            sizes, column = self.batch_sizes, torch.arange(self.B, device="cpu")
            steps = (sizes.unsqueeze(1) > column).sum(0)
            return (sizes.cumsum(0) - sizes)[steps - 1] + column


class Theta(NamedTuple):
    """The quantities that the linear system depends on.

    Attributes:
        w_hh: recurrent weights [G H, P].
        w_hr: projection [P, H], or None.
        saved: saved activations [N, *]: n r z m of a GRU, i f g o c (and m) of an LSTM, None for Elman.
        y: states [N, P].
        h0: initial state [B, P].
        c0: initial cell state [B, H] of an LSTM.
    """

    w_hh: Tensor
    w_hr: Tensor | None
    saved: Tensor | None
    y: Tensor
    h0: Tensor
    c0: Tensor | None


# ---- the linear system, without a loop over time


def _split(tensor: Tensor, sizes: int | list[int], dim: int = 0) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = tensor.split(sizes, dim)  # type: ignore[no-untyped-call]
    return parts


def _vjp(function: Callable[..., System], *inputs: Tensor) -> Callable[[System], System]:
    """Return the map from gradients of the results to gradients of the inputs."""
    _, pull = torch.func.vjp(function, *inputs)  # type: ignore[misc]
    return pull


class _Cell(NamedTuple):
    """The saved activations of some rows by name, and the states before them."""

    saved: tuple[Tensor, ...]
    h: Tensor
    h_before: Tensor
    c_before: Tensor | None


def _cell(mode: str, theta: Theta, h_before: Tensor, c_before: Tensor | None) -> _Cell:
    saved = () if theta.saved is None else _split(theta.saved, _hidden(mode, theta), -1)
    return _Cell(saved, theta.y, h_before, c_before)


def _hidden(mode: str, theta: Theta) -> int:
    return theta.w_hh.shape[0] // gates_of(mode)


def _blocks(mode: str) -> int:
    """Return the blocks of H numbers in a row of a."""
    return 4 if mode in ("GRU", "LSTM") else 1


def _slope(mode: str, h: Tensor) -> Tensor:
    """Return the derivative of an Elman nonlinearity from its output."""
    if mode == "RNN_TANH":
        return 1 - h * h
    return (h > 0).to(h.dtype) if mode == "RNN_RELU" else h * (1 - h)


def _gru_tangent(cell: _Cell, a: Sequence[Tensor], h: Tensor) -> Tensor:
    """Return the tangent of the state, given those of the pre-activations and of the state before."""
    n, r, z, m = cell.saved
    a_n, a_r, a_z, a_m = a
    new = (1 - n * n) * (a_n + a_r * (r * (1 - r) * m) + a_m * r)
    return (1 - z) * new + z * h + a_z * (z * (1 - z) * (cell.h_before - n))


def _lstm_cell_tangent(cell: _Cell, a: Sequence[Tensor], c: Tensor) -> Tensor:
    """Return the tangent of the cell state, given those of the pre-activations and of the cell state before."""
    i, f, g, _o = cell.saved[:4]
    assert cell.c_before is not None
    return f * c + a[0] * (i * (1 - i) * g) + a[1] * (f * (1 - f) * cell.c_before) + a[2] * (i * (1 - g * g))


def _lstm_output_tangent(cell: _Cell, a: Sequence[Tensor], c: Tensor) -> Tensor:
    """Return the tangent of the output before the projection, given that of the cell state."""
    o, tanh_c = cell.saved[3], torch.tanh(cell.saved[4])
    return c * (o * (1 - tanh_c * tanh_c)) + a[3] * (o * (1 - o) * tanh_c)


def residual_of_cells(mode: str, rows: Rows, theta: Theta, p: System, p0: State) -> System:
    """Return the residual without its product W_hh h_{t-1}, the only term that depends on W_hh."""
    a, h = p[:2]
    blocks = _split(a, _hidden(mode, theta), -1)
    if mode == "LSTM":
        assert theta.c0 is not None
        assert theta.saved is not None
        c = p[2]
        c_values = _split(theta.saved, _hidden(mode, theta), -1)[4]
        cell = _cell(mode, theta, theta.y, rows.previous(theta.c0, c_values))
        m = _lstm_output_tangent(cell, blocks, c)
        r_c = c - _lstm_cell_tangent(cell, blocks, rows.previous(p0[1], c))
        return a, h - (m if theta.w_hr is None else m @ theta.w_hr.T), r_c
    if mode == "GRU":
        cell = _cell(mode, theta, rows.previous(theta.h0, theta.y), None)
        return a, h - _gru_tangent(cell, blocks, rows.previous(p0[0], h))
    return a, h - _slope(mode, theta.y) * a


def residual(mode: str, rows: Rows, theta: Theta, p: System, p0: State) -> System:
    """Return A(theta) p, with the initial tangents p0: zero where p are tangents of the recurrence."""
    a, *others = residual_of_cells(mode, rows, theta, p, p0)
    product = rows.previous(p0[0], p[1]) @ theta.w_hh.T
    return a - _from_state(mode, product), *others


# ---- its solution, a loop over time: a kernel on a CPU, torch's own ops elsewhere


def _uses_kernel(rows: Rows, theta: Theta) -> bool:
    return theta.y.is_cpu and theta.y.dtype in NATIVE_GEMM_DTYPES and rows.T * rows.B > 0


def _uses_last_kernel(rows: Rows, theta: Theta) -> bool:
    """Return whether a kernel may compute results that are not differentiated any further."""
    return _uses_kernel(rows, theta) and not torch.is_grad_enabled() and not transforms_active()


def _solve_tangent(mode: str, rows: Rows, theta: Theta, v: Vector, p0: Vector) -> System:
    """Solve residual(theta, p, p0) = v, forwards in time."""
    if _uses_kernel(rows, theta):
        v_a, v_h, v_c = (*v, None)[:3]
        h0, c0 = (*p0, None)[:2]
        p = torch_ops.recurrence_tangent(mode, *theta, v_a, v_h, v_c, h0, c0, rows.batch_sizes_tensor(), rows.reverse)
        return tuple(p) if mode == "LSTM" else tuple(p[:2])
    return _solve_tangent_by_loop(mode, rows, theta, v, p0)


def _solve_tangent_by_loop(mode: str, rows: Rows, theta: Theta, v: Vector, p0: Vector) -> System:
    filled = [*_filled(v, _zeros(mode, theta)), *_filled(p0, _zero_state(theta))]
    return _in_compute_dtype(theta, filled, lambda theta, filled: _loop_tangent(mode, rows, theta, filled))


def _solve_adjoint(mode: str, rows: Rows, theta: Theta, g: Vector) -> System:
    """Solve the transposed system for g, backwards in time; also return the gradients of the initial state."""
    if _uses_kernel(rows, theta):
        return _adjoint_kernel(mode, rows, theta, g, None)
    return _solve_adjoint_by_loop(mode, rows, theta, g)


def _adjoint_kernel(mode: str, rows: Rows, theta: Theta, g: Vector, grad_saved: Tensor | None) -> System:
    """Solve the transposed system for g and gradients of the saved activations."""
    g_a, g_h, g_c = (*g, None)[:3]
    a, h, c, dh0, dc0 = torch_ops.recurrence_adjoint(
        mode, *theta, g_a, g_h, g_c, grad_saved, rows.batch_sizes_tensor(), rows.reverse
    )
    return (a, h, c, dh0, dc0) if mode == "LSTM" else (a, h, dh0)


def _solve_adjoint_by_loop(mode: str, rows: Rows, theta: Theta, g: Vector) -> System:
    filled = _filled(g, _zeros(mode, theta))
    return _in_compute_dtype(theta, filled, lambda theta, filled: _loop_adjoint(mode, rows, theta, filled))


def _in_compute_dtype(
    theta: Theta, tensors: Sequence[Tensor], solve: Callable[[Theta, Sequence[Tensor]], System]
) -> System:
    """Run a solution of 16-bit tensors in float32."""
    dtype = theta.y.dtype
    compute = compute_dtype(dtype)
    with without_autocast(theta.y.device.type):
        wide = Theta(*(None if tensor is None else tensor.to(compute) for tensor in theta))  # type: ignore[arg-type]
        return tuple(result.to(dtype) for result in solve(wide, [tensor.to(compute) for tensor in tensors]))


def _filled(tensors: Vector, zeros: Sequence[Tensor]) -> list[Tensor]:
    return [zero if tensor is None else tensor for tensor, zero in zip(tensors, zeros, strict=True)]


def _zero_state(theta: Theta) -> list[Tensor]:
    """Return zero tangents of the initial state."""
    return [torch.zeros_like(tensor) for tensor in (theta.h0, theta.c0) if tensor is not None]


def _step_cells(mode: str, rows: Rows, theta: Theta) -> list[_Cell]:
    """Return the activations of each step."""
    sizes = rows.sizes()
    h_before = _split(rows.previous(theta.h0, theta.y), sizes)
    y = _split(theta.y, sizes)
    H = _hidden(mode, theta)
    saved: list[tuple[Tensor, ...]] = [()] * rows.T
    if theta.saved is not None:
        saved = [_split(step, H, -1) for step in _split(theta.saved, sizes)]
    cells = [_Cell(*step, None) for step in zip(saved, y, h_before, strict=True)]
    if mode == "LSTM":
        assert theta.c0 is not None
        assert theta.saved is not None
        c_before = _split(rows.previous(theta.c0, _split(theta.saved, H, -1)[4]), sizes)
        cells = [cell._replace(c_before=c) for cell, c in zip(cells, c_before, strict=True)]
    return cells


def _loop_tangent(mode: str, rows: Rows, theta: Theta, right_side: Sequence[Tensor]) -> System:
    """Solve the system in torch's own ops."""
    v, p0 = _split_system(mode, right_side)
    sizes, H = rows.sizes(), _hidden(mode, theta)
    cells = _step_cells(mode, rows, theta)
    parts = [_split(tensor, sizes) for tensor in v]
    results: list[list[Tensor]] = [[tensor[:0]] * rows.T for tensor in v]
    now = p0
    for t in reversed(range(rows.T)) if rows.reverse else range(rows.T):
        before = tuple(tensor[: sizes[t]] for tensor in now)
        a = parts[0][t] + _from_state(mode, before[0] @ theta.w_hh.T)
        blocks, cell = _split(a, H, -1), cells[t]
        new: State
        if mode == "LSTM":
            c = parts[2][t] + _lstm_cell_tangent(cell, blocks, before[1])
            h = _lstm_output_tangent(cell, blocks, c)
            new = (parts[1][t] + (h if theta.w_hr is None else h @ theta.w_hr.T), c)
        elif mode == "GRU":
            new = (parts[1][t] + _gru_tangent(cell, blocks, before[0]),)
        else:
            new = (parts[1][t] + _slope(mode, cell.h) * a,)
        for result, value in zip(results, (a, *new), strict=True):
            result[t] = value
        now = tuple(torch.cat((value, old[sizes[t] :])) for value, old in zip(new, now, strict=True))
    return tuple(torch.cat((tensor[:0], *result)) for tensor, result in zip(v, results, strict=True))


def _loop_adjoint(mode: str, rows: Rows, theta: Theta, g: Sequence[Tensor]) -> System:
    """Solve the transposed system in torch's own ops."""
    sizes = rows.sizes()
    cells = _step_cells(mode, rows, theta)
    parts = [_split(tensor, sizes) for tensor in g]
    results: list[list[Tensor]] = [[tensor[:0]] * rows.T for tensor in g]
    # Gradients of the states after a step, from the steps that run after it.
    after = [g[1].new_zeros(rows.B, theta.w_hh.shape[1])]
    if mode == "LSTM":
        after.append(g[1].new_zeros(rows.B, _hidden(mode, theta)))
    for t in range(rows.T) if rows.reverse else reversed(range(rows.T)):
        n = sizes[t]
        cell = cells[t]
        dh = parts[1][t] + after[0][:n]
        before: list[Tensor]
        if mode == "LSTM":
            i, f, g_gate, o, c = cell.saved[:5]
            assert cell.c_before is not None
            dm, tanh_c = dh if theta.w_hr is None else dh @ theta.w_hr, torch.tanh(c)
            dc = parts[2][t] + after[1][:n] + dm * (o * (1 - tanh_c * tanh_c))
            da = torch.cat(
                (
                    dc * (g_gate * i * (1 - i)),
                    dc * (cell.c_before * f * (1 - f)),
                    dc * (i * (1 - g_gate * g_gate)),
                    dm * (tanh_c * o * (1 - o)),
                ),
                -1,
            )
            before, values = [torch.zeros_like(dh), dc * f], [dh, dc]
        elif mode == "GRU":
            new, r, z, m = cell.saved
            dn = dh * (1 - z) * (1 - new * new)
            da = torch.cat((dn, dn * (m * r * (1 - r)), dh * (cell.h_before - new) * (z * (1 - z)), dn * r), -1)
            before, values = [dh * z], [dh]
        else:
            da = dh * _slope(mode, cell.h)
            before, values = [torch.zeros_like(dh)], [dh]
        da = da + parts[0][t]
        before[0] = before[0] + state_blocks(mode, da) @ theta.w_hh
        for result, value in zip(results, (da, *values), strict=True):
            result[t] = value
        after = [torch.cat((value, old[n:])) for value, old in zip(before, after, strict=True)]
    solution = [torch.cat((tensor[:0], *result)) for tensor, result in zip(g, results, strict=True)]
    return (*solution, *after)


# The blocks of a are those of the kernels: n r z m for a GRU, where W_ih, in the order r z n, multiplies n r z, and
# W_hh multiplies r z m.


def state_blocks(mode: str, a: Tensor) -> Tensor:
    """Return the blocks of a that W_hh multiplies, in its order of gates."""
    return a[..., a.shape[-1] // 4 :] if mode == "GRU" else a


def input_blocks(mode: str, a: Tensor) -> Tensor:
    """Return the blocks of a that W_ih multiplies, in the order of _in_blocks(W_ih)."""
    return a[..., : a.shape[-1] // 4 * 3] if mode == "GRU" else a


def _from_state(mode: str, product: Tensor) -> Tensor:
    """Return a, given its blocks that W_hh multiplies."""
    return F.pad(product, (product.shape[-1] // 3, 0)) if mode == "GRU" else product


def _from_input(mode: str, product: Tensor) -> Tensor:
    """Return a, given its blocks that W_ih multiplies."""
    return F.pad(product, (0, product.shape[-1] // 3)) if mode == "GRU" else product


def _in_blocks(mode: str, w: Tensor) -> Tensor:
    """Return W_ih or b_ih with the gates in the order of the blocks of a."""
    return w.roll(w.shape[0] // 3, 0) if mode == "GRU" else w


def in_gates(mode: str, w: Tensor) -> Tensor:
    """Return the inverse of _in_blocks."""
    return w.roll(-(w.shape[0] // 3), 0) if mode == "GRU" else w


def gate_gradients(mode: str, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by W_ih x and by W_hh h, in the order of the gates, given those by the pre-activations."""
    if mode == "GRU":
        return input_blocks(mode, a).roll(-(a.shape[-1] // 4), -1), state_blocks(mode, a)
    return a, a


# ---- vmap


def _vmap(
    function: type[torch.autograd.Function],
    size: int,
    in_dims: tuple[int | None, ...],
    args: tuple[Any, ...],
    weights: slice,
    *end: Any,
) -> tuple[tuple[Tensor, ...], Any]:
    """Map a function of (mode, rows, *tensors, *end) whose arguments `weights` are weights, the others rows or states.

    A mapped dimension becomes part of the batch; only mapped weights need a call each.
    """
    mode, rows, *tensors = args
    dims = list(in_dims[2:])
    if any(dim is not None for dim in dims[weights]):
        calls = [
            function.apply(  # type: ignore[no-untyped-call]
                mode, rows, *[t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)], *end
            )
            for i in range(size)
        ]
        return tuple(torch.stack(results) for results in zip(*calls, strict=True)), 0

    def fold(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None:
            return None
        mapped = tensor.unsqueeze(1).expand(-1, size, -1) if dim is None else tensor.movedim(dim, 1)
        return mapped.flatten(0, 1)

    kept = range(len(tensors))[weights]
    folded = [t if i in kept else fold(t, d) for i, (t, d) in enumerate(zip(tensors, dims, strict=True))]
    results = function.apply(mode, rows.repeated(size), *folded, *end)  # type: ignore[no-untyped-call]
    return tuple(result.unflatten(0, (-1, size)) for result in results), 1


# ---- Tangent and Adjoint


def solve_tangent(mode: str, rows: Rows, theta: Theta, *right_side: Tensor | None) -> System:
    """Return p with residual(theta, p, p0) = v; `right_side` is (*v, *p0), where None means zeros."""
    if forward_mode_is_nested():
        v, p0 = _split_system(mode, right_side)
        return _solve_tangent_by_loop(mode, rows, theta, v, p0)
    p: System = Tangent.apply(mode, rows, *theta, *right_side)  # type: ignore[no-untyped-call]
    return p


def solve_adjoint(mode: str, rows: Rows, theta: Theta, *g: Tensor | None) -> System:
    """Return the solution of the transposed system for g, and the gradients of the initial state."""
    if forward_mode_is_nested():
        return _solve_adjoint_by_loop(mode, rows, theta, g)
    adjoint: System = Adjoint.apply(mode, rows, *theta, *g)  # type: ignore[no-untyped-call]
    return adjoint


def _theta_gradients(
    mode: str, rows: Rows, theta: Theta, needs: Sequence[bool], adjoint: System, p: System, p0: Vector
) -> list[Tensor | None]:
    """Return the gradients of -<adjoint, residual(theta, p, p0)> by theta."""
    first = tuple(_filled(p0, _zero_state(theta)))
    need_w_hh, *others = needs
    dw_hh = state_blocks(mode, adjoint[0]).T @ rows.previous(first[0], p[1]) if need_w_hh else None
    given: list[Any] = [tensor for tensor, need in zip(theta[1:], others, strict=True) if need]
    if not given:
        return [dw_hh, *[None] * len(others)]
    if _uses_last_kernel(rows, theta):
        return [dw_hh, *_curvature(mode, rows, theta, adjoint, p, p0)]

    def cells(*changed: Tensor) -> System:
        values = iter(changed)
        moved: list[Any] = [next(values) if need else t for t, need in zip(theta[1:], others, strict=True)]
        return residual_of_cells(mode, rows, Theta(theta.w_hh, *moved), p, first)[1:]

    found = iter(_vjp(cells, *given)(tuple(-tensor for tensor in adjoint[1:])))
    return [dw_hh, *(next(found) if need else None for need in others)]


def _curvature(
    mode: str, rows: Rows, theta: Theta, adjoint: System, p: System, p0: Vector
) -> tuple[Tensor | None, ...]:
    """Return the gradients of -<adjoint, residual(theta, p, p0)> by theta but for W_hh, by a kernel."""
    lstm, elman = mode == "LSTM", theta.saved is None
    adjoint_h, dw_hr = adjoint[1], None
    if theta.w_hr is not None:
        assert theta.saved is not None
        H = _hidden(mode, theta)
        cell = _Cell(_split(theta.saved, H, -1), theta.y, theta.y, None)
        dw_hr = adjoint_h.T @ _lstm_output_tangent(cell, _split(p[0], H, -1), p[2])
        adjoint_h = adjoint_h @ theta.w_hr
    tangents = (p[0], None, None) if elman else (p[0], p[2] if lstm else p[1], p0[-1])
    adjoints = (adjoint_h, adjoint[2] if lstm else None)
    d_saved, dy, d_first = torch_ops.recurrence_curvature(
        mode, *theta, *tangents, *adjoints, rows.batch_sizes_tensor(), rows.reverse
    )
    if elman:
        return None, None, dy, None, None
    return (dw_hr, d_saved, None, None, d_first) if lstm else (None, d_saved, dy, d_first, None)


def _theta_tangents(theta: Theta, tangents: Sequence[Tensor | None]) -> tuple[list[int], Callable[..., Theta]]:
    """Return the indices of the tensors of theta that have tangents, and theta as a function of these tensors."""
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def moved(*values: Tensor) -> Theta:
        changed: list[Any] = list(theta)
        for i, value in zip(moving, values, strict=True):
            changed[i] = value
        return Theta(*changed)

    return moving, moved


def _jvp(function: Callable[..., System], inputs: Sequence[Any], tangents: Sequence[Any]) -> System:
    """Return the tangents of a function by two reverse passes, since forward-mode AD does not nest in a dual level."""
    outputs, pull = torch.func.vjp(function, *inputs)  # type: ignore[misc]
    zeros = [torch.zeros_like(output) for output in outputs]
    return _vjp(lambda *adjoint: pull(adjoint), *zeros)(tuple(tangents))


class Tangent(torch.autograd.Function):
    """Solve residual(theta, p, p0) = v for p. Arguments: mode, rows, *theta, *v, *p0."""

    @staticmethod
    def forward(mode: str, rows: Rows, *tensors: Any) -> System:
        v, p0 = _split_system(mode, tensors[6:])
        return _solve_tangent(mode, rows, Theta(*tensors[:6]), v, p0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: System) -> None:
        ctx.mode, ctx.rows, *tensors = inputs
        _v, p0 = _split_system(ctx.mode, tensors[6:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:6], *output, *p0)
        ctx.save_for_forward(*tensors[:6], *output, *p0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        mode, rows = ctx.mode, ctx.rows
        theta, (p, p0) = Theta(*ctx.saved_tensors[:6]), _split_system(mode, ctx.saved_tensors[6:])
        adjoint, d0 = _split_system(mode, solve_adjoint(mode, rows, theta, *grads))
        gradients = _theta_gradients(mode, rows, theta, ctx.needs_input_grad[2:8], adjoint, p, p0)
        return None, None, *gradients, *needed((*adjoint, *d0), ctx.needs_input_grad[8:])

    @staticmethod
    def jvp(ctx: Any, _mode: None, _rows: None, *tangents: Any) -> System:
        mode, rows = ctx.mode, ctx.rows
        theta, (p, p0) = Theta(*ctx.saved_tensors[:6]), _split_system(mode, ctx.saved_tensors[6:])
        v_dot, p0_dot = _split_system(mode, tangents[6:])
        moving, moved = _theta_tangents(theta, tangents[:6])
        if moving:
            first = tuple(_filled(p0, _zero_state(theta)))
            change = _jvp(
                lambda *values: residual(mode, rows, moved(*values), p, first),
                [theta[i] for i in moving],
                [tangents[i] for i in moving],
            )
            v_dot = tuple(_differences(v_dot, change))
        return solve_tangent(mode, rows, theta, *v_dot, *p0_dot)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[System, Any]:
        return _vmap(Tangent, info.batch_size, in_dims, args, slice(0, 2))


class Adjoint(torch.autograd.Function):
    """Solve the transposed system for g: returns the adjoint of v, then the gradients of the initial state.

    Arguments: mode, rows, *theta, *g.
    """

    @staticmethod
    def forward(mode: str, rows: Rows, *tensors: Any) -> System:
        return _solve_adjoint(mode, rows, Theta(*tensors[:6]), tensors[6:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: System) -> None:
        ctx.mode, ctx.rows, *tensors = inputs
        adjoint, _ = _split_system(ctx.mode, output)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:6], *adjoint)
        ctx.save_for_forward(*tensors[:6], *adjoint)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        mode, rows = ctx.mode, ctx.rows
        theta, adjoint = Theta(*ctx.saved_tensors[:6]), ctx.saved_tensors[6:]
        q, q0 = _split_system(mode, grads)
        p = solve_tangent(mode, rows, theta, *q, *q0)
        gradients = _theta_gradients(mode, rows, theta, ctx.needs_input_grad[2:8], adjoint, p, q0)
        return None, None, *gradients, *needed(p, ctx.needs_input_grad[8:])

    @staticmethod
    def jvp(ctx: Any, _mode: None, _rows: None, *tangents: Any) -> System:
        mode, rows = ctx.mode, ctx.rows
        theta, adjoint = Theta(*ctx.saved_tensors[:6]), ctx.saved_tensors[6:]
        g_dot = tangents[6:]
        moving, moved = _theta_tangents(theta, tangents[:6])
        if not moving:
            return solve_adjoint(mode, rows, theta, *g_dot)
        n = len(adjoint)
        zeros = [*(torch.zeros_like(tensor) for tensor in adjoint), *_zero_state(theta)]

        def transposed(*values: Tensor) -> System:
            at = moved(*values)
            return _vjp(lambda *p: residual(mode, rows, at, p[:n], p[n:]), *zeros)(tuple(adjoint))

        changes = _jvp(transposed, [theta[i] for i in moving], [tangents[i] for i in moving])
        found = solve_adjoint(mode, rows, theta, *_differences(g_dot, changes[:n]))
        return *found[:n], *(d - change for d, change in zip(found[n:], changes[n:], strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[System, Any]:
        return _vmap(Adjoint, info.batch_size, in_dims, args, slice(0, 2))


def _differences(tensors: Vector, changes: Sequence[Tensor]) -> list[Tensor]:
    return [-change if t is None else t - change for t, change in zip(tensors, changes, strict=True)]


def _split_system(mode: str, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Split a vector of the system from the state that follows it."""
    n = 3 if mode == "LSTM" else 2
    return tuple(tensors[:n]), tuple(tensors[n:])


# ---- Recurrence


def _saved_tangents(mode: str, saved: Tensor, w_hr: Tensor | None, a: Tensor, c: Tensor | None) -> Tensor:
    """Return the tangents of the saved activations."""
    values = _split(saved, a.shape[-1] // 4, -1)
    blocks = _split(a, a.shape[-1] // 4, -1)
    if mode == "GRU":
        n, r, z, m = values
        a_n, a_r, a_z, a_m = blocks
        r_dot = r * (1 - r) * a_r
        return torch.cat(((1 - n * n) * (a_n + r_dot * m + r * a_m), r_dot, z * (1 - z) * a_z, a_m), -1)
    assert c is not None
    i, f, g, o = values[:4]
    changes = [i * (1 - i) * blocks[0], f * (1 - f) * blocks[1], (1 - g * g) * blocks[2], o * (1 - o) * blocks[3], c]
    if w_hr is not None:
        changes.append(_lstm_output_tangent(_Cell(values, saved, saved, None), blocks, c))
    return torch.cat(changes, -1)


def _gradients(
    mode: str, rows: Rows, x: Tensor, w_ih: Tensor, theta: Theta, grads: Vector, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, given those of y, the activations and c."""
    need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr = needs
    solved, d0 = _adjoint_of_results(mode, rows, theta, grads)
    by_input, by_state = input_blocks(mode, solved[0]), state_blocks(mode, solved[0])
    return [
        by_input @ _in_blocks(mode, w_ih) if need_x else None,
        d0[0] if need_h0 else None,
        d0[1] if need_c0 else None,
        in_gates(mode, by_input.T @ x) if need_w_ih else None,
        by_state.T @ rows.previous(theta.h0, theta.y) if need_w_hh else None,
        in_gates(mode, by_input.sum(0)) if need_b_ih else None,
        by_state.sum(0) if need_b_hh else None,
        solved[1].T @ _projected(theta) if need_w_hr else None,
    ]


def _adjoint_of_results(mode: str, rows: Rows, theta: Theta, grads: Vector) -> tuple[System, State]:
    """Return the adjoint of the system and of the initial state, given the gradients of y, the activations and c."""
    grad_y, grad_saved, grad_c = grads
    if grad_saved is not None and _uses_last_kernel(rows, theta):
        adjoint = _adjoint_kernel(mode, rows, theta, (None, grad_y, grad_c), grad_saved)
    else:
        adjoint = solve_adjoint(mode, rows, theta, *_system_gradients(mode, theta, grad_y, grad_saved, grad_c))
    return _split_system(mode, adjoint)


def gradients_of_op(
    mode: str,
    x: Tensor,
    state: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    results: Sequence[Tensor],
    batch_sizes: Tensor | None,
    reverse: bool,
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients of a registered op, in a form that has derivatives and can be mapped.

    Args:
        mode: See `one_direction`, likewise the other arguments of the op.
        x: Input.
        state: (h0,), or (h0, c0) of an LSTM.
        weights: (w_ih, w_hh, w_hr).
        results: y and, but for Elman, the saved activations.
        batch_sizes: Rows of each step.
        reverse: Direction.
        needs: For each of x, the state, w_ih, w_hh, b_ih, b_hh and, for an LSTM, w_hr whether its gradient is needed.
        grads: Gradients of y, the new state and the saved activations; None means zeros.
    """
    w_ih, w_hh, w_hr = weights
    assert w_ih is not None
    assert w_hh is not None
    y, saved = (*results, None)[:2]
    assert y is not None
    lstm = mode == "LSTM"
    rows, (h0, c0) = _first_states(mode, x, state, w_ih, w_hh, batch_sizes, reverse)
    theta = Theta(w_hh, w_hr, saved, y.flatten(0, -2), h0, c0)
    grad_y, grad_h_n, *others = grads
    grad_c_n, grad_saved = (*others, None, None)[:2] if lstm else (None, (*others, None)[0])
    grads_n = [None if grad is None else grad.reshape(rows.B, grad.shape[-1]) for grad in (grad_h_n, grad_c_n)]
    # Without a step, the new state is the first one.
    of_first, of_last = (grads_n, [None, None]) if rows.T == 0 else ([None, None], grads_n)
    at_last = [None if grad is None else rows.at_last(grad, len(theta.y)) for grad in of_last]
    g_h = _sum(None if grad_y is None else grad_y.reshape(theta.y.shape), at_last[0])
    need_x, *need_state = needs[: 2 + lstm]
    every = (need_x, need_state[0], lstm and need_state[-1], *needs[2 + lstm :], *([] if lstm else [False]))
    data = x.flatten(0, 1) if batch_sizes is None else x
    dx, dh0, dc0, *dweights = _gradients(mode, rows, data, w_ih, theta, (g_h, grad_saved, at_last[1]), every)
    dstate = [
        grad if grad is None else _sum(grad, direct).reshape(given.shape)  # type: ignore[union-attr]
        for grad, direct, given in zip((dh0, dc0), of_first, state, strict=False)
    ]
    return [None if dx is None else dx.view(x.shape), *dstate, *dweights[: len(needs) - 2 - lstm]]


class Recurrence(torch.autograd.Function):
    """One direction of one layer: returns y [N, P], but for Elman the saved activations, and for an LSTM c [N, H].

    Arguments: mode, rows, x [N, I], h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, once. The last one says whether the call
    is differentiated forwards and only once; then the saved activations need no tangents.
    """

    @staticmethod
    def forward(
        mode: str,
        rows: Rows,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        w_hr: Tensor | None,
        once: bool,
    ) -> tuple[Tensor, ...]:
        if rows.batch_sizes is None:
            x = x.unflatten(0, (rows.T, rows.B))  # type: ignore[no-untyped-call]
        weights, end = (w_ih, w_hh, b_ih, b_hh), (rows.batch_sizes, None)
        if mode in NONLINEARITIES:
            y, _ = torch_ops.rnn_forward(x, h0, *weights, *end, NONLINEARITIES[mode], rows.reverse, False)
            return (y.flatten(0, -2),)
        if mode == "GRU":
            y, _, saved = torch_ops.gru_forward(x, h0, *weights, *end, rows.reverse, False, True)
            return y.flatten(0, -2), saved
        y, _, _, saved = torch_ops.lstm_forward(x, h0, c0, *weights, w_hr, *end, rows.reverse, False, True)
        H = w_ih.shape[0] // 4
        return y.flatten(0, -2), saved, saved[:, 4 * H : 5 * H].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mode, ctx.rows, x, h0, c0, w_ih, w_hh, _b_ih, _b_hh, w_hr, ctx.once = inputs
        y, saved = (*output, None)[:2]
        ctx.set_materialize_grads(False)
        if ctx.once and saved is not None:
            ctx.mark_non_differentiable(saved)
        ctx.save_for_backward(x, w_ih, w_hh, w_hr, saved, y, h0, c0)
        ctx.save_for_forward(x, w_ih, w_hh, w_hr, saved, y, h0, c0)

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_saved: Tensor | None = None, grad_c: Tensor | None = None
    ) -> tuple[Any, ...]:
        mode, rows = ctx.mode, ctx.rows
        x, w_ih, *values = ctx.saved_tensors
        theta = Theta(*values)
        grads = (grad_y, grad_saved, grad_c)
        return None, None, *_gradients(mode, rows, x, w_ih, theta, grads, ctx.needs_input_grad[2:-1]), None

    @staticmethod
    def jvp(ctx: Any, _mode: None, _rows: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        mode, rows = ctx.mode, ctx.rows
        x, w_ih, *values = ctx.saved_tensors
        theta = Theta(*values)
        v, p0 = _tangent_system(mode, rows, x, w_ih, theta, tangents[:-1])
        p = solve_tangent(mode, rows, theta, *v, *p0)
        if theta.saved is None:
            return (p[1],)
        c = p[2] if mode == "LSTM" else None
        changes = None if ctx.once else _saved_tangents(mode, theta.saved, theta.w_hr, p[0], c)
        return (p[1], changes) if c is None else (p[1], changes, c)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        *others, once = args
        return _vmap(Recurrence, info.batch_size, in_dims[:-1], tuple(others), slice(3, 8), once)


class SampleRecurrence(torch.autograd.Function):
    """One direction of one layer, with a gradient of the weights for each of S samples.

    Arguments: mode, rows, positions, x [N, I], h0, c0, and w_ih, w_hh, b_ih, b_hh, w_hr with a first dimension of size
    S, along which their values are the same. Row n is a step of sample ``positions[n] // T``; `positions` is None where
    the samples are the B rows of the batch. Results: y and, for an LSTM, c.
    """

    @staticmethod
    def forward(
        ctx: Any, mode: str, rows: Rows, positions: Tensor | None, x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        h0, c0, *weights = tensors
        shared = [None if weight is None else weight[0] for weight in weights]
        results: Any = Recurrence.forward(mode, rows, x, h0, c0, *shared, True)  # type: ignore[call-arg, arg-type]
        y, saved, c = (*results, None, None)[:3]
        ctx.mode, ctx.rows, ctx.samples = mode, rows, len(weights[0])  # type: ignore[arg-type]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(positions, x, shared[0], shared[1], shared[4], saved, y, h0, c0)
        return (y,) if c is None else (y, c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_c: Tensor | None = None) -> tuple[Any, ...]:
        mode, rows = ctx.mode, ctx.rows
        positions, x, w_ih, *values = ctx.saved_tensors
        theta = Theta(*values)
        need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr = ctx.needs_input_grad[3:]
        solved, d0 = _adjoint_of_results(mode, rows, theta, (grad_y, None, grad_c))
        by_input, by_state = gate_gradients(mode, solved[0])

        def by_sample(tensor: Tensor) -> Tensor:
            """Return rows [N, *] as [S, T, *], with zeros where a sample has no step."""
            if positions is None:
                return tensor.view(rows.T, rows.B, tensor.shape[-1]).transpose(0, 1)
            padded = tensor.new_zeros(ctx.samples * rows.T, tensor.shape[-1])
            return padded.index_copy_(0, positions, tensor).view(ctx.samples, rows.T, tensor.shape[-1])

        of_input, of_state = by_sample(by_input), by_sample(by_state)
        return (
            None,
            None,
            None,
            by_input @ w_ih if need_x else None,
            d0[0] if need_h0 else None,
            d0[1] if need_c0 else None,
            of_input.mT @ by_sample(x) if need_w_ih else None,
            of_state.mT @ by_sample(rows.previous(theta.h0, theta.y)) if need_w_hh else None,
            of_input.sum(1) if need_b_ih else None,
            of_state.sum(1) if need_b_hh else None,
            by_sample(solved[1]).mT @ by_sample(_projected(theta)) if need_w_hr else None,
        )


def _tangent_system(
    mode: str,
    rows: Rows,
    x: Tensor,
    w_ih: Tensor,
    theta: Theta,
    tangents: Sequence[Tensor | None],
    linear: Callable[..., Tensor] = F.linear,
) -> tuple[Vector, Vector]:
    """Return the right side of the tangents' system, and the tangents of the initial state.

    `tangents` are those of x, h0, c0, w_ih, w_hh, b_ih, b_hh and w_hr; `linear` computes the products.
    """
    dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr = tangents
    by_input = _sum(
        None if dx is None else linear(dx, _in_blocks(mode, w_ih), None),
        None if dw_ih is None else linear(x, _in_blocks(mode, dw_ih), None),
        None if db_ih is None else _in_blocks(mode, db_ih).expand(len(x), -1),
    )
    by_state = _sum(
        None if dw_hh is None else linear(rows.previous(theta.h0, theta.y), dw_hh, None),
        None if db_hh is None else db_hh.expand(len(x), -1),
    )
    v_a = _sum(
        None if by_input is None else _from_input(mode, by_input),
        None if by_state is None else _from_state(mode, by_state),
    )
    v = (v_a, None if dw_hr is None else _projected(theta) @ dw_hr.T)
    return ((*v, None), (dh0, dc0)) if mode == "LSTM" else (v, (dh0,))


def _sum(*terms: Tensor | None) -> Tensor | None:
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


def _projected(theta: Theta) -> Tensor:
    """Return the output of a projected LSTM's cell before the projection."""
    assert theta.saved is not None
    return theta.saved[:, -theta.w_hh.shape[0] // 4 :]


def _zeros(mode: str, theta: Theta) -> list[Tensor]:
    """Return a zero vector of the system."""
    N, H = theta.y.shape[0], _hidden(mode, theta)
    a = torch.zeros(N, _blocks(mode) * H, dtype=theta.y.dtype, device=theta.y.device)
    states = [torch.zeros_like(theta.y)]
    if mode == "LSTM":
        states.append(a[:, :H])
    return [a, *states]


def _system_gradients(
    mode: str, theta: Theta, grad_y: Tensor | None, grad_saved: Tensor | None, grad_c: Tensor | None
) -> Vector:
    """Return the gradients of the system's vector (a, h, c), given those of the results."""
    g: list[Tensor | None] = [None, grad_y, grad_c][: 2 + (mode == "LSTM")]
    if grad_saved is not None:
        assert theta.saved is not None
        saved, (a, _, *cells) = theta.saved, _zeros(mode, theta)
        pull = _vjp(lambda a, c=None: (_saved_tangents(mode, saved, theta.w_hr, a, c),), a, *cells)
        g[0], *cells = pull((grad_saved,))
        if mode == "LSTM":
            g[2] = _sum(grad_c, *cells)
    return g


def _first_states(
    mode: str,
    x: Tensor,
    state: Sequence[Tensor | None] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Rows, tuple[Tensor, Tensor | None]]:
    """Return the rows of a call, and h0 [B, P] and c0 [B, H], zeros if there is no state."""
    if state is not None and state[0] is None:
        state = None
    if batch_sizes is None:
        T, B = x.shape[:2]
    else:
        assert state is not None
        assert state[0] is not None
        T, B = batch_sizes.shape[0], state[0].shape[-2]
    first: list[Any]
    if state is None:
        widths = (w_hh.shape[1], w_ih.shape[0] // gates_of(mode))
        first = [torch.zeros(B, width, dtype=w_hh.dtype, device=x.device) for width in widths]
    else:
        first = [None if tensor is None else tensor.reshape(tensor.shape[-2:]) for tensor in state]
    return Rows(T, B, batch_sizes, reverse), (first[0], first[1] if mode == "LSTM" else None)


def one_direction(
    mode: str,
    x: Tensor,
    state: State | None,
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    reverse: bool,
    all_states: bool = False,
    samples: bool = False,
    positions: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Run one direction of one layer; x is [T, B, I] or packed rows [N, I], a state [B, *] or [1, B, *].

    The new state is [B, *] if the given one is, else [1, B, *]; in an LSTM every c follows it if `all_states`.
    `samples`: the weights are those of `SampleRecurrence`, which has no other derivative; `positions` are its argument.
    """
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    assert w_ih is not None
    assert w_hh is not None
    shapes = (w_ih[0], w_hh[0]) if samples else (w_ih, w_hh)
    rows, (h0, c0) = _first_states(mode, x, state, *shapes, batch_sizes, reverse)
    tensors = (x.flatten(0, 1) if batch_sizes is None else x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    once = forward_mode_once(tensors)

    def results(y: Tensor, c: Tensor | None) -> list[Tensor]:
        last = [rows.last(h0, y).clone()]  # not a view: y or the given state would change with it
        if c is not None:
            assert c0 is not None
            last.append(rows.last(c0, c).clone())
        if state is None or state[0].dim() == 3:
            last = [tensor.unsqueeze(0) for tensor in last]
        every = [y] if c is None or not all_states else [y, c]
        if batch_sizes is None:
            every = [tensor.view(rows.T, rows.B, tensor.shape[-1]) for tensor in every]
        return [every[0], *last, *every[1:]]

    if samples:
        y, *c = SampleRecurrence.apply(mode, rows, positions, *tensors)  # type: ignore[no-untyped-call]
        y, *last = results(y, *c or (None,))
        return y, tuple(last)
    duals = unpack_duals(tensors) if once and rows.T > 0 else None
    if duals is not None:
        with without_transforms():
            found = [results(*each) for each in _values_and_tangents(mode, rows, *duals)]
        y, *last = (make_dual(*pair) for pair in zip(*found, strict=True))
    else:
        y, *saved = Recurrence.apply(mode, rows, *tensors, once)  # type: ignore[no-untyped-call]
        y, *last = results(y, saved[1] if mode == "LSTM" else None)
    return y, tuple(last)


def _values_and_tangents(
    mode: str, rows: Rows, primals: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """Return (y, c) of a recurrence and their tangents; c is None but for an LSTM. Arguments as of `Recurrence`."""
    x, h0, c0, w_ih, w_hh, _b_ih, _b_hh, w_hr = primals
    results: Any = (*Recurrence.forward(mode, rows, *primals, True), None, None)  # type: ignore[call-arg]
    y, saved, c = results[:3]
    theta = Theta(w_hh, w_hr, saved, y, h0, c0)
    native = torch_ops.linear_forward if _uses_kernel(rows, theta) else F.linear
    v, p0 = _tangent_system(mode, rows, x, w_ih, theta, tangents, native)
    p = _solve_tangent(mode, rows, theta, v, p0)
    return (y, c), (p[1], p[2] if mode == "LSTM" else None)


# ---- recurrence_tangent, recurrence_adjoint and recurrence_curvature, the kernels


def _fake_system(mode: str, w_hh: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, H = y.shape[0], w_hh.shape[0] // gates_of(mode)
    c = y.new_empty((N, H)) if mode == "LSTM" else y.new_empty(0)
    return y.new_empty((N, _blocks(mode) * H)), y.new_empty(y.shape), c


def _tangent_fake(
    mode: str, w_hh: Tensor, w_hr: Tensor | None, saved: Tensor | None, y: Tensor, *others: Any
) -> System:
    return _fake_system(mode, w_hh, y)


def _adjoint_fake(mode: str, *tensors: Any) -> System:
    w_hh, _w_hr, _saved, y, h0, c0 = tensors[:6]
    dc0 = y.new_empty(0) if c0 is None else y.new_empty(c0.shape)
    return *_fake_system(mode, w_hh, y), y.new_empty(h0.shape), dc0


def _curvature_fake(mode: str, *tensors: Any) -> System:
    _w_hh, _w_hr, saved, y, h0, c0 = tensors[:6]
    first = None if saved is None else c0 if mode == "LSTM" else h0
    results = (saved, None if mode == "LSTM" else y, first)
    return tuple(y.new_empty(0 if like is None else like.shape) for like in results)


register_fake("recurrence_tangent", _tangent_fake)
register_fake("recurrence_adjoint", _adjoint_fake)
register_fake("recurrence_curvature", _curvature_fake)
# Autocast needs no rule: their callers have cast.
refuse_derivative("recurrence_tangent")
refuse_derivative("recurrence_adjoint")
refuse_derivative("recurrence_curvature")
