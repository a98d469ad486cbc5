"""torch.library.opcheck of every op: schema, fake kernel, autograd registration and AOT dispatch agree with the op."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.additive_attention import additive_opcheck_cases
from support.comparison import assert_close, flatten
from support.inputs import leaf
from support.multilayer import multilayer_functions, multilayer_inputs, state_of, weights_of
from support.pooling import pool_opcheck_cases
from support.quantized import quantized_opcheck_cases
from support.recurrences import ARCHITECTURES, GRU, LSTM, RNN, Recurrence, recurrence_opcheck_cases
from support.registered_ops import tensor_ops
from torch import Tensor

from llm_ext import reference

OpCase = tuple[str, tuple[object, ...]]


def linear_opcheck_cases() -> list[OpCase]:
    x, w, b = (leaf(*shape, dtype=torch.float64) for shape in ((6, 4), (5, 4), (5,)))
    cube = leaf(2, 3, 4, dtype=torch.float64)
    grad = torch.randn(2, 3, 5, dtype=torch.float64)
    fixed = cube.detach(), w.detach()
    return [
        ("linear_forward", (x, w, b)),
        ("linear_forward", (cube, w, None)),
        ("linear_argmax", (x.detach(), w.detach(), b.detach())),
        ("linear_argmax", (*fixed, None)),
        ("linear_backward", (grad, *fixed, True, True, True)),
        ("linear_backward", (grad, *fixed, False, True, False)),
        ("linear_backward", (grad, *fixed, True, False, True)),
    ]


def multilayer_opcheck_cases() -> list[OpCase]:
    cases: list[OpCase] = []
    for recurrence, bidirectional in ((RNN, False), (GRU, True), (LSTM, False)):
        inputs = {
            name: t.detach()
            for name, t in multilayer_inputs(
                recurrence, (70, 1, 3), 1, 5, torch.float32, layers=2, bidirectional=bidirectional
            ).items()
        }
        weights = [t for row in weights_of(inputs) for t in row]
        h0, c0 = (*(state_of(inputs) or ()), None)[:2]
        directions = 1 + bidirectional
        projections = [torch.randn(9, recurrence.gates * 5) for _ in range(directions)]
        rest = (h0, c0, weights, True, bidirectional)
        cases += [
            ("multilayer_rnn_forward", (recurrence.mode, inputs["x"], *rest, [], None, False)),
            ("multilayer_rnn_forward", (recurrence.mode, torch.randint(9, (70, 1)), *rest, projections, None, False)),
            (
                "multilayer_rnn_forward",
                (recurrence.mode, inputs["x"].flatten(0, 1), *rest, [], torch.ones(70, dtype=torch.int64), False),
            ),
        ]
    return cases


def attention_step_opcheck_cases() -> list[OpCase]:
    cases: list[OpCase] = []
    B, K, H, A, D, Tk = 3, 2, 17, 4, 9, 6
    for recurrence in (RNN, GRU, LSTM):
        inputs = {
            name: t.detach()
            for name, t in multilayer_inputs(recurrence, (1, B * K, 5), B * K, H, torch.float32, layers=2).items()
        }
        weights = [t for row in weights_of(inputs) for t in row]
        h0, c0 = (*(state_of(inputs) or ()), None)[:2]
        attention = (torch.randn(A, H), torch.randn(B, Tk, A), torch.randn(A), torch.randn(B, Tk, D))
        out = (torch.tensor([6, 0, 3]), torch.randn(D, H), torch.randn(D))
        projection = torch.randn(7, recurrence.gates * H)
        cases += [
            ("attention_step", (recurrence.mode, inputs["x"], h0, c0, weights, True, None, *attention, *out)),
            (
                "attention_step",
                (recurrence.mode, torch.randint(7, (1, 6)), h0, c0, weights, True, projection, *attention, *out),
            ),
        ]
    return cases


def linearized_opcheck_cases() -> list[OpCase]:
    cases: list[OpCase] = []
    sizes = torch.tensor([3, 2])
    for mode, gates, blocks, saved in (("RNN_TANH", 1, 1, 0), ("GRU", 3, 4, 4), ("LSTM", 4, 4, 5)):
        H, N, B = 4, 5, 3
        lstm = mode == "LSTM"
        at = (
            torch.randn(gates * H, H),
            None,
            torch.rand(N, saved * H) if saved else None,
            torch.randn(N, H),
            torch.randn(B, H),
            torch.randn(B, H) if lstm else None,
        )
        right = torch.randn(N, blocks * H), torch.randn(N, H), torch.randn(N, H) if lstm else None
        state = torch.randn(B, H), torch.randn(B, H) if lstm else None
        tangents = (torch.randn(N, H), torch.randn(B, H)) if saved else (None, None)
        cases += [
            ("recurrence_tangent", (mode, *at, *right, *state, sizes, False)),
            ("recurrence_tangent", (mode, *at, None, None, None, None, None, sizes, True)),
            ("recurrence_adjoint", (mode, *at, *right, at[2], sizes, False)),
            ("recurrence_adjoint", (mode, *at, *right, None, sizes, False)),
            ("recurrence_curvature", (mode, *at, right[0], *tangents, right[1], right[2], sizes, False)),
        ]
    return cases


CASES = [
    *recurrence_opcheck_cases(),
    *multilayer_opcheck_cases(),
    *attention_step_opcheck_cases(),
    *linearized_opcheck_cases(),
    *linear_opcheck_cases(),
    *quantized_opcheck_cases(),
    *pool_opcheck_cases(),
    *additive_opcheck_cases(),
]


@pytest.mark.parametrize(("op", "arguments"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_opcheck(op: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.llm_ext, op).default, arguments)


def test_every_op_has_a_case() -> None:
    """bidirectional_*, which has no CPU kernel, is tested below."""
    registered = set(tensor_ops())
    tested = {op for op, _ in CASES}
    assert registered - tested == {"bidirectional_forward", "bidirectional_backward"}
    assert tested <= registered


class ReferenceKernels:
    """`bidirectional_forward` and its backward in plain torch on the CPU, as a device's kernels have to behave."""

    def __init__(self, library: torch.library.Library) -> None:
        library.impl("bidirectional_forward", self.forward, "CPU")  # type: ignore[no-untyped-call]
        library.impl("bidirectional_backward", self.backward, "CPU")  # type: ignore[no-untyped-call]

    @staticmethod
    def run(
        mode: str, x: Tensor, h0: Any, c0: Any, weights: list[Tensor], batch_sizes: Any, lengths: Any
    ) -> list[Tensor]:
        half = len(weights) // 2
        state = None if h0 is None else (h0,) if c0 is None else (h0, c0)
        rows = (weights[:half], weights[half:])
        results = reference.multilayer_rnn(
            mode, x, state, rows, bidirectional=True, batch_sizes=batch_sizes, lengths=lengths
        )
        tensors = flatten(results)
        return [*tensors, *[x.new_empty(0)] * (3 - len(tensors))]

    def forward(
        self,
        mode: str,
        x: Tensor,
        h0: Any,
        c0: Any,
        weights: list[Tensor],
        bias: bool,
        batch_sizes: Any,
        lengths: Any,
        tf32: bool,
        needs_autograd: bool,
    ) -> tuple[Tensor, ...]:
        results = self.run(mode, x, h0, c0, weights, batch_sizes, lengths)
        P, gates = weights[1].shape[1], {"GRU": 3, "LSTM": 4}.get(mode, 1)
        blocks = {"GRU": 4, "LSTM": 5 + (P * gates != len(weights[1]))}.get(mode, 0)
        width = blocks * len(weights[1]) // gates
        rows = 2 * x.shape[:-1].numel() if needs_autograd else 0
        return *results, x.new_zeros((rows, width) if blocks else 0)

    def backward(
        self,
        grad_y: Any,
        grad_h_n: Any,
        grad_c_n: Any,
        mode: str,
        x: Tensor,
        h0: Any,
        c0: Any,
        weights: list[Tensor],
        bias: bool,
        y: Tensor,
        saved: Tensor,
        batch_sizes: Any,
        lengths: Any,
        tf32: bool,
        *needs: bool,
    ) -> tuple[Any, ...]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, h0, c0, *weights)]
        given = [t for t in leaves if t is not None]

        def differentiate() -> tuple[Tensor, ...]:
            assert leaves[0] is not None
            own = [t for t in leaves[3:] if t is not None]
            out = self.run(mode, leaves[0], leaves[1], leaves[2], own, batch_sizes, lengths)
            loss = x.new_zeros(())
            for a, g in zip(out, (grad_y, grad_h_n, grad_c_n), strict=True):
                loss = loss if g is None else loss + (a * g).sum()
            return torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)

        # An op runs below autograd, which stays off in its own thread.
        with ThreadPoolExecutor(1) as other:
            grads = iter(other.submit(differentiate).result())
        all_grads = [x.new_empty(0) if t is None else next(grads) for t in leaves]
        first = [g if need else x.new_empty(0) for g, need in zip(all_grads[:3], needs, strict=False)]
        return *first, [g if needs[3] else x.new_empty(0) for g in all_grads[3:]]


@pytest.mark.parametrize("lengths", [None, [3, 0]])
@pytest.mark.parametrize("recurrence", ARCHITECTURES, ids=str)
def test_bidirectional_op(recurrence: Recurrence, lengths: list[int] | None) -> None:
    """Its fake kernels and autograd, tried on the CPU with the reference for a kernel."""
    library = torch.library.Library("llm_ext", "IMPL")  # type: ignore[no-untyped-call]
    try:
        ReferenceKernels(library)
        op = torch.ops.llm_ext.bidirectional_forward.default
        rows = None if lengths is None else torch.tensor(lengths)
        inputs = multilayer_inputs(recurrence, (3, 2, 4), 2, 5, torch.float64, bidirectional=True)
        weights = [t for row in weights_of(inputs) for t in row]
        x, h0, c0 = inputs["x"], inputs["h0"], inputs.get("c0")
        arguments = (recurrence.mode, x, h0, c0, weights, True, None, rows, False, recurrence.op != "rnn")
        torch.library.opcheck(op, arguments)
        actual = op(*arguments)[: 3 if recurrence.op == "lstm" else 2]
        expected = multilayer_functions(recurrence, bidirectional=True, lengths=rows)[0](**inputs)
        seeds = [torch.randn_like(t) for t in expected]
        leaves = list(inputs.values())
        for a, b in zip(
            torch.autograd.grad(actual, leaves, seeds), torch.autograd.grad(expected, leaves, seeds), strict=True
        ):
            assert_close(f"{recurrence.op}_backward", a, b)
        # Only the last weight requires a gradient.
        frozen = [t.detach() for t in weights[:-1]]
        torch.autograd.backward(
            op(recurrence.mode, x.detach(), None, None, [*frozen, weights[-1]], *arguments[5:])[0].sum()
        )
        assert weights[-1].grad is not None
    finally:
        library._destroy()  # type: ignore[no-untyped-call]
