"""The linear system of a recurrence's tangents: kernels against loops of torch's ops, and against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.comparison import assert_all_close
from support.recurrences import RECURRENCES, Recurrence
from torch import Tensor

from llm_ext.ops import _recurrence_derivatives as derivatives
from llm_ext.ops._recurrence_derivatives import Rows, Theta


def linear_system(
    recurrence: Recurrence, rows: Rows, H: int, dtype: torch.dtype
) -> tuple[Theta, list[Tensor], list[Tensor]]:
    """Random activations, and a random vector of the system and of the initial state."""
    mode, N = recurrence.mode, sum(rows.sizes())
    P = max(1, H // 3) if recurrence.projected else H
    blocks = 4 if recurrence.gates > 1 else 1

    def new(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)

    w_hr = new(P, H, scale=H**-0.5) if recurrence.projected else None
    saved = None
    if recurrence.gates > 1:
        saved = torch.cat([torch.rand(N, 4 * H), torch.randn(N, H * (1 + (w_hr is not None)))], 1).to(dtype)
        saved = saved[:, : (4 if mode == "GRU" else 5 + (w_hr is not None)) * H].contiguous()
    c0 = new(rows.B, H) if mode == "LSTM" else None
    theta = Theta(new(recurrence.gates * H, P, scale=P**-0.5), w_hr, saved, new(N, P), new(rows.B, P), c0)
    vector = [new(N, blocks * H), new(N, P)] + ([new(N, H)] if mode == "LSTM" else [])
    return theta, vector, [new(rows.B, P)] + ([new(rows.B, H)] if mode == "LSTM" else [])


def draw_sizes(recurrence: Recurrence, data: Any) -> tuple[Rows, int]:
    """Draw rows and a hidden size, and seed torch."""
    sizes = sorted(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6)), reverse=True)
    packed, reverse = data.draw(st.booleans()), data.draw(st.booleans())
    H = data.draw(st.sampled_from([1, 3, 8, 17, 64, 130][recurrence.projected :]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    rows = Rows(len(sizes), sizes[0], torch.tensor(sizes) if packed else None, reverse)
    return rows, H


def doubled(theta: Theta) -> Theta:
    return Theta(*(None if t is None else t.double() for t in theta))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("recurrence", RECURRENCES, ids=str)
@given(data=st.data())
def test_kernels_solve_the_system(recurrence: Recurrence, dtype: torch.dtype, data: Any) -> None:
    """Both kernels give what loops of torch's ops give, also where parts of the right side are absent."""
    rows, H = draw_sizes(recurrence, data)
    theta, vector, state = linear_system(recurrence, rows, H, dtype)
    mode = recurrence.mode
    absent = data.draw(st.lists(st.booleans(), min_size=5, max_size=5))
    v: list[Any] = [None if gone else t for t, gone in zip(vector, absent, strict=False)]
    p0: list[Any] = [None if gone else t for t, gone in zip(state, absent[3:], strict=False)]
    exact = doubled(theta)
    zeros, zero_state = derivatives._zeros(mode, exact), derivatives._zero_state(exact)
    right = [z if t is None else t.double() for t, z in zip(v, zeros, strict=True)]
    first = [z if t is None else t.double() for t, z in zip(p0, zero_state, strict=True)]
    tangents = derivatives._solve_tangent(mode, rows, theta, v, p0)
    assert_all_close(recurrence.op, tangents, derivatives._loop_tangent(mode, rows, exact, [*right, *first]))
    adjoint = derivatives._solve_adjoint(mode, rows, theta, v)
    assert_all_close(recurrence.op, adjoint, derivatives._loop_adjoint(mode, rows, exact, right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("recurrence", RECURRENCES, ids=str)
@given(data=st.data())
def test_last_derivatives(recurrence: Recurrence, dtype: torch.dtype, data: Any) -> None:
    """Where nothing is differentiated further, kernels replace the derivatives of the residual and the activations."""
    rows, H = draw_sizes(recurrence, data)
    mode = recurrence.mode
    theta, p, p0 = linear_system(recurrence, rows, H, dtype)
    adjoint = [torch.randn_like(t) for t in p]
    state: list[Any] = [None if data.draw(st.booleans()) else t for t in p0]
    needs = (True, *(t is not None for t in theta[1:]))
    exact = [[None if t is None else t.double() for t in each] for each in (adjoint, p, state)]
    with torch.no_grad():
        found = derivatives._theta_gradients(mode, rows, theta, needs, tuple(adjoint), tuple(p), state)
    expected = derivatives._theta_gradients(mode, rows, doubled(theta), needs, *exact)  # type: ignore[arg-type]
    for each, other in zip(found, expected, strict=True):
        if each is None:
            assert other is None or not other.any()
        else:
            assert_all_close(recurrence.op, [each], [other])
    if theta.saved is None:
        return
    grads = (torch.randn_like(theta.y), torch.randn_like(theta.saved), p[2] if mode == "LSTM" else None)
    g = derivatives._system_gradients(mode, doubled(theta), *(None if t is None else t.double() for t in grads))
    found_adjoint = derivatives._adjoint_kernel(mode, rows, theta, (None, grads[0], grads[2]), grads[1])
    assert_all_close(recurrence.op, found_adjoint, derivatives._solve_adjoint_by_loop(mode, rows, doubled(theta), g))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("T", "B"), [(7, 24), (1, 24), (1, 70)])
@pytest.mark.parametrize("recurrence", RECURRENCES, ids=str)
def test_adjoint_is_the_transpose(recurrence: Recurrence, T: int, B: int, threads: int) -> None:
    """<g, Tangent(v, p0)> = <Adjoint(g), (v, p0)>, at sizes that are worth two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = Rows(T, B, None, False)
        theta, v, p0 = linear_system(recurrence, rows, 96, torch.float64)
        g = [torch.randn_like(t) for t in v]
        p = derivatives._solve_tangent(recurrence.mode, rows, theta, v, p0)
        adjoint = derivatives._solve_adjoint(recurrence.mode, rows, theta, g)
    finally:
        torch.set_num_threads(before)
    left = sum((a * b).sum() for a, b in zip(g, p, strict=True))
    right = sum((a * b).sum() for a, b in zip(adjoint, [*v, *p0], strict=True))
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_wrong_arguments_are_refused() -> None:
    """The ops check everything that could corrupt memory."""
    w, y, h0, sizes = torch.randn(4, 4), torch.randn(6, 4), torch.randn(3, 4), torch.tensor([3, 3])
    right = (None, None, None, None)

    def call(mode: str = "RNN_TANH", **changed: Any) -> None:
        given = {"w_hh": w, "w_hr": None, "saved": None, "y": y, "h0": h0, "c0": None} | changed
        torch.ops.llm_ext.recurrence_adjoint(mode, *given.values(), *right, sizes, False)

    call()
    for changed, message in (
        ({"mode": "RNN"}, "mode must be"),
        ({"mode": "GRU"}, "w_hh must be"),
        ({"w_hh": torch.randn(4, 5)}, "w_hr must be given"),
        ({"y": torch.randn(5, 4)}, "must sum to the rows"),
        ({"y": torch.randn(6, 5)}, "y must be"),
        ({"h0": torch.randn(2, 4)}, "h0 must be"),
        ({"c0": h0}, "c0 belongs to an LSTM"),
        ({"saved": y}, "saved must be"),
        ({"h0": h0.double()}, "h0 must have the dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**changed)
