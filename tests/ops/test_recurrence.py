"""ops.rnn, ops.gru and ops.lstm against the reference: sizes, dtypes, options, layouts, gradients, bits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.comparison import (
    assert_close,
    assert_same_bits,
    check_gradients,
    check_same_bits,
    check_wanted_gradients,
    compare,
)
from support.devices import every_device, num_threads
from support.inputs import batch_sizes_of
from support.pairwise import parametrize_pairwise
from support.recurrences import (
    ARCHITECTURES,
    GRU,
    LSTM,
    PROJECTED,
    RECURRENCES,
    RNN,
    Recurrence,
    check_layouts,
    check_state_shapes,
    is_smooth,
    recurrence_functions,
    recurrence_inputs,
)
from support.tolerances import ALL_DTYPES, DTYPES, HALF_DTYPES
from torch import Tensor

import llm_ext
from llm_ext import ops

every_recurrence = pytest.mark.parametrize("recurrence", RECURRENCES, ids=str)
every_architecture = pytest.mark.parametrize("recurrence", ARCHITECTURES, ids=str)

# One above MR (6), a vector (16) and a panel (64), whose last panel is 1, 2 or 3 vectors wide; the most rows that take
# the unpacked path (16), and one more.
SIZES = [  # T, B, I, H
    (0, 2, 3, 4),
    (3, 0, 3, 4),
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (1, 5, 9, 20),
    (5, 3, 17, 33),
    (7, 9, 4, 65),
    (4, 13, 64, 128),
    (9, 40, 33, 130),
    (3, 1, 300, 520),
    (150, 2, 31, 47),
    (16, 1, 9, 20),
    (17, 1, 9, 20),
    (2, 16, 9, 20),
    (2, 17, 9, 20),
]


def has_projection_room(recurrence: Recurrence, H: int) -> bool:
    """A projection needs P < H."""
    return H > 1 or not recurrence.projected


def gradients_comparable(recurrence: Recurrence, dtype: torch.dtype, device: str) -> bool:
    """The gradient of relu jumps at 0; where states are rounded, rounding may move one across."""
    rounds_states = device == "cuda" or (dtype == torch.bfloat16 and llm_ext.build_info()["isa"] == "avx512_bf16")
    return is_smooth(recurrence, dtype) or not rounds_states


@every_device
@parametrize_pairwise(
    lambda sizes, recurrence, **_: has_projection_room(recurrence, sizes[3]),
    sizes=SIZES,
    recurrence=RECURRENCES,
    dtype=ALL_DTYPES,
    reverse=(False, True),
    state=(True, False),
    bias=(True, False),
)
def test_reference(
    sizes: tuple[int, int, int, int],
    recurrence: Recurrence,
    dtype: torch.dtype,
    reverse: bool,
    state: bool,
    bias: bool,
    device: str,
) -> None:
    T, B, I, H = sizes  # noqa: E741
    inputs = recurrence_inputs(recurrence, (T, B, I), B, H, dtype, state=state, bias=bias, device=device)
    functions = recurrence_functions(recurrence, reverse=reverse)
    compare(recurrence.op, functions, inputs, gradients=gradients_comparable(recurrence, dtype, device))


@every_recurrence
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 24), st.integers(0, 70), st.integers(2, 140)),
    dtype=st.sampled_from(DTYPES),
    options=st.fixed_dictionaries({"state": st.booleans(), "bias": st.booleans()}),
    reverse=st.booleans(),
)
@settings(max_examples=25)
def test_any_size(
    recurrence: Recurrence, sizes: tuple[int, int, int, int], dtype: torch.dtype, options: Any, reverse: bool
) -> None:
    T, B, I, H = sizes  # noqa: E741
    inputs = recurrence_inputs(recurrence, (T, B, I), B, H, dtype, **options)
    compare(recurrence.op, recurrence_functions(recurrence, reverse=reverse), inputs)


@every_device
@parametrize_pairwise(
    batch_sizes=([1], [3, 3, 2, 1], [9, 5, 5, 2, 1, 1], [20] * 3, [30, 11, 7, 7, 7, 1], [2] * 40 + [1] * 60),
    recurrence=ARCHITECTURES,
    dtype=ALL_DTYPES,
    reverse=(False, True),
    features=((6, 33), (20, 140)),
)
def test_packed(
    batch_sizes: list[int],
    recurrence: Recurrence,
    dtype: torch.dtype,
    reverse: bool,
    features: tuple[int, int],
    device: str,
) -> None:
    I, H = features  # noqa: E741
    inputs = recurrence_inputs(recurrence, (sum(batch_sizes), I), batch_sizes[0], H, dtype, device=device)
    functions = recurrence_functions(recurrence, batch_sizes=torch.tensor(batch_sizes), reverse=reverse)
    compare(recurrence.op, functions, inputs)


@every_recurrence
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    features=st.tuples(st.integers(1, 70), st.integers(1, 140)),
    reverse=st.booleans(),
)
@settings(max_examples=15)
def test_any_packed(recurrence: Recurrence, lengths: list[int], features: tuple[int, int], reverse: bool) -> None:
    I, H = features  # noqa: E741
    assume(has_projection_room(recurrence, H))
    inputs = recurrence_inputs(recurrence, (sum(lengths), I), len(lengths), H, torch.float64)
    sizes = batch_sizes_of(sorted(lengths, reverse=True))
    compare(recurrence.op, recurrence_functions(recurrence, batch_sizes=sizes, reverse=reverse), inputs)


@every_device
@every_architecture
def test_inference_saves_no_activations(recurrence: Recurrence, device: str) -> None:
    """Without autograd the result is the same, bit by bit: one step, a few, and several blocks of steps."""
    inputs: dict[str, Tensor] = {}
    for T, B, H in ((1, 1, 20), (3, 4, 20), (50, 9, 20), (7, 40, 400)):
        inputs = recurrence_inputs(recurrence, (T, B, 6), B, H, torch.float32, device=device)
        function, _ = recurrence_functions(recurrence)
        recorded = function(**inputs)
        with torch.no_grad():
            assert_same_bits(function(**inputs), recorded)
    if recurrence.op != "rnn":
        op = getattr(torch.ops.llm_ext, f"{recurrence.op}_forward")
        names = ("x", "h0", "c0", "w_ih", "w_hh") if recurrence.op == "lstm" else ("x", "h0", "w_ih", "w_hh")
        optional = [None, None, *([inputs.get("w_hr")] if recurrence.op == "lstm" else []), None, None]
        for needs_autograd, rows in ((False, 0), (True, 7 * 40)):
            results = op(*(inputs[name] for name in names), *optional, False, False, needs_autograd)
            assert len(results[-1]) == rows


@every_device
@pytest.mark.parametrize(("recurrence", "blocks"), [(RNN, 0), (GRU, 4), (LSTM, 5), (PROJECTED, 6)], ids=str)
def test_saved_tensors(recurrence: Recurrence, blocks: int, device: str) -> None:
    """Autograd saves inputs, outputs and, for the gated cells, `blocks` of H numbers a row."""
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    inputs = recurrence_inputs(recurrence, (6, 3, 4), 3, 5, torch.float32, device=device)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        y = recurrence_functions(recurrence)[0](**inputs)[0]
    known = {t.data_ptr() for t in (*inputs.values(), y)}
    others = [t for t in saved if t.data_ptr() not in known]
    assert sum(t.numel() for t in others) == 6 * 3 * 5 * blocks


@every_device
@every_architecture
def test_state_of_one_layer(recurrence: Recurrence, device: str) -> None:
    check_state_shapes(recurrence, device=device)


@every_device
@pytest.mark.parametrize(
    ("recurrence", "dtype"),
    [
        *((r, torch.float32) for r in ARCHITECTURES),
        *((LSTM, d) for d in (torch.float64, *HALF_DTYPES)),
        (GRU, torch.bfloat16),
        (RNN, torch.float16),
    ],
    ids=str,
)
def test_errors_do_not_accumulate(recurrence: Recurrence, dtype: torch.dtype, device: str) -> None:
    """The tolerance of a short sequence holds for 1,024 steps."""
    inputs = recurrence_inputs(recurrence, (1024, 2, 16), 2, 64, dtype, device=device)
    compare(recurrence.op, recurrence_functions(recurrence), inputs)


@every_device
@parametrize_pairwise(recurrence=ARCHITECTURES, dtype=ALL_DTYPES, reverse=(False, True))
def test_many_blocks(recurrence: Recurrence, dtype: torch.dtype, reverse: bool, device: str) -> None:
    """Every matrix product has more than one block in each dimension.

    The Elman cell uses tanh: of 270,000 pre-activations one may round to the other sign, where the gradient of relu
    jumps.
    """
    inputs = recurrence_inputs(recurrence, (7, 64, 530), 64, 610, dtype, device=device)
    compare(recurrence.op, recurrence_functions(recurrence, reverse=reverse), inputs)


@every_architecture
@pytest.mark.parametrize("reverse", [False, True])
def test_a_step_of_several_blocks(recurrence: Recurrence, reverse: bool) -> None:
    """A step has more rows than a block of the weight gradients, or of the pre-activations."""
    sizes = torch.tensor([450, 450, 401, 3])
    inputs = recurrence_inputs(recurrence, (int(sizes.sum()), 3), 450, 5, torch.float32)
    compare(recurrence.op, recurrence_functions(recurrence, batch_sizes=sizes, reverse=reverse), inputs)
    H = 920 if recurrence.op == "gru" else 690
    inputs = recurrence_inputs(recurrence, (2, 230, 3), 230, H, torch.bfloat16)
    compare(recurrence.op, recurrence_functions(recurrence, reverse=reverse), inputs, gradients=False)


@every_device
@every_architecture
def test_layouts(recurrence: Recurrence, device: str) -> None:
    check_layouts(recurrence, device)


@every_device
@every_architecture
def test_only_wanted_gradients(recurrence: Recurrence, device: str) -> None:
    inputs = recurrence_inputs(recurrence, (3, 2, 4), 2, 5, torch.float64, device=device)
    check_wanted_gradients(recurrence_functions(recurrence)[0], inputs)


@every_device
@every_architecture
def test_gradients_of_one_result_alone(recurrence: Recurrence, device: str) -> None:
    """A result that the loss does not use has no gradient, which the backward op receives as None."""
    inputs = recurrence_inputs(recurrence, (4, 3, 2), 3, 5, torch.float64, device=device)
    function, reference = recurrence_functions(recurrence)
    for i in range(len(function(**inputs))):
        gradients = [torch.autograd.grad(f(**inputs)[i].sum(), list(inputs.values())) for f in (function, reference)]
        for name, a, b in zip(inputs, *gradients, strict=True):
            assert_close(f"{recurrence.op}_backward", a, b, f"gradient of {name}")


@every_device
@every_architecture
def test_bias_gradients_are_separate_tensors(recurrence: Recurrence, device: str) -> None:
    """Scaling one gradient in place must not scale the other."""
    inputs = recurrence_inputs(recurrence, (3, 2, 4), 2, 5, torch.float32, state=False, device=device)
    torch.autograd.backward(recurrence_functions(recurrence)[0](**inputs)[0].sum())
    a, b = inputs["b_ih"].grad, inputs["b_hh"].grad
    assert a is not None
    assert b is not None
    assert torch.equal(a, b) == (recurrence.op != "gru")
    assert a.data_ptr() != b.data_ptr()


@every_device
@every_recurrence
def test_nan_propagates(recurrence: Recurrence, device: str) -> None:
    inputs = recurrence_inputs(recurrence, (3, 2, 4), 2, 5, torch.float32, device=device)
    inputs = {name: t.detach() for name, t in inputs.items()}
    inputs["x"][1, 0, 2] = float("nan")
    y, *last = recurrence_functions(recurrence)[0](**inputs)
    assert y[0].isfinite().all()
    assert y[1:, 0].isnan().all()
    assert y[:, 1].isfinite().all()
    for state in last:
        assert state[0].isnan().all()
        assert state[1].isfinite().all()


def test_saturation() -> None:
    """Large inputs saturate and never exceed the bound."""
    z = torch.tensor([0.0, 1e-8, -1e-8, 1.0, 9.0, -9.0, 20.0, -20.0, 90.0, -90.0, 800.0, -800.0, 1e30, -1e30])
    for dtype, function in itertools.product(DTYPES, (torch.tanh, torch.sigmoid)):
        x, one, zero = z.to(dtype)[None, :, None], torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
        y, _ = ops.rnn(x, None, one, zero, nonlinearity=function.__name__)
        assert_close("rnn", y, function(x.double()))
        assert y.abs().max() <= 1


@pytest.mark.parametrize("recurrence", [r for r in RECURRENCES if r.nonlinearity != "relu"], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(recurrence: Recurrence, reverse: bool) -> None:
    inputs = recurrence_inputs(recurrence, (4, 3, 2), 3, 5, torch.float64)
    check_gradients(recurrence_functions(recurrence, reverse=reverse)[0], inputs)


@every_architecture
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads(threads: int, recurrence: Recurrence) -> None:
    """More threads than cores, rows or columns: the same results within rounding, and the same bits when repeated."""
    with num_threads(threads):
        for T, B, I, H in ((40, 1, 64, 192), (20, 7, 64, 192), (6, 40, 33, 130), (1, 1, 700, 520)):  # noqa: E741
            inputs = recurrence_inputs(recurrence, (T, B, I), B, H, torch.float64)
            compare(recurrence.op, recurrence_functions(recurrence), inputs)
            first, second = (recurrence_functions(recurrence)[0](**inputs) for _ in range(2))
            assert_same_bits(first, second)


@every_architecture
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits(threads: int, recurrence: Recurrence) -> None:
    with num_threads(threads):
        check_same_bits(
            recurrence_functions(recurrence)[0], recurrence_inputs(recurrence, (30, 9, 40), 9, 150, torch.float32)
        )


# ---- argument errors

Z = torch.zeros


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": Z(3, 2)}, ValueError, r"rnn: x must be \[T, B, I\]"),
        ({"x": Z(3, 2, 5)}, ValueError, r"rnn: x must be \[T, B, I\] = \[\*, \*, 4\], got \[3, 2, 5\]"),
        ({"h0": Z(2, 6)}, ValueError, r"rnn: h0 must be \[B, H\] = \[2, 5\], got \[2, 6\]"),
        ({"w_hh": Z(5, 4)}, ValueError, "rnn: w_hh must be"),
        ({"b_ih": Z(4)}, ValueError, "rnn: b_ih must be"),
        ({"x": Z(3, 2, 4, dtype=torch.int64)}, TypeError, "rnn: x must be float32"),
        ({"x": Z(3, 2, 4, dtype=torch.float64)}, TypeError, "rnn: x must be float32"),
        ({"x": Z(3, 2, 4, device="meta")}, ValueError, "rnn: .* must be on"),
        ({"x": None}, TypeError, "rnn: x must be a Tensor"),
        ({"nonlinearity": "gelu"}, ValueError, "rnn: nonlinearity must be one of tanh, relu, sigmoid, got 'gelu'"),
    ],
)
def test_rnn_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": Z(3, 2, 4),
        "h0": Z(2, 5),
        "w_ih": Z(5, 4),
        "w_hh": Z(5, 5),
        "b_ih": Z(5),
        "b_hh": Z(5),
    }
    with pytest.raises(error, match=message):
        ops.rnn(**arguments | changes)


@pytest.mark.parametrize(
    ("op", "changes", "error", "message"),
    [
        ("gru", {"w_ih": Z(16, 4)}, ValueError, r"gru: w_ih must be \[3 H, I\], got \[16, 4\]"),
        ("gru", {"w_hh": Z(20, 5)}, ValueError, r"gru: w_hh must be \[3 H, H\] = \[15, 5\], got"),
        ("gru", {"state": Z(3, 5)}, ValueError, r"gru: h0 must be \[B, H\] = \[2, 5\], got"),
        ("gru", {"b_hh": Z(5)}, ValueError, r"gru: b_hh must be \[3 H\] = \[15\], got \[5\]"),
        ("gru", {"x": Z(3, 2, 4).half()}, TypeError, "gru: x must be float32"),
        ("lstm", {"w_ih": Z(18, 4)}, ValueError, r"lstm: w_ih must be \[4 H, I\]"),
        ("lstm", {"state": (Z(2, 5), Z(2, 4))}, ValueError, r"lstm: c0 must be \[B, H\] = \[2, 5\], got \[2, 4\]"),
        ("lstm", {"state": (Z(2, 5), None)}, ValueError, "lstm: h0 and c0 must be given together"),
        ("lstm", {"w_hr": Z(5, 5)}, ValueError, r"lstm: w_hr must be \[P, H\] with P < H"),
        ("lstm", {"w_hr": Z(3, 4)}, ValueError, r"lstm: w_hr must be \[P, H\] = \[\*, 5\]"),
        ("lstm", {"w_hr": Z(3, 5)}, ValueError, r"lstm: w_hh must be \[4 H, P\] = \[20, 3\], got \[20, 5\]"),
        ("lstm", {"w_hr": Z(3, 5), "w_hh": Z(20, 3)}, ValueError, r"lstm: h0 must be \[B, P\] = \[2, 3\]"),
    ],
)
def test_gated_cells_refuse(op: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    rows, state = (15, Z(2, 5)) if op == "gru" else (20, (Z(2, 5), Z(2, 5)))
    arguments: dict[str, Any] = {
        "x": Z(3, 2, 4),
        "state": state,
        "w_ih": Z(rows, 4),
        "w_hh": Z(rows, 5),
        "b_ih": Z(rows),
        "b_hh": Z(rows),
    }
    arguments |= changes
    with pytest.raises(error, match=message):
        getattr(ops, op)(arguments.pop("x"), arguments.pop("state"), **arguments)


@every_device
@pytest.mark.parametrize("recurrence", [RNN, GRU, LSTM], ids=str)
@pytest.mark.parametrize("sizes", [[2, 3], [2, 0], [3, -1, 3], [2, 1], [5, 1]])
def test_batch_sizes_are_checked(sizes: list[int], recurrence: Recurrence, device: str) -> None:
    inputs = recurrence_inputs(recurrence, (5, 4), 2, 5, torch.float32, device=device)
    with pytest.raises(ValueError, match=rf"{recurrence.op}: (batch_sizes|h0) must"):
        recurrence_functions(recurrence, batch_sizes=torch.tensor(sizes))[0](**inputs)
