"""Recurrent layers on the CPU: whole sequences, packed sequences, single steps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import llm_ext
from bench import limits, peers
from bench.cases.building import FMA_PEAK, READ_U, double, given_targets, limit, size_name, timed_call
from bench.cells import RNN, Cell
from bench.comparison import LIMIT, OURS, Candidate, Case, Comparison, tensors
from bench.timing import Call
from llm_ext import reference

__all__ = [
    "bfloat16",
    "gflop",
    "input_free",
    "kind_name",
    "layer_call",
    "make_layers",
    "multilayer",
    "odd_sizes",
    "packed",
    "reference_outputs",
    "resets",
    "scaling",
    "sequence",
    "single_step",
]

Targets = Mapping[str, float | None]

_PEERS = ("torch", "onnxruntime", "openvino", "jax")


def kind_name(cell: Cell, *words: str) -> str:
    """Return the kind of a case, such as "gru-odd-training". Names without a cell are those of Elman."""
    return "-".join(words if cell is RNN else (cell.name.lower(), *words))


def gflop(
    cell: Cell,
    rows: int,
    I: int,  # noqa: E741
    H: int,
    layers: int = 1,
    *,
    bidirectional: bool = False,
    training: bool = False,
) -> float:
    """Return the GFLOP of all matrix products; the backward pass has twice those of the forward pass."""
    directions = 1 + bidirectional
    inputs = [I, *[directions * H] * (layers - 1)]
    forward = 2 * rows * directions * cell.gates * H * sum(size + H for size in inputs)
    return forward * (3 if training else 1) / 1e9


def make_layers(
    cell: Cell,
    I: int,  # noqa: E741
    H: int,
    layers: int = 1,
    *,
    dtype: torch.dtype,
    bidirectional: bool = False,
    device: str = "cpu",
) -> tuple[Any, Any]:
    """Return the layer of llm_ext and the layer of torch.nn with the same weights."""
    options = {"bidirectional": bidirectional, "dtype": dtype, "device": device}
    ours = cell.our_layer(I, H, layers, **options)
    other = cell.torch_layer(I, H, layers, **options)
    other.load_state_dict(ours.state_dict())
    return ours, other


def layer_call(layer: Any, x: Tensor, g: Tensor | None) -> Callable[[], Call]:
    """Return a builder of the call of a layer; in training with the gradients of x and the weights."""
    return lambda: timed_call(lambda: layer(x), [x, *layer.parameters()], g)


def reference_outputs(
    layer: Any,
    x: Tensor,
    g: Tensor | None,
    state: Sequence[Tensor] | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> list[Tensor]:
    """Return the outputs of `layer_call` by the float64 reference."""
    x, weights = double(x), [double(parameter) for parameter in layer.parameters()]
    groups = [weights[i : i + 4] for i in range(0, len(weights), 4)]
    initial = None if state is None else tuple(tensor.double() for tensor in state)

    def forward() -> tuple[Tensor, ...]:
        y, last = reference.multilayer_rnn(
            layer.mode,
            x,
            initial,
            groups,
            bidirectional=layer.bidirectional,
            batch_sizes=batch_sizes,
            lengths=lengths,
            reset=reset,
        )
        return y, *last

    with torch.set_grad_enabled(g is not None):
        return tensors(timed_call(forward, [x, *weights], None if g is None else g.double())())


def _zero_state(cell: Cell, like: Tensor, B: int, H: int) -> list[Tensor]:
    return [like.new_zeros(1, B, H) for _ in cell.state]


def _onnx_candidates(
    model: Callable[[], bytes],
    feed: list[Tensor],
    threads: int,
    outputs: Callable[[Any], list[Tensor]] = tensors,
) -> list[Candidate]:
    """The libraries that run an ONNX model."""

    def build_with(library: Callable[[bytes, list[Tensor], int], Call]) -> Callable[[], Call]:
        return lambda: library(model(), feed, threads)

    return [
        Candidate("ONNX Runtime", "onnxruntime", build_with(peers.onnxruntime_call), outputs),
        Candidate("OpenVINO", "openvino", build_with(peers.openvino_call), outputs),
    ]


def sequence(
    cell: Cell,
    phase: str,
    B: int,
    T: int,
    I: int,  # noqa: E741
    H: int,
    layers: int = 1,
    targets: Targets | None = None,
    *,
    group: str = "recurrence",
    kind: str | None = None,
    libraries: Sequence[str] = _PEERS,
) -> Case:
    """A whole sequence through a layer; training computes the gradients of input and weights as well.

    `libraries` selects the candidates; `LIMIT` is the limit of the machine.
    """
    training = phase == "training"
    work = gflop(cell, T * B, I, H, layers, training=training)

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours, other = make_layers(cell, I, H, layers, dtype=dtype)
        x = torch.randn(T, B, I, dtype=dtype, requires_grad=training)
        g = torch.randn(T, B, H, dtype=dtype) if training else None
        others = [Candidate(f"torch.nn.{cell.name}", "torch", layer_call(other, x, g))]
        if not training:
            model = functools.partial(peers.onnx_model, cell, other, T, B)
            others += _onnx_candidates(model, [x, *_zero_state(cell, x, B, H)], threads)
        others.append(Candidate("JAX lax.scan", "jax", lambda: peers.jax_scan(cell, other, x, g)))
        if B > 1:
            others.append(limit(FMA_PEAK, lambda: limits.multiply_add(work, threads)))
        else:
            # A step does two operations with each element of U, so that reading U takes the time.
            others.append(limit(READ_U, lambda: limits.read(cell.gates * H * H, T, threads)))
        return Comparison(
            reference_outputs(other, x, g),
            Candidate(f"llm_ext.{cell.name}", OURS, layer_call(ours, x, g)),
            [candidate for candidate in others if candidate.library in libraries],
        )

    sizes = size_name(B=B, T=T, I=I, H=H) + (f"-L{layers}" if layers > 1 else "")
    name = f"{group}/{kind or kind_name(cell, phase)}/{sizes}"
    return Case(name, build, training, work, "GFLOP", given_targets(targets or {}))


def odd_sizes(cell: Cell, phase: str, B: int, T: int, I: int, H: int) -> Case:  # noqa: E741
    """Sizes that fill neither vectors nor tiles."""
    return sequence(cell, phase, B, T, I, H, kind=kind_name(cell, "odd", phase))


def multilayer(cell: Cell, B: int, T: int, H: int, targets: Targets) -> Case:
    """Two layers with steps too small to be split among threads."""
    kind = kind_name(cell, "multilayer", "inference")
    return sequence(cell, "inference", B, T, H, H, layers=2, targets=targets, kind=kind, libraries=("torch", "jax"))


def input_free(cell: Cell, B: int, T: int, H: int, target: float | None) -> Case:
    """The recurrence alone: one input feature; `target` is the fraction of the limit of the machine to reach."""
    targets = {FMA_PEAK if B > 1 else READ_U: target}
    kind = kind_name(cell, "alone", "inference")
    return sequence(cell, "inference", B, T, 1, H, targets=targets, kind=kind, libraries=(LIMIT,))


def scaling(cell: Cell, B: int, T: int, H: int) -> Case:
    """A point of the curves of time against B, H and T."""
    kind = f"{cell.name.lower()}-inference"
    return sequence(cell, "inference", B, T, H, H, group="scaling", kind=kind, libraries=("torch",))


def bfloat16(
    cell: Cell,
    phase: str,
    B: int,
    T: int,
    I: int,  # noqa: E741
    H: int,
    target: float | None = None,
) -> Case:
    """bfloat16 against llm_ext in float32, to which `target` applies; if B = 1 also against torch in bfloat16.

    Larger cases take torch seconds on machines without bfloat16 arithmetic.
    """
    training = phase == "training"
    float32_name = f"llm_ext.{cell.name}, float32"

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours, other = make_layers(cell, I, H, dtype=dtype)
        float32_layer = copy.deepcopy(ours).float()
        x = torch.randn(T, B, I, dtype=dtype, requires_grad=training)
        g = torch.randn(T, B, H, dtype=dtype) if training else None
        float32_x = x.detach().float().requires_grad_(training)
        float32_g = None if g is None else g.float()
        others = [Candidate(float32_name, OURS, layer_call(float32_layer, float32_x, float32_g))]
        if B == 1:
            others.append(Candidate(f"torch.nn.{cell.name}", "torch", layer_call(other, x, g)))
        own = Candidate(f"llm_ext.{cell.name}", OURS, layer_call(ours, x, g))
        return Comparison(reference_outputs(other, x, g), own, others)

    name = f"recurrence/{kind_name(cell, 'bfloat16', phase)}/{size_name(B=B, T=T, I=I, H=H)}"
    work = gflop(cell, T * B, I, H, training=training)
    targets = given_targets({float32_name: target})
    return Case(name, build, training, work, "GFLOP", targets, dtype=torch.bfloat16)


def packed(cell: Cell, phase: str, B: int, T: int, I: int, H: int) -> Case:  # noqa: E741
    """Lengths T/4 to T as a PackedSequence; the ONNX libraries get padded input and the lengths.

    The layer of llm_ext is also a candidate without packing: on the same tokens padded to T, and on the same number of
    tokens in sequences of one length. The latter must not be faster.
    """
    training = phase == "training"
    lengths = torch.linspace(T, T // 4, B).round().long()
    tokens = int(lengths.sum())
    same_number = f"llm_ext.{cell.name}, same number of tokens"

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours, other = make_layers(cell, I, H, dtype=dtype)
        padded = torch.randn(T, B, I, dtype=dtype)
        packed_input = pack_padded_sequence(padded, lengths)
        x = packed_input.data.requires_grad_(training)
        packed_input = PackedSequence(x, packed_input.batch_sizes)
        g = torch.randn(len(x), H, dtype=dtype) if training else None
        zeros = _zero_state(cell, padded, B, H)

        def packed_call(layer: Any) -> Callable[[], Call]:
            def forward() -> tuple[Tensor, Any]:
                y, last = layer(packed_input)
                return y.data, last

            return lambda: timed_call(forward, [x, *layer.parameters()], g)

        def pack_output(result: Any) -> list[Tensor]:
            y, *last = tensors(result)
            return [pack_padded_sequence(y, lengths).data, *last]

        def unpacked(name: str, x: Tensor) -> Candidate:
            x.requires_grad_(training)
            g = torch.randn(*x.shape[:2], H, dtype=dtype) if training else None
            return Candidate(name, OURS, layer_call(ours, x, g), reference=reference_outputs(other, x, g))

        others = [Candidate(f"torch.nn.{cell.name}", "torch", packed_call(other))]
        if not training:
            model = functools.partial(peers.onnx_model, cell, other, T, B, lengths.tolist())
            others += _onnx_candidates(model, [padded, *zeros], threads, pack_output)
        others.append(unpacked(f"llm_ext.{cell.name}, padded", padded))
        others.append(unpacked(same_number, torch.randn(round(tokens / B), B, I, dtype=dtype)))
        return Comparison(
            reference_outputs(other, x, g, zeros, batch_sizes=packed_input.batch_sizes),
            Candidate(f"llm_ext.{cell.name}", OURS, packed_call(ours)),
            others,
        )

    work = gflop(cell, tokens, I, H, training=training)
    name = f"recurrence/{kind_name(cell, 'packed', phase)}/{size_name(B=B, T=T, I=I, H=H)}"
    return Case(name, build, training, work, "GFLOP", {same_number: 1.0})


def resets(cell: Cell, phase: str, B: int, T: int, H: int, share: float = 0.03) -> Case:
    """Episodes inside a sequence: the state is reset before this share of the steps.

    Without resets in a call, torch takes a loop over the steps. The layer of llm_ext without resets is a candidate, to
    which the cost of resets is compared.
    """
    training = phase == "training"
    without = f"llm_ext.{cell.name}, no resets"

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours, other = make_layers(cell, H, H, dtype=dtype)
        x = torch.randn(T, B, H, dtype=dtype, requires_grad=training)
        g = torch.randn(T, B, H, dtype=dtype) if training else None
        reset = torch.rand(T, B) < share

        def loop() -> tuple[Tensor, ...]:
            state, outputs = tuple(_zero_state(cell, x, B, H)), []
            for step, mask in zip(x.unsqueeze(1), ~reset.unsqueeze(-1), strict=True):
                kept = tuple(tensor * mask for tensor in state)
                y, after = other(step, kept if len(kept) > 1 else kept[0])
                state = after if isinstance(after, tuple) else (after,)
                outputs.append(y)
            return torch.cat(outputs), *state

        def call(layer: Any) -> Callable[[], Call]:
            return lambda: timed_call(lambda: layer(x, reset=reset), [x, *layer.parameters()], g)

        return Comparison(
            reference_outputs(other, x, g, reset=reset),
            Candidate(f"llm_ext.{cell.name}", OURS, call(ours)),
            [
                Candidate(
                    f"torch.nn.{cell.name}, step by step",
                    "torch",
                    lambda: timed_call(loop, [x, *other.parameters()], g),
                ),
                Candidate(without, OURS, layer_call(ours, x, g), reference=reference_outputs(other, x, g)),
            ],
        )

    work = gflop(cell, T * B, H, H, training=training)
    name = f"recurrence/{kind_name(cell, 'resets', phase)}/{size_name(B=B, T=T, I=H, H=H)}"
    return Case(name, build, training, work, "GFLOP", {without: 1 / 1.1})


def single_step(cell: Cell, H: int, targets: tuple[float | None, float | None] = (None, None)) -> Case:
    """One time step from Python, as in generation, on one thread.

    `targets` apply to torch's layer and cell. JAX is no candidate, because its thread pool cannot be resized.
    """
    names = f"torch.nn.{cell.name}", f"torch.nn.{cell.name}Cell"

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours, other = make_layers(cell, H, H, dtype=dtype)
        x, state = torch.randn(1, 1, H, dtype=dtype), [torch.randn(1, 1, H, dtype=dtype) for _ in cell.state]

        def hx(state: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
            return state[0] if len(state) == 1 else tuple(state)

        layer_hx, cell_x, cell_hx = hx(state), x[0], hx([tensor[0] for tensor in state])

        def cell_call(module: Any) -> Callable[[], Call]:
            def prepare() -> Call:
                one = getattr(module, f"{cell.name}Cell")(H, H, dtype=dtype)
                one.load_state_dict({key.removesuffix("_l0"): value for key, value in other.state_dict().items()})
                return lambda: one(cell_x, cell_hx)

            return prepare

        def cell_outputs(result: Any) -> list[Tensor]:
            h, *rest = tensors(result)
            return [h, h, *rest]

        return Comparison(
            reference_outputs(other, x, None, state),
            Candidate(f"llm_ext.{cell.name}", OURS, lambda: lambda: ours(x, layer_hx)),
            [
                Candidate(names[0], "torch", lambda: lambda: other(x, layer_hx)),
                Candidate(names[1], "torch", cell_call(torch.nn), cell_outputs),
                *_onnx_candidates(lambda: peers.onnx_model(cell, other, 1, 1), [x, *state], threads),
                Candidate(f"llm_ext.{cell.name}Cell", OURS, cell_call(llm_ext), cell_outputs),
            ],
        )

    name = f"step/{kind_name(cell, 'inference')}/{size_name(B=1, T=1, I=H, H=H)}"
    by_name = given_targets(dict(zip(names, targets, strict=True)))
    return Case(name, build, False, 1e-3, "k step", by_name, threads=1)
