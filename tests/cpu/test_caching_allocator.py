"""The CPU caching allocator: freed blocks serve later large tensors, and never memory that is still in use."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from support.process import check_fork, check_python
from torch import Tensor

import llm_ext
from llm_ext import ops

MB = 1 << 20
# Columns of a float32 result with 1024 rows that is 1 MB large.
COLUMNS_PER_MB = MB // 4 // 1024


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    llm_ext.empty_cpu_cache()
    yield
    llm_ext.empty_cpu_cache()


def large(megabytes: int, seed: int = 0) -> Tensor:
    """A result of that size, whose values depend on the seed."""
    x = torch.full((1024, 1), float(seed + 1))
    return ops.linear(x, torch.arange(COLUMNS_PER_MB * megabytes, dtype=torch.float32)[:, None])


def expected(megabytes: int, seed: int = 0) -> Tensor:
    return torch.full((1024, 1), float(seed + 1)) * torch.arange(COLUMNS_PER_MB * megabytes, dtype=torch.float32)


def test_reuse() -> None:
    y = large(40)
    address = y.data_ptr()
    assert llm_ext.cpu_cache_bytes() == 0
    del y
    assert llm_ext.cpu_cache_bytes() == 40 * MB
    again = large(40, 1)
    assert again.data_ptr() == address
    assert llm_ext.cpu_cache_bytes() == 0
    assert torch.equal(again, expected(40, 1))


@pytest.mark.parametrize("columns", [1024, 1025, 1152, 1229, 1536, 1537, 1800, 2049, 3000])
def test_reuse_of_any_size(columns: int) -> None:
    """Blocks are whole huge pages, which is much more than a size slightly above 4 MB."""
    x, w = torch.ones(1024, 1), torch.ones(columns, 1)
    address = ops.linear(x, w).data_ptr()
    cached = llm_ext.cpu_cache_bytes()
    assert 4 * MB <= cached < 4 * 1024 * columns + 2 * MB
    for _ in range(3):
        assert ops.linear(x, w).data_ptr() == address
        assert llm_ext.cpu_cache_bytes() == cached


def test_resizing() -> None:
    """A large result can be made smaller, but not larger; its clone can."""
    y = large(4).resize_(3, 3)
    assert torch.equal(y.flatten(), expected(4).flatten()[:9])
    with pytest.raises(RuntimeError, match="not resizable"):
        y.resize_(2 * COLUMNS_PER_MB * 4, 1024)
    assert large(4).clone().resize_(8 * MB).numel() == 8 * MB


def test_live_tensors_keep_their_memory() -> None:
    results = [large(8, seed) for seed in range(4)]
    assert len({y.data_ptr() for y in results}) == 4
    for seed, y in enumerate(results):
        assert torch.equal(y, expected(8, seed))


@pytest.mark.parametrize(
    "keep",
    [lambda y: y[3:], lambda y: y.numpy(), lambda y: y.untyped_storage(), lambda y: y.detach()],
    ids=["view", "numpy", "storage", "detach"],
)
def test_whatever_refers_to_memory_keeps_it(keep: Callable[[Tensor], object]) -> None:
    kept = keep(large(40))
    assert llm_ext.cpu_cache_bytes() == 0
    large(40, 7)
    if isinstance(kept, Tensor):
        assert torch.equal(kept, expected(40)[-len(kept) :])
    del kept
    assert llm_ext.cpu_cache_bytes() >= 40 * MB


def test_block_serves_similar_sizes() -> None:
    large(50)
    kept = [large(40), large(45)]  # the first takes a block a quarter too large, the second gets a new one
    assert llm_ext.cpu_cache_bytes() == 0
    kept.clear()
    assert llm_ext.cpu_cache_bytes() == (50 + 46) * MB  # in whole huge pages
    y = large(42)  # takes the smaller of two that fit, which was freed first
    assert llm_ext.cpu_cache_bytes() == 50 * MB
    del y
    large(100)  # larger than either
    assert llm_ext.cpu_cache_bytes() == (50 + 46 + 100) * MB
    large(36)  # all are too large
    assert llm_ext.cpu_cache_bytes() == (50 + 46 + 100 + 36) * MB
    assert large(32).data_ptr() % (2 * MB) == 0


def test_small_tensors_use_torch_allocator() -> None:
    large(3)
    assert llm_ext.cpu_cache_bytes() == 0


def test_limit() -> None:
    results = [large(size) for size in (100, 120, 140, 160, 180)]
    while results:
        results.pop(0)
        assert llm_ext.cpu_cache_bytes() <= 512 * MB
    assert llm_ext.cpu_cache_bytes() == (140 + 160 + 180) * MB  # the least recently freed are gone
    large(520)  # larger than the limit
    assert llm_ext.cpu_cache_bytes() == (140 + 160 + 180) * MB
    llm_ext.empty_cpu_cache()
    assert llm_ext.cpu_cache_bytes() == 0


def test_results_do_not_depend_on_reused_memory() -> None:
    """A block that holds NaN is reused as result, workspace and gradient."""
    inputs = [torch.randn(24, 40, 900, requires_grad=True), torch.randn(900, requires_grad=True)]
    weight = torch.randn(1100, 900, requires_grad=True)

    def run() -> list[Tensor]:
        c, _ = ops.prefix_pool(*inputs)
        y = ops.linear(c, weight)
        return [y, *torch.autograd.grad(y.square().sum(), [*inputs, weight])]

    first = run()
    for _ in range(2):
        nan = [torch.full((), float("nan")) + 0 * large(size) for size in (4, 5, 6)]
        ops.linear(torch.full((1024, 1), float("nan")), torch.ones(1100, 1))
        del nan
        assert llm_ext.cpu_cache_bytes() > 0
        for a, b in zip(run(), first, strict=True):
            assert torch.equal(a, b)


def test_gradients_and_changes_in_place() -> None:
    x = torch.ones(1024, 1, requires_grad=True)
    w = torch.ones(COLUMNS_PER_MB * 8, 1, requires_grad=True)
    for _ in range(3):
        y = ops.linear(x, w)
        y.mul_(2)
        dx, dw = torch.autograd.grad(y.sum(), (x, w))
        assert dx.eq(2 * COLUMNS_PER_MB * 8).all()
        assert dw.eq(2 * 1024).all()


def test_threads() -> None:
    wrong: list[int] = []

    def run(seed: int) -> None:
        for _ in range(8):
            if not torch.equal(large(8, seed), expected(8, seed)):
                wrong.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_returns_to_the_system() -> None:
    """After larger results too, for whose sake malloc keeps memory; and where the process gets no more."""
    check_python(
        """
import os, resource, torch, llm_ext

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

w = torch.ones(1024, 1)
llm_ext.ops.linear(torch.ones(2, 1), w)
for megabytes in (20, 5, 12, 19):
    before = resident()
    results = [llm_ext.ops.linear(torch.ones(256 * megabytes, 1), w) for _ in range(8)]
    assert resident() - before >= 7 * megabytes
    del results
    assert resident() - before >= 7 * megabytes
    llm_ext.empty_cpu_cache()
    assert resident() - before < megabytes, (megabytes, before, resident())
llm_ext.ops.linear(torch.ones(256 * 200, 1), w)
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + (50 << 20),) * 2)
llm_ext.ops.linear(torch.ones(256 * 220, 1), w)
"""
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_process_has_its_own_cache() -> None:
    check_fork(
        """
import os, torch
from llm_ext import ops
torch.set_num_threads(1)
x, w = torch.ones(1024, 1), torch.ones(10240, 1)
y = ops.linear(x, w)
ops.linear(x, 2 * w)
child = os.fork()
if child == 0:
    z = ops.linear(x, 3 * w)
    os._exit(0 if z.eq(3).all() and y.eq(1).all() else 1)
assert os.waitpid(child, 0)[1] == 0
assert y.eq(1).all() and ops.linear(x, 4 * w).eq(4).all()
"""
    )


def test_tensors_may_outlive_the_module() -> None:
    check_python("import torch\nfrom llm_ext import ops\ny = ops.linear(torch.ones(1024, 1), torch.ones(10240, 1))")


def test_out_of_memory() -> None:
    x, w = torch.ones(1, 1).expand(1 << 24, 1), torch.ones(1, 1).expand(1 << 24, 1)
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory: .*1125899906842624 bytes .*on cpu"):
        ops.linear(x, w)
