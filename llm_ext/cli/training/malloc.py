"""Settings of the C library's allocator for training."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB of freed memory for this process; other C libraries are left unchanged.

    Each training step frees its memory and the next one allocates as much again. By default glibc returns it to the
    system in between, which clears every page again: 4 % of a step of the Shakespeare demo.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest value it accepts
