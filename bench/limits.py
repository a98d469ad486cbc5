"""Limits of the machine: multiply-adds, reads from cache and memory, copies, torch's matrix product.

A limit takes part in a comparison as a candidate that does the same work and nothing else. Its ratio is the fraction of
the limit that llm_ext reaches, measured in the same rounds.
"""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import timing
from bench.timing import Call

__all__ = ["copy", "has_vnni", "measure", "measure_cuda", "multiply_add", "read", "unavailable"]

_SOURCE = Path(__file__).with_suffix(".cpp")
# OpenMP shares runtime and threads with torch and llm_ext.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Compile `limits.cpp` for this machine, once per process; return the library, or why there is none."""
    compiler = shutil.which("g++")
    if compiler is None:
        return "g++ is needed to compile bench/limits.cpp, but is not installed"
    with tempfile.TemporaryDirectory(prefix="llm_ext-bench-") as folder:
        path = f"{folder}/limits.so"
        try:
            subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", path], check=True, capture_output=True, text=True)
            library = ctypes.CDLL(path)
        except (OSError, subprocess.CalledProcessError) as error:
            message = getattr(error, "stderr", None) or str(error)
            return f"bench/limits.cpp does not compile: {message.strip().splitlines()[0]}"
    for name in ("flops_per_round", "floats_per_group"):
        getattr(library, name).restype = ctypes.c_long
    library.multiply_add.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_float, ctypes.c_int]
    library.read.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_int]
    library.multiply_add.restype = library.read.restype = ctypes.c_double
    return library


def _compiled() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


def unavailable() -> str | None:
    """Return why multiply-adds and reads cannot be measured, or None if they can."""
    library = _library()
    return library if isinstance(library, str) else None


def multiply_add(gflop: float, threads: int) -> Call:
    """Return a call that does `gflop` GFLOP of float32 multiply-adds in registers; it returns 1 if it did the work."""
    library = _compiled()
    rounds = max(1, round(gflop * 1e9 / (library.flops_per_round() * threads)))
    # x = x / 2 + 1 converges from 0 to 2.
    expected = 2 - 2.0 ** (1 - rounds)
    return lambda: library.multiply_add(rounds, 0.5, 1.0, threads) / expected


def read(floats: int, passes: int, threads: int) -> Call:
    """Return a call that reads `floats` floats `passes` times, split among the threads; it returns 1 if it did."""
    library = _compiled()
    group = library.floats_per_group()
    groups = math.ceil(floats / (group * threads))
    data = torch.ones(groups * group * threads)
    return lambda: library.read(data.data_ptr(), groups, passes, threads)


def has_vnni() -> bool:
    """Return whether this machine multiplies and adds four bytes in one instruction."""
    words = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return "avx512_vnni" in words or "avx_vnni" in words


def copy(gb: float) -> Call:
    """Return a torch copy that moves `gb` GB, half read and half written; it returns 1 if it did."""
    source = torch.ones(round(gb * 1e9 / 8))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)[-1]


def measure(threads: int) -> dict[str, Any]:
    """Measure the limits of the machine, the best of several rounds each.

    Returns:
        copy_gb_per_s (read and written), product_gflop_per_s (torch, float32), read_gb_per_s and fma_gflop_per_s; the
        last two are None if they cannot be measured, and `unavailable` says why.
    """
    previous_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    size, gflop = 64 * 2**20, 2.0
    gb = size * 4 / 1e9
    a, b = torch.randn(2, 2048, 2048)
    calls: dict[str, Call] = {"copy": copy(2 * gb), "product": lambda: a @ b}
    reason = unavailable()
    if reason is None:
        calls |= {"read": read(size, 1, threads), "fma": multiply_add(gflop, threads)}
    turns = timing.take_turns(calls, 0.5 * len(calls), 7)
    torch.set_num_threads(previous_threads)
    best = {name: min(filter(None, seconds)) for name, seconds in turns.seconds.items()}
    return {
        "copy_gb_per_s": 2 * gb / best["copy"],
        "product_gflop_per_s": 2 * 2048**3 / best["product"] / 1e9,
        "read_gb_per_s": gb / best["read"] if reason is None else None,
        "fma_gflop_per_s": gflop / best["fma"] if reason is None else None,
        "unavailable": reason,
    }


# Matrix products on a GPU: dtype, and whether float32 factors may be rounded to TF32.
_PRODUCTS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}


def measure_cuda() -> dict[str, Any]:
    """Measure the limits of the current GPU, the best of several blocks each.

    Returns:
        copy_gb_per_s (read and written), and product_tflop_per_s of torch's matrix product, by type.
    """
    clock = timing.clock_for("cuda")
    source = torch.ones(256 * 2**20, device="cuda")
    target = torch.empty_like(source)
    size = 8192
    products = {}
    for name, (dtype, tf32) in _PRODUCTS.items():
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        a, b = torch.randn(2, size, size, device="cuda").to(dtype)
        out = torch.empty_like(a)
        seconds = min(clock.block(functools.partial(torch.mm, a, b, out=out), 3) for _ in range(5))
        products[name] = 2 * size**3 / seconds / 1e12
    seconds = min(clock.block(functools.partial(target.copy_, source), 5) for _ in range(5))
    return {"copy_gb_per_s": 2 * source.nbytes / seconds / 1e9, "product_tflop_per_s": products}
