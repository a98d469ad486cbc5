"""Memory: uninitialized memory that holds NaN, so that a result which depends on it is found; and a limit."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def fill_uninitialized_memory() -> bool:
    """Make torch's CPU allocator fill fresh memory with a pattern that is NaN in float32; False if it cannot.

    It covers torch.empty and all allocations of C++ ops, which torch.utils.deterministic.fill_uninitialized_memory
    does not. The pattern is about 1e308 in float64, and NaN in every other element of 16 bits.
    """
    libraries = list((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    for path in libraries:
        try:
            flag = ctypes.c_bool.in_dll(ctypes.CDLL(str(path)), "FLAGS_caffe2_cpu_allocator_do_junk_fill")
        except (OSError, ValueError):
            continue
        flag.value = True
        return True
    return False


@contextmanager
def memory_limit(megabytes: int) -> Iterator[None]:
    """Let the process allocate no more than this. The shadow memory of AddressSanitizer is beyond any limit."""
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (megabytes << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
