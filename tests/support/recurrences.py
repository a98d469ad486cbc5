"""The recurrences: their inputs, the op and its reference as functions of named tensors, and checks for any device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support import target
from support.comparison import assert_close, compare, flatten
from support.inputs import leaf, noncontiguous
from support.tolerances import HALF_DTYPES

NONLINEARITIES = ("tanh", "relu", "sigmoid")


class Recurrence(NamedTuple):
    """One recurrence: its op, its number of gates, and its options."""

    op: str
    gates: int
    nonlinearity: str | None = None
    projected: bool = False

    @property
    def mode(self) -> str:
        """The mode as torch.nn.RNNBase names it."""
        return f"RNN_{(self.nonlinearity or 'tanh').upper()}" if self.op == "rnn" else self.op.upper()

    @property
    def layer(self) -> str:
        """The name of the layer class."""
        return self.op.upper()

    def __str__(self) -> str:
        return "-".join(filter(None, [self.op, self.nonlinearity, "projected" if self.projected else None]))


RNN, GRU, LSTM = Recurrence("rnn", 1), Recurrence("gru", 3), Recurrence("lstm", 4)
PROJECTED = Recurrence("lstm", 4, projected=True)
# Every mode, and the LSTM with a projection.
RECURRENCES = [*(Recurrence("rnn", 1, name) for name in NONLINEARITIES), GRU, LSTM, PROJECTED]
# One of each architecture, for tests in which the nonlinearity makes no difference.
ARCHITECTURES = [RNN, GRU, LSTM, PROJECTED]


def recurrence_inputs(
    recurrence: Recurrence,
    x_shape: tuple[int, ...],
    B: int,
    H: int,
    dtype: torch.dtype,
    *,
    state: bool = True,
    bias: bool = True,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Random inputs by name, all of which require a gradient; the projection has max(1, H // 3) features."""
    new = partial(leaf, dtype=dtype, device=device)
    G, I = recurrence.gates, x_shape[-1]  # noqa: E741
    P = max(1, H // 3) if recurrence.projected else H
    inputs = {"x": new(*x_shape), "w_ih": new(G * H, I, scale=max(I, 1) ** -0.5)}
    inputs["w_hh"] = new(G * H, P, scale=P**-0.5)
    if recurrence.projected:
        inputs["w_hr"] = new(P, H, scale=H**-0.5)
    if state:
        inputs["h0"] = new(B, P)
        if recurrence.op == "lstm":
            inputs["c0"] = new(B, H)
    if bias:
        inputs |= {"b_ih": new(G * H), "b_hh": new(G * H)}
    return inputs


def padded_inputs(
    recurrence: Recurrence, lengths: list[int], T: int, H: int, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """Inputs of rows of these lengths, with NaN in the padding of x."""
    inputs = recurrence_inputs(recurrence, (T, len(lengths), 5), len(lengths), H, dtype, **options)
    x = inputs["x"].detach()
    for b, n in enumerate(lengths):
        x[n:, b] = float("nan")
    return inputs | {"x": x.requires_grad_()}


def recurrence_functions(recurrence: Recurrence, **options: Any) -> list[Callable[..., tuple[Tensor, ...]]]:
    """The op and its reference, both taking tensors by name and returning (y, h_n) or (y, h_n, c_n)."""

    def bind(module: Any) -> Callable[..., tuple[Tensor, ...]]:
        function = getattr(module, recurrence.op)
        own = {"nonlinearity": recurrence.nonlinearity} if recurrence.nonlinearity else {}

        def run(
            x: Tensor, w_ih: Tensor, w_hh: Tensor, h0: Tensor | None = None, c0: Tensor | None = None, **others: Tensor
        ) -> tuple[Tensor, ...]:
            state = h0 if recurrence.op != "lstm" or h0 is None else (h0, c0)
            return tuple(flatten(function(x, state, w_ih, w_hh, **others, **own, **options)))

        return run

    return [bind(target.ops), bind(target.reference)]


def is_smooth(recurrence: Recurrence, dtype: torch.dtype) -> bool:
    """Whether gradients can be compared where 16-bit states are rounded: that of relu jumps at 0."""
    return recurrence.nonlinearity != "relu" or dtype not in HALF_DTYPES


# ---- checks that run on every device, and on CUDA ops in the emulator


def check_lengths(
    recurrence: Recurrence, lengths: list[int], dtype: torch.dtype, *, state: bool, reverse: bool, device: str = "cpu"
) -> None:
    """Rows of different lengths, some of them empty, with NaN in the padding."""
    function, reference = recurrence_functions(
        recurrence, lengths=torch.tensor(lengths, dtype=torch.int64, device=device), reverse=reverse
    )
    for T, H in ((7, 17), (9, 33)):
        inputs = padded_inputs(recurrence, lengths, T, H, dtype, state=state, device=device)
        compare(recurrence.op, (function, reference), inputs, gradients=is_smooth(recurrence, dtype))


def check_layouts(recurrence: Recurrence, device: str = "cpu") -> None:
    """Gaps, swapped strides, odd alignment and expanded gradients change nothing."""
    contiguous = recurrence_inputs(recurrence, (5, 4, 6), 4, 19, torch.float32, device=device)
    function, _ = recurrence_functions(recurrence)
    expected = function(**contiguous)

    def shifted(t: Tensor) -> Tensor:
        """The same values at an address aligned to one element only."""
        return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)

    for change in (noncontiguous, shifted):
        for a, b in zip(function(**{n: change(t.detach()) for n, t in contiguous.items()}), expected, strict=True):
            assert_close(recurrence.op, a, b)
    y = expected[0]
    from_sum = torch.autograd.grad(y.sum(), contiguous["w_hh"], retain_graph=True)[0]
    transposed = torch.ones(y.shape[2], *y.shape[:2][::-1], device=device).permute(2, 1, 0)
    assert torch.equal(from_sum, torch.autograd.grad(y, contiguous["w_hh"], transposed)[0])


def check_state_shapes(recurrence: Recurrence, *, lengths: list[int] | None = None, device: str = "cpu") -> None:
    """A state [1, B, *], as torch.nn lays out that of one layer, gives the same numbers in that shape."""
    options = {} if lengths is None else {"lengths": torch.tensor(lengths, device=device)}
    inputs = recurrence_inputs(recurrence, (4, 3, 5), 3, 7, torch.float64, device=device)
    function, reference = recurrence_functions(recurrence, **options)
    flat = function(**inputs)
    for name in {"h0", "c0"} & set(inputs):
        inputs[name] = inputs[name].detach()[None].requires_grad_()
    compare(recurrence.op, (function, reference), inputs)
    y, *last = function(**inputs)
    assert torch.equal(y, flat[0])
    for a, b in zip(last, flat[1:], strict=True):
        assert torch.equal(a, b[None])


# ---- arguments for torch.library.opcheck


def recurrence_opcheck_cases() -> list[tuple[str, tuple[object, ...]]]:
    """(op, arguments) of rnn, gru and lstm: optional arguments given and absent, packed rows, wanted gradients."""
    cases: list[tuple[str, tuple[object, ...]]] = []
    sizes = torch.tensor([2, 1, 1])
    T, B, I, H = 3, 2, 4, 5  # noqa: E741
    for recurrence in (RNN, GRU, LSTM, PROJECTED):
        op, lstm = recurrence.op, recurrence.op == "lstm"

        def forward(
            inputs: dict[str, Tensor],
            batch_sizes: Tensor | None = None,
            reverse: bool = False,
            nonlinearity: str = "tanh",
            op: str = op,
            lstm: bool = lstm,
        ) -> tuple[str, tuple[object, ...]]:
            names = ["x", "h0", *(["c0"] if lstm else []), "w_ih", "w_hh", "b_ih", "b_hh", *(["w_hr"] if lstm else [])]
            tensors = [inputs.get(name) for name in names]
            mode = [nonlinearity] if op == "rnn" else []
            needs_autograd = any(t is not None and t.requires_grad for t in tensors)
            flags = [reverse, False, *([] if op == "rnn" else [needs_autograd])]
            return f"{op}_forward", (*tensors, batch_sizes, None, *mode, *flags)

        def backward(
            inputs: dict[str, Tensor],
            grads: list[Tensor | None],
            needs: list[bool],
            reverse: bool = False,
            nonlinearity: str = "tanh",
            recurrence: Recurrence = recurrence,
            lstm: bool = lstm,
        ) -> tuple[str, tuple[object, ...]]:
            names = ["x", "h0", *(["c0"] if lstm else []), "w_ih", "w_hh", *(["w_hr"] if lstm else [])]
            tensors = [None if name not in inputs else inputs[name].detach() for name in names]
            y = torch.randn(T, B, inputs["w_hh"].shape[1], dtype=torch.float64)
            blocks = {"rnn": 0, "gru": 4, "lstm": 6 if recurrence.projected else 5}[recurrence.op]
            saved = [torch.randn(T * B, blocks * H, dtype=torch.float64)] if blocks else []
            mode = [nonlinearity] if recurrence.op == "rnn" else []
            return f"{recurrence.op}_backward", (
                *grads,
                *tensors,
                y,
                *saved,
                None,
                None,
                *mode,
                reverse,
                False,
                *needs,
            )

        full = recurrence_inputs(recurrence, (T, B, I), B, H, torch.float64)
        bare = recurrence_inputs(recurrence, (T, B, I), B, H, torch.float64, state=False, bias=False)
        packed = recurrence_inputs(recurrence, (4, I), B, H, torch.float64)
        of_layer = full | {n: full[n].detach()[None].requires_grad_() for n in ("h0", "c0") if n in full}
        last = [full[name].detach() for name in ("h0", "c0") if name in full]
        y = torch.randn(T, B, full["w_hh"].shape[1], dtype=torch.float64)
        count = 6 + 2 * lstm
        cases += [
            forward(full),
            forward(bare, reverse=True, nonlinearity="relu"),
            forward(of_layer, nonlinearity="sigmoid"),
            forward(packed, sizes),
            forward({name: t.detach() for name, t in full.items()}),
            backward(full, [y, *last], [True] * count),
            backward(bare, [y, *([None] * len(last))], [False, True] * (count // 2), True, "relu"),
        ]
    return cases
