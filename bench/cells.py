"""The recurrent cells, as described to each library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import llm_ext

__all__ = ["CELLS", "GRU", "LSTM", "RNN", "Cell"]

JaxStep = Callable[..., tuple[Any, ...]]


def _jax_rnn(jax: Any, b_ih: Any, b_hh: Any) -> tuple[Any, JaxStep]:
    return b_ih + b_hh, lambda wx, uh, h: (jax.numpy.tanh(wx + uh),)


def _jax_gru(jax: Any, b_ih: Any, b_hh: Any) -> tuple[Any, JaxStep]:
    # b_hh of the gate n is multiplied by r; the rest can be added ahead of the loop.
    outside, b_n = b_hh.at[len(b_hh) // 3 * 2 :].set(0), b_hh[len(b_hh) // 3 * 2 :]

    def step(wx: Any, uh: Any, h: Any) -> tuple[Any]:
        wx_r, wx_z, wx_n = jax.numpy.split(wx, 3, 1)
        uh_r, uh_z, uh_n = jax.numpy.split(uh, 3, 1)
        r, z = jax.nn.sigmoid(wx_r + uh_r), jax.nn.sigmoid(wx_z + uh_z)
        n = jax.numpy.tanh(wx_n + r * (uh_n + b_n))
        return ((1 - z) * n + z * h,)

    return b_ih + outside, step


def _jax_lstm(jax: Any, b_ih: Any, b_hh: Any) -> tuple[Any, JaxStep]:
    def step(wx: Any, uh: Any, h: Any, c: Any) -> tuple[Any, Any]:
        i, f, g, o = jax.numpy.split(wx + uh, 4, 1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jax.numpy.tanh(g)
        return jax.nn.sigmoid(o) * jax.numpy.tanh(c), c

    return b_ih + b_hh, step


@dataclass(frozen=True)
class Cell:
    """A recurrent cell.

    name: of the layer in llm_ext and torch.nn, and of the operator in ONNX.
    jax: maps jax, b_ih and b_hh to the bias that is added to W x of all steps, and a step (W x, U h, *state) -> state.
    onnx_gates: for each gate in ONNX's order, its index in torch's order.
    onnx_options: attributes of the operator, where ONNX's defaults differ from torch.
    state: letters of the tensors of the state; the first is the output.
    """

    name: str
    jax: Callable[[Any, Any, Any], tuple[Any, JaxStep]]
    onnx_gates: tuple[int, ...] = (0,)
    onnx_options: Mapping[str, Any] = field(default_factory=dict)
    state: tuple[str, ...] = ("h",)

    @property
    def gates(self) -> int:
        """Rows of the weights, divided by H."""
        return len(self.onnx_gates)

    @property
    def our_layer(self) -> Any:
        """The layer of llm_ext."""
        return getattr(llm_ext, self.name)

    @property
    def torch_layer(self) -> Any:
        """The layer of torch."""
        return getattr(torch.nn, self.name)


RNN = Cell("RNN", _jax_rnn)
GRU = Cell("GRU", _jax_gru, onnx_gates=(1, 0, 2), onnx_options={"linear_before_reset": 1})  # r z n to z r h
LSTM = Cell("LSTM", _jax_lstm, onnx_gates=(0, 3, 1, 2), state=("h", "c"))  # i f g o to i o f c
CELLS = (RNN, GRU, LSTM)
