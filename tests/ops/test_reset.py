"""Resets inside a sequence: the ops against the reference, a loop over steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparison import assert_all_close, assert_close, assert_same_bits, check_gradients, compare, flatten
from support.devices import every_device
from support.inputs import batch_sizes_of, leaf
from support.multilayer import evaluated, multilayer_inputs, state_of, weights_of, with_input_projections
from support.pairwise import parametrize_pairwise
from support.recurrences import (
    ARCHITECTURES,
    GRU,
    LSTM,
    RECURRENCES,
    Recurrence,
    is_smooth,
    recurrence_functions,
    recurrence_inputs,
)
from support.tolerances import ALL_DTYPES, HALF_DTYPES
from torch import Tensor, func
from torch.autograd import forward_ad

from llm_ext import ops, reference
from llm_ext.ops.packing import pack_pieces

every_architecture = pytest.mark.parametrize("recurrence", ARCHITECTURES, ids=str)
T, B = 7, 5
# Unsorted, with an empty row and whole ones.
LENGTHS = [3, 0, 7, 1, 7]


def functions(recurrence: Recurrence, **options: Any) -> list[Callable[..., tuple[Tensor, ...]]]:
    """ops.multilayer_rnn and its reference, of tensors by name; to_h and to_c are `reset_to`."""

    def bind(module: Any) -> Callable[..., tuple[Tensor, ...]]:
        def run(to_h: Tensor | None = None, to_c: Tensor | None = None, **inputs: Tensor) -> tuple[Tensor, ...]:
            to = tuple(tensor for tensor in (to_h, to_c) if tensor is not None) or None
            weights, state = weights_of(inputs), state_of(inputs)
            found = module.multilayer_rnn(recurrence.mode, inputs["x"], state, weights, reset_to=to, **options)
            return tuple(flatten(found))

        return run

    return [bind(ops), bind(reference)]


def add_reset_to(inputs: dict[str, Tensor], recurrence: Recurrence, rows: int) -> dict[str, Tensor]:
    """The inputs with a state for resets that has this many rows, 0 for none."""
    sizes = {"to_h": inputs["w_hh_0"].shape[1], "to_c": len(inputs["w_hh_0"]) // 4}
    R = len(weights_of(inputs))
    names = () if rows == 0 else ("to_h", "to_c") if recurrence.op == "lstm" else ("to_h",)
    x = inputs["x"]
    return inputs | {name: leaf(R, rows, sizes[name], dtype=x.dtype, device=x.device.type) for name in names}


@every_device
@parametrize_pairwise(
    recurrence=RECURRENCES,
    layers=(1, 2, 3),
    rows=("whole", "lengths", "packed"),
    share=(0.0, 0.3, 1.0),
    reset_to=(0, 1, B),
    dtype=ALL_DTYPES,
    training=(True, False),
    state=(True, False),
)
def test_reference(
    recurrence: Recurrence,
    layers: int,
    rows: str,
    share: float,
    reset_to: int,
    dtype: torch.dtype,
    training: bool,
    state: bool,
    device: str,
) -> None:
    options: dict[str, Any] = {}
    x_shape: tuple[int, ...] = (T, B, 3)
    if rows == "lengths":
        options["lengths"] = torch.tensor(LENGTHS, device=device)
    elif rows == "packed":
        options["batch_sizes"] = batch_sizes_of([7, 7, 4, 3, 1])
        x_shape = (22, 3)
    options["reset"] = torch.rand(x_shape[:-1], device=device) < share
    inputs = multilayer_inputs(recurrence, x_shape, B, 17, dtype, layers=layers, state=state, device=device)
    if state is False and rows == "packed":  # which needs one
        inputs = multilayer_inputs(recurrence, x_shape, B, 17, dtype, layers=layers, device=device)
    inputs = add_reset_to(inputs, recurrence, reset_to)
    if rows == "lengths":
        padding = torch.arange(T)[:, None] >= torch.tensor(LENGTHS)
        inputs["x"] = inputs["x"].detach().masked_fill(padding[..., None].to(device), float("nan")).requires_grad_()
    compare(
        recurrence.op,
        functions(recurrence, **options),
        inputs if training else evaluated(inputs),
        gradients=is_smooth(recurrence, dtype),
    )


@every_architecture
@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=0, max_size=8),
    extra=st.integers(0, 2),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
    layers=st.integers(1, 2),
    packed=st.booleans(),
)
def test_any_resets(
    recurrence: Recurrence, lengths: list[int], extra: int, share: float, seed: int, layers: int, packed: bool
) -> None:
    torch.manual_seed(seed)
    steps = max(lengths, default=0) + extra
    x_shape: tuple[int, ...] = (steps, len(lengths), 2)
    options: dict[str, Any] = {"lengths": torch.tensor(lengths, dtype=torch.int64)}
    if packed and any(lengths):
        lengths = sorted((n for n in lengths if n > 0), reverse=True)
        x_shape, options = (sum(lengths), 2), {"batch_sizes": batch_sizes_of(lengths)}
    options["reset"] = torch.rand(x_shape[:-1]) < share
    inputs = multilayer_inputs(recurrence, x_shape, len(lengths), 4, torch.float64, layers=layers)
    compare(recurrence.op, functions(recurrence, **options), add_reset_to(inputs, recurrence, len(lengths)))


@every_device
@parametrize_pairwise(
    recurrence=RECURRENCES, state_dims=(0, 2, 3), to_shape=((4,), (1,), (1, 4), (1, 1)), lengths=(True, False)
)
def test_one_direction(
    recurrence: Recurrence, state_dims: int, to_shape: tuple[int, ...], lengths: bool, device: str
) -> None:
    """States of one layer may be [B, *] or [1, B, *], each as it likes; the new state has the form of the given one."""
    inputs = recurrence_inputs(recurrence, (5, 4, 3), 4, 6, torch.float64, state=state_dims > 0, device=device)
    for name in {"h0", "c0"} & set(inputs) if state_dims == 3 else ():
        inputs[name] = inputs[name].detach()[None].requires_grad_()
    inputs["to_h"] = leaf(*to_shape, inputs["w_hh"].shape[1], dtype=torch.float64, device=device)
    if recurrence.op == "lstm":
        inputs["to_c"] = leaf(*to_shape, 6, dtype=torch.float64, device=device)
    options: dict[str, Any] = {"reset": torch.rand(5, 4, device=device) < 0.4}
    if lengths:
        options["lengths"] = torch.tensor([5, 0, 3, 1], device=device)

    def bind(i: int) -> Callable[..., tuple[Tensor, ...]]:
        def run(to_h: Tensor, to_c: Tensor | None = None, **others: Tensor) -> tuple[Tensor, ...]:
            to = to_h if to_c is None else (to_h, to_c)
            return recurrence_functions(recurrence, reset_to=to, **options)[i](**others)

        return run

    compare(recurrence.op, (bind(0), bind(1)), inputs)


@every_architecture
def test_gradcheck(recurrence: Recurrence) -> None:
    inputs = multilayer_inputs(recurrence, (4, 3, 2), 3, 4, torch.float64, layers=2)
    reset = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 1], [1, 0, 0]]).bool()
    function, _ = functions(recurrence, reset=reset, lengths=torch.tensor([4, 2, 3]))
    check_gradients(function, add_reset_to(inputs, recurrence, 3))


def test_input_projections() -> None:
    """Ids in place of x, in inference."""
    inputs = evaluated(multilayer_inputs(LSTM, (T, B, 3), B, 4, torch.float64, layers=2))
    ids = torch.randint(0, 6, (T, B))
    with_ids, with_rows, projections = with_input_projections(inputs, ids, 6)
    reset = torch.rand(T, B) < 0.3
    found = functions(LSTM, reset=reset, input_projections=projections)[0](**with_ids)
    assert_all_close("lstm", found, functions(LSTM, reset=reset)[1](**with_rows))


@every_architecture
def test_no_reset_takes_the_ordinary_path(recurrence: Recurrence) -> None:
    """No reset, or none within the lengths: the bits of a call without."""
    inputs = multilayer_inputs(recurrence, (T, B, 3), B, 17, torch.float32, layers=2)
    lengths = torch.tensor(LENGTHS)
    beyond = torch.arange(T)[:, None] >= lengths
    for options, reset in (({}, torch.zeros(T, B).bool()), ({"lengths": lengths}, beyond)):
        without = functions(recurrence, **options)[0](**inputs)
        assert_same_bits(functions(recurrence, reset=reset, **options)[0](**inputs), without)


def test_pieces_are_packed_together() -> None:
    """Rows of T steps with a reset in the middle take T / 2 steps of twice as many rows."""
    reset = torch.zeros(8, 3).bool()
    reset[4] = True
    pieces = pack_pieces(reset, None, None)
    assert pieces is not None
    assert pieces.packing.batch_sizes.tolist() == [6] * 4
    assert pieces.packing.rows.tolist() == [0, 1, 2]


def test_dropout_between_layers() -> None:
    inputs = multilayer_inputs(GRU, (T, B, 3), B, 4, torch.float64, layers=2)
    options = {"reset": torch.rand(T, B) < 0.3, "dropout": 1.0}
    compare("gru", functions(GRU, **options), inputs)


# ---- transforms and graphs


def one_layer(recurrence: Recurrence = GRU) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    inputs = multilayer_inputs(recurrence, (T, B, 3), B, 4, torch.float64, layers=2)
    return add_reset_to(inputs, recurrence, B), torch.rand(T, B) < 0.3


@every_architecture
def test_transforms(recurrence: Recurrence) -> None:
    """Maps over all inputs, with gradients inside of them, forward mode once and twice, and double backward."""
    inputs, reset = one_layer(recurrence)
    names = list(inputs)
    values = [tensor.detach() for tensor in inputs.values()]
    copies = [torch.stack([tensor, 2 * tensor]) for tensor in values]
    tangents = [torch.randn_like(tensor) for tensor in values]
    results = []
    for function in functions(recurrence, reset=reset):

        def run(*tensors: Tensor, function: Any = function) -> tuple[Tensor, ...]:
            return tuple(function(**dict(zip(names, tensors, strict=True))))

        def loss(*tensors: Tensor, run: Any = run) -> Tensor:
            return sum((t.square().sum() for t in run(*tensors)), torch.zeros(()))

        every = tuple(range(len(names)))

        def directional(*tensors: Tensor, run: Any = run) -> Any:
            return func.jvp(run, tensors, tuple(tangents))[1]

        leaves = [tensor.clone().requires_grad_() for tensor in values]
        gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        penalty = sum((g.square().sum() for g in gradients), torch.zeros(()))
        with forward_ad.dual_level():
            make_dual: Any = forward_ad.make_dual
            unpack_dual: Any = forward_ad.unpack_dual
            duals = [make_dual(*pair) for pair in zip(values, tangents, strict=True)]
            dual_tangents = [unpack_dual(t).tangent for t in run(*duals)]
        results.append(
            flatten(
                (
                    func.vmap(run)(*copies),
                    func.vmap(func.grad(loss, every))(*copies),
                    func.jvp(func.grad(loss, every), tuple(values), tuple(tangents)),
                    func.jvp(directional, tuple(values), tuple(tangents)),
                    torch.autograd.grad(penalty, leaves),
                    dual_tangents,
                )
            )
        )
    found, expected = results
    assert_all_close(f"{recurrence.op}_backward", found, expected)


def test_vmap_over_resets_and_lengths() -> None:
    inputs, _ = one_layer(LSTM)
    resets, lengths = torch.rand(2, T, B) < 0.3, torch.tensor([LENGTHS, LENGTHS[::-1]])

    def call(module: int, **given: Tensor) -> Any:
        return functions(LSTM, **given)[module](**inputs)

    for dims in ((0, None), (0, 0), (None, 0)):
        found = func.vmap(lambda reset, lengths: call(0, reset=reset, lengths=lengths), dims)(
            resets if dims[0] == 0 else resets[0], lengths if dims[1] == 0 else lengths[0]
        )
        each = [
            call(1, reset=resets[i if dims[0] == 0 else 0], lengths=lengths[i if dims[1] == 0 else 0]) for i in range(2)
        ]
        assert_all_close("lstm", found, [torch.stack(tensors) for tensors in zip(*each, strict=True)])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the loop over steps is unrolled
def test_recorded() -> None:
    """A graph is right for other resets than those that it was recorded with, also with lengths."""
    inputs = recurrence_inputs(LSTM, (3, 3, 2), 3, 4, torch.float64)
    lengths = torch.tensor([3, 0, 2])

    def call(reset: Tensor, lengths: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, tensors, strict=True))
        return recurrence_functions(LSTM, reset=reset, lengths=lengths)[0](**given)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    traced: Any = torch.jit.trace(call, (torch.zeros(3, 3).bool(), lengths, *inputs.values()))  # type: ignore[no-untyped-call]
    for share in (0.0, 0.5):
        reset = torch.rand(3, 3) < share
        expected = recurrence_functions(LSTM, reset=reset, lengths=lengths)[1](**inputs)
        for recorded in (compiled, traced):
            assert_all_close("lstm", recorded(reset, lengths, *inputs.values()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    """The input is from another layer under autocast; the states are float32."""
    inputs, reset = multilayer_inputs(LSTM, (T, B, 3), B, 17, torch.float32, layers=2), torch.rand(T, B) < 0.3
    inputs = add_reset_to(inputs, LSTM, 1)
    inputs["x"] = inputs["x"].detach().to(dtype)
    function, expected = functions(LSTM, reset=reset)
    with torch.autocast("cpu", torch.bfloat16):
        found = function(**inputs)
    assert all(tensor.dtype == torch.bfloat16 for tensor in found)
    assert_all_close("lstm", found, expected(**{name: tensor.double() for name, tensor in inputs.items()}))


def by_path(path: str, function: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor], reset: Tensor) -> Any:
    """The results of a function of inputs and resets on a path where resets are not read, or on the ordinary one."""

    def call(reset: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return function(reset, **dict(zip(inputs, tensors, strict=True)))

    if path == "mapped":
        found = func.vmap(call, (0, *[None] * len(inputs)))(torch.stack((reset, reset)), *inputs.values())
        return tuple(tensor[1] for tensor in found)
    if path == "compiled":
        call = torch.compile(call, fullgraph=True, backend="eager")
    return call(reset, *inputs.values())


every_path = pytest.mark.parametrize("path", ["ordinary", "mapped", "compiled"])


@every_path
@pytest.mark.parametrize("recurrence", [GRU, LSTM], ids=str)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_16_bits_of_long_sequences(path: str, recurrence: Recurrence, dtype: torch.dtype) -> None:
    """States are float32 from step to step on every path: slow gates add up what a rounded state would lose."""
    inputs = recurrence_inputs(recurrence, (64, 2, 3), 2, 4, dtype)
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    # The gate that keeps the state is nearly 1: z of a GRU, f of an LSTM; both are the second block.
    inputs["b_ih"][4:8] = 5
    reset = torch.zeros(64, 2).bool()
    reset[1] = True

    def call(reset: Tensor, **inputs: Tensor) -> tuple[Tensor, ...]:
        return recurrence_functions(recurrence, reset=reset)[0](**inputs)

    found = by_path(path, call, inputs, reset)
    assert all(tensor.dtype == dtype for tensor in found)
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    expected = recurrence_functions(recurrence, reset=reset)[1](**doubles)
    for actual, exact in zip(found, expected, strict=True):
        scale = float(exact.abs().max())
        assert_close(recurrence.op, actual / scale, exact / scale)


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_of_every_path(path: str, dtype: torch.dtype) -> None:
    """A graph and a map have the dtypes of an ordinary call."""
    inputs, reset = recurrence_inputs(LSTM, (T, B, 3), B, 17, torch.float32), torch.rand(T, B) < 0.3
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    inputs["x"] = inputs["x"].to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = by_path(path, lambda reset, **given: recurrence_functions(LSTM, reset=reset)[0](**given), inputs, reset)
    assert all(tensor.dtype == torch.bfloat16 for tensor in found)
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    assert_all_close("lstm", found, recurrence_functions(LSTM, reset=reset)[1](**doubles))


# ---- arguments

RESET = torch.zeros(5, 3).bool()
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reset": RESET[:, :2]}, ValueError, r"gru: reset must be \[T, B\] = \[5, 3\], got \[5, 2\]"),
    ({"reset": RESET.flatten()}, ValueError, r"gru: reset must be \[T, B\] = \[5, 3\], got \[15\]"),
    ({"reset": RESET.int()}, TypeError, "gru: reset must be bool, got int32"),
    ({"reset": RESET.to("meta")}, ValueError, "gru: reset must be on cpu like x, got meta"),
    ({"reset": RESET.tolist()}, TypeError, "gru: reset must be a Tensor, got list"),
    ({"reset_to": torch.zeros(3, 4)}, ValueError, "gru: reset_to belongs to reset, got reset=None"),
    ({"reset": RESET, "reverse": True}, ValueError, "gru: reset needs one forward direction, got reverse=True"),
    (
        {"reset": RESET, "reset_to": torch.zeros(2, 4)},
        ValueError,
        r"gru: reset_to must be \[B, H\] = \[3, 4\], got \[2, 4\]",
    ),
    (
        {"reset": RESET, "reset_to": torch.zeros(1, 3, 5)},
        ValueError,
        r"gru: reset_to must be \[1, B, H\] = \[1, 3, 4\], got \[1, 3, 5\]",
    ),
    ({"reset": RESET, "reset_to": torch.zeros(3, 4).double()}, TypeError, "gru: reset_to must be float32"),
    ({"reset": RESET, "reset_to": (torch.zeros(3, 4),)}, TypeError, "gru: reset_to must be a Tensor, got tuple"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.gru(torch.zeros(5, 3, 2), None, torch.zeros(12, 2), torch.zeros(12, 4), **options)


def test_bad_arguments_of_several_layers() -> None:
    weights = [(torch.zeros(16, 4), torch.zeros(16, 4))] * 2
    with pytest.raises(ValueError, match="multilayer_rnn: reset needs one forward direction, got bidirectional=True"):
        ops.multilayer_rnn("LSTM", torch.zeros(5, 3, 4), None, weights, bidirectional=True, reset=RESET)
    to = (torch.zeros(2, 3, 4), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"reset_to\[1\] must be \[L, B, H\] = \[2, 3, 4\], got \[1, 3, 4\]"):
        ops.multilayer_rnn("LSTM", torch.zeros(5, 3, 4), None, weights, reset=RESET, reset_to=to)
    state = (torch.zeros(2, 3, 4),) * 2
    with pytest.raises(ValueError, match=r"multilayer_rnn: reset must be \[N\] = \[5\], got \[5, 3\]"):
        ops.multilayer_rnn("LSTM", torch.zeros(5, 4), state, weights, batch_sizes=torch.tensor([3, 2]), reset=RESET)
