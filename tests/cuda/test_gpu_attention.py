"""Pooling and attention on a GPU: plans, streams, graphs, memory, bits; other tests compare the formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from support.additive_attention import additive_functions, additive_inputs, key_selection
from support.comparison import compare
from support.devices import ON_CUDA
from support.pooling import op_name, pool_functions, pool_inputs
from support.tolerances import ALL_DTYPES
from torch import Tensor

from llm_ext import ops

if not ON_CUDA:
    pytest.skip("needs a GPU, and llm_ext with CUDA", allow_module_level=True)


def pooled(prefix: bool, inputs: Mapping[str, Tensor], **options: Any) -> list[Tensor]:
    """Results and gradients."""
    results = pool_functions(prefix, **options)[0](**inputs)
    loss = torch.stack([t.masked_fill(t.isinf(), 0).square().sum() for t in results]).sum()
    return [*results, *torch.autograd.grad(loss, list(inputs.values()))]


def attended(inputs: Mapping[str, Tensor], **options: Any) -> list[Tensor]:
    """Results and gradients."""
    results = additive_functions(need_weights=True, **options)[0](**inputs)
    return [*results, *torch.autograd.grad([t.square().sum() for t in results], list(inputs.values()))]


# Thread groups of less than a warp, of one warp and of several; several packs per thread; any D; whole rows and chunks.
POOL_SIZES = [(2, 400, 8), (1, 700, 256), (8, 300, 1024), (300, 40, 768), (3, 90, 4096), (2, 60, 8192), (2, 50, 9000)]
# Tq one, few and many; A of many chunks; several slabs of queries; more keys than threads per block.
ADDITIVE_SIZES = [(9, 1, 300, 1024, 512), (4, 10, 128, 1024, 96), (3, 50, 50, 512, 512), (2, 200, 260, 40, 33)]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(("B", "T", "D"), POOL_SIZES)
def test_every_pool_plan(B: int, T: int, D: int, dtype: torch.dtype, prefix: bool) -> None:
    inputs = pool_inputs(B, T, D, dtype, folded=D % 3 != 0, state=prefix, device="cuda")
    lengths, mask = torch.randint(0, T + 1, (B,), device="cuda"), torch.rand(B, T, device="cuda") < 0.9
    functions = pool_functions(prefix, lengths=lengths, mask=mask)
    compare(op_name(prefix), functions, inputs)
    first, second = (pooled(prefix, inputs, lengths=lengths, mask=mask) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows(dtype: torch.dtype) -> None:
    """Few and long rows, which have many chunks each; twice, with the same bits."""
    inputs = pool_inputs(4, 4300, 1024, dtype, folded=True, state=True, device="cuda")
    lengths, mask = torch.tensor([4300, 17, 0, 4000], device="cuda"), torch.rand(4, 4300, device="cuda") < 0.9
    functions = pool_functions(True, lengths=lengths, mask=mask)
    compare("prefix_pool", functions, inputs, gradients=dtype == torch.float32)
    with torch.no_grad():
        for a, b in zip(*(functions[0](**inputs) for _ in range(2)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("sizes", ADDITIVE_SIZES)
def test_every_additive_plan(sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    B, Tq, Tk, A, Dv = sizes
    inputs = additive_inputs(B, Tq, Tk, A, Dv, dtype, device="cuda")
    options = key_selection("both", B, Tq, Tk, "cuda")
    compare("additive_attention", additive_functions(need_weights=True, **options), inputs)
    first, second = (attended(inputs, **options) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def attention_calls() -> dict[str, Callable[[], list[Tensor]]]:
    """A call of each op, forward and backward, with lengths on the device."""
    lengths = torch.tensor([300, 17, 0], device="cuda")
    pools = [
        pool_inputs(3, 300, 256, torch.float32, folded=True, state=prefix, device="cuda") for prefix in (False, True)
    ]
    both = additive_inputs(3, 20, 300, 128, 64, torch.float32, device="cuda")
    return {
        "pool": lambda: pooled(False, pools[0], lengths=lengths),
        "prefix": lambda: pooled(True, pools[1], lengths=lengths),
        "additive": lambda: attended(both, key_lengths=lengths),
    }


@pytest.mark.parametrize("name", ["pool", "prefix", "additive"])
def test_attention_does_not_wait(name: str) -> None:
    """Calls do not wait for the device and can be captured; a replay gives the same bits."""
    call = attention_calls()[name]
    expected = [t.clone() for t in call()]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
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


def test_lengths_out_of_range() -> None:
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
    """Memory grows with Tq + Tk; nothing of size Tq × Tk × A is allocated."""
    A = 256
    for Tq, Tk in ((500, 500), (2000, 2000), (1, 4000), (4000, 1)):
        inputs = additive_inputs(B, Tq, Tk, A, A, torch.float32, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(ops.additive_attention(*inputs.values())[0].sum(), list(inputs.values()))
        assert torch.cuda.max_memory_allocated() - before <= 8 * 4 * B * (Tq + Tk) * A + (4 << 20)
