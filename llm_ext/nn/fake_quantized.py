"""Training with rounded weights, inputs and states, whose gradients are those of numbers that are not rounded."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llm_ext.nn.cells import GRUCell, LSTMCell, RNNCell
from llm_ext.nn.recurrent import GRU, LSTM, RNN
from llm_ext.ops.quantization import round_weight, widen
from llm_ext.ops.recurrence import FakeQuantizedWeights

__all__ = ["FAKE_QUANTIZED", "FakeQuantize", "FakeQuantizedStates"]


class FakeQuantize(nn.Module):
    """Parametrization that rounds a weight, and passes its gradient on as if it did not."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, w: Tensor) -> Tensor:
        rounded = widen(*round_weight(w.detach(), self.weights))
        return rounded + (w - w.detach())  # the difference is 0, and has the gradient of w


class FakeQuantizedStates(nn.Module):
    """A recurrent layer or cell whose inputs and states are rounded as with int8 weights, in a loop over the steps.

    It comes before the class that it replaces in the bases.
    """

    _replaces: type[nn.Module]

    def _weights(self) -> Any:
        weights: Any = super()._weights()  # type: ignore[misc]
        return FakeQuantizedWeights([weights] if isinstance(weights, tuple) else weights)  # of a cell: one row


def _with_rounded_states(cls: type[nn.Module]) -> type[FakeQuantizedStates]:
    names = {"__module__": __name__, "__doc__": f"A {cls.__name__} after ``fake_quantize_(states=True)``."}
    return type(f"FakeQuantized{cls.__name__}", (FakeQuantizedStates, cls), {**names, "_replaces": cls})


FakeQuantizedRNN, FakeQuantizedGRU, FakeQuantizedLSTM = map(_with_rounded_states, (RNN, GRU, LSTM))
FakeQuantizedRNNCell, FakeQuantizedGRUCell, FakeQuantizedLSTMCell = map(
    _with_rounded_states, (RNNCell, GRUCell, LSTMCell)
)
# The class of a layer whose states are rounded, by that of the layer.
FAKE_QUANTIZED: dict[type[nn.Module], type[FakeQuantizedStates]] = {
    RNN: FakeQuantizedRNN,
    GRU: FakeQuantizedGRU,
    LSTM: FakeQuantizedLSTM,
    RNNCell: FakeQuantizedRNNCell,
    GRUCell: FakeQuantizedGRUCell,
    LSTMCell: FakeQuantizedLSTMCell,
}
