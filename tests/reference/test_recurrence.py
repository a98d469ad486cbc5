"""The reference recurrences against torch.nn and against the formulas, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.comparison import assert_all_close, assert_close, check_gradients, flatten, outputs_and_gradients
from support.inputs import batch_sizes_of, pack
from support.multilayer import multilayer_functions, multilayer_inputs, weights_of, with_input_projections
from support.pairwise import parametrize_pairwise
from support.recurrences import (
    GRU,
    LSTM,
    PROJECTED,
    RECURRENCES,
    RNN,
    Recurrence,
    padded_inputs,
    recurrence_functions,
    recurrence_inputs,
)
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from llm_ext import reference

F64 = torch.float64
FLAGS = (False, True)
IN_TORCH = [r for r in RECURRENCES if r.nonlinearity != "sigmoid"]
every_recurrence = pytest.mark.parametrize("recurrence", RECURRENCES, ids=str)


def run(recurrence: Recurrence, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    return recurrence_functions(recurrence, **options)[1](**inputs)


def by_torch(
    recurrence: Recurrence, inputs: dict[str, Tensor], x: Tensor | PackedSequence, reverse: bool
) -> list[Tensor]:
    """torch.nn's layer with two directions of the same weights, of which one is returned."""
    H, I = inputs["w_ih"].shape[0] // recurrence.gates, inputs["w_ih"].shape[1]  # noqa: E741
    P = inputs["w_hh"].shape[1]
    options: dict[str, Any] = {"proj_size": P} if recurrence.projected else {}
    if recurrence.nonlinearity is not None:
        options["nonlinearity"] = recurrence.nonlinearity
    layer = getattr(torch.nn, recurrence.layer)(I, H, bias="b_ih" in inputs, bidirectional=True, dtype=F64, **options)
    names = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh", "w_hr": "weight_hr"}
    weights = {name: inputs[short] for short, name in names.items() if short in inputs}
    layer.load_state_dict({f"{name}_l0{end}": w for name, w in weights.items() for end in ("", "_reverse")})
    state = [inputs[name].expand(2, -1, -1) for name in ("h0", "c0") if name in inputs]
    y, last = layer(x, tuple(state) if len(state) == 2 else state[0] if state else None)
    y = y.data if isinstance(y, PackedSequence) else y
    return [y[..., P:] if reverse else y[..., :P], *(t[int(reverse)] for t in flatten(last))]


@parametrize_pairwise(
    lambda sizes, recurrence, **_: sizes[2] > 1 or not recurrence.projected,  # a projection needs P < H
    sizes=((1, 3, 17), (3, 1, 1), (3, 1, 2), (17, 33, 3)),
    recurrence=IN_TORCH,
    T=(1, 17),
    bias=FLAGS,
    state=FLAGS,
    reverse=FLAGS,
)
def test_torch_nn(
    sizes: tuple[int, int, int], recurrence: Recurrence, T: int, bias: bool, state: bool, reverse: bool
) -> None:
    B, I, H = sizes  # noqa: E741
    inputs = recurrence_inputs(recurrence, (T, B, I), B, H, F64, bias=bias, state=state)
    actual = run(recurrence, inputs, reverse=reverse)
    assert_all_close(recurrence.op, actual, by_torch(recurrence, inputs, inputs["x"], reverse))


@parametrize_pairwise(lengths=([1], [5], [4, 4, 1], [7, 5, 5, 2, 1]), recurrence=IN_TORCH, reverse=FLAGS)
def test_packed_torch_nn(lengths: list[int], recurrence: Recurrence, reverse: bool) -> None:
    inputs = recurrence_inputs(recurrence, (max(lengths), len(lengths), 3), len(lengths), 5, F64)
    packed = pack_padded_sequence(inputs["x"], torch.tensor(lengths))
    actual = run(recurrence, inputs | {"x": packed.data}, batch_sizes=packed.batch_sizes, reverse=reverse)
    assert_all_close(recurrence.op, actual, by_torch(recurrence, inputs, packed, reverse))
    # torch unpacks the rows.
    padded, _ = pad_packed_sequence(packed._replace(data=actual[0]))
    for b, length in enumerate(lengths):
        assert torch.equal(actual[1][b], padded[0 if reverse else length - 1, b])


def test_sigmoid_step() -> None:
    recurrence = next(r for r in RECURRENCES if r.nonlinearity == "sigmoid")
    a = recurrence_inputs(recurrence, (1, 3, 4), 3, 5, F64)
    y, h_n = run(recurrence, a)
    z = a["x"][0] @ a["w_ih"].T + a["b_ih"] + a["h0"] @ a["w_hh"].T + a["b_hh"]
    assert_close("rnn", y[0], 1 / (1 + torch.exp(-z)))
    assert torch.equal(h_n, y[0])


@every_recurrence
@pytest.mark.parametrize("reverse", FLAGS)
def test_lengths_are_rows_alone(recurrence: Recurrence, reverse: bool) -> None:
    """Unsorted lengths, empty rows, and NaN in the padding."""
    lengths = [3, 0, 7, 1, 7, 0, 4]
    inputs = {name: t.detach() for name, t in padded_inputs(recurrence, lengths, 8, 5, F64).items()}
    y, *last = run(recurrence, inputs, lengths=torch.tensor(lengths), reverse=reverse)
    for b, n in enumerate(lengths):
        own = inputs | {"x": inputs["x"][:n, b : b + 1]}
        own |= {name: inputs[name][b : b + 1] for name in ("h0", "c0") if name in inputs}
        y_alone, *last_alone = run(recurrence, own, reverse=reverse)
        assert_close(recurrence.op, y[:n, b], y_alone[:, 0])
        assert y[n:, b].eq(0).all()
        for state, alone in zip(last, last_alone, strict=True):
            assert_close(recurrence.op, state[b], alone[0])


@parametrize_pairwise(recurrence=RECURRENCES, rows=("whole", "packed", "lengths"), reverse=FLAGS)
def test_gradcheck(recurrence: Recurrence, rows: str, reverse: bool) -> None:
    inputs = recurrence_inputs(recurrence, (4, 3, 2), 3, 3, F64)
    options: dict[str, Any] = {"reverse": reverse}
    if rows == "packed":
        options["batch_sizes"] = batch_sizes_of([4, 2, 1])
        inputs["x"] = pack(inputs["x"], options["batch_sizes"]).detach().requires_grad_()
    elif rows == "lengths":
        options["lengths"] = torch.tensor([2, 0, 4])
    check_gradients(recurrence_functions(recurrence, **options)[1], inputs)


@parametrize_pairwise(
    recurrence=RECURRENCES, sizes=((0, 3, 4, 5), (3, 0, 4, 5), (0, 0, 4, 5), (3, 2, 0, 5)), state=FLAGS, reverse=FLAGS
)
def test_empty(recurrence: Recurrence, sizes: tuple[int, int, int, int], state: bool, reverse: bool) -> None:
    T, B, I, H = sizes  # noqa: E741
    inputs = {n: t.detach() for n, t in recurrence_inputs(recurrence, (T, B, I), B, H, F64, state=state).items()}
    y, *last = run(recurrence, inputs, reverse=reverse)
    assert y.shape == (T, B, inputs["w_hh"].shape[1])
    assert y.dtype == F64
    if T == 0:
        first = [inputs[name] for name in ("h0", "c0") if name in inputs]
        for end, start in zip(last, first or [torch.zeros_like(t) for t in last], strict=True):
            assert torch.equal(end, start)
            # A new tensor: writing to the result must not change the argument.
            end.fill_(math.nan)
            assert not start.isnan().any()
    outputs_and_gradients(lambda **t: run(recurrence, t, reverse=reverse), inputs)


@every_recurrence
def test_state_of_one_layer(recurrence: Recurrence) -> None:
    """[1, B, H], as torch.nn lays it out, comes back in that shape."""
    inputs = recurrence_inputs(recurrence, (3, 2, 4), 2, 5, F64)
    expected = run(recurrence, inputs)
    y, *last = run(recurrence, inputs | {name: inputs[name][None] for name in ("h0", "c0") if name in inputs})
    assert torch.equal(y, expected[0])
    for state, flat in zip(last, expected[1:], strict=True):
        assert torch.equal(state, flat[None])


@parametrize_pairwise(
    recurrence=[r for r in IN_TORCH if not r.projected] + [PROJECTED],
    layers=(1, 3),
    bidirectional=FLAGS,
    state=FLAGS,
    bias=FLAGS,
    dropout=(0.0, 0.4),
)
def test_multilayer_torch_nn(
    recurrence: Recurrence, layers: int, bidirectional: bool, state: bool, bias: bool, dropout: float
) -> None:
    """All layers, the directions in torch's order, dropout drawn as torch draws it."""
    options: dict[str, Any] = {"proj_size": 2} if recurrence.projected else {}
    if recurrence.nonlinearity is not None:
        options["nonlinearity"] = recurrence.nonlinearity
    if layers > 1:
        options["dropout"] = dropout
    layer = getattr(torch.nn, recurrence.layer)(
        4, 6, layers, bias=bias, bidirectional=bidirectional, dtype=F64, **options
    )
    inputs = multilayer_inputs(
        recurrence, (5, 3, 4), 3, 6, F64, layers=layers, bidirectional=bidirectional, state=state, bias=bias
    )
    for own, theirs in zip(weights_of(inputs), layer.all_weights, strict=True):
        for a, b in zip(own, theirs, strict=True):
            with torch.no_grad():
                b.copy_(a)
    hx = None
    if state:
        hx = (inputs["h0"], inputs["c0"]) if recurrence.op == "lstm" else inputs["h0"]
    torch.manual_seed(3)
    expected = layer(inputs["x"], hx)
    torch.manual_seed(3)
    functions = multilayer_functions(recurrence, bidirectional=bidirectional, dropout=dropout if layers > 1 else 0.0)
    assert_all_close(recurrence.op, functions[1](**inputs), expected)


@pytest.mark.parametrize("recurrence", [RNN, GRU, LSTM], ids=str)
@pytest.mark.parametrize("bidirectional", FLAGS)
def test_input_projections(recurrence: Recurrence, bidirectional: bool) -> None:
    """Ids that index projections are the rows they stand for; w_ih and b_ih of the first layer are ignored."""
    inputs = multilayer_inputs(recurrence, (5, 3, 4), 3, 6, F64, layers=2, bidirectional=bidirectional)
    ids = torch.randint(7, (5, 3))
    given, looked_up, projections = with_input_projections(inputs, ids, 7, bidirectional=bidirectional)
    ignored = {
        name: torch.full_like(t, math.nan)
        for name, t in given.items()
        if name in [f"{weight}_{d}" for weight in ("w_ih", "b_ih") for d in range(1 + bidirectional)]
    }
    options: dict[str, Any] = {"bidirectional": bidirectional}
    expected = multilayer_functions(recurrence, **options)[1](**looked_up)
    actual = multilayer_functions(recurrence, **options, input_projections=projections)[1](**given | ignored)
    assert_all_close(recurrence.op, actual, expected)


def test_multilayer_lengths() -> None:
    inputs = multilayer_inputs(LSTM, (7, 4, 5), 4, 6, F64, layers=2, bidirectional=True)
    lengths = torch.tensor([3, 0, 7, 1])
    y, h_n, c_n = multilayer_functions(LSTM, bidirectional=True, lengths=lengths)[1](**inputs)
    for b, n in enumerate(lengths.tolist()):
        own = inputs | {"x": inputs["x"][:n, b : b + 1]} | {s: inputs[s][:, b : b + 1] for s in ("h0", "c0")}
        alone = multilayer_functions(LSTM, bidirectional=True)[1](**own)
        assert_all_close("lstm", alone, (y[:n, b : b + 1], h_n[:, b : b + 1], c_n[:, b : b + 1]))
        assert not y[n:, b].any()


def test_attention_step_is_its_parts() -> None:
    """A torch.nn.GRU of two layers, attention from its last output, and the output layer."""
    B, K, H, A, D, Tk = 3, 2, 6, 4, 5, 7
    layer = torch.nn.GRU(4, H, 2, dtype=F64)
    x, h0 = torch.randn(1, B * K, 4, dtype=F64), torch.randn(2, B * K, H, dtype=F64)
    w_query, keys, v, values = (torch.randn(*shape, dtype=F64) for shape in ((A, H), (B, Tk, A), (A,), (B, Tk, D)))
    w_out, b_out, lengths = torch.randn(D, H, dtype=F64), torch.randn(D, dtype=F64), torch.tensor([7, 0, 3])
    out, state = reference.attention_step(
        "GRU", x, (h0,), layer.all_weights, w_query, keys, v, values, w_out, b_out, key_lengths=lengths
    )
    y, h_n = layer(x, h0)
    assert_close("model", state[0], h_n)
    for row in range(B * K):
        b = row // K
        n = int(lengths[b])
        scores = torch.tanh(w_query @ y[0, row] + keys[b, :n]) @ v
        context = torch.softmax(scores, 0) @ values[b, :n] if n else torch.zeros(D, dtype=F64)
        assert_close("model", out[row], torch.tanh(w_out @ y[0, row] + b_out + context))
