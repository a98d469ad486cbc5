"""What is measured; sizes are in the letters of docs/design.md."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import llm_ext
from bench import peers, plain
from bench.contest import Case, Contest, Contestant, tensors
from bench.timing import Call
from llm_ext import reference

Bars = tuple[float | None, float | None]


def _sizes(**sizes: int) -> str:
    return "-".join(f"{letter}{size}" for letter, size in sizes.items())


def _call(forward: Callable[[], tuple[Tensor, ...]], inputs: list[Tensor], g: Tensor | None) -> Call:
    """What is timed in torch: forward; or, given the gradient g of its first result, also those of inputs."""
    if g is None:
        return forward

    def train() -> tuple[Tensor, ...]:
        y = forward()[0]
        return y, *torch.autograd.grad(y, inputs, g)

    return train


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def _layers(I: int, H: int, layers: int, dtype: torch.dtype) -> tuple[llm_ext.RNN, torch.nn.RNN]:  # noqa: E741
    """Our layer and torch's, with the same weights."""
    ours = llm_ext.RNN(I, H, layers, dtype=dtype)
    other = torch.nn.RNN(I, H, layers, dtype=dtype)
    other.load_state_dict(ours.state_dict())
    return ours, other


def _rnn_truth(
    layer: torch.nn.RNN,
    x: Tensor,
    g: Tensor | None,
    h0: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> list[Tensor]:
    """The result of `_call` for a layer, by the reference in float64."""
    x, weights = _double(x), [_double(parameter) for parameter in layer.parameters()]
    h0 = None if h0 is None else h0.double()

    def forward() -> tuple[Tensor, ...]:
        y, last = x, []
        for i in range(0, len(weights), 4):
            y, h = reference.rnn(y, h0, *weights[i : i + 4], batch_sizes=batch_sizes)
            last.append(h)
        return y, torch.stack(last)

    with torch.set_grad_enabled(g is not None):
        return tensors(_call(forward, [x, *weights], None if g is None else g.double())())


def _flops(rows: int, I: int, H: int, layers: int, mode: str) -> float:  # noqa: E741
    """Floating-point operations of the matrix products; the backward pass has twice those of the forward."""
    forward = 2 * rows * H * sum(size + H for size in [I, *[H] * (layers - 1)])
    return forward * (3 if mode == "training" else 1)


def recurrence(mode: str, B: int, T: int, I: int, H: int, layers: int = 1, bar: float | None = None) -> Case:  # noqa: E741
    """A whole sequence through the layer; training returns the gradients of input and weights as well."""

    def build(dtype: torch.dtype, threads: int) -> Contest:
        training = mode == "training"
        ours, other = _layers(I, H, layers, dtype)
        x = torch.randn(T, B, I, dtype=dtype, requires_grad=training)
        g = torch.randn(T, B, H, dtype=dtype) if training else None

        def on_torch(layer: torch.nn.Module) -> Callable[[], Call]:
            return lambda: _call(lambda: layer(x), [x, *layer.parameters()], g)

        others = [Contestant("torch.nn.RNN", "torch", on_torch(other))]
        if not training:
            others += _onnx(lambda: peers.rnn_onnx(other, T, B), [x, x.new_zeros(1, B, H)], threads)
        others.append(Contestant("JAX lax.scan", "jax", lambda: peers.jax_rnn(other, x, g)))
        return Contest(_rnn_truth(other, x, g), Contestant("llm_ext.RNN", "llm_ext", on_torch(ours)), others)

    sizes = _sizes(B=B, T=T, I=I, H=H) + (f"-L{layers}" if layers > 1 else "")
    work = _flops(T * B, I, H, layers, mode) / 1e9
    bars = _bars({"torch.nn.RNN": bar})
    return Case(f"recurrence/{mode}/{sizes}", build, mode == "training", work, "GFLOP", bars)


def _bars(bars: Mapping[str, float | None]) -> dict[str, float]:
    return {name: bar for name, bar in bars.items() if bar is not None}


def _onnx(
    model: Callable[[], bytes],
    feed: list[Tensor],
    threads: int,
    outputs: Callable[[Any], list[Tensor]] = tensors,
) -> list[Contestant]:
    """The libraries that run an ONNX model."""

    def on(library: Callable[[bytes, list[Tensor], int], Call]) -> Callable[[], Call]:
        return lambda: library(model(), feed, threads)

    return [
        Contestant("ONNX Runtime", "onnxruntime", on(peers.onnxruntime_call), outputs),
        Contestant("OpenVINO", "openvino", on(peers.openvino_call), outputs),
    ]


def packed(mode: str, B: int, T: int, I: int, H: int) -> Case:  # noqa: E741
    """Lengths T/4 to T as a PackedSequence; the ONNX libraries get them padded, with their lengths."""
    lengths = torch.linspace(T, T // 4, B).round().long()

    def build(dtype: torch.dtype, threads: int) -> Contest:
        training = mode == "training"
        ours, other = _layers(I, H, 1, dtype)
        padded = torch.randn(T, B, I, dtype=dtype)
        packing = pack_padded_sequence(padded, lengths)
        x = packing.data.requires_grad_(training)
        packing = PackedSequence(x, packing.batch_sizes)
        g = torch.randn(len(x), H, dtype=dtype) if training else None

        def on_torch(layer: torch.nn.Module) -> Callable[[], Call]:
            def forward() -> tuple[Tensor, Tensor]:
                y, h_n = layer(packing)
                return y.data, h_n

            return lambda: _call(forward, [x, *layer.parameters()], g)

        def unpadded(result: Any) -> list[Tensor]:
            y, h_n = tensors(result)
            return [pack_padded_sequence(y, lengths).data, h_n]

        others = [Contestant("torch.nn.RNN", "torch", on_torch(other))]
        if not training:
            feed = [padded, padded.new_zeros(1, B, H)]
            others += _onnx(lambda: peers.rnn_onnx(other, T, B, lengths.tolist()), feed, threads, unpadded)
        truth = _rnn_truth(other, x, g, padded.new_zeros(B, H), packing.batch_sizes)
        return Contest(truth, Contestant("llm_ext.RNN", "llm_ext", on_torch(ours)), others)

    sizes = _sizes(B=B, T=T, I=I, H=H)
    work = _flops(int(lengths.sum()), I, H, 1, mode) / 1e9
    return Case(f"recurrence/packed-{mode}/{sizes}", build, mode == "training", work, "GFLOP")


def step(H: int, bar: float | None = None) -> Case:
    """One time step from Python, as in generation, on one thread; without JAX, whose pool keeps its size."""

    def build(dtype: torch.dtype, threads: int) -> Contest:
        ours, other = _layers(H, H, 1, dtype)
        cell = torch.nn.RNNCell(H, H, dtype=dtype)
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in other.state_dict().items()})
        x, h0 = torch.randn(1, 1, H, dtype=dtype), torch.randn(1, 1, H, dtype=dtype)
        row, state = x[0], h0[0]

        def cell_outputs(h: Tensor) -> list[Tensor]:
            return [h, h]

        others = [
            Contestant("torch.nn.RNN", "torch", lambda: lambda: other(x, h0)),
            Contestant("torch.nn.RNNCell", "torch", lambda: lambda: cell(row, state), cell_outputs),
            *_onnx(lambda: peers.rnn_onnx(other, 1, 1), [x, h0], threads),
        ]
        own = Contestant("llm_ext.RNN", "llm_ext", lambda: lambda: ours(x, h0))
        return Contest(_rnn_truth(other, x, None, h0=h0[0]), own, others)

    bars = _bars({"torch.nn.RNN": bar})
    return Case(f"step/inference/{_sizes(B=1, T=1, I=H, H=H)}", build, False, 1e-3, "k step", bars, threads=1)


def _prefix_by_pieces(e: Tensor, u: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    # The backward pass of the reference takes time quadratic in T.
    outputs, state = [], None
    for piece in torch.split(e, 64, 1):
        c, state = reference.prefix_pool(piece, u, state=state)
        outputs.append(c)
    return torch.cat(outputs, 1), state


def _pool_contest(
    mode: str,
    e: Tensor,
    causal: bool,
    formulas: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]],
    compiled: str,
) -> Contest:
    """Our module against plain formulas f(e, W, v); the one named `compiled` also compiled, and in JAX."""
    pool = llm_ext.AttentionPool(e.shape[-1], e.shape[-1], causal=causal, dtype=e.dtype)
    inputs = [e, pool.weight, pool.v]
    g = torch.randn(e.shape if causal else e[:, 0].shape, dtype=e.dtype) if mode == "training" else None

    def own() -> tuple[Tensor]:
        c = pool(e)
        return (c[0] if causal else c,)

    def on_torch(formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Call]:
        return lambda: _call(lambda: (formula(*inputs),), inputs, g)

    def on_compile() -> Call:
        return on_torch(torch.compile(formulas[compiled], fullgraph=True, dynamic=False))()

    exact = [_double(tensor) for tensor in inputs]
    op = _prefix_by_pieces if causal else reference.attention_pool
    with torch.set_grad_enabled(g is not None):
        upstream = None if g is None else g.double()
        truth = _call(lambda: (op(exact[0], exact[2] @ exact[1])[0],), exact, upstream)()
    return Contest(
        tensors(truth),
        Contestant("llm_ext.AttentionPool", "llm_ext", lambda: _call(own, inputs, g)),
        [
            *(Contestant(f"torch, {name}", "torch", on_torch(formula)) for name, formula in formulas.items()),
            Contestant(f"torch.compile, {compiled}", "compile", on_compile),
            Contestant(f"JAX, {compiled}", "jax", lambda: peers.jax_pool(causal, e, pool.weight, pool.v, g)),
        ],
    )


def pooling(mode: str, B: int, T: int, D: int, bars: Bars = (None, None)) -> Case:
    """Attention pooling of a whole sequence; `bars` against the formula as written and the folded one."""
    names = ("as written", "folded")

    def build(dtype: torch.dtype, threads: int) -> Contest:
        e = torch.randn(B, T, D, dtype=dtype, requires_grad=mode == "training")
        formulas = dict(zip(names, (plain.pool_as_written, plain.pool_folded), strict=True))
        return _pool_contest(mode, e, False, formulas, "folded")

    # Memory that must move: e is read; in training it is read again, and its gradient written.
    work = B * T * D * 4 * (3 if mode == "training" else 1) / 1e9
    limits = _bars({f"torch, {name}": bar for name, bar in zip(names, bars, strict=True)})
    return Case(f"pooling/{mode}/{_sizes(B=B, T=T, D=D)}", build, mode == "training", work, "GB", limits)


def prefix(mode: str, B: int, T: int, D: int, bars: Bars = (None, None)) -> Case:
    """Causal prefix pooling; `bars` against the form by cumulative sums and the T × T mask."""
    names = ("cumsum", "T×T mask")

    def build(dtype: torch.dtype, threads: int) -> Contest:
        e = torch.randn(B, T, D, dtype=dtype, requires_grad=mode == "training")
        formulas = dict(zip(names, (plain.prefix_cumsum, plain.prefix_mask), strict=True))
        return _pool_contest(mode, e, True, formulas, "cumsum")

    # e is read and c written; in training e and the gradient of c are read and the gradient of e is written.
    work = B * T * D * 4 * (5 if mode == "training" else 2) / 1e9
    limits = _bars({f"torch, {name}": bar for name, bar in zip(names, bars, strict=True)})
    return Case(f"prefix/{mode}/{_sizes(B=B, T=T, D=D)}", build, mode == "training", work, "GB", limits)


def model_training(B: int, T: int, V: int, E: int, H: int) -> Case:
    """A step of the usual training loop: forward, cross entropy, backward, Adam."""

    def build(dtype: torch.dtype, threads: int) -> Contest:
        ours = llm_ext.LLM(V, E, H, V, 1, 0.0, dtype=dtype)
        other = plain.plain_model(ours)
        x, target = torch.randint(V, (2, B, T))

        def trainer(model: llm_ext.LLM) -> Callable[[], Call]:
            optimizer = torch.optim.Adam(model.parameters(), lr=0.001)

            def call() -> list[Tensor]:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x)[0].flatten(0, 1), target.flatten())
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]

            return lambda: call

        truth = tensors(trainer(copy.deepcopy(other).double())()())
        return Contest(
            truth,
            Contestant("llm_ext.LLM", "llm_ext", trainer(ours)),
            [Contestant("LLM on torch.nn.RNN", "torch", trainer(other))],
        )

    return Case(f"model/training/{_sizes(B=B, T=T, V=V, E=E, H=H)}", build, True, B * T / 1e3, "k token")


def model_generation(B: int, tokens: int, V: int, E: int, H: int) -> Case:
    """Greedy generation from a prompt of one token, checked token by token."""

    def build(dtype: torch.dtype, threads: int) -> Contest:
        ours = llm_ext.LLM(V, E, H, V, 1, 0.0, dtype=dtype).eval()
        other = plain.plain_model(ours)
        prompt = torch.randint(V, (B, 1))

        def generator(model: llm_ext.LLM) -> Callable[[], Call]:
            return lambda: lambda: model.generate(prompt, tokens, temperature=0)

        return Contest(
            tensors(generator(copy.deepcopy(other).double())()()),
            Contestant("llm_ext.LLM", "llm_ext", generator(ours)),
            [Contestant("LLM on torch.nn.RNN", "torch", generator(other))],
        )

    name = f"model/generation/{_sizes(B=B, T=tokens, V=V, E=E, H=H)}"
    return Case(name, build, False, B * tokens / 1e3, "k token")


CASES: tuple[Case, ...] = (
    recurrence("inference", 1, 128, 256, 512, bar=3),
    recurrence("inference", 8, 128, 256, 512),
    recurrence("inference", 32, 128, 256, 512, bar=1.7),
    recurrence("inference", 64, 128, 512, 512),
    recurrence("inference", 32, 128, 1024, 1024),
    recurrence("inference", 1, 512, 64, 64, bar=10),
    recurrence("inference", 32, 512, 64, 64),
    packed("inference", 32, 128, 256, 512),
    recurrence("training", 1, 128, 256, 512),
    recurrence("training", 8, 128, 256, 512),
    recurrence("training", 32, 128, 256, 512),
    recurrence("training", 32, 128, 256, 512, layers=2, bar=1.5),
    recurrence("training", 64, 128, 512, 512),
    recurrence("training", 32, 128, 1024, 1024),
    recurrence("training", 1, 512, 64, 64, bar=8),
    recurrence("training", 32, 512, 64, 64),
    packed("training", 32, 128, 256, 512),
    step(64, bar=3),
    step(512),
    pooling("inference", 32, 128, 512),
    pooling("inference", 8, 1024, 512),
    pooling("inference", 1, 8192, 512),
    pooling("training", 32, 128, 512, bars=(20, 3)),
    pooling("training", 8, 1024, 512),
    pooling("training", 1, 8192, 512),
    prefix("inference", 1, 8192, 512),
    prefix("training", 32, 128, 512),
    prefix("training", 8, 1024, 512),
    prefix("training", 1, 8192, 512, bars=(10, 400)),
    model_training(32, 64, 65, 128, 512),
    model_generation(1, 128, 65, 128, 512),
)
