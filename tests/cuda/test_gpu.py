"""Recurrences on a GPU: streams, graphs, waiting, memory, errors, bits; other tests compare the formulas."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.comparison import assert_close, compare, flatten
from support.devices import ON_CUDA
from support.recurrences import (
    ARCHITECTURES,
    LSTM,
    RECURRENCES,
    RNN,
    Recurrence,
    is_smooth,
    recurrence_functions,
    recurrence_inputs,
)
from support.tolerances import ALL_DTYPES
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import llm_ext
from llm_ext import ops

if not ON_CUDA:
    pytest.skip("needs a GPU, and llm_ext with CUDA", allow_module_level=True)
every_architecture = pytest.mark.parametrize("recurrence", ARCHITECTURES, ids=str)
LAYERS = ("RNN", "GRU", "LSTM")
# Sizes for every route: a block, a cluster, a grid; several rows per block; odd sizes; larger than any tile.
SIZES = [  # T, B, I, H
    (33, 1, 64, 64),
    (20, 3, 32, 128),
    (20, 17, 48, 256),
    (12, 64, 64, 512),
    (9, 33, 40, 768),
    (9, 16, 40, 1024),
    (6, 130, 24, 384),
    (5, 9, 33, 1000),
    (4, 5, 17, 65),
    (3, 2, 16, 2050),
]


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before
    torch.cuda.synchronize()  # an error that a kernel left behind belongs to this test


def trained(recurrence: Recurrence, inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Results and gradients of a call."""
    results = recurrence_functions(recurrence, **options)[0](**inputs)
    return [*results, *torch.autograd.grad([t.sum() for t in results], list(inputs.values()))]


def layer_of(kind: str, *arguments: Any, **options: Any) -> Any:
    return getattr(llm_ext, kind)(*arguments, device="cuda", **options)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("H", [64, 320, 1024])
def test_graph_capture(H: int, bidirectional: bool, kind: str) -> None:
    """Forward and backward replayed on other numbers give what a call gives."""
    layer = layer_of(kind, 16, H, 2, bidirectional=bidirectional)
    x = torch.randn(6, 5, 16, device="cuda", requires_grad=True)
    lengths = torch.tensor([6, 2, 0, 5, 6], device="cuda")

    def call(layer: Any) -> list[Tensor]:
        y, last = layer(x, lengths=lengths)
        return [y, *flatten(last), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(layer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(layer)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.normal_()
            lengths.copy_(torch.randint(0, 7, (5,)))
        graph.replay()
        replayed = [t.clone() for t in captured]
        graph.replay()
        for a, b in zip(replayed, captured, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(replayed, call(layer), strict=True):
            assert_close(f"{kind.lower()}_backward", a, b)


def test_packed_rows_cannot_be_captured() -> None:
    layer = layer_of("GRU", 4, 8)
    rows = pack_padded_sequence(torch.randn(5, 3, 4, device="cuda"), torch.tensor([5, 4, 1]))
    layer(rows)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="batch_sizes cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(rows)
    assert layer(rows)[0].data.isfinite().all()


@every_architecture
@pytest.mark.parametrize("H", [64, 512, 1024])
def test_streams(H: int, recurrence: Recurrence) -> None:
    """Concurrent calls on several streams, each after other work on its stream, do not interfere."""
    inputs = [recurrence_inputs(recurrence, (40, 8, 32), 8, H, torch.float32, device="cuda") for _ in range(4)]
    expected = [trained(recurrence, each) for each in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]  # type: ignore[no-untyped-call]
    results = []
    for each, stream in zip(inputs, streams, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
            late = {name: t.detach().clone().requires_grad_() for name, t in each.items()}
            results.append(trained(recurrence, late))
    torch.cuda.synchronize()
    for actual, true in zip(results, expected, strict=True):
        for a, b in zip(actual, true, strict=True):
            assert_close(f"{recurrence.op}_backward", a, b)


def test_memory_is_reused_in_stream_order() -> None:
    """The next call reuses the memory of this call's temporaries, in the order of the stream."""
    inputs = recurrence_inputs(LSTM, (64, 32, 128), 32, 256, torch.float32, device="cuda")
    expected = trained(LSTM, inputs)
    for _ in range(10):
        actual = trained(LSTM, inputs)
        noise = [torch.full((64 * 32 * 1024,), float("nan"), device="cuda") for _ in range(4)]
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)
        del noise


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@every_architecture
def test_two_devices(recurrence: Recurrence) -> None:
    """A call runs on the device of its tensors, whichever device is current."""
    first = recurrence_inputs(recurrence, (5, 3, 4), 3, 64, torch.float32, device="cuda:0")
    second = {name: t.detach().to("cuda:1").requires_grad_() for name, t in first.items()}
    for a, b in zip(trained(recurrence, second), trained(recurrence, first), strict=True):
        assert b.device == torch.device("cuda:0")
        assert a.device == torch.device("cuda:1")
        assert_close(recurrence.op, a.cpu(), b.cpu())
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match=f"{recurrence.op}: .* must be on cuda:"):
        recurrence_functions(recurrence)[0](**(second | {"w_hh": first["w_hh"]}))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", ["whole", "lengths", "packed"])
def test_nothing_waits(how: str, kind: str) -> None:
    """According to torch's profiler, neither forward nor backward waits for the device or copies to the host."""
    layer = layer_of(kind, 16, 320, 2, bidirectional=True)
    x = torch.randn(9, 6, 16, device="cuda", requires_grad=True)
    lengths = torch.tensor([9, 4, 0, 9, 1, 5], device="cuda")
    rows = pack_padded_sequence(x.detach(), torch.tensor([9, 9, 5, 4, 2, 1]))
    given = {"whole": (x, {}), "lengths": (x, {"lengths": lengths}), "packed": (rows, {})}[how]

    def call() -> None:
        y, _ = layer(given[0], **given[1])
        (y.data if how == "packed" else y).sum().backward()

    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        call()
    names = [event.name for event in trace.events()]
    waits = [n for n in names if "Synchronize" in n or "DtoH" in n or n in ("aten::item", "aten::_local_scalar_dense")]
    # The profiler itself synchronizes the device at its end.
    assert [n for n in waits if n != "cudaDeviceSynchronize"] == []
    # The steps are not launches of their own.
    assert sum("LaunchKernel" in n for n in names) < 200
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", LAYERS)
def test_inference_saves_nothing(kind: str) -> None:
    """Peak memory of inference: output and pre-activations; with autograd also the saved activations."""
    layer = layer_of(kind, 32, 256)
    x = torch.randn(64, 32, 32, device="cuda")

    def most(grad: bool) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(grad):
            result = layer(x)
        del result
        return torch.cuda.max_memory_allocated() - before

    most(True)
    saved = {"RNN": 0, "GRU": 4, "LSTM": 5}[kind] * 64 * 32 * 256 * 4
    assert most(True) - most(False) >= saved
    assert most(False) < 64 * 32 * 256 * 4 * ({"RNN": 1, "GRU": 3, "LSTM": 4}[kind] + 1) + (4 << 20)


def test_tf32_follows_the_flag() -> None:
    """float32 is exact unless torch's flag allows TF32."""
    inputs = recurrence_inputs(RNN, (16, 32, 64), 32, 256, torch.float32, device="cuda")
    function, reference = recurrence_functions(RNN)
    expected = reference(**{name: t.detach().double() for name, t in inputs.items()})[0]

    def error() -> float:
        with torch.no_grad():
            return (function(**inputs)[0].double() - expected).abs().max().item()

    assert error() < 2e-5
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert 2e-5 < error() < 2e-2
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert error() < 2e-5


@every_architecture
def test_autocast(recurrence: Recurrence) -> None:
    layer = layer_of(recurrence.layer, 8, 16, 2, bidirectional=True)
    x = torch.randn(4, 3, 8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y, last = layer(x)
    assert {t.dtype for t in (y, *flatten(last))} == {torch.bfloat16}
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(half(x.bfloat16())[0], y)


@pytest.mark.parametrize("kind", LAYERS)
def test_multilayer_inference(kind: str) -> None:
    """Several layers in one op call give the results of the layers one by one."""
    for bidirectional in (False, True):
        layer = layer_of(kind, 8, 48, 3, bidirectional=bidirectional)
        x = torch.randn(5, 4, 8, device="cuda")
        recorded = flatten(layer(x))
        with torch.no_grad():
            for a, b in zip(flatten(layer(x)), recorded, strict=True):
                assert_close(kind.lower(), a, b)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_compiles_whole(bidirectional: bool, kind: str) -> None:
    torch.compiler.reset()
    layer = layer_of(kind, 8, 48, 2, bidirectional=bidirectional)
    x, lengths = torch.randn(5, 4, 8, device="cuda"), torch.tensor([5, 2, 0, 4], device="cuda")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for each in (layer, compiled):
        y, last = each(x, lengths=lengths)
        results.append([y, *flatten(last), *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    for a, b in zip(*results, strict=True):
        assert_close(kind.lower(), a, b)


@pytest.mark.parametrize("attention", ["none", "hidden", "embedding"])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_model(cell: str, attention: str) -> None:
    """A language model gives the same scores and the same text on both devices."""
    model = llm_ext.LLM(20, 8, 48, 20, 2, 0.0, cell=cell, attention=attention, dtype=torch.float64)
    ids = torch.randint(20, (3, 7))
    scores, state = model(ids)
    text = model.generate(ids, 12, temperature=0)
    model.cuda()
    on_gpu, state_on_gpu = model(ids.cuda())
    assert_close("model", on_gpu.cpu(), scores)
    assert_close("model", state_on_gpu.hidden.cpu(), state.hidden)
    on_gpu.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(model.generate(ids.cuda(), 12, temperature=0).cpu(), text)


# ---- errors


@every_architecture
def test_tensors_on_different_devices(recurrence: Recurrence) -> None:
    inputs = recurrence_inputs(recurrence, (3, 2, 4), 2, 5, torch.float32, device="cuda")
    for name in inputs:
        mixed = inputs | {name: inputs[name].detach().cpu()}
        with pytest.raises(ValueError, match=f"{recurrence.op}: .* must be on c"):
            recurrence_functions(recurrence)[0](**mixed)
    with pytest.raises(ValueError, match=f"{recurrence.op}: lengths must be on cuda:0 like x, got cpu"):
        recurrence_functions(recurrence, lengths=torch.tensor([1, 2]))[0](**inputs)
    with pytest.raises(TypeError, match=f"{recurrence.op}: lengths must be int64"):
        recurrence_functions(recurrence, lengths=torch.tensor([1, 2], dtype=torch.int32, device="cuda"))[0](**inputs)


@every_architecture
def test_wrong_lengths_do_no_harm(recurrence: Recurrence) -> None:
    """The kernels clamp lengths out of range to 0 and T."""
    inputs = recurrence_inputs(recurrence, (5, 4, 6), 4, 64, torch.float32, device="cuda")
    wrong, right = (torch.tensor(n, device="cuda") for n in ([9, -1, 5, 1 << 40], [5, 0, 5, 5]))
    for a, b in zip(
        trained(recurrence, inputs, lengths=wrong), trained(recurrence, inputs, lengths=right), strict=True
    ):
        assert torch.equal(a, b)


def test_out_of_memory() -> None:
    free, _ = torch.cuda.mem_get_info()
    layer = layer_of("LSTM", 1, 1024, dtype=torch.bfloat16)
    T = free // (1024 * 1024 * 2 * 4)
    x = torch.zeros(T + 64, 1024, 1, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        layer(x)
    del x
    small = torch.randn(4, 2, 1, device="cuda", dtype=torch.bfloat16)
    assert layer(small)[0].isfinite().all()


def test_errors_are_cleared() -> None:
    """A failed call leaves no CUDA error for the next one."""
    calls: list[Callable[[], Any]] = [
        lambda: ops.rnn(torch.randn(2, 2, 3, device="cuda"), None, torch.randn(4, 3), torch.randn(4, 4)),
        lambda: layer_of("GRU", 3, 4)(torch.randn(2, 2, 5, device="cuda")),
    ]
    for call in calls:
        with pytest.raises((ValueError, RuntimeError)):
            call()
        assert torch.ones(3, device="cuda").sum().item() == 3


# ---- many cases, which `make gpu` may cut off


@pytest.mark.parametrize("recurrence", RECURRENCES, ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(("T", "B", "I", "H"), SIZES)
def test_every_route(T: int, B: int, I: int, H: int, dtype: torch.dtype, recurrence: Recurrence) -> None:  # noqa: E741
    smooth = is_smooth(recurrence, dtype)
    for reverse in (False, True):
        inputs = recurrence_inputs(recurrence, (T, B, I), B, H, dtype, device="cuda")
        compare(recurrence.op, recurrence_functions(recurrence, reverse=reverse), inputs, gradients=smooth)
        lengths = torch.randint(0, T + 1, (B,)).cuda()
        compare(
            recurrence.op, recurrence_functions(recurrence, reverse=reverse, lengths=lengths), inputs, gradients=smooth
        )


@every_architecture
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(("T", "B", "I", "H"), SIZES)
def test_same_bits(T: int, B: int, I: int, H: int, dtype: torch.dtype, recurrence: Recurrence) -> None:  # noqa: E741
    inputs = recurrence_inputs(recurrence, (T, B, I), B, H, dtype, device="cuda")
    lengths = torch.randint(0, T + 1, (B,)).cuda()
    first, second = (trained(recurrence, inputs, lengths=lengths) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool: str) -> None:
    """compute-sanitizer finds no fault in small calls of every route."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    # Each tensor is its own allocation, so that wrong accesses hit no neighbour. Only llm_ext's kernels are checked.
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=llm_ext"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command += [sys.executable, "-c", SMALL_CALLS]
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("compute-sanitizer takes longer than 100 s here")
    if "Device not supported" in run.stdout + run.stderr:
        pytest.skip("compute-sanitizer does not support this machine")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


SMALL_CALLS = """
import torch, llm_ext
for kind, dtype, H, B in (
    ("RNN", torch.bfloat16, 64, 9), ("LSTM", torch.float32, 128, 3), ("GRU", torch.float16, 512, 17),
    ("LSTM", torch.bfloat16, 1024, 8), ("GRU", torch.float64, 33, 5), ("RNN", torch.float32, 65, 2),
):
    layer = getattr(llm_ext, kind)(8, H, bidirectional=H < 200, device="cuda", dtype=dtype)
    x = torch.randn(4, B, 8, device="cuda", dtype=dtype, requires_grad=True)
    lengths = torch.arange(B, device="cuda") % 5
    layer(x, lengths=lengths)[0].sum().backward()
for dtype, D in ((torch.bfloat16, 1024), (torch.float32, 33), (torch.float64, 16)):
    lengths, new = torch.tensor([200, 0, 9], device="cuda"), {"device": "cuda", "dtype": dtype}
    e = torch.randn(3, 200, D, requires_grad=True, **new)
    for causal in (False, True):
        pool = llm_ext.AttentionPool(D, 8, causal=causal, **new)
        result = pool(e, lengths=lengths)
        (result[0] if causal else result).sum().backward()
    attention = llm_ext.AdditiveAttention(D, D, 70, **new)
    attention(e[:, :40], e, key_lengths=lengths)[0].sum().backward()
torch.cuda.synchronize()
"""
