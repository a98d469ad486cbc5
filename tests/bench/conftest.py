"""Fixtures: small cases, settings and records."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import limits, peers, recording, timing
from bench.comparison import OURS, Candidate, Case, Comparison, Settings

AT_BEST = {
    "copy_gb_per_s": 3.0,
    "product_gflop_per_s": 4.0,
    "read_gb_per_s": 2.0,
    "fma_gflop_per_s": 5.0,
    "unavailable": None,
}


def _returning(value: float, delay: float = 0.0) -> Callable[[], timing.Call]:
    def call() -> Tensor:
        time.sleep(delay)
        return torch.tensor([1.0, value])

    return lambda: call


def _failing() -> timing.Call:
    raise RuntimeError("does not build\nfor many reasons")


@pytest.fixture
def settings() -> Settings:
    """Settings for which the targets apply, without JAX."""
    libraries = list(peers.CPU_LIBRARIES)
    return Settings(threads=2, dtype=torch.float32, seconds=0.01, rounds=2, libraries=libraries, absent=["jax"])


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """Return a builder of a case with candidates of every status; `ours` is the result of llm_ext, 2 is correct."""

    def make(ours: float = 2.0) -> Case:
        def build(dtype: torch.dtype, threads: int) -> Comparison:
            others = [
                Candidate("slow", "torch", _returning(2.0, delay=0.02)),
                Candidate("quick", "torch", _returning(2.0)),
                Candidate("wrong", "torch", _returning(2.01)),
                Candidate("failing", "onnxruntime", _failing),
                Candidate("missing", "jax", _failing),
                Candidate("another use", OURS, _returning(3.0), reference=[torch.tensor([1.0, 3.0]).double()]),
            ]
            reference = [torch.tensor([1.0, 2.0]).double()]
            return Comparison(reference, Candidate("ours", OURS, _returning(ours, delay=0.001)), others)

        return Case("small/inference/B1", build, False, 3.0, "thing", {"slow": 1.5, "quick": 1e6, "failing": 2})

    return make


@pytest.fixture
def record() -> dict[str, Any]:
    """Return the record of a run without cases."""
    return {
        "format": recording.FORMAT,
        "started": "2026-01-01T00:00:00+0000",
        "machine": {"cpu": "a CPU", "cores": 2, "memory_gb": 1.0, "system": "Linux", "load": 0.0},
        "versions": {
            "python": "3.11",
            "llm_ext": "0.1",
            "build_info": {"torch": "2.13.0+cpu", "isa": "avx2"},
            "peers": {"jax": None, "torch": "2.13.0"},
        },
        "limits": AT_BEST,
        "settings": {
            "device": "cpu",
            "threads": 2,
            "dtype": "float32",
            "libraries": ["torch", "jax"],
            "absent": ["jax"],
        },
        "cases": [],
        "means": [],
    }


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace timing by one second per call, so that only results are checked."""

    def take_turns(calls: dict[str, timing.Call], seconds: float, rounds: int, device: str) -> timing.Turns:
        return timing.Turns(dict.fromkeys(calls, [1.0] * rounds), dict.fromkeys(calls, 1))

    monkeypatch.setattr(timing, "take_turns", take_turns)


@pytest.fixture
def measured_limits(monkeypatch: pytest.MonkeyPatch) -> dict[str, float | None]:
    """Replace the measurement of the machine's limits by fixed values."""
    monkeypatch.setattr(limits, "measure", lambda threads: AT_BEST)
    return AT_BEST
