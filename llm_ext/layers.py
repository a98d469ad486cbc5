"""Recurrent layers and the affine embedding: modules that hold parameters; the arithmetic is in `ops`."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from llm_ext import checks, ops


class RNN(nn.Module):
    """Elman network of one or more layers, a drop-in for `torch.nn.RNN` with the same parameters and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        num_layers: layers, each reading the output of the one below.
        nonlinearity: "tanh", "relu" or "sigmoid" (the last is not in torch).
        bias: whether b_ih and b_hh exist.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...]; hx and h_n are not affected.
        dropout: probability, after every layer but the last, in training only.
        bidirectional: a second direction reads the sequence backwards; outputs of both are concatenated.
        device: of the parameters.
        dtype: of the parameters, float32 or float64.

    Raises:
        ValueError: a size, probability or nonlinearity out of range.
        TypeError: an argument of the wrong type.

    Source: J. Elman, "Finding structure in time", 1990; the interface is that of `torch.nn.RNN`.
    """

    input_size: int
    hidden_size: int
    num_layers: int
    nonlinearity: str
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if nonlinearity not in checks.NONLINEARITIES:
            raise ValueError(f"RNN: nonlinearity must be one of {checks.NONLINEARITIES}, got {nonlinearity!r}")
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        for name, size in sizes.items():
            if not isinstance(size, int):
                raise TypeError(f"RNN: {name} must be an int, got {type(size).__name__}")
            if size <= 0:
                raise ValueError(f"RNN: {name} must be at least 1, got {size}")
        for name, flag in (("bias", bias), ("batch_first", batch_first)):
            if not isinstance(flag, bool):
                raise TypeError(f"RNN: {name} must be a bool, got {type(flag).__name__}")
        if not isinstance(dropout, numbers.Real) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"RNN: dropout must be a probability from 0 to 1, got {dropout!r}")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"RNN: dropout={dropout} acts between layers, and num_layers=1 has none to act on",
                stacklevel=2,
            )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.nonlinearity = nonlinearity
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional

        # Names of the parameters of each layer and direction, in the order of the rows of h_n.
        self._names: list[list[str]] = []
        directions = ("", "_reverse") if bidirectional else ("",)
        for layer in range(num_layers):
            layer_input = input_size if layer == 0 else hidden_size * len(directions)
            shapes: dict[str, tuple[int, ...]]
            shapes = {"weight_ih": (hidden_size, layer_input), "weight_hh": (hidden_size, hidden_size)}
            if bias:
                shapes |= {"bias_ih": (hidden_size,), "bias_hh": (hidden_size,)}
            for direction in directions:
                self._names.append([f"{kind}_l{layer}{direction}" for kind in shapes])
                for name, shape in zip(self._names[-1], shapes.values(), strict=True):
                    setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-1/√H, 1/√H), in the order torch.nn.RNN draws them."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction, in the order of the rows of h_n."""
        return [self._weights(names) for names in self._names]

    def _weights(self, names: list[str]) -> list[Tensor]:
        """Look the parameters up, in every call anew: functional_call puts other tensors in their place."""
        try:
            return [self._parameters[name] for name in names]  # type: ignore[misc]  # none is None
        except KeyError:
            # A parametrization or weight_norm has made an attribute of one. Five times the cost: only then.
            return [getattr(self, name) for name in names]

    def flatten_parameters(self) -> None:
        """Do nothing: in torch.nn.RNN this arranges memory for cuDNN."""

    def extra_repr(self) -> str:
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0, "bidirectional": False}
        options = {name: getattr(self, name) for name in defaults}
        changed = [f"{name}={value}" for name, value in options.items() if value != defaults[name]]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *changed])

    @overload
    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the network over a sequence.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] without a batch, or a PackedSequence.
            hx: first hidden states [L, B, H], or [L, H] without a batch, 2 L if bidirectional, or None.

        Returns:
            The hidden states of the last layer, in the layout of `input` with H (2 H if bidirectional) for I,
            and those after the last step of every layer and direction, in the layout of `hx`.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            batch = int(batch_sizes[0])
            if hx is None:
                hx = data.new_zeros(len(self._names), batch, self.hidden_size)
            elif sorted_indices is not None and hx.dim() == 3 and hx.shape[1] == batch:  # else refused below
                hx = hx.index_select(1, sorted_indices)
            output, h_n = self._run(data, hx, batch, batch_sizes)
            if unsorted_indices is not None:
                h_n = h_n.index_select(1, unsorted_indices)
            return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n

        shape = input.shape
        if len(shape) not in (2, 3) or shape[-1] != self.input_size:
            letters = "B, T, I" if self.batch_first else "T, B, I"
            checks.fail_shape("RNN", "input", letters, (None, None, self.input_size), input)
        if len(shape) == 2:
            if hx is not None:
                if hx.dim() != 2:
                    checks.fail_shape("RNN", "hx", "L, H", (len(self._names), self.hidden_size), hx)
                hx = hx.unsqueeze(1)
            output, h_n = self._run(input.unsqueeze(1), hx, 1)
            return output.squeeze(1), h_n.squeeze(1)
        if self.batch_first:
            output, h_n = self._run(input.transpose(0, 1), hx, shape[0])
            return output.transpose(0, 1), h_n
        return self._run(input, hx, shape[1])

    def _run(
        self, x: Tensor, hx: Tensor | None, batch: int, batch_sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """All layers over x [T, B, I], or over packed rows [N, I]."""
        rows = len(self._names)
        if hx is not None and hx.shape != (rows, batch, self.hidden_size):
            checks.fail_shape("RNN", "hx", "L, B, H", (rows, batch, self.hidden_size), hx)
        if rows == 1:
            # The one step of a generation is mostly Python: neither lists nor loops for it.
            y, h = self._direction(0, x, hx, batch_sizes)
            return y, h.unsqueeze(0) if hx is None else h
        h0 = [None] * rows if hx is None else hx.unbind(0)
        h_n: list[Tensor] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for _ in range(rows // self.num_layers):
                y, h = self._direction(len(h_n), x, h0[len(h_n)], batch_sizes)
                outputs.append(y)
                h_n.append(h)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return x, torch.stack(h_n)

    def _direction(self, row: int, x: Tensor, h0: Tensor | None, batch_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """One layer in one direction: that of the given row of h_n."""
        weights = self._weights(self._names[row])
        dtype = weights[0].dtype
        if x.dtype is not dtype and torch.is_autocast_enabled(x.device.type):
            x, h0 = x.to(dtype), None if h0 is None else h0.to(dtype)
        reverse = self.bidirectional and row % 2 == 1
        return ops.rnn(x, h0, *weights, batch_sizes=batch_sizes, nonlinearity=self.nonlinearity, reverse=reverse)


class AffineEmbedding(nn.Module):
    """An affine map of one-hot vectors, `W one_hot(id) + b`, as a lookup and a bias.

    Args:
        num_embeddings: V, how many ids there are.
        embedding_dim: E, size of the result.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 1), as torch.nn.Embedding does, and set the bias to zero."""
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids [...] int64 and return [..., E].

        Raises:
            IndexError: an id outside 0 .. V - 1 (on the CPU; on another device as torch reports it).
        """
        try:
            return F.embedding(ids, self.weight) + self.bias
        except IndexError:
            expected, got = f"0 to {self.num_embeddings - 1}", f"{ids.min().item()} to {ids.max().item()}"
            raise IndexError(f"AffineEmbedding: ids must be from {expected}, got values from {got}") from None
