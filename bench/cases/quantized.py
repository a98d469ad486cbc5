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
from bench.cases.building import FMA_PEAK, READ_U, given_targets, limit, size_name
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


def _int8_outputs(layer: Any, x: Tensor) -> list[Tensor]:
    """Return the results of `layer` with int8 weights by the float64 reference."""

    def rounded(w: Tensor) -> Any:
        values, scale = quantize_weight(w.detach())
        return QuantizedWeight(values, scale.double())

    weights = [[rounded(w) if w.dim() > 1 else w.detach().double() for w in layer.parameters()]]
    y, last = reference.multilayer_rnn(layer.mode, x.double(), None, weights)
    return [y, *last]


def _torch_int8(layer: Any, x: Tensor) -> Callable[[], Call]:
    def build() -> Call:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
            model = torch.nn.Sequential(layer)  # only the children of a model are replaced
            quantize_dynamic: Any = torch.ao.quantization.quantize_dynamic
            other = quantize_dynamic(model, {type(layer)}, dtype=torch.qint8)
        return lambda: other(x)

    return build


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
        x = torch.randn(T, B, I, dtype=dtype)
        narrow, narrow_x = copy.deepcopy(ours).bfloat16(), x.bfloat16()
        int8, bfloat16 = (_quantized_layer(ours, weights) for weights in ("int8", "bfloat16"))
        rounded = reference_outputs(llm_ext.dequantize_(copy.deepcopy(bfloat16)), x, None)
        others = [
            Candidate(names["float32"], OURS, lambda: lambda: ours(x)),
            Candidate(names["bfloat16"], OURS, lambda: lambda: narrow(narrow_x), tolerance=_ROUNDED),
            Candidate(names["weights"], OURS, lambda: lambda: bfloat16(x), reference=rounded, tolerance=_NEXT),
            Candidate(names["torch"], "torch", _torch_int8(other, x), tolerance=_ROUNDED),
        ]
        if cell is LSTM:
            # Inductor unrolls the steps of a GRU, compiles them for a minute, and is slower than eager.
            others.append(Candidate(names["frozen"], "compile", lambda: peers.aot_inductor_call(other, x)))
            # ONNX Runtime has no GRU in int8.
            state = [torch.zeros(1, B, H) for _ in cell.state]
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
        if B > 1:  # twice the multiply-adds of float32 per instruction
            others.append(limit(f"{FMA_PEAK}, doubled", lambda: limits.multiply_add(work / 2, threads)))
        else:
            others.append(limit(f"{READ_U} in int8", lambda: limits.read(cell.gates * H * H // 4, T, threads)))
        own = Candidate(name, OURS, lambda: lambda: int8(x), reference=_int8_outputs(other, x), tolerance=_NEXT)
        return Comparison(reference_outputs(other, x, None), own, others)

    by_name = given_targets({names[key]: target for key, target in targets.items()})
    sizes = size_name(B=B, T=T, I=I, H=H)
    return Case(f"quantized/{kind_name(cell, 'inference')}/{sizes}", build, False, work, "GFLOP", by_name)
