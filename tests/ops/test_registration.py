"""Every op in torch.ops.llm_ext has a fake kernel, autograd or a stated refusal, and an autocast rule."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.comparison import assert_close, assert_same_bits
from support.recurrences import ARCHITECTURES, Recurrence, recurrence_functions, recurrence_inputs
from support.registered_ops import tensor_ops
from support.tolerances import HALF_DTYPES
from torch import Tensor

from llm_ext import ops
from llm_ext.ops import _registration

NAMES = tensor_ops()
every_op = pytest.mark.parametrize("name", NAMES)
# An index does not depend smoothly on the inputs.
NOT_DIFFERENTIABLE = {"linear_argmax"}
# Under autocast their functions take torch's own ops (linear) or float32 (quantized), or the caller does not use them
# (attention_step).
WITHOUT_AUTOCAST = {
    *(name for name in NAMES if name.startswith("quantized_")),
    "linear_forward",
    "linear_argmax",
    "attention_step",
    "recurrence_tangent",
    "recurrence_adjoint",
    "recurrence_curvature",
}


def has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"llm_ext::{name}", key)


def test_ops_are_found() -> None:
    assert {"rnn_forward", "multilayer_rnn_forward", "attention_step", "prefix_pool_backward"} <= set(NAMES)


@every_op
def test_kernel(name: str) -> None:
    assert has_kernel(name, "CPU") or name.startswith("bidirectional_"), f"{name} has no CPU kernel"


@every_op
def test_fake_kernel(name: str) -> None:
    entry = torch._library.simple_registry.singleton.find(f"llm_ext::{name}")
    assert entry.fake_impl.kernel is not None, f"{name} has no fake kernel"


@every_op
def test_autograd(name: str) -> None:
    """Without a formula a gradient would silently be missing; an op without one must refuse."""
    registered = has_kernel(name, "Autograd") or has_kernel(name, "AutogradCPU")
    assert registered or name in NOT_DIFFERENTIABLE, f"{name} has no autograd"


@every_op
def test_autocast(name: str) -> None:
    """Forward ops run in autocast's dtype; backward ops get tensors that forward has cast."""
    expected = not name.endswith("_backward") and name not in WITHOUT_AUTOCAST
    for key in ("AutocastCPU", "AutocastCUDA"):
        assert has_kernel(name, key) == expected, f"{name}: {key}"


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("recurrence", ARCHITECTURES, ids=str)
def test_autocast_of_recurrences(recurrence: Recurrence, dtype: torch.dtype) -> None:
    """Under autocast an op computes what it computes for inputs cast beforehand; float64 stays float64."""
    inputs = {n: t.detach() for n, t in recurrence_inputs(recurrence, (3, 2, 4), 2, 5, torch.float32).items()}
    function, _ = recurrence_functions(recurrence)
    with torch.autocast("cpu", dtype):
        actual = function(**inputs)
        exact = function(**{n: t.double() for n, t in inputs.items()})
    assert_same_bits(actual, function(**{n: t.to(dtype) for n, t in inputs.items()}))
    assert {t.dtype for t in actual} == {dtype}
    assert {t.dtype for t in exact} == {torch.float64}


Z = torch.zeros


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: ops.gru(x, Z(3, 3), Z(9, 4), Z(9, 3)), (5, 2, 4)),
        (lambda x: ops.multilayer_rnn("GRU", x, (Z(1, 2, 3),), [(Z(9, 4), Z(9, 3)), (Z(9, 3), Z(9, 3))]), (5, 2, 4)),
        (lambda e: ops.attention_pool(e, Z(4), lengths=torch.tensor([4, 1])), (2, 3, 4)),
        (lambda e: ops.prefix_pool(e, Z(4), lengths=torch.tensor([4, 1])), (2, 3, 4)),
        (lambda q: ops.additive_attention(q, Z(2, 3, 4), Z(5), Z(2, 3, 6)), (2, 3, 4)),
    ],
)
def test_autocast_leaves_messages(function: Callable[[Tensor], Any], shape: tuple[int, ...]) -> None:
    """A dtype that autocast would cast is not what is wrong."""
    with pytest.raises(ValueError, match="must be") as plain:
        function(Z(shape))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=re.escape(str(plain.value))):
        function(Z(shape, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (
            NotImplementedError("Could not run 'llm_ext::rnn_forward' with arguments from the 'CPU' backend"),
            NotImplementedError,
            "no kernel of this op for cpu; built with",
        ),
        (
            NotImplementedError("Could not run 'llm_ext::rnn_forward' with arguments from the 'SparseCPU' backend"),
            NotImplementedError,
            "'SparseCPU' backend",
        ),
        (NotImplementedError("something of torch"), NotImplementedError, "something of torch"),
        (RuntimeError("out of memory: cannot allocate 8 bytes on cuda:0"), torch.OutOfMemoryError, "8 bytes on cuda:0"),
        (RuntimeError("something else"), RuntimeError, "something else"),
    ],
)
def test_unexplained_failures(failure: Exception, error: type[Exception], message: str) -> None:
    """A failure in whose arguments the checks find no fault."""
    with pytest.raises(error, match=message):
        _registration.explain(failure, lambda x: None, torch.zeros(1))


# ---- torch.compile


def compile_cases() -> list[tuple[object, dict[str, Tensor]]]:
    e, u = torch.randn(2, 6, 3), torch.randn(3)
    x, weight = torch.randn(6, 4), torch.randn(5, 4)
    query, keys, v, values = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(4), torch.randn(2, 5, 6)
    recurrences = [
        (recurrence_functions(r)[0], recurrence_inputs(r, (4, 3, 2), 3, 5, torch.float32)) for r in ARCHITECTURES
    ]
    return [
        *recurrences,
        (lambda e, u: ops.attention_pool(e, u), {"e": e, "u": u}),
        (lambda e, u: ops.prefix_pool(e, u)[0], {"e": e, "u": u}),
        (lambda x, weight: ops.linear(x, weight), {"x": x, "weight": weight}),
        (
            lambda query, keys, v, values: ops.additive_attention(query, keys, v, values)[0],
            {"query": query, "keys": keys, "v": v, "values": values},
        ),
    ]


@pytest.mark.parametrize(("function", "arguments"), compile_cases(), ids=lambda value: "")
def test_compiles_to_one_node(function: object, arguments: dict[str, Tensor]) -> None:
    """torch.compile sees one op, no graph break, and nothing else."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    assert callable(function)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)(**arguments)
    assert_same_bits(compiled, function(**arguments))
    (graph,) = graphs
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("llm_ext" in call for call in calls) == 1
    assert all("llm_ext" in call or "get" in call for call in calls), calls  # getitem, getattr


@pytest.mark.parametrize("recurrence", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("lengths", [None, [4, 0, 2]])
def test_compiled_training(recurrence: Recurrence, lengths: list[int] | None) -> None:
    """Gradients through AOT autograd are those of eager mode."""
    inputs = recurrence_inputs(recurrence, (4, 3, 2), 3, 5, torch.float32)
    options = {} if lengths is None else {"lengths": torch.tensor(lengths)}
    function, _ = recurrence_functions(recurrence, **options)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = list(inputs.values())
    expected = torch.autograd.grad(function(**inputs)[0].square().sum(), leaves)
    actual = torch.autograd.grad(compiled(**inputs)[0].square().sum(), leaves)
    for a, b in zip(actual, expected, strict=True):
        assert_close(f"{recurrence.op}_backward", a, b)


def test_compiled_attention_step() -> None:
    torch.compiler.reset()
    B, H, A, D, Tk = 3, 17, 4, 9, 6
    layer = torch.nn.GRU(5, H)
    weights = [tuple(w.detach() for w in row) for row in layer.all_weights]
    attention = (torch.randn(A, H), torch.randn(B, Tk, A), torch.randn(A), torch.randn(B, Tk, D), torch.randn(D, H))
    arguments = ("GRU", torch.randn(1, B, 5), (torch.randn(1, B, H),), weights, *attention)
    compiled = torch.compile(ops.attention_step, fullgraph=True, backend="aot_eager")
    (out, state), (expected, expected_state) = compiled(*arguments), ops.attention_step(*arguments)
    assert_close("model", out, expected)
    assert_close("model", state[0], expected_state[0])
