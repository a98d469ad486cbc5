"""A whole step of a decoder with attention: the op against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, assert_close, at_lower_levels, run_tests_at, spread
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llm_ext import ops, reference

GATES = {"tanh": 1, "relu": 1, "sigmoid": 1, "gru": 3, "lstm": 4}
# Nothing, one, odd; few rows and many, for which weights are packed; no keys.
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


def arguments(
    cell: str,
    sizes: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = True,
    lengths: bool = True,
    table: bool = False,
) -> dict[str, Any]:
    B, K, layers, I, H, A, D, Tk = sizes  # noqa: E741
    N, G = B * K, GATES[cell]

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=dtype) * scale

    weights = []
    for layer in range(layers):
        features = I if layer == 0 else H
        weights += [draw(G * H, features, scale=max(features, 1) ** -0.5), draw(G * H, H, scale=H**-0.5)]
        weights += [draw(G * H), draw(G * H)] if bias else []
    given = {
        "cell": cell,
        "x": draw(1, N, I),
        "h0": draw(layers, N, H),
        "c0": draw(layers, N, H) if cell == "lstm" else None,
        "weights": weights,
        "w_query": draw(A, H, scale=H**-0.5),
        "keys": draw(B, Tk, A),
        "v": draw(A),
        "values": draw(B, Tk, D),
        "w_out": draw(D, H, scale=H**-0.5),
        "b_out": draw(D) if bias else None,
        "bias": bias,
        "key_lengths": torch.randint(Tk + 1, (B,)) if lengths else None,
    }
    if table:
        rows = draw(7, I)
        given["x"] = torch.randint(7, (1, N))
        given["table"] = torch.nn.functional.linear(rows, weights[0], weights[2] if bias else None)
        given["rows"] = rows
    return given


def check(given: dict[str, Any]) -> None:
    given = dict(given)
    rows = given.pop("rows", None)
    actual = ops.attention_step(**given)
    if rows is not None:
        given["x"] = rows[given["x"]]
        del given["table"]
    doubles = {
        name: [t.double() for t in value]
        if isinstance(value, list)
        else value.double()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in given.items()
    }
    expected = reference.attention_step(**doubles)
    for name, a, b in zip(("out", "h_n", "c_n"), actual, expected, strict=True):
        assert a.shape == b.shape
        assert_close("model", a, b, name)


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("sizes", SIZES)
def test_is_the_reference(sizes: tuple[int, ...], cell: str, dtype: torch.dtype, bias: bool, table: bool) -> None:
    check(arguments(cell, sizes, dtype, bias=bias, lengths=bias, table=table))


@given(
    cell=st.sampled_from(list(GATES)),
    sizes=st.tuples(*(st.integers(1, most) for most in (12, 8, 3, 40, 70, 40, 40, 20))),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("bias", "lengths", "table")}),
)
def test_any_size(cell: str, sizes: tuple[int, ...], options: dict[str, bool]) -> None:
    check(arguments(cell, sizes, **options))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(threads: int) -> None:
    """More threads than cores or rows: the same results, and the same bits in a second call."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for cell, sizes in (("gru", (32, 1, 2, 60, 130, 100, 70, 20)), ("lstm", (30, 4, 1, 60, 130, 100, 70, 20))):
            given = arguments(cell, sizes)
            check(given)
            first, second = (ops.attention_step(**given) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    finally:
        torch.set_num_threads(before)


def test_memory_with_holes_of_any_size() -> None:
    given = arguments("lstm", (3, 2, 2, 5, 17, 4, 9, 6))
    spread_out = {
        name: [spread(t) for t in value] if isinstance(value, list) else value for name, value in given.items()
    }
    for name in ("x", "h0", "c0", "w_query", "keys", "values", "w_out"):
        spread_out[name] = spread(given[name])
        assert not spread_out[name].is_contiguous()
    check(spread_out)


def test_inputs_are_left_alone() -> None:
    given = arguments("lstm", (3, 2, 2, 5, 17, 4, 9, 6))
    tensors = [t for value in given.values() for t in (value if isinstance(value, list) else [value])]
    before = [t.clone() if isinstance(t, Tensor) else t for t in tensors]
    ops.attention_step(**given)
    for a, b in zip(before, tensors, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def positional(given: dict[str, Any]) -> tuple[Any, ...]:
    """As the registered op takes them."""
    order = ("cell", "x", "h0", "c0", "weights", "bias", "table", "w_query", "keys", "v", "values", "key_lengths")
    return tuple(given.get(name) for name in (*order, "w_out", "b_out"))


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_opcheck(cell: str, table: bool) -> None:
    given = arguments(cell, (3, 2, 2, 5, 17, 4, 9, 6), table=table)
    torch.library.opcheck(torch.ops.llm_ext.attention_step.default, positional(given))


def test_compiles_as_one_graph() -> None:
    given = arguments("gru", (3, 2, 1, 5, 17, 4, 9, 6))
    compiled = torch.compile(ops.attention_step, fullgraph=True)
    for a, b in zip(compiled(**given), ops.attention_step(**given), strict=True):
        assert_close("model", a, b)


def test_no_derivative() -> None:
    given = arguments("gru", (3, 2, 1, 5, 17, 4, 9, 6))
    given["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="attention_step has no derivative; it is for inference"):
        ops.attention_step(**given)[0].sum().backward()


Z = torch.zeros
IDS = Z(1, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cell": "elman"}, ValueError, "attention_step: cell must be one of"),
        ({"x": Z(6, 5)}, ValueError, r"x must be \[1, N, I\] = \[1, 6, \*\], got \[6, 5\]"),
        ({"x": Z(1, 5, 5)}, ValueError, r"x must be \[1, N, I\] = \[1, 6, \*\], got \[1, 5, 5\]"),
        ({"x": Z(1, 6, 4)}, ValueError, r"weights\[0\] must be \[3 H, I\] = \[\*, 4\], got \[51, 5\]"),
        ({"h0": Z(2, 6, 17)}, ValueError, r"h0 must be \[L, B, H\] = \[1, 6, 17\], got \[2, 6, 17\]"),
        ({"c0": Z(1, 6, 17)}, ValueError, "c0 belongs to an LSTM"),
        ({"weights": []}, ValueError, "weights must be 4 tensors for each layer, got 0"),
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
        ({"v": Z(4, dtype=torch.float64)}, TypeError, "v must be float32, got float64"),
        ({"h0": Z(1, 6, 17, dtype=torch.bfloat16)}, TypeError, "h0 must be float32 or float64, got bfloat16"),
        ({"table": Z(7, 51)}, ValueError, r"x must be \[1, N\] = \[1, 6\], got \[1, 6, 5\]"),
        ({"table": Z(7, 51), "x": Z(1, 6)}, TypeError, "x must be int64, got float32"),
        (
            {"table": Z(7, 50), "x": Z(1, 6, dtype=torch.int64)},
            ValueError,
            r"tables\[0\] must be \[V, 3 H\] = \[\*, 51\]",
        ),
        ({"table": Z(7, 51), "x": torch.full((1, 6), 7)}, IndexError, "ids must be from 0 to V - 1 = 6, got 7 to 7"),
        ({"table": Z(7, 51), "x": torch.full((1, 6), -1)}, IndexError, "ids must be from 0 to V - 1 = 6, got -1 to -1"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = arguments("gru", (3, 2, 1, 5, 17, 4, 9, 6), torch.float32)
    ops.attention_step(**given)
    with pytest.raises(error, match=message):
        ops.attention_step(**given | changes)


@at_lower_levels
def test_lower_levels(level: str) -> None:
    """The tests of the kernels again."""
    run_tests_at(level, __file__, "reference or size or threads")
