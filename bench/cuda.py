"""What is measured on a GPU (`--device cuda`); sizes are in the letters of docs/design.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import llm_ext
from bench import peers, plain
from bench.cases import _bars, _call, _double, _kind, _prefix_by_pieces, _sizes
from bench.cells import CELLS, GRU, LSTM, RNN, Cell
from bench.contest import LIMIT, OURS, Case, Contest, Contestant, Mean, tensors
from bench.timing import Call
from llm_ext import ops, reference

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {FP32: "float32", BF16: "bfloat16", FP16: "float16"}
# Input features of the cases that are next to nothing but the recurrence; cuDNN wants 8 for its quicker ways.
NO_INPUT = 8
COPY = "copy of as many bytes"


def _layers(cell: Cell, I: int, H: int, layers: int, both: bool, dtype: torch.dtype) -> tuple[Any, Any]:  # noqa: E741
    """Our layer and torch's on the GPU, with the same weights."""
    options = {"bidirectional": both, "device": DEVICE, "dtype": dtype}
    ours, other = (of(I, H, layers, **options) for of in (cell.ours, cell.theirs))
    other.load_state_dict(ours.state_dict())
    return ours, other


def _truth(cell: Cell, layer: Any, x: Tensor, g: Tensor | None, lengths: Tensor | None = None) -> list[Tensor]:
    """The result of `_call` for a layer, by the reference in float64."""
    x, weights = _double(x), [_double(parameter) for parameter in layer.parameters()]
    name = "tanh" if cell is RNN else cell.name.lower()

    def forward() -> tuple[Tensor, ...]:
        if lengths is not None:
            y, last = cell.truth(x, None, *weights, lengths=lengths)
            return y, *(part[None] for part in tensors_of(last))
        y, h_n, c_n = reference.stack(name, x, None, None, weights, bidirectional=layer.bidirectional)
        return (y, h_n, c_n) if cell is LSTM else (y, h_n)

    with torch.set_grad_enabled(g is not None):
        return tensors(_call(forward, [x, *weights], None if g is None else g.double())())


def tensors_of(state: Any) -> tuple[Tensor, ...]:
    """The tensors of a state."""
    return state if isinstance(state, tuple) else (state,)


def _gflop(cell: Cell, rows: int, I: int, H: int, layers: int, both: bool, mode: str) -> float:  # noqa: E741
    """The matrix products, in GFLOP; the backward pass has twice those of the forward."""
    directions = 1 + both
    inputs = [I, *[directions * H] * (layers - 1)]
    forward = 2 * rows * directions * cell.gates * H * sum(size + H for size in inputs)
    return forward * (3 if mode == "training" else 1) / 1e9


def recurrence(
    cell: Cell,
    mode: str,
    dtype: torch.dtype,
    B: int,
    T: int,
    I: int,  # noqa: E741
    H: int,
    layers: int = 1,
    both: bool = False,
    bar: float | None = None,
    *,
    words: tuple[str, ...] = (),
    more: bool = False,
    tf32: bool = False,
) -> Case:
    """A whole sequence through the layer; training returns the gradients of input and weights as well.

    `more`: with those contestants who take long to prepare, or are rarely there.
    """
    training = mode == "training"
    name = f"torch.nn.{cell.name}"

    def build(dtype: torch.dtype, threads: int) -> Contest:
        ours, other = _layers(cell, I, H, layers, both, dtype)
        x = torch.randn(T, B, I, device=DEVICE, dtype=dtype, requires_grad=training)
        g = torch.randn(T, B, (1 + both) * H, device=DEVICE, dtype=dtype) if training else None

        def on_torch(layer: Any) -> Callable[[], Call]:
            return lambda: _call(lambda: layer(x), [x, *layer.parameters()], g)

        others = [Contestant(name, "torch", on_torch(other))]
        if more:
            others.append(Contestant(f"torch.compile, {name}", "compile", lambda: on_torch(torch.compile(other))()))
        if more and layers == 1 and not both and cell is not RNN:
            if dtype == FP32:
                others.append(Contestant("Haste", "haste", lambda: on_torch(peers.haste_layer(cell, other))()))
            elif cell is LSTM and not training:

                def first(result: Any) -> list[Tensor]:
                    # It returns the output alone; the last states are not compared.
                    return [*tensors(result), *truth[1:]]

                call = lambda: peers.flashrnn_call(cell, other, x)  # noqa: E731
                others.append(Contestant("FlashRNN, no input projection", "flashrnn", call, first))
        truth = _truth(cell, other, x, g)
        return Contest(truth, Contestant(f"llm_ext.{cell.name}", OURS, on_torch(ours)), others)

    sizes = _sizes(B=B, T=T, I=I, H=H) + (f"-L{layers}" if layers > 1 else "") + ("-bidirectional" if both else "")
    kind = _kind(cell, *words, "tf32" if tf32 else NAMES[dtype], mode)
    work = _gflop(cell, T * B, I, H, layers, both, mode)
    bars = _bars({name: bar})
    return Case(f"cuda/{kind}/{sizes}", build, training, work, "GFLOP", bars, dtype=dtype, tf32=tf32)


def lengths(cell: Cell, mode: str, dtype: torch.dtype, B: int, T: int, I: int, H: int, bar: float) -> Case:  # noqa: E741
    """Lengths T/4 to T in no order: ours padded, with their lengths; torch's packed beforehand, and then unpacked."""
    training = mode == "training"
    name = f"torch.nn.{cell.name}, packed"
    sizes = torch.linspace(T // 4, T, B).round().long()[torch.randperm(B, generator=torch.Generator().manual_seed(0))]
    tokens = int(sizes.sum())

    def build(dtype: torch.dtype, threads: int) -> Contest:
        ours, other = _layers(cell, I, H, 1, False, dtype)
        x = torch.randn(T, B, I, device=DEVICE, dtype=dtype, requires_grad=training)
        on_device = sizes.to(DEVICE)
        inside = torch.arange(T, device=DEVICE)[:, None] < on_device
        g = torch.randn(T, B, H, device=DEVICE, dtype=dtype) * inside[..., None] if training else None

        def padded() -> Any:
            return ours(x, lengths=on_device)

        packing = pack_padded_sequence(x.detach(), sizes, enforce_sorted=False)
        data = packing.data.requires_grad_(training)
        packing = packing._replace(data=data)
        g_rows = None if g is None else pack_padded_sequence(g, sizes, enforce_sorted=False).data
        # Where in the padded layout each packed row belongs.
        places = torch.arange(T * B).view(T, B, 1)
        rows = pack_padded_sequence(places, sizes, enforce_sorted=False).data[:, 0].to(DEVICE)

        def packed() -> tuple[Tensor, Any]:
            y, after = other(packing)
            return y.data, after

        def unpacked(result: Any) -> list[Tensor]:
            """As the truth: y padded; in training the gradient of x padded."""
            found = tensors(result)
            for i in range(2 if training else 1):
                flat = found[i].new_zeros(T * B, found[i].shape[-1])
                found[i] = flat.index_copy(0, rows, found[i]).view(T, B, -1)
            return found

        return Contest(
            _truth(cell, other, x, g, on_device),
            Contestant(f"llm_ext.{cell.name}", OURS, lambda: _call(padded, [x, *ours.parameters()], g)),
            [Contestant(name, "torch", lambda: _call(packed, [data, *other.parameters()], g_rows), outputs=unpacked)],
        )

    work = _gflop(cell, tokens, I, H, 1, False, mode)
    case_name = f"cuda/{_kind(cell, 'lengths', NAMES[dtype], mode)}/{_sizes(B=B, T=T, I=I, H=H)}"
    return Case(case_name, build, training, work, "GFLOP", _bars({name: bar}), dtype=dtype)


def _copy(gb: float) -> Contestant:
    """A copy that reads and writes so many GB together."""

    def build() -> Call:
        source = torch.empty(max(1, round(gb * 1e9 / 2)), dtype=torch.uint8, device=DEVICE)
        target, done = torch.empty_like(source), torch.ones(())

        def call() -> Tensor:
            target.copy_(source)
            return done

        return call

    return Contestant(COPY, LIMIT, build, truth=[torch.ones(())])


def _pool_truth(causal: bool, e: Tensor, u: Callable[[Tensor], Tensor], inputs: list[Tensor], g: Tensor | None) -> Any:
    op = _prefix_by_pieces if causal else reference.attention_pool
    with torch.set_grad_enabled(g is not None):
        return tensors(_call(lambda: (op(e, u(e))[0],), inputs, None if g is None else g.double())())


def pool_op(causal: bool, mode: str, dtype: torch.dtype, B: int, T: int, D: int, bar: float | None = None) -> Case:
    """The op alone, against a copy of the bytes that must move; `bar` is of that."""
    training = mode == "training"
    # e is read; the prefix form writes c. In training e is read again (and the gradient of c), its gradient written.
    units = (5 if training else 2) if causal else (3 if training else 1)
    gb = B * T * D * dtype.itemsize * units / 1e9

    def build(dtype: torch.dtype, threads: int) -> Contest:
        e = torch.randn(B, T, D, device=DEVICE, dtype=dtype, requires_grad=training)
        u = (2 * D**-0.5 * torch.randn(D, device=DEVICE)).to(dtype).requires_grad_(training)
        g = torch.randn(e.shape if causal else (B, D), device=DEVICE, dtype=dtype) if training else None
        exact = [_double(e), _double(u)]
        op = ops.prefix_pool if causal else ops.attention_pool
        return Contest(
            _pool_truth(causal, exact[0], lambda _: exact[1], exact, g),
            Contestant("llm_ext.ops", OURS, lambda: _call(lambda: (op(e, u)[0],), [e, u], g)),
            [_copy(gb)],
        )

    name = f"cuda/{'prefix' if causal else 'pooling'}-op-{NAMES[dtype]}-{mode}/{_sizes(B=B, T=T, D=D)}"
    # Work in GB is that of float32.
    return Case(name, build, training, gb * 4 / dtype.itemsize, "GB", _bars({COPY: bar}), dtype=dtype)


def pool(causal: bool, mode: str, dtype: torch.dtype, B: int, T: int, D: int, *, more: bool = False) -> Case:
    """The layer, its score folded in each call, against formulas in torch, with `more` compiled as well."""
    training = mode == "training"
    plainly = (
        {"cumsum": plain.prefix_cumsum, "T×T mask": plain.prefix_mask, "SDPA": plain.prefix_sdpa}
        if causal
        else {"as written": plain.pool_as_written, "folded": plain.pool_folded, "SDPA": plain.pool_sdpa}
    )
    compiled = "cumsum" if causal else "folded"

    def build(dtype: torch.dtype, threads: int) -> Contest:
        layer = llm_ext.AttentionPool(D, D, causal=causal, device=DEVICE, dtype=dtype)
        e = torch.randn(B, T, D, device=DEVICE, dtype=dtype, requires_grad=training)
        inputs = [e, layer.weight, layer.v]
        g = torch.randn(e.shape if causal else (B, D), device=DEVICE, dtype=dtype) if training else None
        exact = [_double(tensor) for tensor in inputs]

        def on_torch(formula: Callable[..., Tensor]) -> Callable[[], Call]:
            return lambda: _call(lambda: (formula(*inputs),), inputs, g)

        def own() -> tuple[Tensor]:
            c = layer(e)
            return (c[0] if causal else c,)

        others = [Contestant(f"torch, {name}", "torch", on_torch(formula)) for name, formula in plainly.items()]
        if more:
            fused = on_torch(torch.compile(plainly[compiled], fullgraph=True, dynamic=False))
            others.append(Contestant(f"torch.compile, {compiled}", "compile", fused))
        return Contest(
            _pool_truth(causal, exact[0], lambda _: exact[2] @ exact[1], exact, g),
            Contestant("llm_ext.AttentionPool", OURS, lambda: _call(own, inputs, g)),
            others,
        )

    units = (5 if training else 2) if causal else (3 if training else 1)
    name = f"cuda/{'prefix' if causal else 'pooling'}-{NAMES[dtype]}-{mode}/{_sizes(B=B, T=T, D=D)}"
    return Case(name, build, training, B * T * D * 4 * units / 1e9, "GB", dtype=dtype)


def additive(
    mode: str,
    dtype: torch.dtype,
    B: int,
    Tq: int,
    Tk: int,
    A: int,
    bar: float | None = None,
    *,
    more: bool = False,
) -> Case:
    """Additive attention, projections included, queries and keys of size A.

    `bar` is against torch.compile, which takes part with `more`.
    """
    training = mode == "training"
    names = ("torch, product", "torch.compile, sum")

    def build(dtype: torch.dtype, threads: int) -> Contest:
        layer = llm_ext.AdditiveAttention(A, A, A, device=DEVICE, dtype=dtype)
        query, keys = (torch.randn(B, T, A, device=DEVICE, dtype=dtype, requires_grad=training) for T in (Tq, Tk))
        inputs = [query, keys, *layer.parameters()]
        g = torch.randn(B, Tq, A, device=DEVICE, dtype=dtype) if training else None

        def exact() -> list[Tensor]:
            doubles = [_double(tensor) for tensor in inputs]
            result = _call(lambda: (plain.additive_product(*doubles),), doubles, None if g is None else g.double())()
            return tensors(result)

        def on_torch(formula: Callable[..., Tensor]) -> Callable[[], Call]:
            return lambda: _call(lambda: (formula(*inputs),), inputs, g)

        with torch.set_grad_enabled(training):
            truth = exact()
        others = [Contestant(names[0], "torch", on_torch(plain.additive_product))]
        if more:
            fused = on_torch(torch.compile(plain.additive_sum, fullgraph=True, dynamic=False))
            others.append(Contestant(names[1], "compile", fused))
        return Contest(
            truth,
            Contestant("llm_ext.AdditiveAttention", OURS, lambda: _call(lambda: layer(query, keys)[:1], inputs, g)),
            others,
        )

    name = f"cuda/additive-{NAMES[dtype]}-{mode}/{_sizes(B=B, Tq=Tq, Tk=Tk, A=A)}"
    bars = _bars({names[1]: bar})
    return Case(name, build, training, B * Tq * Tk * A / 1e9, "G tanh", bars, dtype=dtype)


MODES = ("inference", "training")
SMALL: Mapping[str, tuple[int, ...]] = {"H": (64, 128, 256), "B": (1, 16, 64)}


def _cases() -> Iterator[Case]:
    for i, mode in enumerate(MODES):
        more = mode == "inference"
        for dtype in (FP32, BF16):
            yield recurrence(RNN, mode, dtype, 32, 128, 256, 512, layers=2, bar=2, more=more)
        yield recurrence(LSTM, mode, BF16, 16, 1024, 768, 768, bar=(2, 1.5)[i], more=more)
        yield recurrence(LSTM, mode, FP16, 16, 1024, 768, 768, bar=1.0, more=more)
        yield recurrence(GRU, mode, BF16, 32, 512, 512, 512, bar=2, more=more)
        yield recurrence(LSTM, mode, BF16, 64, 256, 512, 512, layers=2, both=True, bar=(2, 1.5)[i], more=more)
        # Without the input projection, as good as.
        yield recurrence(LSTM, mode, BF16, 16, 1024, NO_INPUT, 768, words=("alone",))
        yield recurrence(LSTM, mode, FP16, 16, 1024, NO_INPUT, 768, words=("alone",))
        yield recurrence(GRU, mode, BF16, 32, 512, NO_INPUT, 512, words=("alone",))
        # Exact float32, which has no matrix units, and TF32.
        for tf32 in (False, True):
            yield recurrence(LSTM, mode, FP32, 16, 256, 768, 768, tf32=tf32, more=more and not tf32)
        # Sizes that fill neither vectors nor tiles.
        for B, H in ((7, 17), (33, 65), (3, 130), (7, 1000)):
            yield recurrence(GRU, mode, BF16, B, 128, H, H, words=("odd",))
        for cell in CELLS:
            yield lengths(cell, mode, BF16, 32, 512, 512, 512, bar=5)
    for mode in MODES:
        for causal in (False, True):
            yield pool_op(causal, mode, BF16, 8, 4096, 1024, bar=0.8 if mode == "inference" else None)
            yield pool_op(causal, mode, FP32, 8, 4096, 1024)
            # Few rows, many, and one.
            for B, T, D in ((1, 16384, 1024), (512, 128, 512), (32, 1024, 512)):
                yield pool_op(causal, mode, BF16, B, T, D)
            for B, T, D in ((8, 1024, 512), (32, 128, 512)):
                yield pool(causal, mode, BF16, B, T, D, more=mode == "inference" and B == 8)
        yield additive(mode, BF16, 128, 50, 50, 1024, bar=3 if mode == "training" else None, more=True)
        yield additive(mode, FP32, 128, 50, 50, 1024)
        for B, Tq, Tk, A in ((1280, 1, 66, 1024), (128, 10, 128, 1024), (32, 32, 32, 512), (16, 64, 64, 512)):
            yield additive(mode, BF16, B, Tq, Tk, A)
    for dtype in (BF16, FP32):
        for mode in MODES:
            for cell in CELLS:
                for H in SMALL["H"]:
                    for B in SMALL["B"]:
                        yield recurrence(cell, mode, dtype, B, 512, H, H, bar=1.0, words=("small",))


CASES: tuple[Case, ...] = tuple(_cases())


def _means() -> Iterator[Mean]:
    every = tuple(f"torch.nn.{cell.name}" for cell in CELLS)
    for mode in MODES:
        of = tuple(f"cuda/{_kind(cell, 'small', '*', mode)}/*" for cell in CELLS)
        yield Mean(of, every, bar=1.5)
        for cell in CELLS:
            yield Mean((f"cuda/{_kind(cell, 'small', '*', mode)}/*",), (f"torch.nn.{cell.name}",))


MEANS: tuple[Mean, ...] = tuple(_means())
