"""llm_ext.AttentionPool beside the formula as a textbook writes it, in float64."""

import copy
import math

import cases
import pytest
import torch
from torch import Tensor

import llm_ext


def weights_by_hand(pool: llm_ext.AttentionPool, e: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """α [B, T], or [B, T, T] when causal, from scores that form W e_i and the mask as a matrix."""
    B, T, _ = e.shape
    inner = e @ pool.weight.T
    s = (inner if pool.score == "linear" else torch.tanh(inner + pool.bias)) @ pool.v
    admitted = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    if lengths is not None:
        admitted = admitted & (torch.arange(T) < lengths[:, None])
    if pool.causal:
        admitted = admitted[:, None] & torch.ones(T, T, dtype=torch.bool).tril()
        s = s[:, None].expand(B, T, T)
    # A score of -1e30 is nothing beside any other; rows of nothing else are put to zero.
    return torch.softmax(s.masked_fill(~admitted, -1e30), -1) * admitted


def positions(B: int, T: int, kind: str) -> dict[str, Tensor]:
    lengths = torch.randint(0, T + 1, (B,))
    mask = torch.rand(B, T) < 0.5
    lengths[-1], mask[-1] = 0, False
    return {"none": {}, "lengths": {"lengths": lengths}, "both": {"lengths": lengths, "mask": mask.flip(0)}}[kind]


@pytest.mark.parametrize("score", ["linear", "tanh"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "lengths", "both"])
@pytest.mark.parametrize("dtype", cases.DTYPES + cases.HALF_DTYPES)
@pytest.mark.parametrize(("B", "T", "D", "A"), [(1, 1, 1, 1), (3, 17, 5, 3), (2, 33, 17, 33)])
def test_is_the_formula(
    B: int, T: int, D: int, A: int, dtype: torch.dtype, kind: str, causal: bool, score: str
) -> None:
    pool = llm_ext.AttentionPool(D, A, score, causal, dtype=dtype)
    part = positions(B, T, kind)
    arguments = {"e": torch.randn(B, T, D, dtype=dtype), **dict(pool.named_parameters())}

    def run(e: Tensor, **parameters: Tensor) -> tuple[Tensor, Tensor]:
        results = torch.func.functional_call(pool, parameters, (e,), {"return_weights": True, **part})
        return results[0], results[-1]

    def by_hand(e: Tensor, **parameters: Tensor) -> tuple[Tensor, Tensor]:
        true_pool = copy.deepcopy(pool).double()
        for name, parameter in parameters.items():
            delattr(true_pool, name)
            setattr(true_pool, name, parameter)
        weights = weights_by_hand(true_pool, e, part.get("lengths"), part.get("mask"))
        return weights @ e if causal else torch.einsum("bt,btd->bd", weights, e), weights

    cases.assert_same("prefix_pool" if causal else "attention_pool", run, by_hand, arguments)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_folded_once_for_many_calls(dtype: torch.dtype, causal: bool) -> None:
    pool = llm_ext.AttentionPool(5, 3, causal=causal, dtype=dtype)
    e = torch.randn(3, 17, 5, dtype=dtype)
    u = pool.fold()
    torch.testing.assert_close(e @ u, e @ pool.weight.T @ pool.v)
    for given, formed in zip(pool(e, return_weights=True, u=u), pool(e, return_weights=True), strict=True):
        torch.testing.assert_close(given, formed, rtol=0, atol=0)
    tanh = llm_ext.AttentionPool(5, 3, "tanh", causal, dtype=dtype)
    assert tanh.fold() is None
    with pytest.raises(ValueError, match="u must be None with a tanh score"):
        tanh(e, u=u)


@pytest.mark.parametrize("score", ["linear", "tanh"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal: bool, score: str) -> None:
    pool = llm_ext.AttentionPool(3, 2, score, causal, dtype=torch.float64)
    names, parameters = zip(*pool.named_parameters(), strict=True)
    e = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 2, 0])
    state = None
    if causal:
        state = (
            torch.randn(3, dtype=torch.float64, requires_grad=True),
            torch.randn(3, 3, dtype=torch.float64, requires_grad=True),
        )

    def run(e: Tensor, *tensors: Tensor) -> list[Tensor]:
        named = dict(zip(names, tensors, strict=False))
        past = tensors[len(names) :] or None
        options = {"lengths": lengths, "return_weights": True, "state": past}
        return cases.flatten(torch.func.functional_call(pool, named, (e,), options))

    assert torch.autograd.gradcheck(run, (e, *parameters, *(state or ())))


@pytest.mark.parametrize("score", ["linear", "tanh"])
@pytest.mark.parametrize("cut", [0, 1, 5, 9])
def test_pieces(cut: int, score: str) -> None:
    pool = llm_ext.AttentionPool(3, 5, score, causal=True, dtype=torch.float64)
    e, mask = torch.randn(4, 9, 3, dtype=torch.float64), torch.rand(4, 9) < 0.6
    whole, (L, last), weights = pool(e, mask=mask, return_weights=True)
    first, state = pool(e[:, :cut], mask=mask[:, :cut])
    second, state, second_weights = pool(e[:, cut:], mask=mask[:, cut:], return_weights=True, state=state)
    cases.assert_close("prefix_pool", torch.cat((first, second), 1), whole)
    cases.assert_close("prefix_pool", state[0], L)
    cases.assert_close("prefix_pool", state[1], last)
    # What the weights of the second piece lack of 1 is what the first piece has.
    cases.assert_close("prefix_pool", second_weights, weights[:, cut:, cut:])
    assert torch.equal(last, whole[:, -1])


def test_position_sees_no_future() -> None:
    pool = llm_ext.AttentionPool(3, 5, causal=True, dtype=torch.float64)
    e = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    changed = e.detach().clone()
    changed[:, 6:] += 1
    before, after = pool(e)[0], pool(changed)[0]
    # Later scores may share a scale with earlier ones, so they may change how these round, and no more.
    cases.assert_close("prefix_pool", after[:, :6], before[:, :6])
    assert not torch.isclose(after[:, 6:], before[:, 6:]).all(-1).any()
    before[:, :6].sum().backward()
    assert not e.grad[:, 6:].any()


@pytest.mark.parametrize("score", ["linear", "tanh"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("garbage", [1e4, math.nan])
def test_padding_does_not_matter(garbage: float, causal: bool, score: str) -> None:
    pool = llm_ext.AttentionPool(3, 5, score, causal)
    e, lengths = torch.randn(3, 7, 3), torch.tensor([7, 4, 0])
    padding = torch.arange(7) >= lengths[:, None]
    dirty = e.masked_fill(padding[..., None], garbage).requires_grad_()
    clean_results = cases.flatten(pool(e, lengths))
    results = cases.flatten(pool(dirty, lengths))
    assert all(torch.equal(a, b) for a, b in zip(results, clean_results, strict=True))
    assert torch.equal(pool(dirty, lengths, return_weights=True)[-1], pool(e, lengths, return_weights=True)[-1])
    if score == "tanh" and math.isnan(garbage):
        return  # torch's own tanh of W e passes the NaN back
    sum(t.masked_fill(t.isinf(), 0).sum() for t in results).backward()
    assert not dirty.grad[padding].any()
    assert pool.weight.grad.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("B", "T"), [(0, 4), (3, 0), (0, 0)])
def test_nothing(B: int, T: int, causal: bool) -> None:
    pool = llm_ext.AttentionPool(3, 5, causal=causal)
    c, *_, weights = pool(torch.zeros(B, T, 3), return_weights=True)
    assert torch.equal(c, torch.zeros((B, T, 3) if causal else (B, 3)))
    assert weights.shape == ((B, T, T) if causal else (B, T))


def test_time_major_views() -> None:
    """A transposed view of [T, B, D] gives the same numbers and keeps its layout."""
    pool = llm_ext.AttentionPool(3, 5, causal=True)
    e = torch.randn(7, 4, 3)
    view, _ = pool(e.transpose(0, 1))
    cases.assert_close("prefix_pool", view, pool(e.transpose(0, 1).contiguous())[0])


@pytest.mark.parametrize("score", ["linear", "tanh"])
@pytest.mark.parametrize("causal", [False, True])
def test_autocast(causal: bool, score: str) -> None:
    pool = llm_ext.AttentionPool(3, 5, score, causal)
    e = torch.randn(2, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = pool(e)
        if causal:  # the state goes on in float32
            c, state = found
            assert all(part.dtype == torch.float32 for part in state)
            found = torch.cat((c, pool(e, state=state)[0]), 1)
    expected = pool(torch.cat((e, e), 1))[0] if causal else pool(e)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


def test_text_and_names() -> None:
    pool = llm_ext.AttentionPool(3, 5, "tanh", causal=True)
    assert repr(pool) == "AttentionPool(3, 5, score='tanh', causal=True)"
    assert {name: tuple(p.shape) for name, p in pool.named_parameters()} == {
        "weight": (5, 3),
        "v": (5,),
        "bias": (5,),
    }
    assert [name for name, _ in llm_ext.AttentionPool(3, 5).named_parameters()] == ["weight", "v"]
    assert not pool.bias.any()


BAD = [
    ({"e": torch.zeros(2, 3)}, r"e must be \[B, T, D\] = \[\*, \*, 3\], got \[2, 3\]"),
    ({"e": torch.zeros(2, 4, 5)}, r"e must be \[B, T, D\] = \[\*, \*, 3\], got \[2, 4, 5\]"),
    ({"e": torch.zeros(2, 4, 3, dtype=torch.int64)}, "e must be float32, float64, bfloat16 or float16, got int64"),
    ({"lengths": torch.ones(3, dtype=torch.int64)}, r"lengths must be \[B\] = \[2\], got \[3\]"),
    ({"lengths": torch.ones(2)}, "lengths must be int64, got float32"),
    ({"lengths": [1, 2]}, "lengths must be a Tensor, got list"),
    ({"mask": torch.ones(2, 3, dtype=torch.bool)}, r"mask must be \[B, T\] = \[2, 4\], got \[2, 3\]"),
    ({"mask": torch.ones(2, 4)}, "mask must be bool, got float32"),
    ({"state": (torch.zeros(3), torch.zeros(2, 3))}, r"state L must be \[B\] = \[2\], got \[3\]"),
    ({"state": (torch.zeros(2), torch.zeros(2, 4))}, r"state c must be \[B, D\] = \[2, 3\], got \[2, 4\]"),
    ({"state": (torch.zeros(2).double(), torch.zeros(2, 3))}, "state L must be float32, got float64"),
    ({"state": (torch.zeros(2), torch.zeros(2, 3).bfloat16())}, "state c must be float32, got bfloat16"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_call(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        llm_ext.AttentionPool(3, 5, causal=True)(**({"e": torch.zeros(2, 4, 3)} | arguments))


def test_state_without_causal() -> None:
    with pytest.raises(ValueError, match="state must be None unless causal=True"):
        llm_ext.AttentionPool(3, 5)(torch.zeros(2, 4, 3), state=(torch.zeros(2), torch.zeros(2, 3)))


@pytest.mark.parametrize("lengths", [[-1, 2], [5, 2]])
def test_lengths_out_of_range(lengths: list[int]) -> None:
    for causal in (False, True):
        with pytest.raises(ValueError, match=r"pool: lengths must be from 0 to T = 4, got \["):
            llm_ext.AttentionPool(3, 5, causal=causal)(torch.zeros(2, 4, 3), torch.tensor(lengths))


def test_bad_constructor() -> None:
    with pytest.raises(ValueError, match=r"score must be one of .* got 'dot'"):
        llm_ext.AttentionPool(3, 5, "dot")
    with pytest.raises(ValueError, match="attn_dim must be at least 1, got 0"):
        llm_ext.AttentionPool(3, 0)
