"""Conversion of models that exist: layers of torch.nn become those of llm_ext, and back."""

from llm_ext.conversion.patching import patched
from llm_ext.conversion.tree import Convertible, convert, convertible, revert, to_torch

__all__ = ["Convertible", "convert", "convertible", "patched", "revert", "to_torch"]
