"""Peak memory of a call; `python -m bench.memory` prints how much additive attention takes beyond its results."""

from __future__ import annotations

import ctypes
import functools
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llm_ext
from bench import torch_attention
from bench.timing import Call

__all__ = ["peak", "unavailable"]

_SHAPES = ((1280, 1, 66, 1024), (128, 10, 128, 1024))  # B, Tq, Tk, A
_M_MMAP_THRESHOLD = -3  # parameter of glibc's mallopt


def _status(name: str) -> int:
    """The value of a line of /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def unavailable() -> str | None:
    """Return why peak memory cannot be measured, or None if it can."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        return None
    return "peak memory is read from /proc and needs glibc's malloc_trim"


def peak(call: Call) -> tuple[int, Any]:
    """Return by how many bytes resident memory rises at most during a call, and the result of the call."""
    call()  # the first call may allocate memory that stays
    gc.collect()
    # Free memory goes back to the system, so that it counts when it is allocated again.
    llm_ext.empty_cpu_cache()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present resident size
    before = _status("VmRSS")
    results = call()
    return _status("VmHWM") - before, results


def _ours(query: Tensor, keys: Tensor, v: Tensor, values: Tensor) -> Tensor:
    return llm_ext.ops.additive_attention(query, keys, v, values)[0]


def _train(forward: Callable[..., Tensor], inputs: list[Tensor], g: Tensor) -> list[Tensor]:
    context = forward(*inputs)
    return [context, *torch.autograd.grad(context, inputs, g)]


def _infer(forward: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        return [forward(*inputs)]


def main() -> int:
    """Print a row for each shape and phase."""
    if (reason := unavailable()) is not None:
        print(f"python -m bench.memory: {reason}", file=sys.stderr)
        return 1
    # Freed blocks of 64 kB or more go back to the system at once instead of staying with malloc.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    print("Peak memory in MB; that of llm_ext and torch without the results")
    print(f"{'B, Tq, Tk, A':<24}{'':<12}{'results':>10}{'llm_ext':>10}{'torch':>10}")
    for B, Tq, Tk, A in _SHAPES:
        query, keys, values = (torch.randn(B, T, A, requires_grad=True) for T in (Tq, Tk, Tk))
        v = torch.randn(A, requires_grad=True)
        inputs, g = [query, keys, v, values], torch.randn(B, Tq, A)
        for phase, run in (("inference", _infer), ("training", functools.partial(_train, g=g))):
            own_peak, returned = peak(functools.partial(run, _ours, inputs))
            torch_peak, _ = peak(functools.partial(run, torch_attention.additive_projected, inputs))
            results = sum(tensor.nbytes for tensor in returned)
            row = f"{f'{B}, {Tq}, {Tk}, {A}':<24}{phase:<12}{results / 1e6:>10.1f}"
            print(f"{row}{(own_peak - results) / 1e6:>10.1f}{(torch_peak - results) / 1e6:>10.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
