"""Which tests expect an exception, by their text."""

from __future__ import annotations

import inspect

import pytest


def throws(item: pytest.Item) -> bool:
    """Whether the function of a test uses `pytest.raises`."""
    function = getattr(item, "function", None)
    # hypothesis keeps the function that it wraps.
    function = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    return function is not None and "pytest.raises" in inspect.getsource(function)
