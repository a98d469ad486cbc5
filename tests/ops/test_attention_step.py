"""ops.attention_step, one step of a decoder with attention, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparison import assert_all_close, assert_same_bits, flatten, in_double
from support.devices import num_threads
from support.inputs import noncontiguous
from support.pairwise import parametrize_pairwise
from support.tolerances import DTYPES
from torch import Tensor

from llm_ext import ops, reference

GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "RNN_SIGMOID": 1, "GRU": 3, "LSTM": 4}
# Empty, one, odd; few rows and many, for which weights are packed; no keys.
SIZES = [  # B, K, layers, I, H, A, D, Tk
    (0, 1, 1, 3, 4, 5, 6, 7),
    (2, 0, 1, 3, 4, 5, 6, 7),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (3, 1, 2, 5, 17, 4, 9, 6),
    (3, 2, 1, 0, 33, 7, 3, 5),
    (2, 3, 3, 4, 6, 8, 2, 0),
    (31, 1, 1, 20, 65, 33, 17, 12),
    (20, 5, 2, 9, 40, 16, 50, 11),
]
FLAGS = (False, True)


def step_arguments(
    mode: str,
    sizes: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = True,
    lengths: bool = True,
    looked_up: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the op, and those of its reference, which has no input projections."""
    B, K, layers, I, H, A, D, Tk = sizes  # noqa: E741
    N, G = B * K, GATES[mode]

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=dtype) * scale

    weights = []
    for layer in range(layers):
        features = I if layer == 0 else H
        row = [draw(G * H, features, scale=max(features, 1) ** -0.5), draw(G * H, H, scale=H**-0.5)]
        weights.append((*row, *([draw(G * H), draw(G * H)] if bias else [])))
    arguments: dict[str, Any] = {
        "mode": mode,
        "x": draw(1, N, I),
        "state": tuple(draw(layers, N, H) for _ in range(2 if mode == "LSTM" else 1)),
        "weights": weights,
        "w_query": draw(A, H, scale=H**-0.5),
        "keys": draw(B, Tk, A),
        "v": draw(A),
        "values": draw(B, Tk, D),
        "w_out": draw(D, H, scale=H**-0.5),
        "b_out": draw(D) if bias else None,
        "key_lengths": torch.randint(Tk + 1, (B,)) if lengths else None,
    }
    if not looked_up:
        return arguments, arguments
    rows, ids = draw(7, I), torch.randint(7, (1, N))
    projections = torch.nn.functional.linear(rows, weights[0][0], weights[0][2] if bias else None)
    return arguments | {"x": ids, "input_projections": projections}, arguments | {"x": rows[ids]}


def check(arguments: dict[str, Any], expected: dict[str, Any]) -> None:
    actual = ops.attention_step(**arguments)
    assert isinstance(actual[1], tuple)
    assert_all_close("model", actual, reference.attention_step(**in_double(expected)))


@parametrize_pairwise(sizes=SIZES, mode=tuple(GATES), dtype=DTYPES, bias=FLAGS, looked_up=FLAGS)
def test_reference(sizes: tuple[int, ...], mode: str, dtype: torch.dtype, bias: bool, looked_up: bool) -> None:
    check(*step_arguments(mode, sizes, dtype, bias=bias, lengths=bias, looked_up=looked_up))


@pytest.mark.parametrize("mode", GATES)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (12, 8, 3, 40, 70, 40, 40, 20))),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("bias", "lengths", "looked_up")}),
)
@settings(max_examples=20)
def test_any_size(mode: str, sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    check(*step_arguments(mode, sizes, **options))


def test_ids_of_either_integer_dtype() -> None:
    arguments, _ = step_arguments("GRU", (3, 2, 2, 5, 17, 4, 9, 6), looked_up=True)
    ids = arguments["x"]
    assert_same_bits(*(ops.attention_step(**arguments | {"x": each}) for each in (ids, ids.to(torch.int32))))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads(threads: int) -> None:
    """More threads than cores or rows: the same results within rounding, the same bits when repeated."""
    with num_threads(threads):
        for mode, sizes in (("GRU", (32, 1, 2, 60, 130, 100, 70, 20)), ("LSTM", (30, 4, 1, 60, 130, 100, 70, 20))):
            arguments, expected = step_arguments(mode, sizes)
            check(arguments, expected)
            assert_same_bits(*(ops.attention_step(**arguments) for _ in range(2)))


def test_layouts() -> None:
    arguments, expected = step_arguments("LSTM", (3, 2, 2, 5, 17, 4, 9, 6))
    strided = dict(arguments)
    for name in ("x", "w_query", "keys", "values", "w_out"):
        strided[name] = noncontiguous(arguments[name])
        assert not strided[name].is_contiguous()
    strided["state"] = tuple(noncontiguous(t) for t in arguments["state"])
    strided["weights"] = [tuple(noncontiguous(t) for t in row) for row in arguments["weights"]]
    check(strided, expected)


def test_inputs_are_not_modified() -> None:
    arguments, _ = step_arguments("LSTM", (3, 2, 2, 5, 17, 4, 9, 6))
    tensors = flatten([value for value in arguments.values() if not isinstance(value, str)])
    before = [t.clone() for t in tensors]
    ops.attention_step(**arguments)
    assert_same_bits(before, tensors)


def test_no_derivative() -> None:
    arguments, _ = step_arguments("GRU", (3, 2, 1, 5, 17, 4, 9, 6))
    arguments["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="attention_step has no derivative; it is for inference"):
        torch.autograd.backward(ops.attention_step(**arguments)[0].sum())


Z = torch.zeros
IDS = Z(1, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mode": "elman"}, ValueError, "attention_step: mode must be one of"),
        ({"x": Z(6, 5)}, ValueError, r"x must be \[1, N, I\] = \[1, 6, \S+\], got \[6, 5\]"),
        ({"x": Z(1, 5, 5)}, ValueError, r"x must be \[1, N, I\] = \[1, 6, \S+\], got \[1, 5, 5\]"),
        ({"x": Z(1, 6, 4)}, ValueError, r"\[3 H, I\] = \[\*, 4\], got \[51, 5\]|x must be .* got \[1, 6, 4\]"),
        ({"state": (Z(2, 6, 17),)}, ValueError, r"h0 must be \[L, [BN], H\] = \[1, 6, 17\], got \[2, 6, 17\]"),
        ({"state": (Z(1, 6, 17), Z(1, 6, 17))}, ValueError, "state must|c0 belongs to an LSTM"),
        ({"weights": []}, ValueError, "weights must"),
        ({"keys": Z(4, 7, 4)}, ValueError, r"keys must be of B sources, N = 6 a multiple of B, got \[4, 7, 4\]"),
        ({"keys": Z(0, 7, 4)}, ValueError, "keys must be of B sources, N = 6 a multiple of B"),
        ({"w_query": Z(3, 17)}, ValueError, r"w_query must be \[A, H\] = \[4, 17\], got \[3, 17\]"),
        ({"v": Z(5)}, ValueError, r"v must be \[A\] = \[4\], got \[5\]"),
        ({"values": Z(3, 5, 9)}, ValueError, r"values must be \[B, Tk, D\] = \[3, 6, \*\], got \[3, 5, 9\]"),
        ({"w_out": Z(8, 17)}, ValueError, r"w_out must be \[D, H\] = \[9, 17\], got \[8, 17\]"),
        ({"b_out": Z(8)}, ValueError, r"b_out must be \[D\] = \[9\], got \[8\]"),
        (
            {"key_lengths": torch.tensor([1, 7, 0])},
            ValueError,
            r"key_lengths must be from 0 to Tk = 6, got \[1, 7, 0\]",
        ),
        ({"key_lengths": torch.tensor([1, 7])}, ValueError, r"key_lengths must be \[B\] = \[3\], got \[2\]"),
        ({"v": Z(4).double()}, TypeError, "v must be float32, got float64"),
        ({"state": (Z(1, 6, 17).bfloat16(),)}, TypeError, "h0 must be float32( or float64)?, got bfloat16"),
        ({"input_projections": Z(7, 51)}, ValueError, r"x must be \[1, N\] = \[1, 6\], got \[1, 6, 5\]"),
        ({"input_projections": Z(7, 51), "x": Z(1, 6)}, TypeError, "x must be int64, got float32"),
        (
            {"input_projections": Z(7, 50), "x": IDS},
            ValueError,
            r"input_projections\S* must be \[V, 3 H\] = \[(\*|7), 51\]",
        ),
        ({"input_projections": Z(7, 51), "x": IDS + 7}, IndexError, "ids must be from 0 to V - 1 = 6, got 7 to 7"),
        ({"input_projections": Z(7, 51), "x": IDS - 1}, IndexError, "ids must be from 0 to V - 1 = 6, got -1 to -1"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments, _ = step_arguments("GRU", (3, 2, 1, 5, 17, 4, 9, 6), torch.float32)
    ops.attention_step(**arguments)
    with pytest.raises(error, match=message):
        ops.attention_step(**arguments | changes)
