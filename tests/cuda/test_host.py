"""The CUDA ops of csrc/torch/ops compiled for the CPU: kernels run in the emulator, products on torch's CPU half.

Only a GPU can test the rest: streams, devices, pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import additive_attention as additive
from support import multilayer, pooling, target, tolerances
from support.before_memory import CALLS, assert_refused_without_memory
from support.comparison import assert_close, assert_same_bits, check_wanted_gradients, compare
from support.emulated_ops import NAME, load
from support.inputs import batch_sizes_of
from support.multilayer import check_both_directions, evaluated, multilayer_functions, multilayer_inputs
from support.pairwise import parametrize_pairwise
from support.recurrences import (
    ARCHITECTURES,
    GRU,
    RECURRENCES,
    Recurrence,
    check_layouts,
    check_lengths,
    check_state_shapes,
    is_smooth,
    recurrence_functions,
    recurrence_inputs,
)
from support.tolerances import ALL_DTYPES, DTYPES, HALF_DTYPES

FLAGS = (False, True)
every_architecture = pytest.mark.parametrize("recurrence", ARCHITECTURES, ids=str)
# T, B, I, H; even H has a plan for other kernels, which this device refuses.
SIZES = [(0, 2, 3, 4), (3, 0, 3, 4), (1, 1, 1, 1), (2, 3, 5, 7), (5, 9, 6, 17), (4, 3, 0, 5), (3, 2, 4, 16)]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(tmp_path_factory.mktemp("package"))


@pytest.fixture(autouse=True)
def _target(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "ops", emulated)
    monkeypatch.setitem(tolerances.TOLERANCE_ON, "cpu", tolerances.TOLERANCE_ON["cuda"])


@parametrize_pairwise(recurrence=RECURRENCES, dtype=ALL_DTYPES, sizes=SIZES, reverse=FLAGS, given=FLAGS)
def test_recurrence(
    recurrence: Recurrence, dtype: torch.dtype, sizes: tuple[int, int, int, int], reverse: bool, given: bool
) -> None:
    T, B, I, H = sizes  # noqa: E741
    if recurrence.projected and H == 1:
        pytest.skip("a projection has fewer features than H")
    inputs = recurrence_inputs(recurrence, (T, B, I), B, H, dtype, state=given, bias=given)
    functions = recurrence_functions(recurrence, reverse=reverse)
    compare(recurrence.op, functions, inputs, gradients=is_smooth(recurrence, dtype))


@parametrize_pairwise(
    recurrence=ARCHITECTURES,
    dtype=ALL_DTYPES,
    sizes=[(1,), (3, 3, 2, 1), (9, 5, 5, 2, 1, 1)],
    reverse=FLAGS,
)
def test_packed(recurrence: Recurrence, dtype: torch.dtype, sizes: tuple[int, ...], reverse: bool) -> None:
    inputs = recurrence_inputs(recurrence, (sum(sizes), 6), sizes[0], 17, dtype)
    functions = recurrence_functions(recurrence, batch_sizes=torch.tensor(sizes), reverse=reverse)
    compare(recurrence.op, functions, inputs)


@parametrize_pairwise(recurrence=RECURRENCES, dtype=ALL_DTYPES, state=FLAGS, reverse=FLAGS)
def test_lengths(recurrence: Recurrence, dtype: torch.dtype, state: bool, reverse: bool) -> None:
    check_lengths(recurrence, [3, 0, 7, 1], dtype, state=state, reverse=reverse)


@parametrize_pairwise(
    lambda rows, state, **_: state or rows != "packed",
    recurrence=RECURRENCES,
    rows=("whole", "packed", "lengths"),
    bias=FLAGS,
    state=FLAGS,
)
def test_both_directions(recurrence: Recurrence, rows: str, bias: bool, state: bool) -> None:
    check_both_directions(recurrence, rows, bias=bias, state=state)


@parametrize_pairwise(
    recurrence=[r for r in RECURRENCES if not r.projected],
    sizes=[(4, 3, 5, 7, 3), (4, 3, 5, 7, 2), (0, 2, 3, 4, 2)],
    bidirectional=FLAGS,
    state=FLAGS,
)
def test_multilayer_rnn(
    recurrence: Recurrence, sizes: tuple[int, int, int, int, int], bidirectional: bool, state: bool
) -> None:
    """Inference, all layers in one op call, and with autograd layer by layer."""
    T, B, I, H, layers = sizes  # noqa: E741
    inputs = multilayer_inputs(
        recurrence, (T, B, I), B, H, torch.float64, layers=layers, bidirectional=bidirectional, state=state
    )
    functions = multilayer_functions(recurrence, bidirectional=bidirectional)
    compare(recurrence.op, functions, evaluated(inputs), gradients=False)
    compare(recurrence.op, functions, inputs)


@parametrize_pairwise(recurrence=ARCHITECTURES, rows=("whole", "packed", "lengths"), layers=(1, 2))
def test_resets_and_all_states(recurrence: Recurrence, rows: str, layers: int) -> None:
    """The pieces between resets run as packed rows; the states after every step come from the saved activations.

    The gradients of the latter come from ops that CUDA does not have.
    """
    options: dict[str, Any] = {}
    x_shape: tuple[int, ...] = (6, 4, 3)
    if rows == "packed":
        x_shape, options["batch_sizes"] = (14, 3), batch_sizes_of([6, 5, 2, 1])
    elif rows == "lengths":
        options["lengths"] = torch.tensor([3, 0, 6, 1])
    options["reset"] = torch.rand(x_shape[:-1]) < 0.3
    inputs = multilayer_inputs(recurrence, x_shape, 4, 17, torch.float64, layers=layers)
    compare(recurrence.op, multilayer_functions(recurrence, **options), inputs)
    functions = multilayer_functions(recurrence, **options, return_all_states=True)
    compare(recurrence.op, functions, evaluated(inputs), gradients=False)


@every_architecture
def test_wanted_gradients(recurrence: Recurrence) -> None:
    inputs = recurrence_inputs(recurrence, (3, 2, 4), 2, 5, torch.float64)
    check_wanted_gradients(recurrence_functions(recurrence)[0], inputs)


@every_architecture
def test_layouts(recurrence: Recurrence) -> None:
    check_layouts(recurrence)
    check_state_shapes(recurrence)
    check_state_shapes(recurrence, lengths=[4, 0, 2])


@pytest.mark.parametrize(("name", "gates", "blocks"), [("gru", 3, 4), ("lstm", 4, 5)])
def test_inference_saves_nothing(name: str, gates: int, blocks: int) -> None:
    states = [None] * (2 if name == "lstm" else 1)
    others = [None] * (3 if name == "lstm" else 2)  # biases, and a projection
    weights = torch.randn(gates * 5, 4), torch.randn(gates * 5, 5)
    for needs_autograd in FLAGS:
        op = getattr(getattr(torch.ops, NAME), f"{name}_forward")
        saved = op(torch.randn(3, 2, 4), *states, *weights, *others, None, None, False, False, needs_autograd)[-1]
        assert saved.shape == (6 if needs_autograd else 0, blocks * 5)


# The other checks depend on Python alone, and are made in tests/ops/test_opcheck.py.
CHECKS_OF_CPP = ("test_schema", "test_faketensor")


def opcheck_cases() -> list[tuple[str, tuple[object, ...]]]:
    return [*pooling.pool_opcheck_cases(), *additive.additive_opcheck_cases()]


@pytest.mark.parametrize(("op", "arguments"), opcheck_cases(), ids=lambda a: a if isinstance(a, str) else "")
def test_opcheck(op: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(getattr(torch.ops, NAME), op).default, arguments, test_utils=CHECKS_OF_CPP)


@pytest.mark.parametrize("mode", ["RNN_TANH", "GRU", "LSTM"])
@pytest.mark.parametrize("given", FLAGS)
def test_opcheck_of_both_directions(mode: str, given: bool) -> None:
    recurrence = next(r for r in ARCHITECTURES if r.mode == mode and not r.projected)
    inputs = multilayer_inputs(recurrence, (3, 2, 4), 2, 5, torch.float64, bidirectional=True, state=given, bias=given)
    weights = [w for row in multilayer.weights_of(inputs) for w in row]
    h0, c0 = (*(multilayer.state_of(inputs) or ()), None, None)[:2]
    ops = getattr(torch.ops, NAME)
    saves = mode != "RNN_TANH"
    arguments = (mode, inputs["x"], h0, c0, weights, given, None, torch.tensor([3, 3]), False, saves)
    torch.library.opcheck(ops.bidirectional_forward.default, arguments, test_utils=CHECKS_OF_CPP)
    y, h_n, c_n, saved = (t.detach() for t in ops.bidirectional_forward(*arguments))
    plain = [None if t is None else t.detach() for t in (inputs["x"], h0, c0)]
    grads = y, h_n, c_n if mode == "LSTM" else None
    for needs in ([True] * 4, [False] * 4):
        backward = (*grads, mode, *plain, [w.detach() for w in weights], given, y, saved, *arguments[6:9], *needs)
        torch.library.opcheck(ops.bidirectional_backward.default, backward, test_utils=CHECKS_OF_CPP)


# Empty, one, odd, whole packs, and several chunks of time.
POOL_SIZES = [
    (0, 4, 5),
    (2, 0, 5),
    (3, 4, 0),
    (1, 1, 1),
    (3, 5, 7),
    (2, 9, 64),
    (4, 17, 136),
    (1, 130, 33),
    (1, 140, 40),
]


@parametrize_pairwise(sizes=POOL_SIZES, dtype=ALL_DTYPES, prefix=FLAGS)
def test_pool(sizes: tuple[int, int, int], dtype: torch.dtype, prefix: bool) -> None:
    pooling.check_pool(*sizes, dtype, prefix)


@pytest.mark.parametrize("prefix", FLAGS)
def test_pool_layouts_and_masks(prefix: bool) -> None:
    pooling.check_time_major(torch.float32, prefix)
    pooling.check_time_major(torch.bfloat16, prefix)
    pooling.check_layouts(torch.float32, prefix)
    pooling.check_masked_positions(prefix)


@parametrize_pairwise(folded=FLAGS, dtype=HALF_DTYPES, prefix=FLAGS)
def test_pool_precision(folded: bool, dtype: torch.dtype, prefix: bool) -> None:
    pooling.check_precision(20, 70, 24, folded, dtype, prefix)


def test_pool_extremes() -> None:
    pooling.check_empty_rows()
    pooling.check_infinite_scores()
    pooling.check_scores_of_any_size(False)
    pooling.check_scores_of_any_size(True)
    for rise in (50.0, 70.0, 500.0):
        pooling.check_large_scores(rise)


@parametrize_pairwise(sizes=additive.SIZES, dtype=ALL_DTYPES, kind=additive.SELECTIONS)
def test_additive_attention(sizes: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    additive.check_reference(sizes, dtype, kind)


def test_additive_attention_extremes() -> None:
    """Layouts, masked garbage, NaN and infinity, empty rows, queries and keys that cancel."""
    additive.check_layouts()
    additive.check_empty_rows()
    for value in (float("nan"), float("inf"), -float("inf")):
        additive.check_nan_and_infinity(value)
        additive.check_masked_keys(abs(value))
    for dtype in DTYPES:
        additive.check_cancellation(dtype, 30.0)
    additive.check_scores_of_any_size()


def test_errors(emulated: Any) -> None:
    inputs = recurrence_inputs(GRU, (3, 2, 4), 2, 5, torch.float32)
    function = recurrence_functions(GRU)[0]
    with pytest.raises(ValueError, match=r"gru: w_hh must be \[3 H, H\] = \[15, 5\]"):
        function(**(inputs | {"w_hh": torch.zeros(15, 4)}))
    with pytest.raises(TypeError, match="gru: x must be float32"):
        function(**(inputs | {"x": torch.zeros(3, 2, 4).half()}))
    # Checked in C++ alone.
    with pytest.raises(ValueError, match="gru: batch_sizes must be positive and never rise"):
        recurrence_functions(GRU, batch_sizes=torch.tensor([1, 2]))[0](**(inputs | {"x": torch.zeros(3, 4)}))
    with pytest.raises(RuntimeError, match=r"T, B and H must be below 2\^31 on cuda, got 2147483648"):
        emulated.rnn(torch.zeros(1, 2**31, 0), None, torch.zeros(1, 0), torch.zeros(1, 1))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_checks_come_before_memory(call: Callable[[Any], object]) -> None:
    assert_refused_without_memory(call, getattr(torch.ops, NAME))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["5-3", "3-5"])
@pytest.mark.parametrize("trains", FLAGS)
def test_rows_of_two_sizes(emulated: Any, trains: bool, order: tuple[int, int]) -> None:
    """Two directions or layers of different H: one launch and one result have the sizes of the first."""
    x = torch.randn(3, 2, 4, requires_grad=trains)
    for mode, gates in (("RNN_TANH", 1), ("GRU", 3), ("LSTM", 4)):
        for directions in (2, 1):
            rows = [(torch.randn(gates * H, 4), torch.randn(gates * H, H)) for H in (5, 3)]
            rows = [rows[i] for i in order]
            if directions == 1:
                rows[1] = (torch.randn(len(rows[1][0]), len(rows[0][1][0])), rows[1][1])
            with pytest.raises(ValueError, match=r"multilayer_rnn: weights\["):
                emulated.multilayer_rnn(mode, x, None, rows, bidirectional=directions == 2)
    sizes = [(5, 3), (5, 2)]
    projected = [
        (torch.randn(4 * H, 4), torch.randn(4 * H, P), torch.randn(P, H)) for H, P in (sizes[i] for i in order)
    ]
    with pytest.raises(ValueError, match=r"multilayer_rnn: weights\["):
        emulated.multilayer_rnn("LSTM", x, None, projected, bidirectional=True)


@pytest.mark.parametrize("H", [(5, 3), (3, 5)], ids=str)
def test_backward_of_two_sizes(H: tuple[int, int]) -> None:
    weights = [w for h in H for w in (torch.zeros(3 * h, 4), torch.zeros(3 * h, h))]
    y, saved = torch.zeros(3, 2, 2 * H[0]), torch.zeros(2 * 3 * 2, 4 * H[0])
    options = (None, None, False, True, False, False, True)
    with pytest.raises(RuntimeError, match=rf"both directions must have the same sizes, got H = {H[0]} and {H[1]}"):
        getattr(torch.ops, NAME).bidirectional_backward(
            torch.zeros_like(y), None, None, "GRU", torch.zeros(3, 2, 4), None, None, weights, False, y, saved, *options
        )


def test_errors_leave_the_next_call_intact() -> None:
    """A failed call throws after some of its arguments were checked, copied and allocated."""
    for recurrence in ARCHITECTURES:
        inputs = recurrence_inputs(recurrence, (5, 3, 4), 3, 7, torch.float32)
        function = recurrence_functions(recurrence)[0]
        expected = function(**inputs)
        for name, given in inputs.items():
            with pytest.raises((ValueError, RuntimeError)):
                function(**(inputs | {name: torch.zeros(*given.shape, 2)}))
            assert_same_bits(function(**inputs), expected)
        packed = recurrence_inputs(recurrence, (5, 4), 2, 7, torch.float32)
        for sizes in ([2, 3], [2, 0], [3, -1, 3], [2, 1], [5, 1]):
            with pytest.raises(ValueError, match=r"(batch_sizes|h0) must"):
                recurrence_functions(recurrence, batch_sizes=torch.tensor(sizes))[0](**packed)
        right = recurrence_functions(recurrence, batch_sizes=batch_sizes_of([3, 2]))
        compare(recurrence.op, right, packed)


@every_architecture
def test_compiles_whole(recurrence: Recurrence) -> None:
    """One node, with lengths or without; the flag for TF32 is read while compiling."""
    for lengths in (None, torch.tensor([4, 0, 2])):
        inputs = recurrence_inputs(recurrence, (4, 3, 2), 3, 5, torch.float32)
        function, _ = recurrence_functions(recurrence, lengths=lengths)
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = [[*f(**inputs)] for f in (function, compiled)]
        results = [[*t, *torch.autograd.grad(t[0].square().sum(), list(inputs.values()))] for t in results]
        for a, b in zip(*results, strict=True):
            assert_close(f"{recurrence.op}_backward", a, b)
