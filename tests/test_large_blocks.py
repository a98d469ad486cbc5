"""Memory of large results: it waits for the next one of its size, and nobody who still looks at it sees a change."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import llm_ext
from llm_ext import ops

MB = 1 << 20
# Columns of a result of float32 that is as large as this many MB, of 1024 rows.
PER_MB = MB // 4 // 1024


@pytest.fixture(autouse=True)
def _nothing_waits() -> Iterator[None]:
    llm_ext.empty_cache()
    yield
    llm_ext.empty_cache()


def large(megabytes: int, seed: int = 0) -> Tensor:
    """A result of that size, whose numbers depend on the seed."""
    x = torch.full((1024, 1), float(seed + 1))
    return ops.linear(x, torch.arange(PER_MB * megabytes, dtype=torch.float32)[:, None])


def expected(megabytes: int, seed: int = 0) -> Tensor:
    return torch.full((1024, 1), float(seed + 1)) * torch.arange(PER_MB * megabytes, dtype=torch.float32)


def test_memory_is_used_again() -> None:
    y = large(40)
    place = y.data_ptr()
    assert llm_ext.cached_bytes() == 0
    del y
    assert llm_ext.cached_bytes() == 40 * MB
    again = large(40, 1)
    assert again.data_ptr() == place
    assert llm_ext.cached_bytes() == 0
    assert torch.equal(again, expected(40, 1))


@pytest.mark.parametrize("columns", [1024, 1025, 1152, 1229, 1536, 1537, 1800, 2049, 3000])
def test_memory_of_any_size_is_used_again(columns: int) -> None:
    """Blocks are whole huge pages, which is much more than 4 MB and a little."""
    x, w = torch.ones(1024, 1), torch.ones(columns, 1)
    place = ops.linear(x, w).data_ptr()
    waiting = llm_ext.cached_bytes()
    assert 4 * MB <= waiting < 4 * 1024 * columns + 2 * MB
    for _ in range(3):
        assert ops.linear(x, w).data_ptr() == place
        assert llm_ext.cached_bytes() == waiting


def test_nothing_that_lives_is_used() -> None:
    results = [large(40, seed) for seed in range(4)]
    assert len({y.data_ptr() for y in results}) == 4
    for seed, y in enumerate(results):
        assert torch.equal(y, expected(40, seed))


def test_views_arrays_and_storages_keep_it_alive() -> None:
    for keep in (lambda y: y[3:], lambda y: y.numpy(), lambda y: y.untyped_storage(), lambda y: y.detach()):
        kept = keep(large(40))
        assert llm_ext.cached_bytes() == 0
        large(40, 7)
        if isinstance(kept, Tensor):
            assert torch.equal(kept, expected(40)[-len(kept) :])
        del kept
        assert llm_ext.cached_bytes() >= 40 * MB
        llm_ext.empty_cache()


def test_a_block_serves_what_is_about_its_size() -> None:
    large(50)
    kept = [large(40), large(45)]  # the first takes a quarter too much, the second is served anew
    assert llm_ext.cached_bytes() == 0
    kept.clear()
    assert llm_ext.cached_bytes() == (50 + 46) * MB  # in whole huge pages
    large(100)  # too large for either
    assert llm_ext.cached_bytes() == (50 + 46 + 100) * MB
    assert large(32).data_ptr() % (2 * MB) == 0


def test_small_results_are_left_to_the_allocator() -> None:
    large(3)
    assert llm_ext.cached_bytes() == 0


def test_no_more_than_512_mb_wait() -> None:
    results = [large(size) for size in (100, 120, 140, 160, 180)]
    while results:
        results.pop(0)
        assert llm_ext.cached_bytes() <= 512 * MB
    assert llm_ext.cached_bytes() == (140 + 160 + 180) * MB  # those that have waited longest have gone
    llm_ext.empty_cache()
    assert llm_ext.cached_bytes() == 0


def test_gradients_and_changes_in_place() -> None:
    x = torch.ones(1024, 1, requires_grad=True)
    w = torch.ones(PER_MB * 40, 1, requires_grad=True)
    for _ in range(3):
        y = ops.linear(x, w)
        y.mul_(2)
        dx, dw = torch.autograd.grad(y.sum(), (x, w))
        assert dx.eq(2 * PER_MB * 40).all()
        assert dw.eq(2 * 1024).all()


def test_threads() -> None:
    wrong: list[int] = []

    def run(seed: int) -> None:
        for _ in range(8):
            y = large(32, seed)
            if not torch.equal(y, expected(32, seed)):
                wrong.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_its_own() -> None:
    code = """
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
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tensors_may_outlive_everything() -> None:
    code = "import torch\nfrom llm_ext import ops\ny = ops.linear(torch.ones(1024, 1), torch.ones(10240, 1))"
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_more_than_there_is() -> None:
    x, w = torch.ones(1, 1).expand(1 << 24, 1), torch.ones(1, 1).expand(1 << 24, 1)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory: no 1125899906842624 bytes to be had on cpu"):
        ops.linear(x, w)
