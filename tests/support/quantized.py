"""Recurrences with packed weights: the op and its reference as functions of named tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_ext import build_info, reference
from llm_ext.ops import quantization, recurrence
from llm_ext.ops.quantization import PackedWeight, QuantizedWeights
from llm_ext.reference.quantization import QuantizedWeight, quantize_weight
from support.comparison import flatten, in_double
from support.recurrences import ARCHITECTURES, Recurrence, recurrence_inputs

WEIGHTS = ("int8", "bfloat16")
# Rows of `tolerances.py` against the reference, and against layers in float32 with the same weights. One ISA rounds
# inputs and states to bfloat16.
_PAIRS = "_pairs" if build_info()["isa"] == "avx512_bf16" else ""
RECURRENCE = {"int8": "recurrence_int8", "bfloat16": f"recurrence_bfloat16{_PAIRS}"}
LAYER = RECURRENCE | {"int8": "recurrence_rounded_states"}
LINEAR = {"int8": "linear", "bfloat16": f"linear{_PAIRS}"}


def detached(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without gradients."""
    return {name: tensor.detach() for name, tensor in inputs.items()}


def pack_inputs(recurrence_: Recurrence, inputs: dict[str, Tensor], weights: str) -> QuantizedWeights:
    """The weights of one direction of one layer."""
    G = recurrence_.gates
    w_ih = quantization.pack(inputs["w_ih"], weights, G)
    w_hh = quantization.pack(inputs["w_hh"], weights, G, state=True)
    w_hr: PackedWeight | None = quantization.pack(inputs["w_hr"], weights, state=True) if "w_hr" in inputs else None
    H, P = len(inputs["w_hh"]) // G, inputs["w_hh"].shape[1]
    biases = inputs.get("b_ih"), inputs.get("b_hh")
    row = (*w_ih[:2], *w_hh[:2], *biases, *(w_hr or (None, None))[:2], w_ih.columns)
    return QuantizedWeights([row], H, P)


def run_op(recurrence_: Recurrence, inputs: dict[str, Tensor], weights: str, **options: Any) -> list[Tensor]:
    """(y, h_n) or (y, h_n, c_n) of the op."""
    state = (inputs["h0"], inputs["c0"]) if "c0" in inputs else (inputs["h0"],) if "h0" in inputs else None
    packed = pack_inputs(recurrence_, inputs, weights)
    batch_sizes, lengths, reverse = options.get("batch_sizes"), options.get("lengths"), options.get("reverse", False)
    y, last = recurrence.run(
        recurrence_.mode,
        inputs["x"],
        state,
        packed,
        (reverse,),
        0.0,
        batch_sizes,
        lengths,
    )
    if state is None:
        last = tuple(tensor.squeeze(0) for tensor in last)
    return flatten((y, last))


def run_reference(recurrence_: Recurrence, inputs: dict[str, Tensor], weights: str, **options: Any) -> list[Tensor]:
    """The same of the reference in float64."""

    def rounded(w: Tensor) -> Any:
        if weights == "int8":
            values, scale = quantize_weight(w)
            return QuantizedWeight(values, scale.double())
        return w.to(torch.bfloat16).double()

    given = in_double(inputs)
    given |= {name: rounded(inputs[name]) for name in inputs if name.startswith("w_")}
    x, h0, c0 = given.pop("x"), given.pop("h0", None), given.pop("c0", None)
    state = h0 if recurrence_.op != "lstm" or h0 is None else (h0, c0)
    own = {"nonlinearity": recurrence_.nonlinearity} if recurrence_.nonlinearity else {}
    function = getattr(reference, recurrence_.op)
    return flatten(function(x, state, given.pop("w_ih"), given.pop("w_hh"), **given, **own, **options))


def quantized_arguments(recurrence_: Recurrence, weights: str) -> tuple[object, ...]:
    """Arguments of the op as it is registered."""
    inputs = detached(recurrence_inputs(recurrence_, (4, 3, 5), 3, 18, torch.float32))
    packed = pack_inputs(recurrence_, inputs, weights)
    *tensors, columns = packed.rows[0]
    head = (recurrence_.mode, inputs["x"], inputs["h0"], inputs.get("c0"), *tensors)
    return (*head, None, None, columns, packed.hidden, packed.output, False)


def quantized_opcheck_cases() -> list[tuple[str, tuple[object, ...]]]:
    """Arguments of both ops."""
    recurrences = [
        ("quantized_rnn_forward", quantized_arguments(each, weights)) for each in ARCHITECTURES for weights in WEIGHTS
    ]
    linears: list[tuple[str, tuple[object, ...]]] = [
        (
            "quantized_linear_forward",
            (torch.randn(3, 5), *quantization.pack(torch.randn(19, 5), weights)[:2], None, 5, 19),
        )
        for weights in WEIGHTS
    ]
    return recurrences + linears
