"""The recurrences as tests see them: each cell with its op, its reference and its inputs, and how two are compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from cases import NONLINEARITIES, assert_close
from torch import Tensor

import llm_ext
from llm_ext import ops, reference

# Where there are kernels and something to run them on.
ON_CUDA = torch.cuda.is_available() and llm_ext.build_info()["cuda"] is not None
DEVICES = ("cpu", "cuda") if ON_CUDA else ("cpu",)
every_device = pytest.mark.parametrize("device", DEVICES)


def leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0, device: str = "cpu") -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(device, dtype).requires_grad_()


def compare(
    op: str,
    function: Callable[..., tuple[Tensor, ...]],
    truth: Callable[..., tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    gradients: bool = True,
) -> None:
    """Results and gradients of `function` against `truth` in float64 on the same numbers.

    A gradient that is kept more exactly than the first input is stored has read results that were rounded as that is.
    """
    dtype = next(iter(inputs.values())).dtype
    doubles = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    actual, expected = function(**inputs), truth(**doubles)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_close(op, a, b, f"result {i}")
    weights = [torch.randn_like(b).to(a.dtype) for a, b in zip(actual, expected, strict=True)]
    used = [i for i, b in enumerate(expected) if b.requires_grad]
    if not used or not gradients:
        return
    grads = torch.autograd.grad(
        [actual[i] for i in used],
        list(inputs.values()),
        [weights[i] for i in used],
        allow_unused=True,
    )
    truths = torch.autograd.grad(
        [expected[i] for i in used], list(doubles.values()), [weights[i].double() for i in used], allow_unused=True
    )
    for name, a, b in zip(inputs, grads, truths, strict=True):
        a = torch.zeros_like(inputs[name]) if a is None else a
        b = torch.zeros_like(doubles[name]) if b is None else b
        assert_close(f"{op}_backward", a, b, f"gradient of {name}", dtype)


class Cell(NamedTuple):
    """A recurrence: its op, its gates, the option of its op, and whether its output is projected."""

    op: str
    gates: int
    nonlinearity: str | None = None
    projected: bool = False

    def __str__(self) -> str:
        return "-".join(filter(None, [self.op, self.nonlinearity, "projected" if self.projected else None]))


RNN, GRU, LSTM = Cell("rnn", 1), Cell("gru", 3), Cell("lstm", 4)
PROJECTED = Cell("lstm", 4, projected=True)
CELLS = [*(Cell("rnn", 1, name) for name in NONLINEARITIES), GRU, LSTM, PROJECTED]
# One of each kind, for tests in which the nonlinearity makes no difference.
KINDS = [RNN, GRU, LSTM, PROJECTED]


def cell_inputs(
    cell: Cell,
    x_shape: tuple[int, ...],
    B: int,
    H: int,
    dtype: torch.dtype,
    *,
    state: bool = True,
    bias: bool = True,
    device: str = "cpu",
) -> dict[str, Tensor]:
    new = partial(leaf, dtype=dtype, device=device)
    G, I = cell.gates, x_shape[-1]  # noqa: E741
    P = max(1, H // 3) if cell.projected else H
    inputs = {"x": new(*x_shape), "w_ih": new(G * H, I, scale=max(I, 1) ** -0.5)}
    inputs["w_hh"] = new(G * H, P, scale=P**-0.5)
    if cell.projected:
        inputs["w_hr"] = new(P, H, scale=H**-0.5)
    if state:
        inputs["h0"] = new(B, P)
        if cell.op == "lstm":
            inputs["c0"] = new(B, H)
    if bias:
        inputs |= {"b_ih": new(G * H), "b_hh": new(G * H)}
    return inputs


def cell_functions(cell: Cell, **options: object) -> list[Callable[..., tuple[Tensor, ...]]]:
    """The op and its reference, both taking tensors by name and returning (y, h_n) or (y, h_n, c_n)."""

    def bind(module: object) -> Callable[..., tuple[Tensor, ...]]:
        function = getattr(module, cell.op)
        options_of_cell = {"nonlinearity": cell.nonlinearity} if cell.nonlinearity else {}

        def run(
            x: Tensor, w_ih: Tensor, w_hh: Tensor, h0: Tensor | None = None, c0: Tensor | None = None, **others: Tensor
        ) -> tuple[Tensor, ...]:
            state = h0 if cell.op != "lstm" or h0 is None else (h0, c0)
            y, last = function(x, state, w_ih, w_hh, **others, **options_of_cell, **options)
            return (y, *last) if cell.op == "lstm" else (y, last)

        return run

    return [bind(ops), bind(reference)]
