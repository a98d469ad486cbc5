"""The reference against torch.nn and against the formulas as a textbook writes them, in float64."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import cases
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from llm_ext import reference

NUMBER = torch.float64


class Cell(NamedTuple):
    """A recurrence, torch's layer for it, and how many blocks of H rows its weights have."""

    function: Callable[..., Any]
    layer: Callable[..., torch.nn.Module] | None
    gates: int
    options: dict[str, str]
    projected: bool = False

    def arguments(
        self,
        T: int,
        B: int,
        I: int,  # noqa: E741
        H: int,
        bias: bool = True,
        state: bool = True,
    ) -> dict[str, Tensor]:
        """Tensors by name, weights drawn as the layer draws them; with a projection h has half the features of c."""
        rows, P = self.gates * H, H // 2 if self.projected else H
        shapes: dict[str, tuple[int, ...]] = {"w_ih": (rows, I), "w_hh": (rows, P)}
        shapes |= {"b_ih": (rows,), "b_hh": (rows,)} if bias else {}
        shapes |= {"w_hr": (P, H)} if self.projected else {}
        bound = H**-0.5
        a = {"x": torch.randn(T, B, I, dtype=NUMBER)}
        if state:
            a["h0"] = torch.randn(B, P, dtype=NUMBER)
            if self.function is reference.lstm:
                a["c0"] = torch.randn(B, H, dtype=NUMBER)
        return a | {name: torch.empty(shape, dtype=NUMBER).uniform_(-bound, bound) for name, shape in shapes.items()}

    def run(self, x: Tensor, *, h0: Tensor | None = None, c0: Tensor | None = None, **others: Any) -> list[Tensor]:
        """y, h_n and, of an LSTM, c_n."""
        state = h0 if c0 is None else (h0, c0)
        return cases.flatten(self.function(x, state, **others, **self.options))

    def by_torch(self, arguments: dict[str, Tensor], x: Tensor | PackedSequence, reverse: bool) -> list[Tensor]:
        """The same by torch: a layer of two directions with the same weights, looked at in one of them."""
        assert self.layer is not None
        H, I = arguments["w_ih"].shape[0] // self.gates, arguments["w_ih"].shape[1]  # noqa: E741
        P = arguments["w_hh"].shape[1]
        options = self.options | ({"proj_size": P} if self.projected else {})
        layer = self.layer(I, H, bias="b_ih" in arguments, bidirectional=True, dtype=NUMBER, **options)
        names = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh", "w_hr": "weight_hr"}
        weights = {name: arguments[short] for short, name in names.items() if short in arguments}
        layer.load_state_dict({f"{name}_l0{end}": w for name, w in weights.items() for end in ("", "_reverse")})
        given = [arguments[name].expand(2, -1, -1) for name in ("h0", "c0") if name in arguments]
        y, last = layer(x, tuple(given) if len(given) == 2 else given[0] if given else None)
        y = y.data if isinstance(x, PackedSequence) else y
        return [y[..., P:] if reverse else y[..., :P], *(part[int(reverse)] for part in cases.flatten(last))]


CELLS = {
    "tanh": Cell(reference.rnn, torch.nn.RNN, 1, {"nonlinearity": "tanh"}),
    "relu": Cell(reference.rnn, torch.nn.RNN, 1, {"nonlinearity": "relu"}),
    "sigmoid": Cell(reference.rnn, None, 1, {"nonlinearity": "sigmoid"}),
    "gru": Cell(reference.gru, torch.nn.GRU, 3, {}),
    "lstm": Cell(reference.lstm, torch.nn.LSTM, 4, {}),
    "lstm-projected": Cell(reference.lstm, torch.nn.LSTM, 4, {}, projected=True),
}
every_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
OF_TORCH = {name: cell for name, cell in CELLS.items() if cell.layer}
cells_of_torch = pytest.mark.parametrize("cell", OF_TORCH.values(), ids=OF_TORCH)


@cells_of_torch
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("bias", "state"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("T", [1, 17])
@pytest.mark.parametrize(("B", "I", "H"), [(1, 3, 17), (3, 1, 1), (3, 1, 2), (17, 33, 3)])
def test_recurrences_are_torch_nn(
    B: int,
    I: int,  # noqa: E741
    H: int,
    T: int,
    bias: bool,
    state: bool,
    reverse: bool,
    cell: Cell,
) -> None:
    if cell.projected and H == 1:
        pytest.skip("nothing is smaller than 1")
    a = cell.arguments(T, B, I, H, bias, state)
    expected = cell.by_torch(a, a["x"], reverse)
    for actual, tensor in zip(cell.run(**a, reverse=reverse), expected, strict=True):
        cases.assert_close(cell.function.__name__, actual, tensor)


@cells_of_torch
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[1], [5], [4, 4, 1], [7, 5, 5, 2, 1]])
def test_packed_recurrences_are_torch_nn(lengths: list[int], reverse: bool, cell: Cell) -> None:
    a = cell.arguments(max(lengths), len(lengths), 3, 5)
    packed = pack_padded_sequence(a["x"], torch.tensor(lengths))
    actual = cell.run(**(a | {"x": packed.data}), batch_sizes=packed.batch_sizes, reverse=reverse)
    for tensor, expected in zip(actual, cell.by_torch(a, packed, reverse), strict=True):
        cases.assert_close(cell.function.__name__, tensor, expected)
    # And the layout of packed rows is the one that torch unpacks.
    padded, _ = pad_packed_sequence(packed._replace(data=actual[0]))
    for b, length in enumerate(lengths):
        assert torch.equal(actual[1][b], padded[0 if reverse else length - 1, b])


def test_sigmoid_step() -> None:
    cell = CELLS["sigmoid"]
    a = cell.arguments(1, 3, 4, 5)
    y, h_n = cell.run(**a)
    z = a["x"][0] @ a["w_ih"].T + a["b_ih"] + a["h0"] @ a["w_hh"].T + a["b_hh"]
    cases.assert_close(cell.function.__name__, y[0], 1 / (1 + torch.exp(-z)))
    assert torch.equal(h_n, y[0])


@every_cell
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_recurrence_gradients(packed: bool, reverse: bool, cell: Cell) -> None:
    a = cell.arguments(4, 3, 2, 3)
    batch_sizes = cases.batch_sizes_of([4, 2, 1]) if packed else None
    if batch_sizes is not None:
        a["x"] = cases.pack(a["x"], batch_sizes)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(cell.run(**dict(zip(a, tensors, strict=True)), batch_sizes=batch_sizes, reverse=reverse))

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in a.values()])


@every_cell
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("T", "B", "I", "H"), [(0, 3, 4, 5), (3, 0, 4, 5), (0, 0, 4, 5), (3, 2, 0, 5)])
def test_recurrences_of_nothing(
    T: int,
    B: int,
    I: int,  # noqa: E741
    H: int,
    given: bool,
    reverse: bool,
    cell: Cell,
) -> None:
    a = cell.arguments(T, B, I, H, state=given)
    y, *last = cell.run(**a, reverse=reverse)
    assert y.shape == (T, B, a["w_hh"].shape[1])
    assert y.dtype == NUMBER
    if T == 0:
        first = [a[name] for name in ("h0", "c0") if name in a]
        for part, start in zip(last, first or [torch.zeros_like(part) for part in last], strict=True):
            assert torch.equal(part, start)
            # A new tensor: writing into the result must not change the argument.
            part.fill_(math.nan)
            assert not start.isnan().any()
    cases.outputs_and_gradients(lambda **t: cell.run(**t, reverse=reverse), a)


@every_cell
def test_the_state_keeps_its_shape(cell: Cell) -> None:
    """That of one layer of torch.nn, too: [1, B, H]."""
    a = cell.arguments(3, 2, 4, 5)
    expected = cell.run(**a)
    y, *last = cell.run(**(a | {name: a[name][None] for name in ("h0", "c0") if name in a}))
    assert torch.equal(y, expected[0])
    for part, flat in zip(last, expected[1:], strict=True):
        assert torch.equal(part, flat[None])


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


# ---- additive attention


@pytest.mark.parametrize("kind", ["none", "lengths", "mask", "both"])
def test_additive_attention_is_the_formula(kind: str) -> None:
    B, Tq, Tk = 3, 4, 5
    query, keys, v, values = (torch.randn(*shape, dtype=NUMBER) for shape in ((B, Tq, 2), (B, Tk, 2), (2,), (B, Tk, 3)))
    part = positions(B, Tk, kind)
    options = {"key_lengths": part.get("lengths"), "mask": part.get("mask")}
    context, weights = reference.additive_attention(query, keys, v, values, **options, need_weights=True)
    keep = admitted(B, Tk, **part)
    for b, q in itertools.product(range(B), range(Tq)):
        scores = torch.stack([v @ torch.tanh(query[b, q] + key) for key in keys[b]])
        expected = torch.zeros(Tk, dtype=NUMBER)
        if keep[b].any():
            expected[keep[b]] = torch.softmax(scores[keep[b]], 0)
        cases.assert_close("additive_attention", weights[b, q], expected, "weights")
        cases.assert_close("additive_attention", context[b, q], expected @ values[b], "context")
    assert reference.additive_attention(query, keys, v, values)[1] is None


@pytest.mark.parametrize("of_each_query", [False, True])
def test_additive_attention_gradients(of_each_query: bool) -> None:
    shapes = (2, 3, 2), (2, 4, 2), (2,), (2, 4, 3)
    inputs = [torch.randn(*shape, dtype=NUMBER, requires_grad=True) for shape in shapes]
    mask = torch.rand(2, 3, 4) < 0.5 if of_each_query else torch.tensor([[True, False, True, True], [False] * 4])

    def attend(*inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        return reference.additive_attention(*inputs, mask=mask, need_weights=True)

    assert torch.autograd.gradcheck(attend, inputs)


def test_additive_attention_of_nothing() -> None:
    for B, Tq, Tk, A, Dv in ((0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 3, 0, 4, 5), (2, 3, 4, 0, 5), (2, 3, 4, 5, 0)):
        keys, values = torch.randn(B, Tk, A), torch.randn(B, Tk, Dv)
        context, weights = reference.additive_attention(
            torch.randn(B, Tq, A), keys, torch.randn(A), values, need_weights=True
        )
        assert context.shape == (B, Tq, Dv)
        assert weights.shape == (B, Tq, Tk)
        # Without A all scores are 0.
        torch.testing.assert_close(weights.sum(-1), torch.full((B, Tq), float(Tk > 0)))
