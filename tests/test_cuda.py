"""What only a GPU can show: streams, graphs, waits, memory, errors, bits; the same formulas are in the other tests."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from cases import assert_close, flatten
from recurrences import CELLS, KINDS, LSTM, ON_CUDA, RNN, Cell, cell_functions, cell_inputs, compare
from test_additive_attention import functions as additive_functions
from test_additive_attention import inputs_of as additive_inputs
from test_additive_attention import selection as additive_selection
from test_ops import pool_functions, pool_inputs
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import llm_ext
from llm_ext import ops

if not ON_CUDA:
    pytest.skip("needs a GPU, and llm_ext with CUDA", allow_module_level=True)
every_kind = pytest.mark.parametrize("cell", KINDS, ids=str)
LAYERS = ("RNN", "GRU", "LSTM")
ALL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Sizes for each way to share the work: one block, a cluster, a grid; several rows a block; odd; larger than any tile.
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


def trained(cell: Cell, inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Results and gradients."""
    results = cell_functions(cell, **options)[0](**inputs)
    return [*results, *torch.autograd.grad([t.sum() for t in results], list(inputs.values()))]


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(("T", "B", "I", "H"), SIZES)
def test_every_way_to_share_the_work(T: int, B: int, I: int, H: int, dtype: torch.dtype, cell: Cell) -> None:  # noqa: E741
    smooth = cell.nonlinearity != "relu" or dtype in (torch.float32, torch.float64)
    for reverse in (False, True):
        inputs = cell_inputs(cell, (T, B, I), B, H, dtype, device="cuda")
        compare(cell.op, *cell_functions(cell, reverse=reverse), inputs, gradients=smooth)
        lengths = torch.randint(0, T + 1, (B,)).cuda()
        compare(cell.op, *cell_functions(cell, reverse=reverse, lengths=lengths), inputs, gradients=smooth)


@every_kind
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(("T", "B", "I", "H"), SIZES)
def test_same_bits(T: int, B: int, I: int, H: int, dtype: torch.dtype, cell: Cell) -> None:  # noqa: E741
    inputs = cell_inputs(cell, (T, B, I), B, H, dtype, device="cuda")
    lengths = torch.randint(0, T + 1, (B,)).cuda()
    first, second = (trained(cell, inputs, lengths=lengths) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


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

    stream = torch.cuda.Stream()
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


@every_kind
@pytest.mark.parametrize("H", [64, 512, 1024])
def test_streams(H: int, cell: Cell) -> None:
    """Calls on several streams at the same time, after work that they have to wait for, do not disturb one another."""
    inputs = [cell_inputs(cell, (40, 8, 32), 8, H, torch.float32, device="cuda") for _ in range(4)]
    expected = [trained(cell, each) for each in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results = []
    for each, stream in zip(inputs, streams, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            late = {name: t.detach().clone().requires_grad_() for name, t in each.items()}
            results.append(trained(cell, late))
    torch.cuda.synchronize()
    for actual, true in zip(results, expected, strict=True):
        for a, b in zip(actual, true, strict=True):
            assert_close(f"{cell.op}_backward", a, b)


def test_memory_is_not_given_away_too_early() -> None:
    """The next call gets the memory of temporaries of this one: in the order of the stream."""
    inputs = cell_inputs(LSTM, (64, 32, 128), 32, 256, torch.float32, device="cuda")
    expected = trained(LSTM, inputs)
    for _ in range(10):
        actual = trained(LSTM, inputs)
        noise = [torch.full((64 * 32 * 1024,), float("nan"), device="cuda") for _ in range(4)]
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)
        del noise


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@every_kind
def test_two_devices(cell: Cell) -> None:
    """A call runs where its tensors are, whatever device is current."""
    first = cell_inputs(cell, (5, 3, 4), 3, 64, torch.float32, device="cuda:0")
    second = {name: t.detach().to("cuda:1").requires_grad_() for name, t in first.items()}
    for a, b in zip(trained(cell, second), trained(cell, first), strict=True):
        assert b.device == torch.device("cuda:0")
        assert a.device == torch.device("cuda:1")
        assert_close(cell.op, a.cpu(), b.cpu())
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match=f"{cell.op}: .* must be on cuda:"):
        cell_functions(cell)[0](**(second | {"w_hh": first["w_hh"]}))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", ["whole", "lengths", "packed"])
def test_nothing_waits(how: str, kind: str) -> None:
    """Neither forward nor backward waits for the device or copies to the host; a trace of torch's profiler says so."""
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
    # For the whole device the profiler itself waits, at its end.
    assert [n for n in waits if n != "cudaDeviceSynchronize"] == []
    # And no step is a launch of its own.
    assert sum("LaunchKernel" in n for n in names) < 200
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", LAYERS)
def test_an_evaluation_keeps_nothing(kind: str) -> None:
    """Memory at its highest: output, pre-activations and no gates; more where autograd records."""
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
    kept = {"RNN": 0, "GRU": 4, "LSTM": 5}[kind] * 64 * 32 * 256 * 4
    assert most(True) - most(False) >= kept
    assert most(False) < 64 * 32 * 256 * 4 * ({"RNN": 1, "GRU": 3, "LSTM": 4}[kind] + 1) + (4 << 20)


def test_tf32_is_asked_for() -> None:
    """float32 is exact unless torch's flag allows less, and then no worse than TF32."""
    inputs = cell_inputs(RNN, (16, 32, 64), 32, 256, torch.float32, device="cuda")
    function, truth = cell_functions(RNN)
    expected = truth(**{name: t.detach().double() for name, t in inputs.items()})[0]

    def error() -> float:
        with torch.no_grad():
            return (function(**inputs)[0].double() - expected).abs().max().item()

    assert error() < 2e-5
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert 2e-5 < error() < 2e-2
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert error() < 2e-5


@every_kind
def test_autocast(cell: Cell) -> None:
    layer = layer_of({"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}[cell.op], 8, 16, 2, bidirectional=True)
    x = torch.randn(4, 3, 8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y, last = layer(x)
    assert {t.dtype for t in (y, *flatten(last))} == {torch.bfloat16}
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(half(x.bfloat16())[0], y)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_at_once_are_layers(kind: str) -> None:
    """An evaluation of several layers is one op; the numbers are those of each layer by itself."""
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
    """A language model runs where its weights are: the same scores, the same text."""
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


# ---- attention


def pooled(prefix: bool, inputs: Mapping[str, Tensor], **options: Any) -> list[Tensor]:
    """Results and gradients."""
    results = pool_functions(prefix, **options)[0](**inputs)
    loss = sum(t.masked_fill(t.isinf(), 0).square().sum() for t in results)
    return [*results, *torch.autograd.grad(loss, list(inputs.values()))]


def attended(inputs: Mapping[str, Tensor], **options: Any) -> list[Tensor]:
    """Results and gradients."""
    results = additive_functions(need_weights=True, **options)[0](**inputs)
    return [*results, *torch.autograd.grad([t.square().sum() for t in results], list(inputs.values()))]


# Teams of a few threads, of a warp, of several, with several packs each, and any; whole rows and chunks of them.
POOL_SIZES = [(2, 400, 8), (1, 700, 256), (8, 300, 1024), (300, 40, 768), (3, 90, 4096), (2, 60, 8192), (2, 50, 9000)]
# Tq of one, few and many; A of many chunks; several slabs of queries; more keys than a block has threads.
ADDITIVE_SIZES = [(9, 1, 300, 1024, 512), (4, 10, 128, 1024, 96), (3, 50, 50, 512, 512), (2, 200, 260, 40, 33)]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(("B", "T", "D"), POOL_SIZES)
def test_pool_of_any_plan(B: int, T: int, D: int, dtype: torch.dtype, prefix: bool) -> None:
    inputs = pool_inputs(B, T, D, dtype, folded=D % 3 != 0, state=prefix, device="cuda")
    lengths, mask = torch.randint(0, T + 1, (B,), device="cuda"), torch.rand(B, T, device="cuda") < 0.9
    function, truth = pool_functions(prefix, lengths=lengths, mask=mask)
    compare("prefix_pool" if prefix else "attention_pool", function, truth, inputs)
    first, second = (pooled(prefix, inputs, lengths=lengths, mask=mask) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefix_pool_in_rounds(dtype: torch.dtype) -> None:
    """Rows so few and long that the teams of all blocks go through them together; twice, with the same bits."""
    inputs = pool_inputs(4, 4300, 1024, dtype, folded=True, state=True, device="cuda")
    lengths, mask = torch.tensor([4300, 17, 0, 4000], device="cuda"), torch.rand(4, 4300, device="cuda") < 0.9
    function, truth = pool_functions(True, lengths=lengths, mask=mask)
    compare("prefix_pool", function, truth, inputs, gradients=False)
    with torch.no_grad():
        for a, b in zip(*(function(**inputs) for _ in range(2)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("sizes", ADDITIVE_SIZES)
def test_additive_attention_of_any_plan(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = additive_inputs(*sizes, dtype=dtype, device="cuda")
    options = additive_selection("both", *sizes[:3], "cuda")
    compare("additive_attention", *additive_functions(need_weights=True, **options), inputs)
    first, second = (attended(inputs, **options) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def attention_calls() -> dict[str, Callable[[], list[Tensor]]]:
    """A call of each op, forward and backward, with lengths on the device."""
    lengths = torch.tensor([300, 17, 0], device="cuda")
    pools = [pool_inputs(3, 300, 256, torch.float32, folded=True, state=prefix, device="cuda") for prefix in (0, 1)]
    both = additive_inputs(3, 20, 300, 128, 64, torch.float32, device="cuda")
    return {
        "pool": lambda: pooled(False, pools[0], lengths=lengths),
        "prefix": lambda: pooled(True, pools[1], lengths=lengths),
        "additive": lambda: attended(both, key_lengths=lengths),
    }


@pytest.mark.parametrize("name", ["pool", "prefix", "additive"])
def test_attention_is_queued(name: str) -> None:
    """Nothing waits for the device, calls can be captured, and a replay gives the bits of a call."""
    call = attention_calls()[name]
    expected = [t.clone() for t in call()]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for t in captured:
        t.detach().zero_()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_wrong_lengths_of_attention_do_no_harm() -> None:
    wrong, right = (torch.tensor(n, device="cuda") for n in ([99, -1, 1 << 40], [40, 0, 40]))
    for prefix in (False, True):
        inputs = pool_inputs(3, 40, 64, torch.float32, folded=True, state=prefix, device="cuda")
        for a, b in zip(*(pooled(prefix, inputs, lengths=n) for n in (wrong, right)), strict=True):
            assert torch.equal(a, b)
    inputs = additive_inputs(3, 7, 40, 64, 32, torch.float32, device="cuda")
    for a, b in zip(*(attended(inputs, key_lengths=n) for n in (wrong, right)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("B", [1, 4])
def test_memory_of_additive_attention(B: int) -> None:
    """Forward and backward: it grows with Tq + Tk, and nothing of Tq × Tk × A is there."""
    A = 256
    for Tq, Tk in ((500, 500), (2000, 2000), (1, 4000), (4000, 1)):
        inputs = additive_inputs(B, Tq, Tk, A, A, torch.float32, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(ops.additive_attention(*inputs.values())[0].sum(), list(inputs.values()))
        assert torch.cuda.max_memory_allocated() - before <= 8 * 4 * B * (Tq + Tk) * A + (4 << 20)


# ---- errors


@every_kind
def test_tensors_on_different_devices(cell: Cell) -> None:
    inputs = cell_inputs(cell, (3, 2, 4), 2, 5, torch.float32, device="cuda")
    for name in inputs:
        mixed = inputs | {name: inputs[name].detach().cpu()}
        with pytest.raises(ValueError, match=f"{cell.op}: .* must be on c"):
            cell_functions(cell)[0](**mixed)
    with pytest.raises(ValueError, match=f"{cell.op}: lengths must be on cuda:0 like x, got cpu"):
        cell_functions(cell, lengths=torch.tensor([1, 2]))[0](**inputs)
    with pytest.raises(TypeError, match=f"{cell.op}: lengths must be int64"):
        cell_functions(cell, lengths=torch.tensor([1, 2], dtype=torch.int32, device="cuda"))[0](**inputs)


@every_kind
def test_wrong_lengths_do_no_harm(cell: Cell) -> None:
    """Nobody looks at them before the kernel does: it takes what is too long as T, and what is below 0 as 0."""
    inputs = cell_inputs(cell, (5, 4, 6), 4, 64, torch.float32, device="cuda")
    wrong, right = (torch.tensor(n, device="cuda") for n in ([9, -1, 5, 1 << 40], [5, 0, 5, 5]))
    for a, b in zip(trained(cell, inputs, lengths=wrong), trained(cell, inputs, lengths=right), strict=True):
        assert torch.equal(a, b)


def test_out_of_memory_is_said_and_leaves_nothing_behind() -> None:
    free, _ = torch.cuda.mem_get_info()
    layer = layer_of("LSTM", 1, 1024, dtype=torch.bfloat16)
    T = free // (1024 * 1024 * 2 * 4)
    x = torch.zeros(T + 64, 1024, 1, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        layer(x)
    del x
    small = torch.randn(4, 2, 1, device="cuda", dtype=torch.bfloat16)
    assert layer(small)[0].isfinite().all()


def test_nothing_is_left_to_the_caller() -> None:
    """A call that fails leaves no error for the next one."""
    calls: list[Callable[[], Any]] = [
        lambda: ops.rnn(torch.randn(2, 2, 3, device="cuda"), None, torch.randn(4, 3), torch.randn(4, 4)),
        lambda: layer_of("GRU", 3, 4)(torch.randn(2, 2, 5, device="cuda")),
    ]
    for call in calls:
        with pytest.raises((ValueError, RuntimeError)):
            call()
        assert torch.ones(3, device="cuda").sum().item() == 3


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool: str) -> None:
    """compute-sanitizer finds nothing in small calls by every route."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not there")
    # Each tensor is an allocation of its own, so that no neighbour hides a wrong access. Of others' kernels nothing.
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
