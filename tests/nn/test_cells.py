"""RNNCell, GRUCell and LSTMCell beside those of torch.nn."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparison import assert_close, flatten
from support.devices import every_device
from support.inputs import noncontiguous
from support.layers import (
    CELLS,
    LAYERS,
    OWN_OPTIONS,
    compare_layers,
    layer_pair,
    noncontiguous_state,
    op_of,
    random_state,
)
from support.tolerances import DTYPES
from torch import Tensor

import llm_ext

OPTIONS = st.fixed_dictionaries(
    {
        "input_size": st.sampled_from([0, 1, 3, 17]),
        "hidden_size": st.sampled_from([0, 1, 3, 17, 33]),
        "nonlinearity": st.sampled_from(["tanh", "relu"]),
        "bias": st.booleans(),
        "dtype": st.sampled_from(DTYPES),
    }
)


@every_device
@pytest.mark.parametrize("name", CELLS)
@settings(max_examples=40)
@given(options=OPTIONS, B=st.sampled_from([None, 0, 1, 3, 17]), with_hx=st.booleans(), contiguous=st.booleans())
def test_torch_nn(
    name: str, options: dict[str, Any], B: int | None, with_hx: bool, contiguous: bool, device: str
) -> None:
    torch.manual_seed(0)
    cell, torch_cell = layer_pair(name, options, device)
    batch = () if B is None else (B,)
    x = torch.randn(*batch, cell.input_size, dtype=options["dtype"], device=device)
    hx = random_state(cell, *batch) if with_hx else None
    if not contiguous:
        x, hx = noncontiguous(x), noncontiguous_state(hx)
    compare_layers(name, cell, torch_cell, x, hx)


@every_device
@pytest.mark.parametrize("name", LAYERS)
def test_steps_of_a_cell_are_a_layer(name: str, device: str) -> None:
    options: dict[str, Any] = {"dtype": torch.float64, "device": device}
    options |= OWN_OPTIONS[name] if name == "RNN" else {}
    layer, cell = getattr(llm_ext, name)(3, 5, **options), getattr(llm_ext, f"{name}Cell")(3, 5, **options)
    cell.load_state_dict({key.removesuffix("_l0"): tensor for key, tensor in layer.state_dict().items()})
    x = torch.randn(6, 2, 3, dtype=torch.float64, device=device)
    output, last = layer(x)
    hx = None
    for step, expected in zip(x, output, strict=True):
        hx = cell(step, hx)
        assert_close(op_of(name), flatten(hx)[0], expected)
    for state, expected in zip(flatten(hx), flatten(last), strict=True):
        assert_close(op_of(name), state, expected[0])


Z = torch.zeros


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    ("x", "hx", "message"),
    [
        (Z(1, 2, 3), None, r"{name}: input must be \[B, I\] = \[\*, 3\], got \[1, 2, 3\]"),
        (Z(2, 4), None, r"{name}: input must be .* = \[\*, 3\], got \[2, 4\]"),
        (Z(4), None, r"{name}: input must be .* = \[\*, 3\], got \[4\]"),
        (Z(2, 3), Z(1, 2, 5), r"{name}: {hx} must be \[B, H\] = \[2, 5\], got \[1, 2, 5\]"),
        (Z(2, 3), Z(3, 5), r"{name}: {hx} must be \[B, H\] = \[2, 5\], got \[3, 5\]"),
        (Z(2, 3), Z(2, 4), r"{name}: {hx} must be \[B, H\] = \[2, 5\], got \[2, 4\]"),
        (Z(3), Z(4), r"{name}: {hx} must be \[H\] = \[5\], got \[4\]"),
        (Z(2, 3).double(), None, r"{op}: x must be float32, got float64"),
    ],
)
def test_bad_call(x: Tensor, hx: Tensor | None, message: str, name: str) -> None:
    label = re.escape("hx[0]") if name == "LSTMCell" else "hx"
    state = (hx, hx) if name == "LSTMCell" and hx is not None else hx
    with pytest.raises((RuntimeError, ValueError)) as torch_error:
        getattr(torch.nn, name)(3, 5)(x, state)
    with pytest.raises(torch_error.type, match=message.format(name=name, op=op_of(name), hx=label)):
        getattr(llm_ext, name)(3, 5)(x, state)


@pytest.mark.parametrize("name", CELLS)
def test_a_state_can_be_detached(name: str) -> None:
    """It is no view, with a batch or without, from zeros or a given state."""
    cell = getattr(llm_ext, name)(3, 5)
    for batch in ((), (2,)):
        for hx in ((), (random_state(cell, *batch),)):
            for tensor in flatten(cell(Z(*batch, 3), *hx)):
                assert not tensor.detach_().requires_grad


def test_state_of_another_type() -> None:
    h = Z(2, 5)
    with pytest.raises(TypeError, match="RNNCell: hx must be a Tensor, got tuple"):
        llm_ext.RNNCell(3, 5)(Z(2, 3), (h, h))
    cell, x = llm_ext.LSTMCell(3, 5), torch.randn(2, 3)
    assert torch.equal(cell(x, [h, h])[0], cell(x, (h, h))[0])


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("RNNCell", (-1, 5), ValueError),
        ("GRUCell", (3, -1), ValueError),
        ("LSTMCell", (3, 5.0), TypeError),
        ("GRUCell", (3, 5, "relu"), TypeError),
        ("RNNCell", (3, 5, True, "gelu"), ValueError),
    ],
)
def test_bad_constructor(name: str, arguments: tuple[Any, ...], error: type[Exception]) -> None:
    """The constructor refuses; torch's waits for the first step."""
    with pytest.raises(error, match=f"{name}: "):
        getattr(llm_ext, name)(*arguments)
