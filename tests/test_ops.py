"""The ops against the reference: every level, dtype, option and odd size; torch.library's own checks; threads."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import (
    DTYPES,
    HALF_DTYPES,
    assert_close,
    at_lower_levels,
    batch_sizes_of,
    run_tests_at,
    spread,
    supported_levels,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from recurrences import (
    CELLS,
    GRU,
    KINDS,
    LSTM,
    PROJECTED,
    RNN,
    Cell,
    cell_functions,
    cell_inputs,
    compare,
    every_device,
    leaf,
)
from torch import Tensor

import llm_ext
from llm_ext import checks, ops, reference

# One above a tile of rows (6), a vector (16), a panel (64), where the last panel is 1, 2 or 3 vectors wide, and the
# most rows that go without packing and one more.
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
POOL_SIZES = [  # B, T, D
    (0, 4, 5),
    (2, 0, 5),
    (3, 4, 0),
    (1, 1, 1),
    (3, 5, 7),
    (2, 9, 64),
    (4, 17, 130),
    (1, 100, 33),
    (3, 40, 1000),
    (1, 300, 520),
    (1, 1100, 65),
]


@every_device
@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES)
@pytest.mark.parametrize(("T", "B", "I", "H"), SIZES)
def test_recurrence(T: int, B: int, I: int, H: int, dtype: torch.dtype, cell: Cell, device: str) -> None:  # noqa: E741
    if cell.projected and H == 1:
        pytest.skip("nothing is smaller than 1")
    # The gradient of relu jumps at 0, and which side a state is on may depend on how the one before was rounded.
    in_pairs = dtype == torch.bfloat16 and llm_ext.build_info()["simd"] == "avx512_bf16"
    rounds = dtype in HALF_DTYPES if device == "cuda" else in_pairs
    smooth = cell.nonlinearity != "relu" or not rounds
    for reverse, state, bias in itertools.product((False, True), (False, True), (False, True)):
        inputs = cell_inputs(cell, (T, B, I), B, H, dtype, state=state, bias=bias, device=device)
        compare(cell.op, *cell_functions(cell, reverse=reverse), inputs, gradients=smooth)


@every_device
@pytest.mark.parametrize("cell", KINDS, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES)
@pytest.mark.parametrize(
    "sizes", [[1], [3, 3, 2, 1], [9, 5, 5, 2, 1, 1], [20, 20, 20], [30, 11, 7, 7, 7, 1], [2] * 40 + [1] * 60]
)
def test_recurrence_packed(sizes: list[int], dtype: torch.dtype, reverse: bool, cell: Cell, device: str) -> None:
    for I, H in ((6, 33), (20, 140)):  # noqa: E741
        inputs = cell_inputs(cell, (sum(sizes), I), sizes[0], H, dtype, device=device)
        compare(cell.op, *cell_functions(cell, batch_sizes=torch.tensor(sizes), reverse=reverse), inputs)


@given(
    cell=st.sampled_from(CELLS),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    I=st.integers(1, 70),
    H=st.integers(1, 140),
    reverse=st.booleans(),
)
def test_recurrence_any_packed(cell: Cell, lengths: list[int], I: int, H: int, reverse: bool) -> None:  # noqa: E741
    assume(H > 1 or not cell.projected)  # nothing is smaller than 1
    sizes = batch_sizes_of(sorted(lengths, reverse=True))
    inputs = cell_inputs(cell, (sum(lengths), I), len(lengths), H, torch.float64)
    compare(cell.op, *cell_functions(cell, batch_sizes=sizes, reverse=reverse), inputs)


@every_device
@pytest.mark.parametrize("cell", KINDS, ids=str)
def test_recurrence_keeps_nothing_for_an_evaluation(cell: Cell, device: str) -> None:
    """Without a gradient to come the result is the same, bit by bit: one step, few, and several blocks of steps."""
    for T, B, H in ((1, 1, 20), (3, 4, 20), (50, 9, 20), (7, 40, 400)):
        inputs = cell_inputs(cell, (T, B, 6), B, H, torch.float32, device=device)
        function, _ = cell_functions(cell)
        recorded = function(**inputs)
        with torch.no_grad():
            for a, b in zip(function(**inputs), recorded, strict=True):
                assert torch.equal(a, b)
    if cell.op != "rnn":
        name = f"{cell.op}_forward"
        arguments = [inputs["x"], inputs["h0"], *([inputs["c0"]] if "c0" in inputs else []), inputs["w_ih"]]
        arguments += [inputs["w_hh"], None, None, *([inputs.get("w_hr")] if cell.op == "lstm" else [])]
        arguments += [None, None, False, False]
        for keep, rows in ((False, 0), (True, 7 * 40)):
            assert len(getattr(torch.ops.llm_ext, name)(*arguments, keep)[-1]) == rows


@every_device
@pytest.mark.parametrize("cell", KINDS, ids=str)
def test_recurrence_state_of_a_layer(cell: Cell, device: str) -> None:
    """[1, B, *] as torch.nn lays it out gives the same numbers in that shape."""
    inputs = cell_inputs(cell, (4, 3, 5), 3, 7, torch.float32, device=device)
    function, truth = cell_functions(cell)
    flat = [t.detach() for t in function(**inputs)]
    for name in {"h0", "c0"} & set(inputs):
        inputs[name] = inputs[name].detach()[None].requires_grad_()
    compare(cell.op, function, truth, inputs)
    y, *last = function(**inputs)
    assert torch.equal(y, flat[0])
    for a, b in zip(last, flat[1:], strict=True):
        assert torch.equal(a, b[None])


@every_device
@pytest.mark.parametrize("cell", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES)
def test_recurrence_long(dtype: torch.dtype, cell: Cell, device: str) -> None:
    """Errors do not pile up over 1,024 steps."""
    inputs = cell_inputs(cell, (1024, 2, 16), 2, 64, dtype, device=device)
    compare(cell.op, *cell_functions(cell), inputs)


@every_device
@pytest.mark.parametrize("cell", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES)
def test_recurrence_of_many_blocks(dtype: torch.dtype, cell: Cell, device: str) -> None:
    """Every product has more than one block in every dimension.

    Elman with tanh: of 350,000 pre-activations one may be so near to 0 that rounding turns its sign, and the gradient
    of relu jumps there.
    """
    for reverse in (False, True):
        inputs = cell_inputs(cell, (9, 64, 530), 64, 610, dtype, device=device)
        compare(cell.op, *cell_functions(cell, reverse=reverse), inputs)


@every_device
@pytest.mark.parametrize("cell", KINDS, ids=str)
def test_recurrence_not_contiguous(cell: Cell, device: str) -> None:
    tight = cell_inputs(cell, (5, 4, 6), 4, 19, torch.float32, device=device)
    function, _ = cell_functions(cell)
    loose = {name: spread(t.detach()) for name, t in tight.items()}
    for a, b in zip(function(**tight), function(**loose), strict=True):
        assert torch.equal(a, b)
    # Gradients that come in expanded or transposed.
    y = function(**tight)[0]
    from_sum = torch.autograd.grad(y.sum(), tight["w_hh"], retain_graph=True)[0]
    transposed = torch.ones(y.shape[2], *y.shape[:2][::-1], device=device).permute(2, 1, 0)
    assert torch.equal(from_sum, torch.autograd.grad(y, tight["w_hh"], transposed)[0])


@every_device
@pytest.mark.parametrize("cell", KINDS, ids=str)
def test_only_wanted_gradients(cell: Cell, device: str) -> None:
    inputs = cell_inputs(cell, (3, 2, 4), 2, 5, torch.float64, device=device)
    function, _ = cell_functions(cell)
    whole = torch.autograd.grad(function(**inputs)[0].sum(), list(inputs.values()))
    for (name, wanted), expected in zip(inputs.items(), whole, strict=True):
        alone = {n: t if n == name else t.detach() for n, t in inputs.items()}
        assert torch.equal(torch.autograd.grad(function(**alone)[0].sum(), wanted)[0], expected)


@every_device
@pytest.mark.parametrize("cell", KINDS, ids=str)
def test_gradients_of_one_result_alone(cell: Cell, device: str) -> None:
    """A result that the loss does not use has no gradient: not even a tensor of zeros."""
    inputs = cell_inputs(cell, (4, 3, 2), 3, 5, torch.float64, device=device)
    function, truth = cell_functions(cell)
    for i in range(len(function(**inputs))):
        gradients = [torch.autograd.grad(f(**inputs)[i].sum(), list(inputs.values())) for f in (function, truth)]
        for name, a, b in zip(inputs, *gradients, strict=True):
            assert_close(f"{cell.op}_backward", a, b, f"gradient of {name}")


@every_device
@pytest.mark.parametrize("cell", KINDS, ids=str)
def test_bias_gradients_are_two_tensors(cell: Cell, device: str) -> None:
    """Whoever scales one in place must not scale the other."""
    inputs = cell_inputs(cell, (3, 2, 4), 2, 5, torch.float32, state=False, device=device)
    cell_functions(cell)[0](**inputs)[0].sum().backward()
    a, b = inputs["b_ih"].grad, inputs["b_hh"].grad
    assert a is not None
    assert b is not None
    assert torch.equal(a, b) == (cell.op != "gru")
    assert a.data_ptr() != b.data_ptr()


@every_device
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_nan_comes_through(cell: Cell, device: str) -> None:
    inputs = {name: t.detach() for name, t in cell_inputs(cell, (3, 2, 4), 2, 5, torch.float32, device=device).items()}
    inputs["x"][1, 0, 2] = float("nan")
    y, *last = cell_functions(cell)[0](**inputs)
    assert y[0].isfinite().all()
    assert y[1:, 0].isnan().all()
    assert y[:, 1].isfinite().all()
    for state in last:
        assert state[0].isnan().all()
        assert state[1].isfinite().all()


def test_activations_at_the_ends() -> None:
    """Large inputs saturate, and never beyond the bound."""
    z = torch.tensor([0.0, 1e-8, -1e-8, 1.0, 9.0, -9.0, 20.0, -20.0, 90.0, -90.0, 800.0, -800.0, 1e30, -1e30])
    for dtype, name in itertools.product(DTYPES, ("tanh", "sigmoid")):
        x = z.to(dtype)[None, :, None]
        y = ops.rnn(x, None, torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype), nonlinearity=name)[0]
        assert_close("rnn", y, reference.ACTIVATIONS[name](x.double()))
        assert y.abs().max() <= 1


# ---- pooling


def pool_inputs(
    B: int, T: int, D: int, dtype: torch.dtype, *, folded: bool, state: bool, device: str = "cpu"
) -> dict[str, Tensor]:
    inputs = {"e": leaf(B, T, D, dtype=dtype, device=device)}
    if folded:
        inputs["u"] = leaf(D, dtype=dtype, scale=2 * max(D, 1) ** -0.5, device=device)
    else:
        inputs["scores"] = leaf(B, T, dtype=dtype, scale=3, device=device)
    if state:
        computed = checks.compute_dtype(dtype)
        inputs |= {"l": leaf(B, dtype=computed, device=device), "c": leaf(B, D, dtype=computed, device=device)}
    return inputs


def pool_functions(prefix: bool, **options: object) -> list[Callable[..., tuple[Tensor, ...]]]:
    def bind(module: object) -> Callable[..., tuple[Tensor, ...]]:
        def pool(e: Tensor, u: Tensor | None = None, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return module.attention_pool(e, u, scores=scores, **options)  # type: ignore[attr-defined]

        def prefix_pool(
            e: Tensor,
            u: Tensor | None = None,
            scores: Tensor | None = None,
            l: Tensor | None = None,  # noqa: E741
            c: Tensor | None = None,
        ) -> tuple[Tensor, ...]:
            state = None if l is None else (l, c)
            out, last = module.prefix_pool(e, u, scores=scores, state=state, **options)  # type: ignore[attr-defined]
            return out, *last

        return prefix_pool if prefix else pool

    return [bind(ops), bind(reference)]


@every_device
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES)
@pytest.mark.parametrize(("B", "T", "D"), POOL_SIZES)
def test_pool(B: int, T: int, D: int, dtype: torch.dtype, prefix: bool, device: str) -> None:
    op = "prefix_pool" if prefix else "attention_pool"
    lengths, mask = torch.randint(0, T + 1, (B,), device=device), torch.rand(B, T, device=device) < 0.5
    # The reference is a loop over time: at long T one combination of options is enough.
    selections = [{"lengths": lengths, "mask": mask}]
    if T < 1000:
        selections += [{}, {"lengths": lengths}, {"mask": mask}]
    for folded, state, selection in itertools.product((True, False), (False, True) if prefix else (False,), selections):
        inputs = pool_inputs(B, T, D, dtype, folded=folded, state=state, device=device)
        compare(op, *pool_functions(prefix, **selection), inputs)


@every_device
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES)
def test_pool_time_major(dtype: torch.dtype, prefix: bool, device: str) -> None:
    """[T, B, D] in memory is read as it lies, and results lie as it does."""
    inputs = pool_inputs(3, 21, 40, dtype, folded=True, state=False, device=device)
    inputs["e"] = leaf(21, 3, 40, dtype=dtype, device=device)
    functions = [lambda e, u, f=f: f(e.transpose(0, 1), u) for f in pool_functions(prefix)]
    compare("prefix_pool" if prefix else "attention_pool", *functions, inputs)
    if prefix:
        assert functions[0](**inputs)[0].stride() == (40, 120, 1)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES)
def test_pool_of_what_is_not_contiguous(dtype: torch.dtype, prefix: bool) -> None:
    tight = pool_inputs(3, 21, 40, dtype, folded=True, state=prefix)
    loose = {name: spread(t.detach()) for name, t in tight.items()}
    lengths, mask = torch.tensor([21, 0, 17]), torch.rand(3, 21) < 0.5
    tight_pool = pool_functions(prefix, lengths=lengths, mask=mask)[0]
    apart = torch.stack((lengths, lengths), 1)[:, 0]
    loose_pool = pool_functions(prefix, lengths=apart, mask=mask.T.contiguous().T)[0]
    for a, b in zip(tight_pool(**tight), loose_pool(**loose), strict=True):
        assert torch.equal(a, b)
    # Gradients that come in expanded or transposed.
    c = tight_pool(**tight)[0]
    from_sum = torch.autograd.grad(c.sum(), list(tight.values()), retain_graph=True)
    transposed = torch.ones_like(c.mT, memory_format=torch.contiguous_format).mT
    for a, b in zip(from_sum, torch.autograd.grad(c, list(tight.values()), transposed), strict=True):
        assert torch.equal(a, b)


def plain_pool(prefix: bool, e: Tensor, u: Tensor | None = None, scores: Tensor | None = None) -> tuple[Tensor, ...]:
    """The formula in torch's own operators, which round what each of them returns."""
    s = e @ u if scores is None else scores
    if not prefix:
        return ((torch.softmax(s, 1)[:, None] @ e)[:, 0],)
    T = e.shape[1]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return (torch.softmax(s[:, None].expand(-1, T, -1).masked_fill(future, -float("inf")), -1) @ e,)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("B", "T", "D"), [(100, 9, 7), (50, 100, 33), (20, 200, 130)])
def test_pool_is_no_less_exact_than_torch_in_16_bits(
    B: int, T: int, D: int, folded: bool, dtype: torch.dtype, prefix: bool
) -> None:
    """Results and gradients: the root mean square of the errors is at most 1.5 times that of the formula in torch.

    Over many rows of the batch: in each, the rounding of c has one effect on all gradients of scores.
    """
    inputs = pool_inputs(B, T, D, dtype, folded=folded, state=False)
    doubles = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    weights = torch.randn(B, T, D).to(dtype) if prefix else torch.randn(B, D).to(dtype)
    results = []
    for function, arguments in (
        (pool_functions(prefix)[0], inputs),
        (partial(plain_pool, prefix), inputs),
        (partial(plain_pool, prefix), doubles),
    ):
        c = function(**arguments)[0]
        gradients = torch.autograd.grad(c, list(arguments.values()), weights.to(c.dtype))
        results.append([t.detach().double() for t in (c, *gradients)])
    for mine, other, true in zip(*results, strict=True):
        assert (mine - true).square().mean().sqrt() <= 1.5 * (other - true).square().mean().sqrt()


def test_prefix_pool_streams_past_the_cache() -> None:
    """Of what no cache holds, and whose results are fresh memory, each row is right."""
    B, T, D = 3, 5600, 512
    e, u = torch.randn(B, T, D), torch.randn(D) / 20
    weights = torch.exp((e @ u).double())[..., None]
    c, _ = ops.prefix_pool(e, u)
    assert_close("prefix_pool", c, (weights * e).cumsum(1) / weights.cumsum(1))
    e.requires_grad_()
    c, _ = ops.prefix_pool(e, u)
    (grad,) = torch.autograd.grad(c[:, -1].sum(), e)
    alpha = weights / weights.sum(1, keepdim=True)
    assert_close("prefix_pool_backward", grad, alpha * (1 + u * (e - c[:, -1:]).sum(-1, keepdim=True)))


@every_device
@pytest.mark.parametrize("prefix", [False, True])
def test_padding_holds_anything(prefix: bool, device: str) -> None:
    """What does not take part may be NaN or infinite: neither results nor gradients see it."""
    e, u = torch.randn(2, 30, 9, device=device), torch.randn(9, device=device)
    mask = torch.rand(2, 30, device=device) < 0.5
    dirty = e.masked_fill(~mask[..., None], float("nan"))
    function = pool_functions(prefix, mask=mask)[0]
    for a, b in zip(function(e, u), function(dirty, u), strict=True):
        assert torch.equal(a, b)
    dirty.requires_grad_()
    (grad,) = torch.autograd.grad(function(dirty, u)[0].sum(), dirty)
    assert grad.isfinite().all()
    assert (grad[~mask] == 0).all()


@every_device
def test_nothing_takes_part(device: str) -> None:
    e = torch.randn(3, 5, 7, device=device, requires_grad=True)
    u = torch.randn(7, device=device, requires_grad=True)
    lengths = torch.tensor([0, 5, 0], device=device)
    c, lse = ops.attention_pool(e, u, lengths=lengths)
    assert (c[[0, 2]] == 0).all()
    assert lse.tolist()[::2] == [-float("inf")] * 2
    prefix, (level, last) = ops.prefix_pool(e, u, lengths=lengths)
    assert (prefix[[0, 2]] == 0).all()
    assert (last[[0, 2]] == 0).all()
    assert level.tolist()[::2] == [-float("inf")] * 2
    grads = torch.autograd.grad(c.sum() + prefix.sum(), (e, u))
    assert (grads[0][[0, 2]] == 0).all()
    assert all(g.isfinite().all() for g in grads)


@every_device
@pytest.mark.parametrize("rise", [50.0, 70.0, 500.0])
def test_scores_of_any_size(rise: float, device: str) -> None:
    """Scores that rise or fall by more than exp can hold, within a tile of rows and across."""
    for signs in ((1, 1), (1, -1), (-1, 1)):
        e = torch.randn(2, 40, 5, dtype=torch.float64, device=device)
        scores = torch.randn(2, 40, dtype=torch.float64, device=device)
        scores[:, 13:] += signs[0] * rise
        scores[:, 29:] += signs[1] * rise
        for prefix in (False, True):
            function, truth = pool_functions(prefix)
            op = "prefix_pool" if prefix else "attention_pool"
            for a, b in zip(function(e, None, scores), truth(e, None, scores), strict=True):
                assert_close(op, a, b)
            for a, b in zip(
                function(e.float(), None, scores.float()),
                truth(e, None, scores.float().double()),
                strict=True,
            ):
                assert_close(op, a, b)


# ---- as torch ops


def opcheck_arguments() -> list[tuple[str, tuple[object, ...]]]:
    def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [leaf(*shape, dtype=torch.float64, scale=0.5) for shape in shapes]

    x, h0, w_ih, w_hh, b_ih, b_hh = tensors((3, 2, 4), (2, 5), (5, 4), (5, 5), (5,), (5,))
    packed, y, e, u, l0, c0 = tensors((4, 4), (3, 2, 5), (2, 6, 3), (3,), (2,), (2, 3))
    (scores,) = tensors((2, 6))
    gru, lstm = tensors((15, 4), (15, 5), (15,), (15,)), tensors((20, 4), (20, 5), (20,), (20,))
    p0, w_hp, w_hr, kept, gp = tensors((2, 3), (20, 3), (3, 5), (6, 30), (3, 2, 3))
    dgru, dlstm = [t.detach() for t in gru], [t.detach() for t in lstm]
    dw_hp, dw_hr, kept, gp = (t.detach() for t in (w_hp, w_hr, kept, gp))
    sizes, lengths, mask = torch.tensor([2, 1, 1]), torch.tensor([4, 0]), torch.rand(2, 6) < 0.7
    g = [t.detach() for t in (y, h0, x, w_ih, w_hh, c0, l0, e, u)]
    gy, gh, dx, dw_ih, dw_hh, gc, gl, de, du = g
    time_major = leaf(6, 2, 3, dtype=torch.float64).transpose(0, 1)
    return [
        ("rnn_forward", (x, h0, w_ih, w_hh, b_ih, b_hh, None, None, "tanh", False, False)),
        ("rnn_forward", (x, None, w_ih, w_hh, None, None, None, None, "relu", True, False)),
        (
            "rnn_forward",
            (x, h0.detach()[None].requires_grad_(), w_ih, w_hh, None, b_hh, None, None, "sigmoid", False, False),
        ),
        ("rnn_forward", (packed, h0, w_ih, w_hh, b_ih, b_hh, sizes, None, "tanh", False, False)),
        ("rnn_backward", (gy, gh, dx, gh, dw_ih, dw_hh, gy, None, None, "tanh", False, False, *[True] * 6)),
        ("rnn_backward", (gy, None, dx, None, dw_ih, dw_hh, gy, None, None, "relu", True, False, *[False, True] * 3)),
        ("gru_forward", (x, h0, *gru, None, None, False, False, True)),
        ("gru_forward", (x, None, *gru[:2], None, None, None, None, True, False, True)),
        ("gru_forward", (packed, h0.detach()[None].requires_grad_(), *gru, sizes, None, False, False, True)),
        ("gru_forward", (dx, gh, *(t.detach() for t in gru), None, None, False, False, False)),
        ("gru_backward", (gy, gh, dx, gh, *dgru[:2], gy, kept[:, :20], None, None, False, False, *[True] * 6)),
        (
            "gru_backward",
            (gy, None, dx, None, *dgru[:2], gy, kept[:, :20], None, None, True, False, *[False, True] * 3),
        ),
        ("lstm_forward", (x, h0, h0, *lstm, None, None, None, False, False, True)),
        ("lstm_forward", (x, None, None, *lstm[:2], None, None, None, None, None, True, False, True)),
        ("lstm_forward", (packed, p0, h0, lstm[0], w_hp, *lstm[2:], w_hr, sizes, None, False, False, True)),
        ("lstm_forward", (dx, gh, gh, *(t.detach() for t in lstm), None, None, None, False, False, False)),
        (
            "lstm_backward",
            (gy, gh, gh, dx, gh, gh, *dlstm[:2], None, gy, kept[:, :25], None, None, False, False, *[True] * 8),
        ),
        (
            "lstm_backward",
            (
                gp,
                None,
                None,
                dx,
                None,
                None,
                dlstm[0],
                dw_hp,
                dw_hr,
                gp,
                kept,
                None,
                None,
                True,
                False,
                *[False, True] * 4,
            ),
        ),
        ("attention_pool_forward", (e, u, None, None, None)),
        ("attention_pool_forward", (time_major, None, scores, lengths, mask)),
        ("attention_pool_backward", (gc, gl, de, du, None, lengths, mask, gc, gl, True, True, False)),
        ("prefix_pool_forward", (e, u, None, None, None, None, None)),
        ("prefix_pool_forward", (time_major, None, scores, lengths, mask, l0, c0)),
        (
            "prefix_pool_backward",
            (de, gl, gc, de, du, gc, de, torch.softmax(scores.detach(), -1), True, True, False, True),
        ),
        # What adds up over the sequence is float32 beside tensors of 16 bits.
        ("attention_pool_forward", (de.bfloat16(), du.bfloat16(), None, None, None)),
        (
            "attention_pool_backward",
            (
                gc.half(),
                gl.float(),
                de.half(),
                None,
                scores.detach().half(),
                lengths,
                mask,
                gc.half(),
                gl.float(),
                True,
                False,
                True,
            ),
        ),
        (
            "prefix_pool_forward",
            (de.bfloat16(), None, scores.detach().bfloat16(), None, None, l0.detach().float(), c0.detach().float()),
        ),
        (
            "prefix_pool_backward",
            (
                de.bfloat16(),
                gl.float(),
                gc.float(),
                de.bfloat16(),
                du.bfloat16(),
                gc.float(),
                de.bfloat16(),
                torch.softmax(scores.detach(), -1).float(),
                True,
                True,
                False,
                True,
            ),
        ),
    ]


@pytest.mark.parametrize(("op", "arguments"), opcheck_arguments(), ids=lambda a: a if isinstance(a, str) else "")
def test_opcheck(op: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.llm_ext, op).default, arguments)


def test_gradcheck() -> None:
    for cell, reverse in itertools.product([c for c in CELLS if "relu" not in str(c)], (False, True)):
        inputs = cell_inputs(cell, (4, 3, 2), 3, 5, torch.float64)
        function, names = cell_functions(cell, reverse=reverse)[0], list(inputs)
        assert torch.autograd.gradcheck(
            lambda *t, f=function, n=names: f(**dict(zip(n, t, strict=True))), tuple(inputs.values())
        )
    mask = torch.rand(2, 5) < 0.7
    for prefix, folded in itertools.product((False, True), (False, True)):
        inputs = pool_inputs(2, 5, 3, torch.float64, folded=folded, state=prefix)
        keys = list(inputs)
        function = pool_functions(prefix, mask=mask)[0]
        assert torch.autograd.gradcheck(
            lambda *t, f=function, k=keys: f(**dict(zip(k, t, strict=True))), tuple(inputs.values())
        )


def test_compile_keeps_one_node() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    e, u = torch.randn(2, 6, 3), torch.randn(3)
    for function, arguments in (
        *((cell_functions(cell)[0], cell_inputs(cell, (4, 3, 2), 3, 5, torch.float32)) for cell in KINDS),
        (lambda e, u: ops.attention_pool(e, u), {"e": e, "u": u}),
        (lambda e, u: ops.prefix_pool(e, u)[0], {"e": e, "u": u}),
    ):
        graphs.clear()
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend=backend)(**arguments)
        for a, b in zip(compiled, function(**arguments), strict=True):
            assert torch.equal(a, b)
        (graph,) = graphs
        calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert sum("llm_ext" in call for call in calls) == 1
        assert all("llm_ext" in call or "getitem" in call for call in calls), calls


@every_device
@pytest.mark.parametrize("cell", KINDS, ids=str)
def test_compile_trains(cell: Cell, device: str) -> None:
    """Through AOT autograd the gradients are the same."""
    inputs = cell_inputs(cell, (4, 3, 2), 3, 5, torch.float32, device=device)
    function, _ = cell_functions(cell)
    expected = torch.autograd.grad(function(**inputs)[0].square().sum(), list(inputs.values()))
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(**inputs)[0].square().sum(), list(inputs.values()))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@every_device
@pytest.mark.parametrize("cell", KINDS, ids=str)
def test_second_derivatives_are_refused(cell: Cell, device: str) -> None:
    inputs = cell_inputs(cell, (3, 2, 4), 2, 5, torch.float64, state=False, bias=False, device=device)
    y = cell_functions(cell)[0](**inputs)[0]
    (grad,) = torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


# ---- errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, 2)}, ValueError, r"rnn: x must be \[T, B, I\]"),
        (
            {"x": torch.zeros(3, 2, 5)},
            ValueError,
            r"rnn: x must be \[T, B, I\] = \[\*, \*, 4\], got \[3, 2, 5\]",
        ),
        ({"h0": torch.zeros(2, 6)}, ValueError, r"rnn: h0 must be \[B, H\] = \[2, 5\], got \[2, 6\]"),
        ({"w_hh": torch.zeros(5, 4)}, ValueError, "rnn: w_hh must be"),
        ({"b_ih": torch.zeros(4)}, ValueError, "rnn: b_ih must be"),
        ({"x": torch.zeros(3, 2, 4, dtype=torch.int64)}, TypeError, "rnn: x must be float32"),
        ({"x": torch.zeros(3, 2, 4, dtype=torch.float64)}, TypeError, "rnn: x must be float32"),
        ({"x": torch.zeros(3, 2, 4, device="meta")}, ValueError, "rnn: .* must be on"),
        ({"x": None}, TypeError, "rnn: x must be a Tensor"),
        ({"nonlinearity": "gelu"}, ValueError, "rnn: nonlinearity must be one of .* got 'gelu'"),
    ],
)
def test_rnn_refuses(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.zeros(3, 2, 4),
        "h0": torch.zeros(2, 5),
        "w_ih": torch.zeros(5, 4),
        "w_hh": torch.zeros(5, 5),
        "b_ih": torch.zeros(5),
        "b_hh": torch.zeros(5),
    } | changes
    with pytest.raises(error, match=message):
        ops.rnn(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("op", "changes", "error", "message"),
    [
        (ops.gru, {"w_ih": torch.zeros(16, 4)}, ValueError, r"gru: w_ih must be \[3 H, I\], got \[16, 4\]"),
        (ops.gru, {"w_hh": torch.zeros(20, 5)}, ValueError, r"gru: w_hh must be \[3 H, H\] = \[15, 5\], got"),
        (ops.gru, {"state": torch.zeros(3, 5)}, ValueError, r"gru: h0 must be \[B, H\] = \[2, 5\], got"),
        (ops.gru, {"b_hh": torch.zeros(5)}, ValueError, r"gru: b_hh must be \[3 H\] = \[15\], got \[5\]"),
        (ops.gru, {"x": torch.zeros(3, 2, 4).half()}, TypeError, "gru: x must be float32"),
        (ops.lstm, {"w_ih": torch.zeros(18, 4)}, ValueError, r"lstm: w_ih must be \[4 H, I\]"),
        (
            ops.lstm,
            {"state": (torch.zeros(2, 5), torch.zeros(2, 4))},
            ValueError,
            r"lstm: c0 must be \[B, H\] = \[2, 5\], got \[2, 4\]",
        ),
        (ops.lstm, {"state": (torch.zeros(2, 5), None)}, ValueError, "lstm: h0 and c0 must be given together"),
        (ops.lstm, {"w_hr": torch.zeros(5, 5)}, ValueError, r"lstm: w_hr must be \[P, H\] with P < H"),
        (ops.lstm, {"w_hr": torch.zeros(3, 4)}, ValueError, r"lstm: w_hr must be \[P, H\] = \[\*, 5\]"),
        (ops.lstm, {"w_hr": torch.zeros(3, 5)}, ValueError, r"lstm: h0 must be \[B, P\] = \[2, 3\]"),
    ],
)
def test_gated_cells_refuse(
    op: Callable[..., object], changes: dict[str, object], error: type[Exception], message: str
) -> None:
    rows = 15 if op is ops.gru else 20
    state = torch.zeros(2, 5)
    arguments: dict[str, object] = {
        "x": torch.zeros(3, 2, 4),
        "state": state if op is ops.gru else (state, state),
        "w_ih": torch.zeros(rows, 4),
        "w_hh": torch.zeros(rows, 5),
        "b_ih": torch.zeros(rows),
        "b_hh": torch.zeros(rows),
    } | changes
    with pytest.raises(error, match=message):
        op(arguments.pop("x"), arguments.pop("state"), **arguments)


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (NotImplementedError("Could not run"), NotImplementedError, "no kernel of this op for cpu; built with"),
        (RuntimeError("out of memory: no 8 bytes to be had on cuda:0"), torch.OutOfMemoryError, "no 8 bytes"),
        (RuntimeError("something else"), RuntimeError, "something else"),
    ],
)
def test_failures_that_no_check_finds(failure: Exception, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ops._explain(failure, lambda x: None, torch.zeros(1))


@every_device
@pytest.mark.parametrize("cell", [RNN, GRU, LSTM], ids=str)
@pytest.mark.parametrize("sizes", [[2, 3], [2, 0], [3, -1, 3], [2, 1], [5, 1]])
def test_batch_sizes_are_checked(sizes: list[int], cell: Cell, device: str) -> None:
    inputs = cell_inputs(cell, (5, 4), 2, 5, torch.float32, device=device)
    with pytest.raises(ValueError, match=rf"{cell.op}: (batch_sizes|h0) must"):
        cell_functions(cell, batch_sizes=torch.tensor(sizes))[0](**inputs)


@pytest.mark.parametrize("op", [ops.attention_pool, ops.prefix_pool])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"e": torch.zeros(2, 6)}, ValueError, r"e must be \[B, T, D\]"),
        ({"u": torch.zeros(4)}, ValueError, r"u must be \[D\] = \[3\], got \[4\]"),
        ({"scores": torch.zeros(2, 6)}, ValueError, "exactly one of u and scores"),
        ({"u": None}, ValueError, "exactly one of u and scores"),
        ({"lengths": torch.tensor([1, 7])}, ValueError, "lengths must be"),
        ({"lengths": torch.tensor([-1, 6])}, ValueError, "lengths must be"),
        ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths must be int64"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "mask must be"),
        ({"mask": torch.ones(2, 6)}, TypeError, "mask must be bool"),
        ({"e": torch.zeros(2, 6, 3, dtype=torch.int32)}, TypeError, "e must be float32"),
        ({"e": torch.zeros(2, 6, 3, dtype=torch.float16)}, TypeError, "u must be float16, got float32"),
    ],
)
def test_pools_refuse(
    op: Callable[..., object], changes: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments: dict[str, object] = {"e": torch.zeros(2, 6, 3), "u": torch.zeros(3)} | changes
    with pytest.raises(error, match=message):
        op(**arguments)


# ---- the machine


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@at_lower_levels
def test_lower_levels(level: str) -> None:
    """All tests of this file again that have to do with kernels."""
    run_tests_at(level, __file__, "recurrence or pool or scores or padding or activations or nan")


def test_level_is_forced_and_reported() -> None:
    code = "import llm_ext; print(llm_ext.build_info()['simd'])"
    for level in supported_levels():
        assert run_python(code, LLM_EXT_SIMD=level).stdout.strip() == level
    refused = run_python(code, LLM_EXT_SIMD="mmx")
    assert refused.returncode != 0
    assert "LLM_EXT_SIMD must be one of" in refused.stderr


def test_one_openmp_runtime() -> None:
    """A second OpenMP runtime beside torch's would fight it for the cores and not obey set_num_threads."""
    code = """
import torch, llm_ext
llm_ext.RNN(8, 8)(torch.randn(4, 2, 8))
maps = open("/proc/self/maps").read()
names = ("libgomp", "libiomp", "libomp")
print(len({line.split()[-1] for line in maps.splitlines() if any(name in line for name in names)}))
"""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs /proc")
    assert run_python(code).stdout.strip() == "1"


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(threads: int) -> None:
    """More threads than cores, rows or columns: the same results (in rounding), and no deadlock."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for T, B, I, H in ((40, 1, 64, 192), (20, 7, 64, 192), (6, 40, 33, 130), (1, 1, 700, 520)):  # noqa: E741
            for cell in KINDS:
                inputs = cell_inputs(cell, (T, B, I), B, H, torch.float64)
                compare(cell.op, *cell_functions(cell), inputs)
                first, second = (cell_functions(cell)[0](**inputs)[0] for _ in range(2))
                assert torch.equal(first, second)
        for B, T, D in ((1, 300, 520), (3, 100, 520), (40, 10, 200)):
            for prefix in (False, True):
                inputs = pool_inputs(B, T, D, torch.float64, folded=True, state=prefix)
                function, truth = pool_functions(prefix)
                compare("prefix_pool" if prefix else "attention_pool", function, truth, inputs)
    finally:
        torch.set_num_threads(before)


def test_same_bits() -> None:
    """Two runs give bitwise equal results and gradients."""
    pools = pool_inputs(1, 500, 130, torch.float32, folded=True, state=True)
    for function, arguments in (
        *((cell_functions(cell)[0], cell_inputs(cell, (30, 9, 40), 9, 150, torch.float32)) for cell in KINDS),
        (pool_functions(True)[0], pools),
    ):
        runs = []
        for _ in range(2):
            outputs = function(**arguments)
            runs.append((*outputs, *torch.autograd.grad([o.sum() for o in outputs], list(arguments.values()))))
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a, b)


@every_device
@pytest.mark.parametrize(("cell", "blocks"), [(RNN, 0), (GRU, 4), (LSTM, 5), (PROJECTED, 6)], ids=str)
def test_what_is_saved(cell: Cell, blocks: int, device: str) -> None:
    """Between forward and backward only inputs, outputs and, of the gated cells, blocks of H numbers a row are kept."""
    kept: list[Tensor] = []
    inputs = cell_inputs(cell, (6, 3, 4), 3, 5, torch.float32, device=device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = cell_functions(cell)[0](**inputs)[0]
    known = {t.data_ptr() for t in (*inputs.values(), y)}
    others = [t for t in kept if t.data_ptr() not in known]
    assert sum(t.numel() for t in others) == 6 * 3 * 5 * blocks
