"""Multilayer recurrences: inputs by name, and ops.multilayer_rnn and its reference as functions of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support import target
from support.comparison import compare, flatten
from support.inputs import leaf
from support.recurrences import Recurrence, recurrence_inputs

_WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


def multilayer_inputs(
    recurrence: Recurrence,
    x_shape: tuple[int, ...],
    B: int,
    H: int,
    dtype: torch.dtype,
    *,
    layers: int = 1,
    bidirectional: bool = False,
    state: bool = True,
    bias: bool = True,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """x, h0, c0, and w_ih_0, w_hh_0, ... for each layer and direction, in the order of torch.nn's all_weights."""
    directions = 1 + bidirectional
    inputs: dict[str, Tensor] = {}
    states: dict[str, list[Tensor]] = {"h0": [], "c0": []}
    features = x_shape[-1]
    for row in range(layers * directions):
        own = recurrence_inputs(recurrence, (1, B, features), B, H, dtype, state=state, bias=bias, device=device)
        inputs |= {f"{name}_{row}": own[name] for name in _WEIGHTS if name in own}
        for name in states:
            states[name] += [own[name].detach()] if name in own else []
        if row % directions == directions - 1:
            features = directions * own["w_hh"].shape[1]
    stacked = {name: torch.stack(rows).requires_grad_() for name, rows in states.items() if rows}
    return {"x": leaf(*x_shape, dtype=dtype, device=device), **stacked, **inputs}


def weights_of(inputs: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    """The weights among named inputs: one tuple for each layer and direction."""
    rows = sum(name.startswith("w_ih_") for name in inputs)
    return [tuple(inputs[f"{n}_{row}"] for n in _WEIGHTS if f"{n}_{row}" in inputs) for row in range(rows)]


def state_of(inputs: dict[str, Tensor]) -> tuple[Tensor, ...] | None:
    """The state among named inputs, a tuple, or None."""
    return tuple(inputs[name] for name in ("h0", "c0") if name in inputs) or None


def multilayer_functions(recurrence: Recurrence, **options: Any) -> list[Callable[..., tuple[Tensor, ...]]]:
    """ops.multilayer_rnn and its reference, both taking tensors by name and returning (y, h_n) or (y, h_n, c_n)."""

    def bind(module: Any) -> Callable[..., tuple[Tensor, ...]]:
        def run(**inputs: Tensor) -> tuple[Tensor, ...]:
            weights, state = weights_of(inputs), state_of(inputs)
            return tuple(flatten(module.multilayer_rnn(recurrence.mode, inputs["x"], state, weights, **options)))

        return run

    return [bind(target.ops), bind(target.reference)]


def evaluated(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs without gradients: the call takes the fused path of inference."""
    return {name: t.detach() for name, t in inputs.items()}


def with_input_projections(
    inputs: dict[str, Tensor], ids: Tensor, V: int, *, bidirectional: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
    """The inputs with x = ids, the same inputs with the rows that the ids stand for, and the input projections."""
    directions = 1 + bidirectional
    rows = torch.randn(V, inputs["w_ih_0"].shape[1]).to(inputs["w_ih_0"])
    first = range(directions)
    projections = [F.linear(rows, inputs[f"w_ih_{d}"], inputs.get(f"b_ih_{d}")).detach() for d in first]
    return inputs | {"x": ids}, inputs | {"x": rows[ids]}, projections


# ---- checks that run on every device, and on CUDA ops in the emulator


def check_both_directions(recurrence: Recurrence, rows: str, *, bias: bool, state: bool, device: str = "cpu") -> None:
    """One bidirectional layer over "whole" rows, "packed" ones, or rows with "lengths", against the reference."""
    options: dict[str, Any] = {"bidirectional": True}
    x_shape: tuple[int, ...] = (7, 4, 5)
    if rows == "packed":
        x_shape, options["batch_sizes"] = (11, 5), torch.tensor([4, 3, 3, 1])
    elif rows == "lengths":
        options["lengths"] = torch.tensor([3, 0, 7, 1], device=device)
    inputs = multilayer_inputs(
        recurrence, x_shape, 4, 6, torch.float64, bidirectional=True, state=state, bias=bias, device=device
    )
    compare(recurrence.op, multilayer_functions(recurrence, **options), inputs)
