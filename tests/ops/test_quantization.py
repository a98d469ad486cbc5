"""Recurrences and linear layers with packed weights of 8 and 16 bits, against the reference."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparison import assert_all_close, assert_close, assert_same_bits, flatten
from support.devices import num_threads, supported_isas
from support.inputs import noncontiguous
from support.memory import memory_limit
from support.pairwise import parametrize_pairwise
from support.process import check_fork
from support.quantized import (
    LINEAR,
    RECURRENCE,
    WEIGHTS,
    detached,
    pack_inputs,
    quantized_arguments,
    run_op,
    run_reference,
)
from support.recurrences import ARCHITECTURES, GRU, LSTM, PROJECTED, RECURRENCES, RNN, Recurrence, recurrence_inputs
from torch import Tensor

import llm_ext
from llm_ext import reference
from llm_ext.ops import quantization, recurrence
from llm_ext.reference.quantization import QuantizedWeight, quantize_weight, quantized_linear

SIZES = [  # T, B, I, H: one row, tiles, panels of 16 and their rests, odd depths, empty
    (40, 1, 5, 33),
    (3, 2, 17, 16),
    (1, 1, 8, 48),
    (7, 13, 31, 15),
    (5, 7, 1, 2),
    (4, 3, 0, 17),
    (3, 40, 64, 130),  # large enough for two threads, by rows
    (2, 300, 9, 20),
    (2, 90, 600, 16),  # several blocks of inputs
    (30, 2, 40, 96),  # by columns, also a projection
    (0, 2, 3, 4),
    (5, 0, 3, 4),
]
every_weights = pytest.mark.parametrize("weights", WEIGHTS)
every_architecture = pytest.mark.parametrize("recurrence_", ARCHITECTURES, ids=str)


@parametrize_pairwise(
    sizes=SIZES,
    recurrence_=RECURRENCES,
    weights=WEIGHTS,
    reverse=(False, True),
    state=(False, True),
    bias=(False, True),
    threads=(1, 2),
)
def test_forward(
    sizes: tuple[int, int, int, int],
    recurrence_: Recurrence,
    weights: str,
    reverse: bool,
    state: bool,
    bias: bool,
    threads: int,
) -> None:
    T, B, I, H = sizes  # noqa: E741
    inputs = detached(recurrence_inputs(recurrence_, (T, B, I), B, H, torch.float32, state=state, bias=bias))
    inputs = {name: tensor if name.startswith("w_") else noncontiguous(tensor) for name, tensor in inputs.items()}
    with num_threads(threads):
        actual = run_op(recurrence_, inputs, weights, reverse=reverse)
    expected = run_reference(recurrence_, inputs, weights, reverse=reverse)
    assert_all_close(RECURRENCE[weights], actual, expected)


@every_weights
@every_architecture
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("H", [35, 130])  # with 130, two threads divide the columns
def test_packed_rows_and_lengths(recurrence_: Recurrence, weights: str, reverse: bool, H: int) -> None:
    lengths = torch.tensor([4, 9, 0, 9, 1])
    inputs = detached(recurrence_inputs(recurrence_, (9, 5, 6), 5, H, torch.float32))
    inputs["x"][4:, 0] = float("nan")
    with num_threads(2):
        actual = run_op(recurrence_, inputs, weights, lengths=lengths, reverse=reverse)
    expected = run_reference(recurrence_, inputs, weights, lengths=lengths, reverse=reverse)
    assert_all_close(RECURRENCE[weights], actual, expected)
    batch_sizes = torch.tensor([5, 3, 3, 1])
    packed = inputs | {"x": torch.randn(12, 6)}
    with num_threads(2):
        actual = run_op(recurrence_, packed, weights, batch_sizes=batch_sizes, reverse=reverse)
    expected = run_reference(recurrence_, packed, weights, batch_sizes=batch_sizes, reverse=reverse)
    assert_all_close(RECURRENCE[weights], actual, expected)


# Prints a hash of results that are the same on every machine.
PRINT_BITS = """
import os, sys
os.environ["LLM_EXT_ISA"] = sys.argv[1]
import hashlib, torch, llm_ext
torch.set_num_threads(int(sys.argv[2]))
bits = hashlib.sha256()
for build in (llm_ext.RNN, llm_ext.GRU, llm_ext.LSTM):
    torch.manual_seed(0)
    layer = build(37, 50, num_layers=2, bidirectional=True, **({"proj_size": 19} if build is llm_ext.LSTM else {}))
    llm_ext.quantize_(layer)
    with torch.no_grad():
        y, _ = layer(torch.randn(30, 9, 37), lengths=torch.arange(22, 31))
    bits.update(y.numpy().tobytes())
for N, I, O in ((70, 128, 100), (3, 600, 700)):
    layer = llm_ext.Linear(I, O)
    llm_ext.quantize_(layer)
    bits.update(layer(torch.randn(N, I)).numpy().tobytes())
print(bits.hexdigest())
"""


def test_int8_has_the_same_bits_on_every_isa_and_with_any_threads() -> None:
    results = {check_fork(PRINT_BITS, isa, threads) for isa in supported_isas() for threads in ("1", "2")}
    assert len(results) == 1


@every_architecture
def test_int8_rows_do_not_depend_on_each_other(recurrence_: Recurrence) -> None:
    inputs = detached(recurrence_inputs(recurrence_, (6, 11, 20), 11, 40, torch.float32))
    y = run_op(recurrence_, inputs, "int8")[0]
    batch = ("x", "h0", "c0")
    for b in (0, 6, 10):
        own = {
            name: t if name not in batch else t[:, b : b + 1] if name == "x" else t[b : b + 1]
            for name, t in inputs.items()
        }
        assert_same_bits(run_op(recurrence_, own, "int8")[0], y[:, b : b + 1])


@every_weights
@pytest.mark.parametrize("recurrence_", [RNN, GRU, LSTM, PROJECTED], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_stay_in_their_row(recurrence_: Recurrence, weights: str, bad: float) -> None:
    inputs = detached(recurrence_inputs(recurrence_, (5, 3, 6), 3, 20, torch.float32))
    clean = run_op(recurrence_, inputs, weights)
    inputs["x"][2, 1, 3] = bad
    y = run_op(recurrence_, inputs, weights)[0]
    if weights == "int8" or bad != bad:  # bfloat16 keeps an infinity, of which a gate makes a number
        assert y[2:, 1].isnan().all()
    assert_same_bits(y[:2], clean[0][:2])
    assert_same_bits(y[:, 0::2], clean[0][:, 0::2])
    if bad != bad or weights == "int8":
        inputs["w_hh"][0, 0] = bad
        inputs["x"][2, 1, 3] = 0.0
        y = run_op(recurrence_, inputs, weights)[0]
        assert y[:, :, : 1 if not recurrence_.projected else None].isnan().all()


@every_weights
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_of_a_linear_layer(weights: str, bad: float) -> None:
    x, w, b = torch.randn(7, 19), torch.randn(33, 19), torch.randn(33)

    def run(x: Tensor, w: Tensor) -> Tensor:
        return quantization.quantized_linear(x, quantization.pack(w, weights), b, 33)

    clean = run(x, w)
    x[2, 3] = bad
    y = run(x, w)
    others = [0, 1, 3, 4, 5, 6]
    assert not y[2].isfinite().any()
    assert_same_bits(y[others], clean[others])
    w[5, 0] = bad
    y = run(x, w)
    assert not y[:, 5].isfinite().any()
    assert y[others][:, others[:-2]].isfinite().all()


@every_weights
@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-31])
def test_rows_of_zeros_and_tiny_numbers(weights: str, value: float) -> None:
    inputs = detached(recurrence_inputs(GRU, (3, 2, 4), 2, 17, torch.float32))
    inputs["x"][:] = value
    inputs["h0"][:] = value
    inputs["w_ih"][3:7] = value
    actual = run_op(GRU, inputs, weights)
    assert_all_close(RECURRENCE[weights], actual, run_reference(GRU, inputs, weights))
    x, w = torch.full((2, 4), value), torch.randn(3, 4)
    w[1] = value
    y = quantization.quantized_linear(x, quantization.pack(w, weights), None, 3)
    assert_close(LINEAR[weights], y, torch.zeros(2, 3))


@every_architecture
def test_the_largest_weights_and_states_do_not_saturate(recurrence_: Recurrence) -> None:
    inputs = detached(recurrence_inputs(recurrence_, (2, 3, 4), 3, 40, torch.float32, bias=False))
    for name in ("w_hh", "w_hr"):
        if name in inputs:
            inputs[name] = inputs[name].sign() * 0.05
    inputs["h0"][0], inputs["h0"][1] = 1, -1
    assert_all_close("recurrence_int8", run_op(recurrence_, inputs, "int8"), run_reference(recurrence_, inputs, "int8"))


def test_sums_that_may_not_fit_are_refused() -> None:
    most = quantization.MAX_INT8_COLUMNS
    w = torch.ones(3, most)
    y = quantization.quantized_linear(torch.ones(2, most), quantization.pack(w, "int8"), None, 3)
    torch.testing.assert_close(y, torch.full((2, 3), float(most)))
    too_many = f"has {most + 1} columns, and an int8 weight may have at most {most}"
    with pytest.raises(ValueError, match=too_many):
        quantization.pack(torch.empty(3, most + 1, device="meta"), "int8")
    arguments = list(quantized_arguments(GRU, "int8"))
    arguments[1], arguments[14] = torch.empty(0, 3, most + 1), most + 1
    with pytest.raises(RuntimeError, match=f"w_ih {too_many}"):
        torch.ops.llm_ext.quantized_rnn_forward.default(*arguments)


@every_weights
@settings(max_examples=25)
@given(data=st.data())
def test_pack_and_linear(weights: str, data: st.DataObject) -> None:
    gates, rows, K, N = (data.draw(st.integers(least, most)) for least, most in ((1, 4), (1, 40), (0, 70), (1, 9)))
    w = torch.randn(gates * rows, K)
    rounded = quantization.widen(*quantization.round_weight(w, weights))
    for state in (False, True):
        assert_same_bits(quantization.unpack(quantization.pack(w, weights, gates, state=state), rows), rounded)
    check_linear(torch.randn(3, N, K), w[:rows], weights)


@every_weights
@pytest.mark.parametrize(("N", "K", "O"), [(70, 128, 100), (3, 600, 700), (0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_linear(weights: str, N: int, K: int, O: int) -> None:  # noqa: E741
    """Two threads by rows and by panels, and sizes of 0."""
    with num_threads(2):
        check_linear(torch.randn(N, K), torch.randn(O, K), weights)


def check_linear(x: Tensor, w: Tensor, weights: str) -> None:
    """Compare the op with its reference."""
    b = torch.randn(len(w))
    actual = quantization.quantized_linear(x, quantization.pack(w, weights), b, len(w))
    if weights == "int8":
        values, scale = quantize_weight(w)
        expected = quantized_linear(x.double(), QuantizedWeight(values, scale.double()), b.double())
    else:
        expected = reference.linear(x.double(), w.to(torch.bfloat16).double(), b.double())
    assert_close(LINEAR[weights], actual, expected)


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("op", "H"), [("LSTM", 64), ("GRU", 64), ("LSTM", 256)])
def test_int8_has_at_most_half_the_error_of_torch(op: str, H: int) -> None:
    torch.manual_seed(0)
    layer = getattr(torch.nn, op)(32, H)
    x = torch.randn(64, 4, 32)
    with torch.no_grad():
        expected = layer(x)[0]
        model = torch.nn.Sequential(layer)
        quantize_dynamic: Any = torch.ao.quantization.quantize_dynamic
        torch_int8 = quantize_dynamic(model, {type(layer)}, dtype=torch.qint8)
        theirs = rms(torch_int8(x)[0] - expected)
        assert theirs > 0
        llm_ext.quantize_(layer)
        ours = rms(layer(x)[0] - expected)
    assert ours <= theirs / 2, f"{ours:.2e} is more than half of {theirs:.2e}"


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (1, torch.randn(4, 3, 6), "x must have I = 5 features, got [4, 3, 6]"),
        (
            4,
            torch.zeros(2, 3, 2, 16, 2, dtype=torch.int8),
            "w_ih must be the packed weight [54, 5], got [2, 3, 2, 16, 2]",
        ),
        (1, torch.randn(4, 3, 5).double(), "x must be float32"),
        (2, torch.randn(2, 18), "h0 must be [3, 18], got [2, 18]"),
        (4, torch.zeros(3), "packed weights must be int8 or int16"),
        (5, torch.ones(7), "s_ih must be [54], got [7]"),
        (7, torch.ones(54).half(), "s_hh must be float32 with quantized weights"),
        (8, torch.ones(54).double(), "b_ih must be float32 with quantized weights"),
        (2, torch.ones(3, 18).double(), "h0 must be float32 with quantized weights"),
        (5, None, "w_ih must have a scale exactly if it is int8"),
        (6, torch.zeros(2, 3, 9, 16, 1, dtype=torch.int8), "w_hh must be the packed weight [54, 18]"),
        (16, 17, "w_hr must be given exactly if the output of an LSTM is projected"),
    ],
)
def test_what_could_corrupt_memory_is_refused(index: int, value: object, message: str) -> None:
    arguments = list(quantized_arguments(GRU, "int8"))
    arguments[index] = value
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.llm_ext.quantized_rnn_forward.default(*arguments)


def test_the_words_of_a_wrong_input() -> None:
    packed = pack_inputs(GRU, detached(recurrence_inputs(GRU, (4, 3, 5), 3, 18, torch.float32)), "int8")

    def call(x: Tensor) -> Any:
        return recurrence.run("GRU", x, None, packed, (False,), 0.0, None, None)

    assert flatten(call(torch.randn(4, 3, 5)))
    with pytest.raises(TypeError, match=re.escape("gru: x must be float32 with quantized weights, got float64")):
        call(torch.randn(4, 3, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=re.escape("gru: x must have I = 5 features, got [4, 3, 6]")):
        call(torch.randn(4, 3, 6))
    with pytest.raises(TypeError, match=re.escape("gru: lengths must be int64, got int32")):
        recurrence.run(
            "GRU", torch.randn(4, 3, 5), None, packed, (False,), 0.0, None, torch.tensor([4, 2, 1], dtype=torch.int32)
        )
    with pytest.raises(ValueError, match=re.escape("linear: x must have I = 5 features, got [4, 6]")):
        quantization.quantized_linear(torch.randn(4, 6), quantization.pack(torch.randn(7, 5), "int8"), None, 7)
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"must be float32 .*, got float64"):
        call(torch.randn(4, 3, 5, dtype=torch.float64))


def test_out_of_memory() -> None:
    packed = pack_inputs(GRU, detached(recurrence_inputs(GRU, (4, 3, 1), 3, 64, torch.float32)), "int8")
    w = quantization.pack(torch.randn(4096, 1), "int8")
    x = torch.zeros(1 << 14, 16, 1)
    llm_ext.empty_cpu_cache()
    with memory_limit(16):
        with pytest.raises(torch.OutOfMemoryError, match="out of memory: cannot allocate 67108864 bytes"):
            recurrence.run("GRU", x, None, packed, (False,), 0.0, None, None)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory: cannot allocate 67108864 bytes"):
            quantization.quantized_linear(x[:256], w, None, 4096)
