"""Additive attention: the op against the reference, and the layer against the formula written with torch.nn."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, HALF_DTYPES, assert_close, at_lower_levels, outputs_and_gradients, run_tests_at, spread
from hypothesis import given
from hypothesis import strategies as st
from recurrences import compare, every_device, leaf
from torch import Tensor

import llm_ext
from llm_ext import ops, reference

# Nothing, one, odd, one above a block of registers (4), a vector (16) and a tile of queries (16), and several tiles.
SIZES = [  # B, Tq, Tk, A, Dv
    (0, 2, 3, 4, 5),
    (2, 0, 3, 4, 5),
    (2, 3, 0, 4, 5),
    (2, 3, 4, 0, 5),
    (2, 3, 4, 5, 0),
    (1, 1, 1, 1, 1),
    (3, 5, 7, 17, 9),
    (2, 17, 33, 33, 20),
    (4, 1, 66, 130, 64),
    (5, 10, 17, 65, 33),
    (1, 40, 130, 48, 17),
]
SELECTIONS = ("none", "lengths", "mask", "mask of each query", "both")


def inputs_of(
    B: int, Tq: int, Tk: int, A: int, Dv: int, dtype: torch.dtype, *, scale: float = 1.0, device: str = "cpu"
) -> dict[str, Tensor]:
    return {
        "query": leaf(B, Tq, A, dtype=dtype, scale=scale, device=device),
        "keys": leaf(B, Tk, A, dtype=dtype, scale=scale, device=device),
        "v": leaf(A, dtype=dtype, scale=2 * max(A, 1) ** -0.5, device=device),
        "values": leaf(B, Tk, Dv, dtype=dtype, device=device),
    }


def selection(kind: str, B: int, Tq: int, Tk: int, device: str = "cpu") -> dict[str, Tensor]:
    lengths = torch.randint(0, Tk + 1, (B,), device=device)
    mask, of_each = torch.rand(B, Tk, device=device) < 0.5, torch.rand(B, Tq, Tk, device=device) < 0.5
    return {
        "none": {},
        "lengths": {"key_lengths": lengths},
        "mask": {"mask": mask},
        "mask of each query": {"mask": of_each},
        "both": {"key_lengths": lengths, "mask": of_each},
    }[kind]


def functions(**options: object) -> list[Callable[..., tuple[Tensor, ...]]]:
    """The op and its reference, returning (context,) or (context, weights)."""

    def bind(module: object) -> Callable[..., tuple[Tensor, ...]]:
        def run(query: Tensor, keys: Tensor, v: Tensor, values: Tensor) -> tuple[Tensor, ...]:
            results = module.additive_attention(query, keys, v, values, **options)  # type: ignore[attr-defined]
            return tuple(result for result in results if result is not None)

        return run

    return [bind(ops), bind(reference)]


@every_device
@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES)
@pytest.mark.parametrize(("B", "Tq", "Tk", "A", "Dv"), SIZES)
def test_is_the_reference(
    B: int, Tq: int, Tk: int, A: int, Dv: int, dtype: torch.dtype, kind: str, device: str
) -> None:
    for need_weights in (False, True):
        inputs = inputs_of(B, Tq, Tk, A, Dv, dtype, device=device)
        chosen = selection(kind, B, Tq, Tk, device)
        compare("additive_attention", *functions(need_weights=need_weights, **chosen), inputs)


@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (6, 40, 70, 80, 40))),
    kind=st.sampled_from(SELECTIONS),
    need_weights=st.booleans(),
)
def test_any_size(sizes: tuple[int, int, int, int, int], kind: str, need_weights: bool) -> None:
    chosen = selection(kind, *sizes[:3])
    compare(
        "additive_attention", *functions(need_weights=need_weights, **chosen), inputs_of(*sizes, dtype=torch.float64)
    )


@every_device
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_rounds_less_than_torch(dtype: torch.dtype, device: str) -> None:
    """In 16 bits the error is no worse than 1.5 times that of the formula in torch."""
    inputs = inputs_of(4, 33, 40, 256, 64, dtype, device=device)
    truth = outputs_and_gradients(functions()[1], inputs, torch.float64)
    errors = []
    for function in functions():
        outputs, gradients = outputs_and_gradients(function, inputs)
        pairs = [(outputs[0], truth[0][0]), *((gradients[name], truth[1][name]) for name in inputs)]
        errors.append([(a.double() - b).abs().mean().item() for a, b in pairs])
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= 1.5 * theirs


@every_device
@pytest.mark.parametrize("size", [10.0, 22.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_and_keys_nearly_cancel(dtype: torch.dtype, size: float, device: str) -> None:
    """Of any size, and some of one much larger than the other, in the same row and beside rows that are small."""
    inputs = inputs_of(2, 19, 21, 37, 5, dtype, device=device)
    offset = size * torch.randn(2, 1, 37, device=device).sign().to(dtype)
    with torch.no_grad():
        inputs["query"][:, ::2] += offset
        inputs["keys"][:, ::3] -= offset
        inputs["keys"][:, 1, :5] -= 3 * size
        inputs["query"][:, 3, 3:20] = 0
    compare("additive_attention", *functions(need_weights=True), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_any_size(dtype: torch.dtype) -> None:
    """Scores beyond what exp can hold."""
    inputs = inputs_of(2, 17, 33, 5, 7, dtype)
    with torch.no_grad():
        inputs["v"] *= 1000
        inputs["v"][0] = 0
    actual, expected = (
        outputs_and_gradients(f, inputs, d) for f, d in zip(functions(), (None, torch.float64), strict=True)
    )
    # A score of 1000 is known to some 1e-4 in float32, and so is its weight.
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(actual[0][0].double(), expected[0][0], atol=tolerance, rtol=0)


@every_device
def test_not_contiguous(device: str) -> None:
    tight = inputs_of(3, 5, 9, 19, 6, torch.float32, device=device)
    mask, lengths = torch.rand(3, 5, 9, device=device) < 0.7, torch.tensor([9, 4, 0], device=device)
    function = functions(need_weights=True, mask=mask, key_lengths=lengths)[0]
    loose = functions(need_weights=True, mask=mask.mT.contiguous().mT, key_lengths=lengths.repeat(2, 1).T[:, 0])[0]
    for a, b in zip(function(**tight), loose(**{n: spread(t.detach()) for n, t in tight.items()}), strict=True):
        assert torch.equal(a, b)
    context = function(**tight)[0]
    from_sum = torch.autograd.grad(context.sum(), tight["keys"], retain_graph=True)[0]
    transposed = torch.ones(6, 5, 3, device=device).permute(2, 1, 0)
    assert torch.equal(from_sum, torch.autograd.grad(context, tight["keys"], transposed)[0])


@every_device
def test_only_wanted_gradients(device: str) -> None:
    inputs = inputs_of(3, 4, 5, 6, 7, torch.float64, device=device)
    function = functions(need_weights=True)[0]
    for i in range(2):
        whole = torch.autograd.grad(function(**inputs)[i].square().sum(), list(inputs.values()), allow_unused=True)
        for (name, wanted), expected in zip(inputs.items(), whole, strict=True):
            alone = {n: t if n == name else t.detach() for n, t in inputs.items()}
            (gradient,) = torch.autograd.grad(function(**alone)[i].square().sum(), wanted, allow_unused=True)
            assert torch.equal(gradient, expected)


@every_device
@pytest.mark.parametrize("garbage", [1e4, math.inf, math.nan])
def test_padding_holds_anything(garbage: float, device: str) -> None:
    """Keys that no query sees may hold anything: neither results nor gradients see it."""
    inputs = inputs_of(3, 4, 9, 18, 7, torch.float32, device=device)
    mask = torch.rand(3, 4, 9, device=device) < 0.5
    lengths = torch.tensor([9, 5, 0], device=device)
    unseen = ~(mask & (torch.arange(9, device=device) < lengths[:, None, None])).any(1)
    dirty = dict(inputs)
    for name in ("keys", "values"):
        dirty[name] = inputs[name].detach().masked_fill(unseen[..., None], garbage).requires_grad_()
    function = functions(mask=mask, key_lengths=lengths, need_weights=True)[0]
    results = [function(**given) for given in (inputs, dirty)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    gradients = [
        torch.autograd.grad(sum(r.square().sum() for r in result), list(given.values()))
        for result, given in zip(results, (inputs, dirty), strict=True)
    ]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    assert not gradients[1][1][unseen].any()
    assert not gradients[1][3][unseen].any()


@every_device
def test_nothing_takes_part(device: str) -> None:
    inputs = inputs_of(3, 4, 5, 6, 7, torch.float32, device=device)
    mask = torch.ones(3, 4, 5, dtype=torch.bool, device=device)
    mask[0, 1] = False
    lengths = torch.tensor([5, 0, 2], device=device)
    context, weights = functions(mask=mask, key_lengths=lengths, need_weights=True)[0](**inputs)
    for result in (context, weights):
        assert not result[0, 1].any()
        assert not result[1].any()
        assert result.isfinite().all()
    gradients = torch.autograd.grad((context + weights.sum(-1, keepdim=True)).square().sum(), list(inputs.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][0, 1].any()
    for i in (0, 1, 3):
        assert not gradients[i][1].any()


@every_device
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_come_through(value: float, device: str) -> None:
    """As in torch: NaN spreads, tanh of infinity is 1, and infinities that cancel are NaN."""
    inputs = {name: t.detach() for name, t in inputs_of(2, 3, 4, 18, 5, torch.float32, device=device).items()}
    inputs["query"][0, 1, 17] = value
    inputs["keys"][1, 2, 3] = -value
    inputs["query"][1, 0, 3] = value
    (actual,), (expected,) = (f(**inputs) for f in functions())
    torch.testing.assert_close(actual, expected, equal_nan=True)
    assert actual[1, 0].isnan().all()
    assert actual[0, 0].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(threads: int) -> None:
    """More threads than cores, rows or tiles: the same results (in rounding), the same bits in a second call."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for B, Tq, Tk, A, Dv in ((1, 40, 65, 200, 100), (3, 17, 40, 100, 30), (9, 3, 20, 300, 8), (1, 1, 300, 500, 40)):
            inputs = inputs_of(B, Tq, Tk, A, Dv, torch.float64)
            lengths = torch.randint(0, Tk + 1, (B,))
            function, truth = functions(need_weights=True, key_lengths=lengths)
            compare("additive_attention", function, truth, inputs)
            runs = []
            for _ in range(2):
                outputs = function(**inputs)
                runs.append(
                    (*outputs, *torch.autograd.grad([o.square().sum() for o in outputs], list(inputs.values())))
                )
            for a, b in zip(*runs, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


PEAK = """
import resource, sys, torch
from llm_ext import ops

def run(B, Tq, Tk, A, D):
    shapes = (B, Tq, A), (B, Tk, A), (A,), (B, Tk, D)
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    ops.additive_attention(*inputs)[0].sum().backward()

run(2, 3, 4, 5, 6)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(*map(int, sys.argv[1:]))
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def peak_bytes(*sizes: int) -> int:
    run = subprocess.run([sys.executable, "-c", PEAK, *map(str, sizes)], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="getrusage counts in KB on Linux")
@pytest.mark.parametrize(("B", "Tq", "Tk"), [(1, 2000, 2000), (2, 1000, 1000), (1, 1, 8000), (1, 8000, 1)])
def test_memory_grows_with_the_sum_of_queries_and_keys(B: int, Tq: int, Tk: int) -> None:
    """Forward and backward: a few tensors as large as the projected queries and keys, and none of Tq × Tk × A."""
    A = 256
    # Inputs and their gradients are 4 of them, the workspace is some more; a few MB are the allocator's.
    assert peak_bytes(B, Tq, Tk, A, A) <= 12 * 4 * B * (Tq + Tk) * A + (16 << 20)


# ---- as torch ops


def opcheck_arguments() -> list[tuple[str, tuple[object, ...]]]:
    given = tuple(inputs_of(3, 4, 5, 6, 7, torch.float64).values())
    low = tuple(inputs_of(3, 4, 5, 6, 7, torch.bfloat16).values())
    fixed = tuple(t.detach() for t in given)
    lengths, mask, of_each = torch.tensor([5, 2, 0]), torch.rand(3, 5) < 0.7, torch.rand(3, 4, 5) < 0.7
    context, lse, weights = torch.randn(3, 4, 7).double(), torch.randn(3, 4).double(), torch.rand(3, 4, 5).double()
    nothing = weights.new_empty(0)
    return [
        ("additive_attention_forward", (*given, None, None, False)),
        ("additive_attention_forward", (*given, lengths, mask, True)),
        ("additive_attention_forward", (*given, None, of_each, True)),
        ("additive_attention_forward", (*low, lengths, None, True)),
        (
            "additive_attention_backward",
            (context, weights, *fixed, lengths, of_each, context, lse, weights, *[True] * 4),
        ),
        ("additive_attention_backward", (context, None, *fixed, None, None, context, lse, nothing, *[False, True] * 2)),
        ("additive_attention_backward", (None, weights, *fixed, None, None, context, lse, weights, *[True, False] * 2)),
    ]


@pytest.mark.parametrize(("op", "arguments"), opcheck_arguments(), ids=lambda a: a if isinstance(a, str) else "")
def test_opcheck(op: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.llm_ext, op).default, arguments)


@pytest.mark.parametrize("kind", SELECTIONS)
def test_gradcheck(kind: str) -> None:
    function = functions(need_weights=True, **selection(kind, 3, 4, 5))[0]
    inputs = inputs_of(3, 4, 5, 3, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: function(*t), tuple(inputs.values()))


def test_second_derivatives_are_refused() -> None:
    inputs = inputs_of(2, 3, 4, 5, 6, torch.float64)
    (gradient,) = torch.autograd.grad(functions()[0](**inputs)[0].sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(2, 6)}, ValueError, r"query must be \[B, Tq, A\] = \[\*, \*, \*\], got \[2, 6\]"),
        ({"keys": torch.zeros(2, 4, 5)}, ValueError, r"keys must be \[B, Tk, A\] = \[2, \*, 6\], got \[2, 4, 5\]"),
        ({"v": torch.zeros(5)}, ValueError, r"v must be \[A\] = \[6\], got \[5\]"),
        ({"values": torch.zeros(2, 3, 7)}, ValueError, r"values must be \[B, Tk, Dv\] = \[2, 4, \*\], got \[2, 3, 7\]"),
        ({"values": torch.zeros(2, 4, 7).double()}, TypeError, "values must be float32, got float64"),
        ({"query": torch.zeros(2, 3, 6, dtype=torch.int64)}, TypeError, "query must be float32, float64, bfloat16 or"),
        ({"keys": torch.zeros(2, 4, 6, device="meta")}, ValueError, "keys must be on cpu like query, got meta"),
        ({"v": None}, TypeError, "v must be a Tensor, got NoneType"),
        ({"key_lengths": torch.tensor([1, 5])}, ValueError, r"key_lengths must be from 0 to Tk = 4, got \[1, 5\]"),
        ({"key_lengths": torch.tensor([-1, 4])}, ValueError, r"key_lengths must be from 0 to Tk = 4"),
        ({"key_lengths": torch.tensor([1.0, 2.0])}, TypeError, "key_lengths must be int64, got float32"),
        ({"key_lengths": torch.tensor([1])}, ValueError, r"key_lengths must be \[B\] = \[2\], got \[1\]"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"mask must be \[B, Tk\] = \[2, 4\], got \[2, 5\]"),
        ({"mask": torch.ones(2, 1, 4, dtype=torch.bool)}, ValueError, r"mask must be \[B, Tq, Tk\] = \[2, 3, 4\]"),
        ({"mask": torch.ones(2, 4)}, TypeError, "mask must be bool, got float32"),
    ],
)
def test_refuses(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "query": torch.zeros(2, 3, 6),
        "keys": torch.zeros(2, 4, 6),
        "v": torch.zeros(6),
        "values": torch.zeros(2, 4, 7),
    }
    with pytest.raises(error, match=f"additive_attention: {message}"):
        ops.additive_attention(**(arguments | changes))  # type: ignore[arg-type]


# ---- the layer


def by_hand(layer: llm_ext.AdditiveAttention, query: Tensor, keys: Tensor, values: Tensor, admitted: Tensor) -> Tensor:
    """As one writes it without a kernel: the tensor of [B, Tq, Tk, A], and the mask as -inf."""
    hidden = F.linear(query, layer.q_proj_weight)[:, :, None] + F.linear(keys, layer.k_proj_weight, layer.bias)[:, None]
    scores = (torch.tanh(hidden) * layer.v).sum(-1).masked_fill(~admitted, -math.inf)
    return torch.softmax(scores, -1) @ values


@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_the_formula(bias: bool) -> None:
    layer = llm_ext.AdditiveAttention(5, 7, 33, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    query, keys, values = leaf(3, 4, 5, dtype=torch.float64), leaf(3, 6, 7, dtype=torch.float64), torch.randn(3, 6, 9)
    values = values.double().requires_grad_()
    lengths, mask = torch.tensor([6, 3, 1]), torch.rand(3, 4, 6) < 0.5
    mask[..., 0] = True
    admitted = mask & (torch.arange(6) < lengths[:, None, None])
    wanted = [query, keys, values, *layer.parameters()]
    context, weights = layer(query, keys, values, lengths, mask, need_weights=True)
    expected = by_hand(layer, query, keys, values, admitted)
    assert_close("additive_attention", context, expected)
    assert_close("additive_attention", weights @ values, expected)
    gradients = (torch.autograd.grad(c.square().sum(), wanted) for c in (context, expected))
    for a, b in zip(*gradients, strict=True):
        assert_close("additive_attention_backward", a, b)


def test_keys_are_the_values_and_are_projected_once() -> None:
    layer = llm_ext.AdditiveAttention(5, 7, 33)
    query, keys = torch.randn(3, 4, 5), torch.randn(3, 6, 7)
    whole, none = layer(query, keys)
    assert none is None
    assert torch.equal(whole, layer(query, keys, keys)[0])
    projected = layer.project_keys(keys)
    assert torch.equal(whole, layer(query, None, keys, projected_keys=projected)[0])
    steps = [layer(query[:, t : t + 1], keys, projected_keys=projected)[0] for t in range(4)]
    assert_close("additive_attention", torch.cat(steps, 1), whole)
    for values, once in ((None, projected), (keys, None)):
        with pytest.raises(ValueError, match="keys must be given unless values and projected_keys are"):
            layer(query, None, values, projected_keys=once)


def test_text_and_names() -> None:
    layer = llm_ext.AdditiveAttention(3, 4, 5)
    assert repr(layer) == "AdditiveAttention(3, 4, 5, bias=True)"
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "q_proj_weight": (5, 3),
        "k_proj_weight": (5, 4),
        "v": (5,),
        "bias": (5,),
    }
    without = llm_ext.AdditiveAttention(3, 4, 5, bias=False, device="meta", dtype=torch.bfloat16)
    assert without.bias is None
    assert {(p.device.type, p.dtype) for p in without.parameters()} == {("meta", torch.bfloat16)}
    again = llm_ext.AdditiveAttention(3, 4, 5)
    again.load_state_dict(layer.state_dict())
    assert not layer.bias.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3)}, r"query must be \[B, Tq, Dq\] = \[\*, \*, 3\], got \[2, 3\]"),
        ({"keys": torch.zeros(2, 4, 3)}, r"keys must be \[B, Tk, Dk\] = \[\*, \*, 4\], got \[2, 4, 3\]"),
        ({"keys": torch.zeros(1, 4, 4)}, r"keys must be \[B, Tk, A\] = \[2, \*, 5\], got \[1, 4, 5\]"),
    ],
)
def test_bad_call(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm_ext.AdditiveAttention(3, 4, 5)(**{"query": torch.zeros(2, 2, 3), "keys": torch.zeros(2, 4, 4), **change})


def test_bad_constructor() -> None:
    for sizes, name in (((0, 4, 5), "query_dim"), ((3, 0, 5), "key_dim"), ((3, 4, 0), "attn_dim")):
        with pytest.raises(ValueError, match=f"AdditiveAttention: {name} must be at least 1, got 0"):
            llm_ext.AdditiveAttention(*sizes)


def test_autocast() -> None:
    """All of it runs in autocast's dtype, as torch's linear layers do; float64 stays what it is."""
    layer = llm_ext.AdditiveAttention(3, 4, 33)
    query, keys = torch.randn(2, 5, 3), torch.randn(2, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        context, weights = layer(query, keys, need_weights=True)
    assert context.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(context.float(), layer(query, keys)[0], atol=0.05, rtol=0.05)
    context.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    inputs = inputs_of(2, 3, 4, 5, 6, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert functions()[0](**inputs)[0].dtype == torch.float64


@pytest.mark.parametrize("need_weights", [False, True])
def test_compile(need_weights: bool) -> None:
    """One node of attention in the graph, and the same gradients through AOT autograd."""
    layer = llm_ext.AdditiveAttention(3, 4, 33)
    query, keys, lengths = torch.randn(2, 5, 3), torch.randn(2, 6, 4), torch.tensor([6, 2])
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def run(query: Tensor, keys: Tensor) -> list[Tensor]:
        return [t for t in layer(query, keys, key_lengths=lengths, need_weights=need_weights) if t is not None]

    torch._dynamo.reset()
    for a, b in zip(torch.compile(run, fullgraph=True, backend=backend)(query, keys), run(query, keys), strict=True):
        assert torch.equal(a, b)
    (graph,) = graphs
    assert sum("additive" in str(node.target) for node in graph.graph.nodes if node.op == "call_function") == 1
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    parameters = list(layer.parameters())
    gradients = [torch.autograd.grad([t.square().sum() for t in f(query, keys)], parameters) for f in (run, compiled)]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# ---- the levels


@at_lower_levels
def test_lower_levels(level: str) -> None:
    """The tests of the kernels again."""
    run_tests_at(level, __file__, "reference or size or torch or cancel or padding or part or infinity or gradcheck")
