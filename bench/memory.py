"""Peak memory of a call; `python -m bench.memory` prints what additive attention takes beside arguments and results."""

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
from bench import plain
from bench.timing import Call

# B, Tq, Tk, A
SHAPES = ((1280, 1, 66, 1024), (128, 10, 128, 1024))


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def absent() -> str | None:
    """Return why peaks cannot be measured; None if they can."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        return None
    return "the peak of memory is read from /proc, and free memory given back by glibc"


def peak(call: Call) -> tuple[int, Any]:
    """Return how many bytes resident memory rises during a call at most, and what the call returned."""
    call()  # what the first call makes may stay
    gc.collect()
    # What is free goes back to the system, so that it counts when it is taken again.
    llm_ext.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = _status("VmRSS")
    results = call()
    return _status("VmHWM") - before, results


def _train(forward: Callable[..., Tensor], inputs: list[Tensor], g: Tensor) -> list[Tensor]:
    context = forward(*inputs)
    return [context, *torch.autograd.grad(context, inputs, g)]


def _infer(forward: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        return [forward(*inputs)]


def main() -> int:
    """Print a row for each shape and mode."""
    if (why := absent()) is not None:
        print(f"python -m bench.memory: {why}", file=sys.stderr)
        return 1
    # What is freed goes back to the system at once, so that nothing hides in what malloc has kept: M_MMAP_THRESHOLD.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    print(f"{'B, Tq, Tk, A':<24}{'':<12}{'results':>10}{'llm_ext':>10}{'torch':>10}   MB; beside the results")
    for B, Tq, Tk, A in SHAPES:
        query, keys, values = (torch.randn(B, T, A, requires_grad=True) for T in (Tq, Tk, Tk))
        v = torch.randn(A, requires_grad=True)
        inputs, g = [query, keys, v, values], torch.randn(B, Tq, A)

        def ours(query: Tensor, keys: Tensor, v: Tensor, values: Tensor) -> Tensor:
            return llm_ext.ops.additive_attention(query, keys, v, values)[0]

        for mode, run in (("inference", _infer), ("training", functools.partial(_train, g=g))):
            (own, returned), (other, _) = (
                peak(functools.partial(run, f, inputs)) for f in (ours, plain.additive_of_projected)
            )
            results = sum(tensor.nbytes for tensor in returned)
            row = f"{f'{B}, {Tq}, {Tk}, {A}':<24}{mode:<12}{results / 1e6:>10.1f}"
            print(f"{row}{(own - results) / 1e6:>10.1f}{(other - results) / 1e6:>10.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
