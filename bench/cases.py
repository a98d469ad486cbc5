"""What is measured; sizes are in the letters of docs/design.md."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import llm_ext
from bench import limits, peers, plain, translation
from bench.cells import CELLS, RNN, Cell
from bench.contest import LIMIT, OURS, Case, Contest, Contestant, Mean, tensors
from bench.timing import Call
from llm_ext import ops, reference

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


def _layers(cell: Cell, I: int, H: int, layers: int, dtype: torch.dtype) -> tuple[Any, Any]:  # noqa: E741
    """Our layer and torch's, with the same weights."""
    ours = cell.ours(I, H, layers, dtype=dtype)
    other = cell.theirs(I, H, layers, dtype=dtype)
    other.load_state_dict(ours.state_dict())
    return ours, other


def _recurrent_truth(
    cell: Cell,
    layer: Any,
    x: Tensor,
    g: Tensor | None,
    state: list[Tensor] | None = None,
    batch_sizes: Tensor | None = None,
) -> list[Tensor]:
    """The result of `_call` for a layer, by the reference in float64."""
    x, weights = _double(x), [_double(parameter) for parameter in layer.parameters()]
    hx = cell.hx(None if state is None else [part.double() for part in state])

    def forward() -> tuple[Tensor, ...]:
        y, last = x, []
        for i in range(0, len(weights), 4):
            y, after = cell.truth(y, hx, *weights[i : i + 4], batch_sizes=batch_sizes)
            last.append(after if isinstance(after, tuple) else (after,))
        return y, *(torch.stack(layers) for layers in zip(*last, strict=True))

    with torch.set_grad_enabled(g is not None):
        return tensors(_call(forward, [x, *weights], None if g is None else g.double())())


def _zeros(cell: Cell, like: Tensor, B: int, H: int) -> list[Tensor]:
    return [like.new_zeros(1, B, H) for _ in cell.state]


def _kind(cell: Cell, *words: str) -> str:
    # The names without a cell are those of Elman, which came first.
    return "-".join(words if cell is RNN else (cell.name.lower(), *words))


def _gflop(cell: Cell, rows: int, I: int, H: int, layers: int, mode: str) -> float:  # noqa: E741
    """The matrix products, in GFLOP; the backward pass has twice those of the forward."""
    forward = 2 * rows * cell.gates * H * sum(size + H for size in [I, *[H] * (layers - 1)])
    return forward * (3 if mode == "training" else 1) / 1e9


RIVALS = ("torch", "onnxruntime", "openvino", "jax")


def recurrence(
    cell: Cell,
    mode: str,
    B: int,
    T: int,
    I: int,  # noqa: E741
    H: int,
    layers: int = 1,
    bars: Mapping[str, float | None] | None = None,
    *,
    group: str = "recurrence",
    kind: str | None = None,
    against: Sequence[str] = RIVALS,
) -> Case:
    """A whole sequence through the layer; training returns the gradients of input and weights as well.

    `against` are the libraries of those who take part, among them the limit of the machine.
    """
    work = _gflop(cell, T * B, I, H, layers, mode)

    def build(dtype: torch.dtype, threads: int) -> Contest:
        training = mode == "training"
        ours, other = _layers(cell, I, H, layers, dtype)
        x = torch.randn(T, B, I, dtype=dtype, requires_grad=training)
        g = torch.randn(T, B, H, dtype=dtype) if training else None

        def on_torch(layer: Any) -> Callable[[], Call]:
            return lambda: _call(lambda: layer(x), [x, *layer.parameters()], g)

        others = [Contestant(f"torch.nn.{cell.name}", "torch", on_torch(other))]
        if not training:
            others += _onnx(lambda: peers.onnx_model(cell, other, T, B), [x, *_zeros(cell, x, B, H)], threads)
        others.append(Contestant("JAX lax.scan", "jax", lambda: peers.jax_scan(cell, other, x, g)))
        if B > 1:
            others.append(_limit(FMA_PEAK, lambda: limits.multiply_add(work, threads)))
        else:
            # A step does two operations with each number of U: what takes the time is to fetch them.
            others.append(_limit(READ_U, lambda: limits.read(cell.gates * H * H, T, threads)))
        own = Contestant(f"llm_ext.{cell.name}", OURS, on_torch(ours))
        return Contest(
            _recurrent_truth(cell, other, x, g), own, [entry for entry in others if entry.library in against]
        )

    sizes = _sizes(B=B, T=T, I=I, H=H) + (f"-L{layers}" if layers > 1 else "")
    name = f"{group}/{kind or _kind(cell, mode)}/{sizes}"
    return Case(name, build, mode == "training", work, "GFLOP", _bars(bars or {}))


def odd(cell: Cell, mode: str, B: int, T: int, I: int, H: int) -> Case:  # noqa: E741
    """Sizes that fill neither vectors nor tiles."""
    return recurrence(cell, mode, B, T, I, H, kind=_kind(cell, "odd", mode))


def stacked(cell: Cell, B: int, T: int, H: int, bars: Mapping[str, float | None]) -> Case:
    """Two layers with steps too small to be shared by threads."""
    kind = _kind(cell, "stacked", "inference")
    return recurrence(cell, "inference", B, T, H, H, layers=2, bars=bars, kind=kind, against=("torch", "jax"))


FMA_PEAK, READ_U, COPY = "FMA peak", "U read", "copy"
SDPA = "SDPA"  # scaled_dot_product_attention with a constant query


def alone(cell: Cell, B: int, T: int, H: int, bar: float | None) -> Case:
    """Next to nothing but the recurrence, as I is 1; `bar` on the fraction of the limit of the machine."""
    bars = {FMA_PEAK if B > 1 else READ_U: bar}
    kind = _kind(cell, "alone", "inference")
    return recurrence(cell, "inference", B, T, 1, H, bars=bars, kind=kind, against=(LIMIT,))


def scaling(cell: Cell, B: int, T: int, H: int) -> Case:
    """A point of the curves of time against B, H and T."""
    kind = f"{cell.name.lower()}-inference"
    return recurrence(cell, "inference", B, T, H, H, group="scaling", kind=kind, against=("torch",))


def _limit(name: str, build: Callable[[], Call]) -> Contestant:
    return Contestant(name, LIMIT, build, truth=[torch.ones(())])


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


def half(cell: Cell, mode: str, B: int, T: int, I: int, H: int, bar: float | None = None) -> Case:  # noqa: E741
    """In bfloat16, against our own layer in float32, on which `bar` is; small ones also against torch's in bfloat16.

    A large one takes torch seconds where the machine has no arithmetic for bfloat16.
    """
    own_name = f"llm_ext.{cell.name}, float32"

    def build(dtype: torch.dtype, threads: int) -> Contest:
        training = mode == "training"
        ours, other = _layers(cell, I, H, 1, dtype)
        wide = copy.deepcopy(ours).float()
        x = torch.randn(T, B, I, dtype=dtype, requires_grad=training)
        g = torch.randn(T, B, H, dtype=dtype) if training else None

        def on_torch(layer: Any, x: Tensor, g: Tensor | None) -> Callable[[], Call]:
            return lambda: _call(lambda: layer(x), [x, *layer.parameters()], g)

        wide_x, wide_g = x.detach().float().requires_grad_(training), None if g is None else g.float()
        others = [Contestant(own_name, OURS, on_torch(wide, wide_x, wide_g))]
        if B == 1:
            others.append(Contestant(f"torch.nn.{cell.name}", "torch", on_torch(other, x, g)))
        own = Contestant(f"llm_ext.{cell.name}", OURS, on_torch(ours, x, g))
        return Contest(_recurrent_truth(cell, other, x, g), own, others)

    name = f"recurrence/{_kind(cell, 'bfloat16', mode)}/{_sizes(B=B, T=T, I=I, H=H)}"
    work = _gflop(cell, T * B, I, H, 1, mode)
    return Case(name, build, mode == "training", work, "GFLOP", _bars({own_name: bar}), dtype=torch.bfloat16)


def packed(cell: Cell, mode: str, B: int, T: int, I: int, H: int) -> Case:  # noqa: E741
    """Lengths T/4 to T as a PackedSequence; the ONNX libraries get them padded, with their lengths.

    Our own layer takes part without packing, too: given the same tokens, padded to T, and given as many tokens in
    sequences of one length. The latter must not be quicker.
    """
    lengths = torch.linspace(T, T // 4, B).round().long()
    tokens = int(lengths.sum())

    def build(dtype: torch.dtype, threads: int) -> Contest:
        training = mode == "training"
        ours, other = _layers(cell, I, H, 1, dtype)
        padded = torch.randn(T, B, I, dtype=dtype)
        packing = pack_padded_sequence(padded, lengths)
        x = packing.data.requires_grad_(training)
        packing = PackedSequence(x, packing.batch_sizes)
        g = torch.randn(len(x), H, dtype=dtype) if training else None
        zeros = _zeros(cell, padded, B, H)

        def on_torch(layer: Any) -> Callable[[], Call]:
            def forward() -> tuple[Tensor, Any]:
                y, after = layer(packing)
                return y.data, after

            return lambda: _call(forward, [x, *layer.parameters()], g)

        def unpadded(result: Any) -> list[Tensor]:
            y, *after = tensors(result)
            return [pack_padded_sequence(y, lengths).data, *after]

        def unpacked(what: str, x: Tensor) -> Contestant:
            x.requires_grad_(training)
            g = torch.randn(*x.shape[:2], H, dtype=dtype) if training else None
            call = _call(lambda: ours(x), [x, *ours.parameters()], g)
            truth = _recurrent_truth(cell, other, x, g)
            return Contestant(f"llm_ext.{cell.name}, {what}", OURS, lambda: call, truth=truth)

        others = [Contestant(f"torch.nn.{cell.name}", "torch", on_torch(other))]
        if not training:
            model = functools.partial(peers.onnx_model, cell, other, T, B, lengths.tolist())
            others += _onnx(model, [padded, *zeros], threads, unpadded)
        others.append(unpacked("padded", padded))
        others.append(unpacked(AS_MANY, torch.randn(round(tokens / B), B, I, dtype=dtype)))
        truth = _recurrent_truth(cell, other, x, g, zeros, packing.batch_sizes)
        return Contest(truth, Contestant(f"llm_ext.{cell.name}", OURS, on_torch(ours)), others)

    work = _gflop(cell, tokens, I, H, 1, mode)
    bars = {f"llm_ext.{cell.name}, {AS_MANY}": 1.0}
    name = f"recurrence/{_kind(cell, 'packed', mode)}/{_sizes(B=B, T=T, I=I, H=H)}"
    return Case(name, build, mode == "training", work, "GFLOP", bars)


AS_MANY = "as many tokens"


def step(cell: Cell, H: int, bars: Bars = (None, None)) -> Case:
    """One time step from Python, as in generation, on one thread; without JAX, whose pool keeps its size.

    `bars` against the layer of torch and its cell.
    """
    names = f"torch.nn.{cell.name}", f"torch.nn.{cell.name}Cell"

    def build(dtype: torch.dtype, threads: int) -> Contest:
        ours, other = _layers(cell, H, H, 1, dtype)
        x, state = torch.randn(1, 1, H, dtype=dtype), [torch.randn(1, 1, H, dtype=dtype) for _ in cell.state]
        hx = cell.hx(state)
        row, row_hx = x[0], cell.hx([part[0] for part in state])

        def single(module: Any) -> Callable[[], Call]:
            def prepare() -> Call:
                one = getattr(module, f"{cell.name}Cell")(H, H, dtype=dtype)
                one.load_state_dict({key.removesuffix("_l0"): value for key, value in other.state_dict().items()})
                return lambda: one(row, row_hx)

            return prepare

        def single_outputs(result: Any) -> list[Tensor]:
            h, *rest = tensors(result)
            return [h, h, *rest]

        others = [
            Contestant(names[0], "torch", lambda: lambda: other(x, hx)),
            Contestant(names[1], "torch", single(torch.nn), single_outputs),
            *_onnx(lambda: peers.onnx_model(cell, other, 1, 1), [x, *state], threads),
            Contestant(f"llm_ext.{cell.name}Cell", OURS, single(llm_ext), single_outputs),
        ]
        own = Contestant(f"llm_ext.{cell.name}", OURS, lambda: lambda: ours(x, hx))
        return Contest(_recurrent_truth(cell, other, x, None, state), own, others)

    name = f"step/{_kind(cell, 'inference')}/{_sizes(B=1, T=1, I=H, H=H)}"
    return Case(name, build, False, 1e-3, "k step", _bars(dict(zip(names, bars, strict=True))), threads=1)


def linear(mode: str, N: int, I: int, O: int) -> Case:  # noqa: E741
    """An affine map of N rows; in training with its three gradients."""
    training = mode == "training"
    work = 2 * N * I * O * (3 if training else 1) / 1e9

    def build(dtype: torch.dtype, threads: int) -> Contest:
        other = torch.nn.Linear(I, O, dtype=dtype)
        ours = llm_ext.Linear(I, O, dtype=dtype)
        ours.load_state_dict(other.state_dict())
        x = torch.randn(N, I, dtype=dtype, requires_grad=training)
        g = torch.randn(N, O, dtype=dtype) if training else None
        exact = [_double(tensor) for tensor in (x, other.weight, other.bias)]
        with torch.set_grad_enabled(training):
            truth = _call(lambda: (F.linear(*exact),), exact, None if g is None else g.double())()

        def call(layer: torch.nn.Linear) -> Callable[[], Call]:
            return lambda: _call(lambda: (layer(x),), [x, layer.weight, layer.bias], g)

        return Contest(
            tensors(truth),
            Contestant("llm_ext.Linear", OURS, call(ours)),
            [
                Contestant("torch.nn.Linear", "torch", call(other)),
                _limit(FMA_PEAK, lambda: limits.multiply_add(work, threads)),
            ],
        )

    return Case(f"linear/{mode}/{_sizes(N=N, I=I, O=O)}", build, training, work, "GFLOP")


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
    formulas = {"as written": plain.pool_as_written, "folded": plain.pool_folded, SDPA: plain.pool_sdpa}

    def build(dtype: torch.dtype, threads: int) -> Contest:
        e = torch.randn(B, T, D, dtype=dtype, requires_grad=mode == "training")
        return _pool_contest(mode, e, False, formulas, "folded")

    # Memory that must move: e is read; in training it is read again, and its gradient written.
    work = B * T * D * 4 * (3 if mode == "training" else 1) / 1e9
    limits = _bars({f"torch, {name}": bar for name, bar in zip(formulas, bars, strict=False)})
    return Case(f"pooling/{mode}/{_sizes(B=B, T=T, D=D)}", build, mode == "training", work, "GB", limits, memory=True)


def prefix(mode: str, B: int, T: int, D: int, bars: Bars = (None, None)) -> Case:
    """Causal prefix pooling; `bars` against the form by cumulative sums and the T × T mask."""
    formulas = {"cumsum": plain.prefix_cumsum, "T×T mask": plain.prefix_mask, SDPA: plain.prefix_sdpa}

    def build(dtype: torch.dtype, threads: int) -> Contest:
        e = torch.randn(B, T, D, dtype=dtype, requires_grad=mode == "training")
        return _pool_contest(mode, e, True, formulas, "cumsum")

    # e is read and c written; in training e and the gradient of c are read and the gradient of e is written.
    work = B * T * D * 4 * (5 if mode == "training" else 2) / 1e9
    limits = _bars({f"torch, {name}": bar for name, bar in zip(formulas, bars, strict=False)})
    return Case(f"prefix/{mode}/{_sizes(B=B, T=T, D=D)}", build, mode == "training", work, "GB", limits, memory=True)


def streaming(
    group: str, way: str, B: int, T: int, D: int, bar: float | None = None, dtype: torch.dtype | None = None
) -> Case:
    """Pooling or prefix pooling of what no cache holds, "forward" or "backward" alone.

    `bar` is on the fraction of the bandwidth of copying: of the time a copy takes that moves as many bytes.
    """
    prefix, training = group == "prefix", way == "backward"
    # What must move, each number once: e read, and c written if there is one a position; backward, e and its gradient,
    # and the gradient of such c.
    arrays = (3 if training else 2) if prefix else (2 if training else 1)
    work = B * T * D * 4 * arrays / 1e9
    op, truth = (ops.prefix_pool, _prefix_by_pieces) if prefix else (ops.attention_pool, reference.attention_pool)

    def build(dtype: torch.dtype, threads: int) -> Contest:
        e = torch.randn(B, T, D, dtype=dtype, requires_grad=training)
        u = (torch.randn(D) * D**-0.5).to(dtype).requires_grad_(training)
        g = torch.randn(e.shape if prefix else (B, D), dtype=dtype) if training else None

        def call(pool: Callable[..., Any], inputs: list[Tensor], g: Tensor | None) -> Call:
            if g is None:
                return lambda: pool(*inputs)[0]
            c = pool(*inputs)[0]
            return lambda: torch.autograd.grad(c, inputs, g, retain_graph=True)

        exact = [_double(e), _double(u)]
        with torch.set_grad_enabled(training):
            true = tensors(call(truth, exact, None if g is None else g.double())())
        own = Contestant(f"llm_ext.{op.__name__}", OURS, lambda: call(op, [e, u], g))
        return Contest(true, own, [_limit(COPY, lambda: limits.copy(work * dtype.itemsize / 4))])

    kind = way if dtype is None else f"{str(dtype).removeprefix('torch.')}-{way}"
    name = f"{group}/{kind}/{_sizes(B=B, T=T, D=D)}"
    return Case(name, build, training, work, "GB", _bars({COPY: bar}), dtype=dtype)


def additive(mode: str, B: int, Tq: int, Tk: int, A: int, bars: Bars = (None, None)) -> Case:
    """Additive attention, projections included, queries and keys of size A; `bars` against torch and torch.compile."""
    names = ("torch, product", "torch.compile, sum")

    def build(dtype: torch.dtype, threads: int) -> Contest:
        training = mode == "training"
        layer = llm_ext.AdditiveAttention(A, A, A, dtype=dtype)
        query, keys = (torch.randn(B, T, A, dtype=dtype, requires_grad=training) for T in (Tq, Tk))
        inputs = [query, keys, *layer.parameters()]
        g = torch.randn(B, Tq, A, dtype=dtype) if training else None

        def exact() -> list[Tensor]:
            query, keys, w_q, w_k, v, bias = doubles = [_double(tensor) for tensor in inputs]
            projected = F.linear(query, w_q), F.linear(keys, w_k, bias)
            context = reference.additive_attention(*projected, v, keys)[:1]
            return tensors(_call(lambda: context, doubles, None if g is None else g.double())())

        def on_torch(formula: Callable[..., Tensor]) -> Callable[[], Call]:
            return lambda: _call(lambda: (formula(*inputs),), inputs, g)

        def on_compile() -> Call:
            return on_torch(torch.compile(plain.additive_sum, fullgraph=True, dynamic=False))()

        with torch.set_grad_enabled(training):
            truth = exact()
        return Contest(
            truth,
            Contestant(
                "llm_ext.AdditiveAttention", "llm_ext", lambda: _call(lambda: layer(query, keys)[:1], inputs, g)
            ),
            [
                Contestant(names[0], "torch", on_torch(plain.additive_product)),
                Contestant(names[1], "compile", on_compile),
            ],
        )

    limits = _bars(dict(zip(names, bars, strict=True)))
    name = f"additive/{mode}/{_sizes(B=B, Tq=Tq, Tk=Tk, A=A)}"
    return Case(name, build, mode == "training", B * Tq * Tk * A / 1e9, "G tanh", limits)


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


def model_generation(B: int, tokens: int, V: int, E: int, H: int, dtype: torch.dtype | None = None) -> Case:
    """Greedy generation from a prompt of one token, checked token by token.

    In 16 bits the best two may be too near to tell; there each must be as good as the best, to the tolerance.

    No token can cost less than to read the weights once, but for those of the embedding, of which it takes a row.
    """
    # In 16 bits the plain model would round the state of attention at each token, and soon be wrong.
    attention = "hidden" if dtype is None else "none"

    def build(dtype: torch.dtype, threads: int) -> Contest:
        ours = llm_ext.LLM(V, E, H, V, 1, 0.0, attention=attention, dtype=dtype).eval()
        other = plain.plain_model(ours)
        prompt = torch.randint(V, (B, 1))
        exact = copy.deepcopy(other).double()

        def regret(ids: Any) -> list[Tensor]:
            with torch.no_grad():
                scores, _ = exact(ids[:, :-1])
            best, worst = scores.amax(-1), scores.amin(-1)
            return [(best - scores.gather(-1, ids[:, 1:, None])[..., 0]) / (best - worst)]

        def generator(model: llm_ext.LLM) -> Callable[[], Call]:
            return lambda: lambda: model.generate(prompt, tokens, temperature=0)

        if dtype.itemsize == 2:
            outputs, truth = regret, [torch.zeros(B, tokens, dtype=torch.float64)]
        else:
            outputs, truth = tensors, tensors(generator(exact)()())
        return Contest(
            truth,
            Contestant("llm_ext.LLM", "llm_ext", generator(ours), outputs),
            [
                Contestant("LLM on torch.nn.RNN", "torch", generator(other), outputs),
                _limit("weights read", lambda: limits.read(weights(ours) * dtype.itemsize // 4, tokens, threads)),
            ],
        )

    def weights(model: llm_ext.LLM) -> int:
        parts = [part for part in (model.rnn, model.pool, model.head) if part is not None]
        return sum(parameter.numel() for part in parts for parameter in part.parameters())

    kind = "generation" if dtype is None else f"{str(dtype).removeprefix('torch.')}-generation"
    name = f"model/{kind}/{_sizes(B=B, T=tokens, V=V, E=E, H=H)}"
    return Case(name, build, False, B * tokens / 1e3, "k token", dtype=dtype)


# Of a recurrent layer: B, T, I, H.
SHAPES = (
    (1, 128, 256, 512),
    (8, 128, 256, 512),
    (32, 128, 256, 512),
    (64, 128, 512, 512),
    (32, 128, 1024, 1024),
    (1, 512, 64, 64),
    (32, 512, 64, 64),
)
# What the project has set itself against torch.nn: inference in the mean, training in each case and in the mean.
GOALS = {"RNN": (4.0, 1.6, 3.5), "GRU": (4.0, 1.6, 3.5), "LSTM": (1.6, 1.05, 1.5)}
# And where it has set itself more.
MORE: Mapping[tuple[Any, ...], float] = {
    ("RNN", "inference", 1, 128, 256, 512): 3,
    ("RNN", "inference", 32, 128, 256, 512): 1.7,
    ("RNN", "inference", 1, 512, 64, 64): 10,
    ("RNN", "training", 1, 512, 64, 64): 8,
    ("RNN", "step", 64): 3,
}
# Whoever comes closest among these, in inference.
EVERYBODY = ("torch.nn.*", "ONNX Runtime", "OpenVINO", "JAX lax.scan")


def _recurrent_cases(cell: Cell) -> Iterator[Case]:
    name = f"torch.nn.{cell.name}"
    _, each, _ = GOALS[cell.name]
    for shape in SHAPES:
        others = dict.fromkeys(EVERYBODY[1:], 1.0)
        bars = {name: MORE.get((cell.name, "inference", *shape), 1.0), **others}
        yield recurrence(cell, "inference", *shape, bars=bars)
    for shape in SHAPES:
        yield recurrence(cell, "training", *shape, bars={name: MORE.get((cell.name, "training", *shape), each)})
    yield recurrence(cell, "training", 32, 128, 256, 512, layers=2, bars={name: each})
    for H in (64, 128):  # layers at once
        yield stacked(cell, 1, 256, H, bars={name: 1.0})
    for mode in ("inference", "training"):
        yield packed(cell, mode, 32, 128, 256, 512)
    for mode in ("inference", "training"):
        for B, H in ((1, 512), (8, 512), (32, 512), (32, 1024)):
            yield half(cell, mode, B, 128, H, H, bar=1.6 if B >= 8 else None)
    for B, H in ((8, 512), (32, 512), (64, 512), (32, 1024)):
        yield alone(cell, B, 128, H, bar=0.85)
    if cell is RNN:
        yield alone(cell, 1, 128, 512, bar=0.8)
    yield odd(cell, "inference", 3, 128, 17, 17)
    yield odd(cell, "inference", 7, 128, 1, 34)
    yield odd(cell, "inference", 33, 128, 65, 65)
    yield odd(cell, "inference", 3, 128, 1, 130)
    yield odd(cell, "inference", 7, 128, 130, 1000)
    yield odd(cell, "training", 33, 128, 1, 65)
    yield odd(cell, "training", 7, 128, 34, 130)
    for H in (64, 256):
        yield step(cell, H, bars=(MORE.get((cell.name, "step", H), 2), 2))


def _scaling_cases(cell: Cell) -> Iterator[Case]:
    """Three curves through one point; on that of H, sizes beside the powers of two."""
    points = [(B, 128, 256) for B in (1, 2, 4, 8, 16, 32, 64, 128)]
    points += [(8, T, 256) for T in (1, 8, 32, 128, 512, 2048)]
    points += [(8, 128, H) for H in (17, 34, 64, 65, 128, 130, 256, 512, 1000, 1024)]
    for point in dict.fromkeys(points):
        yield scaling(cell, *point)


# Points of the curves of time and memory against T.
LENGTHS = (64, 256, 1024, 4096)


def _streaming_cases() -> Iterator[Case]:
    for group in ("pooling", "prefix"):
        for way, bar in (("forward", 0.7), ("backward", 0.6)):
            yield streaming(group, way, 8, 8192, 512, bar)
            yield streaming(group, way, 1, 65536, 512, bar)
            yield streaming(group, way, 8, 16384, 512, dtype=torch.bfloat16)


CASES: tuple[Case, ...] = (
    *(case for cell in CELLS for case in _recurrent_cases(cell)),
    step(RNN, 512),
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
    *(case("training", 4, T, 512) for case in (pooling, prefix) for T in LENGTHS),
    *_streaming_cases(),
    additive("inference", 32, 1, 64, 512),
    additive("inference", 32, 32, 32, 512, bars=(5, 2)),
    additive("inference", 16, 64, 64, 512, bars=(8, 2)),
    additive("inference", 1280, 1, 66, 1024),
    additive("inference", 128, 10, 128, 1024),
    additive("training", 32, 1, 64, 512),
    additive("training", 32, 32, 32, 512, bars=(5, 2)),
    additive("training", 16, 64, 64, 512, bars=(6, 2)),
    *(linear(mode, N, 512, 512) for mode in ("inference", "training") for N in (1, 8, 32, 33, 128, 1024)),
    *(linear(mode, N, 256, 4096) for mode in ("inference", "training") for N in (1, 32, 1024)),
    linear("inference", 4096, 64, 64),
    linear("training", 4096, 64, 64),
    model_training(32, 64, 65, 128, 512),
    model_generation(1, 128, 65, 128, 512),
    model_generation(1, 128, 65, 128, 2048),
    model_generation(1, 128, 65, 128, 512, torch.bfloat16),
    model_generation(1, 128, 65, 128, 2048, torch.bfloat16),
    *translation.CASES,
    *(case for cell in CELLS for case in _scaling_cases(cell)),
)


def _means() -> Iterator[Mean]:
    def of(mode: str, *cells: Cell) -> tuple[str, ...]:
        return tuple(f"recurrence/{_kind(cell, mode)}/*" for cell in cells)

    yield Mean(of("inference", *CELLS), EVERYBODY, bar=1.3)
    for cell in CELLS:
        yield Mean(of("inference", cell), EVERYBODY)
    for i, mode in ((0, "inference"), (2, "training")):
        for cell in CELLS:
            yield Mean(of(mode, cell), (f"torch.nn.{cell.name}",), bar=GOALS[cell.name][i])


MEANS: tuple[Mean, ...] = tuple(_means())
