"""Padded sequences with a length each: the ops against the reference, the layers against torch.nn on packed ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Any

import pytest
import torch
from cases import DTYPES, HALF_DTYPES, assert_close, flatten
from hypothesis import assume, given
from hypothesis import strategies as st
from recurrences import CELLS, KINDS, RNN, Cell, cell_functions, cell_inputs, compare, every_device
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import llm_ext
from llm_ext import ops, reference

every_kind = pytest.mark.parametrize("cell", KINDS, ids=str)
# In no order, with rows that have no steps, all of them, and the same number.
LENGTHS = [3, 0, 7, 1, 7, 0, 4]


def padded(cell: Cell, lengths: list[int], T: int, H: int, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Inputs with NaN in the padding of x."""
    inputs = cell_inputs(cell, (T, len(lengths), 5), len(lengths), H, dtype, **options)
    x = inputs["x"].detach()
    for b, n in enumerate(lengths):
        x[n:, b] = float("nan")
    return inputs | {"x": x.requires_grad_()}


@every_device
@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES)
def test_lengths(dtype: torch.dtype, state: bool, reverse: bool, cell: Cell, device: str) -> None:
    lengths = torch.tensor(LENGTHS, device=device)
    smooth = cell.nonlinearity != "relu" or dtype not in HALF_DTYPES
    for T, H in ((7, 17), (9, 33)):
        inputs = padded(cell, LENGTHS, T, H, dtype, state=state, device=device)
        compare(cell.op, *cell_functions(cell, lengths=lengths, reverse=reverse), inputs, gradients=smooth)


@given(
    cell=st.sampled_from(CELLS),
    lengths=st.lists(st.integers(0, 9), min_size=0, max_size=12),
    extra=st.integers(0, 3),
    H=st.integers(1, 40),
    reverse=st.booleans(),
    state=st.booleans(),
)
def test_any_lengths(cell: Cell, lengths: list[int], extra: int, H: int, reverse: bool, state: bool) -> None:
    assume(H > 1 or not cell.projected)  # nothing is smaller than 1
    T = max(lengths, default=0) + extra
    inputs = padded(cell, lengths, T, H, torch.float64, state=state)
    options = {"lengths": torch.tensor(lengths, dtype=torch.int64), "reverse": reverse}
    compare(cell.op, *cell_functions(cell, **options), inputs)


@every_device
@every_kind
def test_the_state_of_a_layer_keeps_its_shape(cell: Cell, device: str) -> None:
    inputs = padded(cell, [2, 0, 4], 4, 6, torch.float64, device=device)
    for name in {"h0", "c0"} & set(inputs):
        inputs[name] = inputs[name].detach()[None].requires_grad_()
    compare(cell.op, *cell_functions(cell, lengths=torch.tensor([2, 0, 4], device=device)), inputs)


@every_device
@every_kind
def test_whole_rows_are_no_special_case(cell: Cell, device: str) -> None:
    inputs = cell_inputs(cell, (5, 3, 4), 3, 6, torch.float64, device=device)
    whole = cell_functions(cell)[0](**inputs)
    for a, b in zip(
        cell_functions(cell, lengths=torch.tensor([5] * 3, device=device))[0](**inputs), whole, strict=True
    ):
        assert_close(cell.op, a, b)


def layers(kind: str, device: str, **options: Any) -> tuple[Any, Any]:
    """Our layer, and torch's in float64 on the CPU with the same weights."""
    ours = getattr(llm_ext, kind)(4, 6, dtype=torch.float64, device=device, **options)
    theirs = getattr(torch.nn, kind)(4, 6, dtype=torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@every_device
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_layers_are_those_of_torch_on_packed_rows(
    kind: str, bidirectional: bool, num_layers: int, batch_first: bool, state: bool, device: str
) -> None:
    options: dict[str, Any] = {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first}
    if kind == "LSTM" and batch_first:
        options["proj_size"] = 3
    ours, theirs = layers(kind, device, **options)
    lengths = torch.tensor([4, 7, 1, 7, 2])
    x = torch.randn(5, 7, 4, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    rows = num_layers * (1 + bidirectional)
    sizes = [options.get("proj_size", 6), 6] if kind == "LSTM" else [6]
    given = [torch.randn(rows, 5, size, dtype=torch.float64) for size in sizes]

    def run(layer: Any, device: str, packed: bool) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [t.detach().to(device).requires_grad_() for t in (x, *given)]
        hx = tuple(leaves[1:]) if kind == "LSTM" else leaves[1]
        states = [hx] if state else []
        if packed:
            rows = pack_padded_sequence(leaves[0], lengths, batch_first, enforce_sorted=False)
            y, last = layer(rows, *states)
            y, _ = pad_packed_sequence(y, batch_first, total_length=7)
        else:
            y, last = layer(leaves[0], *states, lengths=lengths.to(device))
        outputs = flatten((y, last))
        loss = sum(
            (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=device).view(t.shape)).sum() for t in outputs
        )
        wanted = [*leaves[: None if state else 1], *layer.parameters()]
        return outputs, list(torch.autograd.grad(loss, wanted))

    outputs, gradients = run(ours, device, packed=False)
    true_outputs, true_gradients = run(theirs, "cpu", packed=True)
    for a, b in zip(outputs, true_outputs, strict=True):
        assert_close(kind.lower(), a.cpu(), b)
    for a, b in zip(gradients, true_gradients, strict=True):
        assert_close(f"{kind.lower()}_backward", a.cpu(), b)
    with torch.no_grad():
        hx = (tuple if kind == "LSTM" else itemgetter(0))([part.to(device) for part in given])
        evaluated = ours(x.to(device), *([hx] if state else []), lengths=lengths.to(device))
        for a, b in zip(flatten(evaluated), outputs, strict=True):
            assert_close(kind.lower(), a, b)


@every_device
@pytest.mark.parametrize("cell", ["tanh", "relu", "sigmoid", "gru", "lstm"])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("rows", ["whole", "packed", "lengths"])
@pytest.mark.parametrize(("bias", "state"), [(True, True), (False, True), (True, False)])
def test_both_directions(cell: str, projected: bool, rows: str, bias: bool, state: bool, device: str) -> None:
    if projected and cell != "lstm":
        pytest.skip("only an LSTM projects")
    if rows == "packed" and not state:
        pytest.skip("packed rows need a state")
    kind = (
        Cell(cell, {"gru": 3, "lstm": 4}[cell], None, projected)
        if cell in ("gru", "lstm")
        else RNN._replace(nonlinearity=cell)
    )
    options: dict[str, Any] = {}
    x_shape: tuple[int, ...] = (7, 4, 5)
    if rows == "packed":
        x_shape, options = (11, 5), {"batch_sizes": torch.tensor([4, 3, 3, 1])}
    elif rows == "lengths":
        options = {"lengths": torch.tensor([3, 0, 7, 1], device=device)}
    both = [cell_inputs(kind, x_shape, 4, 6, torch.float64, bias=bias, device=device) for _ in range(2)]
    names = [name for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr") if name in both[0]]
    inputs = {"x": both[0]["x"], **{f"{name}_{d}": both[d][name] for d in range(2) for name in names}}
    for name in ("h0", "c0"):
        if name in both[0] and state:
            inputs[name] = torch.stack([part[name].detach() for part in both]).requires_grad_()

    def function(
        x: Tensor, h0: Tensor | None = None, c0: Tensor | None = None, **weights: Tensor
    ) -> tuple[Tensor, ...]:
        y, h_n, c_n = ops.bidirectional(cell, x, h0, c0, list(weights.values()), bias=bias, **options)
        return (y, h_n, c_n) if cell == "lstm" else (y, h_n)

    def truth(x: Tensor, h0: Tensor | None = None, c0: Tensor | None = None, **weights: Tensor) -> tuple[Tensor, ...]:
        ends = []
        for d in range(2):
            own = {name: weights[f"{name}_{d}"] for name in names}
            first = {name: part[d] for name, part in (("h0", h0), ("c0", c0)) if part is not None}
            ends.append(cell_functions(kind, reverse=d == 1, **options)[1](x, **own, **first))
        ys, *states = zip(*ends, strict=True)
        return torch.cat(ys, -1), *map(torch.stack, states)

    compare(kind.op, function, truth, inputs)


@every_kind
@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([1, 4]), ValueError, r"lengths must be from 0 to T = 3, got \[1, 4\]"),
        (torch.tensor([-1, 2]), ValueError, r"lengths must be from 0 to T = 3"),
        (torch.tensor([1, 2, 3]), ValueError, r"lengths must be \[B\] = \[2\], got \[3\]"),
        (torch.tensor([1, 2], dtype=torch.int32), TypeError, "lengths must be int64"),
        (torch.tensor([1, 2], device="meta"), ValueError, "lengths must be on cpu like x"),
    ],
)
def test_lengths_are_checked(lengths: Tensor, error: type[Exception], message: str, cell: Cell) -> None:
    inputs = cell_inputs(cell, (3, 2, 4), 2, 5, torch.float32)
    with pytest.raises(error, match=f"{cell.op}: {message}"):
        cell_functions(cell, lengths=lengths)[0](**inputs)


def test_lengths_belong_to_a_padded_batch() -> None:
    layer, lengths = llm_ext.GRU(4, 5), torch.tensor([2, 1])
    rows = pack_padded_sequence(torch.randn(2, 2, 4), lengths)
    with pytest.raises(ValueError, match="GRU: lengths belong to a Tensor"):
        layer(rows, lengths=lengths)
    with pytest.raises(ValueError, match="GRU: lengths belong to a batch"):
        layer(torch.randn(2, 4), lengths=lengths)
    w = torch.randn(15, 4), torch.randn(15, 5)
    with pytest.raises(ValueError, match="gru: lengths belong to a padded x"):
        ops.gru(rows.data, torch.zeros(2, 5), *w, batch_sizes=rows.batch_sizes, lengths=lengths)


def test_reference_is_each_row_alone() -> None:
    for cell in CELLS:
        for reverse in (False, True):
            inputs = {name: t.detach() for name, t in padded(cell, LENGTHS, 8, 5, torch.float64).items()}
            _, truth = cell_functions(cell, lengths=torch.tensor(LENGTHS), reverse=reverse)
            _, alone = cell_functions(cell, reverse=reverse)
            y, *last = truth(**inputs)
            for b, n in enumerate(LENGTHS):
                own = inputs | {"x": inputs["x"][:n, b : b + 1]}
                own |= {name: inputs[name][b : b + 1] for name in ("h0", "c0") if name in inputs}
                y_b, *last_b = alone(**own)
                assert_close(cell.op, y[:n, b], y_b[:, 0])
                assert y[n:, b].eq(0).all()
                for part, part_b in zip(last, last_b, strict=True):
                    assert_close(cell.op, part[b], part_b[0])


def test_gradcheck() -> None:
    lengths = torch.tensor([2, 0, 4])
    for cell in KINDS:
        inputs = cell_inputs(cell, (4, 3, 2), 3, 4, torch.float64)
        for function in cell_functions(cell, lengths=lengths):
            names = list(inputs)
            assert torch.autograd.gradcheck(
                lambda *t, f=function, n=names: f(**dict(zip(n, t, strict=True))), tuple(inputs.values())
            )


def test_autocast_with_lengths() -> None:
    layer = llm_ext.LSTM(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, (h_n, c_n) = layer(torch.randn(3, 2, 4), lengths=torch.tensor([3, 0]))
    assert {y.dtype, h_n.dtype, c_n.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_autocast_with_lengths_of_what_was_rounded_before(kind: str) -> None:
    """A second layer reads the output of the first, and a state may come from a linear layer."""
    layer = getattr(llm_ext, kind)(4, 5, num_layers=2, bidirectional=True)
    x, h0 = torch.randn(6, 3, 4).bfloat16(), torch.randn(4, 3, 5).bfloat16()
    lengths = torch.tensor([6, 0, 4])
    hx = (h0, h0.float()) if kind == "LSTM" else h0
    exact = (h0.float(), h0.float()) if kind == "LSTM" else h0.float()
    expected, _ = layer(x.float(), exact, lengths=lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(x, hx, lengths=lengths)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)


class FromReference:
    """`bidirectional_forward` and its backward in plain torch: what an op of a device has to do, on the CPU."""

    def __init__(self, library: torch.library.Library) -> None:
        library.impl("bidirectional_forward", self.forward, "CPU")
        library.impl("bidirectional_backward", self.backward, "CPU")

    @staticmethod
    def run(cell: str, x: Tensor, h0: Any, c0: Any, weights: list[Tensor], bias: bool, **options: Any) -> list[Tensor]:
        each, ends = len(weights) // 2, []
        for d in range(2):
            w_ih, w_hh, *others = weights[d * each : (d + 1) * each]
            b_ih, b_hh = others[:2] if bias else (None, None)
            h, c = (None if part is None else part[d] for part in (h0, c0))
            options["reverse"] = d == 1
            if cell == "lstm":
                w_hr = others[-1] if len(others) % 2 else None
                y, last = reference.lstm(x, None if h is None else (h, c), w_ih, w_hh, b_ih, b_hh, w_hr, **options)
            elif cell == "gru":
                y, last = reference.gru(x, h, w_ih, w_hh, b_ih, b_hh, **options)
            else:
                y, last = reference.rnn(x, h, w_ih, w_hh, b_ih, b_hh, nonlinearity=cell, **options)
            ends.append(flatten((y, last)))
        ys, *states = zip(*ends, strict=True)
        states = [torch.stack(parts) for parts in states]
        return [torch.cat(ys, -1), states[0], states[1] if cell == "lstm" else x.new_empty(0)]

    def forward(
        self,
        cell: str,
        x: Tensor,
        h0: Any,
        c0: Any,
        weights: list[Tensor],
        bias: bool,
        batch_sizes: Any,
        lengths: Any,
        tf32: bool,
        keep: bool,
    ) -> tuple[Tensor, ...]:
        results = self.run(cell, x, h0, c0, weights, bias, batch_sizes=batch_sizes, lengths=lengths)
        P, gates = weights[1].shape[1], {"gru": 3, "lstm": 4}.get(cell, 1)
        blocks = {"gru": 4, "lstm": 5 + (P * gates != len(weights[1]))}.get(cell, 0)
        width = blocks * len(weights[1]) // gates
        rows = 2 * x.shape[:-1].numel() if keep else 0
        return *results, x.new_zeros((rows, width) if blocks else 0)

    def backward(
        self,
        grad_y: Any,
        grad_h_n: Any,
        grad_c_n: Any,
        cell: str,
        x: Tensor,
        h0: Any,
        c0: Any,
        weights: list[Tensor],
        bias: bool,
        y: Tensor,
        kept: Tensor,
        batch_sizes: Any,
        lengths: Any,
        tf32: bool,
        *needs: bool,
    ) -> tuple[Any, ...]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, h0, c0, *weights)]
        given = [t for t in leaves if t is not None]

        def differentiate() -> tuple[Tensor, ...]:
            out = self.run(cell, *leaves[:3], leaves[3:], bias, batch_sizes=batch_sizes, lengths=lengths)
            loss = sum((a * g).sum() for a, g in zip(out, (grad_y, grad_h_n, grad_c_n), strict=True) if g is not None)
            return torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)

        # An op runs below autograd, which its thread cannot be told to forget.
        with ThreadPoolExecutor(1) as other:
            grads = iter(other.submit(differentiate).result())
        all_grads = [x.new_empty(0) if t is None else next(grads) for t in leaves]
        first = [g if need else x.new_empty(0) for g, need in zip(all_grads[:3], needs, strict=False)]
        return *first, [g if needs[3] else x.new_empty(0) for g in all_grads[3:]]


def test_autograd_of_the_op_of_both_directions() -> None:
    """Its fake kernels and its autograd, which have no kernel on the CPU to be tried with, tried with the reference."""
    library = torch.library.Library("llm_ext", "IMPL")
    try:
        FromReference(library)
        op = torch.ops.llm_ext.bidirectional_forward.default
        for cell in KINDS:
            name = cell.nonlinearity or ("tanh" if cell.op == "rnn" else cell.op)
            for lengths in (None, torch.tensor([3, 0])):
                both = [cell_inputs(cell, (3, 2, 4), 2, 5, torch.float64) for _ in range(2)]
                names = [n for n in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr") if n in both[0]]
                x, weights = both[0]["x"], [both[d][n] for d in range(2) for n in names]
                h0 = torch.stack([part["h0"].detach() for part in both]).requires_grad_()
                c0 = h0.new_zeros(2, 2, 5).requires_grad_() if cell.op == "lstm" else None
                arguments = (name, x, h0, c0, weights, True, None, lengths, False, cell.op != "rnn")
                torch.library.opcheck(op, arguments)
                actual = op(*arguments)[: 3 if cell.op == "lstm" else 2]
                expected = ops.bidirectional(name, x, h0, c0, weights, lengths=lengths)[: len(actual)]
                leaves = [t for t in (x, h0, c0, *weights) if t is not None]
                seeds = [torch.randn_like(t) for t in expected]
                pairs = (torch.autograd.grad(actual, leaves, seeds), torch.autograd.grad(expected, leaves, seeds))
                for a, b in zip(*pairs, strict=True):
                    assert_close(f"{cell.op}_backward", a, b)
                # What is frozen gets no gradient.
                op(name, x.detach(), None, None, [t.detach() for t in weights[:-1]] + weights[-1:], *arguments[5:])[
                    0
                ].sum().backward()
                assert weights[-1].grad is not None
    finally:
        library._destroy()
