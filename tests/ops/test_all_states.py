"""The states after every step, those of each layer and direction, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.comparison import assert_all_close, check_gradients, compare, flatten
from support.devices import every_device
from support.inputs import batch_sizes_of
from support.multilayer import evaluated, multilayer_functions, multilayer_inputs, state_of, weights_of
from support.pairwise import parametrize_pairwise
from support.recurrences import ARCHITECTURES, LSTM, PROJECTED, RECURRENCES, Recurrence, is_smooth
from support.tolerances import ALL_DTYPES
from torch import Tensor, func

from llm_ext import ops

every_architecture = pytest.mark.parametrize("recurrence", ARCHITECTURES, ids=str)
T, B = 6, 4
LENGTHS = [3, 0, 6, 1]


@every_device
@parametrize_pairwise(
    recurrence=RECURRENCES,
    layers=(1, 2),
    bidirectional=(False, True),
    rows=("whole", "lengths", "packed", "empty"),
    resets=(False, True),
    state=(True, False),
    dtype=ALL_DTYPES,
    training=(True, False),
)
def test_reference(
    recurrence: Recurrence,
    layers: int,
    bidirectional: bool,
    rows: str,
    resets: bool,
    state: bool,
    dtype: torch.dtype,
    training: bool,
    device: str,
) -> None:
    options: dict[str, Any] = {"bidirectional": bidirectional, "return_all_states": True}
    x_shape: tuple[int, ...] = (0 if rows == "empty" else T, B, 3)
    if rows == "lengths":
        options["lengths"] = torch.tensor(LENGTHS, device=device)
    elif rows == "packed":
        options["batch_sizes"] = batch_sizes_of([6, 5, 2, 1])
        x_shape, state = (14, 3), True
    if resets and not bidirectional:
        options["reset"] = torch.rand(x_shape[:-1], device=device) < 0.3
    inputs = multilayer_inputs(
        recurrence, x_shape, B, 17, dtype, layers=layers, bidirectional=bidirectional, state=state, device=device
    )
    if rows == "lengths":
        padding = torch.arange(T)[:, None] >= torch.tensor(LENGTHS)
        inputs["x"] = inputs["x"].detach().masked_fill(padding[..., None].to(device), float("nan")).requires_grad_()
    compare(
        recurrence.op,
        multilayer_functions(recurrence, **options),
        inputs if training else evaluated(inputs),
        gradients=is_smooth(recurrence, dtype),
    )


@every_architecture
def test_gradcheck(recurrence: Recurrence) -> None:
    """Gradients, those of the gradients, and both in forward mode."""
    inputs = multilayer_inputs(recurrence, (3, 2, 2), 2, 3, torch.float64, layers=2, bidirectional=True)
    function, _ = multilayer_functions(recurrence, bidirectional=True, return_all_states=True)
    check_gradients(function, inputs)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
def test_transforms(lengths: list[int] | None) -> None:
    """Maps, gradients inside of maps, and forward mode over gradients."""
    given = None if lengths is None else torch.tensor(lengths)
    inputs = multilayer_inputs(PROJECTED, (T, B, 3), B, 4, torch.float64, layers=2)
    names, values = list(inputs), [tensor.detach() for tensor in inputs.values()]
    copies = [torch.stack([tensor, 2 * tensor]) for tensor in values]
    tangents = [torch.randn_like(tensor) for tensor in values]
    every = tuple(range(len(names)))
    results = []
    for function in multilayer_functions(PROJECTED, lengths=given, return_all_states=True):

        def run(*tensors: Tensor, function: Any = function) -> tuple[Tensor, ...]:
            return tuple(function(**dict(zip(names, tensors, strict=True))))

        def loss(*tensors: Tensor, run: Any = run) -> Tensor:
            return sum((t.square().sum() for t in run(*tensors)), torch.zeros(()))

        gradients: Any = func.grad(loss, every)
        results.append(
            (
                func.vmap(run)(*copies),
                func.vmap(gradients)(*copies),
                func.jvp(gradients, tuple(values), tuple(tangents)),
            )
        )
    found, expected = results
    assert_all_close("lstm_backward", found, expected)


def test_recorded() -> None:
    """A graph is right for other lengths than those that it was recorded with."""
    inputs = multilayer_inputs(LSTM, (3, 3, 2), 3, 4, torch.float64)

    def call(lengths: Tensor, module: int = 0) -> tuple[Tensor, ...]:
        return multilayer_functions(LSTM, lengths=lengths, return_all_states=True)[module](**inputs)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for lengths in (torch.tensor([3, 3, 3]), torch.tensor([1, 0, 3])):
        assert_all_close("lstm", compiled(lengths), call(lengths, 1))


def test_the_other_results_are_those_without() -> None:
    inputs = multilayer_inputs(LSTM, (T, B, 3), B, 17, torch.float32, layers=2, bidirectional=True)
    without, _ = multilayer_functions(LSTM, bidirectional=True)
    function, _ = multilayer_functions(LSTM, bidirectional=True, return_all_states=True)
    y, h_n, c_n, h, c = function(**inputs)
    assert_all_close("lstm", (y, h_n, c_n), without(**inputs))
    assert_all_close("lstm", y, torch.cat((h[2], h[3]), -1))
    for last, every in ((h_n, h), (c_n, c)):
        assert_all_close("lstm", last[0::2], every[0::2, -1])
        assert_all_close("lstm", last[1::2], every[1::2, 0])


def test_autocast() -> None:
    inputs = multilayer_inputs(LSTM, (T, B, 3), B, 17, torch.float32)
    function, reference = multilayer_functions(LSTM, return_all_states=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = function(**inputs)
    assert all(tensor.dtype == torch.bfloat16 for tensor in flatten(found))
    assert_all_close("lstm", found, reference(**{name: tensor.double() for name, tensor in inputs.items()}))


def test_input_projections_are_refused() -> None:
    inputs = evaluated(multilayer_inputs(LSTM, (T, B, 3), B, 4, torch.float32))
    with pytest.raises(ValueError, match="multilayer_rnn: return_all_states excludes input_projections"):
        ops.multilayer_rnn(
            "LSTM",
            torch.zeros(T, B, dtype=torch.int64),
            state_of(inputs),
            weights_of(inputs),
            input_projections=[torch.zeros(5, 16)],
            return_all_states=True,
        )
