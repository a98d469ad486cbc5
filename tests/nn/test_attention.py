"""AttentionPool and AdditiveAttention beside the formulas in torch's own operators, in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.additive_attention import additive_functions, additive_inputs
from support.comparison import assert_close, assert_same_bits, compare, flatten
from support.inputs import leaf
from support.pairwise import parametrize_pairwise
from support.pooling import log_sum_exp
from support.tolerances import ALL_DTYPES, DTYPES, HALF_DTYPES
from torch import Tensor

import llm_ext

FLAGS = (False, True)
SCORES = ("linear", "tanh")
every_score = pytest.mark.parametrize("score", SCORES)
every_causal = pytest.mark.parametrize("causal", FLAGS)

# ---- AttentionPool


def expected_weights(pool: llm_ext.AttentionPool, e: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """The weights [B, T], or [B, T, T] if causal, with W e formed and the mask as a matrix."""
    B, T, _ = e.shape
    inner = e @ pool.weight.T
    s = (inner if pool.bias is None else torch.tanh(inner + pool.bias)) @ pool.v
    unmasked = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    if lengths is not None:
        unmasked = unmasked & (torch.arange(T) < lengths[:, None])
    if pool.causal:
        unmasked = unmasked[:, None] & torch.ones(T, T, dtype=torch.bool).tril()
        s = s[:, None].expand(B, T, T)
    # exp(-1e30) is 0 beside any other score; rows that are masked altogether are set to zero.
    return torch.softmax(s.masked_fill(~unmasked, -1e30), -1) * unmasked


def selected_positions(B: int, T: int, kind: str) -> dict[str, Tensor]:
    lengths = torch.randint(0, T + 1, (B,))
    mask = torch.rand(B, T) < 0.5
    lengths[-1], mask[-1] = 0, False
    selections: dict[str, dict[str, Tensor]] = {
        "none": {},
        "lengths": {"lengths": lengths},
        "both": {"lengths": lengths, "mask": mask.flip(0)},
    }
    return selections[kind]


@parametrize_pairwise(
    sizes=((1, 1, 1, 1), (3, 17, 5, 3), (2, 33, 17, 33)),
    dtype=ALL_DTYPES,
    kind=("none", "lengths", "both"),
    causal=FLAGS,
    score=SCORES,
)
def test_pool_formula(sizes: tuple[int, ...], dtype: torch.dtype, kind: str, causal: bool, score: str) -> None:
    B, T, D, A = sizes
    pool = llm_ext.AttentionPool(D, A, score, causal, dtype=dtype)
    selection = selected_positions(B, T, kind)
    inputs = {"e": leaf(B, T, D, dtype=dtype), **dict(pool.named_parameters())}

    def run(e: Tensor, **parameters: Tensor) -> tuple[Tensor, Tensor]:
        results = torch.func.functional_call(pool, parameters, (e,), {"need_weights": True, **selection})
        return results[0], results[-1]

    def formula(e: Tensor, **parameters: Tensor) -> tuple[Tensor, Tensor]:
        exact = copy.deepcopy(pool).double()
        for name, parameter in parameters.items():
            delattr(exact, name)
            setattr(exact, name, parameter)
        weights = expected_weights(exact, e, selection.get("lengths"), selection.get("mask"))
        return weights @ e if causal else torch.einsum("bt,btd->bd", weights, e), weights

    compare("prefix_pool" if causal else "attention_pool", (run, formula), inputs)


@every_causal
@pytest.mark.parametrize("dtype", DTYPES)
def test_folded_weights(dtype: torch.dtype, causal: bool) -> None:
    pool = llm_ext.AttentionPool(5, 3, causal=causal, dtype=dtype)
    e = torch.randn(3, 17, 5, dtype=dtype)
    u = pool.fold()
    assert u is not None
    torch.testing.assert_close(e @ u, e @ pool.weight.T @ pool.v)
    assert_same_bits(pool(e, need_weights=True, u=u), pool(e, need_weights=True))
    tanh = llm_ext.AttentionPool(5, 3, "tanh", causal, dtype=dtype)
    assert tanh.fold() is None
    with pytest.raises(ValueError, match="u must be None with a tanh score"):
        tanh(e, u=u)


@every_score
@every_causal
def test_pool_gradcheck(causal: bool, score: str) -> None:
    pool = llm_ext.AttentionPool(3, 2, score, causal, dtype=torch.float64)
    names, parameters = zip(*pool.named_parameters(), strict=True)
    e = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 2, 0])
    state: tuple[Tensor, ...] = ()
    if causal:
        L = torch.tensor([[0.5, 1.5], [-1, 2], [0.2, 1]], dtype=torch.float64)
        state = (L.requires_grad_(), leaf(3, 3, dtype=torch.float64))

    def run(e: Tensor, *tensors: Tensor) -> list[Tensor]:
        named = dict(zip(names, tensors, strict=False))
        past = tensors[len(names) :] or None
        options = {"lengths": lengths, "need_weights": True, "state": past}
        results = torch.func.functional_call(pool, named, (e,), options)
        if not causal:
            return flatten(results)
        c, (L, last), weights = results
        return [c, log_sum_exp(L), last, weights]

    assert torch.autograd.gradcheck(run, (e, *parameters, *state))


@every_score
@pytest.mark.parametrize("cut", [0, 1, 5, 9])
def test_causal_pool_in_pieces(cut: int, score: str) -> None:
    pool: Any = llm_ext.AttentionPool(3, 5, score, causal=True, dtype=torch.float64)
    e, mask = torch.randn(4, 9, 3, dtype=torch.float64), torch.rand(4, 9) < 0.6
    whole, (L, last), weights = pool(e, mask=mask, need_weights=True)
    first, state = pool(e[:, :cut], mask=mask[:, :cut])
    second, state, second_weights = pool(e[:, cut:], mask=mask[:, cut:], need_weights=True, state=state)
    assert_close("prefix_pool", torch.cat((first, second), 1), whole)
    assert_close("prefix_pool", state[0], L)
    assert_close("prefix_pool", state[1], last)
    # The weights of the second piece sum to 1 minus those of the first.
    assert_close("prefix_pool", second_weights, weights[:, cut:, cut:])
    assert torch.equal(last, whole[:, -1])


def test_no_position_sees_the_future() -> None:
    pool: Any = llm_ext.AttentionPool(3, 5, causal=True, dtype=torch.float64)
    e = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    changed = e.detach().clone()
    changed[:, 6:] += 1
    before, after = pool(e)[0], pool(changed)[0]
    # Later scores may share a scale with earlier ones, which changes the rounding of these and no more.
    assert_close("prefix_pool", after[:, :6], before[:, :6])
    assert not torch.isclose(after[:, 6:], before[:, 6:]).all(-1).any()
    (gradient,) = torch.autograd.grad(before[:, :6].sum(), e)
    assert not gradient[:, 6:].any()


@parametrize_pairwise(garbage=(1e4, math.nan, math.inf), kind=("lengths", "mask"), causal=FLAGS, score=SCORES)
def test_padding_is_ignored(garbage: float, kind: str, causal: bool, score: str) -> None:
    """No bit of a result or gradient depends on it."""
    pool: Any = llm_ext.AttentionPool(3, 5, score, causal)
    e, lengths = torch.randn(3, 7, 3), torch.tensor([7, 4, 0])
    padding = torch.arange(7) >= lengths[:, None]
    where = {"lengths": lengths} if kind == "lengths" else {"mask": ~padding}
    for need_weights in FLAGS:
        tensors = []
        for filled in (e, e.masked_fill(padding[..., None], garbage)):
            leaves = [filled.clone().requires_grad_(), *pool.parameters()]
            results = flatten(pool(leaves[0], **where, need_weights=need_weights))
            loss = torch.stack([t.masked_fill(t.isinf(), 0).square().sum() for t in results]).sum()
            tensors.append([*results, *torch.autograd.grad(loss, leaves)])
        assert_same_bits(*tensors)
        gradient = tensors[0][len(results)]
        assert not gradient[padding].any()
        assert gradient[~padding].any()


@every_causal
@pytest.mark.parametrize(("B", "T"), [(0, 4), (3, 0), (0, 0)])
def test_pool_of_nothing(B: int, T: int, causal: bool) -> None:
    pool: Any = llm_ext.AttentionPool(3, 5, causal=causal)
    c, *_, weights = pool(torch.zeros(B, T, 3), need_weights=True)
    assert torch.equal(c, torch.zeros((B, T, 3) if causal else (B, 3)))
    assert weights.shape == ((B, T, T) if causal else (B, T))


@every_score
@every_causal
def test_pool_autocast(causal: bool, score: str) -> None:
    pool: Any = llm_ext.AttentionPool(3, 5, score, causal)
    e = torch.randn(2, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = pool(e)
        if causal:  # the state stays in float32
            c, state = found
            assert all(tensor.dtype == torch.float32 for tensor in state)
            found = torch.cat((c, pool(e, state=state)[0]), 1)
        with pytest.raises(ValueError, match="lengths must be from 0 to T = 4"):
            pool(e.bfloat16(), lengths=torch.tensor([5, 1]))
    expected = pool(torch.cat((e, e), 1))[0] if causal else pool(e)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


@every_causal
@pytest.mark.parametrize("autocast", FLAGS)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_pool_weights_of_large_scores(dtype: torch.dtype, autocast: bool, causal: bool) -> None:
    """The weights are rounded, the scores of about 30 are not, as in the op."""
    pool: Any = llm_ext.AttentionPool(4, 4, causal=causal, dtype=torch.float32 if autocast else dtype)
    e = torch.randn(3, 9, 4, dtype=dtype)
    u = (10 * torch.randn(4)).to(dtype)
    state = (torch.tensor([[20.0, 1.5]]).expand(3, 2), torch.randn(3, 4)) if causal else None
    with torch.autocast("cpu", dtype, enabled=autocast):
        *_, weights = pool(e.float() if autocast else e, need_weights=True, u=u, state=state)
    assert weights.dtype == dtype
    s = e.double() @ u.double()
    if causal:
        future = torch.ones(9, 9, dtype=torch.bool).triu(1)
        past = torch.full((3, 9, 1), 20 + math.log(1.5), dtype=torch.float64)
        s = torch.cat((past, s[:, None].expand(3, 9, 9).masked_fill(future, -math.inf)), -1)
    expected = s.softmax(-1)[..., 1:] if causal else s.softmax(-1)
    # An eps in place of half an eps: float32 scores of 60 are off by 4e-6.
    torch.testing.assert_close(weights.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_pool_weights_after_a_state_that_counts_nothing() -> None:
    """Whatever its largest score is, z = 0 means no position, and no gradient."""
    pool: Any = llm_ext.AttentionPool(3, 4, causal=True)
    e, L = torch.randn(2, 5, 3), torch.zeros(2, 2, requires_grad=True)
    *_, weights = pool(e, need_weights=True, state=(L, torch.zeros(2, 3)))
    torch.testing.assert_close(weights, pool(e, need_weights=True)[-1])
    (grad,) = torch.autograd.grad(weights.square().sum(), L)
    assert not grad.any()


@every_score
def test_pool_refuses_another_dtype(score: str) -> None:
    """Parameters are cast under autocast alone."""
    pool = llm_ext.AttentionPool(3, 4, score)
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(TypeError, match="AttentionPool: e must be float32, got"):
            pool(torch.zeros(2, 5, 3, dtype=dtype))
    with pytest.raises(ValueError, match="AttentionPool: e must be on cpu like the weights, got meta"):
        pool(torch.zeros(2, 5, 3, device="meta"))


def test_pool_repr_and_parameters() -> None:
    pool = llm_ext.AttentionPool(3, 5, "tanh", causal=True)
    assert repr(pool) == "AttentionPool(3, 5, score='tanh', causal=True)"
    assert {name: tuple(p.shape) for name, p in pool.named_parameters()} == {"weight": (5, 3), "v": (5,), "bias": (5,)}
    assert [name for name, _ in llm_ext.AttentionPool(3, 5).named_parameters()] == ["weight", "v"]
    assert pool.bias is not None
    assert not pool.bias.any()


Z = torch.zeros


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"e": Z(2, 3)}, r"e must be \[B, T, D\] = \[\*, \*, 3\], got \[2, 3\]"),
        ({"e": Z(2, 4, 5)}, r"e must be \[B, T, D\] = \[\*, \*, 3\], got \[2, 4, 5\]"),
        ({"e": Z(2, 4, 3, dtype=torch.int64)}, "AttentionPool: e must be float32, got int64"),
        ({"lengths": torch.ones(3, dtype=torch.int64)}, r"lengths must be \[B\] = \[2\], got \[3\]"),
        ({"lengths": torch.ones(2)}, "lengths must be int64, got float32"),
        ({"lengths": [1, 2]}, "lengths must be a Tensor, got list"),
        ({"lengths": torch.tensor([-1, 2])}, r"pool: lengths must be from 0 to T = 4, got \["),
        ({"lengths": torch.tensor([5, 2])}, r"pool: lengths must be from 0 to T = 4, got \["),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, r"mask must be \[B, T\] = \[2, 4\], got \[2, 3\]"),
        ({"mask": torch.ones(2, 4)}, "mask must be bool, got float32"),
        ({"state": (Z(2), Z(2, 3))}, r"state L must be \[B, 2\] = \[2, 2\], got \[2\]"),
        ({"state": (Z(2, 2), Z(2, 4))}, r"state c must be \[B, D\] = \[2, 3\], got \[2, 4\]"),
        ({"state": (Z(2, 2).double(), Z(2, 3))}, "state L must be float32, got float64"),
        ({"state": (Z(2, 2), Z(2, 3).bfloat16())}, "state c must be float32, got bfloat16"),
    ],
)
def test_pool_refuses(arguments: dict[str, Any], message: str) -> None:
    for causal in FLAGS:
        if causal or "state" not in arguments:
            with pytest.raises((ValueError, TypeError), match=message):
                llm_ext.AttentionPool(3, 5, causal=causal)(**({"e": Z(2, 4, 3)} | arguments))


def test_state_needs_a_causal_pool() -> None:
    with pytest.raises(ValueError, match="state must be None unless causal=True"):
        llm_ext.AttentionPool(3, 5)(Z(2, 4, 3), state=(Z(2), Z(2, 3)))


def test_pool_constructor_refuses() -> None:
    with pytest.raises(ValueError, match=r"score must be one of .* got 'dot'"):
        llm_ext.AttentionPool(3, 5, "dot")
    with pytest.raises(ValueError, match="attn_dim must be at least 1, got 0"):
        llm_ext.AttentionPool(3, 0)


# ---- AdditiveAttention


@pytest.mark.parametrize("bias", [True, False])
def test_additive_formula(bias: bool) -> None:
    """The formula as one writes it without a kernel: a tensor [B, Tq, Tk, A], and the mask as -inf."""
    layer = llm_ext.AdditiveAttention(5, 7, 33, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    query, keys, values = (leaf(*shape, dtype=torch.float64) for shape in ((3, 4, 5), (3, 6, 7), (3, 6, 9)))
    lengths, mask = torch.tensor([6, 3, 1]), torch.rand(3, 4, 6) < 0.5
    mask[..., 0] = True
    unmasked = mask & (torch.arange(6) < lengths[:, None, None])
    hidden = F.linear(query, layer.q_proj_weight)[:, :, None] + F.linear(keys, layer.k_proj_weight, layer.bias)[:, None]
    scores = (torch.tanh(hidden) * layer.v).sum(-1).masked_fill(~unmasked, -math.inf)
    expected = torch.softmax(scores, -1) @ values
    context, weights = layer(query, keys, values, lengths, mask, need_weights=True)
    assert_close("additive_attention", context, expected)
    assert_close("additive_attention", weights @ values, expected)
    leaves = [query, keys, values, *layer.parameters()]
    gradients = (torch.autograd.grad(c.square().sum(), leaves) for c in (context, expected))
    for a, b in zip(*gradients, strict=True):
        assert_close("additive_attention_backward", a, b)


@pytest.mark.parametrize("garbage", [1e4, math.nan, math.inf])
@pytest.mark.parametrize("kind", ["lengths", "mask", "mask of queries"])
def test_additive_padding_is_ignored(garbage: float, kind: str) -> None:
    """No bit of a result or gradient depends on it."""
    layer = llm_ext.AdditiveAttention(5, 3, 9)
    query, keys, lengths = torch.randn(3, 4, 5), torch.randn(3, 7, 3), torch.tensor([7, 4, 0])
    padding = torch.arange(7) >= lengths[:, None]
    mask = ~padding if kind == "mask" else ~padding[:, None].expand(3, 4, 7)
    where = {"key_lengths": lengths} if kind == "lengths" else {"mask": mask}
    tensors = []
    for filled in (keys, keys.masked_fill(padding[..., None], garbage)):
        leaves = [query.clone().requires_grad_(), filled.clone().requires_grad_(), *layer.parameters()]
        context, weights = layer(*leaves[:2], **where, need_weights=True)
        loss = context.square().sum() + weights.square().sum()
        tensors.append([context, weights, *torch.autograd.grad(loss, leaves)])
    assert_same_bits(*tensors)
    assert not tensors[0][3][padding].any()


def test_projected_keys() -> None:
    """Keys are the default values, and may be projected once for several calls."""
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


def test_additive_repr_and_parameters() -> None:
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
    assert layer.bias is not None
    assert not layer.bias.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": Z(2, 3)}, r"query must be \[B, Tq, Dq\] = \[\*, \*, 3\], got \[2, 3\]"),
        ({"keys": Z(2, 4, 3)}, r"keys must be \[B, Tk, Dk\] = \[2, \*, 4\], got \[2, 4, 3\]"),
        ({"keys": Z(1, 4, 4)}, r"keys must be \[B, Tk, Dk\] = \[2, \*, 4\], got \[1, 4, 4\]"),
        ({"projected_keys": Z(2, 4, 6)}, r"projected_keys must be \[B, Tk, A\] = \[2, \*, 5\], got \[2, 4, 6\]"),
        ({"query": Z(2, 2, 3).double()}, "AdditiveAttention: query must be float32, got float64"),
        ({"keys": Z(2, 4, 4).double()}, "AdditiveAttention: keys must be float32, got float64"),
        ({"keys": Z(2, 4, 4, device="meta")}, "AdditiveAttention: keys must be on cpu like the weights, got meta"),
        ({"key_lengths": torch.tensor([4, 5])}, r"key_lengths must be from 0 to Tk = 4, got \[4, 5\]"),
        ({"mask": torch.ones(2, 3)}, r"mask must be \[B, Tk\] = \[2, 4\], got \[2, 3\]"),
        ({"mask": torch.ones(2, 2, 4)}, "mask must be bool, got float32"),
    ],
)
def test_additive_refuses(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm_ext.AdditiveAttention(3, 4, 5)(**{"query": Z(2, 2, 3), "keys": Z(2, 4, 4), **changes})


def test_pool_with_tanh_refuses() -> None:
    with pytest.raises(TypeError, match="AttentionPool: e must be float32, got float64"):
        llm_ext.AttentionPool(3, 5, "tanh")(Z(2, 4, 3).double())


def test_additive_constructor_refuses() -> None:
    for sizes, name in (((0, 4, 5), "query_dim"), ((3, 0, 5), "key_dim"), ((3, 4, 0), "attn_dim")):
        with pytest.raises(ValueError, match=f"AdditiveAttention: {name} must be at least 1, got 0"):
            llm_ext.AdditiveAttention(*sizes)


def test_additive_autocast() -> None:
    """The whole layer runs in autocast's dtype, as torch's linear layers do; float64 stays float64."""
    layer = llm_ext.AdditiveAttention(3, 4, 33)
    query, keys = torch.randn(2, 5, 3), torch.randn(2, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        context, weights = layer(query, keys, need_weights=True)
    assert weights is not None
    assert context.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(context.float(), layer(query, keys)[0], atol=0.05, rtol=0.05)
    torch.autograd.backward(context.float().sum())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    inputs = additive_inputs(2, 3, 4, 5, 6, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert additive_functions()[0](**inputs)[0].dtype == torch.float64
        # A dtype that is cast is not what is wrong.
        with pytest.raises(ValueError, match="key_lengths must be from 0 to Tk = 6"):
            layer(query.bfloat16(), keys.bfloat16(), key_lengths=torch.tensor([7, 1]))


@pytest.mark.parametrize("need_weights", FLAGS)
def test_additive_compiled(need_weights: bool) -> None:
    """One node of attention in the graph, and the same gradients through AOT autograd."""
    layer = llm_ext.AdditiveAttention(3, 4, 33)
    query, keys, lengths = torch.randn(2, 5, 3), torch.randn(2, 6, 4), torch.tensor([6, 2])
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def run(query: Tensor, keys: Tensor) -> list[Tensor]:
        return [t for t in layer(query, keys, key_lengths=lengths, need_weights=need_weights) if t is not None]

    torch.compiler.reset()
    assert_same_bits(torch.compile(run, fullgraph=True, backend=backend)(query, keys), run(query, keys))
    (graph,) = graphs
    assert sum("additive" in str(node.target) for node in graph.graph.nodes if node.op == "call_function") == 1
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    parameters = list(layer.parameters())
    assert_same_bits(
        *(torch.autograd.grad([t.square().sum() for t in f(query, keys)], parameters) for f in (run, compiled))
    )
