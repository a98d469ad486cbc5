"""Attention pooling, causal prefix pooling and additive attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llm_ext
from bench import limits, peers, torch_attention
from bench.cases.building import COPY, double, dtype_name, given_targets, limit, size_name, timed_call
from bench.comparison import OURS, Candidate, Case, Comparison, tensors
from bench.timing import Call
from llm_ext import ops, reference

__all__ = [
    "ADDITIVE_NAMES",
    "POOL_FORMULAS",
    "PREFIX_FORMULAS",
    "additive",
    "additive_comparison",
    "pool_comparison",
    "pooled_gradient",
    "pooling",
    "prefix",
    "reference_pool",
    "streaming",
]

Targets = tuple[float | None, float | None]
Formulas = Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]]

# "SDPA" is scaled_dot_product_attention with a constant query.
POOL_FORMULAS: Formulas = {
    "as written": torch_attention.pool_as_written,
    "folded": torch_attention.pool_folded,
    "SDPA": torch_attention.pool_sdpa,
}
PREFIX_FORMULAS: Formulas = {
    "cumsum": torch_attention.prefix_cumsum,
    "T×T mask": torch_attention.prefix_mask,
    "SDPA": torch_attention.prefix_sdpa,
}
ADDITIVE_NAMES = ("torch, product", "torch.compile, sum")


def _compile(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(formula, fullgraph=True, dynamic=False)


def _prefix_pool_in_blocks(e: Tensor, u: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    # The backward pass of the reference takes time quadratic in T.
    outputs, state = [], None
    for block in torch.split(e, 64, 1):
        c, state = reference.prefix_pool(block, u, state=state)
        outputs.append(c)
    return torch.cat(outputs, 1), state


def reference_pool(
    causal: bool, e: Tensor, u: Callable[[], Tensor], inputs: list[Tensor], g: Tensor | None
) -> list[Tensor]:
    """Return the float64 reference of pooling e with u(); given g, also the gradients of `inputs`."""
    pool: Callable[[Tensor, Tensor], Any] = _prefix_pool_in_blocks if causal else reference.attention_pool
    with torch.set_grad_enabled(g is not None):
        return tensors(timed_call(lambda: (pool(e, u())[0],), inputs, None if g is None else g.double())())


def pooled_gradient(causal: bool, e: Tensor) -> Tensor:
    """Return a random gradient of the pooled vectors: [B, T, D] if causal, else [B, D]."""
    shape = e.shape if causal else (e.shape[0], e.shape[2])
    return torch.randn(shape, device=e.device, dtype=e.dtype)


def pool_comparison(
    causal: bool, e: Tensor, training: bool, *, compiled: bool = True, with_jax: bool = True
) -> Comparison:
    """Compare AttentionPool with the formulas in torch; `compiled` adds torch.compile, `with_jax` JAX."""
    formulas, best = (PREFIX_FORMULAS, "cumsum") if causal else (POOL_FORMULAS, "folded")
    D = e.shape[-1]
    pool = llm_ext.AttentionPool(D, D, causal=causal, device=e.device, dtype=e.dtype)
    inputs = [e, pool.weight, pool.v]
    g = pooled_gradient(causal, e) if training else None

    def own_forward() -> tuple[Tensor]:
        c = pool(e)
        return (c[0] if causal else c,)

    def formula_call(formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Call]:
        return lambda: timed_call(lambda: (formula(*inputs),), inputs, g)

    others = [Candidate(f"torch, {name}", "torch", formula_call(formula)) for name, formula in formulas.items()]
    if compiled:
        others.append(Candidate(f"torch.compile, {best}", "compile", lambda: formula_call(_compile(formulas[best]))()))
    if with_jax:
        others.append(Candidate(f"JAX, {best}", "jax", lambda: peers.jax_pool(causal, e, pool.weight, pool.v, g)))
    doubles = [double(tensor) for tensor in inputs]
    return Comparison(
        reference_pool(causal, doubles[0], lambda: doubles[2] @ doubles[1], doubles, g),
        Candidate("llm_ext.AttentionPool", OURS, lambda: timed_call(own_forward, inputs, g)),
        others,
    )


def _pool_case(group: str, causal: bool, phase: str, B: int, T: int, D: int, targets: Targets) -> Case:
    training = phase == "training"

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        e = torch.randn(B, T, D, dtype=dtype, requires_grad=training)
        return pool_comparison(causal, e, training)

    # Arrays of the size of e that must be read or written. Inference: e, and c if causal; training: the same, then e,
    # the gradient of c if causal, and the gradient of e.
    arrays = (5 if training else 2) if causal else (3 if training else 1)
    names = PREFIX_FORMULAS if causal else POOL_FORMULAS
    by_name = given_targets({f"torch, {name}": target for name, target in zip(names, targets, strict=False)})
    work = B * T * D * 4 * arrays / 1e9
    return Case(f"{group}/{phase}/{size_name(B=B, T=T, D=D)}", build, training, work, "GB", by_name, memory=True)


def pooling(phase: str, B: int, T: int, D: int, targets: Targets = (None, None)) -> Case:
    """Attention pooling of a whole sequence; `targets` apply to the formula as written and the folded one."""
    return _pool_case("pooling", False, phase, B, T, D, targets)


def prefix(phase: str, B: int, T: int, D: int, targets: Targets = (None, None)) -> Case:
    """Causal prefix pooling; `targets` apply to the form by cumulative sums and the T × T mask."""
    return _pool_case("prefix", True, phase, B, T, D, targets)


def streaming(
    group: str,
    pass_name: str,
    B: int,
    T: int,
    D: int,
    target: float | None = None,
    dtype: torch.dtype | None = None,
) -> Case:
    """Pooling or prefix pooling of data larger than the caches, the "forward" or the "backward" pass alone.

    `target` is the fraction to reach of the speed of a copy that moves the same number of bytes.
    """
    causal, training = group == "prefix", pass_name == "backward"
    # Arrays of the size of e that must be read or written once: e, and c if causal; backward: e and its gradient, and
    # the gradient of c if causal.
    arrays = (3 if training else 2) if causal else (2 if training else 1)
    work = B * T * D * 4 * arrays / 1e9
    op = ops.prefix_pool if causal else ops.attention_pool
    reference_op = _prefix_pool_in_blocks if causal else reference.attention_pool

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        e = torch.randn(B, T, D, dtype=dtype, requires_grad=training)
        u = (torch.randn(D) * D**-0.5).to(dtype).requires_grad_(training)
        g = pooled_gradient(causal, e) if training else None

        def pass_call(pool: Callable[..., Any], inputs: list[Tensor], g: Tensor | None) -> Call:
            if g is None:
                return lambda: pool(*inputs)[0]
            c = pool(*inputs)[0]
            return lambda: torch.autograd.grad(c, inputs, g, retain_graph=True)

        doubles = [double(e), double(u)]
        with torch.set_grad_enabled(training):
            expected = tensors(pass_call(reference_op, doubles, None if g is None else g.double())())
        own = Candidate(f"llm_ext.{op.__name__}", OURS, lambda: pass_call(op, [e, u], g))
        return Comparison(expected, own, [limit(COPY, lambda: limits.copy(work * dtype.itemsize / 4))])

    kind = pass_name if dtype is None else f"{dtype_name(dtype)}-{pass_name}"
    name = f"{group}/{kind}/{size_name(B=B, T=T, D=D)}"
    return Case(name, build, training, work, "GB", given_targets({COPY: target}), dtype=dtype)


def additive_comparison(
    B: int,
    Tq: int,
    Tk: int,
    A: int,
    training: bool,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    compiled: bool = True,
) -> Comparison:
    """Compare AdditiveAttention with torch; `compiled` adds torch.compile."""
    layer = llm_ext.AdditiveAttention(A, A, A, device=device, dtype=dtype)
    query, keys = (torch.randn(B, T, A, device=device, dtype=dtype, requires_grad=training) for T in (Tq, Tk))
    inputs = [query, keys, *layer.parameters()]
    g = torch.randn(B, Tq, A, device=device, dtype=dtype) if training else None

    def reference_call() -> list[Tensor]:
        query, keys, w_q, w_k, v, bias = doubles = [double(tensor) for tensor in inputs]
        projected = F.linear(query, w_q), F.linear(keys, w_k, bias)
        context = reference.additive_attention(*projected, v, keys)[:1]
        return tensors(timed_call(lambda: context, doubles, None if g is None else g.double())())

    def formula_call(formula: Callable[..., Tensor]) -> Callable[[], Call]:
        return lambda: timed_call(lambda: (formula(*inputs),), inputs, g)

    others = [Candidate(ADDITIVE_NAMES[0], "torch", formula_call(torch_attention.additive_product))]
    if compiled:
        others.append(
            Candidate(ADDITIVE_NAMES[1], "compile", lambda: formula_call(_compile(torch_attention.additive_sum))())
        )
    with torch.set_grad_enabled(training):
        expected = reference_call()
    return Comparison(
        expected,
        Candidate("llm_ext.AdditiveAttention", OURS, lambda: timed_call(lambda: layer(query, keys)[:1], inputs, g)),
        others,
    )


def additive(phase: str, B: int, Tq: int, Tk: int, A: int, targets: Targets = (None, None)) -> Case:
    """Additive attention with its projections, queries and keys of size A.

    `targets` apply to torch and torch.compile.
    """
    training = phase == "training"

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        return additive_comparison(B, Tq, Tk, A, training, dtype=dtype)

    by_name = given_targets(dict(zip(ADDITIVE_NAMES, targets, strict=True)))
    name = f"additive/{phase}/{size_name(B=B, Tq=Tq, Tk=Tk, A=A)}"
    return Case(name, build, training, B * Tq * Tk * A / 1e9, "G tanh", by_name)
