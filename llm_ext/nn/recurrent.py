"""Recurrent layers, their cells and the affine embedding: modules that hold parameters; the arithmetic is in `ops`."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from operator import itemgetter
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from llm_ext import checks, ops

Device = torch.device | str | int | None
Pair = tuple[Tensor, Tensor]
# Of one cell: w_ih, w_hh, b_ih, b_hh, w_hr; None for those it has not.
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
# What a cell remembers: its hidden state h; an LSTM the pair (h, c).
State = TypeVar("State", Tensor, Pair)


class _Part(NamedTuple):
    """One tensor of a state: its name as an argument, the letter and the number of its features."""

    name: str
    letter: str
    size: int


class _Recurrent(nn.Module, Generic[State]):
    """Parameters of one or more cells, found by name, and the call of the op that runs one of them.

    What differs from cell to cell is said by `_Elman`, `_GRU` and `_LSTM`; `_Layers` and `_Cell` put it to use.
    """

    # Blocks of H rows in the weights.
    _gates: ClassVar[int]

    input_size: int
    hidden_size: int
    bias: bool
    proj_size: int

    def __init__(self, input_size: int, hidden_size: int, bias: bool, proj_size: int = 0) -> None:
        super().__init__()
        self._check_size("input_size", input_size)
        self._check_size("hidden_size", hidden_size)
        self._check_flag("bias", bias)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.proj_size = proj_size
        # Names of the weights of each cell; in layers, of each row of the state.
        self._names: list[tuple[str, str, str | None, str | None, str | None]] = []

    def _check_size(self, name: str, size: int, least: int = 1) -> None:
        if not isinstance(size, int):
            raise TypeError(f"{type(self).__name__}: {name} must be an int, got {type(size).__name__}")
        if size < least:
            raise ValueError(f"{type(self).__name__}: {name} must be at least {least}, got {size}")

    def _check_flag(self, name: str, flag: bool) -> None:
        if not isinstance(flag, bool):
            raise TypeError(f"{type(self).__name__}: {name} must be a bool, got {type(flag).__name__}")

    def _add_cell(self, suffix: str, input_size: int, device: Device, dtype: torch.dtype | None) -> None:
        """Make the parameters of one more cell."""
        gates, outputs = self._gates * self.hidden_size, self.proj_size or self.hidden_size
        names = (
            f"weight_ih{suffix}",
            f"weight_hh{suffix}",
            f"bias_ih{suffix}" if self.bias else None,
            f"bias_hh{suffix}" if self.bias else None,
            f"weight_hr{suffix}" if self.proj_size else None,
        )
        shapes = (gates, input_size), (gates, outputs), (gates,), (gates,), (outputs, self.hidden_size)
        for name, shape in zip(names, shapes, strict=True):
            if name is not None:
                setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._names.append(names)

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-1/√H, 1/√H), in the order torch.nn draws them."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def _run(
        self,
        row: int,
        x: Tensor,
        state: State | None,
        batch_sizes: Tensor | None = None,
        lengths: Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[Tensor, State]:
        """One cell over x [T, B, I], or over packed rows [N, I]."""
        # Looked up in every call anew: functional_call puts other tensors in the places of the parameters. Written out,
        # because a loop here and a starred call of the op cost a microsecond, which is a tenth of a step.
        w_ih, w_hh, b_ih, b_hh, w_hr = self._names[row]
        of: Any = self._parameters
        weights: Weights
        try:
            weights = (
                of[w_ih],
                of[w_hh],
                None if b_ih is None else of[b_ih],
                None if b_hh is None else of[b_hh],
                None if w_hr is None else of[w_hr],
            )
        except KeyError:
            # A parametrization or weight_norm has made an attribute of one.
            found = (None if name is None else getattr(self, name) for name in self._names[row])
            weights = cast(Weights, tuple(found))
        return self._op(x, state, weights, batch_sizes, lengths, reverse)

    def _op(
        self,
        x: Tensor,
        state: State | None,
        weights: Weights,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, State]:
        raise NotImplementedError

    @property
    def cell(self) -> str:
        """The name of the cell in the ops of several."""
        raise NotImplementedError

    def _both(
        self,
        layer: int,
        x: Tensor,
        hx: State | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, State]:
        """Both directions of one layer at once."""
        h0, c0 = hx if isinstance(hx, tuple) else (hx, None)
        weights = [getattr(self, name) for row in (2 * layer, 2 * layer + 1) for name in self._names[row] if name]
        options: Any = {"bias": self.bias, "batch_sizes": batch_sizes, "lengths": lengths}
        y, h_n, c_n = ops.bidirectional(self.cell, x, h0, c0, weights, **options)
        return y, self._state_of(h_n, c_n)

    def _state_of(self, h: Tensor, c: Tensor) -> State:
        """The state with these parts; c is of an LSTM."""
        raise NotImplementedError

    @property
    def _parts(self) -> Any:
        """What the state is made of, each tensor described by a `_Part`."""
        return _Part("hx", "H", self.hidden_size)

    def _each(self, function: Callable[..., Any], *states: Any) -> Any:
        """Apply a function to states that are alike, tensor by tensor."""
        return function(*states)

    def _is_state(self, hx: Any, dim: int) -> bool:
        """Whether hx is a state, its tensors of so many dimensions; of what sizes, the op will look."""
        return isinstance(hx, Tensor) and hx.dim() == dim

    def _check_state(self, hx: State, letters: tuple[str, ...], sizes: tuple[int, ...]) -> None:
        """Raise unless every tensor of hx has these sizes, named by the letters, and then its own features."""

        def check(tensor: Tensor, part: _Part) -> None:
            op, expected = type(self).__name__, (*sizes, part.size)
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{op}: {part.name} must be a Tensor, got {type(tensor).__name__}")
            if tensor.shape != expected:
                checks.fail_shape(op, part.name, ", ".join((*letters, part.letter)), expected, tensor)

        self._each(check, hx, self._parts)


class _Elman(_Recurrent[Tensor]):
    """The Elman cell."""

    _gates = 1

    nonlinearity: str

    def _check_nonlinearity(self, nonlinearity: str) -> None:
        if nonlinearity not in checks.NONLINEARITIES:
            op, names = type(self).__name__, checks.NONLINEARITIES
            raise ValueError(f"{op}: nonlinearity must be one of {names}, got {nonlinearity!r}")

    def _op(
        self,
        x: Tensor,
        state: Tensor | None,
        weights: Weights,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        w_ih, w_hh, b_ih, b_hh, _ = weights
        return ops.rnn(
            x,
            state,
            w_ih,
            w_hh,
            b_ih,
            b_hh,
            batch_sizes=batch_sizes,
            lengths=lengths,
            nonlinearity=self.nonlinearity,
            reverse=reverse,
        )

    @property
    def cell(self) -> str:
        return self.nonlinearity

    def _state_of(self, h: Tensor, c: Tensor) -> Tensor:
        return h


class _GRU(_Recurrent[Tensor]):
    """The gated recurrent unit."""

    _gates = 3

    def _op(
        self,
        x: Tensor,
        state: Tensor | None,
        weights: Weights,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        w_ih, w_hh, b_ih, b_hh, _ = weights
        return ops.gru(x, state, w_ih, w_hh, b_ih, b_hh, batch_sizes=batch_sizes, lengths=lengths, reverse=reverse)

    @property
    def cell(self) -> str:
        return "gru"

    def _state_of(self, h: Tensor, c: Tensor) -> Tensor:
        return h


class _LSTM(_Recurrent[Pair]):
    """The long short-term memory."""

    _gates = 4

    def _op(
        self,
        x: Tensor,
        state: Pair | None,
        weights: Weights,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Pair]:
        w_ih, w_hh, b_ih, b_hh, w_hr = weights
        return ops.lstm(
            x, state, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes=batch_sizes, lengths=lengths, reverse=reverse
        )

    @property
    def cell(self) -> str:
        return "lstm"

    def _state_of(self, h: Tensor, c: Tensor) -> Pair:
        return h, c

    @property
    def _parts(self) -> tuple[_Part, _Part]:
        hidden = ("P", self.proj_size) if self.proj_size else ("H", self.hidden_size)
        return _Part("hx[0]", *hidden), _Part("hx[1]", "H", self.hidden_size)

    def _each(self, function: Callable[..., Any], *states: Any) -> Any:
        return tuple(map(function, *states))

    def _is_state(self, hx: Any, dim: int) -> bool:
        return isinstance(hx, tuple) and len(hx) == 2 and hx[0].dim() == hx[1].dim() == dim


class _Layers(_Recurrent[State]):
    """Cells in layers and directions, walked over in the order of torch.nn."""

    num_layers: int
    batch_first: bool
    dropout: float
    bidirectional: bool

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        device: Device,
        dtype: torch.dtype | None,
        proj_size: int = 0,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, proj_size)
        self._check_size("num_layers", num_layers)
        self._check_flag("batch_first", batch_first)
        self._check_size("proj_size", proj_size, least=0)
        op = type(self).__name__
        if proj_size >= hidden_size:
            raise ValueError(f"{op}: proj_size must be below hidden_size = {hidden_size}, got {proj_size}")
        if not isinstance(dropout, numbers.Real) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"{op}: dropout must be a probability from 0 to 1, got {dropout!r}")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"{op}: dropout={dropout} acts between layers, and num_layers=1 has none to act on",
                stacklevel=3,
            )
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional

        directions = ("", "_reverse") if bidirectional else ("",)
        for layer in range(num_layers):
            layer_input = (proj_size or hidden_size) * len(directions) if layer else input_size
            for direction in directions:
                self._add_cell(f"_l{layer}{direction}", layer_input, device, dtype)
        self.reset_parameters()

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction, in the order of the rows of the state."""
        return [[getattr(self, name) for name in names if name] for names in self._names]

    def flatten_parameters(self) -> None:
        """Do nothing: in torch.nn this arranges memory for cuDNN."""

    def extra_repr(self) -> str:
        defaults = {
            "proj_size": 0,
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0,
            "bidirectional": False,
        }
        words = [f"{self.input_size}, {self.hidden_size}"]
        words += [f"{name}={getattr(self, name)}" for name, usual in defaults.items() if getattr(self, name) != usual]
        return ", ".join(words)

    @overload
    def forward(
        self, input: Tensor, hx: State | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]: ...

    @overload
    def forward(self, input: PackedSequence, hx: State | None = None) -> tuple[PackedSequence, State]: ...

    def forward(
        self, input: Tensor | PackedSequence, hx: State | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run the network over a sequence.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] without a batch, or a PackedSequence.
            hx: first hidden states [L, B, H], or [L, H] without a batch, 2 L if bidirectional, or None for zeros; of
                an LSTM the hidden states, with P for H if projected, and the cell states in a tuple.
            lengths: steps of each row of a padded batch, [B] int64 on the device of `input`, from 0 to T, in any order;
                on CUDA nothing waits for them. Beyond them the output is 0, and the states are those after the last
                step of each row. Not with a PackedSequence, which has its own, or without a batch.

        Returns:
            The hidden states of the last layer, in the layout of `input` with H (or P; twice that if bidirectional)
            for I, and the states after the last step of every layer and direction, in the layout of `hx`.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
            TypeError: an argument of the wrong type.
        """
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise checks.ArgumentError(
                    f"{type(self).__name__}: lengths belong to a Tensor, got a PackedSequence too"
                )
            return self._packed(input, hx)
        if input.dim() == 3 and not self.batch_first:
            return self._walk(input, hx, lengths=lengths)

        shape = input.shape
        if len(shape) not in (2, 3) or shape[-1] != self.input_size:
            letters = "B, T, I" if self.batch_first else "T, B, I"
            checks.fail_shape(type(self).__name__, "input", letters, (None, None, self.input_size), input)
        if len(shape) == 3:
            output, h_n = self._walk(input.transpose(0, 1), hx, lengths=lengths)
            return output.transpose(0, 1), h_n
        if lengths is not None:
            raise checks.ArgumentError(f"{type(self).__name__}: lengths belong to a batch, got input {list(shape)}")
        if hx is not None:
            self._check_state(hx, ("L",), (len(self._names),))
            hx = self._each(lambda part: part.unsqueeze(1), hx)
        output, h_n = self._walk(input.unsqueeze(1), hx)
        return output.squeeze(1), self._each(lambda part: part.squeeze(1), h_n)

    def _packed(self, input: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        sizes = len(self._names), int(batch_sizes[0])
        if hx is None:
            hx = self._each(lambda part: data.new_zeros(*sizes, part.size), self._parts)
        elif sorted_indices is not None:
            self._check_state(hx, ("L", "B"), sizes)
            hx = self._each(lambda part: part.index_select(1, sorted_indices), hx)
        output, h_n = self._walk(data, hx, batch_sizes)
        if unsorted_indices is not None:
            h_n = self._each(lambda part: part.index_select(1, unsorted_indices), h_n)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n

    def _walk(
        self, x: Tensor, hx: State | None, batch_sizes: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """All layers over x [T, B, I], or over packed rows [N, I]."""
        rows = len(self._names)
        if rows == 1 and (hx is None or self._is_state(hx, 3)):
            # The one step of a generation is mostly Python: neither lists nor loops for it, and no check that the op
            # makes too. What that refuses goes the long way, whose checks have the better words.
            try:
                y, h_n = self._run(0, x, hx, batch_sizes, lengths)
                return y, self._each(lambda part: part.unsqueeze(0), h_n) if hx is None else h_n
            except checks.ArgumentError:
                pass
        if lengths is not None and x.is_cpu and x.dim() == 3:
            return self._walk_by_packing(x, hx, lengths)
        serves = lengths is None and (batch_sizes is None or x.is_cpu)
        if rows > 1 and serves and not self.proj_size and not (self.training and self.dropout > 0):
            weights = [weight for row in self.all_weights for weight in row]
            states = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
            if not ops.records(x, *states, *weights):
                try:
                    return self._stack(x, hx, weights, batch_sizes)
                except (checks.ArgumentError, ValueError):  # a pair of three is no state either
                    pass
        first = None
        if hx is not None:
            batch = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
            self._check_state(hx, ("L", "B"), (rows, batch))
            first = self._each(lambda part: part.unbind(0), hx)
        last: list[State] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
            if self.bidirectional and x.is_cuda:
                begin = len(last)
                state = None if hx is None else self._each(itemgetter(slice(begin, begin + 2)), hx)
                x, h_n = self._both(layer, x, state, batch_sizes, lengths)
                last += (self._each(itemgetter(d), h_n) for d in range(2))
                continue
            outputs = []
            for direction in range(rows // self.num_layers):
                state = None if first is None else self._each(itemgetter(len(last)), first)
                y, h_n = self._run(len(last), x, state, batch_sizes, lengths, reverse=direction == 1)
                outputs.append(y)
                last.append(h_n)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return x, self._each(lambda *parts: torch.stack(parts), *last)

    def _walk_by_packing(self, x: Tensor, hx: State | None, lengths: Tensor) -> tuple[Tensor, State]:
        """The same over padded rows on the CPU, which are packed once for all layers and directions."""
        op, rows, batch = type(self).__name__, len(self._names), x.shape[1]
        if x.shape[2] != self.input_size:
            checks.fail_shape(op, "input", "T, B, I", (None, None, self.input_size), x)
        checks.batch_lengths(op, x, lengths)
        if hx is None:
            hx = self._each(lambda part: x.new_zeros(rows, batch, part.size), self._parts)
        self._check_state(hx, ("L", "B"), (rows, batch))
        states: tuple[Tensor, ...] = hx if isinstance(hx, tuple) else (hx,)

        def run(data: Tensor, first: list[Tensor], sizes: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            y, last = self._walk(data, self._state_of(first[0], first[-1]), sizes)
            return y, last if isinstance(last, tuple) else (last,)

        y, last = ops.by_packing(x, states, tuple(part.shape[2] for part in states), lengths, run, (rows,))
        return y, self._state_of(last[0], last[-1])

    def _stack(
        self, x: Tensor, hx: State | None, weights: list[Tensor], batch_sizes: Tensor | None
    ) -> tuple[Tensor, State]:
        """All layers and directions at once, without a derivative."""
        h0, c0 = hx if isinstance(hx, tuple) else (hx, None)
        options: Any = {"bias": self.bias, "bidirectional": self.bidirectional, "batch_sizes": batch_sizes}
        y, h_n, c_n = ops.stack(self.cell, x, h0, c0, weights, **options)
        return y, self._state_of(h_n, c_n)


class RNN(_Layers[Tensor], _Elman):
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
        dtype: of the parameters, one that `ops.rnn` takes.

    Raises:
        ValueError: a size, probability or nonlinearity out of range.
        TypeError: an argument of the wrong type.

    Source: J. Elman, "Finding structure in time", 1990; the interface is that of `torch.nn.RNN`.
    """

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
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._check_nonlinearity(nonlinearity)
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype)
        self.nonlinearity = nonlinearity


class GRU(_Layers[Tensor], _GRU):
    """Gated recurrent units in one or more layers, a drop-in for `torch.nn.GRU` with the same parameters and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        num_layers: layers, each reading the output of the one below.
        bias: whether b_ih and b_hh exist.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...]; hx and h_n are not affected.
        dropout: probability, after every layer but the last, in training only.
        bidirectional: a second direction reads the sequence backwards; outputs of both are concatenated.
        device: of the parameters.
        dtype: of the parameters, one that `ops.gru` takes.

    Raises:
        ValueError: a size or probability out of range.
        TypeError: an argument of the wrong type.

    Source: Cho et al., arXiv 1406.1078, with the reset gate where `torch.nn.GRU` applies it; the interface is that of
    `torch.nn.GRU`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype)


class LSTM(_Layers[Pair], _LSTM):
    """Long short-term memory in one or more layers, a drop-in for `torch.nn.LSTM` with the same parameters and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the cell state, and of the hidden state unless that is projected.
        num_layers: layers, each reading the output of the one below.
        bias: whether b_ih and b_hh exist.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...]; hx and the states are not affected.
        dropout: probability, after every layer but the last, in training only.
        bidirectional: a second direction reads the sequence backwards; outputs of both are concatenated.
        proj_size: P, features that the hidden state is projected to, fewer than H; 0 for no projection.
        device: of the parameters.
        dtype: of the parameters, one that `ops.lstm` takes.

    Raises:
        ValueError: a size or probability out of range.
        TypeError: an argument of the wrong type.

    Source: Hochreiter and Schmidhuber, "Long short-term memory", 1997; the forget gate: Gers et al., "Learning to
    forget", 2000; the projection: Sak et al., arXiv 1402.1128; the interface is that of `torch.nn.LSTM`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device,
            dtype,
            proj_size,
        )


class _Cell(_Recurrent[State]):
    """One cell, called for one step."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias)
        self._add_cell("", input_size, device, dtype)
        if not bias:
            self.register_parameter("bias_ih", None)
            self.register_parameter("bias_hh", None)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """Run the cell for one step.

        Args:
            input: [B, I], or [I] without a batch.
            hx: hidden state before the step, [B, H], or [H] without a batch, or None for zeros; of an LSTM a tuple of
                the hidden state and the cell state.

        Returns:
            The state after the step, in the layout of `hx`.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
            TypeError: an argument of the wrong type.
        """
        # As in _Layers: first the call, and checks for what it refuses. The state after the step is taken from where
        # the op returns it without the dimension of time, since a view costs as much as the rest of this function.
        batched = input.dim() == 2
        if batched and (hx is None or self._is_state(hx, 2)):
            try:
                return self._run(0, input.unsqueeze(0), hx)[1]
            except checks.ArgumentError:
                pass
        shape = input.shape
        if len(shape) not in (1, 2) or shape[-1] != self.input_size:
            checks.fail_shape(type(self).__name__, "input", "B, I", (None, self.input_size), input)
        if hx is not None:
            self._check_state(hx, ("B",) if batched else (), shape[:-1])
        if batched:
            return self._run(0, input.unsqueeze(0), hx)[1]
        state = None if hx is None else self._each(lambda part: part.unsqueeze(0), hx)
        _, state = self._run(0, input.unsqueeze(0).unsqueeze(0), state)
        return self._each(lambda part: part.squeeze(0), state)  # type: ignore[no-any-return]


class RNNCell(_Cell[Tensor], _Elman):
    """One step of an Elman network, a drop-in for `torch.nn.RNNCell` with the same parameters and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        bias: whether b_ih and b_hh exist.
        nonlinearity: "tanh", "relu" or "sigmoid" (the last is not in torch).
        device: of the parameters.
        dtype: of the parameters, one that `ops.rnn` takes.

    Raises:
        ValueError: a size or nonlinearity out of range.
        TypeError: an argument of the wrong type.

    Source: as `RNN`; the interface is that of `torch.nn.RNNCell`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._check_nonlinearity(nonlinearity)
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.nonlinearity = nonlinearity

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.nonlinearity == "tanh" else f", nonlinearity={self.nonlinearity}")


class GRUCell(_Cell[Tensor], _GRU):
    """One step of a gated recurrent unit, a drop-in for `torch.nn.GRUCell` with the same parameters and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        bias: whether b_ih and b_hh exist.
        device: of the parameters.
        dtype: of the parameters, one that `ops.gru` takes.

    Raises:
        ValueError: a size out of range.
        TypeError: an argument of the wrong type.

    Source: as `GRU`; the interface is that of `torch.nn.GRUCell`.
    """


class LSTMCell(_Cell[Pair], _LSTM):
    """One step of a long short-term memory, a drop-in for `torch.nn.LSTMCell` with the same parameters and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state and of the cell state.
        bias: whether b_ih and b_hh exist.
        device: of the parameters.
        dtype: of the parameters, one that `ops.lstm` takes.

    Raises:
        ValueError: a size out of range.
        TypeError: an argument of the wrong type.

    Source: as `LSTM`; the interface is that of `torch.nn.LSTMCell`.
    """


class Linear(nn.Linear):
    """Affine map of vectors; drop-in for `torch.nn.Linear`, of which it is one.

    On a CPU, in float32 and float64, the products are those of the recurrent layers; elsewhere they are torch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map input [*, in_features] to [*, out_features].

        Raises:
            ValueError: a shape or device that does not fit.
            TypeError: mixed dtypes.
        """
        return ops.linear(input, self.weight, self.bias)


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
        device: Device = None,
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

    def fold(self) -> Tensor:
        """Return W + b, [V, E]: a row for each id."""
        return self.weight + self.bias

    def forward(self, ids: Tensor, table: Tensor | None = None) -> Tensor:
        """Look up ids [...] int64 and return [..., E].

        Args:
            ids: [...] int64.
            table: what `fold` has returned, for many calls with the same weights; None: the rows are added up here.

        Raises:
            IndexError: an id outside 0 .. V - 1 (on the CPU; on another device as torch reports it).
        """
        try:
            return F.embedding(ids, self.weight) + self.bias if table is None else F.embedding(ids, table)
        except IndexError:
            expected, got = f"0 to {self.num_embeddings - 1}", f"{ids.min().item()} to {ids.max().item()}"
            raise IndexError(f"AffineEmbedding: ids must be from {expected}, got values from {got}") from None
