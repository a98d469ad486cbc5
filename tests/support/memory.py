"""Uninitialized memory that holds NaN, so that a result which depends on it is found."""

from __future__ import annotations

import ctypes
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
