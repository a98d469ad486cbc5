"""Recurrent layers with weights of 8 and 16 bits against int8 of other libraries and against more bits of llm_ext."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import llm_ext
from bench import limits, peers
from bench.cases.building import given_targets, limit, size_name
from bench.cases.recurrence import gflop, kind_name, make_layers, reference_outputs
from bench.cells import LSTM, Cell
from bench.comparison import OURS, Candidate, Case, Comparison
from bench.timing import Call
from llm_ext import reference
from llm_ext.reference.quantization import QuantizedWeight, quantize_weight

__all__ = ["quantized"]

# Errors that the rounding of weights and states to 8 bits may cause, relative to the largest result.
_ROUNDED = 5e-2
# Errors against the reference in float64, which rounds some states to the next of their 127 values; and of bfloat16
# weights, with which some ISAs round states to bfloat16.
_NEXT = 1e-2


def _quantized_layer(layer: Any, weights: Any) -> Any:
    layer = copy.deepcopy(layer)
    llm_ext.quantize_(layer, weights)
    return layer


def _int8_outputs(layer: Any, x: Tensor, state: list[Tensor]) -> list[Tensor]:
    """Return the results of `layer` with int8 weights by the float64 reference."""

    def rounded(w: Tensor) -> Any:
        values, scale = quantize_weight(w.detach())
        return QuantizedWeight(values, scale.double())

    weights = [[rounded(w) if w.dim() > 1 else w.detach().double() for w in layer.parameters()]]
    y, last = reference.multilayer_rnn(layer.mode, x.double(), tuple(tensor.double() for tensor in state), weights)
    return [y, *last]


def _torch_int8(layer: Any, x: Tensor, hx: Any) -> Callable[[], Call]:
    def build() -> Call:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
            model = torch.nn.Sequential(layer)  # only the children of a model are replaced
            quantize_dynamic: Any = torch.ao.quantization.quantize_dynamic
            other = quantize_dynamic(model, {type(layer)}, dtype=torch.qint8)[0]
        return lambda: other(x, hx)

    return build


def _limit(cell: Cell, B: int, T: int, I: int, H: int, threads: int) -> Candidate:  # noqa: E741
    """Return the limit of a recurrence with int8 weights.

    The products with inputs have two multiply-adds where float32 has one, those with states two, or four with VNNI. For
    one sequence reading U in each step takes longer than its products; in a single step, reading W does, too.
    """
    of_inputs, of_states = (cell.gates * H * size for size in (I, H))
    if T == 1:
        return limit("reading W and U in int8", lambda: limits.read((of_inputs + of_states) // 4, 1, threads))

    def build() -> Call:
        gflop = 2e-9 * T * B
        first = limits.multiply_add(gflop * of_inputs / 2, threads)
        if B == 1:
            then = limits.read(of_states // 4, T, threads)
        else:
            then = limits.multiply_add(gflop * of_states / (4 if limits.has_vnni() else 2), threads)
        return lambda: min(first(), then())

    return limit("products, reading U in int8" if B == 1 else "products", build)


def quantized(
    cell: Cell,
    B: int,
    T: int,
    I: int,  # noqa: E741
    H: int,
    targets: Mapping[str, float | None],
) -> Case:
    """Inference with int8 weights; `targets` by "float32", "bfloat16", "torch" for the candidates of these names."""
    name = f"llm_ext.{cell.name}"
    work = gflop(cell, T * B, I, H)
    names = {
        "float32": f"{name}, float32",
        "bfloat16": f"{name}, bfloat16",
        "weights": f"{name}, bfloat16 weights",
        "torch": f"torch.nn.{cell.name}, int8",
        "frozen": f"torch.nn.{cell.name}, AOTInductor",
    }

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours, other = make_layers(cell, I, H, dtype=dtype)
        x, state = torch.randn(T, B, I, dtype=dtype), [torch.randn(1, B, H, dtype=dtype) for _ in cell.state]

        def as_argument(state: list[Tensor]) -> Any:
            return state[0] if len(state) == 1 else tuple(state)

        hx, narrow_hx = as_argument(state), as_argument([tensor.bfloat16() for tensor in state])
        narrow, narrow_x = copy.deepcopy(ours).bfloat16(), x.bfloat16()
        int8, bfloat16 = (_quantized_layer(ours, weights) for weights in ("int8", "bfloat16"))
        rounded = reference_outputs(llm_ext.dequantize_(copy.deepcopy(bfloat16)), x, None, state)
        others = [
            Candidate(names["float32"], OURS, lambda: lambda: ours(x, hx)),
            Candidate(names["bfloat16"], OURS, lambda: lambda: narrow(narrow_x, narrow_hx), tolerance=_ROUNDED),
            Candidate(names["weights"], OURS, lambda: lambda: bfloat16(x, hx), reference=rounded, tolerance=_NEXT),
            Candidate(names["torch"], "torch", _torch_int8(other, x, hx), tolerance=_ROUNDED),
        ]
        if cell is LSTM:
            # Inductor unrolls the steps of a GRU, compiles them for a minute, and is slower than eager.
            others.append(Candidate(names["frozen"], "compile", lambda: peers.aot_inductor_call(other, x, hx)))
            # ONNX Runtime has no GRU in int8.
            others.append(
                Candidate(
                    "ONNX Runtime, int8",
                    "onnxruntime",
                    lambda: peers.onnxruntime_call(
                        peers.quantized_onnx_model(peers.onnx_model(cell, other, T, B)), [x, *state], threads
                    ),
                    tolerance=_ROUNDED,
                )
            )
        others.append(_limit(cell, B, T, I, H, threads))
        expected = _int8_outputs(other, x, state)
        own = Candidate(name, OURS, lambda: lambda: int8(x, hx), reference=expected, tolerance=_NEXT)
        return Comparison(reference_outputs(other, x, None, state), own, others)

    by_name = given_targets({names[key]: target for key, target in targets.items()})
    sizes = size_name(B=B, T=T, I=I, H=H)
    return Case(f"quantized/{kind_name(cell, 'inference')}/{sizes}", build, False, work, "GFLOP", by_name)
