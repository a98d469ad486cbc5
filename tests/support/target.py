"""The `ops` module under test: llm_ext.ops, or the one that a test puts here (CUDA ops in the emulator)."""

from __future__ import annotations

from typing import Any

import llm_ext.ops
import llm_ext.reference

ops: Any = llm_ext.ops
reference: Any = llm_ext.reference
