"""The recurrent cells, as each of those who take part knows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import llm_ext
from llm_ext import reference


def _jax_rnn(jax: Any, b_ih: Any, b_hh: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    return b_ih + b_hh, lambda wx, uh, h: (jax.numpy.tanh(wx + uh),)


def _jax_gru(jax: Any, b_ih: Any, b_hh: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    # The last third of b_hh stands inside the product with r.
    outside, b_n = b_hh.at[len(b_hh) // 3 * 2 :].set(0), b_hh[len(b_hh) // 3 * 2 :]

    def step(wx: Any, uh: Any, h: Any) -> tuple[Any]:
        wx_r, wx_z, wx_n = jax.numpy.split(wx, 3, 1)
        uh_r, uh_z, uh_n = jax.numpy.split(uh, 3, 1)
        r, z = jax.nn.sigmoid(wx_r + uh_r), jax.nn.sigmoid(wx_z + uh_z)
        n = jax.numpy.tanh(wx_n + r * (uh_n + b_n))
        return ((1 - z) * n + z * h,)

    return b_ih + outside, step


def _jax_lstm(jax: Any, b_ih: Any, b_hh: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    def step(wx: Any, uh: Any, h: Any, c: Any) -> tuple[Any, Any]:
        i, f, g, o = jax.numpy.split(wx + uh, 4, 1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jax.numpy.tanh(g)
        return jax.nn.sigmoid(o) * jax.numpy.tanh(c), c

    return b_ih + b_hh, step


@dataclass(frozen=True)
class Cell:
    """A recurrent cell.

    name: that of its layer in llm_ext and in torch.nn, and of its operator in ONNX.
    jax: given jax, b_ih and b_hh, what is added to W x of all steps at once, and a step, (W x, U h, *state) to state.
    onnx_gates: the gates in the order of ONNX, as places in the order of torch.
    onnx_options: of the operator, where its defaults differ from torch.
    state: letters of the tensors in its state; the first is the output.
    """

    name: str
    jax: Callable[[Any, Any, Any], tuple[Any, Callable[..., tuple[Any, ...]]]]
    onnx_gates: tuple[int, ...] = (0,)
    onnx_options: Mapping[str, Any] = field(default_factory=dict)
    state: tuple[str, ...] = ("h",)

    @property
    def gates(self) -> int:
        """How many times H the rows of the weights are."""
        return len(self.onnx_gates)

    @property
    def ours(self) -> Any:
        """The layer of llm_ext."""
        return getattr(llm_ext, self.name)

    @property
    def theirs(self) -> Any:
        """The layer of torch."""
        return getattr(torch.nn, self.name)

    @property
    def truth(self) -> Callable[..., Any]:
        """The function of the reference."""
        return getattr(reference, self.name.lower())  # type: ignore[no-any-return]

    def hx(self, state: list[Tensor] | None) -> Any:
        """The state as torch wants it: a tensor, or a tuple where there are several."""
        return None if state is None else state[0] if len(self.state) == 1 else tuple(state)


RNN = Cell("RNN", _jax_rnn)
GRU = Cell("GRU", _jax_gru, onnx_gates=(1, 0, 2), onnx_options={"linear_before_reset": 1})  # r z n to z r h
LSTM = Cell("LSTM", _jax_lstm, onnx_gates=(0, 3, 1, 2), state=("h", "c"))  # i f g o to i o f c
CELLS = (RNN, GRU, LSTM)
