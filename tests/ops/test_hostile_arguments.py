"""Arguments that no model passes by intention: each is refused or computed, and never reads or writes elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from support.before_memory import CALLS, CPU_CALLS, assert_refused_without_memory
from support.comparison import assert_close, assert_same_bits
from support.huge_sizes import given_tensors
from support.memory import memory_limit
from support.process import run_python
from support.random_calls import Choices, fault, outcome, random_call
from support.registered_ops import tensor_ops
from torch import Tensor

import llm_ext
from llm_ext import ops

E = torch.empty
OPS = torch.ops.llm_ext


# ---- ranks and sizes


@pytest.mark.parametrize("dim", [5, 64, 65, 67, 200])
def test_any_number_of_dimensions(dim: int) -> None:
    x, w, b = torch.randn(*[1] * (dim - 1), 4), torch.randn(3, 4), torch.randn(3)
    x.requires_grad_()
    y = ops.linear(x, w, b)
    assert y.shape == (*x.shape[:-1], 3)
    flat = x.detach().view(1, 4)
    assert_same_bits(y.view(1, 3), ops.linear(flat, w, b))
    assert torch.equal(ops.linear_argmax(x.detach(), w, b).view(1), ops.linear_argmax(flat, w, b))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_close("linear_backward", gradient.view(1, 4), w.sum(0, keepdim=True))


def test_one_dimension_too_many() -> None:
    """Every argument of every op that has a fixed number of dimensions refuses another one."""
    e, keys, values, u = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(2, 5, 6), torch.zeros(4)
    calls: list[tuple[Callable[..., object], tuple[Tensor, ...]]] = [
        (ops.attention_pool, (e, u)),
        (ops.prefix_pool, (e, u)),
        (ops.additive_attention, (e, keys, u, values)),
        (lambda x, *w: ops.rnn(x, None, *w), (e, torch.zeros(5, 4), torch.zeros(5, 5))),
        (lambda x, *w: ops.gru(x, None, *w), (e, torch.zeros(15, 4), torch.zeros(15, 5))),
        (lambda w: ops.linear(torch.zeros(3, 4), w), (torch.zeros(3, 4),)),
    ]
    for call, tensors in calls:
        call(*tensors)
        for i, tensor in enumerate(tensors):
            for shape in ((*[1] * 70, *tensor.shape), ()):
                with pytest.raises(ValueError, match="must be "):
                    call(*tensors[:i], torch.zeros(shape), *tensors[i + 1 :])


HUGE = 1 << 31  # torch allows sizes whose product is below 2^63
WRAPPING = torch.tensor([1 << 62] * 4 + [2] * 4)  # as many steps as rows


@pytest.mark.parametrize(
    "call",
    [
        # The bytes of a result wrap 2^64.
        lambda: ops.linear(E((1 << 62) + (1 << 20), 0), E(3, 0)),
        lambda: ops.linear_argmax(E((1 << 62) + (1 << 20), 0), E(3, 0)),
        # So does a size of the workspace, or the bytes of a row.
        lambda: ops.linear(E(HUGE, HUGE, 0), E(3, 0)),
        lambda: ops.attention_pool(E(HUGE, HUGE, 0), E(0)),
        lambda: ops.attention_pool(E(0, HUGE, HUGE), E(1).expand(HUGE)),
        lambda: ops.prefix_pool(E(HUGE, HUGE, 0), E(0)),
        lambda: ops.additive_attention(E(0, 2, HUGE), E(0, HUGE, HUGE), E(1).expand(HUGE), E(0, HUGE, 3)),
        lambda: ops.rnn(E(HUGE, HUGE, 0), None, E(2, 0), E(2, 2)),
        lambda: ops.gru(E(HUGE, HUGE, 0), None, E(6, 0), E(6, 2)),
        lambda: ops.multilayer_rnn("GRU", E(HUGE, HUGE, 0), None, [(E(6, 0), E(6, 2))]),
        # So would the row offsets of the steps, if they did not take too much memory before.
        lambda: ops.multilayer_rnn("GRU", E(1 << 40, 8, 0), None, [(E(6, 0), E(6, 2))]),
        # Sums of batch_sizes wrap 2^64, to the right number of rows.
        lambda: ops.rnn(E(8, 2), E(1, 3), E(3, 2), E(3, 3), batch_sizes=WRAPPING),
        lambda: OPS.rnn_forward(E(8, 2), E(1, 3), E(3, 2), E(3, 3), None, None, WRAPPING, None, "tanh", *[False] * 2),
        lambda: OPS.recurrence_tangent("RNN_TANH", E(3, 3), None, None, E(8, 3), E(1, 3), *[None] * 6, WRAPPING, False),
        # So does the sum of an expanded one.
        lambda: ops.rnn(
            E(1 << 40, 0),
            E((1 << 32) + (1 << 8), 0),
            *[E(0, 0)] * 2,
            batch_sizes=torch.tensor([(1 << 32) + (1 << 8)]).expand(1 << 32),
        ),
    ],
)
def test_sizes_that_wrap(call: Callable[[], object]) -> None:
    with (
        memory_limit(2000),
        pytest.raises((RuntimeError, ValueError), match=r"too large sizes|must sum|never rise|out of memory"),
    ):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: OPS.rnn_forward(
                *(E(4, 2), E(2, 3), E(3, 2), E(3, 3), None, None),
                *(torch.tensor([2, 1, 1]), torch.tensor([3, 1]), "tanh", False, False),
            ),
            "lengths and batch_sizes exclude each other",
        ),
        (
            lambda: OPS.multilayer_rnn_forward(
                *("GRU", torch.zeros(3, 2, 4), None, None, [E(9, 4), E(9, 3), E(9, 4), E(9, 3), E(9, 6), E(9, 3)]),
                *(False, True, [], None, False),
            ),
            "weights must be 2 tensors for each of the 2 directions of each layer, got 6",
        ),
        (
            lambda: OPS.attention_step(
                *("GRU", E(1, 5, 4), E(1, 5, 3), None, [E(9, 4), E(9, 3)], False, None),
                *(E(2, 3), E(2, 7, 2), E(2), E(2, 7, 6), None, E(6, 3), None),
            ),
            "the N = 5 rows of x a multiple of B",
        ),
    ],
    ids=["lengths", "weights", "rows"],
)
def test_ops_refuse_without_explanations(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def test_huge_sizes_that_take_no_memory() -> None:
    """Every op ends soon, or is refused for its memory, however large the sizes of tensors without elements are."""
    code = "import sys; sys.path[:] = sys.argv[1:]; from support.huge_sizes import main; main(5)"
    done = run_python(code, *sys.path)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1]}: {done.returncode}\n{done.stderr}"


def test_the_search_gives_every_tensor_of_every_op() -> None:
    """The ops of both directions at once are left out: they have no kernel on the CPU."""
    names = set(tensor_ops()) - {"bidirectional_forward", "bidirectional_backward"}
    schemas = {name: getattr(OPS, name).default._schema for name in names}
    assert given_tensors() == {
        (name, a.name) for name, schema in schemas.items() for a in schema.arguments if "Tensor" in str(a.type)
    }


@pytest.mark.parametrize("lengths", [None, torch.tensor([1 << 40, 1 << 30, 1, 0])])
def test_rows_without_numbers(lengths: Tensor | None) -> None:
    """Their results and gradients are as those of a few rows."""
    assert ops.linear(E(1 << 47, 0), E(0, 0)).shape == (1 << 47, 0)
    x = E(1 << 20, 1 << 27, 0, requires_grad=True)
    assert torch.autograd.grad(ops.linear(x, E(0, 0)).sum(), x)[0].shape == x.shape
    e, u = (E(shape, requires_grad=True) for shape in ((4, 1 << 40, 0), (0,)))
    c, lse = ops.attention_pool(e, u, lengths=lengths)
    counts = lengths.tolist() if lengths is not None else [1 << 40] * 4
    assert c.shape == (4, 0)
    assert lse.tolist() == pytest.approx([math.log(n) if n else -math.inf for n in counts])
    for gradient, like in zip(torch.autograd.grad(c.sum() + lse.sum(), (e, u)), (e, u), strict=True):
        assert gradient.shape == like.shape
    x, w_ih, w_hh = (E(shape, requires_grad=True) for shape in ((1 << 40, 0, 3), (12, 3), (12, 4)))
    y, _ = ops.gru(x, None, w_ih, w_hh)
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), (x, w_ih, w_hh)))


@pytest.mark.parametrize("call", [*CALLS.values(), *CPU_CALLS.values()], ids=[*CALLS, *CPU_CALLS])
def test_checks_come_before_memory(call: Callable[[Any], object]) -> None:
    assert_refused_without_memory(call, OPS)


def test_steps_that_no_kernel_runs() -> None:
    """Rows without numbers: their row offsets would take 17 GB."""
    x, w_ih, w_hh = E(HUGE, 1, 0), E(0, 0), E(0, 0)
    with memory_limit(2000):
        assert ops.rnn(x, None, w_ih, w_hh)[0].shape == x.shape
        assert ops.multilayer_rnn("RNN_TANH", x, None, [(w_ih, w_hh)] * 2)[0].shape == x.shape
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(ops.rnn(x, None, w_ih, w_hh)[0].sum(), x)
    assert gradient.shape == x.shape


# ---- states


def test_states_of_two_ranks() -> None:
    x, w_ih, w_hh = torch.zeros(3, 2, 4), torch.zeros(20, 4), torch.zeros(20, 5)
    for h0, c0 in ((torch.zeros(1, 2, 5), torch.zeros(2, 5)), (torch.zeros(2, 5), torch.zeros(1, 2, 5))):
        with pytest.raises(ValueError, match="c0 must have as many dimensions as h0"):
            ops.lstm(x, (h0, c0), w_ih, w_hh)
        arguments = (x, h0, c0, w_ih, w_hh, *[None] * 5, False, False, False)
        for device in ("cpu", "meta"):
            with pytest.raises((RuntimeError, ValueError), match="c0 must have as many dimensions as h0"):
                OPS.lstm_forward(*(a.to(device) if isinstance(a, Tensor) else a for a in arguments))


# ---- memory


def _calls() -> dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]]:
    """Functions of one large tensor, and its shape."""
    return {
        "linear": (lambda x: ops.linear(x, torch.zeros(1, 4096)), (4096, 4096)),
        "attention_pool": (lambda e: ops.attention_pool(e, torch.zeros(1024))[0], (64, 256, 1024)),
        "prefix_pool": (lambda e: ops.prefix_pool(e, torch.zeros(1024))[1][1], (64, 256, 1024)),
        "additive_attention": (
            lambda k: ops.additive_attention(torch.zeros(64, 1, 1024), k, torch.zeros(1024), torch.zeros(64, 256, 1))[
                0
            ],
            (64, 256, 1024),
        ),
        "rnn": (lambda x: ops.rnn(x, None, torch.zeros(1, 4096), torch.zeros(1, 1))[1], (4096, 1, 4096)),
    }


@pytest.mark.parametrize("name", _calls())
def test_out_of_memory_in_a_backward_pass(name: str) -> None:
    call, shape = _calls()[name]
    x = torch.zeros(shape, requires_grad=True)
    loss = call(x).sum()
    llm_ext.empty_cpu_cache()
    with memory_limit(16), pytest.raises(torch.OutOfMemoryError, match="out of memory: cannot allocate 67108864 bytes"):
        torch.autograd.backward(loss)


# ---- anything at all


class Drawn(Choices):
    """Choices of hypothesis, which finds the smallest call that fails."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data

    def number(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))


@given(data=st.data())
@settings(max_examples=120)
def test_random_calls(data: st.DataObject) -> None:
    """`make fuzz` makes many more of them, in a process of its own and between guard pages."""
    call = random_call(Drawn(data))
    note(str(call))
    with memory_limit(2000):
        first, refused = outcome(call)
        second, _ = outcome(call)
    assert fault(call, first, second, refused, compares=not call.changed) is None
