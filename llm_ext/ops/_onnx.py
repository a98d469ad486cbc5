"""A recurrence as the operators RNN, GRU and LSTM of ONNX, which `torch.onnx.export` records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_ext.ops._transforms import is_traced
from llm_ext.ops.argument_checks import op_of
from llm_ext.reference.recurrence import unpack_weights

__all__ = ["run_layers"]

State = tuple[Tensor, ...]

# For each gate of ONNX its index among those of torch: i, o, f, c of an LSTM and z, r, h of a GRU.
_GATES = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}
_ACTIVATIONS = {"RNN_TANH": "Tanh", "RNN_RELU": "Relu", "RNN_SIGMOID": "Sigmoid"}


def run_layers(
    mode: str,
    x: Tensor,
    state: State | None,
    weights: Sequence[Sequence[Tensor | None]],
    directions: tuple[bool, ...],
    dropout: float,
    lengths: Tensor | None,
) -> tuple[Tensor, State]:
    """Run each layer, in all of its directions, as one operator of ONNX; the results outside of a graph are zeros.

    The arguments are those of a call of `recurrence.run`.
    """
    count = len(directions)
    flat = state is not None and state[0].dim() == 2
    if flat:
        assert state is not None
        state = tuple([tensor.unsqueeze(0) for tensor in state])
    last: list[State] = []
    for row in range(0, len(weights), count):
        if row > 0 and dropout > 0:
            x = F.dropout(x, dropout)
        given = None if state is None else tuple([tensor[row : row + count] for tensor in state])
        x, after = _layer(mode, x, given, weights[row : row + count], directions, lengths)
        last.append(after)
    new = tuple([torch.cat(tensors) for tensors in zip(*last, strict=True)])
    return x, tuple([tensor.squeeze(0) for tensor in new]) if flat else new


def _layer(
    mode: str,
    x: Tensor,
    state: State | None,
    weights: Sequence[Sequence[Tensor | None]],
    directions: tuple[bool, ...],
    lengths: Tensor | None,
) -> tuple[Tensor, State]:
    """Run the directions of one layer: x [T, B, I] to [T, B, D H], and the state after it, [D, B, H] each."""
    op, D = op_of(mode).upper(), len(directions)
    rows = [unpack_weights(row) for row in weights]

    def stack(i: int) -> Tensor:
        return torch.stack([_with_gates_of_onnx(op, row[i]) for row in rows])

    bias = torch.cat((stack(2), stack(3)), 1) if rows[0][2] is not None else None
    sequence_lens = None if lengths is None else lengths.to(torch.int32)
    inputs = (x, stack(0), stack(1), bias, sequence_lens, *(state or ()))
    attributes: dict[str, Any] = {"direction": "bidirectional" if D == 2 else "reverse" if directions[0] else "forward"}
    if op == "RNN":
        attributes["activations"] = [_ACTIVATIONS[mode]] * D
    elif op == "GRU":
        attributes["linear_before_reset"] = 1
    y, *last = _operator(op, inputs, attributes)
    if lengths is not None:
        # A row without a step keeps its state; ONNX does not say what the operators return for it.
        before = state or [torch.zeros_like(tensor) for tensor in last]
        last = [torch.where((lengths > 0)[:, None], new, old) for new, old in zip(last, before, strict=True)]
    return y.transpose(1, 2).flatten(2), tuple(last)


def _with_gates_of_onnx(op: str, tensor: Tensor | None) -> Tensor:
    """Return a weight or bias of torch, [G H, *], with its gates in the order of ONNX."""
    assert tensor is not None
    if op == "RNN":
        return tensor
    order = torch.tensor(_GATES[op], device=tensor.device)
    return tensor.reshape(len(order), -1).index_select(0, order).reshape(tensor.shape)


def _operator(op: str, inputs: tuple[Any, ...], attributes: dict[str, Any]) -> Sequence[Tensor]:
    """Call an operator of ONNX in the form of the exporter that records."""
    if is_traced():
        results: Sequence[Tensor] = _TracedOperator.apply(op, attributes, *inputs)  # type: ignore[no-untyped-call]
        return results
    shapes, dtype = _shapes_of_results(op, *inputs), inputs[0].dtype
    attributes = attributes | {"hidden_size": inputs[2].shape[2]}
    return torch.onnx.ops.symbolic_multi_out(op, inputs, attributes, dtypes=[dtype] * len(shapes), shapes=shapes)


def _shapes_of_results(op: str, *inputs: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the output and of each tensor of the state."""
    x, _, w_hh, *_ = inputs
    (T, B, _), (D, _, H) = x.shape, w_hh.shape
    return [(T, D, B, H), *[(D, B, H)] * (2 if op == "LSTM" else 1)]


class _TracedOperator(torch.autograd.Function):
    """An operator of ONNX for the exporter that traces, `dynamo=False`."""

    @staticmethod
    def forward(ctx: Any, op: str, attributes: dict[str, Any], *inputs: Any) -> tuple[Tensor, ...]:
        return tuple([inputs[0].new_zeros(shape) for shape in _shapes_of_results(op, *inputs)])

    @staticmethod
    def symbolic(g: Any, op: str, attributes: dict[str, Any], *inputs: Any) -> Any:
        # Sizes are tensors while torch.jit.trace records; here they are numbers.
        attributes = attributes | {"hidden_size": inputs[2].type().sizes()[2]}
        suffixes = {str: "_s", list: "_s", int: "_i"}
        named = {name + suffixes[type(value)]: value for name, value in attributes.items()}
        unused: Any = torch.onnx.symbolic_opset9.unused
        given = [unused(g) if value is None else value for value in inputs]
        return g.op(op, *given, **named, outputs=3 if op == "LSTM" else 2)
