"""Cases on a GPU: recurrent layers, pooling and additive attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from bench import peers
from bench.cases.attention import ADDITIVE_NAMES, additive_comparison, pool_comparison, pooled_gradient, reference_pool
from bench.cases.building import double, dtype_name, given_targets, size_name, timed_call
from bench.cases.recurrence import gflop, kind_name, layer_call, make_layers, reference_outputs
from bench.cells import LSTM, RNN, Cell
from bench.comparison import LIMIT, OURS, Candidate, Case, Comparison, tensors
from bench.timing import Call
from llm_ext import ops

__all__ = ["additive", "lengths", "pool_layer", "pool_op", "sequence"]

_COPY = "copy of the same size"


def sequence(
    cell: Cell,
    phase: str,
    dtype: torch.dtype,
    B: int,
    T: int,
    I: int,  # noqa: E741
    H: int,
    layers: int = 1,
    bidirectional: bool = False,
    target: float | None = None,
    *,
    words: tuple[str, ...] = (),
    all_peers: bool = False,
    tf32: bool = False,
    device: str = "cuda",
) -> Case:
    """A whole sequence through a layer; training computes the gradients of input and weights as well.

    `all_peers` adds candidates that take long to prepare or are rarely installed.
    """
    training = phase == "training"
    name = f"torch.nn.{cell.name}"

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours, other = make_layers(cell, I, H, layers, dtype=dtype, bidirectional=bidirectional, device=device)
        x = torch.randn(T, B, I, device=device, dtype=dtype, requires_grad=training)
        g = torch.randn(T, B, (1 + bidirectional) * H, device=device, dtype=dtype) if training else None
        expected = reference_outputs(other, x, g)
        others = [Candidate(name, "torch", layer_call(other, x, g))]
        if all_peers:
            others.append(
                Candidate(f"torch.compile, {name}", "compile", lambda: layer_call(torch.compile(other), x, g)())
            )
        if all_peers and layers == 1 and not bidirectional and cell is not RNN:
            if dtype == torch.float32:
                haste = Candidate("Haste", "haste", lambda: layer_call(peers.haste_layer(cell, other), x, g)())
                others.append(haste)
            elif cell is LSTM and not training:
                flashrnn = Candidate(
                    "FlashRNN, no input projection",
                    "flashrnn",
                    lambda: peers.flashrnn_call(cell, other, x),
                    # It returns the output alone; the final states are not compared.
                    lambda result: [*tensors(result), *expected[1:]],
                )
                others.append(flashrnn)
        return Comparison(expected, Candidate(f"llm_ext.{cell.name}", OURS, layer_call(ours, x, g)), others)

    suffix = (f"-L{layers}" if layers > 1 else "") + ("-bidirectional" if bidirectional else "")
    kind = kind_name(cell, *words, "tf32" if tf32 else dtype_name(dtype), phase)
    work = gflop(cell, T * B, I, H, layers, bidirectional=bidirectional, training=training)
    targets = given_targets({name: target})
    case_name = f"cuda/{kind}/{size_name(B=B, T=T, I=I, H=H)}{suffix}"
    return Case(case_name, build, training, work, "GFLOP", targets, dtype=dtype, tf32=tf32)


def lengths(
    cell: Cell,
    phase: str,
    dtype: torch.dtype,
    B: int,
    T: int,
    I: int,  # noqa: E741
    H: int,
    target: float,
    *,
    device: str = "cuda",
) -> Case:
    """Unsorted lengths T/4 to T: llm_ext gets padded input and the lengths, torch input packed beforehand."""
    training = phase == "training"
    name = f"torch.nn.{cell.name}, packed"
    sizes = torch.linspace(T // 4, T, B).round().long()[torch.randperm(B, generator=torch.Generator().manual_seed(0))]
    tokens = int(sizes.sum())

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours, other = make_layers(cell, I, H, dtype=dtype, device=device)
        x = torch.randn(T, B, I, device=device, dtype=dtype, requires_grad=training)
        device_lengths = sizes.to(device)
        inside = torch.arange(T, device=device)[:, None] < device_lengths
        g = torch.randn(T, B, H, device=device, dtype=dtype) * inside[..., None] if training else None

        def padded_forward() -> Any:
            return ours(x, lengths=device_lengths)

        packed_input = pack_padded_sequence(x.detach(), sizes, enforce_sorted=False)
        data = packed_input.data.requires_grad_(training)
        packed_input = packed_input._replace(data=data)
        packed_g = None if g is None else pack_padded_sequence(g, sizes, enforce_sorted=False).data
        # For each packed row, its index in the padded layout.
        indices = torch.arange(T * B).view(T, B, 1)
        rows = pack_padded_sequence(indices, sizes, enforce_sorted=False).data[:, 0].to(device)

        def packed_forward() -> tuple[Tensor, Any]:
            y, last = other(packed_input)
            return y.data, last

        def unpack(result: Any) -> list[Tensor]:
            """Pad y and, in training, the gradient of x, as in the reference."""
            found = tensors(result)
            for i in range(2 if training else 1):
                flat = found[i].new_zeros(T * B, found[i].shape[-1])
                found[i] = flat.index_copy(0, rows, found[i]).view(T, B, -1)
            return found

        own_call = partial(timed_call, padded_forward, [x, *ours.parameters()], g)
        torch_call = partial(timed_call, packed_forward, [data, *other.parameters()], packed_g)
        return Comparison(
            reference_outputs(other, x, g, lengths=device_lengths),
            Candidate(f"llm_ext.{cell.name}", OURS, own_call),
            [Candidate(name, "torch", torch_call, outputs=unpack)],
        )

    case_name = f"cuda/{kind_name(cell, 'lengths', dtype_name(dtype), phase)}/{size_name(B=B, T=T, I=I, H=H)}"
    work = gflop(cell, tokens, I, H, training=training)
    return Case(case_name, build, training, work, "GFLOP", {name: target}, dtype=dtype)


def _copy(gb: float, device: str) -> Candidate:
    """A copy that moves `gb` GB, half read and half written."""

    def build() -> Call:
        source = torch.empty(max(1, round(gb * 1e9 / 2)), dtype=torch.uint8, device=device)
        target, done = torch.empty_like(source), torch.ones(())

        def call() -> Tensor:
            target.copy_(source)
            return done

        return call

    return Candidate(_COPY, LIMIT, build, reference=[torch.ones(())])


def _arrays(causal: bool, training: bool) -> int:
    """Arrays of the size of e that must be read or written.

    Inference reads e and, if causal, writes c. Training also reads e and, if causal, the gradient of c, and writes the
    gradient of e.
    """
    return (5 if training else 2) if causal else (3 if training else 1)


def pool_op(
    causal: bool,
    phase: str,
    dtype: torch.dtype,
    B: int,
    T: int,
    D: int,
    target: float | None = None,
    *,
    device: str = "cuda",
) -> Case:
    """The op alone; `target` is the fraction to reach of the speed of a copy that moves the same number of bytes."""
    training = phase == "training"
    gb = B * T * D * dtype.itemsize * _arrays(causal, training) / 1e9

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        e = torch.randn(B, T, D, device=device, dtype=dtype, requires_grad=training)
        u = (2 * D**-0.5 * torch.randn(D, device=device)).to(dtype).requires_grad_(training)
        g = pooled_gradient(causal, e) if training else None
        doubles = [double(e), double(u)]
        op: Callable[..., tuple[Tensor, Any]] = ops.prefix_pool if causal else ops.attention_pool
        return Comparison(
            reference_pool(causal, doubles[0], lambda: doubles[1], doubles, g),
            Candidate("llm_ext.ops", OURS, lambda: timed_call(lambda: (op(e, u)[0],), [e, u], g)),
            [_copy(gb, device)],
        )

    kind = f"{'prefix' if causal else 'pooling'}-op-{dtype_name(dtype)}-{phase}"
    # The work of a case in GB is that of float32.
    work = gb * 4 / dtype.itemsize
    targets = given_targets({_COPY: target})
    return Case(f"cuda/{kind}/{size_name(B=B, T=T, D=D)}", build, training, work, "GB", targets, dtype=dtype)


def pool_layer(
    causal: bool,
    phase: str,
    dtype: torch.dtype,
    B: int,
    T: int,
    D: int,
    *,
    compiled: bool = False,
    device: str = "cuda",
) -> Case:
    """The layer, which computes u = Wᵀ v in each call, against the formulas in torch."""
    training = phase == "training"

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        e = torch.randn(B, T, D, device=device, dtype=dtype, requires_grad=training)
        return pool_comparison(causal, e, training, compiled=compiled, with_jax=False)

    name = f"cuda/{'prefix' if causal else 'pooling'}-{dtype_name(dtype)}-{phase}/{size_name(B=B, T=T, D=D)}"
    return Case(name, build, training, B * T * D * 4 * _arrays(causal, training) / 1e9, "GB", dtype=dtype)


def additive(
    phase: str,
    dtype: torch.dtype,
    B: int,
    Tq: int,
    Tk: int,
    A: int,
    target: float | None = None,
    *,
    compiled: bool = False,
    device: str = "cuda",
) -> Case:
    """Additive attention with its projections, queries and keys of size A; `target` applies to torch.compile."""
    training = phase == "training"

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        return additive_comparison(B, Tq, Tk, A, training, dtype=dtype, device=device, compiled=compiled)

    name = f"cuda/additive-{dtype_name(dtype)}-{phase}/{size_name(B=B, Tq=Tq, Tk=Tk, A=A)}"
    targets = given_targets({ADDITIVE_NAMES[1]: target})
    return Case(name, build, training, B * Tq * Tk * A / 1e9, "G tanh", targets, dtype=dtype)
