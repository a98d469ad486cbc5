"""Devices that have kernels here, and the number of threads of a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import llm_ext

ON_CUDA = torch.cuda.is_available() and llm_ext.build_info()["cuda"] is not None
DEVICES = ("cpu", "cuda") if ON_CUDA else ("cpu",)
every_device = pytest.mark.parametrize("device", DEVICES)

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")


def supported_isas() -> tuple[str, ...]:
    """The ISAs up to the one in use."""
    return ISAS[: ISAS.index(llm_ext.build_info()["isa"]) + 1]


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Run a block with torch.set_num_threads(count)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
