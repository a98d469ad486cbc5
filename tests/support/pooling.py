"""Attention pooling: inputs, the ops and their references as functions of named tensors, and checks for any device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from support import target
from support.comparison import assert_close, assert_same_bits, compare, root_mean_square_errors
from support.inputs import leaf, noncontiguous
from support.tolerances import HALF_DTYPES


def op_name(prefix: bool) -> str:
    return "prefix_pool" if prefix else "attention_pool"


def pool_inputs(
    B: int, T: int, D: int, dtype: torch.dtype, *, folded: bool, state: bool = False, device: str = "cpu"
) -> dict[str, Tensor]:
    """e, and u (folded) or scores; with `state` also L and c of an earlier prefix, as "l" and "c"."""
    inputs = {"e": leaf(B, T, D, dtype=dtype, device=device)}
    if folded:
        inputs["u"] = leaf(D, dtype=dtype, scale=2 * max(D, 1) ** -0.5, device=device)
    else:
        inputs["scores"] = leaf(B, T, dtype=dtype, scale=3, device=device)
    if state:
        computed = torch.float32 if dtype in HALF_DTYPES else dtype
        m, z = torch.randn(B, dtype=torch.float64), torch.linspace(0.6, 1.7, B, dtype=torch.float64)
        L = torch.stack((m, z), 1).to(device, computed)
        inputs |= {"l": L.requires_grad_(), "c": leaf(B, D, dtype=computed, device=device)}
    return inputs


def log_sum_exp(L: Tensor) -> Tensor:
    """The log-sum-exp ``[B]`` of the state of prefix pooling, L ``[B, 2]``."""
    m, z = L.unbind(1)
    return m + z.masked_fill(z == 0, 1).log()


def pool_functions(prefix: bool, **options: Any) -> list[Callable[..., tuple[Tensor, ...]]]:
    """The op and its reference: attention_pool as (c, lse), or prefix_pool as (c, L, c_last)."""

    def bind(module: Any) -> Callable[..., tuple[Tensor, ...]]:
        def pool(e: Tensor, u: Tensor | None = None, scores: Tensor | None = None) -> tuple[Tensor, ...]:
            return tuple(module.attention_pool(e, u, scores=scores, **options))

        def prefix_pool(
            e: Tensor,
            u: Tensor | None = None,
            scores: Tensor | None = None,
            l: Tensor | None = None,  # noqa: E741
            c: Tensor | None = None,
        ) -> tuple[Tensor, ...]:
            state = None if l is None else (l, c)
            out, (L, last) = module.prefix_pool(e, u, scores=scores, state=state, **options)
            return out, log_sum_exp(L), last

        return prefix_pool if prefix else pool

    return [bind(target.ops), bind(target.reference)]


# ---- checks that run on every device, and on CUDA ops in the emulator


def check_pool(B: int, T: int, D: int, dtype: torch.dtype, prefix: bool, device: str = "cpu") -> None:
    """Each way to give scores, with and without a state, lengths and mask."""
    lengths, mask = torch.randint(0, T + 1, (B,), device=device), torch.rand(B, T, device=device) < 0.5
    selections: list[dict[str, Tensor]] = [{"lengths": lengths, "mask": mask}]
    cases = [(True, False), (False, prefix)]
    if T < 100:  # the reference is a loop over time
        selections += [{}, {"lengths": lengths}, {"mask": mask}]
        cases += [(True, True), (False, False)] if prefix else []
    for (folded, state), selection in itertools.product(cases, selections):
        inputs = pool_inputs(B, T, D, dtype, folded=folded, state=state, device=device)
        compare(op_name(prefix), pool_functions(prefix, **selection), inputs)


def check_time_major(dtype: torch.dtype, prefix: bool, device: str = "cpu") -> None:
    """A transposed view of [T, B, D] is read without a copy, and results have its layout."""
    inputs = pool_inputs(3, 21, 40, dtype, folded=True, device=device)
    inputs["e"] = leaf(21, 3, 40, dtype=dtype, device=device)

    def transposed(function: Callable[..., tuple[Tensor, ...]], e: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return function(e.transpose(0, 1), u)

    functions = [partial(transposed, function) for function in pool_functions(prefix)]
    compare(op_name(prefix), functions, inputs)
    if prefix:
        assert functions[0](**inputs)[0].stride() == (40, 120, 1)


def check_layouts(dtype: torch.dtype, prefix: bool) -> None:
    """Gaps, swapped strides and expanded gradients change nothing."""
    contiguous = pool_inputs(3, 21, 40, dtype, folded=True, state=prefix)
    with_gaps = {name: noncontiguous(t.detach()) for name, t in contiguous.items()}
    lengths, mask = torch.tensor([21, 0, 17]), torch.rand(3, 21) < 0.5
    function = pool_functions(prefix, lengths=lengths, mask=mask)[0]
    strided = torch.stack((lengths, lengths), 1)[:, 0]
    on_gaps = pool_functions(prefix, lengths=strided, mask=mask.T.contiguous().T)[0]
    assert_same_bits(function(**contiguous), on_gaps(**with_gaps))
    c = function(**contiguous)[0]
    from_sum = torch.autograd.grad(c.sum(), list(contiguous.values()), retain_graph=True)
    transposed = torch.ones_like(c.mT, memory_format=torch.contiguous_format).mT
    assert_same_bits(from_sum, torch.autograd.grad(c, list(contiguous.values()), transposed, retain_graph=True))
    of_a_row = torch.randn_like(c[0])
    expanded, repeated = of_a_row.expand_as(c), of_a_row.expand_as(c).contiguous()
    for_expanded, for_repeated = (
        torch.autograd.grad(c, list(contiguous.values()), g, retain_graph=True) for g in (expanded, repeated)
    )
    assert_same_bits(for_expanded, for_repeated)
    # Time first, but not dense.
    wide = torch.zeros(42, 3, 40, dtype=dtype)
    wide[::2] = contiguous["e"].detach().transpose(0, 1)
    of_wide = function(**contiguous | {"e": wide[::2].transpose(0, 1).requires_grad_()})[0]
    assert_same_bits(of_wide, c)
    assert of_wide.is_contiguous()
    others = [contiguous[name] for name in contiguous if name != "e"]
    assert_same_bits(torch.autograd.grad(of_wide.sum(), others), from_sum[1:])


def composed_pool(prefix: bool, e: Tensor, u: Tensor | None = None, scores: Tensor | None = None) -> tuple[Tensor, ...]:
    """The formula in torch's own operators, each of which rounds its result."""
    s = scores if u is None else e @ u
    assert s is not None
    if not prefix:
        return ((torch.softmax(s, 1)[:, None] @ e)[:, 0],)
    T = e.shape[1]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return (torch.softmax(s[:, None].expand(-1, T, -1).masked_fill(future, -math.inf), -1) @ e,)


def check_precision(B: int, T: int, D: int, folded: bool, dtype: torch.dtype, prefix: bool) -> None:
    """In 16 bits the root mean square errors are at most 1.5 times those of torch's own operators.

    Over many batch rows, because within one the rounding of c affects all gradients of the scores alike.
    """
    inputs = pool_inputs(B, T, D, dtype, folded=folded)
    doubles = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    weights = (torch.randn(B, T, D) if prefix else torch.randn(B, D)).to(dtype)

    def run(function: Callable[..., tuple[Tensor, ...]], arguments: dict[str, Tensor]) -> list[Tensor]:
        c = function(**arguments)[0]
        gradients = torch.autograd.grad(c, list(arguments.values()), weights.to(c.dtype))
        return [t.detach() for t in (c, *gradients)]

    expected = run(partial(composed_pool, prefix), doubles)
    ours = root_mean_square_errors(run(pool_functions(prefix)[0], inputs), expected)
    theirs = root_mean_square_errors(run(partial(composed_pool, prefix), inputs), expected)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine <= 1.5 * other


def check_masked_positions(prefix: bool, device: str = "cpu") -> None:
    """Masked positions may hold NaN: neither results nor gradients depend on them."""
    e, u = torch.randn(2, 30, 9, device=device), torch.randn(9, device=device)
    mask = torch.rand(2, 30, device=device) < 0.5
    dirty = e.masked_fill(~mask[..., None], math.nan)
    function = pool_functions(prefix, mask=mask)[0]
    assert_same_bits(function(e, u), function(dirty, u))
    leaves = (dirty.requires_grad_(), u.requires_grad_())
    of_e, of_u = torch.autograd.grad(function(*leaves)[0].sum(), leaves)
    assert of_e.isfinite().all()
    assert (of_e[~mask] == 0).all()
    assert of_u.isfinite().all()


def check_empty_rows(device: str = "cpu") -> None:
    """A row without an unmasked position gives zeros, a log-sum-exp of -inf, and zero gradients."""
    e = torch.randn(3, 5, 7, device=device, requires_grad=True)
    u = torch.randn(7, device=device, requires_grad=True)
    lengths = torch.tensor([0, 5, 0], device=device)
    c, lse = target.ops.attention_pool(e, u, lengths=lengths)
    assert (c[[0, 2]] == 0).all()
    assert lse.tolist()[::2] == [-math.inf] * 2
    prefix, (level, last) = target.ops.prefix_pool(e, u, lengths=lengths)
    assert (prefix[[0, 2]] == 0).all()
    assert (last[[0, 2]] == 0).all()
    assert level.tolist()[::2] == [[-math.inf, 0]] * 2
    grads = torch.autograd.grad(c.sum() + prefix.sum(), (e, u))
    assert (grads[0][[0, 2]] == 0).all()
    assert all(g.isfinite().all() for g in grads)


def check_large_scores(rise: float, device: str = "cpu") -> None:
    """Scores that rise or fall by more than exp can represent, within a block of rows and from one to the next."""
    for signs in ((1, 1), (1, -1), (-1, 1)):
        e = torch.randn(2, 40, 5, dtype=torch.float64, device=device)
        scores = torch.randn(2, 40, dtype=torch.float64, device=device)
        scores[:, 13:] += signs[0] * rise
        scores[:, 29:] += signs[1] * rise
        for prefix in (False, True):
            function, reference = pool_functions(prefix)
            for dtype in (torch.float64, torch.float32):
                given, rounded = e.to(dtype), scores.to(dtype)
                expected = reference(given.double(), None, rounded.double())
                for a, b in zip(function(given, None, rounded), expected, strict=True):
                    assert_close(op_name(prefix), a, b)


def check_scores_of_any_size(prefix: bool, device: str = "cpu") -> None:
    """Weights are exact however large the scores are, of which the given ones are multiples of their rounding."""
    for size in (1e3, 1e6, 1e8):
        inputs = pool_inputs(2, 300, 5, torch.float32, folded=False, state=prefix, device=device)
        with torch.no_grad():
            inputs["scores"] += size
            if prefix:
                inputs["l"][:, 0] += size
        compare(op_name(prefix), pool_functions(prefix), inputs)
        if size > 1e6:
            continue
        # Of u: up to here the products and their sums are exact.
        inputs = pool_inputs(2, 300, 5, torch.float32, folded=True, device=device)
        with torch.no_grad():
            inputs["e"].copy_((8 * inputs["e"]).round() / 8)[..., 0] = 1
            inputs["u"].copy_(torch.tensor([size, 1, 0, 0.5, -1], device=device))
        compare(op_name(prefix), pool_functions(prefix), inputs)


def check_outweighing_state(dtype: torch.dtype, device: str = "cpu") -> None:
    """The rounding of c does not add up in the gradient of L if the initial state outweighs all positions."""
    e = torch.randn(2, 1500, 512, device=device).to(dtype)
    scores = torch.randn(2, 1500, device=device).to(dtype)
    c0 = torch.randn(2, 512, dtype=torch.float32, device=device)
    for size in (1.0, 1e3, 1e9):
        L = torch.tensor([[1.0, size]] * 2, device=device)
        gradients: list[Tensor] = []
        for function, to in zip(pool_functions(True), (Tensor.clone, Tensor.double), strict=True):
            z = to(L[:, 1]).requires_grad_()
            c = function(to(e), None, to(scores), torch.stack((to(L[:, 0]), z), 1), to(c0))[0]
            gradients.append(size * torch.autograd.grad(c.mean(-1, dtype=z.dtype).sum(), z)[0])
        actual, expected = gradients
        assert_close("prefix_pool_backward", actual, expected, dtype=dtype)


def check_infinite_scores(device: str = "cpu") -> None:
    """A score of +inf gives a log-sum-exp of +inf and no weights, as in torch."""
    e, scores = torch.randn(3, 40, 5, device=device), torch.randn(3, 40, device=device)
    scores[0, 7] = scores[2, 30] = math.inf
    (c, lse), (expected_c, expected) = (function(e, scores=scores) for function in pool_functions(False))
    torch.testing.assert_close(c, expected_c, equal_nan=True)
    torch.testing.assert_close(lse, expected)
    torch.testing.assert_close(lse, scores.logsumexp(1))


# ---- arguments for torch.library.opcheck


def pool_opcheck_cases() -> list[tuple[str, tuple[object, ...]]]:
    """(op, arguments) of every pooling op: optional arguments given and absent, dtypes, layouts, wanted gradients."""

    def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [leaf(*shape, dtype=torch.float64, scale=0.5) for shape in shapes]

    e, u, scores, c0 = leaves((2, 6, 3), (3,), (2, 6), (2, 3))
    l0 = torch.tensor([[0.5, 1.5], [-1, 2]], dtype=torch.float64).requires_grad_()
    time_major = leaf(6, 2, 3, dtype=torch.float64).transpose(0, 1)
    lengths, mask = torch.tensor([4, 0]), torch.rand(2, 6) < 0.7
    de, du, ds, L, dc = (t.detach() for t in (e, u, scores, l0, c0))
    dl = L[:, 0].clone()
    share = torch.softmax(ds, -1)
    half, bfloat = torch.float16, torch.bfloat16
    return [
        ("attention_pool_forward", (e, u, None, None, None)),
        ("attention_pool_forward", (time_major, None, scores, lengths, mask)),
        ("attention_pool_backward", (dc, dl, de, du, None, lengths, mask, dc, L, True, True, False)),
        ("prefix_pool_forward", (e, u, None, None, None, None, None)),
        ("prefix_pool_forward", (time_major, None, scores, lengths, mask, l0, c0)),
        ("prefix_pool_backward", (de, dl, dc, de, du, dc, de, share, True, True, False, True)),
        # Sums over the sequence are float32 beside tensors of 16 bits.
        ("attention_pool_forward", (de.to(bfloat), du.to(bfloat), None, None, None)),
        (
            "attention_pool_backward",
            (
                *(dc.to(half), dl.float(), de.to(half), None, ds.to(half), lengths, mask, dc.to(half), L.float()),
                *(True, False, True),
            ),
        ),
        ("prefix_pool_forward", (de.to(bfloat), None, ds.to(bfloat), None, None, L.float(), dc.float())),
        (
            "prefix_pool_backward",
            (
                *(de.to(bfloat), dl.float(), dc.float(), de.to(bfloat), du.to(bfloat), dc.float(), de.to(bfloat)),
                *(share.float(), True, True, False, True),
            ),
        ),
    ]
