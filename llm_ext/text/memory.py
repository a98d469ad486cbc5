"""What the allocator does with the memory of a training step."""

from __future__ import annotations

import ctypes

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Tell glibc to keep up to 1 GiB that is freed, for the whole process; other allocators are left alone.

    A training step frees all it has allocated, the next takes as much again. By default glibc gives it back to the
    system in between, and the system clears each page once more: 4 % of a step of the demo.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest it takes
