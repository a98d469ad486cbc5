"""The reference against torch.nn and against the formulas as a textbook writes them, in float64."""

import math

import cases
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from llm_ext import reference

NUMBER = torch.float64


def torch_layer(arguments: dict[str, Tensor | None], nonlinearity: str) -> torch.nn.RNN:
    """A torch.nn.RNN of two directions that both have the given weights; the caller looks at one of them."""
    I, H = arguments["w_ih"].shape[1], arguments["w_hh"].shape[0]  # noqa: E741
    layer = torch.nn.RNN(I, H, nonlinearity=nonlinearity, bidirectional=True, dtype=NUMBER)
    names = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
    for direction in ("", "_reverse"):
        for name, short in names.items():
            getattr(layer, f"{name}_l0{direction}").data = arguments[short]
    return layer


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("T", [1, 17])
@pytest.mark.parametrize(("B", "I", "H"), [(1, 3, 17), (3, 1, 1), (17, 33, 3)])
def test_rnn_is_torch_nn(T: int, B: int, I: int, H: int, nonlinearity: str, reverse: bool) -> None:  # noqa: E741
    arguments = cases.rnn_arguments(T, B, I, H)
    layer = torch_layer(arguments, nonlinearity)
    y, h_n = layer(arguments["x"], arguments["h0"].expand(2, B, H))
    actual_y, actual_h_n = reference.rnn(**arguments, nonlinearity=nonlinearity, reverse=reverse)
    cases.assert_close("rnn", actual_y, y[..., H:] if reverse else y[..., :H])
    cases.assert_close("rnn", actual_h_n, h_n[int(reverse)])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[1], [5], [4, 4, 1], [7, 5, 5, 2, 1]])
def test_packed_rnn_is_torch_nn(lengths: list[int], reverse: bool) -> None:
    arguments = cases.rnn_arguments(max(lengths), len(lengths), 3, 5)
    layer = torch_layer(arguments, "tanh")
    packed = pack_padded_sequence(arguments["x"], torch.tensor(lengths))
    y, h_n = layer(packed, arguments["h0"].expand(2, -1, -1))
    actual_y, actual_h_n = reference.rnn(
        **(arguments | {"x": packed.data}), batch_sizes=packed.batch_sizes, reverse=reverse
    )
    cases.assert_close("rnn", actual_y, y.data[:, 5:] if reverse else y.data[:, :5])
    cases.assert_close("rnn", actual_h_n, h_n[int(reverse)])
    # And the layout of packed rows is the one that torch unpacks.
    padded, _ = pad_packed_sequence(packed._replace(data=actual_y))
    for b, length in enumerate(lengths):
        assert torch.equal(actual_h_n[b], padded[0 if reverse else length - 1, b])


def test_sigmoid_step() -> None:
    a = cases.rnn_arguments(1, 3, 4, 5)
    y, h_n = reference.rnn(**a, nonlinearity="sigmoid")
    z = a["x"][0] @ a["w_ih"].T + a["b_ih"] + a["h0"] @ a["w_hh"].T + a["b_hh"]
    cases.assert_close("rnn", y[0], 1 / (1 + torch.exp(-z)))
    assert torch.equal(h_n, y[0])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("nonlinearity", cases.NONLINEARITIES)
@pytest.mark.parametrize("packed", [False, True])
def test_rnn_gradients(packed: bool, nonlinearity: str, reverse: bool) -> None:
    a = cases.rnn_arguments(4, 3, 2, 3)
    batch_sizes = cases.batch_sizes_of([4, 2, 1]) if packed else None
    if batch_sizes is not None:
        a["x"] = cases.pack(a["x"], batch_sizes)
    tensors = [tensor.requires_grad_() for tensor in a.values()]
    options = {"batch_sizes": batch_sizes, "nonlinearity": nonlinearity, "reverse": reverse}
    assert torch.autograd.gradcheck(lambda *t: reference.rnn(*t, **options), tensors)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("T", "B", "I", "H"), [(0, 3, 4, 5), (3, 0, 4, 5), (0, 0, 4, 5), (3, 2, 0, 5)])
def test_rnn_of_nothing(T: int, B: int, I: int, H: int, given: bool, reverse: bool) -> None:  # noqa: E741
    a = cases.rnn_arguments(T, B, I, H, h0=given)
    y, h_n = reference.rnn(**a, reverse=reverse)
    assert y.shape == (T, B, H)
    assert y.dtype == NUMBER
    if T == 0:
        assert torch.equal(h_n, a["h0"] if given else torch.zeros(B, H, dtype=NUMBER))
        # A new tensor: writing into the result must not change the argument.
        assert not given or h_n is not a["h0"]
    cases.outputs_and_gradients(lambda **t: reference.rnn(**t, reverse=reverse), a)


def positions(B: int, T: int, kind: str) -> dict[str, Tensor]:
    """Which positions take part, of rows of which one is wholly out and one is wholly in."""
    lengths = torch.randint(0, T + 1, (B,))
    lengths[0], lengths[-1] = T, 0
    mask = torch.rand(B, T) < 0.5
    mask[0], mask[-1] = True, False
    return {
        "none": {},
        "lengths": {"lengths": lengths},
        "mask": {"mask": mask},
        "both": {"lengths": lengths, "mask": mask.flip(0)},
    }[kind]


def admitted(B: int, T: int, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    admitted = torch.ones(B, T, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            admitted[b, t] = (lengths is None or t < lengths[b]) and (mask is None or mask[b, t])
    return admitted


def pool_by_hand(e: Tensor, s: Tensor, admitted: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row: softmax over what takes part, and the weighted mean."""
    c, lse = torch.zeros_like(e[:, 0]), torch.full_like(s[:, 0], -math.inf)
    for b in range(e.shape[0]):
        if admitted[b].any():
            kept = s[b, admitted[b]]
            c[b] = torch.softmax(kept, 0) @ e[b, admitted[b]]
            lse[b] = torch.logsumexp(kept, 0)
    return c, lse


@pytest.mark.parametrize("kind", ["none", "lengths", "mask", "both"])
@pytest.mark.parametrize(("B", "T", "D"), [(1, 1, 1), (3, 17, 5), (4, 33, 3)])
def test_pools_are_the_formula(B: int, T: int, D: int, kind: str) -> None:
    e, weight, v = (torch.randn(*shape, dtype=NUMBER) for shape in ((B, T, D), (7, D), (7,)))
    part = positions(B, T, kind)
    s = e @ weight.T @ v  # vᵀ W e_i, W e formed
    u = weight.T @ v
    keep = admitted(B, T, **part)
    expected = pool_by_hand(e, s, keep)
    for scored in ({"u": u}, {"scores": s}):
        c, lse = reference.attention_pool(e, **scored, **part)
        cases.assert_close("attention_pool", c, expected[0], "c")
        cases.assert_close("attention_pool", lse, expected[1], "lse")
        prefixes, (L, last) = reference.prefix_pool(e, **scored, **part)
        for t in range(T):
            c, _ = pool_by_hand(e[:, : t + 1], s[:, : t + 1], keep[:, : t + 1])
            cases.assert_close("prefix_pool", prefixes[:, t], c, f"c_{t}")
        cases.assert_close("prefix_pool", L, expected[1], "L")
        cases.assert_close("prefix_pool", last, expected[0], "c_last")


@pytest.mark.parametrize("kind", ["none", "lengths", "mask", "both"])
@pytest.mark.parametrize("by", ["u", "scores"])
def test_pool_gradients(by: str, kind: str) -> None:
    B, T, D = 3, 4, 2
    e = torch.randn(B, T, D, dtype=NUMBER, requires_grad=True)
    s = torch.randn(*((D,) if by == "u" else (B, T)), dtype=NUMBER, requires_grad=True)
    part = positions(B, T, kind)
    some = admitted(B, T, **part).any(1)

    def pool(e: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        c, lse = reference.attention_pool(e, **{by: s}, **part)
        return c, lse[some]  # -inf has no finite difference

    assert torch.autograd.gradcheck(pool, (e, s))


@pytest.mark.parametrize("kind", ["none", "lengths", "mask", "both"])
@pytest.mark.parametrize("by", ["u", "scores"])
@pytest.mark.parametrize("past", ["none", "empty", "some"])
def test_prefix_gradients(past: str, by: str, kind: str) -> None:
    B, T, D = 3, 4, 2
    e = torch.randn(B, T, D, dtype=NUMBER, requires_grad=True)
    s = torch.randn(*((D,) if by == "u" else (B, T)), dtype=NUMBER, requires_grad=True)
    L = torch.full((B,), -math.inf, dtype=NUMBER) if past == "empty" else torch.randn(B, dtype=NUMBER)
    c = torch.randn(B, D, dtype=NUMBER)
    part = positions(B, T, kind)
    some = admitted(B, T, **part).any(1) | (past == "some")
    # L = -inf has no finite difference; its gradient is checked below.
    state = [] if past == "none" else [L.requires_grad_(past == "some"), c.requires_grad_()]

    def pool(e: Tensor, s: Tensor, *state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prefixes, (L, c) = reference.prefix_pool(e, **{by: s}, **part, state=state or None)
        return prefixes, L[some], c

    assert torch.autograd.gradcheck(pool, (e, s, *state))


def test_gradient_of_an_empty_past_is_zero() -> None:
    e, u, c = (torch.randn(*shape, dtype=NUMBER) for shape in ((2, 3, 4), (4,), (2, 4)))
    L = torch.full((2,), -math.inf, dtype=NUMBER, requires_grad=True)
    prefixes, (_, last) = reference.prefix_pool(e, u, lengths=torch.tensor([3, 0]), state=(L, c))
    (gradient,) = torch.autograd.grad(prefixes.sum() + last.sum(), L)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("pool", [reference.attention_pool, reference.prefix_pool])
@pytest.mark.parametrize("by", ["u", "scores"])
def test_what_stands_in_padding_does_not_matter(by: str, pool: object) -> None:
    B, T, D = 3, 5, 2
    lengths = torch.tensor([5, 3, 0])
    e = torch.randn(B, T, D, dtype=NUMBER)
    s = torch.randn(*((D,) if by == "u" else (B, T)), dtype=NUMBER)
    padding = ~admitted(B, T, lengths)
    dirty_e = e.masked_fill(padding[..., None], math.nan)
    dirty_s = s if by == "u" else s.masked_fill(padding, math.nan)
    clean = cases.outputs_and_gradients(lambda e, s: pool(e, **{by: s}, lengths=lengths), {"e": e, "s": s})
    dirty = cases.outputs_and_gradients(lambda e, s: pool(e, **{by: s}, lengths=lengths), {"e": dirty_e, "s": dirty_s})
    assert all(torch.equal(a, b) for a, b in zip(clean[0], dirty[0], strict=True))
    for name, gradient in dirty[1].items():
        assert torch.equal(gradient, clean[1][name])
    assert not dirty[1]["e"][padding].any()
    assert by == "u" or not dirty[1]["s"][padding].any()


def test_a_score_of_minus_infinity_takes_no_part() -> None:
    e, s = torch.randn(3, 5, 2, dtype=NUMBER), torch.randn(3, 5, dtype=NUMBER)
    mask = admitted(3, 5, torch.tensor([5, 3, 0]))
    for pool in (reference.attention_pool, reference.prefix_pool):
        masked, gradients = cases.outputs_and_gradients(
            lambda e, s, pool=pool: pool(e, scores=s, mask=mask), {"e": e, "s": s}
        )
        infinite, same = cases.outputs_and_gradients(
            lambda e, s, pool=pool: pool(e, scores=s), {"e": e, "s": s.masked_fill(~mask, -math.inf)}
        )
        assert all(torch.equal(a, b) for a, b in zip(masked, infinite, strict=True))
        assert all(torch.equal(gradients[name], same[name]) for name in gradients)


def test_great_scores_do_not_overflow() -> None:
    e = torch.randn(2, 9, 3)
    scores = torch.linspace(-3e4, 3e4, 18).view(2, 9)
    c, lse = reference.attention_pool(e, scores=scores)
    prefixes, (L, last) = reference.prefix_pool(e, scores=scores)
    assert torch.equal(c, e[:, -1])
    assert torch.equal(lse, scores[:, -1])
    cases.assert_close("prefix_pool", prefixes, e)
    assert torch.equal(L, lse)
    cases.assert_close("prefix_pool", last, c)
    # Falling scores: the first stays, and nothing after it is seen.
    prefixes, (L, _) = reference.prefix_pool(e, scores=scores.flip(1))
    assert torch.equal(prefixes, e[:, :1].expand_as(e))
    assert torch.equal(L, scores[:, -1])


@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_prefixes_in_pieces(cut: int) -> None:
    e, u = torch.randn(3, 9, 5, dtype=NUMBER), torch.randn(5, dtype=NUMBER)
    mask = torch.rand(3, 9) < 0.6
    whole, (L, c) = reference.prefix_pool(e, u, mask=mask)
    first, state = reference.prefix_pool(e[:, :cut], u, mask=mask[:, :cut])
    second, state = reference.prefix_pool(e[:, cut:], u, mask=mask[:, cut:], state=state)
    cases.assert_close("prefix_pool", torch.cat((first, second), 1), whole)
    cases.assert_close("prefix_pool", state[0], L)
    cases.assert_close("prefix_pool", state[1], c)


@pytest.mark.parametrize(("B", "T", "D"), [(0, 3, 4), (2, 0, 4), (0, 0, 4)])
def test_pools_of_nothing(B: int, T: int, D: int) -> None:
    e, u = torch.randn(B, T, D, dtype=NUMBER), torch.randn(D, dtype=NUMBER)
    L, c0 = torch.randn(B, dtype=NUMBER), torch.randn(B, D, dtype=NUMBER)
    c, lse = reference.attention_pool(e, u)
    assert torch.equal(c, torch.zeros(B, D, dtype=NUMBER))
    assert torch.equal(lse, torch.full((B,), -math.inf, dtype=NUMBER))
    prefixes, state = reference.prefix_pool(e, u, state=(L, c0))
    assert prefixes.shape == (B, T, D)
    if T == 0:
        assert torch.equal(state[0], L)
        assert torch.equal(state[1], c0)
    for pool in (reference.attention_pool, reference.prefix_pool):
        _, gradients = cases.outputs_and_gradients(pool, {"e": e, "u": u})
        assert not gradients["u"].any()
