"""Peak memory of additive attention: `python -m bench.memory` prints what a call takes beside arguments and results."""

from __future__ import annotations

import ctypes
import functools
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import llm_ext
from bench import plain

# B, Tq, Tk, A
SHAPES = ((1280, 1, 66, 1024), (128, 10, 128, 1024))


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def peak(call: Callable[[], list[Tensor]]) -> tuple[int, int]:
    """Return how many bytes resident memory rises during a call at most, and how many its results have."""
    call()  # what the first call makes may stay
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = _status("VmRSS")
    results = call()
    return _status("VmHWM") - before, sum(result.nbytes for result in results)


def _train(forward: Callable[..., Tensor], inputs: list[Tensor], g: Tensor) -> list[Tensor]:
    context = forward(*inputs)
    return [context, *torch.autograd.grad(context, inputs, g)]


def _infer(forward: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        return [forward(*inputs)]


def main() -> int:
    """Print a row for each shape and mode."""
    if sys.platform != "linux":
        print("python -m bench.memory reads /proc, which only Linux has", file=sys.stderr)
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
            (own, results), (other, _) = (
                peak(functools.partial(run, f, inputs)) for f in (ours, plain.additive_of_projected)
            )
            row = f"{f'{B}, {Tq}, {Tk}, {A}':<24}{mode:<12}{results / 1e6:>10.1f}"
            print(f"{row}{(own - results) / 1e6:>10.1f}{(other - results) / 1e6:>10.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
