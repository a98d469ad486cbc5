"""The recurrent layers of a model, chosen by name and called with the state as a tuple of tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from llm_ext.nn import GRU, LSTM, RNN
from llm_ext.ops.packing import within_lengths

__all__ = [
    "CELLS",
    "RecurrentLayer",
    "State",
    "call_recurrent",
    "fill_padding",
    "join_state",
    "recurrent_layer",
    "split_state",
]

CELLS = ("rnn", "gru", "lstm")

RecurrentLayer = RNN | GRU | LSTM
State = tuple[Tensor, ...]
Input = TypeVar("Input", Tensor, PackedSequence)


def recurrent_layer(cell: str, nonlinearity: str) -> Callable[..., RecurrentLayer]:
    """Return the constructor of the recurrent layer of a cell, one of `CELLS`; `nonlinearity` is that of "rnn"."""
    constructors: dict[str, Callable[..., RecurrentLayer]]
    constructors = {"rnn": partial(RNN, nonlinearity=nonlinearity), "gru": GRU, "lstm": LSTM}
    return constructors[cell]


def call_recurrent(
    layer: RecurrentLayer, x: Input, state: State | None, lengths: Tensor | None = None
) -> tuple[Input, State]:
    """Call a layer with the state (h,), or (h, c) of an LSTM: like torch.nn, `RNN` and `GRU` take h without a tuple.

    Args:
        layer: RNN, GRU or LSTM.
        x: Input of the layer, a Tensor or a PackedSequence.
        state: State before the first step. None: zeros.
        lengths: Steps of each row of a Tensor, ``[B]`` int64. None: all have T.

    Returns:
        The output of the layer, and the state after the last step of each row.
    """
    hx = state[0] if state is not None and len(state) == 1 else state
    y, hx_n = layer(x, hx) if lengths is None else layer(x, hx, lengths=lengths)
    return y, hx_n if isinstance(hx_n, tuple) else (hx_n,)


def fill_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return ids ``[B, T]`` or features ``[B, T, F]`` with 0 beyond the lengths, where a batch may hold any number."""
    if lengths is None:
        return x
    within = within_lengths(lengths, x.shape[1])
    return x.masked_fill(~(within if x.dim() == 2 else within.unsqueeze(-1)), 0)


def join_state(hidden: Tensor, cell: Tensor | None) -> State:
    """Return the state (hidden,), or (hidden, cell) of an LSTM."""
    return (hidden,) if cell is None else (hidden, cell)


def split_state(state: State) -> tuple[Tensor, Tensor | None]:
    """Return the hidden state, and the cell state or None: the inverse of `join_state`."""
    return state[0], state[1] if len(state) == 2 else None
