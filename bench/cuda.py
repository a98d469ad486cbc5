"""What is measured on a GPU (`--device cuda`); sizes are in the letters of docs/design.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from bench import peers
from bench.cases import _bars, _call, _double, _kind, _sizes
from bench.cells import CELLS, GRU, LSTM, RNN, Cell
from bench.contest import OURS, Case, Contest, Contestant, Mean, tensors
from bench.timing import Call
from llm_ext import reference

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {FP32: "float32", BF16: "bfloat16", FP16: "float16"}
# Input features of the cases that are next to nothing but the recurrence; cuDNN wants 8 for its quicker ways.
NO_INPUT = 8


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
