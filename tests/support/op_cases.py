"""Valid arguments of every registered op: of torch.library.opcheck, and for changes that make them hostile."""

from __future__ import annotations

import torch

from support.additive_attention import additive_opcheck_cases
from support.inputs import leaf
from support.multilayer import multilayer_inputs, state_of, weights_of
from support.pooling import pool_opcheck_cases
from support.quantized import quantized_opcheck_cases
from support.recurrences import GRU, LSTM, RNN, recurrence_opcheck_cases

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


def opcheck_cases() -> list[OpCase]:
    """(op, arguments) of every op that has a CPU kernel."""
    return [
        *recurrence_opcheck_cases(),
        *multilayer_opcheck_cases(),
        *attention_step_opcheck_cases(),
        *linearized_opcheck_cases(),
        *linear_opcheck_cases(),
        *quantized_opcheck_cases(),
        *pool_opcheck_cases(),
        *additive_opcheck_cases(),
    ]
