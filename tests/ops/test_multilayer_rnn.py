"""ops.multilayer_rnn, with and without autograd, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparison import assert_all_close, assert_same_bits, check_gradients, compare, in_double
from support.devices import every_device, num_threads
from support.multilayer import (
    check_both_directions,
    evaluated,
    multilayer_functions,
    multilayer_inputs,
    state_of,
    weights_of,
    with_input_projections,
)
from support.pairwise import parametrize_pairwise
from support.recurrences import ARCHITECTURES, GRU, LSTM, PROJECTED, RECURRENCES, RNN, Recurrence
from support.tolerances import ALL_DTYPES, DTYPES, HALF_DTYPES
from torch import Tensor

from llm_ext import ops
from llm_ext.ops.packing import pack_lengths

# Steps too small to share (one thread per recurrence: whole pieces of a wavefront, and a rest), larger steps, empty.
SIZES = [  # T, B, I, H, layers
    (100, 1, 5, 33, 2),
    (64, 2, 17, 20, 3),
    (130, 1, 3, 64, 5),
    (33, 3, 4, 7, 2),
    (20, 40, 9, 33, 2),
    (9, 2, 5, 300, 2),
    (1, 1, 8, 16, 2),
    (0, 2, 3, 4, 2),
    (5, 0, 3, 4, 2),
]
every_recurrence = pytest.mark.parametrize("recurrence", RECURRENCES, ids=str)
every_architecture = pytest.mark.parametrize("recurrence", ARCHITECTURES, ids=str)
FLAGS = (False, True)
# The fused op of inference has no projection of the output; input projections need it.
WITHOUT_PROJECTION = [r for r in RECURRENCES if not r.projected]


def compare_evaluated(
    recurrence: Recurrence, inputs: dict[str, Tensor], expected: dict[str, Tensor], **options: Any
) -> None:
    """The fused path of inference against the reference; in 16 bits, against the layers one by one.

    Between layers 16-bit numbers are rounded, which a float64 reference does not do.
    """
    actual = multilayer_functions(recurrence, **options)[0](**evaluated(inputs))
    assert not any(t.requires_grad for t in actual)
    options.pop("input_projections", None)
    function, reference = multilayer_functions(recurrence, **options)
    if inputs["w_hh_0"].dtype in HALF_DTYPES:
        assert_all_close(recurrence.op, actual, function(**expected))
    else:
        assert_all_close(recurrence.op, actual, reference(**in_double(expected)))


@parametrize_pairwise(
    sizes=SIZES,
    recurrence=RECURRENCES,
    dtype=ALL_DTYPES,
    bidirectional=FLAGS,
    bias=FLAGS,
    state=FLAGS,
)
def test_inference(
    sizes: tuple[int, ...], recurrence: Recurrence, dtype: torch.dtype, bidirectional: bool, bias: bool, state: bool
) -> None:
    T, B, I, H, layers = sizes  # noqa: E741
    inputs = multilayer_inputs(
        recurrence, (T, B, I), B, H, dtype, layers=layers, bidirectional=bidirectional, state=state, bias=bias
    )
    compare_evaluated(recurrence, inputs, inputs, bidirectional=bidirectional)


@every_recurrence
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (70, 12, 20, 70, 3))),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("bidirectional", "bias", "state")}),
)
@settings(max_examples=20)
def test_inference_of_any_size(recurrence: Recurrence, sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    T, B, I, H, layers = sizes  # noqa: E741
    if recurrence.projected:
        H += 1  # P < H
    inputs = multilayer_inputs(recurrence, (T, B, I), B, H, torch.float64, layers=layers, **options)
    compare_evaluated(recurrence, inputs, inputs, bidirectional=options["bidirectional"])


@every_device
@parametrize_pairwise(
    lambda rows, state, **_: state or rows != "packed",  # packed rows need a state
    recurrence=RECURRENCES,
    layers=(1, 2, 3),
    bidirectional=FLAGS,
    bias=FLAGS,
    state=FLAGS,
    rows=("whole", "packed", "lengths"),
    dtype=DTYPES,
)
def test_training(
    recurrence: Recurrence,
    layers: int,
    bidirectional: bool,
    bias: bool,
    state: bool,
    rows: str,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Results and gradients; dropout is off."""
    options: dict[str, Any] = {"bidirectional": bidirectional}
    x_shape: tuple[int, ...] = (7, 4, 5)
    if rows == "packed":
        x_shape, options["batch_sizes"] = (11, 5), torch.tensor([4, 3, 3, 1])
    elif rows == "lengths":
        options["lengths"] = torch.tensor([3, 0, 7, 1], device=device)
    inputs = multilayer_inputs(
        recurrence,
        x_shape,
        4,
        6,
        dtype,
        layers=layers,
        bidirectional=bidirectional,
        state=state,
        bias=bias,
        device=device,
    )
    compare(recurrence.op, multilayer_functions(recurrence, **options), inputs)


@every_device
@parametrize_pairwise(
    lambda rows, state, **_: state or rows != "packed",
    recurrence=RECURRENCES,
    rows=("whole", "packed", "lengths"),
    bias=FLAGS,
    state=FLAGS,
)
def test_both_directions(recurrence: Recurrence, rows: str, bias: bool, state: bool, device: str) -> None:
    check_both_directions(recurrence, rows, bias=bias, state=state, device=device)


@parametrize_pairwise(sizes=SIZES, dtype=ALL_DTYPES, recurrence=WITHOUT_PROJECTION, bidirectional=FLAGS, bias=FLAGS)
def test_input_projections(
    sizes: tuple[int, ...], dtype: torch.dtype, recurrence: Recurrence, bidirectional: bool, bias: bool
) -> None:
    """Ids that index projected inputs give the results of the rows they stand for."""
    T, B, I, H, layers = sizes  # noqa: E741
    if dtype in HALF_DTYPES:
        layers = 1  # projections are rounded once more than the reference's
    inputs = multilayer_inputs(
        recurrence, (T, B, I), B, H, torch.float64, layers=layers, bidirectional=bidirectional, bias=bias
    )
    if recurrence.nonlinearity == "relu" and dtype in HALF_DTYPES:
        T = min(T, 8)  # its state grows, and the error with it
    ids = torch.randint(9, (T, B))
    given, looked_up, projections = with_input_projections(inputs, ids, 9, bidirectional=bidirectional)
    if dtype in HALF_DTYPES:
        # The reference reads the rounded projections.
        projections = [p.to(dtype) for p in projections]
        given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()}
        _, reference = multilayer_functions(
            recurrence, bidirectional=bidirectional, input_projections=in_double(projections)
        )
        expected = reference(**in_double(given))
    else:
        projections = [p.to(dtype) for p in projections]
        given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()}
        expected = multilayer_functions(recurrence, bidirectional=bidirectional)[1](**in_double(looked_up))
    function, _ = multilayer_functions(recurrence, bidirectional=bidirectional, input_projections=projections)
    assert_all_close(recurrence.op, function(**evaluated(given)), expected)


@parametrize_pairwise(
    lambda recurrence, state, looked_up, **_: not recurrence.projected or (state and not looked_up),
    lengths=([9, 9, 4, 1], [1], [130, 70], [40] * 20 + [39] * 15 + [3]),
    recurrence=RECURRENCES,
    dtype=ALL_DTYPES,
    bidirectional=FLAGS,
    bias=FLAGS,
    state=FLAGS,
    looked_up=FLAGS,
)
def test_packed_inference(
    lengths: list[int],
    recurrence: Recurrence,
    dtype: torch.dtype,
    bidirectional: bool,
    bias: bool,
    state: bool,
    looked_up: bool,
) -> None:
    packing = pack_lengths(torch.tensor(lengths), lengths[0])
    N = sum(lengths)
    inputs = multilayer_inputs(
        recurrence,
        (N, 5),
        len(lengths),
        33,
        dtype,
        layers=2,
        bidirectional=bidirectional,
        bias=bias,
        state=state,
    )
    options: dict[str, Any] = {"bidirectional": bidirectional, "batch_sizes": packing.batch_sizes}
    zeros = {} if state else {"h0": torch.zeros(2 + 2 * bidirectional, len(lengths), 33, dtype=dtype)}
    if recurrence.op == "lstm" and zeros:
        zeros["c0"] = zeros["h0"]
    expected = inputs | zeros  # layer by layer, packed rows need a state
    if looked_up and dtype not in HALF_DTYPES:
        ids = torch.randint(9, (N,))
        inputs, expected, projections = with_input_projections(inputs, ids, 9, bidirectional=bidirectional)
        expected |= zeros
        options["input_projections"] = projections
    compare_evaluated(recurrence, inputs, expected, **options)


@pytest.mark.parametrize(
    ("recurrence", "looked_up"), [*((r, False) for r in ARCHITECTURES), *((r, True) for r in (RNN, GRU, LSTM))], ids=str
)
def test_lengths_in_inference(recurrence: Recurrence, looked_up: bool) -> None:
    """Lengths, unsorted and some of them 0, with NaN in the padding."""
    lengths = torch.tensor([3, 0, 7, 1])
    inputs = multilayer_inputs(recurrence, (7, 4, 5), 4, 33, torch.float64, layers=2, bidirectional=True)
    options: dict[str, Any] = {"bidirectional": True, "lengths": lengths}
    expected = inputs
    if looked_up:
        inputs, expected, projections = with_input_projections(inputs, torch.randint(9, (7, 4)), 9, bidirectional=True)
        options["input_projections"] = projections
    else:
        padding = torch.arange(7)[:, None] >= lengths
        inputs = inputs | {"x": inputs["x"].detach().masked_fill(padding[..., None], float("nan"))}
    compare_evaluated(recurrence, inputs, expected, **options)


def test_packed_rows_of_no_steps() -> None:
    inputs = evaluated(multilayer_inputs(GRU, (0, 5), 3, 4, torch.float32))
    none = torch.zeros(0, dtype=torch.int64)
    y, (h_n,) = ops.multilayer_rnn("GRU", inputs["x"], state_of(inputs), weights_of(inputs), batch_sizes=none)
    assert y.shape == (0, 4)
    assert torch.equal(h_n, inputs["h0"])
    with pytest.raises(ValueError, match="h0 must be given with batch_sizes"):
        ops.multilayer_rnn("GRU", inputs["x"], None, weights_of(inputs), batch_sizes=none)


@every_architecture
@pytest.mark.parametrize("bidirectional", FLAGS)
def test_dropout_between_layers(recurrence: Recurrence, bidirectional: bool) -> None:
    """Applied whenever it is positive, to the input of every layer but the first, as torch.nn draws it."""
    inputs = multilayer_inputs(recurrence, (6, 3, 4), 3, 8, torch.float64, layers=3, bidirectional=bidirectional)
    functions = multilayer_functions(recurrence, bidirectional=bidirectional, dropout=0.4)
    for tensors in (inputs, evaluated(inputs)):
        results = []
        for function in functions:
            torch.manual_seed(5)
            results.append(function(**tensors))
        assert_all_close(recurrence.op, results[0], results[1])
    assert not torch.equal(functions[0](**inputs)[0], functions[0](**inputs)[0])
    one_layer = multilayer_inputs(recurrence, (6, 3, 4), 3, 8, torch.float64)
    function = multilayer_functions(recurrence, dropout=0.4)[0]
    assert_same_bits(function(**one_layer), function(**one_layer))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("bidirectional", FLAGS)
def test_threads(threads: int, bidirectional: bool) -> None:
    for recurrence, layers in ((RNN, 1), (GRU, 2), (LSTM, 7)):
        inputs = evaluated(
            multilayer_inputs(recurrence, (90, 1, 6), 1, 40, torch.float32, layers=layers, bidirectional=bidirectional)
        )
        function, reference = multilayer_functions(recurrence, bidirectional=bidirectional)
        with num_threads(threads):
            results = [function(**inputs) for _ in range(3)]
        for again in results[1:]:
            assert_same_bits(results[0], again)
        assert_all_close(recurrence.op, results[0], reference(**in_double(inputs)))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_threads_round_no_state_of_16_bits(dtype: torch.dtype) -> None:
    """Cell states that grow by less than half a unit in the last place in a piece of a wavefront still add up."""
    T, H, start = 640, 40, 64.0
    step = start * torch.finfo(dtype).eps / 32 / 3
    zeros, bias = torch.zeros(4 * H, H, dtype=dtype), torch.zeros(4 * H, dtype=dtype)
    bias[H : 2 * H], bias[2 * H : 3 * H] = 20, 2 * step  # the forget gate is 1, the input gate 1/2
    state = torch.zeros(2, 1, H, dtype=dtype), torch.full((2, 1, H), start, dtype=dtype)
    with num_threads(2), torch.no_grad():
        _, (_, c_n) = ops.multilayer_rnn(
            "LSTM", zeros[:1, None].expand(T, 1, H), state, [(zeros, zeros, bias, 0 * bias)] * 2
        )
    torch.testing.assert_close(c_n, torch.full_like(c_n, start + T * step))


def test_changed_weights_are_noticed() -> None:
    inputs = evaluated(multilayer_inputs(GRU, (90, 1, 6), 1, 40, torch.float32, layers=2))
    function, reference = multilayer_functions(GRU)
    for _ in range(3):  # from the second call on, packed weights are cached
        function(**inputs)
    inputs["w_hh_1"][3, 4] += 1
    assert_all_close("gru", function(**inputs), reference(**in_double(inputs)))


@pytest.mark.parametrize("recurrence", [GRU, PROJECTED], ids=str)
def test_gradcheck(recurrence: Recurrence) -> None:
    inputs = multilayer_inputs(recurrence, (3, 2, 2), 2, 3, torch.float64, layers=2, bidirectional=True)
    check_gradients(multilayer_functions(recurrence, bidirectional=True)[0], inputs)


def test_fused_op_has_no_derivative() -> None:
    """Called directly, which ops.multilayer_rnn never does where autograd records."""
    inputs = multilayer_inputs(RNN, (3, 1, 2), 1, 4, torch.float32, layers=2)
    weights = [t for row in weights_of(inputs) for t in row]
    arguments: tuple[Any, ...] = ("RNN_TANH", inputs["x"], None, None, weights, True, False, [], None, False)
    y = torch.ops.llm_ext.multilayer_rnn_forward(*arguments)[0]
    with pytest.raises(RuntimeError, match="no derivative; it is for inference"):
        torch.autograd.backward(y.sum())


IDS = torch.full((3, 2), 2)
Z = torch.zeros


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mode": "elman"}, ValueError, "mode must be one of"),
        ({"x": Z(3, 2)}, ValueError, r"x must be \[T, B, I\]"),
        ({"x": Z(3, 2, 5)}, ValueError, r"\[3 H, I\] = \[\*, 5\]|x must be .* got \[3, 2, 5\]"),
        ({"x": Z(3, 2, 3, dtype=torch.float64)}, TypeError, "must be float64, got float32|x must be float32"),
        ({"x": Z(3, 2, 3, dtype=torch.int64)}, TypeError, "x must be float32"),
        ({"state": (Z(1, 2, 4),)}, ValueError, r"h0 must be \[.*\] = \[2, 2, 4\], got \[1, 2, 4\]"),
        ({"state": (Z(2, 2, 4), Z(2, 2, 4))}, ValueError, "state must|c0 belongs to an LSTM"),
        ({"weights": []}, ValueError, "weights must"),
        ({"bidirectional": True, "weights": "one row", "state": None}, ValueError, "weights must"),
        ({"weights": "narrow"}, ValueError, r"must be \[3 H, H\] = \[12, 4\], got \[12, 3\]"),
        ({"batch_sizes": torch.tensor([2, 2, 2])}, ValueError, r"x must be \[N, I\] = \[\*, \S+\], got \[3, 2, 3\]"),
        (
            {"batch_sizes": torch.tensor([2, 3, 1]), "x": Z(6, 3)},
            ValueError,
            r"batch_sizes must be positive and never rise, got \[2, 3, 1\]",
        ),
        (
            {"batch_sizes": torch.tensor([2, 2]), "x": Z(6, 3)},
            ValueError,
            "batch_sizes must sum to the rows of x, 6, got 4",
        ),
        ({"input_projections": [Z(7, 12)]}, ValueError, r"x must be \[T, B\] = \[\*, \*\], got \[3, 2, 3\]"),
        ({"input_projections": [Z(7, 12)], "x": IDS * 1.0}, TypeError, "x must be int64, got float32"),
        (
            {"input_projections": [Z(7, 12)] * 2, "x": IDS},
            ValueError,
            "input_projections must be 1, one per direction, got 2",
        ),
        (
            {"input_projections": [Z(7, 11)], "x": IDS},
            ValueError,
            r"input_projections\[0\] must be \[V, 3 H\] = \[(\*|7), 12\]",
        ),
        ({"input_projections": [Z(7, 12).double()], "x": IDS}, TypeError, "must be float(64|32)"),
        ({"input_projections": [Z(2, 12)], "x": IDS}, IndexError, "ids must be from 0 to V - 1 = 1, got 2 to 2"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = evaluated(multilayer_inputs(GRU, (3, 2, 3), 2, 4, torch.float32, layers=2))
    weights = weights_of(inputs)
    whole: dict[str, Any] = {"mode": "GRU", "x": inputs["x"], "state": state_of(inputs), "weights": weights}
    if changes.get("weights") == "one row":
        changes = changes | {"weights": weights[:1]}
    if changes.get("weights") == "narrow":
        w_ih, w_hh, *biases = weights[1]
        changes = changes | {"weights": [weights[0], (w_ih, w_hh[:, :3], *biases)]}
    ops.multilayer_rnn(**whole)
    with pytest.raises(error, match=message):
        ops.multilayer_rnn(**whole | changes)


def test_projections_of_several_sizes_are_refused() -> None:
    """Each layer fits the one below, but there is no state [R, B, P] of all."""
    w_ih, w_hh, w_hr = Z(16, 3), Z(16, 3), Z(3, 4)
    weights = [(w_ih, w_hh, w_hr), (w_ih, w_hh[:, :2], w_hr[:2])]
    with pytest.raises(ValueError, match=r"weights\[1\]\[0\] must be \[4 H, I\]"):
        ops.multilayer_rnn("LSTM", Z(5, 2, 3), None, weights)


def test_ids_of_either_integer_dtype() -> None:
    """int32 ids give what int64 ids give."""
    weights = torch.nn.GRU(3, 4, num_layers=2).all_weights
    ids, projection = torch.randint(7, (5, 2)), torch.randn(7, 12)
    with torch.no_grad():
        results = [
            ops.multilayer_rnn("GRU", x, None, weights, input_projections=[projection])
            for x in (ids, ids.to(torch.int32))
        ]
    assert_same_bits(results[0], results[1])


@pytest.mark.parametrize("gradients", [False, True])
def test_states_that_are_no_tensors(gradients: bool) -> None:
    x, weights = torch.randn(5, 2, 3), torch.nn.LSTM(3, 4, num_layers=2).all_weights
    with torch.set_grad_enabled(gradients), pytest.raises(TypeError, match="c0"):
        ops.multilayer_rnn("LSTM", x, (torch.zeros(2, 2, 4), None), weights)  # type: ignore[arg-type]
