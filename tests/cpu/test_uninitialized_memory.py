"""The fixture of tests/conftest.py that makes uninitialized memory visible."""

from __future__ import annotations

import torch


def test_fresh_memory_holds_nan() -> None:
    """If this fails, torch has renamed the flag that tests/support/memory.py sets."""
    assert torch.empty(1000).isnan().all()
    assert torch.empty(1000, dtype=torch.bfloat16).isnan().any()
