"""The fixture of tests/conftest.py that makes uninitialized memory visible."""

from __future__ import annotations

import torch


def test_fresh_memory_holds_nan() -> None:
    """If this fails, torch has renamed the flag that tests/support/memory.py sets."""
    assert torch.empty(1000).isnan().all()
    assert torch.empty(1000, dtype=torch.bfloat16).isnan().any()
    assert torch.ops.llm_ext.linear_forward(torch.ones(2, 3), torch.ones(4, 3), None).eq(3).all()
