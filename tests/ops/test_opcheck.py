"""torch.library.opcheck of every op: schema, fake kernel, autograd registration and AOT dispatch agree with the op."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.comparison import assert_close, flatten
from support.multilayer import multilayer_functions, multilayer_inputs, weights_of
from support.op_cases import opcheck_cases
from support.recurrences import ARCHITECTURES, Recurrence
from support.registered_ops import tensor_ops
from torch import Tensor

from llm_ext import reference

CASES = opcheck_cases()


@pytest.mark.parametrize(("op", "arguments"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_opcheck(op: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.llm_ext, op).default, arguments)


@pytest.mark.parametrize(("op", "arguments"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_tensors_on_two_devices(op: str, arguments: tuple[object, ...]) -> None:
    """A tensor without memory among others is refused: results would be uninitialized memory."""
    function = getattr(torch.ops.llm_ext, op)
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            with pytest.raises((RuntimeError, ValueError), match=r"on (one device|meta|cpu|the cpu)"):
                function(*arguments[:i], argument.to("meta"), *arguments[i + 1 :])


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
